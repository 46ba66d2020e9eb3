"""What must hold for every op of the library, checked on every case of tests/cases/."""

from collections import defaultdict
from functools import cache

import pytest
import torch
from cases import CASES, Case, as_tuple
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import isthmus
from isthmus.nn import GaussianBottleneck  # noqa: F401  (the package imports as a whole)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Relative to the largest entry: a few roundings of the result, more for products of some dozen terms.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}

every_case = pytest.mark.parametrize("case", CASES, ids=str)
differentiable_case = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)


def assert_close(actual, expected, what=""):
    """Indices exactly, floats to the rounding of their own dtype relative to the largest expected entry."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"{what} output {i}"
        if not a.is_floating_point():
            assert torch.equal(a, e.to(a.dtype)), f"{what} output {i}"
            continue
        bound = TOLERANCE[a.dtype] * max(1.0, e.abs().max().item() if e.numel() else 0.0)
        off = torch.where(a.double() == e, 0.0, (a.double() - e).abs())  # equal infinities are 0 apart
        worst = off.max().item() if e.numel() else 0.0
        assert worst <= bound, f"{what} output {i}: off by {worst:.3g}, allowed {bound:.3g}"


def assert_identical(actual, expected, what=""):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"{what} output {i} differs by {(a.double() - e.double()).abs().max()}"


def requiring_grad(case: Case, tensors):
    return {
        k: v.clone().requires_grad_(k in case.differentiable) if v is not None else None for k, v in tensors.items()
    }


def float_outputs(outputs):
    return [o for o in outputs if o.is_floating_point()]


def outputs_and_gradients(case: Case, tensors, run):
    """Outputs of run(tensors), and the gradients of a fixed random combination of them."""
    tensors = requiring_grad(case, tensors)
    outputs = run(tensors)
    if not case.differentiable:
        return outputs, ()
    scored = [o for o in float_outputs(outputs) if o.requires_grad]
    torch.manual_seed(1)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in scored]
    grads = torch.autograd.grad(scored, [tensors[name] for name in case.differentiable], weights)
    return tuple(o.detach() for o in outputs), grads


# ---- values ----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(case, dtype, device):
    """Outputs and gradients of every dtype equal the float64 reference on the same (rounded) inputs."""
    tensors = case.tensors(dtype, device)
    outputs, grads = outputs_and_gradients(case, tensors, case.call)
    expected = [o.detach() for o in case.reference(tensors)]
    assert_close(outputs, expected)
    if not case.differentiable:
        return
    # The same combination of outputs: its weights are rounded to the dtype of each output.
    leaves = requiring_grad(case, tensors)
    wide = case.reference(leaves)
    pairs = [(o, w) for o, w in zip(outputs, wide, strict=True) if w.is_floating_point() and w.requires_grad]
    torch.manual_seed(1)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o).double() for o, _ in pairs]
    expected_grads = torch.autograd.grad([w for _, w in pairs], [leaves[name] for name in case.differentiable], weights)
    assert_close(grads, expected_grads, "gradient,")


@every_case
def test_every_isa_agrees(case, isa):
    tensors = case.tensors(torch.float32)
    found = outputs_and_gradients(case, tensors, case.call)
    isthmus.set_isa("baseline")
    expected = outputs_and_gradients(case, tensors, case.call)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e)


@every_case
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads_do_not_matter(case, dtype):
    tensors = case.tensors(dtype)
    torch.set_num_threads(1)
    expected = outputs_and_gradients(case, tensors, case.call)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        found = outputs_and_gradients(case, tensors, case.call)
        for a, e in zip(found, expected, strict=True):
            assert_identical(a, e, f"{threads} threads,")


@every_case
def test_strides_do_not_matter(case, device):
    """Transposed, strided and offset inputs give what contiguous ones give."""
    tensors = case.tensors(torch.float32, device)
    expected = outputs_and_gradients(case, tensors, case.call)

    def spread(t):
        if t is None or t.dim() == 0:
            return t
        holder = t.new_zeros([2 * n + 1 for n in t.shape])
        view = holder[tuple(slice(1, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    strided = {k: spread(v) for k, v in tensors.items()}
    found = outputs_and_gradients(case, strided, lambda t: case.call({k: spread(v) for k, v in t.items()}))
    for a, e in zip(found, expected, strict=True):
        assert_identical(a, e)


BATCHED = ("mean", "scale", "prior_mean", "prior_scale", "mask", "shape", "x", "parameters", "values", "indices")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.batched and "key" not in c.options and "shape" not in c.options], ids=str
)
def test_empty_batch(case, device):
    tensors = case.tensors(torch.float32, device)
    empty = {k: v[:0] if k in BATCHED else v for k, v in tensors.items()}
    outputs, grads = outputs_and_gradients(case, empty, case.call)
    expected, _ = outputs_and_gradients(case, empty, case.reference)
    if case.options.get("reduction") in ("mean", "dim"):
        return  # the mean of nothing is NaN in both
    assert_close(outputs, expected)
    assert all(torch.isfinite(g).all() for g in grads)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def scalar_function(case: Case):
    """case.call as a function of its differentiable tensors alone, returning its smooth outputs."""
    fixed = case.tensors(torch.float64)

    def function(*leaves):
        outputs = case.call(fixed | dict(zip(case.differentiable, leaves, strict=True)))
        return tuple(outputs[i] for i in case.smooth)

    return function, [fixed[name].requires_grad_() for name in case.differentiable]


SMOOTH = [c for c in CASES if c.differentiable and c.smooth]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradients(case):
    function, leaves = scalar_function(case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False, atol=1e-6)


# The squared error of vq_quantize holds the code constant in the encoder's gradient and the other way round, so its
# second derivatives are not those of its value; tests/ops/test_codebook.py has them.
@pytest.mark.parametrize("case", [c for c in SMOOTH if c.op is not isthmus.ops.vq_quantize], ids=str)
def test_second_derivatives(case):
    function, leaves = scalar_function(case)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-5)


# ---- citizenship: opcheck on every schema ----------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Collects the calls to the library's own schemas, backward ops included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "isthmus":
            self.calls.append((func, tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, args)))
        return func(*args, **(kwargs or {}))


@cache
def recorded_calls():
    """schema name -> [(op, arguments)], from running every case forward and backward."""
    calls = defaultdict(list)
    for case in CASES:
        with Recorder() as recorder:
            outputs_and_gradients(case, case.tensors(torch.float32), case.call)
        for func, args in recorder.calls:
            calls[func._schema.name.removeprefix("isthmus::")].append((func, args))
    return calls


SCHEMAS = sorted({n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("isthmus::")})


@pytest.mark.parametrize("schema", SCHEMAS)
def test_opcheck(schema):
    calls = recorded_calls()[schema]
    assert calls, f"no case of tests/cases/ reaches isthmus::{schema}"
    for func, args in calls[:4]:
        # What is written in place must not be a leaf that requires a gradient.
        floats = not func._schema.is_mutable and any(
            isinstance(a, torch.Tensor) and a.is_floating_point() for a in args
        )
        leaves = tree_map(
            lambda a: a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a, args
        )
        torch.library.opcheck(func, leaves if floats else args)


@pytest.mark.parametrize("schema", [s for s in SCHEMAS if not s.endswith("_")])
def test_batching(schema):
    """vmap over the first tensor argument equals a Python loop."""
    for func, args in recorded_calls()[schema][:3]:
        stack = torch.stack([args[0], args[0].flip(0)])

        def call(entry, args=args, func=func):
            return as_tuple(func(entry, *args[1:]))

        found = torch.func.vmap(call)(stack)
        expected = [torch.stack(column) for column in zip(*map(call, stack), strict=True)]
        assert_close(found, expected, schema)


@differentiable_case
def test_autocast(case):
    """Under autocast the op accepts the mixture of dtypes that a model makes."""
    tensors = case.tensors(torch.float32)
    mixed = dict(tensors)
    mixed[case.differentiable[0]] = mixed[case.differentiable[0]].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.call(mixed)
    expected = case.reference(tensors)
    for output, wide in zip(outputs, expected, strict=True):
        if output.is_floating_point():
            assert output.dtype in (torch.float32, torch.bfloat16)
            assert (output.double() - wide).abs().max() <= 0.1 * max(1.0, wide.abs().max())


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@every_case
def test_compiles_without_graph_break(case):
    torch._dynamo.reset()
    tensors = case.tensors(torch.float32)
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(case, tensors, lambda t: as_tuple(compiled(**t, **case.options)))
    expected = outputs_and_gradients(case, tensors, case.call)
    for a, e in zip(found, expected, strict=True):
        assert_identical(a, e)


def test_fresh_keys_compile():
    """Without a key each call draws its own, and torch.manual_seed repeats it, compiled or not."""
    compiled = torch.compile(isthmus.ops.gaussian_sample, fullgraph=True, backend="aot_eager")
    mean, logvar = torch.zeros(100), torch.zeros(100)
    torch.manual_seed(3)
    first, second = compiled(mean, logvar), compiled(mean, logvar)
    torch.manual_seed(3)
    assert torch.equal(first, isthmus.ops.gaussian_sample(mean, logvar))
    assert not torch.equal(first, second)
