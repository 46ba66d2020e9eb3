"""Training finds the dictionary that made the data."""

import pytest
import torch

from isthmus import nn, objectives

DIM, TRUE, ACTIVE = 24, 48, 3
ROWS, STEPS = 512, 400


def sample(directions, rows):
    """Rows that are sums of a few true features with weights in [0.5, 1.5], and little noise."""
    chosen = torch.rand(rows, TRUE).argsort(dim=-1)[:, :ACTIVE]
    weights = torch.zeros(rows, TRUE).scatter(1, chosen, 0.5 + torch.rand(rows, ACTIVE))
    return weights @ directions + 0.01 * torch.randn(rows, DIM) + 2.0


MODELS = {
    "topk": lambda: nn.TopKSAE(DIM, 2 * TRUE, ACTIVE, dead_after=5 * ROWS),
    "multi": lambda: nn.TopKSAE(DIM, 2 * TRUE, ACTIVE, multi_k=4 * ACTIVE, dead_after=5 * ROWS),
    "batch": lambda: nn.BatchTopKSAE(DIM, 2 * TRUE, ACTIVE, dead_after=5 * ROWS),
    "matryoshka": lambda: nn.MatryoshkaSAE(DIM, (TRUE, 2 * TRUE), ACTIVE, dead_after=5 * ROWS),
    "relu": lambda: nn.ReLUSAE(DIM, 2 * TRUE, sparsity_weight=0.05),
    "jumprelu": lambda: nn.JumpReLUSAE(DIM, 2 * TRUE, target_l0=ACTIVE),
    "gated": lambda: nn.GatedSAE(DIM, 2 * TRUE, sparsity_weight=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_recovers_the_dictionary(name):
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, DIM), dim=-1)
    sae = MODELS[name]()
    sae.init_from(sample(directions, 1024))
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-3, betas=(0.9, 0.99))
    if name != "relu":
        sae.keep_unit_norm(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sae(sample(directions, ROWS)).loss.backward()
        optimizer.step()
    x = sample(directions, 1024)
    out = sae.eval()(x)
    assert nn.match_features(directions, sae.decoder_weight).cosine.mean() > 0.9
    error = (x - out.reconstruction).square().sum(-1)
    assert objectives.fraction_of_variance_explained(error, x) > 0.85
