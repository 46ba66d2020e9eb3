"""ReLUSAE, JumpReLUSAE and GatedSAE against dense formulas."""

import pytest
import torch

from isthmus import nn

from .dense_sae import assert_same_loss, dense_code, scores, shaken, unexplained


@pytest.fixture
def x():
    return torch.randn(2, 6, 8, dtype=torch.float64)


def test_relu_equals_the_dense_formula(x):
    sae = shaken(nn.ReLUSAE(8, 24, sparsity_weight=0.3))
    out = sae(x)
    rows = x.flatten(0, 1)
    code = scores(sae, rows).relu()
    torch.testing.assert_close(dense_code(out, 24), code)
    assert_same_loss(out.sparsity_loss, (code * sae.decoder_weight.norm(dim=-1)).sum(-1).mean(), sae)
    error = unexplained(rows - code @ sae.decoder_weight - sae.pre_bias, rows)
    assert_same_loss(out.loss, error + 0.3 * (code * sae.decoder_weight.norm(dim=-1)).sum(-1).mean(), sae)


class Jump(torch.autograd.Function):
    """JumpReLU with the pseudo-derivative of equation 11 of the paper, written out."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return scores * (scores > threshold)

    @staticmethod
    def backward(ctx, grad):
        scores, threshold = ctx.saved_tensors
        near = ((scores - threshold) / ctx.bandwidth).abs() < 0.5
        return grad * (scores > threshold), (-threshold / ctx.bandwidth * near * grad).sum(0), None


class Step(torch.autograd.Function):
    """A step with the pseudo-derivative of equation 12."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        scores, threshold = ctx.saved_tensors
        near = ((scores - threshold) / ctx.bandwidth).abs() < 0.5
        return None, (-1.0 / ctx.bandwidth * near * grad).sum(0), None


@pytest.mark.parametrize("target", [None, 5.0], ids=["l0", "target_l0"])
@pytest.mark.parametrize("bandwidth", [0.4, None], ids=["fixed", "own"])
def test_jumprelu_equals_the_dense_formula_with_its_pseudo_derivatives(x, bandwidth, target):
    options = {"threshold": 0.7, "bandwidth": bandwidth, "target_l0": target}
    sae = shaken(nn.JumpReLUSAE(8, 24, sparsity_weight=0.05, **options))
    out = sae(x)
    rows = x.flatten(0, 1)
    activation, threshold = scores(sae, rows), sae.log_threshold.exp()
    width = threshold.detach() if bandwidth is None else bandwidth
    code = Jump.apply(activation, threshold, width)
    torch.testing.assert_close(dense_code(out, 24), code)
    active = Step.apply(activation, threshold, width).sum(-1).mean()
    penalty = active if target is None else (active / target - 1) ** 2
    assert_same_loss(out.sparsity_loss, penalty, sae)
    error = unexplained(rows - code @ sae.decoder_weight - sae.pre_bias, rows)
    assert_same_loss(out.reconstruction_loss, error, sae)
    assert_same_loss(out.loss, error + 0.05 * penalty, sae)
    assert sae.eval()(x).sparsity_loss.item() == pytest.approx(penalty.item())
    assert torch.equal(sae.idle == 0, (code > 0).any(0))  # what is near the threshold but below has not fired


def test_jumprelu_thresholds_learn_from_entries_on_both_sides():
    """Defect: entries just below the threshold are dropped by the encoder, and half of the gradient with them."""
    sae = nn.JumpReLUSAE(2, 2, threshold=1.0, bandwidth=0.2, sparsity_weight=1.0).double()
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.eye(2))
    # Feature 0 is seen at 1.05, 0.95 and 0.5, feature 1 at 0.92 and 1.2 and 0.
    x = torch.tensor([[1.05, 0.92], [0.95, 1.2], [0.5, 0.0]], dtype=torch.float64)
    out = sae(x)
    assert out.sparsity_loss.item() == pytest.approx(2 / 3)
    (grad,) = torch.autograd.grad(out.sparsity_loss, sae.log_threshold)
    torch.testing.assert_close(grad, -torch.tensor([2.0, 1.0], dtype=torch.float64) / 0.2 / 3)


def test_jumprelu_evaluation_has_no_entries_of_value_0(x):
    sae = shaken(nn.JumpReLUSAE(8, 24, threshold=0.7, bandwidth=0.4))
    assert (sae(x).values == 0).any()
    out = sae.eval()(x)
    assert (out.values > 0).all()
    activation = scores(sae, x.flatten(0, 1))
    torch.testing.assert_close(dense_code(out, 24), activation * (activation > sae.log_threshold.exp()))


def trained_l0(scale=1.0, steps=300, **options):
    """Features per row in evaluation, at the start and after training, of sums of few directions."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 16), dim=-1)

    def sample():
        weights = torch.rand(256, 40) * (torch.rand(256, 40) < 0.08)
        rows = weights @ directions
        return rows * (scale * (16 / rows.square().sum(-1).mean()).sqrt())

    sae = nn.JumpReLUSAE(16, 64, **options)
    sae.init_from(sample())
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    sae.keep_unit_norm(optimizer)
    found = []
    for step in range(steps + 1):
        if step in (0, steps):
            found.append(len(sae.eval()(sample()).values) / 256)
        sae.train()
        optimizer.zero_grad()
        sae(sample()).loss.backward()
        optimizer.step()
    return found


def test_jumprelu_l0_answers_to_the_penalty():
    """Defect: with a bandwidth far below the scores hardly an entry meets it, and penalties change next to nothing."""
    weak, medium, strong = (trained_l0(sparsity_weight=weight)[1] for weight in (None, 0.01, 0.1))
    assert medium < 0.75 * weak
    assert strong < 0.75 * medium


@pytest.mark.parametrize("target", [4, 8])
def test_jumprelu_arrives_at_the_l0_that_is_asked_for(target):
    assert trained_l0(target_l0=target)[1] == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_jumprelu_begins_at_the_l0_that_is_asked_for_at_any_scale(scale):
    assert trained_l0(scale, steps=0, target_l0=4)[0] == pytest.approx(4, rel=0.15)
    assert trained_l0(scale, steps=0, target_l0=4, start_l0=9)[0] == pytest.approx(9, rel=0.15)


def test_jumprelu_start_keeps_the_features_that_it_was_fitted_to(x):
    """Defect: scaling the encoder alone moves all scores to one side of the thresholds."""
    sae = nn.JumpReLUSAE(8, 24, threshold=0.5).double().eval()
    with torch.no_grad():
        sae.pre_bias.copy_(x.flatten(0, 1).mean(0))
    before = dense_code(sae(x), 24) > 0
    with torch.no_grad():
        sae._scale_scores(torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(dense_code(sae(x), 24) > 0, before)


def test_a_start_that_finds_nothing_leaves_the_encoder(x):
    sae = nn.JumpReLUSAE(8, 24, threshold=1e6).double()
    before = sae.encoder_weight.clone()
    sae.init_from(x)
    assert torch.equal(sae.encoder_weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be positive, got 0\.0"),
        ({"bandwidth": -1.0}, r"bandwidth must be positive, got -1\.0"),
        ({"target_l0": 0}, r"target_l0 must be in \(0, num_features=24\], got 0"),
        ({"target_l0": 25}, "target_l0 must be in .*, got 25"),
        ({"start_l0": -1}, "start_l0 must be in .*, got -1"),
    ],
)
def test_jumprelu_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nn.JumpReLUSAE(8, 24, **options)


def test_gated_equals_the_dense_formula(x):
    sae = shaken(nn.GatedSAE(8, 24, sparsity_weight=0.3, aux_weight=0.7))
    out = sae(x)
    rows = x.flatten(0, 1)
    gate = scores(sae, rows)
    magnitude = sae.log_gain.exp() * scores(sae, rows, torch.zeros_like(sae.encoder_bias)) + sae.magnitude_bias
    code = magnitude.relu() * (gate > 0)
    torch.testing.assert_close(dense_code(out, 24), code)
    error = unexplained(rows - code @ sae.decoder_weight - sae.pre_bias, rows)
    penalty = gate.relu().sum(-1).mean()
    frozen = unexplained(rows - gate.relu() @ sae.decoder_weight.detach() - sae.pre_bias.detach(), rows)
    assert_same_loss(out.reconstruction_loss, error, sae)
    assert_same_loss(out.sparsity_loss, penalty, sae)
    assert_same_loss(out.aux_loss, frozen, sae)
    assert_same_loss(out.loss, error + 0.3 * penalty + 0.7 * frozen, sae)


def test_gated_auxiliary_loss_does_not_train_the_decoder(x):
    sae = shaken(nn.GatedSAE(8, 24))
    grads = torch.autograd.grad(
        sae(x).aux_loss, [sae.decoder_weight, sae.log_gain, sae.magnitude_bias, sae.encoder_bias], allow_unused=True
    )
    assert grads[0] is None and grads[1] is None and grads[2] is None
    assert grads[3].any()


@pytest.mark.parametrize("make", [nn.ReLUSAE, nn.JumpReLUSAE, nn.GatedSAE])
def test_a_row_with_a_nan_spoils_no_other(make, x):
    sae = shaken(make(8, 24)).eval()
    expected = sae(x).reconstruction
    x[1, 2, 3] = torch.nan
    actual = sae(x).reconstruction
    spoilt = torch.zeros(2, 6, dtype=torch.bool)
    spoilt[1, 2] = True
    assert actual[spoilt].isnan().all()
    torch.testing.assert_close(actual[~spoilt], expected[~spoilt])
