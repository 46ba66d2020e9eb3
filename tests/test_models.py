"""The systems: shapes, errors, and that a few steps of training lower the loss."""

import doctest
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isthmus.models import VAE, VQVAE, BayesClassifier, SparseAutoencoder

SIDE = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images() -> torch.Tensor:
    """Bars at 64 positions and angles: structured, so every model has something to learn."""
    generator = torch.Generator().manual_seed(0)
    angle, offset = torch.rand(2, 128, 1, 1, generator=generator)
    line = torch.linspace(-1.0, 1.0, SIDE)
    distance = line * (3 * angle).cos() + line.unsqueeze(-1) * (3 * angle).sin() - offset + 0.5
    return torch.exp(-(distance**2) / 0.1).flatten(1)


def _binary_nll(logits, x):
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1).mean()


def _vae(images):
    model = VAE(SIDE**2, hidden=32, latent=8)

    def loss():
        logits, kl = model(images)
        return _binary_nll(logits, images) + kl.mean()

    return model, loss


def _vq_vae(images):
    model = _small_vq_vae()

    def loss():
        logits, _, commitment = model(images)
        return _binary_nll(logits, images) + commitment

    return model, loss


def _sparse(images):
    body, head = nn.Sequential(nn.Linear(SIDE**2, 32), nn.ReLU()), nn.Linear(32, 10)
    model = SparseAutoencoder(body, head, dim=32, num_features=64, k=4)
    activations = model.activations(images)
    model.bottleneck.init_from(activations)
    return model, lambda: model(activations).loss


def _bayes(images):
    model = BayesClassifier(SIDE**2, hidden=32, classes=2)
    labels = (images.mean(dim=-1) > images.mean()).long()
    return model, lambda: F.cross_entropy(model(images), labels) + model.kl() / 10_000


def _small_vq_vae():
    return VQVAE(side=SIDE, patch=4, hidden=32, num_codes=16, code_dim=4, decoder_hidden=32)


@pytest.mark.parametrize("make", [_vae, _vq_vae, _sparse, _bayes])
def test_training_lowers_the_loss(make, images):
    model, loss = make(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert value.item() < 0.8 * before


def test_vae_reconstruction_does_not_sample(images):
    model = VAE(SIDE**2, hidden=32, latent=8)
    assert torch.equal(model.reconstruct(images), model.reconstruct(images))
    assert not torch.equal(model(images).logits, model(images).logits)


def test_vq_vae_words_spell_what_forward_decodes(images):
    model = _small_vq_vae().eval()
    logits, indices, _ = model(images)
    assert torch.equal(model.encode(images), indices)
    torch.testing.assert_close(model.decode(indices), logits)


def test_vq_vae_patches_cover_the_picture(images):
    model = _small_vq_vae()
    assert model.patches(images).shape == (len(images), 16, 16)
    # The middle patch of an interior position is a window of the picture itself.
    window = images.view(-1, SIDE, SIDE)[:, 1:5, 1:5].flatten(1)
    torch.testing.assert_close(model.patches(images)[:, 5], window)


@pytest.mark.parametrize("patch", [6, 32])
def test_vq_vae_refuses_a_patch_that_does_not_fit(patch):
    with pytest.raises(ValueError, match="patch must be a multiple of 4"):
        VQVAE(side=SIDE, patch=patch, hidden=8, num_codes=8, code_dim=4, decoder_hidden=8)


def test_sparse_autoencoder_leaves_the_network_alone(images):
    model, loss = _sparse(images)
    loss().backward()
    assert all(p.grad is None for p in [*model.body.parameters(), *model.head.parameters()])
    assert model.spliced(images).shape == (len(images), 10)


def test_bayes_classifier_draws_a_new_network_for_every_prediction(images):
    model = BayesClassifier(SIDE**2, hidden=16, classes=3)
    first, second = model.predict(images, num_networks=2)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(dim=-1), torch.ones(len(images)))


@pytest.mark.parametrize("name", ["vae", "vq_vae", "sparse_autoencoder", "bayes_classifier"])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"isthmus.models.{name}"))
    assert result.attempted > 0 and result.failed == 0
