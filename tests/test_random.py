"""Keys: known answers, agreement with torch.func._random, and what wrong arguments are told."""

import doctest

import pytest
import torch

import isthmus.random
from isthmus.random import fold_in, key, philox4x32, split

needs_torch_random = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="torch.func._random runs on the CPU from torch 2.14 on"
)
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ],
)

MASK = 0xFFFFFFFF
CORNERS = [0, 1, MASK, MASK + 1, (1 << 62) - 1, (1 << 63) - 1, -(1 << 63), -1]


def philox_of_integers(seed: int, counter: int) -> tuple[int, ...]:
    """Philox4x32-10 in unbounded integers, as the paper writes it."""
    k = [seed & MASK, seed >> 32 & MASK]
    x = [counter & MASK, counter >> 32 & MASK, 0, 0]
    for _ in range(10):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [q >> 32 ^ x[1] ^ k[0], q & MASK, p >> 32 ^ x[3] ^ k[1], p & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return tuple(x)


def unsigned(keys: torch.Tensor) -> list:
    return keys.view(torch.uint64).tolist()


@devices
def test_philox_known_answers(device):
    counters = torch.tensor([0, 1], device=device)
    words = torch.stack(philox4x32(torch.tensor(0, device=device), counters), dim=-1)
    assert words.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0xF8E4CCA4, 0x5CB200DB, 0xB1A574EB, 0x097EFF67],
    ]


def test_philox_equals_integer_arithmetic_on_every_corner():
    seeds, counters = torch.tensor(CORNERS)[:, None], torch.tensor(CORNERS)
    words = torch.stack(philox4x32(seeds, counters), dim=-1)
    expected = [[list(philox_of_integers(s, c)) for c in CORNERS] for s in CORNERS]
    assert words.tolist() == expected


@pytest.mark.parametrize("seed", [0, 42, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -(1 << 63)])
def test_key_of_seed_holds_the_bits_of_the_seed(seed):
    made = key(seed)
    assert made.dtype == torch.int64 and made.shape == (2,)
    assert unsigned(made) == [seed % (1 << 64), 0]


@devices
def test_drawn_keys_follow_manual_seed_and_differ(device):
    torch.manual_seed(3)
    first = [key(device=device) for _ in range(100)]
    torch.manual_seed(3)
    second = [key(device=device) for _ in range(100)]
    assert all(map(torch.equal, first, second))
    drawn = torch.stack(first)
    assert drawn.dtype == torch.int64 and drawn.device.type == device
    assert drawn.unique().numel() == drawn.numel()
    # Both words fill 62 bits: each of those bits is set in about half of 200 draws, no other ever.
    bits = (drawn.flatten()[:, None].cpu() >> torch.arange(64)) & 1
    share = bits.double().mean(0)
    assert share[:62].min() > 0.3 and share[:62].max() < 0.7
    assert share[62:].max() == 0


@devices
def test_key_from_generator_leaves_the_default_generator_alone(device):
    state = torch.get_rng_state()
    with torch.device("meta"):  # nor does the default device matter
        made = [key(generator=torch.Generator(device).manual_seed(5)) for _ in range(2)]
    assert torch.equal(*made) and made[0].device.type == device
    assert torch.equal(torch.get_rng_state(), state)


# From torch 2.15: torch.func._random.split(torch.func._random.key(0), 3).
CHILDREN_OF_0 = [
    [0xE169C58D6627E8D5, 0x9B00DBD8BC57AC4C],
    [0x5CB200DBF8E4CCA4, 0x097EFF67B1A574EB],
    [0x51C732A604FAA329, 0x459135E4241513AD],
]


@devices
def test_split_and_fold_in_known_answers(device):
    parent = key(0, device=device)
    assert unsigned(split(parent, 3)) == CHILDREN_OF_0
    assert [unsigned(fold_in(parent, n)) for n in range(3)] == CHILDREN_OF_0
    assert unsigned(split(parent)) == CHILDREN_OF_0[:2]


@needs_torch_random
@devices
def test_key_split_and_fold_in_equal_torch(device):
    from torch.func import _random as torch_random

    ours = torch.stack(torch.meshgrid(torch.tensor(CORNERS), torch.tensor(CORNERS), indexing="ij"), dim=-1).to(device)
    theirs = ours.view(torch.uint64)
    assert torch.equal(split(ours, 5).view(torch.uint64), torch_random.split(theirs, 5))
    for n in [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]:
        assert torch.equal(fold_in(ours, n).view(torch.uint64), torch_random.fold_in(theirs, n))
    for seed in [0, 2**63, 2**64 - 1]:
        assert unsigned(key(seed)) == torch_random.key(seed).tolist()


def test_batched_keys_derive_each_key_on_its_own():
    batch = split(key(9), 6).reshape(2, 3, 2)
    assert split(batch, 4).shape == (4, 2, 3, 2)
    assert fold_in(batch, 7).shape == batch.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(split(batch, 4)[:, i, j], split(batch[i, j], 4))
            assert torch.equal(fold_in(batch, 7)[i, j], fold_in(batch[i, j], 7))
    assert split(batch[:0], 2).shape == (2, 0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_fold_in_takes_its_number_from_a_tensor(dtype, shape):
    n = torch.full(shape, 200, dtype=dtype)
    assert torch.equal(fold_in(key(1), n), fold_in(key(1), 200))


def test_keys_under_compile_and_vmap():
    def step(parent):
        return split(fold_in(parent, 3), 2), key()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = step(key(4))
    torch.manual_seed(0)
    assert all(map(torch.equal, compiled(key(4)), expected))
    parents = split(key(4), 5)
    assert torch.equal(torch.func.vmap(lambda k: fold_in(k, 2))(parents), fold_in(parents, 2))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: key(1.5), r"seed is a float; expected an int"),
        (
            lambda: key(1 << 64),
            r"seed is 18446744073709551616; expected a value in \[-2\^63, 2\^64",
        ),
        (lambda: key(1, generator=torch.Generator()), r"seed or generator, not both \(seed=1\)"),
        (
            lambda: key(device="cuda", generator=torch.Generator()),
            r"generator is on cpu; expected one on device cuda",
        ),
        (lambda: fold_in(torch.zeros(3, dtype=torch.int64), 0), r"key is a .* of shape \[3\]"),
        (lambda: fold_in(torch.zeros(2), 0), r"key is a torch.float32 .* expected torch.int64"),
        (lambda: fold_in(torch.tensor(1), 0), r"of shape \[\]; expected .* \[\.\.\., 2\]"),
        (lambda: fold_in(key(0), "a"), r"n is a str; expected an int"),
        (lambda: fold_in(key(0), -(1 << 63) - 1), r"n is -9223372036854775809; expected"),
        (lambda: fold_in(key(0), torch.arange(2)), r"of shape \[2\]; expected one integer"),
        (lambda: fold_in(key(0), torch.tensor(1.0)), r"n is a torch.float32 tensor"),
        (lambda: split(key(0), 0), r"n is 0; expected at least 1"),
        (lambda: split(key(0).view(torch.uint64)), r"torch.uint64 .* key.view\(torch.int64\)"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_docstring_examples():
    failed, attempted = doctest.testmod(isthmus.random)
    assert attempted > 0 and failed == 0
