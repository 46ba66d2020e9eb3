"""Residual vector quantization where the codes of a stage depend on what is known of the vector already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import ops

from ._codebook_gradient import check_gradient, gather
from ._codebook_learning import check_options, embed
from ._residual_stages import Quantized, quantize_each, quantize_stages, stage_books
from .residual import ResidualVQ

_OPTIONS = {
    "gradient",
    "codebook_dim",
    "layernorm_after_project_in",
    "channel_first",
    "commitment_weight",
    "quantize_dropout",
    "quantize_dropout_cutoff_index",
    "quantize_dropout_multiple_of",
    "decay",
    "revive_below",
    "freeze_codebook",
    "sync_codebook",
}
# Numbers that codes of a block of vectors may take while they are searched: 16 MB in float32.
_SEARCHED_AT_ONCE = 1 << 22


class QINCo(ResidualVQ):
    """Residual quantization with implicit neural codebooks: a small network makes each vector's codes of a stage.

    Stage q has K base codes c̄ and a network f_q. With x̂ the sum of the codes of earlier stages, its codes for this
    vector are f_q(c̄, x̂) = v_L, where v_0 = c̄ + A [c̄; x̂] + b and v_{l+1} = v_l + U_l relu(V_l v_l). The first
    stage, for which nothing is known, has its base codes. The networks start from f(c̄, x̂) = c̄, so that a new QINCo is
    a :class:`ResidualVQ`.

    Base codes and networks learn by gradient from the loss of :class:`ResidualVQ`: codes of earlier stages are
    constants in it. A dead code's base code moves onto a residual of its stage.

    The search is exact: all K codes of a vector are made and compared, for as many vectors at a time as fit into
    16 MB. It takes O(N·K·(D² + L·D·H)) for each stage; the gradient passes through the chosen codes alone.

    Args:
        num_codes, dim, num_quantizers: as in :class:`ResidualVQ`.
        hidden_dim: size H of the layers in between.
        num_layers: number L of residual layers.
        options: ``gradient`` (``"straight_through"`` or ``"rotation"``), ``codebook_dim``,
            ``layernorm_after_project_in``, ``channel_first``, ``commitment_weight``, ``quantize_dropout``, its
            ``_cutoff_index`` and ``_multiple_of``, ``decay``, ``revive_below``, ``freeze_codebook`` and
            ``sync_codebook``, as in :class:`ResidualVQ`.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., D]`` or ``[B, D, ...]``; quantized like x; indices int64 ``[..., Q]``, x without D; loss ``[]``.

    Source: Huijben et al., Residual Quantization with Implicit Neural Codebooks, ICML 2024.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.QINCo(16, dim=4, num_quantizers=3, hidden_dim=32)
        >>> x = torch.randn(8, 10, 4)
        >>> quantizer.init_from(x)
        >>> quantized, indices, loss = quantizer(x)
        >>> quantized.shape, indices.shape
        (torch.Size([8, 10, 4]), torch.Size([8, 10, 3]))
        >>> torch.allclose(quantizer.eval().decode(quantizer.encode(x)), quantizer(x).quantized, atol=1e-6)
        True
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        num_quantizers: int | None = None,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        **options: Any,
    ) -> None:
        check_options(options, _OPTIONS)
        check_gradient(options.get("gradient", "straight_through"), ("straight_through", "rotation"))
        if hidden_dim < 1 or num_layers < 0:
            raise ValueError(
                f"hidden_dim must be at least 1 and num_layers at least 0, got {hidden_dim} and {num_layers}"
            )
        super().__init__(num_codes, dim, num_quantizers, learning="gradient", **options)
        size = self.layout.code_dim
        self.networks = nn.ModuleList(
            [ImplicitCodebook(size, hidden_dim, num_layers) for _ in range(self.num_quantizers - 1)]
        )

    def get_codes(self, indices: Tensor) -> Tensor:
        """The code of each stage: int64 ``[..., Q]``, or fewer stages, to ``[..., Q, d]``; zeros where −1."""
        codes: list[Tensor] = []
        for stage, (index, book) in enumerate(zip(indices.unbind(-1), self.stage_list(), strict=False)):
            code = embed(index, book)
            if stage > 0:
                code = self.networks[stage - 1](code, torch.stack(codes).sum(dim=0))
            codes.append(code.masked_fill((index == -1).unsqueeze(-1), 0.0))
        return torch.stack(codes, dim=-2)

    def _search(
        self,
        rows: Tensor,
        codes: Tensor | list[Tensor],
        stages: Tensor | int | None,
        mask: Tensor | None,
        training: bool,
    ) -> Quantized:
        books = stage_books(codes)

        def quantize(stage: int, residual: Tensor, known: Tensor, live: Tensor) -> Quantized:
            if stage == 0:
                return ops.vq_quantize(residual, books[0], commitment_weight=self.commitment_weight, mask=live)
            network = self.networks[stage - 1]
            fixed = [tensor.detach() for tensor in (residual, known, books[stage], *network.parameters())]
            index = torch.where(live, _nearest_implicit_code(*fixed[:3], fixed[3:]), -1)
            code = network(gather(books[stage], index), known)
            if self.freeze_codebook:
                code = code.detach()
            _, _, error = quantize_each(residual, code, live, commitment_weight=self.commitment_weight)
            return torch.where(live.unsqueeze(-1), code, 0.0), index, error

        return quantize_stages(rows, self.num_quantizers, quantize, gradient=self.gradient, stages=stages, mask=mask)


class ImplicitCodebook(nn.Module):
    """Codes as a function of base codes and of what is known of a vector; see :class:`QINCo`."""

    def __init__(self, dim: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.from_base = nn.Linear(dim, dim, bias=False)
        self.from_known = nn.Linear(dim, dim)
        self.down = nn.ModuleList([nn.Linear(dim, hidden_dim, bias=False) for _ in range(num_layers)])
        self.up = nn.ModuleList([nn.Linear(hidden_dim, dim, bias=False) for _ in range(num_layers)])
        for silent in (self.from_base.weight, *self.from_known.parameters(), *self.up.parameters()):
            nn.init.zeros_(silent)

    def forward(self, base: Tensor, known: Tensor) -> Tensor:
        """Base codes and known parts, ``[..., d]`` each, to codes ``[..., d]``."""
        return _implicit_codes(base, known, list(self.parameters()))


def _implicit_codes(base: Tensor, known: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``weights`` are the parameters of an :class:`ImplicitCodebook`, in their order."""
    from_base, from_known, bias, *layers = weights
    half = len(layers) // 2
    # Codes are searched and used in the precision that they are stored in, also under autocast.
    with torch.autocast(base.device.type, enabled=False):
        codes = base + F.linear(base, from_base) + F.linear(known, from_known, bias)
        for down, up in zip(layers[:half], layers[half:], strict=True):
            codes = codes + F.linear(F.linear(codes, down).relu_(), up)
    return codes


# An op, and not a loop that a compiler would unroll into as many steps as there are blocks of vectors.
@torch.library.custom_op("isthmus_nn::nearest_implicit_code", mutates_args=())
def _nearest_implicit_code(residual: Tensor, known: Tensor, base: Tensor, weights: Sequence[Tensor]) -> Tensor:
    # Codes, their next values and the sum on the way there, and the widest layer in between.
    numbers_a_code = 3 * base.shape[-1] + max(len(weight) for weight in weights)
    block = max(1, _SEARCHED_AT_ONCE // (len(base) * numbers_a_code))
    indices = [residual.new_empty(0, dtype=torch.int64)]
    if len(residual) > 0:
        for rows, parts in zip(residual.split(block), known.split(block), strict=True):
            codes = _implicit_codes(base, parts.unsqueeze(1), weights)
            indices.append(ops.vq_assign(rows.unsqueeze(1), codes).squeeze(1))
    return torch.cat(indices)


@_nearest_implicit_code.register_fake
def _(residual: Tensor, known: Tensor, base: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return residual.new_empty(len(residual), dtype=torch.int64)
