// Host-side arguments that all ops on Gaussians share: posterior and prior, given as tensors of many layouts, and the
// reduction of a divergence.
#pragma once

#include "core/gaussians.h"
#include "op.h"

namespace isthmus {
namespace {

// ---- layouts -------------------------------------------------------------------------------------------------------

// Blocks of neighbours at a fixed distance: true of contiguous tensors, slices along one dimension and expanded rows.
inline std::optional<Operand> as_blocks(const Tensor& t) {
  int64_t dims = t.dim(), block = 1;
  const auto trailing = [&] { return t.size(dims - 1) == 1 || t.stride(dims - 1) == block; };
  for (; dims > 0 && trailing(); --dims) block *= t.size(dims - 1);
  int64_t stride = block, count = 1;
  bool first = true;
  for (; dims > 0; --dims) {
    const int64_t size = t.size(dims - 1);
    if (size == 1) continue;
    if (first) stride = t.stride(dims - 1);
    if (t.stride(dims - 1) != stride * count) return std::nullopt;
    first = false;
    count *= size;
  }
  return Operand{data(t), block == 0 ? 1 : block, stride};
}

// The operand of a tensor, which is replaced by a contiguous copy where its own layout will not do.
inline Operand operand_of(OptionalTensor& t) {
  if (!t.has_value()) return {nullptr, 1, 1};
  if (const auto operand = as_blocks(*t)) return *operand;
  t = torch::stable::contiguous(*t);
  return *as_blocks(*t);
}

inline int64_t element_size(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// ---- posterior and prior -------------------------------------------------------------------------------------------

inline Clamp parse_clamp(const std::string& mode, double low, double high) {
  if (mode == "none") return {Clamp::Mode::none, 0, 0};
  if (!(low < high)) fail("clamp is (", low, ", ", high, "); expected a lower bound below the upper one");
  if (mode == "hard") return {Clamp::Mode::hard, low, high};
  if (mode == "pass_through") return {Clamp::Mode::pass_through, low, high};
  if (mode == "tanh") return {Clamp::Mode::tanh, low, high};
  fail("clamp_mode is '", mode, "'; expected 'hard', 'pass_through' or 'tanh'");
}

struct GaussianOptions {
  const std::string& scale_type;
  int64_t packed_dim;
  bool residual;
  const std::string& clamp_mode;
  double clamp_low, clamp_high;
};

// Mean and scale, separate or as the halves of one tensor; the prior; which rows count. Holds the tensors it points to.
struct GaussianArguments {
  Tensor mean;  // with the scale, if that is absent
  OptionalTensor scale, prior_mean, prior_scale, mask;
  std::vector<int64_t> sizes;  // of the mean
  Gaussians gaussians;

  GaussianArguments(const Tensor& mean_, const OptionalTensor& scale_, const OptionalTensor& prior_mean_,
                    const OptionalTensor& prior_scale_, const OptionalTensor& mask_, const GaussianOptions& options)
      : mean(mean_),
        scale(scale_),
        prior_mean(prior_mean_),
        prior_scale(prior_scale_),
        mask(mask_),
        sizes(sizes_of(mean_)) {
    gaussians.dtype = dtype_of(mean, "mean");
    gaussians.scale_type = parse_scale_type(options.scale_type);
    gaussians.clamp = parse_clamp(options.clamp_mode, options.clamp_low, options.clamp_high);
    scale ? take_separate() : take_packed(options.packed_dim);
    take_prior(options.residual);
    take_mask();
  }

  int64_t elements() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }
  int64_t last_size() const { return sizes.empty() ? 1 : sizes.back(); }
  std::vector<int64_t> leading_sizes() const {
    return sizes.empty() ? sizes : std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
  }

 private:
  void take_separate() {
    check_like(*scale, "scale", mean, "mean");
    OptionalTensor mean_copy = mean;
    gaussians.mean = operand_of(mean_copy);
    mean = *mean_copy;
    gaussians.scale = operand_of(scale);
  }

  void take_packed(int64_t packed_dim) {
    const int64_t dims = mean.dim(), dim = packed_dim < 0 ? packed_dim + dims : packed_dim;
    if (dim < 0 || dim >= dims) {
      fail("packed_dim is ", packed_dim, ", mean has shape ", shape_of(mean), "; expected one of its dimensions");
    }
    if (mean.size(dim) % 2 != 0) {
      fail("mean has shape ", shape_of(mean), " and no scale; expected an even size along packed_dim ", packed_dim,
           ", to hold both");
    }
    sizes[static_cast<size_t>(dim)] /= 2;
    mean = as_contiguous(mean);
    int64_t block = 1;
    for (int64_t d = dim; d < dims; ++d) block *= sizes[static_cast<size_t>(d)];
    if (block == 0) block = 1;
    const char* begin = static_cast<const char*>(data(mean));
    gaussians.mean = {begin, block, 2 * block};
    gaussians.scale = {begin + block * element_size(mean), block, 2 * block};
  }

  void take_prior(bool residual) {
    if (prior_mean.has_value() != prior_scale.has_value()) {
      fail(prior_mean ? "prior_scale" : "prior_mean", " is missing; give both prior_mean and prior_scale, or neither");
    }
    if (residual && !prior_mean) fail("residual is true without a prior; expected prior_mean and prior_scale");
    gaussians.prior = !prior_mean ? Prior::standard : residual ? Prior::residual : Prior::given;
    if (prior_mean) {
      check_prior(*prior_mean, "prior_mean");
      check_prior(*prior_scale, "prior_scale");
    }
    gaussians.prior_mean = operand_of(prior_mean);
    gaussians.prior_scale = operand_of(prior_scale);
  }

  void check_prior(const Tensor& t, const char* argument) const {
    check_device(t, argument, mean, "mean");
    check_dtype(t, argument, mean, "mean");
    check_sizes(t, argument, sizes);
  }

  void take_mask() {
    gaussians.mask = nullptr;
    gaussians.mask_cols = last_size() == 0 ? 1 : last_size();
    if (!mask) return;
    check_device(*mask, "mask", mean, "mean");
    if (mask->scalar_type() != ScalarType::Bool) {
      fail("mask has dtype ", name_of(mask->scalar_type()), "; expected bool");
    }
    check_sizes(*mask, "mask", leading_sizes());
    mask = as_contiguous(mask);
    gaussians.mask = static_cast<const bool*>(data(*mask));
  }

  static void check_sizes(const Tensor& t, const char* argument, const std::vector<int64_t>& expected) {
    if (sizes_of(t) == expected) return;
    std::ostringstream text;
    for (size_t d = 0; d < expected.size(); ++d) text << (d ? ", " : "") << expected[d];
    fail(argument, " has shape ", shape_of(t), "; expected [", text.str(), "]");
  }
};

// Gradients in the layout of the arguments: one packed tensor, or two.
struct GaussianGradientTensors {
  Tensor mean, scale, prior_mean, prior_scale;
  GaussianGradients results;

  GaussianGradientTensors(const GaussianArguments& args, bool prior_wanted)
      : mean(empty(sizes_of(args.mean), args.mean.scalar_type(), args.mean)),
        scale(args.scale ? empty(args.sizes, args.mean.scalar_type(), args.mean) : absent(args.mean)),
        prior_mean(absent(args.mean)),
        prior_scale(absent(args.mean)) {
    results = {{nullptr, 1, 1}, {nullptr, 1, 1}, {nullptr, 1, 1}, {nullptr, 1, 1}};
    if (args.scale) {
      results.mean = whole(mean);
      results.scale = whole(scale);
    } else {
      const int64_t block = args.gaussians.mean.block;
      char* begin = static_cast<char*>(mutable_data(mean));
      results.mean = {begin, block, 2 * block};
      results.scale = {begin + block * element_size(mean), block, 2 * block};
    }
    if (prior_wanted && args.prior_mean) {
      prior_mean = empty(args.sizes, args.mean.scalar_type(), args.mean);
      prior_scale = empty(args.sizes, args.mean.scalar_type(), args.mean);
      results.prior_mean = whole(prior_mean);
      results.prior_scale = whole(prior_scale);
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const { return {mean, scale, prior_mean, prior_scale}; }

 private:
  static Result whole(const Tensor& t) {
    const int64_t block = t.numel() == 0 ? 1 : t.numel();
    return {mutable_data(t), block, block};
  }
};

// ---- reduction -----------------------------------------------------------------------------------------------------

// What a divergence of elements is summed over, and the shape of the result.
struct DivergenceReduction {
  Reduction view;
  std::vector<int64_t> sizes;

  DivergenceReduction(const std::string& name, int64_t groups, double weight, const GaussianArguments& args) {
    const int64_t elements = args.elements(), cols = args.last_size();
    const int64_t rows = product(args.leading_sizes());
    view = {rows, cols, false, weight};
    sizes = args.leading_sizes();
    if (name == "row") return;
    if (name == "none") {
      view = {elements, 1, false, weight};
      sizes = args.sizes;
    } else if (name == "group") {
      if (groups < 1 || cols % groups != 0) {
        fail("groups is ", groups, "; expected a divisor of the last size of mean, ", cols);
      }
      view = {rows * groups, cols / groups, false, weight};
      sizes.push_back(groups);
    } else if (name == "batch") {
      if (args.sizes.empty()) fail("reduction is 'batch', mean has shape []; expected a batch dimension");
      view = {args.sizes[0], product({args.sizes.begin() + 1, args.sizes.end()}), false, weight};
      sizes = {args.sizes[0]};
    } else if (name == "dim") {
      view = {rows, cols, true, weight / static_cast<double>(rows)};
      if (!args.sizes.empty()) sizes = {cols};
    } else if (name == "sum" || name == "mean") {
      view = {1, elements, false, name == "mean" ? weight / static_cast<double>(rows) : weight};
      sizes = {};
    } else {
      fail("reduction is '", name, "'; expected 'none', 'row', 'group', 'batch', 'dim', 'sum' or 'mean'");
    }
  }

 private:
  static int64_t product(const std::vector<int64_t>& sizes) {
    int64_t elements = 1;
    for (int64_t size : sizes) elements *= size;
    return elements;
  }
};

}  // namespace
}  // namespace isthmus
