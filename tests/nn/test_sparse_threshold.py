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


def test_jumprelu_equals_the_dense_formula_with_its_pseudo_derivatives(x):
    sae = shaken(nn.JumpReLUSAE(8, 24, threshold=0.7, bandwidth=0.4, sparsity_weight=0.05))
    out = sae(x)
    rows = x.flatten(0, 1)
    activation, threshold = scores(sae, rows), sae.log_threshold.exp()
    code = Jump.apply(activation, threshold, 0.4)
    torch.testing.assert_close(dense_code(out, 24), code)
    active = Step.apply(activation, threshold, 0.4).sum(-1).mean()
    assert_same_loss(out.sparsity_loss, active, sae)
    error = unexplained(rows - code @ sae.decoder_weight - sae.pre_bias, rows)
    assert_same_loss(out.reconstruction_loss, error, sae)
    assert_same_loss(out.loss, error + 0.05 * active, sae)
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
