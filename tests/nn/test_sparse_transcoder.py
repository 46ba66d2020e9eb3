"""Transcoder and Crosscoder against dense formulas."""

import pytest
import torch

from isthmus import nn

from .dense_sae import assert_same_loss, dead_code, dense_code, scores, shaken, topk_code, unexplained


@pytest.mark.parametrize("skip", [True, False])
def test_transcoder_equals_the_dense_formula(skip):
    model = shaken(nn.Transcoder(8, 6, 24, 3, skip=skip))
    x, y = (torch.randn(2, 5, d, dtype=torch.float64) for d in (8, 6))
    out = model(x, y)
    rows, target = x.flatten(0, 1), y.flatten(0, 1)
    code = topk_code(scores(model, rows).relu(), 3)
    torch.testing.assert_close(dense_code(out, 24), code)
    expected = code @ model.decoder_weight + model.decoder_bias
    if skip:
        expected = expected + rows @ model.skip_weight.T
    torch.testing.assert_close(out.reconstruction, expected.view_as(y))
    torch.testing.assert_close(model.predict(x), out.reconstruction)
    assert_same_loss(out.loss, unexplained(target - expected, target), model)


def test_transcoder_auxiliary_loss_explains_the_target():
    model = shaken(nn.Transcoder(8, 6, 24, 3, aux_k=4, dead_after=1000))
    x, y = (torch.randn(16, d, dtype=torch.float64) for d in (8, 6))
    model.idle[::2] = 10_000
    with torch.no_grad():
        model.encoder_bias[::2] -= 2.0
    out = model(x, y)
    assert model.dead.any()
    residual = (y - out.reconstruction).detach()
    expected = unexplained(residual - dead_code(model, x, 4) @ model.decoder_weight, residual)
    assert_same_loss(out.aux_loss, expected, model)


def test_transcoder_starts_without_the_skip_path_and_at_the_median_of_the_target():
    model = nn.Transcoder(8, 6, 24, 3).double()
    assert not model.skip_weight.any()
    x, y = (torch.randn(50, d, dtype=torch.float64) for d in (8, 6))
    model.init_from(x, y, iterations=200)
    assert torch.nn.functional.normalize(y - model.decoder_bias, dim=-1).sum(0).norm() < 1e-6


def test_the_skip_path_takes_over_what_is_linear():
    def trained(skip):
        torch.manual_seed(0)
        linear = torch.randn(16, 16) / 4
        model = nn.Transcoder(16, 16, 64, 2, skip=skip)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            x = torch.randn(256, 16)
            optimizer.zero_grad()
            loss = model(x, x @ linear.T).loss
            loss.backward()
            optimizer.step()
        return loss

    assert trained(skip=True) < 0.1 < 0.3 < trained(skip=False)


def test_crosscoder_is_an_autoencoder_of_the_layers_side_by_side():
    model = shaken(nn.Crosscoder(3, 4, 24, 5))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    out = model(x)
    rows = x.view(12, 12)
    code = topk_code(scores(model, rows).relu(), 5)
    assert out.values.shape == (2, 6, 5)
    torch.testing.assert_close(dense_code(out, 24), code)
    # Each layer reads with its own part of the encoder, and writes with its own part of the decoder.
    heard = sum(
        (x - model.pre_bias.view(3, 4))[..., i, :] @ model.encoder_weight.view(24, 3, 4)[:, i].T for i in range(3)
    )
    torch.testing.assert_close(scores(model, rows).view(2, 6, 24), heard + model.encoder_bias)
    written = torch.einsum("...f,fld->...ld", code.view(2, 6, 24), model.decoder_weight.view(24, 3, 4))
    torch.testing.assert_close(out.reconstruction, written + model.pre_bias.view(3, 4))
    torch.testing.assert_close(model.decode(*model.encode(x)), out.reconstruction)
    assert_same_loss(out.loss, unexplained(rows - out.reconstruction.view(12, 12), rows), model)
    torch.testing.assert_close(model.layer_norms[7, 1], model.decoder_weight[7, 4:8].norm())


def test_crosscoder_finds_which_layers_a_feature_lives_in():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 2, 12), dim=-1)
    directions[:8, 1] = 0.0  # features of layer 0 alone
    directions[8:16, 0] = 0.0  # of layer 1 alone
    model = nn.Crosscoder(2, 12, 32, 2, dead_after=2000)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.keep_unit_norm(optimizer)
    for _ in range(500):
        active = torch.randint(24, (256, 2))
        optimizer.zero_grad()
        model(directions[active].sum(1)).loss.backward()
        optimizer.step()
    match = nn.match_features(directions.flatten(1), model.decoder_weight)
    share = model.layer_norms[match.indices, 0].square()
    assert match.cosine.mean() > 0.9
    assert share[:8].mean() > 0.9
    assert share[8:16].mean() < 0.1
    assert 0.3 < share[16:].mean() < 0.7
