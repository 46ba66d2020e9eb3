"""The data: scikit-learn's bundled handwritten digits, 1797 pictures of 8 × 8 pixels."""

import math
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
# A pixel counts the inked points of a 4 × 4 block of the scan, so it is a whole number from 0 to 16.
LEVELS = 16
TEST_SIZE = 360

# log of how many ways k of a block's points can be inked
_LOG_WAYS = torch.tensor([math.log(math.comb(LEVELS, k)) for k in range(LEVELS + 1)])


@dataclass(frozen=True)
class Digits:
    """Images [N, 64] scaled to 0..1 and labels [N], split once for all systems and seeds."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Digits:
    bundle = load_digits()
    # The file is ordered by writer; a fixed shuffle puts every hand on both sides of the split.
    order = torch.randperm(len(bundle.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bundle.data).float()[order] / LEVELS
    labels = torch.from_numpy(bundle.target).long()[order]
    train, test = slice(TEST_SIZE, None), slice(TEST_SIZE)
    return Digits(images[train], labels[train], images[test], labels[test])


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turn images [N, 64] anticlockwise about their centre, with bilinear interpolation."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = angle.cos().item(), angle.sin().item()
    pictures = images.view(-1, 1, SIDE, SIDE)
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False).view(-1, PIXELS)


def nll(logits: Tensor, images: Tensor) -> Tensor:
    """Negative log-likelihood of each image [N], in nats: every pixel is Binomial(16, p)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
    ways = _LOG_WAYS[(images * LEVELS).long()]
    return (LEVELS * cross_entropy - ways).sum(dim=-1)
