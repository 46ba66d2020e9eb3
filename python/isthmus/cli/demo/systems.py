"""The four systems of the demo: what is built, what it learns, how it is judged."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from isthmus.cli.demo.digits import CLASSES, PIXELS, SIDE, Digits, nll
from isthmus.models import VAE, VQVAE, BayesClassifier, SparseAutoencoder
from isthmus.nn import BayesLinear


@dataclass(frozen=True)
class Part:
    """A bottleneck cut out of its model, with one input to run it on."""

    module: nn.Module
    given: Tensor
    run: Callable[[Tensor], tuple[Tensor, ...]]


class System(ABC):
    """One model, its loss and its score; the same for both sides of the comparison."""

    name: str
    score_name: str
    unit: str
    steps: int
    batch_size: int
    learning_rate: float

    def __init__(self, digits: Digits) -> None:
        self.digits = digits

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh model from torch's global generator, on Isthmus ops."""

    def optimizer(self, model: Any) -> Optimizer:
        return Adam(model.parameters(), lr=self.learning_rate, fused=True)

    @abstractmethod
    def loss(self, model: Any, rows: Tensor) -> Tensor:
        """Training loss of the training examples ``rows``."""

    @abstractmethod
    def score(self, model: Any) -> float:
        """Quality on the held-out digits; lower is better."""

    @abstractmethod
    def parts(self, model: Any, rows: Tensor) -> Iterator[Part]:
        """The bottlenecks, copied out of the model so that running one leaves no trace."""


class VAESystem(System):
    name = "VAE"
    score_name = "negative ELBO"
    unit = "nats"
    steps = 700
    batch_size = 512
    learning_rate = 5e-3

    def build(self) -> VAE:
        return VAE(PIXELS, hidden=128, latent=64)

    def loss(self, model: VAE, rows: Tensor) -> Tensor:
        images = self.digits.train[rows]
        logits, kl = model(images)
        return (nll(logits, images) + kl).mean()

    @torch.no_grad()
    def score(self, model: VAE) -> float:
        images = self.digits.test.repeat(8, 1)
        logits, kl = model(images)
        return (nll(logits, images) + kl).mean().item()

    def parts(self, model: VAE, rows: Tensor) -> Iterator[Part]:
        # The projection is an ordinary linear layer: the part of interest starts behind it.
        given = model.bottleneck.projection(model.encoder(self.digits.train[rows]))
        module = copy.deepcopy(model.bottleneck)
        setattr(module, "projection", nn.Identity())  # noqa: B010
        yield Part(module, given, lambda x: module(x)[:2])


class VQVAESystem(System):
    name = "VQ-VAE"
    score_name = "reconstruction NLL"
    unit = "nats"
    steps = 450
    batch_size = 256
    learning_rate = 3e-3

    def build(self) -> VQVAE:
        model = VQVAE(side=SIDE, patch=4, hidden=64, num_codes=512, code_dim=8, decoder_hidden=256)
        with torch.no_grad():
            model.bottleneck.init_from(model.embed(self.digits.train))
        return model

    def loss(self, model: VQVAE, rows: Tensor) -> Tensor:
        images = self.digits.train[rows]
        logits, _, loss = model(images)
        return nll(logits, images).mean() + loss

    @torch.no_grad()
    def score(self, model: VQVAE) -> float:
        model.eval()
        logits = model(self.digits.test).logits
        model.train()
        return nll(logits, self.digits.test).mean().item()

    def parts(self, model: VQVAE, rows: Tensor) -> Iterator[Part]:
        module = copy.deepcopy(model.bottleneck)

        def run(x: Tensor) -> tuple[Tensor, ...]:
            quantized, _, loss = module(x)
            return quantized, loss

        yield Part(module, model.embed(self.digits.train[rows]), run)


class SparseSystem(System):
    name = "TopK SAE"
    score_name = "unexplained"
    unit = "%"
    steps = 250
    batch_size = 256
    learning_rate = 2e-3

    width = 256

    def __init__(self, digits: Digits) -> None:
        super().__init__(digits)
        self.body, self.head = _train_classifier(digits, self.width)
        with torch.no_grad():
            self.train, self.test = self.body(digits.train), self.body(digits.test)

    def build(self) -> SparseAutoencoder:
        model = SparseAutoencoder(
            self.body, self.head, dim=self.width, num_features=1024, k=16, aux_k=32, dead_after=10_000
        )
        model.bottleneck.init_from(self.train)
        return model

    def optimizer(self, model: SparseAutoencoder) -> Optimizer:
        optimizer = super().optimizer(model.bottleneck)
        model.bottleneck.keep_unit_norm(optimizer)
        return optimizer

    def loss(self, model: SparseAutoencoder, rows: Tensor) -> Tensor:
        return model(self.train[rows]).loss

    @torch.no_grad()
    def score(self, model: SparseAutoencoder) -> float:
        model.eval()
        loss = model(self.test).loss
        model.train()
        return 100.0 * loss.item()

    def parts(self, model: SparseAutoencoder, rows: Tensor) -> Iterator[Part]:
        module = copy.deepcopy(model.bottleneck)
        yield Part(module, self.train[rows], lambda x: (module(x).loss,))


class BayesSystem(System):
    name = "Bayesian classifier"
    score_name = "predictive NLL"
    unit = "nats"
    steps = 500
    batch_size = 128
    learning_rate = 3e-3

    # The full bound asks a prior over 180 000 weights to be answered by 1437 digits, and the fit
    # suffers. A cold posterior is the usual remedy.
    temperature = 0.1
    networks = 32

    def build(self) -> BayesClassifier:
        return BayesClassifier(PIXELS, hidden=384, classes=CLASSES, prior_std=0.15, init_std=0.05)

    def loss(self, model: BayesClassifier, rows: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(model(self.digits.train[rows]), self.digits.train_labels[rows])
        return cross_entropy + self.temperature / len(self.digits.train) * model.kl()

    def score(self, model: BayesClassifier) -> float:
        return F.nll_loss(self.predict(model).log(), self.digits.test_labels).item()

    def predict(self, model: BayesClassifier) -> Tensor:
        """Predictive probabilities of the held-out digits."""
        return model.predict(self.digits.test, self.networks).mean(dim=0)

    def parts(self, model: BayesClassifier, rows: Tensor) -> Iterator[Part]:
        given = self.digits.train[rows]
        for layer in copy.deepcopy([model.first, model.second, model.last]):

            def run(x: Tensor, layer: BayesLinear = layer) -> tuple[Tensor, ...]:
                return layer(x), layer.kl()

            yield Part(layer, given, run)
            given = layer(given).relu()


SYSTEMS: tuple[type[System], ...] = (VAESystem, VQVAESystem, SparseSystem, BayesSystem)


def _train_classifier(digits: Digits, width: int) -> tuple[nn.Module, nn.Module]:
    """A small network to look into: its body up to the second hidden layer, and its head."""
    body = nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    head = nn.Linear(width, CLASSES)
    optimizer = Adam([*body.parameters(), *head.parameters()], lr=1e-3, fused=True)
    for _ in range(200):
        rows = torch.randint(len(digits.train), (256,))
        loss = F.cross_entropy(head(body(digits.train[rows])), digits.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return body, head
