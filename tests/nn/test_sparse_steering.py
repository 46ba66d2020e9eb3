"""Reading and writing single features, and matching dictionaries."""

import pytest
import torch

from isthmus import nn

from .dense_sae import dense_code, shaken

CODERS = {
    "topk": lambda: nn.TopKSAE(8, 24, 3),
    "batch": lambda: nn.BatchTopKSAE(8, 24, 3),
    "jumprelu": lambda: nn.JumpReLUSAE(8, 24, threshold=0.5),
    "ksparse": lambda: nn.KSparseAutoencoder(8, 24, 3),
    "crosscoder": lambda: nn.Crosscoder(2, 4, 24, 3),
}
FEATURES = [5, 0, 23]


@pytest.fixture(params=CODERS)
def sae(request):
    return shaken(CODERS[request.param]()).eval()


@pytest.fixture
def x(sae):
    return torch.randn(2, 6, *sae.read_shape, dtype=torch.float64)


def code_of(sae, x):
    return dense_code(sae(x), 24).view(2, 6, 24)


def test_activations_are_columns_of_the_code(sae, x):
    expected = code_of(sae, x)[..., FEATURES]
    assert expected.any()
    torch.testing.assert_close(sae.activations(x, FEATURES), expected)
    torch.testing.assert_close(sae.activations(x, torch.tensor(FEATURES)), expected)


def test_add_moves_along_the_directions(sae, x):
    amounts = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = (amounts @ sae.decoder_weight[FEATURES]).view(sae.write_shape)
    torch.testing.assert_close(sae.steer(x, FEATURES, add=amounts), x + moved)
    moved = (2.0 * sae.decoder_weight[FEATURES].sum(0)).view(sae.write_shape)
    torch.testing.assert_close(sae.steer(x, FEATURES, add=2.0), x + moved)


def test_clamp_replaces_activations_and_keeps_the_error(sae, x):
    code = code_of(sae, x)
    clamped = code.clone()
    clamped[..., FEATURES] = 1.5
    error = x - sae(x).reconstruction
    expected = (clamped @ sae.decoder_weight + sae.bias).view_as(x) + error
    torch.testing.assert_close(sae.steer(x, FEATURES, clamp=1.5), expected)


def test_clamping_to_what_is_there_changes_nothing(sae, x):
    torch.testing.assert_close(sae.steer(x, FEATURES, clamp=sae.activations(x, FEATURES)), x)


def test_a_search_in_the_code_follows_gradients(sae, x):
    amounts = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(sae.steer(x, FEATURES, add=amounts).sum(), amounts)
    torch.testing.assert_close(grad, 12 * sae.decoder_weight[FEATURES].sum(-1))


def test_transcoder_steers_its_output():
    model = shaken(nn.Transcoder(8, 6, 24, 3)).eval()
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(model.steer(x, [4], add=2.0), model.predict(x) + 2.0 * model.decoder_weight[4])


@pytest.mark.parametrize("change", [{}, {"clamp": 1.0, "add": 1.0}])
def test_one_change_at_a_time(change):
    with pytest.raises(ValueError, match="one of clamp and add"):
        nn.TopKSAE(8, 24, 3).steer(torch.zeros(1, 8), [0], **change)


@pytest.mark.parametrize("features", [[24], [-1], [3, 3]])
def test_features_are_different_numbers_of_the_dictionary(features):
    with pytest.raises(ValueError, match=r"features must be different numbers in \[0, 24\), got"):
        nn.TopKSAE(8, 24, 3).steer(torch.zeros(1, 8), features, add=1.0)


def test_matching_finds_a_permuted_scaled_dictionary():
    dictionary = torch.randn(40, 16, dtype=torch.float64)
    order = torch.randperm(40)
    noisy = dictionary[order] * torch.rand(40, 1, dtype=torch.float64).add(0.1) + 0.01 * torch.randn(40, 16)
    indices, cosine = nn.match_features(noisy, dictionary)
    assert torch.equal(indices, order)
    torch.testing.assert_close(cosine, torch.nn.functional.cosine_similarity(noisy, dictionary[order], dim=-1))


def test_matching_equals_the_full_matrix():
    a, b = torch.randn(30, 5), torch.randn(50, 5)
    indices, cosine = nn.match_features(a, b)
    matrix = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T
    assert torch.equal(indices, matrix.argmax(-1))
    torch.testing.assert_close(cosine, matrix.amax(-1))
    assert cosine.dtype == nn.match_features(a.bfloat16(), b.bfloat16()).cosine.dtype == torch.float32
