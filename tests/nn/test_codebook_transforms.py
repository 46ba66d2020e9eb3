import pytest
import torch

from isthmus import nn


def test_affine_codes_have_the_moments_of_the_vectors():
    torch.manual_seed(0)
    transform = nn.AffineCodebook(3, decay=0.8).double()
    quantizer = nn.VectorQuantizer(16, 3, learning="gradient", revive_below=0.0, transform=transform).double()
    assert torch.equal(quantizer.codes(), quantizer.codebook)
    weight, total, squares = 0.0, 0.0, 0.0
    for _ in range(4):
        x = 3.0 * torch.randn(20, 3, dtype=torch.float64) + 7.0
        mask = torch.rand(20) < 0.7
        quantizer(x, mask=mask)
        weight = 0.8 * weight + 0.2
        total = 0.8 * total + 0.2 * x[mask].mean(0)
        squares = 0.8 * squares + 0.2 * x[mask].square().mean(0)
    mean = total / weight
    std = (squares / weight - mean.square()).sqrt()
    codes = quantizer.codes()
    torch.testing.assert_close(codes.mean(0), mean)
    torch.testing.assert_close(codes.std(0, correction=0), std)
    own = quantizer.codebook
    torch.testing.assert_close(codes, (own - own.mean(0)) / own.std(0, correction=0) * std + mean)


def test_affine_codes_learn_through_scale_and_shift():
    torch.manual_seed(0)
    transform = nn.AffineCodebook(3, decay=0.0).double()
    quantizer = nn.VectorQuantizer(4, 3, learning="gradient", revive_below=0.0, transform=transform).double()
    x = 5.0 * torch.randn(40, 3, dtype=torch.float64)
    out = quantizer(x)
    out.loss.backward()
    codes = quantizer.codes().detach()
    per_code = torch.zeros(4, 3, dtype=torch.float64).index_add(0, out.indices, 2 * (codes[out.indices] - x) / 40)
    scale = x.std(0, correction=0) / quantizer.codebook.std(0, correction=0)
    torch.testing.assert_close(quantizer.codebook.grad, per_code * scale)


def test_a_batch_without_a_live_vector_leaves_the_moments_alone():
    transform = nn.AffineCodebook(3)
    transform.observe(torch.randn(5, 3), None)
    before = transform.moments.clone()
    transform.observe(torch.randn(5, 3), torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(transform.moments, before)


def test_affine_refuses_a_decay_out_of_range():
    with pytest.raises(ValueError, match="decay"):
        nn.AffineCodebook(3, decay=1.0)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_simvq_trains_the_layer_and_not_the_codebook(gradient):
    torch.manual_seed(0)
    quantizer = nn.SimVQ(16, 4, gradient=gradient, commitment_weight=0.3).double()
    stored = quantizer.codebook.clone()
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    out = quantizer(x)
    weight = quantizer.transform.weight
    codes = stored @ weight.T
    index = (x.unsqueeze(1) - codes).square().sum(-1).argmin(-1)
    assert torch.equal(out.indices, index)
    torch.testing.assert_close(out.quantized, codes[index])
    expected = (x.detach() - codes[index]).square().sum(-1).mean()
    expected = expected + 0.3 * (x - codes[index].detach()).square().sum(-1).mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (x, weight)), torch.autograd.grad(expected, (x, weight)))
    assert torch.equal(quantizer.codebook, stored)
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]


def test_simvq_moves_all_codes_at_once():
    torch.manual_seed(0)
    quantizer = nn.SimVQ(64, 4)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=2e-2)
    x = torch.randn(2000, 4) @ torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1]))
    start = quantizer(x).loss.item()
    for _ in range(200):
        optimizer.zero_grad()
        quantizer(x[torch.randint(2000, (256,))]).loss.backward()
        optimizer.step()
    assert quantizer(x).loss < 0.5 * start
    assert quantizer.encode(x).unique().numel() > 58


def test_simvq_takes_any_transform_but_no_kmeans():
    quantizer = nn.SimVQ(16, 6, heads=2, transform=torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()))
    assert (quantizer.codes().abs() <= 1.0).all()
    with pytest.raises(ValueError, match="transform"):
        quantizer.init_from(torch.randn(40, 6))
