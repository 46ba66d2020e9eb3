"""RowAdam against torch.optim, and what makes it an optimizer: groups, closures, schedules, checkpoints."""

import copy
import io

import pytest
import torch
from torch.nn.functional import normalize

from isthmus.optim import RowAdam

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = ((), (40,), (9, 33), (6, 3, 5))


def parameters(dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in SHAPES]


def set_gradients(parameters, step):
    """The same for every step, whatever the dtype; of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 3)
        p.grad = grad.bfloat16().to(p.device, p.dtype)


def in_float32(optimizer_type, values, **options):
    """torch's optimizer as it acts on half parameters with float32 moments: they are rounded after every step."""
    wide = [v.detach().clone().to(torch.promote_types(v.dtype, torch.float32)).requires_grad_() for v in values]
    optimizer = optimizer_type(wide, **options)

    def step():
        optimizer.step()
        with torch.no_grad():
            for w, v in zip(wide, values, strict=True):
                w.copy_(w.to(v.dtype))

    return wide, step


@every_dtype
@pytest.mark.parametrize(
    ("peer", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
        (torch.optim.Adam, {"betas": (0.0, 0.0)}),
    ],
    ids=("Adam", "Adam-options", "AdamW", "Adam-forgetful"),
)
def test_equals_torch(peer, options, dtype, device):
    values = parameters(dtype, device)
    expected, expected_step = in_float32(peer, values, **options)
    optimizer = RowAdam(values, **options)
    for step in range(20):
        set_gradients(values, step)
        set_gradients(expected, step)
        optimizer.step()
        expected_step()
    # Twenty steps in halves: now and then a sum lies on the edge between two of them.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
    for v, e in zip(values, expected, strict=True):
        torch.testing.assert_close(v.detach().to(e.dtype), e.detach(), rtol=tolerance, atol=tolerance)


def projected_step(optimizer, weight):
    """Unit rows as people write it around an optimizer."""
    with torch.no_grad():
        weight.grad -= (weight.grad * weight).sum(1, keepdim=True) * weight
        optimizer.step()
        weight.copy_(normalize(weight))


def test_unit_norm_equals_projection_and_normalisation():
    weight = normalize(torch.randn(50, 21, dtype=torch.float64)).requires_grad_()
    expected = weight.detach().clone().requires_grad_()
    ours, theirs = RowAdam([weight], lr=0.1, unit_norm=True), torch.optim.Adam([expected], lr=0.1)
    target = torch.randn(30, 21, dtype=torch.float64)
    for _ in range(20):
        for w in (weight, expected):
            w.grad = torch.autograd.grad((target @ w.T).relu().square().mean(), w)[0]
        ours.step()
        projected_step(theirs, expected)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(50, dtype=torch.float64))


@every_dtype
def test_unit_norm_holds(dtype):
    weight = normalize(torch.randn(40, 64)).to(dtype).requires_grad_()
    optimizer = RowAdam([weight], lr=0.1, unit_norm=True)
    for step in range(20):
        set_gradients([weight], step)
        optimizer.step()
    assert (weight.detach().double().norm(dim=1) - 1).abs().max() < 2 * torch.finfo(dtype).eps


def test_lazy_rows_live_their_own_lives():
    """A row ends where it would if the steps that do not touch it had never been taken, but for the step count."""
    weight = torch.randn(4, 10, dtype=torch.float64).requires_grad_()
    start = weight.detach().clone()
    optimizer = RowAdam([weight], lr=0.1, betas=(0.9, 0.99), lazy=True)
    grads = torch.randn(12, 4, 10, dtype=torch.float64)
    grads[torch.rand(12, 4) < 0.6] = 0
    grads[:, 3] = 0
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    for row in range(4):
        w, m, v = start[row].clone(), torch.zeros(10).double(), torch.zeros(10).double()
        for step, g in enumerate(grads[:, row], 1):
            if g.any():
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
                w -= 0.1 * m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight[row].detach(), w)
    assert torch.equal(weight[3], start[3])


def test_groups_have_options_of_their_own():
    dictionary, other = normalize(torch.randn(7, 5)).requires_grad_(), torch.randn(7, 5, requires_grad=True)
    lazy, frozen = torch.randn(7, requires_grad=True), torch.randn(3, requires_grad=True)
    groups = [{"params": [dictionary], "unit_norm": True}, {"params": [lazy], "lazy": True, "lr": 0.5}]
    optimizer = RowAdam([*groups, {"params": [other, frozen]}], lr=0.1)
    before = [t.detach().clone() for t in (other, lazy, frozen)]
    for t in (dictionary, other):
        t.grad = torch.ones_like(t)
    lazy.grad = torch.tensor([1.0, 0, 0, 0, 0, 0, -2.0])
    optimizer.step()
    torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(other, before[0] - 0.1)
    torch.testing.assert_close(lazy, before[1] + torch.tensor([-0.5, 0, 0, 0, 0, 0, 0.5]))
    assert torch.equal(frozen, before[2]) and frozen not in optimizer.state


@every_dtype
def test_checkpoints(dtype):
    """Training goes on to the bit after a round trip through a file; moments of halves keep their float32 digits."""
    values = parameters(dtype)
    optimizer = RowAdam([{"params": values[:2]}, {"params": values[2:], "unit_norm": True, "lr": 0.2}], lazy=True)
    for step in range(3):
        set_gradients(values, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [v.detach().clone().requires_grad_() for v in values]
    resumed = RowAdam([{"params": again[:2]}, {"params": again[2:]}])
    resumed.load_state_dict(torch.load(file))
    for trained, run in ((values, optimizer), (again, resumed), (copy.deepcopy(again), None)):
        set_gradients(trained, 3)
        if run is not None:
            run.step()
    assert all(map(torch.equal, values, again))
    for v, a in zip(values, again, strict=True):
        state, resumed_state = optimizer.state[v], resumed.state[a]
        assert state["step"] == resumed_state["step"] == 4
        for name in ("exp_avg", "exp_avg_sq"):
            assert resumed_state[name].dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(state[name], resumed_state[name])


def test_a_loaded_state_is_not_shared():
    values = parameters()
    optimizer = RowAdam(values)
    set_gradients(values, 0)
    optimizer.step()
    resumed = RowAdam([v.detach().clone().requires_grad_() for v in values])
    resumed.load_state_dict(optimizer.state_dict())
    moments = [optimizer.state[v]["exp_avg"].clone() for v in values]
    set_gradients(resumed.param_groups[0]["params"], 1)
    resumed.step()
    assert all(torch.equal(optimizer.state[v]["exp_avg"], m) for v, m in zip(values, moments, strict=True))


@pytest.mark.parametrize("way", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
@pytest.mark.parametrize("peer", [torch.optim.Adam, torch.optim.AdamW], ids=["Adam", "AdamW"])
def test_takes_over_a_run_of_torch(peer, way):
    """Its steps continue those of torch, with the moments and options of torch and rows of our own."""
    values = parameters()
    theirs = peer(values, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1 if peer is torch.optim.AdamW else 0.0, **way)
    for step in range(5):
        set_gradients(values, step)
        theirs.step()
    taken = [v.detach().clone().requires_grad_() for v in values]
    ours = RowAdam(taken, lr=9.0, lazy=True)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = ours.param_groups[0]
    assert group.keys() == RowAdam(parameters()).param_groups[0].keys()
    assert group["lr"] == 0.03 and group["betas"] == (0.8, 0.95) and group["lazy"] and not group["unit_norm"]
    for step in range(5, 10):
        for tensors, optimizer in ((values, theirs), (taken, ours)):
            set_gradients(tensors, step)
            optimizer.step()
    torch.testing.assert_close(taken, values, rtol=2e-6, atol=2e-6)
    assert not torch.allclose(ours.state[taken[1]]["exp_avg"], torch.zeros(40))


def test_takes_over_torch_s_half_moments_in_float32():
    weight = torch.randn(9, 33).bfloat16().requires_grad_()
    theirs = torch.optim.Adam([weight])
    set_gradients([weight], 0)
    theirs.step()
    ours = RowAdam([weight])
    ours.load_state_dict(theirs.state_dict())
    assert theirs.state[weight]["exp_avg"].dtype == torch.bfloat16
    for name in ("exp_avg", "exp_avg_sq"):
        assert ours.state[weight][name].dtype == torch.float32
        assert torch.equal(ours.state[weight][name], theirs.state[weight][name].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "state_dict has amsgrad=True; RowAdam has no amsgrad"),
        ({"maximize": True}, "state_dict has maximize=True"),
        ({"weight_decay": 0.1}, r"weight_decay=0\.1 as a part of the gradient.*RowAdam's is decoupled"),
    ],
)
def test_what_torch_computes_otherwise_is_refused(options, message):
    weight = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        RowAdam([weight]).load_state_dict(torch.optim.Adam([weight], **options).state_dict())


def test_closures_schedules_and_hooks():
    weight, calls = torch.ones(3, requires_grad=True), []
    optimizer = RowAdam([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(weight, torch.full((3,), 0.5))
    schedule.step()
    optimizer.step(closure)
    torch.testing.assert_close(weight, torch.full((3,), 0.45), atol=5e-3, rtol=0)
    assert calls == ["after", "after"]


def test_gradients_of_any_layout():
    weight = torch.randn(8, 6)
    grad = torch.randn(6, 8).T
    results = []
    for g in (grad, grad.contiguous(), torch.zeros(8, 12)[:, ::2].copy_(grad)):
        p = weight.clone().requires_grad_()
        p.grad = g
        RowAdam([p], unit_norm=True).step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_sparse_gradients_are_refused():
    weight = torch.randn(8, 6, requires_grad=True)
    torch.nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradient; expected a dense one: lazy=True finds the zero rows"):
        RowAdam([weight]).step()


def test_parameters_that_are_not_contiguous_are_refused():
    weight = torch.randn(6, 8).T.requires_grad_()
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="weight is not contiguous"):
        RowAdam([weight]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; expected 0 or more"),
        ({"eps": -1.0}, "eps is -1.0; expected 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected two numbers from 0 to less than 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RowAdam([torch.zeros(1, requires_grad=True)], **options)
