"""QINCo against its formula in float64, with the codes of all vectors in memory."""

import pytest
import torch
from checks import extra_memory, measures_memory

from isthmus import nn
from isthmus.nn import implicit_codebook


def qinco(*args, awake=True, **options):
    """With networks that do something, unless they are to be as new."""
    torch.manual_seed(0)
    quantizer = nn.QINCo(*args, hidden_dim=7, **options).double()
    if awake:
        for parameter in quantizer.networks.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return quantizer


def codes_of_stage(quantizer, stage, base, known):
    if stage == 0:
        return base
    network = quantizer.networks[stage - 1]
    joined = torch.cat(torch.broadcast_tensors(base, known), -1)
    codes = base + joined @ torch.cat([network.from_base.weight, network.from_known.weight], 1).T
    codes = codes + network.from_known.bias
    for down, up in zip(network.down, network.up, strict=True):
        codes = codes + (codes @ down.weight.T).clamp(min=0) @ up.weight.T
    return codes


def stages_by_hand(rows, quantizer, weight=0.25):
    """Indices, the code of each stage, and the loss; codes of earlier stages are constants."""
    known, indices, chosen, loss = torch.zeros_like(rows), [], [], 0.0
    for stage, book in enumerate(quantizer.stage_list()):
        codes = codes_of_stage(quantizer, stage, book, known.unsqueeze(1)).expand(len(rows), -1, -1)
        residual = rows - known
        index = (residual.unsqueeze(1) - codes).square().sum(-1).argmin(-1)
        code = codes[torch.arange(len(rows)), index]
        loss = loss + (residual.detach() - code).square().sum(-1).mean()
        loss = loss + weight * (residual - code.detach()).square().sum(-1).mean()
        known = known + code.detach()
        indices.append(index)
        chosen.append(code)
    return torch.stack(indices, -1), torch.stack(chosen, -2), loss


@pytest.mark.parametrize("sizes", [9, (9, 5, 7)])
@pytest.mark.parametrize("layers", [0, 2])
def test_codes_of_a_stage_depend_on_what_is_known(sizes, layers):
    quantizer = qinco(sizes, 4, 3, num_layers=layers).eval()
    x = torch.randn(2, 15, 4, dtype=torch.float64, requires_grad=True)
    indices, codes, loss = stages_by_hand(x.view(30, 4), quantizer)
    out = quantizer(x)
    assert torch.equal(out.indices.view(30, 3), indices)
    torch.testing.assert_close(out.quantized.view(30, 4), codes.sum(-2))
    torch.testing.assert_close(out.loss, loss)
    variables = [x, *quantizer.parameters()]
    actual = torch.autograd.grad(out.loss, variables)
    torch.testing.assert_close(actual, torch.autograd.grad(loss, variables))
    assert all((gradient != 0).any() for gradient in actual)
    direction = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad((quantizer(x).quantized * direction).sum(), x)[0], direction)
    assert torch.equal(quantizer.encode(x).view(30, 3), indices)
    torch.testing.assert_close(quantizer.get_codes(out.indices).view(30, 3, 4), codes)
    torch.testing.assert_close(quantizer.decode(out.indices).view(30, 4), codes.sum(-2))
    torch.testing.assert_close(quantizer.decode(out.indices[..., :2]).view(30, 4), codes[:, :2].sum(-2))


def test_a_new_one_is_a_residual_quantizer():
    quantizer = qinco(9, 4, 3, awake=False).eval()
    plain = nn.ResidualVQ(9, 4, 3, learning="gradient").double().eval()
    plain.load_state_dict({name: value for name, value in quantizer.state_dict().items() if "networks" not in name})
    x = torch.randn(30, 4, dtype=torch.float64)
    for quantize in (quantizer, plain):
        quantize.init_from(x)
    torch.testing.assert_close(tuple(quantizer(x)), tuple(plain(x)))


def test_blocks_of_vectors_are_searched_as_one(monkeypatch):
    quantizer = qinco(9, 4, 3).eval()
    x = torch.randn(50, 4, dtype=torch.float64)
    whole = quantizer(x)
    # 9 codes of 3 · 4 + 7 numbers: 7 vectors at a time, then one at a time.
    for numbers in (7 * 9 * 19, 1):
        monkeypatch.setattr(implicit_codebook, "_SEARCHED_AT_ONCE", numbers)
        assert torch.equal(quantizer(x).indices, whole.indices)


@measures_memory
def test_a_training_step_does_not_hold_the_codes_of_all_vectors():
    """They and the hidden layer would take 201 MB for a stage."""
    quantizer = nn.QINCo(256, 16, 3, hidden_dim=32, num_layers=1)
    x = torch.randn(4096, 16, requires_grad=True)
    assert extra_memory(lambda: quantizer(x).loss.backward()) < 100e6


def test_masks_stages_and_dropout():
    quantizer = qinco(9, 4, 3, channel_first=True, quantize_dropout=True)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    kept = (quantizer(x).indices >= 0).sum(-1)
    assert (kept == kept[:, :1]).all()
    quantizer.eval()
    whole, mask = quantizer(x), torch.rand(6, 5) < 0.6
    x[~mask.unsqueeze(1).expand_as(x)] = torch.nan
    x.requires_grad_()
    out = quantizer(x, mask=mask)
    assert torch.equal(out.indices, whole.indices.masked_fill(~mask.unsqueeze(-1), -1))
    torch.testing.assert_close(out.quantized, whole.quantized.masked_fill(~mask.unsqueeze(1), 0.0))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    (out.loss + out.quantized.sum()).backward()
    assert (x.grad.movedim(1, -1)[~mask] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters())
    two = quantizer(x.nan_to_num(), stages=2).indices
    assert torch.equal(two, torch.where(torch.arange(3) < 2, quantizer.encode(x.nan_to_num()), -1))


def test_an_empty_batch():
    quantizer = qinco(9, 4, 3)
    out = quantizer(torch.randn(0, 4, dtype=torch.float64))
    assert out.quantized.shape == (0, 4)
    assert out.indices.shape == (0, 3)


def test_a_frozen_codebook_and_its_networks_get_no_gradient():
    quantizer = qinco(9, 4, 3, freeze_codebook=True)
    x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    loss = quantizer(x).loss
    gradients = torch.autograd.grad(loss, [x, *quantizer.parameters()], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert all(gradient is None for gradient in gradients[1:])


def test_dead_base_codes_move_onto_residuals_of_their_stage():
    quantizer = qinco(9, 4, 2, decay=0.0, revive_below=0.5)
    with torch.no_grad():
        quantizer.codebook[9 + 4 :] += 1000.0
    x = torch.randn(40, 4, dtype=torch.float64)
    _, codes, _ = stages_by_hand(x, quantizer)
    quantizer(x)
    moved = quantizer.stage_list()[1].detach()[4:]
    distance = (moved.unsqueeze(1) - (x - codes[:, 0].detach())).abs().amax(-1).amin(-1)
    assert (distance < 1e-9).all()


def test_networks_leave_less_than_fixed_codebooks():
    """Vectors on a circle: where the second code should be depends on the first."""
    torch.manual_seed(0)
    angle = torch.rand(2000) * 2 * torch.pi
    x = torch.stack([angle.cos(), angle.sin()], -1)
    errors = []
    for make, options in ((nn.QINCo, {"hidden_dim": 32}), (nn.ResidualVQ, {"learning": "gradient"})):
        torch.manual_seed(0)
        quantizer = make(8, 2, 2, revive_below=0.0, **options)
        quantizer.init_from(x)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            quantizer(x[torch.randint(2000, (256,))]).loss.backward()
            optimizer.step()
        errors.append((quantizer.eval()(x).quantized - x).square().sum(-1).mean().item())
    assert errors[0] < 0.8 * errors[1]


def test_the_search_keeps_the_promises_of_an_op():
    rows, known, base = (torch.randn(n, 3) for n in (6, 6, 5))
    weights = [torch.randn(*shape) for shape in ((3, 3), (3, 3), (3,), (4, 3), (3, 4))]
    torch.library.opcheck(torch.ops.isthmus_nn.nearest_implicit_code, (rows, known, base, weights))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"num_layers": -1}, "num_layers"),
        ({"gradient": "directional"}, "gradient"),
        ({"shared_codebook": True}, "got shared_codebook"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.QINCo(8, 4, 2, **options)
