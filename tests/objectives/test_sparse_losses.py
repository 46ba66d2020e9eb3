import pytest
import torch

from isthmus import objectives, ops


@pytest.fixture
def target():
    return torch.randn(3, 5, 4, dtype=torch.float64)


def test_fractions_of_variance(target):
    rows = target.flatten(0, 1)
    total = rows.var(dim=0, correction=0).sum() * len(rows)
    error = (target - 0.3).square().sum(-1)
    torch.testing.assert_close(objectives.fraction_of_variance_unexplained(error, target), error.sum() / total)
    torch.testing.assert_close(objectives.fraction_of_variance_explained(error, target), 1 - error.sum() / total)
    mean = (target - rows.mean(0)).square().sum(-1)
    torch.testing.assert_close(
        objectives.fraction_of_variance_explained(mean, target), torch.zeros((), dtype=torch.float64)
    )
    several = torch.stack([error, 2 * error], dim=-1)
    torch.testing.assert_close(objectives.fraction_of_variance_unexplained(several, target), 3 * error.sum() / total)


def test_fraction_does_not_depend_on_scale_or_origin(target):
    error = torch.rand(3, 5, dtype=torch.float64)
    expected = objectives.fraction_of_variance_unexplained(error, target)
    torch.testing.assert_close(objectives.fraction_of_variance_unexplained(9 * error, 3 * target + 7), expected)


def test_the_denominator_has_no_gradient(target):
    target.requires_grad_()
    error = target.square().sum(-1)
    (grad,) = torch.autograd.grad(objectives.fraction_of_variance_unexplained(error, target), target, retain_graph=True)
    rows = target.detach().flatten(0, 1)
    torch.testing.assert_close(grad, 2 * target.detach() / (rows - rows.mean(0)).square().sum())
    (grad,) = torch.autograd.grad(objectives.normalized_mse(error, target), target)
    torch.testing.assert_close(grad, 2 * target.detach() / target.detach().square().sum(-1, keepdim=True) / 15)


def test_half_precision_targets_are_measured_in_float32():
    target = torch.randn(64, 32).bfloat16() + 30.0
    error = torch.ones(64)
    exact = objectives.fraction_of_variance_unexplained(error.double(), target.double())
    actual = objectives.fraction_of_variance_unexplained(error, target)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0.0)


def test_nothing_to_explain_gives_no_nan():
    target = torch.zeros(3, 4)
    assert objectives.fraction_of_variance_unexplained(torch.zeros(3), target) == 0
    assert objectives.normalized_mse(torch.zeros(3), target) == 0


def test_l0_target_loss_pulls_from_both_sides():
    l0 = torch.tensor([24.0, 32.0, 48.0], requires_grad=True)
    loss = objectives.l0_target_loss(l0, 32)
    torch.testing.assert_close(loss, torch.tensor([1 / 16, 0.0, 1 / 4]))
    (grad,) = torch.autograd.grad(loss.sum(), l0)
    torch.testing.assert_close(grad, torch.tensor([-1 / 64, 0.0, 1 / 32]))


def test_normalized_mse(target):
    error = torch.rand(3, 5, dtype=torch.float64)
    expected = (error / target.square().sum(-1)).mean()
    torch.testing.assert_close(objectives.normalized_mse(error, target), expected)


def padded_and_ragged():
    """The same code in both layouts: rows with 2, 0 and 3 features that fire."""
    values = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.5]], dtype=torch.float64)
    indices = torch.tensor([[4, 1, -1], [-1, -1, -1], [0, 2, 3]])
    offsets = torch.tensor([0, 2, 2, 5])
    return (values, indices), (values[values != 0], indices[indices >= 0], offsets)


def test_l0_counts_in_both_layouts():
    (values, _), (entries, _, offsets) = padded_and_ragged()
    assert objectives.l0(values).item() == pytest.approx(5 / 3)
    assert objectives.l0(entries, offsets).item() == pytest.approx(5 / 3)
    assert objectives.l0(values.unsqueeze(0)).item() == pytest.approx(5 / 3)
    assert objectives.l0(values.bfloat16()).dtype == torch.float32


def test_l1_weighs_by_the_decoder_in_both_layouts():
    (values, indices), (entries, entry_indices, offsets) = padded_and_ragged()
    values.requires_grad_()
    entries = entries.detach().requires_grad_()
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    norms = weight.norm(dim=-1)
    expected = (norms[4] + 2 * norms[1] + 3 * norms[0] + norms[2] + 0.5 * norms[3]) / 3
    padded = objectives.l1(values, indices, weight)
    ragged = objectives.l1(entries, entry_indices, weight, offsets)
    for actual in (padded, ragged):
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, weight, retain_graph=True),
            torch.autograd.grad(expected, weight, retain_graph=True),
        )
    (grad,) = torch.autograd.grad(ragged, entries)
    torch.testing.assert_close(grad, entries.detach().sign() * norms.detach()[entry_indices] / 3)


def test_aux_k_loss_equals_the_dense_formula():
    residual = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    values = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3], [1, -1], [2, 0], [-1, -1], [3, 4], [4, 1]])
    with torch.no_grad():
        values.masked_fill_(indices < 0, 0.0)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    fixed = residual.detach()
    written = (values.unsqueeze(-1) * weight[indices.clamp_min(0)]).sum(1)
    expected = (fixed - written).square().sum() / (fixed - fixed.mean(0)).square().sum()
    order = ops.latent_order(indices, 5, values=values)
    for given in (None, order):
        loss = objectives.aux_k_loss(residual, values, indices, weight, order=given)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, (values, weight), retain_graph=True)
        dense = torch.autograd.grad(expected, (values, weight), retain_graph=True)
        torch.testing.assert_close(grads[0], dense[0].masked_fill(indices < 0, 0.0))
        torch.testing.assert_close(grads[1], dense[1])
        assert torch.autograd.grad(loss, residual, allow_unused=True)[0] is None


def test_aux_k_loss_without_dead_features_is_0_without_gradient():
    values, weight = torch.zeros(6, 2, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = objectives.aux_k_loss(torch.randn(6, 4), values, torch.full((6, 2), -1), weight)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (values, weight)):
        assert not grad.any()
