"""What is particular to the modules of quantizers without a codebook table."""

import math
import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import isthmus
from isthmus import nn, ops

QUANTIZERS = {
    "fsq": lambda **options: nn.FSQ((8, 5, 4), **options),
    "fsq-symmetric": lambda **options: nn.FSQ((8, 5, 4), preserve_symmetry=True, bound_hard_clamp=True, **options),
    "lfq": lambda **options: nn.LFQ(2**6, codebook_scale=0.5, **options),
    "bsq": lambda **options: nn.LFQ(2**6, spherical=True, batch_entropy="factorized", **options),
    "latent": lambda **options: nn.LatentQuantizer((8, 5, 4), **options),
    "binary": lambda **options: nn.BinaryMapper(6, **options),
}

every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


@every_quantizer
@pytest.mark.parametrize("num_codebooks", [1, 3])
@pytest.mark.parametrize("shape", [(7,), (2, 9), (2, 5, 6), (2, 3, 4, 5)])
def test_any_layout_gives_the_same_codes(make, num_codebooks, shape):
    """Vectors alone, sequences, images and video; the index dimension of codebooks; decoding gives what came out."""
    quantizer = make(dim=16, num_codebooks=num_codebooks).eval()
    x, key = torch.randn(*shape, 16), isthmus.key(0)
    extra = {"key": key} if isinstance(quantizer, nn.BinaryMapper) else {}
    quantized, indices, loss, *_ = quantizer(x, **extra)
    assert quantized.shape == x.shape and loss.shape == ()
    assert indices.shape == (*shape, num_codebooks)[: len(shape) + (num_codebooks > 1)]
    assert indices.min() >= 0 and indices.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(indices), quantized)
    if not extra:
        assert torch.equal(quantizer.encode(x), indices)
    if len(shape) > 1:
        quantizer.layout.channel_first = True
        image = quantizer(x.movedim(-1, 1), **extra)
        torch.testing.assert_close(image.quantized.movedim(1, -1), quantized)
        assert torch.equal(image.indices, indices)
        torch.testing.assert_close(quantizer.decode(indices), image.quantized)


@every_quantizer
def test_options_of_the_layout(make):
    """A dimension of one codebook, projections without bias, and a rotation that leaves quantization where it was."""
    quantizer = make(dim=16, keep_num_codebooks_dim=True, projection_has_bias=False, orthogonal_rotation=True).eval()
    x, key = torch.randn(2, 5, 16), isthmus.key(0)
    extra = {"key": key} if isinstance(quantizer, nn.BinaryMapper) else {}
    out = quantizer(x, **extra)
    assert out.indices.shape == (2, 5, 1)
    assert quantizer.get_codes(out.indices).shape == (2, 5, 1, quantizer.codebook_dim)
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    assert set(quantizer.state_dict()) - {"codebooks"} == {
        "rotation",
        "layout.project_in.weight",
        "layout.project_out.weight",
    }
    identity = torch.eye(quantizer.codebook_dim)
    torch.testing.assert_close(quantizer.rotation @ quantizer.rotation.T, identity)
    # The rotation as part of the projections.
    plain = make(dim=16, projection_has_bias=False).eval()
    plain.load_state_dict(quantizer.state_dict(), strict=False)
    with torch.no_grad():
        plain.layout.project_in.weight.copy_(quantizer.rotation.T @ quantizer.layout.project_in.weight)
        plain.layout.project_out.weight.copy_(quantizer.layout.project_out.weight @ quantizer.rotation)
    torch.testing.assert_close(plain(x, **extra).quantized, out.quantized)


@pytest.mark.parametrize("make", [QUANTIZERS[name] for name in ("fsq", "fsq-symmetric", "lfq", "bsq")])
def test_codes_know_their_indices(make):
    quantizer = make()
    indices = torch.arange(quantizer.codebook_size)
    assert torch.equal(quantizer.get_indices(quantizer.get_codes(indices)), indices)


def test_levels_of_an_index():
    quantizer = nn.FSQ((8, 5, 4))
    digits = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(8)).flip(-1)
    assert torch.equal(quantizer.get_level_indices(torch.arange(160)), digits)
    assert quantizer.get_level_indices(torch.tensor([-1])).tolist() == [[-1, -1, -1]]


@every_quantizer
def test_padding_changes_nothing(make):
    quantizer = make(dim=16, num_codebooks=2)
    x, mask = torch.randn(4, 10, 16), torch.rand(4, 10) < 0.6
    x[~mask] = 1e3
    found = quantizer(x, mask)
    if isinstance(quantizer, nn.BinaryMapper):
        assert found.loss.isfinite() and (found.indices[~mask] == -1).all() and not found.quantized[~mask].any()
        return
    expected = quantizer(x[mask])
    assert (found.indices[~mask] == -1).all() and not found.quantized[~mask].any()
    assert torch.equal(found.indices[mask], expected.indices)
    for f, e in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(f, e)
    if found.loss.requires_grad:
        parameters = list(quantizer.parameters())
        grads = (torch.autograd.grad(out.loss, parameters, allow_unused=True) for out in (found, expected))
        for g, e in zip(*grads, strict=True):
            torch.testing.assert_close(g, e)


@every_quantizer
def test_half_inputs_are_quantized_in_float32(make):
    quantizer = make(dim=16)
    x = torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(x).quantized
    assert codes.dtype == torch.float32
    for module, half in ((quantizer, x.bfloat16()), (make(dim=16).bfloat16(), x.bfloat16())):
        out = module(half)
        assert out.quantized.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
        assert out.indices.unique().numel() > 10
    assert quantizer.double()(x.double()).quantized.dtype == torch.float64


def test_lfq_loss_is_the_formula():
    quantizer = nn.LFQ(2**5, num_codebooks=2, commitment_loss_weight=0.3, diversity_gamma=0.7, entropy_loss_weight=0.2)
    x = torch.randn(30, 10)
    out = quantizer(x, inv_temperature=1.5)
    codes = ops.lfq_decode(torch.arange(32), 5)
    vectors = x.view(30, 2, 5)
    p = (-1.5 * torch.cdist(vectors, codes).square()).softmax(-1)
    sample, batch = torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum(-1).mean()
    commitment = (vectors - vectors.sign()).square().mean()
    torch.testing.assert_close(out[3:], (sample, batch, commitment))
    torch.testing.assert_close(out.loss, 0.2 * (sample - 0.7 * batch) + 0.3 * commitment)


@pytest.mark.parametrize(
    "make", [lambda: nn.LFQ(2**5), lambda: nn.LFQ(2**5, spherical=True), lambda: nn.ResidualLFQ(2**5, num_quantizers=3)]
)
def test_annealing_by_a_tensor_compiles_once(make):
    quantizer, x = make(), torch.randn(40, 5, requires_grad=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    for value in (1.0, 2.0, 5.0):
        losses = compiled(x, inv_temperature=torch.tensor(value)).loss, quantizer(x, inv_temperature=value).loss
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))
    assert counter.frame_count == 1


def test_entropy_loss_spreads_codes():
    """Signs of vectors that all lie in one corner leave it."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(8, 6)
    torch.nn.init.constant_(encoder.bias, 3.0)
    quantizer, x = nn.LFQ(2**6), torch.randn(512, 8)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    before = quantizer(encoder(x)).indices.unique().numel()
    for _ in range(150):
        optimizer.zero_grad()
        quantizer(encoder(x), inv_temperature=1.0).loss.backward()
        optimizer.step()
    assert before <= 2 and quantizer(encoder(x)).indices.unique().numel() >= 48


def test_latent_values_move_to_the_data():
    torch.manual_seed(0)
    quantizer = nn.LatentQuantizer((3, 3), quantization_loss_weight=1.0, commitment_loss_weight=0.0)
    centres = torch.tensor([[-0.8, 0.1, 0.7], [-0.3, 0.2, 0.9]])
    choice = torch.randint(0, 3, (600, 2))
    x = torch.stack([centres[d][choice[:, d]] for d in range(2)], dim=-1) + 0.01 * torch.randn(600, 2)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(x).loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantizer.codebooks.detach().view(2, 3), centres, rtol=0, atol=5e-3)
    assert quantizer(x).loss < 2e-4


def test_free_bits_of_the_binary_mapper():
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, -9.0, 0.0], [9.0, -9.0, 9.0]])
    losses = [nn.BinaryMapper(3)(row.unsqueeze(0)).loss.item() for row in logits]
    assert losses == pytest.approx([0.0, math.log(2), 2 * math.log(2)], abs=5e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LFQ(), "codebook_size and dim are both None"),
        (lambda: nn.LFQ(100), "power of two"),
        (lambda: nn.LFQ(2**30), "factorized"),
        (lambda: nn.LFQ(8, batch_entropy="mean"), "batch_entropy is 'mean'"),
        (lambda: nn.LatentQuantizer((3,), quantization_loss_weight=0.0), "quantization_loss_weight is 0"),
        (lambda: nn.FSQ((3, 3), num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim is False"),
        (lambda: nn.FSQ((3, 3))(torch.zeros(4, 3)), "expected \\[..., 2\\]"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- two processes ---------------------------------------------------------------------------------------------------

RANKS, ROWS = 2, 20
LOSSES = {
    "exact": {"batch_entropy": "exact"},
    "factorized": {"batch_entropy": "factorized", "spherical": True},
    "codebooks": {"batch_entropy": "exact", "num_codebooks": 2},
}


def trained(options, rank=None, compiled=False):
    """Parameters after a few steps on the loss alone, and its last values; all rows, or those of one rank."""
    torch.manual_seed(0)
    size = 4 * options.get("num_codebooks", 1)
    model = torch.nn.Sequential(torch.nn.Linear(6, size), nn.LFQ(2**4, commitment_loss_weight=0.5, **options)).double()
    batches, mask = torch.randn(4, RANKS * ROWS, 6).double(), torch.arange(RANKS * ROWS) < 29
    mine = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    linear = model[0] if rank is None else DistributedDataParallel(model[0])
    quantizer = torch.compile(model[1], fullgraph=True, backend="aot_eager") if compiled else model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        out = quantizer(linear(batch[mine]), mask[mine], inv_temperature=0.5)
        out.loss.backward()
        optimizer.step()
    return {**model.state_dict(), **{name: getattr(out, name).detach() for name in LFQ_VALUES}}


LFQ_VALUES = ("loss", "sample_entropy", "batch_entropy", "commitment")


def work(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    runs = [(name, compiled) for name in LOSSES for compiled in (False, True)]
    torch.save({run: trained(LOSSES[run[0]], rank, run[1]) for run in runs}, f"{folder}/{rank}.pt")
    # Not by tearing down: gloo's threads now and then abort a process whose work is done and saved.
    dist.barrier()
    os._exit(0)


def test_two_processes_have_the_entropy_of_the_joint_batch(tmp_path):
    """Masked unevenly: 20 vectors count on one rank, 9 on the other. Eager, and compiled without a graph break."""
    multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    alone = {name: trained(options) for name, options in LOSSES.items()}
    for name, compiled in ranks[0]:
        for key, expected in alone[name].items():
            found = [rank[name, compiled][key] for rank in ranks]
            if key in LFQ_VALUES and key != "batch_entropy":
                found = [sum(found) / RANKS]
            for value in found:
                torch.testing.assert_close(value, expected)
