"""Ways of a gradient through a quantizer, against formulas in float64."""

import pytest
import torch

from isthmus import nn, ops, random


def quantizer_and_rows(**options):
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(10, 4, learning="gradient", revive_below=0.0, **options).double()
    return quantizer, torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)


def gradients_of(out, x, codebook, direction):
    return torch.autograd.grad((out * direction).sum(), (x, codebook))


def step_by_hand(x, code, noise, direction):
    """The values of the directional step and its gradients to x and to each row's code, row by row."""
    values, to_x, to_code = [], [], []
    for a, c, n, g in zip(x, code, noise, direction, strict=True):
        step, aim = c - a, c - a + n
        u, e = aim / aim.norm(), step / step.norm()
        values.append(a + step.norm() * u)
        to_x.append(g - (u @ g) * e)
        to_code.append((u @ g) * e)
    return torch.stack(values), torch.stack(to_x), torch.stack(to_code)


@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_a_directional_step_splits_the_gradient_between_x_and_code(variance):
    quantizer, x = quantizer_and_rows(gradient="directional", directional_variance=variance)
    direction = torch.randn_like(x)
    torch.manual_seed(5)
    out = quantizer(x)
    torch.manual_seed(5)
    noise = variance**0.5 * ops.gaussian_noise(random.key(), (21, 4), torch.float64)
    rows, indices = x.detach().view(21, 4), out.indices.view(21)
    assert torch.equal(indices, (rows.unsqueeze(1) - quantizer.codebook).square().sum(-1).argmin(-1))
    code = quantizer.codebook.detach()[indices]
    values, to_x, to_code = step_by_hand(rows, code, noise, direction.view(21, 4))
    torch.testing.assert_close(out.quantized, values.view_as(x))
    expected = to_x.view_as(x), torch.zeros(10, 4, dtype=torch.float64).index_add(0, indices, to_code)
    torch.testing.assert_close(gradients_of(out.quantized, x, quantizer.codebook, direction), expected)
    if variance == 0.0:
        torch.testing.assert_close(out.quantized, code.view_as(x))
    assert torch.equal(quantizer.eval()(x).quantized, code.view_as(x))


def test_codes_of_a_directional_step_learn_from_it_alone():
    quantizer, x = quantizer_and_rows(gradient="directional", commitment_weight=0.5)
    loss = quantizer(x).loss
    nearest = (x.unsqueeze(-2) - quantizer.codebook.detach()).square().sum(-1).amin(-1)
    torch.testing.assert_close(loss, 0.5 * nearest.mean())
    actual = torch.autograd.grad(loss, (x, quantizer.codebook), allow_unused=True)
    torch.testing.assert_close(actual[0], torch.autograd.grad(0.5 * nearest.mean(), x)[0])
    assert actual[1] is None


def test_a_directional_step_that_has_no_length_or_no_code():
    quantizer, _ = quantizer_and_rows(gradient="directional")
    x = quantizer.codebook.detach()[:3].clone()
    x[2] = torch.nan
    x.requires_grad_()
    quantized = quantizer(x, mask=torch.tensor([True, True, False])).quantized
    torch.testing.assert_close(quantized[:2], x[:2])
    assert (quantized[2] == 0).all()
    to_x, to_code = gradients_of(quantized, x, quantizer.codebook, torch.ones(3, 4))
    assert torch.equal(to_x, torch.tensor([[1.0] * 4, [1.0] * 4, [0.0] * 4], dtype=torch.float64))
    assert (to_code == 0).all()


def test_a_directional_step_trains_codes_without_a_loss_of_their_own():
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(16, 2, learning="gradient", gradient="directional", commitment_weight=0.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=2e-2)
    x = 0.3 * torch.randn(512, 2) + torch.tensor([1.0, -1.0])
    for _ in range(150):
        optimizer.zero_grad()
        out = quantizer(x)
        (out.loss + (out.quantized - x).square().sum(-1).mean()).backward()
        optimizer.step()
    error = (quantizer.eval()(x).quantized - x).square().sum(-1).mean()
    assert error < 0.25 * x.var(0).sum()


@pytest.mark.parametrize("separate", [False, True])
def test_gumbel_codes_pass_the_gradient_of_their_softmax(separate):
    quantizer, x = quantizer_and_rows(
        gradient="gumbel", sample_temperature=0.7, heads=2, separate_codebook_per_head=separate
    )
    mask, direction = torch.rand(3, 7) < 0.8, torch.randn_like(x)
    torch.manual_seed(5)
    out = quantizer(x, mask=mask)
    torch.manual_seed(5)
    rows, codes = x.view(21, 2, 2), quantizer.codebook
    live = mask.view(21, 1).expand(21, 2)
    if separate:
        rows, codes, live = rows.transpose(0, 1), codes.view(2, 10, 2), live.T
    else:
        rows, live = rows.reshape(42, 2), live.reshape(42)
    drawn, indices = ops.vq_soft_quantize(
        rows, codes, temperature=0.7, gumbel=True, hard=True, mask=live, key=random.key()
    )
    drawn, indices = (drawn.transpose(0, 1), indices.T) if separate else (drawn, indices)
    assert torch.equal(out.indices, indices.reshape(3, 7, 2))
    drawn = drawn.reshape(x.shape)
    assert torch.equal(out.quantized, drawn)
    torch.testing.assert_close(
        gradients_of(out.quantized, x, quantizer.codebook, direction),
        gradients_of(drawn, x, quantizer.codebook, direction),
    )
    assert torch.equal(quantizer.eval()(x).indices, quantizer.encode(x))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_synchronous_updates_give_codes_their_share(gradient):
    quantizer, x = quantizer_and_rows(gradient=gradient, sync_update_v=0.3)
    direction = torch.randn_like(x)
    out = quantizer(x)
    to_x, to_codes = gradients_of(out.quantized, x, quantizer.codebook, direction)
    expected = torch.zeros(10, 4, dtype=torch.float64)
    expected.index_add_(0, out.indices.view(-1), 0.3 * direction.view(-1, 4))
    torch.testing.assert_close(to_codes, expected)
    quantizer.sync_update_v = 0.0
    torch.testing.assert_close(to_x, torch.autograd.grad((quantizer(x).quantized * direction).sum(), x)[0])


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_codebook_that_was_set_is_where_learning_goes_on(learning):
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(8, 4, learning=learning, decay=0.5, revive_below=0.0)
    x = torch.randn(30, 4)
    quantizer(x)
    quantizer(x, update="later")
    codes = torch.randn(8, 4)
    quantizer.set_codebook(codes)
    assert torch.equal(quantizer.codebook, codes)
    fresh = nn.VectorQuantizer(8, 4, learning=learning, decay=0.5, revive_below=0.0)
    fresh.load_state_dict({**quantizer.state_dict(), "usage": torch.ones(8)})
    for _ in range(2):
        quantizer(x)
        fresh(x)
    torch.testing.assert_close(quantizer.state_dict(), fresh.state_dict())
    with pytest.raises(ValueError, match=r"expected \[8, 4\]"):
        quantizer.set_codebook(codes[:4])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient": "gumbel"}, "needs sample_temperature"),
        ({"directional_variance": -1.0}, "directional_variance"),
        ({"sync_update_v": 0.5}, "sync_update_v needs"),
        ({"sync_update_v": -0.5}, "must not be negative"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.VectorQuantizer(8, 4, **options)
