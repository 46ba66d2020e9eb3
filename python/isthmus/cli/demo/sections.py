"""What the report shows of each system, and what there is to see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.cli.demo import pictures
from isthmus.cli.demo.digits import Digits
from isthmus.cli.demo.train import Outcome

SHOWN = 16
PRIOR_DRAWS = 60


@dataclass(frozen=True)
class Picture:
    title: str
    draw: pictures.Draw
    see: str


@dataclass(frozen=True)
class Section:
    title: str
    lead: str
    pictures: Sequence[Picture]


def sections(outcomes: Sequence[Outcome], digits: Digits) -> list[Section]:
    """One section for each system, in the order of the table."""
    vae, vq_vae, sparse, bayes = outcomes
    with torch.no_grad():
        return [
            _vae(vae, digits),
            _vq_vae(vq_vae, digits),
            _sparse(sparse, digits),
            _bayes(bayes, digits),
        ]


def _vae(outcome: Outcome, digits: Digits) -> Section:
    images = digits.test[:SHOWN]
    rebuilt = _per_side(outcome, lambda model: model.reconstruct(images).sigmoid())
    latents = torch.randn(PRIOR_DRAWS, _model(outcome).latent)
    drawn = _per_side(outcome, lambda model: model.decode(latents).sigmoid())
    return Section(
        "Variational autoencoder",
        "A Gaussian over 64 latent numbers is sampled between encoder and decoder. One op draws "
        "the sample and its KL divergence together; backward makes the noise again from a "
        "16-byte key.",
        [
            Picture(
                "Reconstructions",
                pictures.reconstructions(outcome, images, rebuilt),
                "Both sides keep the hand of the writer, not only the digit, and blur the same strokes.",
            ),
            Picture(
                "Samples from the prior",
                pictures.samples(outcome, drawn),
                "Sixty draws from N(0, 1), decoded by each side: many read as a digit, the rest fall between two.",
            ),
        ],
    )


def _vq_vae(outcome: Outcome, digits: Digits) -> Section:
    images = digits.test[:SHOWN]
    rebuilt = _per_side(outcome, lambda model: model.decode(model.encode(images)).sigmoid())
    return Section(
        "Vector-quantized autoencoder",
        "Each digit becomes sixteen words of a vocabulary of 512, one for every overlapping "
        "4 × 4 patch. The nearest code is found without ever storing a distance.",
        [
            Picture(
                "Reconstructions",
                pictures.reconstructions(outcome, images, rebuilt),
                "Sixteen code numbers are enough to spell a digit almost pixel by pixel.",
            ),
            Picture(
                "Code usage",
                pictures.code_usage(outcome, torch.cat([digits.train, digits.test])),
                "Left, the mean patch behind each of the most used codes: blank paper first, then "
                "edges, ends and bends of strokes; right, how evenly the vocabulary is used, equally so "
                "on both sides.",
            ),
        ],
    )


def _sparse(outcome: Outcome, digits: Digits) -> Section:
    model = _model(outcome).eval()
    labels = digits.test_labels
    whole = _percent(model.head(model.activations(digits.test)), labels)
    spliced = _percent(model.spliced(digits.test), labels)
    model.train()
    return Section(
        "TopK sparse autoencoder",
        "A small classifier is trained first; 1024 sparse features then explain its 256 hidden "
        "activations, 16 at a time. Neither the full feature matrix nor its gradient is ever "
        f"formed. The classifier is right on {whole} of the held-out digits, and on {spliced} "
        "when it must read its own thoughts through the dictionary.",
        [
            Picture(
                "Top-activating digits of single features",
                pictures.features(outcome, digits),
                "For every class the two features that favour it most, each with the ten digits "
                "that excite it most: features split a class by handwriting, one for each way "
                "of drawing it.",
            ),
        ],
    )


def _bayes(outcome: Outcome, digits: Digits) -> Section:
    system: Any = outcome.system
    right = _percent(system.predict(_model(outcome)), digits.test_labels)
    return Section(
        "Bayesian classifier",
        "Every weight is a Gaussian, and each call draws a fresh network inside the matrix "
        f"product. An average of {system.networks} networks is right on {right} of the held-out "
        "digits.",
        [
            Picture(
                "Predictive entropy against rotation",
                pictures.uncertainty(outcome, digits),
                "Doubt is least for upright digits, the only ones it was taught, rises several-fold "
                "by 30° as accuracy falls, and is larger for all networks together (solid) than for each "
                "alone (dotted); towards ±90°, where turned digits resemble few classes, the model "
                "grows too sure again, a known weakness of independent Gaussian weights.",
            ),
        ],
    )


def _model(outcome: Outcome) -> Any:
    return outcome.isthmus.models[0]


def _per_side(outcome: Outcome, decode: Any) -> dict[str, Tensor]:
    return {name: decode(side.models[0]) for name, side in outcome.sides.items()}


def _percent(scores: Tensor, labels: Tensor) -> str:
    return f"{100.0 * (scores.argmax(dim=-1) == labels).float().mean().item():.1f} %"
