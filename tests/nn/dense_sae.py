"""What tests compare sparse autoencoders with: dense float64 formulas, every code a full [rows, features] matrix."""

import torch
from torch.nn.functional import linear


def shaken(sae):
    """A float64 module whose parameters are not at their symmetric start."""
    sae = sae.double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return sae


def scores(sae, x, bias=None):
    """Pre-activations."""
    rows = x - sae.pre_bias if hasattr(sae, "pre_bias") else x
    return linear(rows, sae.encoder_weight, sae.encoder_bias if bias is None else bias)


def topk_code(activation, k):
    values, indices = activation.topk(k, dim=-1)
    return torch.zeros_like(activation).scatter(-1, indices, values)


def dead_code(sae, x, k):
    """The k strongest dead features, after relu."""
    bias = sae.encoder_bias.masked_fill(~sae.dead, -torch.inf)
    return topk_code(scores(sae, x, bias).relu(), k)


def unexplained(residual, target):
    target = target.detach()
    return residual.square().sum() / (target - target.mean(0)).square().sum()


def dense_code(out, num_features):
    """The code of an output as a matrix [rows, features]."""
    if out.offsets is None:
        values, indices = (t.reshape(-1, t.shape[-1]) for t in (out.values, out.indices))
        empty = indices < 0
        assert not values[empty].any()
        code = values.new_zeros(len(values), num_features)
        return code.scatter_add(1, indices.masked_fill(empty, 0), values.masked_fill(empty, 0.0))
    rows = torch.arange(len(out.offsets) - 1).repeat_interleave(out.offsets.diff())
    code = out.values.new_zeros(len(out.offsets) - 1, num_features)
    return code.index_put((rows, out.indices), out.values)


def assert_same_loss(actual, expected, sae):
    """The same number, and the same gradients in all parameters that it depends on."""
    torch.testing.assert_close(actual, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual, parameters, retain_graph=True, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True, materialize_grads=True),
    )


def put_to_sleep(sae, x, features=8):
    """Some features count as dead: those that did not fire, and the first of those that did, moved below 0."""
    fired = dense_code(sae(x), sae.num_features).any(0).nonzero().flatten()
    asleep = torch.ones(sae.num_features, dtype=torch.bool)
    asleep[fired[features // 2 :]] = False
    with torch.no_grad():
        sae.encoder_bias[fired[: features // 2]] -= 2.0
    sae.idle.copy_(torch.where(asleep, sae.dead_after, 0))
    assert sae.dead.sum() >= features // 2 and not sae.dead.all()
