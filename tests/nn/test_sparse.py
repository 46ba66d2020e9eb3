"""TopKSAE and its elder, KSparseAutoencoder: the parts that are theirs, against dense formulas."""

import pytest
import torch

from isthmus import nn

from .dense_sae import assert_same_loss, dense_code, scores, shaken, topk_code, unexplained


def test_output_and_loss_equal_the_dense_formula():
    sae = shaken(nn.TopKSAE(8, 24, 3)).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    out = sae(x)
    assert out.values.shape == out.indices.shape == (2, 5, 3)
    assert out.offsets is None
    rows = x.flatten(0, 1)
    code = topk_code(scores(sae, rows).relu(), 3)
    torch.testing.assert_close(dense_code(out, 24), code)
    assert (out.values.diff() <= 0).all()
    expected = code @ sae.decoder_weight + sae.pre_bias
    torch.testing.assert_close(out.reconstruction, expected.view_as(x))
    torch.testing.assert_close(sae.decode(*sae.encode(x)), out.reconstruction)
    torch.testing.assert_close(sae.decode_sparse(*sae.encode(x)), out.reconstruction - sae.pre_bias)
    assert out.aux_loss == 0
    assert out.sparsity_loss == 0
    assert_same_loss(out.loss, unexplained(rows - expected, rows), sae)


def test_gradients_reach_the_input():
    sae = shaken(nn.TopKSAE(8, 24, 3))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    code = topk_code(scores(sae, x).relu(), 3)
    expected = unexplained(x - code @ sae.decoder_weight - sae.pre_bias, x)
    torch.testing.assert_close(torch.autograd.grad(sae(x).loss, x), torch.autograd.grad(expected, x))


def test_groups_give_each_their_best():
    sae = shaken(nn.TopKSAE(8, 24, 6, groups=3))
    x = torch.randn(5, 8, dtype=torch.float64)
    out = sae(x)
    parts = scores(sae, x).relu().split(8, dim=-1)
    code = torch.cat([topk_code(part, 2) for part in parts], dim=-1)
    torch.testing.assert_close(dense_code(out, 24), code)
    assert_same_loss(out.loss, unexplained(x - code @ sae.decoder_weight - sae.pre_bias, x), sae)


def test_multi_topk_adds_a_second_reconstruction_in_training():
    sae = shaken(nn.TopKSAE(8, 24, 3, multi_k=12, multi_weight=0.25, dead_after=2))
    x = torch.randn(5, 8, dtype=torch.float64)
    out = sae(x)
    activation = scores(sae, x).relu()
    first, second = (unexplained(x - topk_code(activation, k) @ sae.decoder_weight - sae.pre_bias, x) for k in (3, 12))
    torch.testing.assert_close(dense_code(out, 24), topk_code(activation, 3))
    assert_same_loss(out.reconstruction_loss, first + 0.25 * second, sae)
    fired = (topk_code(activation, 3) > 0).any(0)
    assert torch.equal(sae.idle == 0, fired)  # what only the second reconstruction uses has not fired
    assert_same_loss(sae.eval()(x).loss, first, sae)


def test_multi_topk_trains_the_encoder_of_features_below_the_first_k():
    sae = shaken(nn.TopKSAE(8, 24, 1, multi_k=4))
    sae(torch.randn(1, 8, dtype=torch.float64)).loss.backward()
    assert (sae.encoder_weight.grad != 0).any(-1).sum() > 1


def test_encoder_starts_as_the_transposed_unit_norm_decoder():
    sae = nn.TopKSAE(8, 24, 3)
    assert torch.equal(sae.encoder_weight, sae.decoder_weight)
    assert sae.encoder_weight.data_ptr() != sae.decoder_weight.data_ptr()
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


def test_decoder_stays_unit_norm_and_its_gradient_orthogonal(digits):
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
    x = torch.randn(200, 8, dtype=torch.float64).exp() + 5.0
    x[0] += 1e6  # an outlier moves a mean, not a median
    sae = nn.TopKSAE(8, 24, 3).double()
    sae.init_from(x, iterations=200)
    pull = torch.nn.functional.normalize(x - sae.pre_bias, dim=-1).sum(0)
    assert pull.norm() < 1e-6
    read = sae(x).reconstruction - sae.pre_bias
    residual = (x - sae.pre_bias - read).detach()
    assert (residual * read).sum().abs() < 1e-9 * read.square().sum()


def test_init_from_data_of_which_half_is_one_point():
    point = torch.randn(8)
    x = torch.cat([point.expand(60, 8), torch.randn(40, 8)])
    sae = nn.TopKSAE(8, 24, 3)
    sae.init_from(x)
    torch.testing.assert_close(sae.pre_bias.detach(), point, atol=1e-3, rtol=0.0)
    sae.init_from(point.expand(60, 8))
    torch.testing.assert_close(sae.pre_bias.detach(), point)


def test_init_from_takes_data_of_another_dtype():
    sae = nn.TopKSAE(8, 24, 3)
    sae.init_from(torch.randn(100, 8, dtype=torch.float16) + 3.0)
    assert (sae.pre_bias > 2.0).all()


def test_an_empty_batch_changes_nothing():
    sae = nn.TopKSAE(8, 24, 3, dead_after=1)
    sae(torch.randn(4, 8))
    before = sae.idle.clone()
    out = sae(torch.randn(2, 0, 8))
    assert out.values.shape == (2, 0, 3)
    assert out.reconstruction.shape == (2, 0, 8)
    out.loss.backward()
    assert torch.equal(sae.idle, before)


# ---- KSparseAutoencoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_ksparse_equals_the_dense_formula(tied):
    model = shaken(nn.KSparseAutoencoder(8, 24, 3, tied=tied))
    assert (model.decoder_weight is model.encoder_weight) == tied
    x = torch.randn(5, 8, dtype=torch.float64)
    out = model(x)
    code = topk_code(scores(model, x), 3)  # linear: no relu
    torch.testing.assert_close(dense_code(out, 24), code)
    assert_same_loss(out.loss, unexplained(x - code @ model.decoder_weight - model.decoder_bias, x), model)


def test_ksparse_keeps_negative_values():
    model = nn.KSparseAutoencoder(2, 2, 2)
    with torch.no_grad():
        model.encoder_weight.copy_(torch.eye(2))
    assert model(torch.tensor([[-3.0, 1.0]])).values.tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("tied", [True, False])
def test_ksparse_start_is_scaled_to_the_data(tied):
    model = nn.KSparseAutoencoder(8, 24, 3, tied=tied).double()
    x = 5.0 * torch.randn(100, 8, dtype=torch.float64) + 1.0
    model.init_from(x, iterations=100)
    # Tied weights also lengthen the decoder; either way no common factor of the code would help.
    read = model.decode_sparse(*model.encode(x))
    with torch.no_grad():
        model.decoder_bias.copy_(x.median(0).values)
    assert 0.5 < (x * read).sum() / read.square().sum() < 2.0


def test_ksparse_anneals_k_and_keeps_more_in_evaluation():
    model = nn.KSparseAutoencoder(8, 24, 4, start_k=12, alpha=1.5)
    x = torch.randn(5, 8)

    def kept():
        return model(x).indices.shape[-1]

    assert kept() == 12
    model.anneal(0.5)
    assert kept() == 8
    model.anneal(2.0)
    assert kept() == 4
    model.eval()
    assert kept() == 6


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.TopKSAE(8, 24, 0), r"k must be in \[1, num_features=24\], got 0"),
        (lambda: nn.TopKSAE(8, 24, 25), "k must"),
        (lambda: nn.TopKSAE(8, 24, 3, aux_k=25), r"aux_k must be in \[0, num_features=24\], got 25"),
        (lambda: nn.TopKSAE(8, 24, 3, dead_after=0), "dead_after must be at least 1, got 0"),
        (lambda: nn.TopKSAE(8, 24, 3, groups=2), "groups must divide k=3 and num_features=24, got 2"),
        (lambda: nn.TopKSAE(8, 24, 3, multi_k=3), "multi_k must"),
        (lambda: nn.TopKSAE(8, 24, 4, multi_k=8, groups=2), "multi_k must"),
        (lambda: nn.KSparseAutoencoder(8, 24, 4, start_k=3), r"start_k must be in \[k=4, num_features=24\], got 3"),
        (lambda: nn.KSparseAutoencoder(8, 24, 4, alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: nn.BatchTopKSAE(8, 24, 0.5), "k must"),
        (lambda: nn.BatchTopKSAE(8, 24, 2, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: nn.MatryoshkaSAE(8, (8, 8, 24), 2), r"widths must ascend from at least 1, got \(8, 8, 24\)"),
        (lambda: nn.MatryoshkaSAE(8, (), 2), "widths must"),
        (lambda: nn.JumpReLUSAE(8, 24, bandwidth=0.0), "bandwidth must be positive, got 0.0"),
        (lambda: nn.JumpReLUSAE(8, 24, threshold=-1.0), "threshold must be positive, got -1.0"),
        (lambda: nn.ReLUSAE(8, 24, aux_k=25), "aux_k must"),
        (lambda: nn.Transcoder(8, 6, 24, 25), "k must"),
        (lambda: nn.TopKSAE(8, 24, 3)(torch.zeros(5, 7)), r"x has shape \[5, 7\]; expected \[..., 8\]"),
        (lambda: nn.Crosscoder(2, 8, 24, 3)(torch.zeros(5, 16)), r"x has shape \[5, 16\]; expected \[..., 2, 8\]"),
        (lambda: nn.Transcoder(8, 6, 24, 3)(torch.zeros(5, 8), torch.zeros(5, 7)), r"target has shape \[5, 7\]"),
        (lambda: nn.Transcoder(8, 6, 24, 3)(torch.zeros(5, 8), torch.zeros(4, 6)), "expected the same rows"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(make, match):
    with pytest.raises(ValueError, match=match):
        make()
