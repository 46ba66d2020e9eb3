import math

import pytest
import torch

from isthmus import objectives

ONE, ZERO = torch.tensor(1.0).double(), torch.tensor(0.0).double()


def test_match_probability_is_the_mean_over_all_pairs_of_samples():
    z, other = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    same = torch.tensor([True, False, True])
    slope, offset = 1.5 * ONE, 0.7 * ONE
    nll = objectives.hedged_match_nll(z, other, same, slope=slope, offset=offset)
    for pair in range(3):
        chances = [torch.sigmoid(offset - slope * (a[pair] - b[pair]).norm()) for a in z for b in other]
        p = sum(chances) / 20
        torch.testing.assert_close(nll[pair], -(p if same[pair] else 1 - p).log())


def test_certain_answers_keep_their_digits():
    z = torch.zeros(2, 2, 1, dtype=torch.float64)
    same = torch.tensor([True, False])
    nll = objectives.hedged_match_nll(z, z, same, slope=ONE, offset=60 * ONE)
    assert nll[0].item() == pytest.approx(math.exp(-60.0))
    assert nll[1].item() == pytest.approx(60.0)


def test_matching_pulls_together_and_mismatching_pushes_apart():
    z = torch.zeros(1, 2, 1, dtype=torch.float64, requires_grad=True)
    other = torch.ones(1, 2, 1, dtype=torch.float64)
    objectives.hedged_match_nll(z, other, torch.tensor([True, False]), slope=ONE, offset=ZERO).sum().backward()
    towards, away = z.grad.flatten()
    assert towards < 0 < away


def test_bad_shapes_are_named():
    z = torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"\[4, 3, 2\], \[4, 2, 2\] and \[3\]"):
        objectives.hedged_match_nll(z, z[:, :2], torch.ones(3).bool(), slope=ONE, offset=ZERO)
