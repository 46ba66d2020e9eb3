"""Terms over all pairs of two sets of vectors, streamed tile by tile: nothing of the size of the pairs is stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.reference.pairwise import aggregate_terms, default_bandwidths

_ops = torch.ops.isthmus

_SCALE_TYPES = ("logvar", "std", "softplus", "square")


def mixture_log_prob(
    z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, scale_type: str = "logvar"
) -> Tensor:
    """log Σ_k exp(log_weight_k) N(z; mean_k, s_k²), the log-density of a mixture of diagonal Gaussians, in nats.

    The density of mixture priors and, with the posteriors of K pseudo-inputs as components, of the VampPrior
    (Tomczak and Welling 2018, arXiv 1705.07120).

    Residuals are standardised one by one, (z − mean) / s in one fused operation, and never come from an expanded
    square: no cancellation far from the origin, and far points keep finite log-densities. O(B·K·D) time. Memory beside
    inputs and outputs: 4·K·D numbers forward; backward, where the scores are computed again, 2·K·D more for each of
    at most 16 chunks of rows. A pair whose responsibility underflows to zero costs nothing in the gradients.

    Args:
        z: [*, D]; float32, float64, bfloat16 or float16.
        mean: [K, D], K ≥ 1, dtype of ``z``.
        scale: like ``mean``; what it means is set by ``scale_type``.
        log_weight: [K], the logarithms of the mixture weights, used as given: not normalised. Default: −log K.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).

    Returns:
        [*]; float64 for float64 inputs, else float32. A row with NaN: NaN, its neighbours untouched. A component with
        NaN: NaN everywhere. −inf where every term is.

    Gradients:
        To all four tensors; twice differentiable. Sums over rows run in a fixed order: bitwise repeatable.

    Raises:
        ValueError: ``scale_type`` is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, or there is no component.

    Example:
        >>> mean = torch.tensor([[-1.0], [1.0]])
        >>> mixture_log_prob(torch.tensor([[0.0], [100.0]]), mean, torch.zeros(2, 1))
        tensor([-1.4189e+00, -4.9021e+03])
    """
    check_choice("scale_type", scale_type, _SCALE_TYPES)
    return _mixture_log_prob(z, mean, scale, log_weight, scale_type, "components")[0]


def component_log_prob(
    z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, scale_type: str = "logvar"
) -> Tensor:
    """log Σ_i exp(log_weight_i) N(z_i; mean_k, s_k²): the log of the mean density of a batch under each component.

    ``mixture_log_prob`` with the sum over the rows instead of the components, as prototype and contrastive losses
    need it: how well is a component, or prototype, supported by the batch? The same tiles, the same costs.

    Args:
        z: [B, D]; float32, float64, bfloat16 or float16.
        mean: [K, D], K ≥ 1, dtype of ``z``.
        scale: like ``mean``; what it means is set by ``scale_type``.
        log_weight: [B], used as given. Default: −log B.
        scale_type: as in ``mixture_log_prob``.

    Returns:
        [K]; float64 for float64 inputs, else float32; −inf if there are no rows. The sum runs in a fixed order.

    Gradients:
        To all four tensors; twice differentiable.

    Raises:
        ValueError: ``scale_type`` is none of its choices, or ``z`` is not a matrix.
        RuntimeError: dtypes, devices or shapes do not fit, or there is no component.

    Example:
        >>> component_log_prob(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))
        tensor([-1.4852, -1.4189])
    """
    check_choice("scale_type", scale_type, _SCALE_TYPES)
    if z.dim() != 2:
        raise ValueError(f"z has shape {list(z.shape)}; expected [B, D]")
    return _mixture_log_prob(z, mean, scale, log_weight, scale_type, "rows")[0]


def aggregate_log_prob(
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    dataset_size: int,
    *,
    estimator: str = "weighted",
    scale_type: str = "logvar",
) -> tuple[Tensor, Tensor]:
    """log q(z_i) and Σ_d log q(z_id) of the aggregate posterior q(z) = (1/N) Σ_n q(z | x_n), estimated from a batch.

    The two terms of the total correlation, TC = E[log q(z) − Σ_d log q(z_d)], for beta-TC-VAE (Chen et al. 2018,
    arXiv 1802.04942, appendix C). With q(z | x_j) = N(mean_j, s_j²) and z_i a sample of q(z | x_i),

        log_joint_i     = log Σ_j w_ij q(z_i | x_j)
        log_marginals_i = Σ_d log Σ_j w_ij q(z_id | x_j)

    "weighted" (minibatch-weighted sampling): w_ij = 1 / (N·B), a lower bound of log q in expectation.

    "stratified" (minibatch-stratified sampling): with M = B − 1 others in the batch, w_ii = 1/N; the next row,
    j = i + 1 mod B, has (N − M) / (N·M); all others have 1/M. One of M rows drawn without replacement stands for
    the mean over the N − 1 others, so the sum has expectation 1/N q(z_i | x_i) + (M − 1)/M q̄ + (N − M)/(N·M) q̄ =
    q(z_i), where q̄ is that mean: unbiased before the logarithm. The weights of a row add up to 1.

    B²·D exponentials, O(B²·D) time. Memory beside inputs and outputs: 5·B·D numbers forward; backward 2·B·D more for
    each of at most 16 chunks of rows.

    Args:
        z: [B, D]; float32, float64, bfloat16 or float16.
        mean, scale: like ``z``; what ``scale`` means is set by ``scale_type``.
        dataset_size: N ≥ B.
        estimator: "weighted" or "stratified" (B ≥ 2).
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).

    Returns:
        (log_joint, log_marginals), [B] each; float64 for float64 inputs, else float32. A row of ``z`` with NaN: NaN,
        its neighbours untouched.

    Gradients:
        To ``z``, ``mean`` and ``scale``; twice differentiable. Bitwise repeatable.

    Raises:
        ValueError: an option is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, ``dataset_size`` is less than B, or one row is to be
            stratified.

    Example:
        >>> z = torch.tensor([[0.0], [1.0]])
        >>> aggregate_log_prob(z, z, torch.zeros(2, 1), dataset_size=2, estimator="stratified")
        (tensor([-1.1380, -1.1380]), tensor([-1.1380, -1.1380]))
    """
    check_choice("scale_type", scale_type, _SCALE_TYPES)
    check_choice("estimator", estimator, ("weighted", "stratified"))
    log_joint, log_marginal, _ = _aggregate_log_prob(z, mean, scale, dataset_size, estimator, scale_type)
    return log_joint, log_marginal.sum(-1)


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidths: Sequence[float] | None = None,
    estimator: str = "unbiased",
) -> Tensor:
    """Squared maximum mean discrepancy of two samples (Gretton et al. 2012, JMLR 13), for a sum of kernels.

        MMD² = mean k(x_i, x_j) + mean k(y_i, y_j) − 2 mean k(x_i, y_j),    k(x, y) = Σ_h κ(|x − y|² / (2h²))

    with κ(u) = exp(−u) for "rbf" and κ(u) = 1 / (1 + u) for "imq", the inverse multiquadratic C / (C + |x − y|²) with
    C = 2h². Wasserstein autoencoders (Tolstikhin et al. 2018, arXiv 1711.01558) take "imq" with C = 2·D·σ² for a prior
    of standard deviation σ, and its multiples by 0.1, 0.2, 0.5, 1, 2, 5 and 10: the default here, for both kernels,
    with σ = 1. The code of InfoVAE (Zhao et al. 2017, arXiv 1706.02262) takes "rbf" with the one bandwidth h = D / √2.

    Distances are sums of squared differences, not expanded squares: equal points are exactly 0 apart. O((N + M)²·D)
    time. Memory beside inputs and outputs: 2·(N + M)·D numbers; never the N × M distances.

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16.
        y: [M, D], dtype of ``x``.
        kernel: "rbf" or "imq".
        bandwidths: every h, positive, 32 at most. Default: h² = D times 0.1, 0.2, 0.5, 1, 2, 5 and 10.
        estimator: "unbiased" leaves the pairs of a point with itself out of the first two means (N, M ≥ 2), has
            expectation 0 for samples of one law and may be negative; "biased" keeps them (N, M ≥ 1), is never negative.

    Returns:
        A scalar; float64 for float64 inputs, else float32.

    Gradients:
        To ``x`` and ``y``; twice differentiable. Bitwise repeatable.

    Raises:
        ValueError: ``kernel`` or ``estimator`` is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, a bandwidth is not positive, or there are too few rows.

    Example:
        >>> mmd(torch.zeros(2, 1), torch.ones(2, 1), bandwidths=[0.1])
        tensor(2.)
    """
    check_choice("kernel", kernel, ("rbf", "imq"))
    check_choice("estimator", estimator, ("unbiased", "biased"))
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected [N, D]")
    widths = default_bandwidths(x.shape[1]) if bandwidths is None else [float(h) for h in bandwidths]
    return _mmd(x, y, kernel, widths, estimator)


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _like(t: Tensor | None, z: Tensor, wanted: bool) -> Tensor:
    return z.new_empty(t.shape if t is not None and wanted else (0,))


@torch.library.register_fake("isthmus::mixture_log_prob")
def _(z, mean, scale, log_weight, scale_type, over):
    shape = z.shape[:-1] if over == "components" else mean.shape[:1]
    return tuple(z.new_empty(s, dtype=accumulate_dtype(z)) for s in (shape, (2, *shape)))


@torch.library.register_fake("isthmus::mixture_log_prob_backward")
def _(grad, normalizer, z, mean, scale, log_weight, scale_type, over, need_z, need_components, need_log_weight):
    components = (_like(t, z, need_components) for t in (mean, scale))
    return _like(z, z, need_z), *components, _like(log_weight, z, need_log_weight)


@torch.library.register_fake("isthmus::aggregate_log_prob")
def _(z, mean, scale, dataset_size, estimator, scale_type):
    shapes = z.shape[:1], z.shape, (2, *z.shape[:1])
    return tuple(z.new_empty(s, dtype=accumulate_dtype(z)) for s in shapes)


@torch.library.register_fake("isthmus::aggregate_log_prob_backward")
def _(grad_joint, grad_marginal, log_marginal, normalizer, z, mean, scale, *options):
    need_z, need_components = options[-2:]
    return _like(z, z, need_z), _like(z, z, need_components), _like(z, z, need_components)


@torch.library.register_fake("isthmus::mmd")
def _(x, y, kernel, bandwidths, estimator):
    return x.new_empty((), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::mmd_backward")
def _(grad, x, y, kernel, bandwidths, estimator, need_x, need_y):
    return _like(x, x, need_x), _like(y, y, need_y)


# ---- gradients -------------------------------------------------------------------------------------------------------

_aggregate_log_prob_backward = eager("aggregate_log_prob_backward")
_mixture_log_prob_backward = eager("mixture_log_prob_backward")
_mmd_backward = eager("mmd_backward")


def _mixture_setup(ctx, inputs, output):
    *tensors, scale_type, over = inputs
    ctx.options = scale_type, over
    _, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    ctx.save_for_backward(normalizer, *tensors)


def _mixture_backward(ctx, grad, _):
    need_z, need_mean, need_scale, need_log_weight = ctx.needs_input_grad[:4]
    needs = need_z, need_mean or need_scale, need_log_weight
    grads = _mixture_log_prob_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return *(none_if_absent(g, n) for g, n in zip(grads, ctx.needs_input_grad[:4], strict=True)), None, None


def _mixture_gradients(grad, normalizer, z, mean, scale, log_weight, scale_type, over, *needs):
    function = reference.mixture_log_prob if over == "components" else reference.component_log_prob

    def density(*tensors):
        return function(*tensors, scale_type=scale_type)

    return _keep(gradient_of(density, (z, mean, scale, log_weight), grad), needs)


def _keep(gradients, needs):
    """Without the gradients that the backward op did not compute."""
    need_z, need_components, *others = needs
    wanted = (need_z, need_components, need_components, *others)
    return [g if w else None for g, w in zip(gradients, wanted, strict=True)]


def _aggregate_setup(ctx, inputs, output):
    *tensors, dataset_size, estimator, scale_type = inputs
    ctx.options = dataset_size, estimator, scale_type
    _, log_marginal, normalizer = output
    ctx.mark_non_differentiable(normalizer)
    ctx.save_for_backward(log_marginal, normalizer, *tensors)


def _aggregate_backward(ctx, grad_joint, grad_marginal, _):
    need_z, need_mean, need_scale = ctx.needs_input_grad[:3]
    grads = _aggregate_log_prob_backward(
        grad_joint, grad_marginal, *ctx.saved_tensors, *ctx.options, need_z, need_mean or need_scale
    )
    needs = need_z, need_mean, need_scale
    return *(none_if_absent(g, n) for g, n in zip(grads, needs, strict=True)), None, None, None


def _aggregate_gradients(
    grad_joint, grad_marginal, log_marginal, normalizer, z, mean, scale, dataset_size, estimator, scale_type, *needs
):
    def densities(z, mean, scale):
        return aggregate_terms(z, mean, scale, dataset_size, estimator=estimator, scale_type=scale_type)

    return _keep(gradient_of(densities, (z, mean, scale), (grad_joint, grad_marginal)), needs)


def _mmd_setup(ctx, inputs, output):
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _discrepancy_backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = _mmd_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return *(none_if_absent(g, n) for g, n in zip(grads, needs, strict=True)), None, None, None


def _mmd_gradients(grad, x, y, kernel, bandwidths, estimator, *needs):
    def discrepancy(x, y):
        return reference.mmd(x, y, kernel=kernel, bandwidths=bandwidths, estimator=estimator)

    return [g if n else None for g, n in zip(gradient_of(discrepancy, (x, y), grad), needs, strict=True)]


_mixture_log_prob = register_gradient("mixture_log_prob", _mixture_backward, _mixture_setup)
_aggregate_log_prob = register_gradient("aggregate_log_prob", _aggregate_backward, _aggregate_setup)
_mmd = register_gradient("mmd", _discrepancy_backward, _mmd_setup)
register_second_order("mmd_backward", _mmd_gradients)
register_second_order("mixture_log_prob_backward", _mixture_gradients)
register_second_order("aggregate_log_prob_backward", _aggregate_gradients)

for _name in ("mixture_log_prob", "aggregate_log_prob", "mmd"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
