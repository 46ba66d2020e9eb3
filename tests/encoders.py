"""Problems for tests of sparse encoders, and what they compare."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(rows, dim, features, dtype=torch.float32, device="cpu"):
    """x, weight and bias."""
    sizes = (rows, dim), (features, dim), (features,)
    return tuple(torch.randn(size, dtype=torch.float64).to(device, dtype) for size in sizes)


def whole_numbers(rows, dim, features, device="cpu"):
    """The same with small integers: every order of summation is exact, and ties are everywhere."""
    sizes = (rows, dim), (features, dim), (features,)
    return tuple(torch.randint(-2, 3, size).float().to(device) for size in sizes)


def assert_same(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)
