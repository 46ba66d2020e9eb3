import pytest
import torch

from isthmus import nn


def most_similar(x, codebook, k):
    cosine = (x @ codebook.T) / (x.norm(dim=-1, keepdim=True) * codebook.norm(dim=-1))
    return cosine.topk(k, dim=-1).indices


@pytest.mark.parametrize("k", [1, 4])
def test_features_are_the_sum_of_the_most_similar_codes(k):
    torch.manual_seed(0)
    layer = nn.CodebookFeatures(20, 6, k).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    features, indices, loss = layer(x)
    assert torch.equal(indices, most_similar(x, layer.codebook, k))
    total = layer.codebook[indices].sum(-2)
    torch.testing.assert_close(features, total)
    torch.testing.assert_close(layer.decode(indices), total)
    torch.testing.assert_close(loss, (x - total).square().sum(-1).mean())


def test_gradient_passes_straight_through_and_codes_learn_to_reconstruct():
    torch.manual_seed(0)
    layer = nn.CodebookFeatures(20, 6, 4).double()
    x = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(15, 6, dtype=torch.float64)
    features, indices, loss = layer(x)
    (loss + (features * direction).sum()).backward()
    torch.testing.assert_close(x.grad, direction)
    expected = (x.detach() - layer.codebook[indices].sum(-2)).square().sum(-1).mean()
    torch.testing.assert_close(layer.codebook.grad, torch.autograd.grad(expected, layer.codebook)[0])


def test_activated_codes_replace_the_least_similar():
    torch.manual_seed(0)
    layer = nn.CodebookFeatures(20, 6, 4)
    x = torch.randn(50, 6)
    nearest = layer.encode(x)
    out = layer(x, activate=[3, 8])
    for row, steered in zip(nearest.tolist(), out.indices.tolist(), strict=True):
        assert steered == [3, 8, *[code for code in row if code not in (3, 8)][:2]]
    torch.testing.assert_close(out.features, layer.codebook[out.indices].sum(-2))
    assert torch.equal(layer(x, activate=torch.tensor([1, 2, 3, 4])).indices, torch.tensor([1, 2, 3, 4]).expand(50, 4))


def test_kmeans_starts_near_the_data(digits):
    torch.manual_seed(0)
    layer = nn.CodebookFeatures(32, 64, 2)
    before = layer(digits).loss
    layer.init_from(digits)
    assert layer(digits).loss < 0.5 * before


def test_training_lowers_the_reconstruction_error(digits):
    torch.manual_seed(0)
    layer = nn.CodebookFeatures(64, 64, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    start = layer(digits).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        layer(digits).loss.backward()
        optimizer.step()
    assert layer(digits).loss < 0.2 * start


@pytest.mark.parametrize("k", [0, 21])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="k must"):
        nn.CodebookFeatures(20, 6, k)


@pytest.mark.parametrize("activate", [[1, 2, 3], [[1]]])
def test_more_codes_than_k_are_refused(activate):
    with pytest.raises(ValueError, match="activate"):
        nn.CodebookFeatures(20, 6, 2)(torch.randn(5, 6), activate=activate)
