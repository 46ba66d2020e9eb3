import pytest
import torch
from torch.nn.functional import linear

from isthmus import nn


def dense_code(sae, x, bias, k):
    """Top-k code of every row as a dense [rows, features] matrix."""
    activation = linear(x - sae.pre_bias, sae.encoder_weight, bias).relu()
    values, indices = activation.topk(k, dim=-1)
    return torch.zeros_like(activation).scatter(-1, indices, values)


def unexplained(residual, target):
    target = target.detach()
    return residual.square().sum() / (target - target.mean(0)).square().sum()


def trained_looking(**options):
    """A float64 autoencoder whose parameters are not at their symmetric start."""
    sae = nn.TopKSAE(8, 24, 3, **options).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return sae


def test_output_and_loss_equal_the_dense_formula():
    torch.manual_seed(0)
    sae = trained_looking().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    out = sae(x)
    assert out.values.shape == out.indices.shape == (2, 5, 3)
    code = dense_code(sae, x, sae.encoder_bias, 3)
    torch.testing.assert_close(out.values, code.gather(-1, out.indices))
    expected = code @ sae.decoder_weight + sae.pre_bias
    torch.testing.assert_close(out.reconstruction, expected)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(out.loss, unexplained((x - expected).flatten(0, 1), rows))
    assert out.aux_loss == 0
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, parameters),
        torch.autograd.grad(unexplained((x - expected).flatten(0, 1), rows), parameters),
    )


def test_encoder_starts_as_the_transposed_unit_norm_decoder():
    sae = nn.TopKSAE(8, 24, 3)
    assert torch.equal(sae.encoder_weight, sae.decoder_weight)
    torch.testing.assert_close(sae.decoder_weight.norm(dim=-1), torch.ones(24))


def test_idle_counts_the_rows_since_a_feature_fired():
    sae = nn.TopKSAE(2, 4, 1, aux_k=0, dead_after=5)
    axes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with torch.no_grad():
        sae.encoder_weight.copy_(axes)
    sae(axes[:2])
    assert sae.idle.tolist() == [0, 0, 2, 2]
    sae(axes[[1, 2, 2]])
    assert sae.idle.tolist() == [3, 0, 0, 5]
    assert sae.dead.tolist() == [False, False, False, True]
    sae(torch.zeros(1, 2))  # selected with value 0: not fired
    assert sae.idle.tolist() == [4, 1, 1, 6]
    sae.eval()(axes)
    assert sae.idle.tolist() == [4, 1, 1, 6]


def test_auxk_equals_the_dense_formula_and_trains_dead_features_only():
    torch.manual_seed(1)
    sae = trained_looking(aux_k=4, dead_after=100)
    x = torch.randn(16, 8, dtype=torch.float64)
    fired = sae(x).indices.unique()
    asleep = torch.ones(24, dtype=torch.bool)
    asleep[fired] = False
    with torch.no_grad():  # put some firing features to sleep as well
        sae.encoder_bias[fired[:4]] -= 100.0
        asleep[fired[:4]] = True
    sae.idle[asleep] = 1000
    out = sae(x)
    dead = sae.dead
    assert dead.sum() >= 5
    assert not dead.all()

    parameters = list(sae.parameters())
    bias = sae.encoder_bias.masked_fill(~dead, -torch.inf)
    code = dense_code(sae, x, bias, 4)
    residual = (x - out.reconstruction).detach()
    expected = unexplained(residual - code @ sae.decoder_weight, residual)
    torch.testing.assert_close(out.aux_loss, expected)
    actual = torch.autograd.grad(out.aux_loss, parameters, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, parameters))

    grads = dict(zip(dict(sae.named_parameters()), actual, strict=True))
    used = (code > 0).any(0)
    assert used.any()
    for name in ("encoder_weight", "decoder_weight"):
        reached = grads[name].abs().sum(-1) > 0
        assert torch.equal(reached, used), name
    assert not (used & ~dead).any()
    torch.testing.assert_close(out.loss, unexplained(x - out.reconstruction, x) + expected / 32)


def test_auxk_is_zero_and_harmless_while_nothing_is_dead():
    sae = nn.TopKSAE(8, 24, 3)
    out = sae(torch.randn(16, 8))
    assert out.aux_loss == 0
    out.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_auxk_brings_dead_features_back():
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


def test_decoder_stays_unit_norm_and_its_gradient_orthogonal(digits):
    torch.manual_seed(0)
    sae = nn.TopKSAE(64, 128, 8, dead_after=2000)
    sae.init_from(digits)
    start = sae(digits).loss.item()
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    sae.keep_unit_norm(optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        sae(digits).loss.backward()
        before = sae.decoder_weight.detach().clone()
        raw = sae.decoder_weight.grad.clone()
        optimizer.step()
        grad = sae.decoder_weight.grad
        assert (grad * before).sum(-1).abs().max() < 1e-6 * raw.norm()
        torch.testing.assert_close(raw - grad, (raw * before).sum(-1, keepdim=True) * before)
        torch.testing.assert_close(sae.decoder_weight.norm(dim=-1), torch.ones(128))
    assert sae(digits).loss.item() < 0.5 * start


def test_projection_without_a_gradient_does_nothing():
    nn.TopKSAE(8, 24, 3).project_decoder_grad()


def test_init_from_finds_the_geometric_median_and_the_best_encoder_scale():
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64).exp() + 5.0
    x[0] += 1e6  # an outlier moves a mean, not a median
    sae = nn.TopKSAE(8, 24, 3).double()
    sae.init_from(x, iterations=200)
    pull = torch.nn.functional.normalize(x - sae.pre_bias, dim=-1).sum(0)
    assert pull.norm() < 1e-6
    read = sae(x).reconstruction - sae.pre_bias
    residual = (x - sae.pre_bias - read).detach()
    assert (residual * read).sum().abs() < 1e-9 * read.square().sum()


@pytest.mark.parametrize(("options", "match"), [({"k": 0}, "k must"), ({"k": 25}, "k must")])
def test_k_out_of_range_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.TopKSAE(8, 24, **options)


def test_aux_k_out_of_range_is_refused():
    with pytest.raises(ValueError, match="aux_k must"):
        nn.TopKSAE(8, 24, 3, aux_k=25)
