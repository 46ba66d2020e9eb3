import pytest
import torch
from torch.nn.functional import cross_entropy

from isthmus import nn


@pytest.mark.parametrize("key_dim", [None, 5])
def test_every_head_fetches_the_value_of_its_nearest_key(key_dim):
    bottleneck = nn.KeyValueBottleneck(7, 6, 3, heads=2, key_dim=key_dim).double().eval()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    seen = x if key_dim is None else x @ bottleneck.projection
    parts = seen.unflatten(-1, (2, -1))
    keys = bottleneck.keys.codebook.view(2, 7, -1)
    values, indices = bottleneck(x)
    for h in range(2):
        nearest = (parts[..., h, :].unsqueeze(-2) - keys[h]).square().sum(-1).argmin(-1)
        assert torch.equal(indices[..., h], nearest)
        torch.testing.assert_close(values[..., h, :], bottleneck.values[h][nearest])


def test_gradients_reach_the_fetched_values_alone():
    bottleneck = nn.KeyValueBottleneck(7, 6, 3, heads=2).eval()
    x = torch.randn(4, 6, requires_grad=True)
    values, indices = bottleneck(x)
    values.square().sum().backward()
    assert x.grad is None
    fetched = torch.zeros(2, 7, dtype=torch.bool)
    fetched[torch.arange(2), indices] = True
    assert fetched.sum() < 9
    assert torch.equal(bottleneck.values.grad.abs().sum(-1) > 0, fetched)
    assert [name for name, _ in bottleneck.named_parameters()] == ["values"]


def test_one_head_has_a_dimension_of_its_own():
    values, indices = nn.KeyValueBottleneck(7, 6, 3)(torch.randn(4, 5, 6))
    assert (values.shape, indices.shape) == ((4, 5, 1, 3), (4, 5, 1))


def test_keys_follow_the_data_until_they_are_frozen():
    torch.manual_seed(0)
    bottleneck = nn.KeyValueBottleneck(7, 6, 3, heads=2, decay=0.5)
    x = torch.randn(100, 6) + 5.0
    bottleneck.init_from(x)
    keys = bottleneck.keys.codebook.clone()
    bottleneck(x + 1.0)
    assert not torch.equal(bottleneck.keys.codebook, keys)
    keys = bottleneck.keys.codebook.clone()
    bottleneck.freeze_keys()
    bottleneck(x - 1.0)
    assert torch.equal(bottleneck.keys.codebook, keys)
    bottleneck.freeze_keys(False)
    bottleneck(x - 1.0)
    assert not torch.equal(bottleneck.keys.codebook, keys)


def test_what_was_learned_first_is_not_forgotten(digits):
    """Classes one after the other: a linear layer keeps the last, the bottleneck keeps all."""
    datasets = pytest.importorskip("sklearn.datasets")
    target = torch.tensor(datasets.load_digits().target[:512])
    torch.manual_seed(0)
    bottleneck = nn.KeyValueBottleneck(200, 64, 10, heads=16, key_dim=8)
    bottleneck.init_from(digits)
    bottleneck.freeze_keys()
    linear = torch.nn.Linear(64, 10)

    def accuracy(logits):
        return (logits(digits).argmax(-1) == target).float().mean().item()

    def by_keys(x):
        return bottleneck(x).values.mean(-2)

    for logits, model in ((by_keys, bottleneck), (linear, linear)):
        optimizer = torch.optim.SGD(model.parameters(), lr=20.0 if model is bottleneck else 0.5)
        for label in range(10):
            mine = target == label
            for _ in range(40):
                optimizer.zero_grad()
                cross_entropy(logits(digits[mine]), target[mine]).backward()
                optimizer.step()
    assert accuracy(by_keys) > 0.8
    assert accuracy(linear) < 0.4
