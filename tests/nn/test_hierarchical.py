"""HierarchicalVQ against a loop over scales with plain matrices in float64."""

import copy

import pytest
import torch

from isthmus import nn


def pooling(size, out):
    """The matrix [out, size] of area pooling: means over overlapping windows."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


def linear(size, out):
    """The matrix [out, size] of linear interpolation between pixel centres, flat beyond the first and the last."""
    place = ((torch.arange(out, dtype=torch.float64) + 0.5) * size / out - 0.5).clamp(0, size - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=size - 1)
    matrix, row = torch.zeros(out, size, dtype=torch.float64), torch.arange(out)
    matrix[row, low] += 1 - (place - low)
    matrix[row, high] += place - low
    return matrix


def scales_by_hand(x, quantizer):
    """Sums after each scale and indices, for maps with one side."""
    residual, known, sums, indices, vectors = x, 0.0, [], [], []
    for k, (scale,) in enumerate(quantizer.scales):
        pooled = residual @ pooling(x.shape[-1], scale).T
        index = (pooled.movedim(1, -1).unsqueeze(-2) - quantizer.codebook).square().sum(-1).argmin(-1)
        vectors.append(pooled.movedim(1, -1).reshape(-1, x.shape[1]).detach())
        part = quantizer.codebook[index].movedim(-1, 1) @ linear(scale, x.shape[-1]).T
        if len(quantizer.convolutions):
            convolution = quantizer.convolutions[k * len(quantizer.convolutions) // len(quantizer.scales)]
            part = (1 - quantizer.quant_resi) * part + quantizer.quant_resi * convolution(part)
        known, residual = known + part, residual - part.detach()
        sums.append(known)
        indices.append(index)
    return sums, indices, torch.cat(vectors)


def sequences(**options):
    torch.manual_seed(0)
    options = {"spatial_dims": 1, "commitment_weight": 0.3, "revive_below": 0.0, **options}
    return nn.HierarchicalVQ(12, 4, (1, 2, 5, 8), **options).double(), torch.randn(3, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{"quant_resi": 0.0}, {}, {"share_quant_resi": 2, "quant_resi": 0.2}, {"share_quant_resi": 0}]
)
@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_every_scale_codes_what_is_left(learning, options):
    quantizer, x = sequences(learning=learning, **options)
    quantizer.eval()
    x.requires_grad_()
    sums, indices, _ = scales_by_hand(x, quantizer)
    out = quantizer(x)
    assert len(out.indices) == 4
    for actual, expected in zip(out.indices, indices, strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(quantizer.encode(x), indices, strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(out.quantized, sums[-1])
    torch.testing.assert_close(quantizer.decode(indices), sums[-1])
    torch.testing.assert_close(quantizer.decode(indices[:2]), sums[1])
    error = [(x.detach() - known).square().sum(1).mean() for known in sums]
    pull = [(x - known.detach()).square().sum(1).mean() for known in sums]
    loss = torch.stack(error).mean() + 0.3 * torch.stack(pull).mean()
    torch.testing.assert_close(out.loss, loss)
    variables = [x, *quantizer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out.loss, variables), torch.autograd.grad(loss, variables))


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_entries_that_leave_scales_out(learning):
    quantizer, x = sequences(learning=learning, decay=0.0)
    kept = torch.tensor([4, 1, 2])
    sums, indices, vectors = scales_by_hand(x, quantizer)
    out = quantizer(x, stages=kept)
    for k, (actual, expected) in enumerate(zip(out.indices, indices, strict=True)):
        assert torch.equal(actual, torch.where((kept > k).unsqueeze(1), expected, -1))
    total = torch.stack([sums[count - 1][entry] for entry, count in enumerate(kept)])
    torch.testing.assert_close(out.quantized, total)
    errors = [
        (x[entry] - sums[k][entry]).square().sum(0).mean() for entry, count in enumerate(kept) for k in range(count)
    ]
    torch.testing.assert_close(out.loss, 1.3 * torch.stack(errors).mean())
    variables = list(quantizer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, variables), torch.autograd.grad(torch.stack(errors).mean(), variables)
    )
    if learning == "ema":
        joint = torch.cat([index.flatten() for index in out.indices])
        for k in joint[joint >= 0].unique():
            torch.testing.assert_close(quantizer.codebook[k], vectors[joint == k].mean(0))
    else:
        torch.testing.assert_close(quantizer.decode(out.indices), total)
        encoded = quantizer.encode(x, stages=kept)
        assert all(torch.equal(*pair) for pair in zip(encoded, out.indices, strict=True))


def test_dropout_keeps_the_first_scales_of_every_entry():
    torch.manual_seed(0)
    quantizer = nn.HierarchicalVQ(
        12, 4, (1, 2, 3, 4), spatial_dims=1, quantize_dropout=True, quantize_dropout_cutoff_index=1
    )
    x = torch.randn(100, 4, 4)
    lived = torch.stack([(index >= 0).all(-1) for index in quantizer(x).indices], -1)
    assert set(lived.sum(-1).tolist()) == {2, 3, 4}
    assert torch.equal(lived, lived.sort(dim=-1, descending=True).values)
    assert all((index >= 0).all() for index in quantizer.eval()(x).indices)


def test_the_gradient_of_the_map_reaches_x_once():
    quantizer, x = sequences()
    x.requires_grad_()
    direction = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad((quantizer(x).quantized * direction).sum(), x)[0], direction)


def test_moving_averages_take_all_scales_as_one_batch():
    quantizer, x = sequences(decay=0.0)
    before = quantizer.codebook.clone()
    _, indices, vectors = scales_by_hand(x, quantizer)
    quantizer(x)
    joint = torch.cat([index.reshape(-1) for index in indices])
    for k in range(12):
        mine = vectors[joint == k]
        torch.testing.assert_close(quantizer.codebook[k], mine.mean(0) if len(mine) else before[k])
    torch.testing.assert_close(quantizer.usage, joint.bincount(minlength=12) * 12 / len(joint), check_dtype=False)


def test_micro_batches_and_revival():
    torch.manual_seed(0)
    whole = nn.HierarchicalVQ(12, 4, (1, 4), decay=0.5, revive_below=0.0)
    parts, x = copy.deepcopy(whole), torch.randn(6, 4, 4, 4)
    whole(x)
    parts(x[:4], update="later")
    parts(x[4:])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())
    revived = nn.HierarchicalVQ(40, 4, (1, 4), decay=0.0, revive_below=0.5)
    revived.set_codebook(revived.codebook + 1000.0 * (torch.arange(40) >= 20).unsqueeze(1))
    revived(x)
    assert (revived.codebook.abs() < 20.0).all()


@pytest.mark.parametrize(("dims", "scales"), [(2, (1, (2, 3), (4, 6))), (3, (1, (2, 3, 2)))])
def test_images_and_video_with_projections(dims, scales):
    torch.manual_seed(0)
    quantizer = nn.HierarchicalVQ(12, 6, scales, spatial_dims=dims, codebook_dim=3, gradient="rotation")
    x = torch.randn(2, 6, *quantizer.scales[-1], requires_grad=True)
    out = quantizer(x)
    assert [index.shape[1:] for index in out.indices] == [torch.Size(size) for size in quantizer.scales]
    (out.loss + out.quantized.square().mean()).backward()
    assert x.grad.isfinite().all()
    quantizer.eval()
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), quantizer(x).quantized)
    larger = tuple(2 * side for side in quantizer.scales[-1])
    assert quantizer.decode(out.indices, larger).shape == (2, 6, *larger)


def test_training_on_one_batch_lowers_the_error():
    quantizer, x = sequences(learning="gradient", share_quant_resi=0)
    optimizer, errors = torch.optim.Adam(quantizer.parameters(), lr=2e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        out = quantizer(x)
        errors.append((out.quantized - x).square().mean().item())
        out.loss.backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_vectors_that_are_not_finite_teach_nothing():
    quantizer, x = sequences(decay=0.0)
    x[0, :, 3] = torch.nan
    assert quantizer(x).loss.isnan()
    assert quantizer.codebook.isfinite().all()


def test_an_empty_batch():
    quantizer = nn.HierarchicalVQ(12, 4, (1, 4))
    out = quantizer(torch.randn(0, 4, 4, 4))
    assert out.quantized.shape == (0, 4, 4, 4)
    assert out.indices[1].shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1, 0)}, "scales"),
        ({"scales": ((1, 2, 3),)}, "2 sides"),
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"quant_resi": 1.5}, "quant_resi"),
        ({"share_quant_resi": 3}, "share_quant_resi must be 0 to 2"),
        ({"gradient": "gumbel"}, "gradient"),
        ({"heads": 2}, "got heads"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.HierarchicalVQ(8, 4, **{"scales": (1, 2), **options})


def test_calls_that_do_not_fit_are_refused():
    quantizer = nn.HierarchicalVQ(8, 4, (1, 2))
    with pytest.raises(ValueError, match="2 sides"):
        quantizer(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="1 to 2 scales, got 3"):
        quantizer.decode([torch.zeros(1, 1, 1, dtype=torch.int64)] * 3)
