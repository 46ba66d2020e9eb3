// Every op of the library: the table of contents. Each family registers its kernels from csrc/<family>/op.cpp;
// gradients, fake kernels, batching and autocast rules are in python/isthmus/ops/<family>.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/parallel.h"

using torch::stable::detail::StableLibrary;

namespace isthmus {

void register_gaussian(StableLibrary&);
void register_likelihood(StableLibrary&);
void register_divergence(StableLibrary&);
void register_pairwise(StableLibrary&);
void register_categorical(StableLibrary&);
void register_codebook(StableLibrary&);
void register_residual(StableLibrary&);
void register_assignment(StableLibrary&);
void register_scalar(StableLibrary&);
void register_topk(StableLibrary&);
void register_selection(StableLibrary&);
void register_sparse(StableLibrary&);
void register_adam(StableLibrary&);
void register_bayes(StableLibrary&);

namespace {

// clang-format off
void define_schemas(StableLibrary& m) {
  // gaussian
  m.def("gaussian_noise(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("gaussian_sample(Tensor mean, Tensor? scale, Tensor key, str scale_type, int packed_dim, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature) -> Tensor");
  m.def("gaussian_sample_backward(Tensor grad, Tensor mean, Tensor? scale, Tensor key, str scale_type, int packed_dim, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature) -> (Tensor, Tensor)");
  m.def("gaussian_sample_kl(Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? mask, Tensor key, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature, str reduction, int groups, float weight, float posterior_weight, float prior_weight) -> (Tensor, Tensor)");
  m.def("gaussian_sample_kl_backward(Tensor grad_z, Tensor grad_kl, Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? mask, Tensor key, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature, str reduction, int groups, float weight, float posterior_weight, float prior_weight, bool prior_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_sample_log_prob(Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor key, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature, str gradient, int groups) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_sample_log_prob_backward(Tensor grad_z, Tensor grad_kl, Tensor grad_log_q, Tensor grad_log_p, Tensor? gate, Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor key, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, int num_samples, bool antithetic, float temperature, bool path_only, bool prior_gradient) -> (Tensor, Tensor, Tensor, Tensor)");

  // divergence
  m.def("gaussian_kl(Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? mask, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, str reduction, int groups, float weight, float posterior_weight, float prior_weight) -> Tensor");
  m.def("gaussian_kl_backward(Tensor grad, Tensor mean, Tensor? scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? mask, str scale_type, int packed_dim, bool residual, str clamp_mode, float clamp_low, float clamp_high, str reduction, int groups, float weight, float posterior_weight, float prior_weight, bool prior_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("log_mean_exp(Tensor log_weights, int groups) -> Tensor");
  m.def("log_mean_exp_backward(Tensor grad, Tensor log_weights, Tensor bound) -> Tensor");

  // likelihood
  m.def("gaussian_nll(Tensor x, Tensor mean, Tensor scale, Tensor? weight, str scale_type, float beta, str reduction) -> Tensor");
  m.def("gaussian_nll_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor? weight, str scale_type, float beta, str reduction, bool need_x, bool need_mean, bool need_scale) -> (Tensor, Tensor, Tensor)");
  m.def("discretized_gaussian_nll(Tensor x, Tensor mean, Tensor scale, float bin_width, float low, float high, str scale_type, str reduction) -> Tensor");
  m.def("discretized_gaussian_nll_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, float bin_width, float low, float high, str scale_type, str reduction, bool need_x, bool need_mean, bool need_scale) -> (Tensor, Tensor, Tensor)");
  m.def("generalized_gaussian_nll(Tensor x, Tensor mean, Tensor scale, Tensor shape, str reduction) -> Tensor");
  m.def("generalized_gaussian_nll_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shape, str reduction, bool need_x, bool need_mean, bool need_scale, bool need_shape) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("discretized_logistic_mixture_nll(Tensor x, Tensor parameters, int num_mixtures, int bins, float min_log_scale, str reduction) -> Tensor");
  m.def("discretized_logistic_mixture_nll_backward(Tensor grad, Tensor x, Tensor parameters, int num_mixtures, int bins, float min_log_scale, str reduction, bool need_x, bool need_parameters) -> (Tensor, Tensor)");

  // pairwise
  m.def("mixture_log_prob(Tensor z, Tensor mean, Tensor scale, Tensor? log_weight, str scale_type, str over) -> (Tensor, Tensor)");
  m.def("mixture_log_prob_backward(Tensor grad, Tensor normalizer, Tensor z, Tensor mean, Tensor scale, Tensor? log_weight, str scale_type, str over, bool need_z, bool need_components, bool need_log_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("aggregate_log_prob(Tensor z, Tensor mean, Tensor scale, SymInt dataset_size, str estimator, str scale_type) -> (Tensor, Tensor, Tensor)");
  m.def("aggregate_log_prob_backward(Tensor grad_joint, Tensor grad_marginal, Tensor log_marginal, Tensor normalizer, Tensor z, Tensor mean, Tensor scale, SymInt dataset_size, str estimator, str scale_type, bool need_z, bool need_components) -> (Tensor, Tensor, Tensor)");
  m.def("mmd(Tensor x, Tensor y, str kernel, float[] bandwidths, str estimator) -> Tensor");
  m.def("mmd_backward(Tensor grad, Tensor x, Tensor y, str kernel, float[] bandwidths, str estimator, bool need_x, bool need_y) -> (Tensor, Tensor)");

  // categorical
  m.def("gumbel_noise(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("gumbel_softmax(Tensor logits, Tensor key, float temperature, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor grad, Tensor y, float temperature) -> Tensor");
  m.def("gumbel_softmax_hard_backward(Tensor grad, Tensor logits, Tensor key, float temperature) -> Tensor");
  m.def("gumbel_softmax_kl(Tensor logits, Tensor? prior_logits, Tensor key, float temperature, bool hard) -> (Tensor, Tensor)");
  m.def("gumbel_softmax_kl_backward(Tensor grad_y, Tensor grad_kl, Tensor logits, Tensor? prior_logits, Tensor key, float temperature, bool prior_gradient) -> (Tensor, Tensor)");
  m.def("categorical_kl(Tensor logits, Tensor? prior_logits) -> Tensor");
  m.def("categorical_kl_backward(Tensor grad, Tensor logits, Tensor? prior_logits, bool prior_gradient) -> (Tensor, Tensor)");

  // codebook
  m.def("vq_assign(Tensor x, Tensor codebook, Tensor? mask, str metric, int topk) -> Tensor");
  m.def("vq_match(Tensor x, Tensor codebook, str metric) -> (Tensor, Tensor)");
  m.def("vq_quantize(Tensor x, Tensor codebook, Tensor? mask, str metric, str gradient, float commitment_weight) -> (Tensor, Tensor, Tensor)");
  m.def("vq_gather(Tensor x, Tensor codebook, Tensor indices, str gradient, float commitment_weight) -> (Tensor, Tensor)");
  m.def("vq_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor codebook, Tensor indices, str gradient, float commitment_weight, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
  m.def("code_totals(Tensor x, Tensor indices, SymInt num_codes) -> Tensor");
  m.def("update_codebook_(Tensor(a!) codebook, Tensor(b!) usage, Tensor(c!)? sums, Tensor counts, Tensor? batch_sums, Tensor? code_weight, Tensor? candidates, float decay, float eps, float revive_below, bool normalize) -> ()");

  // residual
  m.def("residual_vq_quantize(Tensor x, Tensor codebooks, Tensor? stages, SymInt[] sizes, int beam, str gradient, float commitment_weight) -> (Tensor, Tensor, Tensor)");
  m.def("residual_vq_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor codebooks, Tensor indices, SymInt[] sizes, str gradient, float commitment_weight, bool need_x, bool need_codebooks) -> (Tensor, Tensor)");
  m.def("residual_code_totals(Tensor x, Tensor codebooks, Tensor indices, SymInt[] sizes) -> Tensor");

  // assignment
  m.def("vq_sample(Tensor x, Tensor codebook, Tensor? mask, Tensor key, str metric, float temperature) -> Tensor");
  m.def("vq_soft_quantize(Tensor x, Tensor codebook, Tensor? mask, Tensor? key, str metric, float temperature, float relaxation, bool hard) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("vq_soft_quantize_backward(Tensor grad, Tensor centred, Tensor normalizer, Tensor x, Tensor codebook, Tensor? mask, Tensor? key, str metric, float temperature, float relaxation, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
  m.def("vq_soft_statistics(Tensor x, Tensor codebook, Tensor? mask, str metric, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def("vq_soft_statistics_backward(Tensor? grad_entropy, Tensor? grad_usage, Tensor entropy, Tensor normalizer, Tensor x, Tensor codebook, Tensor? mask, str metric, float temperature, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
  m.def("vq_cross_entropy(Tensor x, Tensor codebook, Tensor indices, str metric, float temperature) -> (Tensor, Tensor)");
  m.def("vq_cross_entropy_backward(Tensor grad, Tensor normalizer, Tensor x, Tensor codebook, Tensor indices, str metric, float temperature, bool need_x, bool need_codebook) -> (Tensor, Tensor)");

  // scalar
  m.def("fsq_quantize(Tensor x, int[] levels, Tensor? mask, Tensor? key, bool symmetric, bool hard_clamp, float noise_dropout) -> (Tensor, Tensor)");
  m.def("fsq_quantize_backward(Tensor grad, Tensor x, int[] levels, Tensor? mask, bool symmetric, bool hard_clamp) -> Tensor");
  m.def("residual_fsq_quantize(Tensor x, int[] levels, int num_quantizers, Tensor? stages, bool hard_clamp) -> (Tensor, Tensor)");
  m.def("residual_fsq_quantize_backward(Tensor grad, Tensor x, int[] levels, Tensor? stages, bool hard_clamp) -> Tensor");
  m.def("lfq_quantize(Tensor x, Tensor? mask, float scale, bool spherical) -> (Tensor, Tensor, Tensor)");
  m.def("lfq_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor? mask, float scale, bool spherical) -> Tensor");
  m.def("lfq_quantize_entropy(Tensor x, Tensor? mask, float scale, bool spherical, Tensor inverse_temperature, int codebooks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lfq_quantize_entropy_backward(Tensor grad_quantized, Tensor grad_error, Tensor grad_entropy, Tensor grad_bit_counts, Tensor x, Tensor? mask, float scale, bool spherical, Tensor inverse_temperature, int codebooks) -> Tensor");
  m.def("latent_quantize(Tensor x, Tensor codebooks, int[] levels, Tensor? mask, float commitment_weight) -> (Tensor, Tensor, Tensor)");
  m.def("latent_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor codebooks, int[] levels, Tensor? mask, float commitment_weight, bool need_codebooks) -> (Tensor, Tensor)");
  m.def("fsq_decode(Tensor indices, int[] levels, bool symmetric, bool first_highest, float scale, ScalarType dtype) -> Tensor");
  m.def("latent_decode(Tensor indices, Tensor codebooks, int[] levels) -> Tensor");
  m.def("latent_decode_backward(Tensor grad, Tensor indices, int[] levels) -> Tensor");
  m.def("binary_map(Tensor logits, Tensor? key, str gradient, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def("binary_map_backward(Tensor grad_bits, Tensor grad_entropy, Tensor logits, Tensor? key, str gradient, float temperature) -> Tensor");
  m.def("pack_bits(Tensor indices, int bits) -> Tensor");
  m.def("unpack_bits(Tensor packed, int bits, SymInt length) -> Tensor");
  m.def("narrow_indices(Tensor indices, int num_codes) -> Tensor");

  // topk
  m.def("topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, str activation, int groups, Tensor? among, bool return_order) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // selection
  m.def("threshold_encode(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, bool return_order) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("batch_topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt entries, str activation, bool return_order) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // sparse
  m.def("latent_order(Tensor indices, SymInt num_features, Tensor? values, Tensor? offsets) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias, Tensor? offsets, Tensor? entries, Tensor? rows, Tensor? starts) -> Tensor");
  m.def("sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor weight, Tensor? offsets, Tensor? entries, Tensor? rows, Tensor? starts, bool need_values, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_encode_backward(Tensor grad, Tensor x, Tensor weight, Tensor indices, Tensor? offsets, Tensor? entries, Tensor? rows, Tensor? starts, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_reconstruct(Tensor values, Tensor indices, Tensor weight, Tensor? bias, Tensor target, Tensor? offsets, Tensor? entries, Tensor? rows, Tensor? starts) -> (Tensor, Tensor)");
  m.def("sparse_reconstruct_backward(Tensor? grad_reconstruction, Tensor grad_error, Tensor values, Tensor indices, Tensor weight, Tensor target, Tensor reconstruction, Tensor? offsets, Tensor? entries, Tensor? rows, Tensor? starts, bool need_values, bool need_weight, bool need_bias, bool need_target) -> (Tensor, Tensor, Tensor, Tensor)");

  // adam
  m.def("adam_rows_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, SymInt step, float lr, float beta1, float beta2, float eps, float weight_decay, bool unit_norm, bool skip_zero_rows) -> ()");

  // bayes
  m.def("bayes_linear(Tensor x, Tensor weight_mean, Tensor weight_scale, Tensor? bias_mean, Tensor? bias_scale, Tensor key, str scale_type, str estimator) -> Tensor");
  m.def("bayes_linear_backward(Tensor grad, Tensor x, Tensor weight_mean, Tensor weight_scale, Tensor? bias_scale, Tensor key, str scale_type, str estimator) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
// clang-format on

// One implementation serves every device: the host entry looks at its tensors and picks the kernel.
void register_kernels(StableLibrary& m) {
  register_gaussian(m);
  register_likelihood(m);
  register_divergence(m);
  register_pairwise(m);
  register_categorical(m);
  register_codebook(m);
  register_residual(m);
  register_assignment(m);
  register_scalar(m);
  register_topk(m);
  register_selection(m);
  register_sparse(m);
  register_adam(m);
  register_bayes(m);
}

// Kernels run on torch's own threads, so torch.set_num_threads holds. The call goes into libtorch, which is compiled
// with OpenMP; nothing here needs to be.
void torch_threads(int64_t count, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace

STABLE_TORCH_LIBRARY(isthmus, m) {
  set_parallel_backend(torch_threads);
  define_schemas(m);
}
STABLE_TORCH_LIBRARY_IMPL(isthmus, CPU, m) { register_kernels(m); }
#if defined(ISTHMUS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(isthmus, CUDA, m) { register_kernels(m); }
#endif

}  // namespace isthmus
