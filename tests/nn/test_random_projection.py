import pytest
import torch

from isthmus import nn


@pytest.mark.parametrize("books", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_labels_are_the_most_similar_codes_after_projection(books, norm):
    quantizer = nn.RandomProjectionQuantizer(32, 10, 4, num_codebooks=books, norm=norm).double()
    x = 3.0 * torch.randn(2, 7, 10, dtype=torch.float64) + 1.0
    rows = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() if norm else x
    labels = []
    for projection, codes in zip(quantizer.projection, quantizer.codebook, strict=True):
        projected = rows @ projection
        cosine = projected @ codes.T / (projected.norm(dim=-1, keepdim=True) * codes.norm(dim=-1))
        labels.append(cosine.argmax(-1))
    expected = torch.stack(labels, -1) if books > 1 else labels[0]
    assert torch.equal(quantizer(x), expected)


def test_labels_do_not_depend_on_the_scale_of_the_input():
    quantizer = nn.RandomProjectionQuantizer(32, 10)
    x = torch.randn(50, 10)
    assert torch.equal(quantizer(x), quantizer(1000.0 * x + 5.0))


def test_nothing_learns_and_state_carries_the_labels_over():
    quantizer, other = nn.RandomProjectionQuantizer(32, 10), nn.RandomProjectionQuantizer(32, 10)
    assert not list(quantizer.parameters())
    x = torch.randn(50, 10, requires_grad=True)
    assert not torch.equal(quantizer(x), other(x))
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer(x), other(x))
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), quantizer(x))


def test_half_precision_and_autocast():
    quantizer = nn.RandomProjectionQuantizer(32, 10)
    x = torch.randn(50, 10).bfloat16()
    assert torch.equal(quantizer(x), quantizer(x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer(x).shape == (50,)


def test_vectors_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 10\]"):
        nn.RandomProjectionQuantizer(32, 10)(torch.randn(5, 9))
