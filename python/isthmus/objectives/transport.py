"""Transport distances between samples and between Gaussians: sliced Wasserstein, Sinkhorn, Fréchet.

Distances come to their p-th power: it can be averaged over directions and batches and, for p > 1, is differentiable at
zero. Its root is in the units of the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from isthmus import ops
from isthmus.reference._numeric import widen

# ---- sliced Wasserstein ----------------------------------------------------------------------------------------------


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor, *, p: float = 2.0) -> Tensor:
    """Mean over directions of the transport cost between projected samples, SW_pᵖ.

    On a line the optimal coupling pairs quantiles, so one sort per direction gives W_pᵖ(θ·x, θ·y) exactly, also for
    samples of different sizes. The mean over directions θ on the sphere is SW_pᵖ (Bonneel et al. 2015; as an
    autoencoder loss Kolouri et al. 2019, arXiv 1804.01947); over the one worst direction it is the max-sliced distance.

    Which estimator it is depends on the directions: ``random_directions`` for Monte Carlo, ``quasi_directions`` for
    quasi-Monte Carlo, ``max_direction`` for the learned one. Directions are not differentiated.

    Args:
        x: [..., N, D], samples of equal weight.
        y: [..., M, D].
        directions: [L, D], unit vectors.
        p: at least 1, the power of the distance on the line.

    Returns:
        [...]; float32 for half inputs. Memory O((N + M) L), time O((N + M) L log(N + M)).

    Gradients:
        To x and y, along the coupling; where projections tie, one of the subgradients.

    Raises:
        ValueError: p below 1, or shapes that do not fit.

    Example:
        >>> x, directions = torch.randn(100, 3), quasi_directions(500, 3)
        >>> shift = torch.tensor([1.0, 2.0, 2.0])
        >>> round(sliced_wasserstein(x, x + shift, directions).item(), 2)  # |shift|² / D
        3.0
    """
    _require_samples(x, y)
    if directions.dim() != 2 or directions.shape[-1] != x.shape[-1]:
        raise ValueError(f"directions has shape {list(directions.shape)}; expected [L, {x.shape[-1]}]")
    if p < 1.0:
        raise ValueError(f"p is {p}; expected at least 1")
    return _projected_costs(x, y, directions, p).mean(-1)


def random_directions(num: int, dim: int, key: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent uniform directions: normalised Gaussian noise.

    The error of a mean over ``num`` of them falls with 1 / √num, whatever the dimension.

    Args:
        num: L, the number of directions.
        dim: D, the dimension of the space.
        key: int64 [2], from ``isthmus.key``; the result lives on its device.
        dtype: float32 or float64.

    Returns:
        [L, D], unit vectors.

    Example:
        >>> random_directions(5, 3, isthmus.key(0)).shape
        torch.Size([5, 3])
    """
    return normalize(ops.gaussian_noise(key, (num, dim), dtype), dim=-1)


def quasi_directions(
    num: int,
    dim: int,
    key: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Evenly spread directions: equal angles for D = 2, a spiral for D = 3, mapped Sobol points above.

    The angles cover half the circle, as a distance is the same along θ and −θ. The spiral (Rakhmanov et al. 1994) and
    the map by the inverse normal distribution function are two of the constructions compared by Nguyen et al. (2024,
    arXiv 2309.11713). With a key, one random rotation turns all of them: each direction is then uniform and the
    estimate unbiased.

    Args:
        num: L, the number of directions.
        dim: D, the dimension of the space, at least 2; at most 21201, the end of the Sobol table.
        key: int64 [2], draws the rotation; None for the same directions every time.
        dtype: float32 or float64.
        device: where the directions live; default: the device of the key, or the CPU.

    Returns:
        [L, D], unit vectors.

    Raises:
        ValueError: fewer than two dimensions.

    Example:
        >>> quasi_directions(1, 2).abs().round(decimals=4) + 0.0
        tensor([[0., 1.]])
    """
    if dim < 2:
        raise ValueError(f"dim is {dim}; expected at least 2: on a line there is one direction")
    if device is None and key is not None:
        device = key.device
    spread = {2: _half_circle, 3: _sphere}.get(dim, lambda num: _sobol_sphere(num, dim))
    directions = spread(num).to(device=device, dtype=dtype)
    return directions if key is None else directions @ _random_rotation(dim, key, dtype)


def max_direction(
    x: Tensor, y: Tensor, key: Tensor, *, p: float = 2.0, num_starts: int = 16, steps: int = 50
) -> Tensor:
    """The direction along which two samples are farthest apart (Deshpande et al. 2019, arXiv 1904.05877).

    Gradient ascent on the sphere from several random directions at once, with steps that shrink; the best direction
    seen is returned. The distance along it is max-SW; as the direction is a maximum, gradients to x and y need not flow
    through it.

    Args:
        x: [N, D]. Not differentiated here.
        y: [M, D].
        key: int64 [2], draws the first directions.
        p: at least 1, the power of the distance.
        num_starts: ascents that run together.
        steps: of each ascent.

    Returns:
        [1, D], for ``sliced_wasserstein``.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> x = torch.randn(50, 3)
        >>> direction = max_direction(x, x + torch.tensor([0.0, 2.0, 0.0]), isthmus.key(0))
        >>> round(abs(direction[0, 1].item()), 3)
        1.0
    """
    _require_samples(x, y)
    x, y = widen(x.detach()), widen(y.detach())
    directions = random_directions(num_starts, x.shape[-1], key, x.dtype)
    best, best_cost = directions, torch.full_like(directions[:, 0], -math.inf)
    for step in range(steps):
        with torch.enable_grad():
            directions.requires_grad_()
            cost = _projected_costs(x, y, directions, p)
            (uphill,) = torch.autograd.grad(cost.sum(), directions)
        directions = directions.detach()
        improved = cost.detach() > best_cost
        best_cost = torch.where(improved, cost.detach(), best_cost)
        best = torch.where(improved.unsqueeze(-1), directions, best)
        directions = normalize(directions + normalize(uphill, dim=-1) / math.sqrt(1.0 + step), dim=-1)
    return best[best_cost.argmax()].unsqueeze(0)


def _projected_costs(x: Tensor, y: Tensor, directions: Tensor, p: float) -> Tensor:
    """W_pᵖ of the projections on every direction: [..., L]."""
    x, y = widen(x), widen(y)
    along = directions.to(x).mT
    x, y = (x @ along).sort(dim=-2).values, (y @ along).sort(dim=-2).values
    n, m = x.shape[-2], y.shape[-2]
    if n == m:
        return (x - y).abs().pow(p).mean(-2)
    i, j, mass = _quantile_coupling(n, m, x.device)
    cost = (x.index_select(-2, i) - y.index_select(-2, j)).abs().pow(p)
    return (mass.to(cost).unsqueeze(-1) * cost).sum(-2)


def _quantile_coupling(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal coupling of n and m sorted points on a line: pairs (i, j) and the mass each moves."""
    # In units of 1 / (n m) point i holds the quantiles from i m to (i + 1) m: integers, so no rounding loses a pair.
    ends = torch.cat((torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n))
    ends = ends.sort().values
    widths = ends.diff(prepend=ends.new_zeros(1))
    return (ends - 1) // m, (ends - 1) // n, widths.double() / (n * m)


def _half_circle(num: int) -> Tensor:
    angle = (torch.arange(num, dtype=torch.float64) + 0.5) * (math.pi / num)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def _sphere(num: int) -> Tensor:
    """Equal steps in height are equal areas; the turns of the spiral are as far apart as points along it."""
    height = 1.0 - 2.0 * (torch.arange(num, dtype=torch.float64) + 0.5) / num
    turn = 1.8 * math.sqrt(num) * height.acos()
    radius = (1.0 - height.square()).sqrt()
    return torch.stack((radius * turn.cos(), radius * turn.sin(), height), dim=-1)


def _sobol_sphere(num: int, dim: int) -> Tensor:
    cells = 2 ** max(num - 1, 1).bit_length()
    points = torch.quasirandom.SobolEngine(dim).draw(num, dtype=torch.float64)
    # Moved from the corner of its cell to the middle: the first point, the origin, would map to infinity, and the
    # second, the centre of the cube, to a vector without direction.
    normals = torch.special.ndtri(points + 0.5 / cells)
    return normalize(normals, dim=-1)


def _random_rotation(dim: int, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform over the orthogonal group (Mezzadri 2007): QR of Gaussian noise, signs chosen so that R is positive."""
    q, r = torch.linalg.qr(ops.gaussian_noise(key, (dim, dim), dtype))
    return q * r.diagonal().sign()


# ---- Sinkhorn --------------------------------------------------------------------------------------------------------


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    p: float = 2.0,
    iterations: int = 100,
    anneal: bool = True,
) -> Tensor:
    """Debiased entropic transport, S = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y).

    OT_ε = min_π ⟨π, |x − y|ᵖ⟩ + ε KL(π ‖ uniform), by Sinkhorn's iteration on the dual potentials in the log domain.
    S is zero for equal samples, tends to W_pᵖ for ε → 0 and to a kernel distance for ε → ∞ (Feydy et al. 2019, arXiv
    1810.08278).

    Args:
        x: [..., N, D], samples of equal weight.
        y: [..., M, D].
        epsilon: ε > 0, in units of the cost, that is of distanceᵖ.
        p: 1 or 2, the power of the Euclidean distance.
        iterations: pairs of updates. About max(cost) / ε of them are needed at a fixed ε.
        anneal: lower ε geometrically from the largest cost during the first half of the iterations, which then
            suffice for a much smaller ε.

    Returns:
        [...]; float32 for half inputs. Three cost matrices are held: O(N M + N² + M²) memory.

    Gradients:
        To x and y with the potentials held fixed, which is exact once they have converged (the envelope theorem), and
        needs no memory for the iterations. First derivatives only.

    Raises:
        ValueError: an ``epsilon`` that is not positive, another p, no iterations, or shapes that do not fit.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> sinkhorn_divergence(x, x, epsilon=0.1)
        tensor(0.)
        >>> round(sinkhorn_divergence(x, x + torch.tensor([3.0, 4.0]), epsilon=0.1).item(), 3)
        25.0
    """
    _require_samples(x, y)
    if epsilon <= 0.0:
        raise ValueError(f"epsilon is {epsilon}; expected a positive number")
    if p not in (1.0, 2.0):
        raise ValueError(f"p is {p}; expected 1 or 2")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")

    def transport(a: Tensor, b: Tensor) -> Tensor:
        # The other mode, by a matrix product, is faster and loses the digits of small distances.
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return _entropic_transport(distance.pow(p), epsilon, iterations, anneal)

    x, y = widen(x), widen(y)
    return transport(x, y) - (transport(x, x) + transport(y, y)) / 2.0


def _entropic_transport(cost: Tensor, epsilon: float, iterations: int, anneal: bool) -> Tensor:
    f, g = _dual_potentials(cost.detach(), epsilon, iterations, anneal)
    # The dual objective. Its derivative by the cost is the transport plan, at fixed potentials as well as through them.
    density = ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()
    return f.mean(-1) + g.mean(-1) - epsilon * (density.mean((-2, -1)) - 1.0)


def _dual_potentials(cost: Tensor, epsilon: float, iterations: int, anneal: bool) -> tuple[Tensor, Tensor]:
    largest = cost.amax((-2, -1)).unsqueeze(-1)
    f, g = torch.zeros_like(cost[..., :, 0]), torch.zeros_like(cost[..., 0, :])
    for iteration in range(iterations):
        share = min(2.0 * iteration / iterations, 1.0) if anneal else 1.0
        temperature = (largest ** (1.0 - share) * epsilon**share).clamp(min=epsilon)
        g = _soft_minimum(cost.mT, f, temperature)
        f = _soft_minimum(cost, g, temperature)
    return f, g


def _soft_minimum(cost: Tensor, potential: Tensor, temperature: Tensor) -> Tensor:
    """−ε log mean_j exp((potential_j − cost_ij) / ε)."""
    scores = (potential.unsqueeze(-2) - cost) / temperature.unsqueeze(-1)
    return -temperature * (scores.logsumexp(-1) - math.log(cost.shape[-1]))


# ---- Fréchet ---------------------------------------------------------------------------------------------------------


def gaussian_frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """W₂² between two Gaussians: |m₁ − m₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½) (Dowson & Landau 1982).

    Args:
        mean, other_mean: [..., D].
        covariance, other_covariance: [..., D, D], positive definite; for singular estimates from few samples use
            ``frechet_distance``.

    Returns:
        [...].

    Raises:
        RuntimeError: a covariance that is not positive definite.

    Example:
        >>> round(gaussian_frechet(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2)).item(), 3)
        4.0
    """
    first, second = torch.linalg.cholesky(covariance), torch.linalg.cholesky(other_covariance)
    return (mean - other_mean).square().sum(-1) + _bures(first, second)


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """W₂² between the Gaussians with the sample means and covariances of x and y.

    Of the features of an image classifier this is the Fréchet inception distance (Heusel et al. 2017, arXiv
    1706.08500). Works on the samples instead of their covariances, so fewer samples than dimensions are no obstacle.

    Args:
        x: [..., N, D], at least two samples.
        y: [..., M, D].

    Returns:
        [...]; float32 for half inputs.

    Raises:
        ValueError: fewer than two samples, or shapes that do not fit.

    Example:
        >>> x = torch.randn(50, 3)
        >>> round(frechet_distance(x, x + 1.0).item(), 3)
        3.0
    """
    _require_samples(x, y)
    if min(x.shape[-2], y.shape[-2]) < 2:
        raise ValueError(f"x and y have {x.shape[-2]} and {y.shape[-2]} samples; expected at least 2 of each")

    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        mean = t.mean(-2)
        return mean, (t - mean.unsqueeze(-2)).mT / math.sqrt(t.shape[-2] - 1)

    (mean, first), (other_mean, second) = moments(widen(x)), moments(widen(y))
    return (mean - other_mean).square().sum(-1) + _bures(first, second)


def _bures(first: Tensor, second: Tensor) -> Tensor:
    """tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½) for Σ = F Fᵀ: the last trace is the sum of the singular values of F₁ᵀ F₂."""
    overlap = torch.linalg.svdvals(first.mT @ second).sum(-1)
    return first.square().sum((-2, -1)) + second.square().sum((-2, -1)) - 2.0 * overlap


def _require_samples(x: Tensor, y: Tensor) -> None:
    if x.dim() < 2 or y.dim() < 2 or x.shape[-1] != y.shape[-1] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"x and y have shapes {list(x.shape)} and {list(y.shape)}; expected [..., N, D] and [..., M, D], not empty"
        )
