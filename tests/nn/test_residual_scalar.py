"""Residual quantizers of finite scalars and of signs, against formulas in float64."""

import pytest
import torch

from isthmus import nn, ops

QUANTIZERS = {
    "fsq": lambda **options: nn.ResidualFSQ((8, 5, 2), num_quantizers=4, **options),
    "fsq-clamp": lambda **options: nn.ResidualFSQ((3, 4), num_quantizers=3, bound_hard_clamp=True, **options),
    "lfq": lambda **options: nn.ResidualLFQ(2**5, num_quantizers=4, codebook_scale=0.5, **options),
    "lfq-bits": lambda **options: nn.ResidualLFQ(2**5, num_quantizers=3, batch_entropy="factorized", **options),
}
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


@pytest.mark.parametrize("hard_clamp", [False, True])
def test_stages_are_the_digits_of_one_fine_uniform_quantizer(hard_clamp):
    levels, stages = torch.tensor([2, 5, 8, 3]), 4
    quantizer = nn.ResidualFSQ(levels.tolist(), num_quantizers=stages, bound_hard_clamp=hard_clamp)
    x = 1.5 * torch.randn(500, 4, dtype=torch.float64)
    quantized, indices, _ = quantizer(x)

    bound = levels / (levels - 1.0)
    share = ((x / bound).clamp(-1, 1) if hard_clamp else (x / bound).tanh()) / 2 + 0.5
    cells = levels.double() ** stages
    cell = (share * cells).floor().clamp_max(cells - 1)
    torch.testing.assert_close(quantized, bound * ((2 * cell + 1) / cells - 1), check_dtype=False)
    strides = torch.tensor([1, 2, 10, 80])
    for q in range(stages):
        digits = cell.long() // levels ** (stages - 1 - q) % levels
        assert torch.equal(indices[:, q], (digits * strides).sum(-1))


@pytest.mark.parametrize("hard_clamp", [False, True])
def test_the_gradient_of_scalars_passes_the_bound_once(hard_clamp):
    quantizer = nn.ResidualFSQ((5, 3), num_quantizers=3, bound_hard_clamp=hard_clamp)
    x, weight = torch.randn(40, 2).mul(1.5).requires_grad_(), torch.randn(40, 2)
    (grad,) = torch.autograd.grad((quantizer(x).quantized * weight).sum(), x)
    t = x / torch.tensor([5 / 4, 3 / 2])
    slope = (t.abs() <= 1).float() if hard_clamp else 1 - t.tanh().square()
    torch.testing.assert_close(grad, weight * slope)


def test_losses_of_signs_are_the_formula_stage_by_stage():
    quantizer = nn.ResidualLFQ(
        2**4,
        num_quantizers=3,
        groups=2,
        codebook_scale=0.8,
        commitment_loss_weight=0.3,
        diversity_gamma=0.7,
        entropy_loss_weight=0.2,
    )
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    out = quantizer(x, inv_temperature=1.5)
    corners = ops.lfq_decode(torch.arange(16), 4, dtype=torch.float64)
    left, coded, expected = x.view(30, 2, 4), 0.0, []
    for q in range(3):
        scale = 0.8 * 0.5**q
        p = (-1.5 * (left.unsqueeze(-2) - scale * corners).square().sum(-1)).softmax(-1)
        codes = scale * left.detach().sign()
        entropies = torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum(-1).mean()
        expected.append(torch.stack((*entropies, (left - codes).square().mean())))
        left, coded = left - codes, coded + codes
    sample, batch, commitment = torch.stack(expected, dim=1)
    torch.testing.assert_close(out[3:], (sample, batch, commitment))
    loss = (0.2 * (sample - 0.7 * batch) + 0.3 * commitment).sum()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.quantized, coded.view(30, 8))
    torch.testing.assert_close(*(torch.autograd.grad(value, x, retain_graph=True)[0] for value in (out.loss, loss)))
    weight = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad((out.quantized * weight).sum(), x)[0], weight)


@every_quantizer
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(7,), (2, 9), (2, 5, 6)])
def test_any_layout_gives_the_same_codes(make, groups, shape):
    quantizer = make(dim=12, groups=groups, orthogonal_rotation=True)
    x, stages = torch.randn(*shape, 12), quantizer.dropout.num_quantizers
    out = quantizer(x)
    assert out.quantized.shape == x.shape and out.loss.shape == ()
    assert out.indices.shape == (*shape, *[groups][: groups - 1], stages)
    assert out.indices.min() >= 0 and out.indices.max() < quantizer.codebook_size
    assert torch.equal(quantizer.encode(x), out.indices)
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    if len(shape) > 1:
        quantizer.layout.channel_first = True
        image = quantizer(x.movedim(-1, 1))
        torch.testing.assert_close(image.quantized.movedim(1, -1), out.quantized)
        assert torch.equal(image.indices, out.indices)
        torch.testing.assert_close(quantizer.decode(out.indices), image.quantized)


@every_quantizer
def test_fewer_stages_are_a_prefix_of_all(make):
    quantizer = make(dim=6)
    x = torch.rand(50, 6)
    full = quantizer.encode(x)
    for stages in range(1, full.shape[1] + 1):
        out = quantizer(x, stages=stages)
        assert torch.equal(out.indices[:, :stages], full[:, :stages]) and (out.indices[:, stages:] == -1).all()
        assert torch.equal(quantizer.encode(x, stages=stages), out.indices)
        torch.testing.assert_close(quantizer.decode(full[:, :stages]), out.quantized)
        codes = quantizer.get_codes(full)
        torch.testing.assert_close(quantizer.get_codes(out.indices)[:, :stages], codes[:, :stages])
    each = torch.arange(50) % (full.shape[1] + 1)
    mixed = quantizer(x, stages=each)
    assert torch.equal((mixed.indices >= 0).sum(-1), each)
    torch.testing.assert_close(quantizer.decode(mixed.indices), mixed.quantized)
    assert not mixed.quantized[each == 0].any()


@every_quantizer
def test_dropout_keeps_whole_entries_of_the_batch(make):
    torch.manual_seed(0)
    options = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 3}
    quantizer = make(**options)
    x = torch.randn(64, 5, quantizer.layout.dim, requires_grad=True)
    out = quantizer(x)
    kept = (out.indices >= 0).sum(-1)
    assert (kept == kept[:, :1]).all() and (out.indices.diff(dim=-1)[out.indices[..., 1:] == -1] <= 0).all()
    # Of 2 to Q stages a multiple of 3, or all.
    assert set(kept.unique().tolist()) == {3, quantizer.dropout.num_quantizers}
    (out.loss + out.quantized.sum()).backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    assert (quantizer.eval()(x).indices >= 0).all() and (quantizer.train().encode(x) >= 0).all()


@every_quantizer
def test_a_stage_that_nobody_has_costs_nothing(make):
    quantizer = make(dim=6)
    x, coarse = torch.randn(9, 6, requires_grad=True), make(dim=6)
    coarse.load_state_dict(quantizer.state_dict())
    coarse.dropout.num_quantizers = 2
    found, expected = quantizer(x, stages=2), coarse(x, stages=2)
    for f, e in zip((found.loss, found.quantized), (expected.loss, expected.quantized), strict=True):
        torch.testing.assert_close(f, e)
        if f.requires_grad:
            grads = (torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (f, e))
            torch.testing.assert_close(*grads)
    assert all(term[2:].eq(0).all() for term in found[3:])


@every_quantizer
def test_padding_changes_nothing(make):
    quantizer = make(dim=12, groups=2)
    x, mask = torch.randn(4, 10, 12), torch.rand(4, 10) < 0.6
    x[~mask] = torch.nan
    found, expected = quantizer(x, mask), quantizer(x[mask])
    assert (found.indices[~mask] == -1).all() and not found.quantized[~mask].any()
    assert torch.equal(found.indices[mask], expected.indices) and torch.equal(quantizer.encode(x, mask), found.indices)
    torch.testing.assert_close(found.quantized[mask], expected.quantized)
    for f, e in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(
    ("alone", "grouped"),
    [
        (lambda **o: nn.ResidualFSQ((8, 5), **o), lambda **o: nn.GroupedResidualFSQ((8, 5), **o)),
        (lambda **o: nn.ResidualLFQ(2**2, **o), lambda **o: nn.GroupedResidualLFQ(2**2, **o)),
    ],
    ids=["fsq", "lfq"],
)
def test_groups_are_quantizers_side_by_side(alone, grouped):
    x = torch.randn(20, 3, 4)
    out, parts = grouped(num_quantizers=3, groups=2)(x), [alone(num_quantizers=3)(part) for part in x.split(2, dim=-1)]
    assert torch.equal(out.indices, torch.stack([part.indices for part in parts], dim=-2))
    assert torch.equal(out.quantized, torch.cat([part.quantized for part in parts], dim=-1))
    torch.testing.assert_close(out.loss, torch.stack([part.loss for part in parts]).mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ResidualFSQ((8, 5), num_quantizers=0), "num_quantizers must be at least 1, got 0"),
        (lambda: nn.ResidualFSQ((8,), num_quantizers=2, quantize_dropout_cutoff_index=2), "must be a stage, 0 to 1"),
        (lambda: nn.ResidualLFQ(8, num_quantizers=2, quantize_dropout_multiple_of=0), "multiple_of must be at least 1"),
        (lambda: nn.ResidualLFQ(100, num_quantizers=2), "power of two"),
        (lambda: nn.GroupedResidualFSQ((8, 5), 4, num_quantizers=2, groups=2)(torch.zeros(3)), "expected \\[..., 4\\]"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
