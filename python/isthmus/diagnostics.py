"""What a latent code is used for: active units, divergence by dimension, mutual information, collapse; codes in use.

From the posteriors of a set of data vectors, N(mean_n, s_n²), or from their codes. Use the whole test set: the numbers
describe the aggregate over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus import ops
from isthmus.reference._numeric import standard_deviation, widen

_KINDS = ("passive", "mixed", "active")


def active_units(mean: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Which dimensions move with the input: Var_x(E_q[z]) > threshold (Burda et al. 2016, arXiv 1509.00519).

    Args:
        mean: [N, D], posterior means.
        threshold: the paper's 0.01; the variance is usually either well above or well below.

    Returns:
        bool [D]; its sum is the number of active units.

    Raises:
        ValueError: ``mean`` is not [N, D] with at least two rows.

    Example:
        >>> active_units(torch.tensor([[1.0, 0.01], [-1.0, -0.01]]))
        tensor([ True, False])
    """
    _require_dataset(mean)
    return widen(mean).var(0, correction=0) > threshold


def kl_per_dimension(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    scale_type: str = "logvar",
) -> Tensor:
    """Mean over the data of each dimension's divergence from its prior.

    Args:
        mean, scale, prior_mean, prior_scale, scale_type: as in ``ops.gaussian_kl``; mean is [N, D].

    Returns:
        [D], in nats.

    Example:
        >>> kl_per_dimension(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.zeros(2, 2))
        tensor([2., 0.])
    """
    _require_dataset(mean)
    return ops.gaussian_kl(mean, scale, prior_mean, prior_scale, scale_type=scale_type, reduction="dim")


def mutual_information(
    mean: Tensor, scale: Tensor, *, scale_type: str = "logvar", num_samples: int = 1, key: Tensor | None = None
) -> Tensor:
    """Estimate of I(x; z) = E[log q(z | x) − log q(z)] for x uniform over the data (Hoffman & Johnson 2016).

    q(z) is the exact mixture of all N posteriors, so the estimate is unbiased; N² D time, O(N D) memory. It is at most
    log N, which it reaches when no two posteriors overlap: with few data a large value says little.

    Args:
        mean, scale: [N, D].
        scale_type: "logvar", "std", "softplus" or "square".
        num_samples: samples of each posterior; more of them lower the noise.
        key: int64 [2]. Default: a fresh key from torch's generator of the device.

    Returns:
        [], in nats.

    Raises:
        ValueError: ``mean`` is not [N, D] with at least two rows.

    Example:
        >>> mean = torch.tensor([[-100.0], [0.0], [100.0], [200.0]])
        >>> round(mutual_information(mean, torch.zeros(4, 1)).exp().item(), 3)
        4.0
    """
    _require_dataset(mean)
    z = ops.gaussian_sample(mean, scale, scale_type=scale_type, num_samples=num_samples, key=key)
    # Both densities of the same, rounded z: what rounding does to one it does to the other.
    log_posterior = -ops.gaussian_nll(z, mean, scale, scale_type=scale_type)
    return (log_posterior - ops.mixture_log_prob(z, mean, scale, scale_type=scale_type)).mean()


def dimension_usage(mean: Tensor, scale: Tensor, *, scale_type: str = "logvar", threshold: float = 0.01) -> Tensor:
    """Share of the data for which each dimension says anything: whose own divergence from N(0, 1) exceeds a threshold.

    Args:
        mean, scale: [N, D].
        scale_type: "logvar", "std", "softplus" or "square".
        threshold: in nats.

    Returns:
        [D], in [0, 1].

    Example:
        >>> dimension_usage(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor([0.5000, 0.0000])
    """
    _require_dataset(mean)
    kl = ops.gaussian_kl(mean, scale, scale_type=scale_type, reduction="none")
    return (kl > threshold).to(kl.dtype).mean(0)


def classify_dimensions(usage: Tensor, *, tolerance: float = 0.05) -> list[str]:
    """Sort dimensions into passive, mixed and active (Bonheme & Grzes 2021, arXiv 2109.12679).

    A passive dimension follows the prior for every input: its samples have variance 1 and its means none, which is why
    means look correlated where samples are not. An active one is used for every input, a mixed one for some of them.

    Args:
        usage: [D], of ``dimension_usage``.
        tolerance: below it a dimension is passive, above 1 - tolerance active.

    Returns:
        D words: "passive", "mixed" or "active".

    Example:
        >>> classify_dimensions(torch.tensor([0.0, 0.4, 1.0]))
        ['passive', 'mixed', 'active']
    """
    above = (usage >= tolerance).long() + (usage > 1.0 - tolerance).long()
    return [_KINDS[i] for i in above.tolist()]


def code_histogram(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code of a codebook was chosen.

    Args:
        indices: int64 [...], in [-1, num_codes); -1, a masked vector, is left out.
        num_codes: K.

    Returns:
        float32 [K]. Nothing waits for the device, unlike ``torch.bincount``.

    Example:
        >>> code_histogram(torch.tensor([[2, 0], [2, -1]]), 4)
        tensor([1., 0., 2., 0.])
    """
    no_vectors = torch.empty((*indices.shape, 0), device=indices.device)
    return ops.code_statistics(no_vectors, indices, num_codes)[0]


def code_usage(counts: Tensor) -> Tensor:
    """Share of the codes that were chosen at all.

    Args:
        counts: [..., K], of ``code_histogram`` or ``ops.code_statistics``.

    Returns:
        [...], in [0, 1].

    Example:
        >>> code_usage(torch.tensor([1.0, 0.0, 2.0, 0.0]))
        tensor(0.5000)
    """
    return (counts > 0).float().mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """How many codes are in use, each counted by how evenly: exp of the entropy of the distribution of hits.

    Args:
        counts: [..., K], hits of each code, or anything proportional to them.

    Returns:
        [...], between 1 (one code receives everything) and K (all receive the same); NaN without any hit.

    Example:
        >>> perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0]))
        tensor(3.)
    """
    shares = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@dataclass(frozen=True)
class CollapseReport:
    """How much of a latent space is used: what ``collapse_report`` returns. ``print`` it, or ``plot`` it.

    Attributes:
        kl: [D], mean divergence of each dimension from N(0, 1), in nats.
        mean_variance: [D], variance over the data of the posterior means; above 0.01 a unit counts as active.
        sample_variance: [D], variance of the samples, that is of the aggregate posterior; 1 for a perfect match.
        usage: [D], share of the data that use the dimension.
        kinds: D words, "passive", "mixed" or "active".
        mutual_information: I(x; z) in nats, at most log N.
        num_data: N.
    """

    kl: Tensor
    mean_variance: Tensor
    sample_variance: Tensor
    usage: Tensor
    kinds: list[str]
    mutual_information: float
    num_data: int

    def __str__(self) -> str:
        counts = ", ".join(f"{self.kinds.count(kind)} {kind}" for kind in reversed(_KINDS))
        most = math.log(self.num_data)
        lines = [
            f"{len(self.kinds)} dimensions: {counts}",
            f"KL {self.kl.sum():.3f} nats, I(x; z) {self.mutual_information:.3f} of at most log N = {most:.3f} nats",
            "",
            " dim       KL  Var mean  Var sample  usage  kind",
        ]
        lines += [
            f"{d:4d} {self.kl[d]:8.4f} {self.mean_variance[d]:9.4f} {self.sample_variance[d]:11.4f} "
            f"{self.usage[d]:6.1%}  {self.kinds[d]}"
            for d in self.by_divergence()
        ]
        return "\n".join(lines)

    def by_divergence(self) -> list[int]:
        """The dimensions, the most informative one first."""
        return self.kl.argsort(descending=True, stable=True).tolist()

    def plot(self, path: str | Path) -> None:
        """Draw divergence and variances by dimension into a file, whose ending sets the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("CollapseReport.plot needs matplotlib: pip install 'isthmus[cli]'") from error
        order = self.by_divergence()
        positions = range(len(order))
        figure = Figure(figsize=(8.0, 5.0), layout="constrained")
        divergences, variances = figure.subplots(2, sharex=True)
        for kind, colour in zip(_KINDS, ("0.7", "tab:orange", "tab:blue"), strict=True):
            chosen = [i for i in positions if self.kinds[order[i]] == kind]
            divergences.bar(chosen, [self.kl[order[i]].item() for i in chosen], color=colour, label=kind)
        divergences.set(ylabel="KL [nats]", title=f"I(x; z) = {self.mutual_information:.2f} nats")
        divergences.legend()
        variances.plot(positions, self.sample_variance[order].tolist(), "o", label="of samples")
        variances.plot(positions, self.mean_variance[order].tolist(), "x", label="of means")
        variances.set(ylabel="variance", xlabel="dimension, by divergence", ylim=(0.0, None))
        labelled = positions[:: 1 + len(order) // 32]  # more would overlap
        variances.set_xticks(labelled, [str(order[i]) for i in labelled])
        variances.legend()
        figure.savefig(path)


@torch.no_grad()
def collapse_report(
    mean: Tensor, scale: Tensor, *, scale_type: str = "logvar", key: Tensor | None = None
) -> CollapseReport:
    """Look for posterior collapse: which dimensions of a latent code are used, and how much.

    Args:
        mean, scale: [N, D], posteriors of a data set; the prior is N(0, 1). N² D time, for the mutual information.
        scale_type: "logvar", "std", "softplus" or "square".
        key: int64 [2], for the samples of the mutual information. Default: a fresh key.

    Returns:
        ``CollapseReport``.

    Raises:
        ValueError: ``mean`` is not [N, D] with at least two rows.

    Example:
        >>> mean = torch.stack((torch.linspace(-2, 2, 50), torch.zeros(50)), dim=-1)
        >>> logvar = torch.tensor([-3.0, 0.0]).expand(50, 2)
        >>> collapse_report(mean, logvar).kinds
        ['active', 'passive']
    """
    _require_dataset(mean)
    usage = dimension_usage(mean, scale, scale_type=scale_type)
    mean_variance = widen(mean).var(0, correction=0)
    return CollapseReport(
        kl=kl_per_dimension(mean, scale, scale_type=scale_type),
        mean_variance=mean_variance,
        sample_variance=mean_variance + standard_deviation(widen(scale), scale_type).square().mean(0),
        usage=usage,
        kinds=classify_dimensions(usage),
        mutual_information=mutual_information(mean, scale, scale_type=scale_type, key=key).item(),
        num_data=len(mean),
    )


def _require_dataset(mean: Tensor) -> None:
    if mean.dim() != 2 or len(mean) < 2:
        raise ValueError(f"mean has shape {list(mean.shape)}; expected [N, D] with at least two rows")
