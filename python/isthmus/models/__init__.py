"""Whole systems built on :mod:`isthmus.nn`, one small file each."""

from .bayes_classifier import BayesClassifier
from .sparse_autoencoder import SparseAutoencoder
from .vae import VAE, VAEOutput
from .vq_vae import VQVAE, VQVAEOutput

__all__ = [
    "VAE",
    "VQVAE",
    "BayesClassifier",
    "SparseAutoencoder",
    "VAEOutput",
    "VQVAEOutput",
]
