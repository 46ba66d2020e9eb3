"""The same bottlenecks in plain PyTorch, as a careful user would write them.

Each class keeps the parameters, buffers and initialisation of its Isthmus parent and replaces every
call of an Isthmus op, so the two sides of the demo differ in arithmetic alone.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import isthmus.nn
from isthmus.nn.codebook import VectorQuantizerOutput
from isthmus.nn.gaussian import GaussianBottleneckOutput
from isthmus.nn.sparse import SAEOutput


class GaussianBottleneck(isthmus.nn.GaussianBottleneck):
    """Reparameterised sample and closed-form KL, scale as log-variance, standard prior."""

    def forward(self, x: Tensor) -> GaussianBottleneckOutput:  # type: ignore[override]
        mean, logvar = self.projection(x).chunk(2, dim=-1)
        std = torch.exp(0.5 * logvar)
        z = mean + std * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + std.square() - 1.0 - logvar).sum(dim=-1)
        return GaussianBottleneckOutput(z, kl, mean, logvar)


class VectorQuantizer(isthmus.nn.VectorQuantizer):
    """Distances by one matrix product, straight-through by detach, averages by index_add."""

    sums: Tensor

    def forward(self, x: Tensor) -> VectorQuantizerOutput:  # type: ignore[override]
        indices = self.encode(x)
        codes = self.decode(indices)
        error = (x - codes).square().sum(dim=-1).mean()
        quantized = x + (codes - x).detach()
        if self.training:
            self._move_codes(x.reshape(-1, self.dim), indices.reshape(-1))
        return VectorQuantizerOutput(quantized, indices, self.commitment_weight * error)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]
        # |x|² is the same for every code and stays out of the search.
        norms = self.codebook.square().sum(dim=-1)
        scores = torch.addmm(norms, x.reshape(-1, self.dim), self.codebook.T, alpha=-2.0)
        return scores.argmin(dim=-1).view(x.shape[:-1])

    @torch.no_grad()
    def _move_codes(self, rows: Tensor, indices: Tensor) -> None:
        step, per_code = 1.0 - self.decay, self.num_codes / rows.shape[0]
        counts = torch.bincount(indices, minlength=self.num_codes)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, rows)
        self.usage.lerp_(counts * per_code, step)
        self.sums.lerp_(sums * per_code, step)
        self.codebook.copy_(self.sums / self.usage.unsqueeze(-1))
        dead = self.usage < self.revive_below
        fresh = rows[torch.randint(rows.shape[0], (self.num_codes,))]
        self.usage[dead] = 1.0
        self.sums[dead] = self.codebook[dead] = fresh[dead]


class TopKSAE(isthmus.nn.TopKSAE):
    """Dense pre-activations and topk; the decoder reads k rows with embedding_bag.

    Adding up k rows is several times faster than multiplying a mostly empty matrix, and the
    auxiliary loss reuses the pre-activations that the first ranking needed.
    """

    def forward(self, x: Tensor) -> SAEOutput:
        features = F.linear(x - self.pre_bias, self.encoder_weight, self.encoder_bias)
        values, indices = _rank(features, self.k)
        reconstruction = self._gather(values, indices) + self.pre_bias
        residual = x - reconstruction
        loss = _unexplained(residual, x)
        aux_loss = torch.zeros_like(loss)
        if self.training:
            fired = torch.zeros_like(self.idle).index_add_(0, indices.flatten(), (values > 0).flatten().long())
            self._note_firing(fired, len(x))
            if self.dead.any():
                rest = residual.detach()
                dead = features.masked_fill(~self.dead, -torch.inf)
                aux_loss = _unexplained(rest - self._gather(*_rank(dead, self.aux_k)), rest)
        total = loss + self.aux_weight * aux_loss
        return SAEOutput(reconstruction, values, indices, None, total, loss, torch.zeros_like(loss), aux_loss)

    def _gather(self, values: Tensor, indices: Tensor) -> Tensor:
        return F.embedding_bag(indices, self.decoder_weight, per_sample_weights=values, mode="sum")


class BayesLinear(isthmus.nn.BayesLinear):
    """Sample a weight matrix, then an ordinary linear layer; closed-form KL."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(
            x,
            _draw(self.weight_mean, self.weight_scale),
            _draw(self.bias_mean, self.bias_scale),
        )

    def _kl(self, mean: Tensor, scale: Tensor) -> Tensor:
        prior_std = F.softplus(self.prior_scale)
        variance_ratio = (F.softplus(scale) / prior_std).square()
        terms = (mean / prior_std).square() + variance_ratio - 1.0 - variance_ratio.log()
        return 0.5 * terms.sum()


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model with the same weights and every bottleneck in plain PyTorch."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return copied


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    isthmus.nn.GaussianBottleneck: GaussianBottleneck,
    isthmus.nn.VectorQuantizer: VectorQuantizer,
    isthmus.nn.TopKSAE: TopKSAE,
    isthmus.nn.BayesLinear: BayesLinear,
}


def _rank(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # Whether relu comes before or after the ranking changes no value above 0.
    values, indices = features.topk(k, dim=-1)
    return values.relu(), indices


def _unexplained(residual: Tensor, target: Tensor) -> Tensor:
    variance = (target - target.mean(dim=0)).square().sum()
    return residual.square().sum() / variance.detach()


def _draw(mean: Tensor, scale: Tensor) -> Tensor:
    return mean + F.softplus(scale) * torch.randn_like(mean)
