"""`isthmus demo`: its twins mean the same as Isthmus, its measures are right, its report is whole."""

import base64
import re

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import isthmus.nn
from isthmus.cli import app
from isthmus.cli.demo import digits, measure, plain
from isthmus.cli.demo.systems import SYSTEMS, Part

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return digits.load()


@pytest.fixture(scope="module")
def systems(data):
    torch.manual_seed(0)
    return [system(data) for system in SYSTEMS]


def test_split_is_disjoint_and_complete(data):
    assert len(data.train) + len(data.test) == 1797
    assert data.train.min() == 0.0 and data.train.max() == 1.0


def test_likelihood_is_binomial(data):
    images, logits = data.test[:5], torch.randn(5, digits.PIXELS)
    binomial = torch.distributions.Binomial(digits.LEVELS, logits=logits)
    expected = -binomial.log_prob(images * digits.LEVELS).sum(dim=-1)
    torch.testing.assert_close(digits.nll(logits, images), expected)


def test_rotation_turns_anticlockwise(data):
    images = data.test[:5]
    expected = images.view(-1, digits.SIDE, digits.SIDE).rot90(1, (1, 2)).flatten(1)
    torch.testing.assert_close(digits.rotate(images, 90.0), expected, atol=1e-5, rtol=0.0)


def test_twin_has_the_same_weights_and_no_isthmus_bottleneck(systems):
    for system in systems:
        model = system.build()
        twin = plain.twin(model)
        for (name, ours), (_, theirs) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), name
        kinds = {type(module) for module in twin.modules()}
        assert "isthmus.cli.demo.plain" in {kind.__module__ for kind in kinds}
        assert not kinds & plain._PLAIN.keys()


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("index", [1, 2])
def test_twin_without_noise_has_the_same_loss_and_gradient(systems, index):
    system = systems[index]
    model = system.build()
    twin = plain.twin(model)
    rows = torch.arange(64)
    if index == 2:
        # Half the dictionary is dead, so the auxiliary loss takes part too.
        for side in (model, twin):
            side.bottleneck.idle[::2] = side.bottleneck.dead_after
    losses = [system.loss(side, rows) for side in (model, twin)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(_gradients(model), _gradients(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_gaussian_twin_samples_the_same_distribution():
    ours = isthmus.nn.GaussianBottleneck(8, 4)
    theirs = plain.twin(ours)
    x = torch.randn(1, 8)
    many = x.expand(20_000, 8)
    torch.testing.assert_close(ours(x).kl, theirs(x).kl)
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(ours(many).z, 0), moment(theirs(many).z, 0), atol=0.05, rtol=0.05)


def test_bayes_twin_samples_the_same_distribution():
    ours = isthmus.nn.BayesLinear(8, 4, init_std=0.3)
    theirs = plain.twin(ours)
    x = torch.randn(1, 8)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    draws = [torch.cat([side(x) for _ in range(4000)]) for side in (ours, theirs)]
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(draws[0], 0), moment(draws[1], 0), atol=0.08, rtol=0.08)


def test_saved_bytes_counts_each_new_storage_once():
    x = torch.randn(100, requires_grad=True)
    # exp keeps its result; square keeps its input, which lives anyway; the two views are one.
    twice = Part(nn.Identity(), x, lambda x: (x.exp().view(10, 10).sin(), x.square()))
    assert measure.saved_bytes(twice) == 400
    assert measure.saved_bytes(Part(nn.Identity(), x, lambda x: (x.square(),))) == 0


def test_agreement_weighs_the_difference_against_the_spread():
    assert measure.agreement([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]).holds
    assert not measure.agreement([1.0, 1.01, 0.99], [2.0, 2.01, 1.99]).holds


def test_gaussian_bottleneck_keeps_a_key_for_backward(systems):
    system = systems[0]
    (part,) = system.parts(system.build(), torch.arange(64))
    assert measure.saved_bytes(part) <= 64


def test_quick_demo_writes_a_whole_report(tmp_path):
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    for system in SYSTEMS:
        assert system.name in result.output
    page = out.read_text(encoding="utf-8")
    titles = [
        "Results", "Training loss",
        "Variational autoencoder", "Reconstructions", "Samples from the prior",
        "Vector-quantized autoencoder", "Code usage",
        "TopK sparse autoencoder", "Top-activating digits of single features",
        "Bayesian classifier", "Predictive entropy against rotation",
    ]  # fmt: skip
    for title in titles:
        assert f">{title}<" in page
    assert isthmus.build_info()["version"] in page
    assert "prefers-color-scheme: dark" in page
    pictures = re.findall(r'(?:src|srcset)="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2 * page.count("<figure>")
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    # Self-contained: every picture is inline and no style sheet or script is fetched.
    assert not re.search(r'(?:src|srcset|href)="(?!data:)|@import|url\(', page)
