"""The example of a vector-quantized autoencoder: its codebook stays alive."""

import importlib.util
import pathlib

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FILE = pathlib.Path(__file__).parents[1] / "examples" / "vq_vae_patches.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vq_vae_patches", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patches_paste_back_into_the_pictures_they_were_cut_from(example):
    images = torch.rand(3, 2, 8, 12)
    assert torch.equal(example.paste(example.cut(images, 4, 4), images, 4), images)
    assert example.cut(images, 4, 2).shape == (3 * 3 * 5, 32)


@pytest.mark.parametrize(("pictures", "steps", "psnr"), [("digits", 100, 13.5), ("photographs", 200, 18.0)])
def test_nine_tenths_of_the_codes_are_used(example, pictures, steps, psnr, tmp_path):
    torch.manual_seed(0)
    outcome = example.run(getattr(example, pictures)(), steps=steps)
    assert outcome.usage >= 0.9
    assert outcome.psnr > psnr
    example.picture([outcome]).savefig(tmp_path / "picture.png", dpi=20)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_its_remedies_the_codebook_collapses(example, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(example.VectorQuantizer, "init_from", lambda *arguments: None)
    pictures = example.photographs()
    patches = example.cut(pictures.images, pictures.side, 16)
    model = example.PatchVQVAE(patches.shape[-1])
    model.quantizer.revive_below = 0.0
    example.train(model, patches, steps=60)
    assert example.evaluate(model, pictures).usage < 0.5
