"""The example of readable features: its words are text again, and its comparison runs from text to page."""

import importlib.util
import pathlib

import pytest
import torch

pytest.importorskip("safetensors")

FILE = pathlib.Path(__file__).parents[1] / "examples" / "sae_features.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sae_features", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_join_to_the_text_they_were_cut_from(example):
    text = "Called like f(x_1=-23), it returns   a «zip» object.\n\n    See help(zip)."
    words = example.Words(text * 2 + "rare", 40)
    numbers = words.encode(text)
    assert "".join(words.vocabulary[n] for n in numbers) == text
    assert len(words.vocabulary) <= 40 and len(numbers) < len(text)
    assert "".join(words.vocabulary[n] for n in words.encode("rare")) == "rare"


def test_the_model_does_not_see_what_comes(example):
    torch.manual_seed(0)
    model, tokens = example.Transformer(50).eval(), torch.randint(50, (2, example.CONTEXT))
    logits = model(tokens)
    tokens[:, 30:] = 0
    torch.testing.assert_close(model(tokens)[:, :30], logits[:, :30])
    assert not torch.allclose(model(tokens)[:, 31:], logits[:, 31:])


def test_the_penalty_is_found_by_the_features_it_leaves(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "BATCH", 64)
    torch.manual_seed(0)
    with example.ActivationWriter(tmp_path) as writer:
        writer.write(torch.randn(10_000, 64).relu() @ torch.randn(64, 16))
    sae = example.ReLUSAE(16, 64)
    found = example.learn("", sae, example.Activations.open(tmp_path), steps=800, lr=1e-2, l0=4).found
    assert found.l0 == pytest.approx(4, rel=0.15)


def test_from_text_to_page(example, tmp_path):
    torch.manual_seed(0)
    text = "\n".join(example.topics[name] for name in sorted(example.topics))[:45_000]
    options = {"num_features": 128, "k": 8, "steps": 30}
    revived, plain, relu = example.run(tmp_path, text, model_steps=11, **options)
    assert revived.found.l0 == plain.found.l0 == 8
    assert min(d.found.explained_variance for d in (revived, plain, relu)) > 0.2
    page = (tmp_path / "features.html").read_text(encoding="utf-8")
    assert "<svg" in page and " the" in page
