"""AuxK, and what is wrong with it elsewhere: one test for each defect."""

import pytest
import torch

from isthmus import nn

from .dense_sae import assert_same_loss, dead_code, put_to_sleep, shaken, unexplained

CODERS = {
    "topk": lambda **options: nn.TopKSAE(8, 24, 3, **options),
    "multi": lambda **options: nn.TopKSAE(8, 24, 3, multi_k=6, **options),
    "batch": lambda **options: nn.BatchTopKSAE(8, 24, 3, **options),
    "matryoshka": lambda **options: nn.MatryoshkaSAE(8, (4, 12, 24), 3, **options),
    "jumprelu": lambda **options: nn.JumpReLUSAE(8, 24, threshold=1.5, bandwidth=0.1, **options),
    "crosscoder": lambda **options: nn.Crosscoder(2, 4, 24, 3, **options),
}


@pytest.fixture(params=CODERS)
def sleepy(request):
    """An autoencoder with dead features, its output for a batch, the batch, and the residual as rows."""
    sae = shaken(CODERS[request.param](aux_k=4, aux_weight=0.5, dead_after=1000))
    x = torch.randn(16, *sae.read_shape, dtype=torch.float64)
    put_to_sleep(sae, x)
    out = sae(x)
    rows = x.flatten(1)
    return sae, out, rows, (rows - out.reconstruction.flatten(1)).detach()


def test_equals_the_dense_formula(sleepy):
    sae, out, rows, residual = sleepy
    expected = unexplained(residual - dead_code(sae, rows, 4) @ sae.decoder_weight, residual)
    assert_same_loss(out.aux_loss, expected, sae)
    torch.testing.assert_close(
        out.loss, out.reconstruction_loss + sae.sparsity_weight * out.sparsity_loss + 0.5 * expected
    )


def test_the_gradient_reaches_the_encoder_of_dead_features_and_no_other(sleepy):
    """Defect: the gradient of the pre-activations is dropped, so that dead features are never turned to the data."""
    sae, out, rows, _ = sleepy
    used = (dead_code(sae, rows, 4) > 0).any(0)
    assert used.any()
    assert not (used & ~sae.dead).any()
    for parameter in (sae.encoder_weight, sae.decoder_weight):
        (grad,) = torch.autograd.grad(out.aux_loss, parameter, retain_graph=True)
        assert torch.equal((grad != 0).any(-1), used)
    (grad,) = torch.autograd.grad(out.aux_loss, sae.encoder_bias)
    assert torch.equal(grad != 0, used)


def test_the_residual_is_constant(sleepy):
    """Defect: the residual is not detached, so that live features learn to leave over what dead ones can make."""
    sae, out, _, _ = sleepy
    for parameter in (sae.encoder_weight, sae.decoder_weight):
        (grad,) = torch.autograd.grad(out.aux_loss, parameter, retain_graph=True)
        assert not grad[~sae.dead].any()


def test_the_bias_is_used_once(sleepy):
    """Defect: the auxiliary reconstruction adds the bias that the residual no longer has."""
    sae, out, rows, residual = sleepy
    twice = unexplained(residual - dead_code(sae, rows, 4) @ sae.decoder_weight - sae.pre_bias, residual)
    assert (out.aux_loss - twice).abs() > 1e-6
    # To the bias leads one way only, through the encoder, which does not see it twice either.
    (grad,) = torch.autograd.grad(out.aux_loss, sae.pre_bias, retain_graph=True)
    (encoder_bias,) = torch.autograd.grad(out.aux_loss, sae.encoder_bias)
    torch.testing.assert_close(grad, -encoder_bias @ sae.encoder_weight)


def test_features_with_value_0_get_no_gradient():
    """Defect: relu is not differentiated; features selected with value 0 learn from rows that they do not fire in."""
    sae = shaken(nn.TopKSAE(8, 24, 3, aux_k=24, dead_after=1000))
    with torch.no_grad():
        sae.encoder_bias[:6] = -100.0
    sae.idle.fill_(1000)
    out = sae(torch.randn(2, 8, dtype=torch.float64))  # places for all dead features, those below 0 too
    for parameter in (sae.encoder_bias, sae.encoder_weight):
        (grad,) = torch.autograd.grad(out.aux_loss, parameter, retain_graph=True)
        assert not grad[:6].any()
        assert grad[6:].any()


@pytest.mark.parametrize("name", CODERS)
def test_is_zero_and_harmless_while_nothing_is_dead(name):
    sae = CODERS[name](aux_k=4)
    out = sae(torch.randn(16, *sae.read_shape))
    assert out.aux_loss == 0
    out.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_more_places_than_dead_features():
    sae = shaken(nn.TopKSAE(8, 24, 3, aux_k=4, dead_after=1000))
    x = torch.randn(16, 8, dtype=torch.float64)
    sae.idle[[2, 5]] = 10_000
    with torch.no_grad():
        sae.encoder_bias[[2, 5]] -= 2.0
    out = sae(x)
    assert 1 <= sae.dead.sum() <= 2
    residual = (x - out.reconstruction).detach()
    assert_same_loss(out.aux_loss, unexplained(residual - dead_code(sae, x, 4) @ sae.decoder_weight, residual), sae)


def test_costs_nothing_in_evaluation():
    sae = nn.TopKSAE(8, 24, 3, dead_after=1)
    sae.idle.fill_(10)
    assert sae.eval()(torch.randn(16, 8)).aux_loss == 0


def test_brings_dead_features_back():
    def dead_features(aux_k):
        torch.manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(64, 16), dim=-1)
        sae = nn.TopKSAE(16, 64, 2, aux_k=aux_k, aux_weight=1.0, dead_after=512)
        with torch.no_grad():
            sae.encoder_bias[16:] -= 1.0
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        sae.keep_unit_norm(optimizer)
        for _ in range(150):
            active = torch.randint(64, (256, 2))
            optimizer.zero_grad()
            sae(directions[active].sum(1)).loss.backward()
            optimizer.step()
        return int(sae.dead.sum())

    assert dead_features(aux_k=8) < 0.5 * dead_features(aux_k=0)
