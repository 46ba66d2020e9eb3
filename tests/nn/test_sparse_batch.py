"""BatchTopKSAE and MatryoshkaSAE against dense formulas."""

import pytest
import torch

from isthmus import nn

from .dense_sae import assert_same_loss, dense_code, scores, shaken, unexplained


def batch_code(sae, x):
    activation = scores(sae, x).relu()
    values, places = activation.flatten().topk(round(sae.k * len(x)))
    return torch.zeros_like(activation).flatten().scatter(0, places, values).view_as(activation)


@pytest.mark.parametrize("k", [3, 2.5])
def test_training_keeps_the_best_of_the_batch(k):
    sae = shaken(nn.BatchTopKSAE(8, 24, k))
    x = torch.randn(2, 6, 8, dtype=torch.float64) * torch.linspace(0.1, 3.0, 6, dtype=torch.float64).unsqueeze(-1)
    out = sae(x)
    rows = x.flatten(0, 1)
    code = batch_code(sae, rows)
    assert len(out.values) == len(out.indices) == round(12 * k)
    assert out.offsets.diff().unique().numel() > 1  # long rows get more features
    torch.testing.assert_close(dense_code(out, 24), code)
    expected = code @ sae.decoder_weight + sae.pre_bias
    torch.testing.assert_close(out.reconstruction, expected.view_as(x))
    assert_same_loss(out.loss, unexplained(rows - expected, rows), sae)


def test_evaluation_keeps_what_is_above_the_threshold_row_by_row():
    sae = shaken(nn.BatchTopKSAE(8, 24, 3))
    sae.threshold.fill_(0.7)
    sae.eval()
    x = torch.randn(12, 8, dtype=torch.float64)
    out = sae(x)
    activation = scores(sae, x)
    code = torch.where(activation > 0.7, activation, 0.0)
    torch.testing.assert_close(dense_code(out, 24), code)
    assert_same_loss(out.loss, unexplained(x - code @ sae.decoder_weight - sae.pre_bias, x), sae)
    torch.testing.assert_close(sae(x[3:4]).reconstruction, out.reconstruction[3:4])


def test_threshold_is_the_moving_average_of_the_smallest_value_kept():
    sae = shaken(nn.BatchTopKSAE(8, 24, 3, decay=0.75))
    smallest = [sae(torch.randn(16, 8, dtype=torch.float64)).values.min().item() for _ in range(3)]
    expected = smallest[0]
    for value in smallest[1:]:
        expected = 0.75 * expected + 0.25 * value
    assert sae.threshold.item() == pytest.approx(expected)
    before = sae.threshold.clone()
    sae.encode(torch.randn(16, 8, dtype=torch.float64))
    sae(torch.randn(0, 8, dtype=torch.float64))
    sae.eval()(torch.randn(16, 8, dtype=torch.float64))
    assert sae.threshold == before


def test_evaluation_keeps_about_k_features_after_training_steps():
    sae = nn.BatchTopKSAE(16, 128, 5, decay=0.9)
    for _ in range(30):
        sae(torch.randn(256, 16))
    kept = len(sae.eval()(torch.randn(1000, 16)).values) / 1000
    assert 4.5 < kept < 5.5


def test_half_precision_keeps_the_digits_of_the_threshold():
    sae = nn.BatchTopKSAE(8, 24, 3)
    sae.threshold.fill_(0.123456)
    assert sae.bfloat16().threshold.dtype == torch.float32
    assert sae.threshold == torch.tensor(0.123456)
    assert sae.double().threshold.dtype == torch.float64


def test_matryoshka_equals_the_dense_formula():
    sae = shaken(nn.MatryoshkaSAE(8, (4, 12, 24), 3))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    out = sae(x)
    rows = x.flatten(0, 1)
    code = batch_code(sae, rows)
    levels = [code[:, :width] @ sae.decoder_weight[:width] + sae.pre_bias for width in (4, 12, 24)]
    torch.testing.assert_close(sae.decode_levels(out.values, out.indices, out.offsets), torch.stack(levels, dim=1))
    torch.testing.assert_close(out.reconstruction, levels[-1].view_as(x))
    assert_same_loss(out.loss, sum(unexplained(rows - level, rows) for level in levels) / 3, sae)


def test_matryoshka_levels_of_rows_without_features():
    sae = shaken(nn.MatryoshkaSAE(8, (4, 12, 24), 3)).eval()
    sae.threshold.fill_(1e6)
    x = torch.randn(5, 8, dtype=torch.float64)
    values, indices, offsets = sae.encode(x)
    assert len(values) == 0
    levels = sae.decode_levels(values, indices, offsets)
    assert torch.equal(levels, sae.pre_bias.detach().expand(5, 3, 8))
    assert torch.equal(sae(x).reconstruction, sae.pre_bias.detach().expand(5, 8))
