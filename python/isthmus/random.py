"""Keys: sixteen bytes from which any amount of noise can be made, and made again.

A key is an int64 tensor ``(seed, offset)``, both read as unsigned 64-bit numbers. It names one
stream of Philox4x32-10 words (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011): block ``b`` of four words is a function of ``seed`` and the counter ``offset + b`` alone.
Ops keep the key instead of the noise and draw the same noise again in backward.

``fold_in`` and ``split`` agree bit for bit with those of ``torch.func._random`` (torch 2.14 and
later), whose keys are the same bits under dtype uint64: ``key.view(torch.uint64)``.
"""

import torch
from torch import Tensor

__all__ = ["fold_in", "key", "philox4x32", "split"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Seed and offset are drawn below 2^62. An offset then stays below 2^63 after skipping the blocks
# of any tensor that can exist, so not even signed arithmetic can overflow; and 124 random bits
# make two keys with overlapping streams a matter of equal seeds *and* neighbouring offsets.
_DRAW_LIMIT = 1 << 62


def key(
    seed: int | None = None,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make a key: from ``seed``, or drawn from a torch generator.

    Args:
        seed: any integer in [-2^63, 2^64); the key is then ``(seed, 0)``, as in
            ``torch.func._random.key``. ``None`` draws seed and offset with one ``torch.randint``,
            so ``torch.manual_seed``, CUDA graphs and checkpointing govern them as they govern
            every other draw, and the host never waits for the device.
        device: where the key lives. Default: the generator's device, else torch's default.
        generator: draw from this generator instead of the default one of the device. torch.compile
            takes no generators: in a compiled function draw from the default one, or pass a key in.

    Returns:
        int64 tensor of shape [2].

    Raises:
        ValueError: ``seed`` is not an integer or out of range, ``seed`` and ``generator`` are both
            given, or ``generator`` is not of type ``device``.

    Example:
        >>> key(7)
        tensor([7, 0])
        >>> generator = torch.Generator().manual_seed(0)
        >>> key(generator=generator).shape
        torch.Size([2])
    """
    if generator is not None:
        if seed is not None:
            raise ValueError(f"key: give seed or generator, not both (seed={seed})")
        device = _device_of(generator, device)
    if seed is None:
        return torch.randint(0, _DRAW_LIMIT, (2,), dtype=torch.int64, device=device, generator=generator)
    # Filling on the device needs no copy from the host, so this also works in a CUDA graph.
    made = torch.zeros(2, dtype=torch.int64, device=device)
    made[0].fill_(_as_int64("key: seed", seed))
    return made


def fold_in(key: Tensor, n: int | Tensor) -> Tensor:
    """Derive the ``n``-th child of a key: one independent key per layer, step or rank.

    Equals ``split(key, m)[n]`` for every ``m > n``. The child is block ``n`` of the parent's own
    stream, so a key should either be split or be spent on noise, not both. About 120 small tensor
    operations, whatever the batch: one ``split`` is cheaper than many ``fold_in``.

    Args:
        key: int64, shape [..., 2]; each key of a batch is folded on its own.
        n: integer in [-2^63, 2^64), read modulo 2^64; or an integer tensor with one value, which
            a captured CUDA graph reads anew at each replay.

    Returns:
        int64 tensor of the shape of ``key``.

    Raises:
        ValueError: wrong dtype or shape of ``key``, or an ``n`` that is not one integer.

    Example:
        >>> torch.equal(fold_in(key(7), 1), split(key(7), 3)[1])
        True
    """
    _check_key("fold_in", key)
    if not isinstance(n, Tensor):
        return _children(key, _as_int64("fold_in: n", n))
    if n.numel() != 1 or n.is_floating_point() or n.is_complex() or n.dtype == torch.bool:
        raise ValueError(f"fold_in: n is a {n.dtype} tensor of shape {list(n.shape)}; expected one integer")
    return _children(key, n.reshape(()).to(torch.int64))


def split(key: Tensor, n: int = 2) -> Tensor:
    """Derive ``n`` independent keys from one.

    Args:
        key: int64, shape [..., 2]; each key of a batch is split on its own.
        n: number of keys, at least 1.

    Returns:
        int64 tensor of shape [n, ..., 2].

    Raises:
        ValueError: wrong dtype or shape of ``key``, or ``n`` below 1.

    Example:
        >>> weight_key, bias_key = split(key(7))
        >>> split(split(key(7)), 3).shape
        torch.Size([3, 2, 2])
    """
    _check_key("split", key)
    if n < 1:
        raise ValueError(f"split: n is {n}; expected at least 1")
    numbers = torch.arange(n, device=key.device)
    return _children(key, numbers.reshape(n, *[1] * (key.dim() - 1)))


def philox4x32(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each block of a Philox4x32-10 stream.

    The cipher's key words are the low and high half of ``seed``; its counter words are the low
    and high half of ``counter``, then two zeros.

    Args:
        seed: int64, read as unsigned.
        counter: int64, read as unsigned; broadcasts against ``seed``.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Example:
        >>> words = philox4x32(torch.tensor(0), torch.tensor(0))
        >>> " ".join(f"{int(word):08x}" for word in words)
        '6627e8d5 e169c58d bc57ac4c 9b00dbd8'
    """
    # Only the low half of each variable below means anything; the high half is masked off where
    # it would matter, before a multiplication. A wrapped int64 product has the right 64 bits.
    k0, k1 = seed, seed >> 32
    x0, x1 = counter & _WORD, counter >> 32
    x2 = x3 = torch.zeros_like(x0)
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = ((p1 >> 32) ^ x1 ^ k0) & _WORD, p1
        x2, x3 = ((p0 >> 32) ^ x3 ^ k1) & _WORD, p0
        k0, k1 = k0 + _WEYL_STEPS[0], k1 + _WEYL_STEPS[1]
    return x0, x1 & _WORD, x2, x3 & _WORD


def _children(key: Tensor, numbers: int | Tensor) -> Tensor:
    w0, w1, w2, w3 = philox4x32(key[..., 0], key[..., 1] + numbers)
    return torch.stack((w0 | w1 << 32, w2 | w3 << 32), dim=-1)


def _as_int64(name: str, value: int) -> int:
    """The int64 with the 64 bits of ``value``."""
    if not isinstance(value, int):
        raise ValueError(f"{name} is a {type(value).__name__}; expected an int")
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name} is {value}; expected a value in [-2^63, 2^64)")
    return value - (1 << 64) if value >= 1 << 63 else value


def _check_key(caller: str, key: Tensor) -> None:
    if key.dtype != torch.int64 or key.dim() == 0 or key.shape[-1] != 2:
        raise ValueError(
            f"{caller}: key is a {key.dtype} tensor of shape {list(key.shape)}; expected "
            "torch.int64 of shape [..., 2] (pass a torch.func._random key as "
            "key.view(torch.int64))"
        )


def _device_of(generator: torch.Generator, device: torch.device | str | None) -> torch.device | str:
    if device is None:
        return generator.device
    if torch.device(device).type != generator.device.type:
        raise ValueError(f"key: generator is on {generator.device}; expected one on device {device}")
    return device
