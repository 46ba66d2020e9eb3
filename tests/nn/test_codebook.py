import copy
import shutil

import pytest
import torch
from checks import extra_memory, measures_memory

from isthmus import nn

LEARNING = ["ema", "gradient"]


def test_every_vector_gets_its_nearest_code():
    quantizer = nn.VectorQuantizer(10, 6).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    quantized, indices, loss = quantizer(x)
    distance = (x.unsqueeze(-2) - quantizer.codebook).square().sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    torch.testing.assert_close(quantized, quantizer.codebook[indices])
    torch.testing.assert_close(loss, 0.25 * distance.amin(-1).mean())
    assert torch.equal(quantizer.encode(x), indices)
    assert torch.equal(quantizer.decode(indices), quantizer.codebook[indices])


@pytest.mark.parametrize("learning", LEARNING)
def test_loss_and_gradients_are_those_of_the_paper(learning):
    quantizer = nn.VectorQuantizer(10, 6, learning=learning, commitment_weight=0.4, revive_below=0.0).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    direction = torch.randn(7, 6, dtype=torch.float64)

    quantized, indices, loss = quantizer(x)
    (loss + (quantized * direction).sum()).backward()
    actual = x.grad.clone()
    x.grad = None

    code = codebook[indices]
    expected = 0.4 * (x - code.detach()).square().sum(-1).mean()
    if learning == "gradient":
        expected = expected + (x.detach() - code).square().sum(-1).mean()
    (expected + (x * direction).sum()).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(actual, x.grad)
    if learning == "gradient":
        torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)
    else:
        assert not list(quantizer.parameters())


def test_moving_averages_equal_a_float64_computation():
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(5, 3, decay=0.9, revive_below=0.0)
    codebook = quantizer.codebook.double()
    usage, sums = torch.ones(5, dtype=torch.float64), codebook.clone()
    for _ in range(6):
        x = torch.randn(40, 3)
        indices = (x.double().unsqueeze(1) - codebook).square().sum(-1).argmin(-1)
        onehot = torch.nn.functional.one_hot(indices, 5).double()
        usage = 0.9 * usage + 0.1 * onehot.sum(0) / 8
        sums = 0.9 * sums + 0.1 * onehot.T @ x.double() / 8
        codebook = sums / usage.unsqueeze(-1)
        assert torch.equal(quantizer(x).indices, indices)
    torch.testing.assert_close(quantizer.usage.double(), usage, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.codebook.double(), codebook, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learning", LEARNING)
def test_eval_changes_nothing(learning):
    quantizer = nn.VectorQuantizer(8, 4, learning=learning).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(20, 4))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_code_that_is_never_hit_stays_where_it_is():
    quantizer = nn.VectorQuantizer(2, 2, decay=0.1, revive_below=0.0)
    far = torch.tensor([100.0, 100.0])
    quantizer.codebook.copy_(torch.stack([torch.zeros(2), far]))
    quantizer.sums.copy_(quantizer.codebook)
    for _ in range(60):
        quantizer(torch.randn(8, 2))
    assert quantizer.usage[1] < 1e-38
    torch.testing.assert_close(quantizer.codebook[1], far)


@pytest.mark.parametrize("learning", LEARNING)
def test_dead_codes_move_onto_vectors_of_the_batch(learning):
    def train():
        torch.manual_seed(3)
        quantizer = nn.VectorQuantizer(8, 4, learning=learning, decay=0.5, revive_below=0.1)
        with torch.no_grad():
            quantizer.codebook[4:] += 100.0
        if learning == "ema":
            quantizer.sums.copy_(quantizer.codebook)
        x = torch.randn(64, 4)
        for _ in range(3):  # usage 1/2, 1/4, 1/8
            quantizer(x)
        before = quantizer.codebook.detach().clone()
        quantizer(x)
        return x, before, quantizer

    x, before, quantizer = train()
    assert (before[4:] > 50.0).all()
    assert (quantizer.codebook.abs() < 10.0).all()
    on_a_row = (quantizer.codebook.unsqueeze(1) == x).all(-1).any(-1)
    assert on_a_row.tolist() == [False] * 4 + [True] * 4
    assert (quantizer.usage[4:] == 1.0).all()
    if learning == "ema":
        assert torch.equal(quantizer.sums[4:], quantizer.codebook[4:])
    _, _, again = train()
    assert torch.equal(quantizer.codebook, again.codebook)


def test_revival_can_be_turned_off():
    quantizer = nn.VectorQuantizer(8, 4, decay=0.1, revive_below=0.0)
    quantizer.codebook[4:] += 100.0
    quantizer.sums.copy_(quantizer.codebook)
    for _ in range(10):
        quantizer(torch.randn(64, 4))
    assert (quantizer.codebook[4:] > 50.0).all()


def test_kmeans_ends_where_every_code_is_the_mean_of_its_vectors():
    torch.manual_seed(0)
    x = torch.randn(20, 10, 3)
    quantizer = nn.VectorQuantizer(6, 3).eval()
    quantizer.init_from(x, iterations=1)
    first = quantizer(x).loss
    quantizer.init_from(x, iterations=60)
    out = quantizer(x)
    assert out.loss < first
    rows, indices = x.reshape(-1, 3), out.indices.reshape(-1)
    means = torch.stack([rows[indices == code].mean(0) for code in range(6)])
    torch.testing.assert_close(quantizer.codebook, means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.usage, indices.bincount(minlength=6) * 6 / 200)
    torch.testing.assert_close(quantizer.sums, means * quantizer.usage.unsqueeze(-1))


def test_kmeans_moves_codes_that_share_a_vector():
    x = torch.cat([torch.zeros(14, 2), 100.0 * torch.randn(6, 2)])
    quantizer = nn.VectorQuantizer(7, 2, learning="gradient").eval()
    quantizer.init_from(x, iterations=50)
    assert quantizer(x).loss < 1e-6


def test_kmeans_follows_from_the_state():
    x, quantizers = torch.randn(40, 2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        quantizers.append(nn.VectorQuantizer(7, 2))
        torch.manual_seed(5)
        quantizers[-1].init_from(x)
    one, same, other = (quantizer.codebook for quantizer in quantizers)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    quantizers[0].init_from(x)
    assert not torch.equal(quantizers[0].codebook, same)


def test_kmeans_needs_as_many_vectors_as_codes():
    with pytest.raises(ValueError, match="num_codes=8 vectors, got 7"):
        nn.VectorQuantizer(8, 4).init_from(torch.randn(7, 4))


def test_half_precision_vectors_are_searched_in_the_precision_of_the_codebook():
    quantizer = nn.VectorQuantizer(64, 4).eval()
    x = torch.randn(50, 4).bfloat16()
    out = quantizer(x)
    assert out.quantized.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.indices, quantizer(x.float()).indices)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"learning": "adam"}, "learning"), ({"decay": 1.0}, "decay"), ({"revive_below": -1.0}, "re")],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        nn.VectorQuantizer(8, 4, **options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_compiled_backward_reads_the_codebook_of_its_forward():
    """Inductor recomputes clones in backward, when the update has moved what they are clones of."""
    torch.manual_seed(0)
    quantizer = nn.VectorQuantizer(16, 12, decay=0.5)
    twin, x = copy.deepcopy(quantizer), torch.randn(24, 12)
    grads = []
    for call in (quantizer, torch.compile(twin, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(twin.state_dict(), quantizer.state_dict())


def test_snapshot_keeps_the_promises_of_an_op():
    for x in (torch.randn(3, 4), torch.randn(3, 4, requires_grad=True), torch.randn(0, 4)):
        torch.library.opcheck(torch.ops.isthmus_nn.snapshot, (x,))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: torch.ops.isthmus_nn.snapshot(x).square(), x)


@measures_memory
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("rows", [2048, 16384])
def test_a_training_step_needs_a_few_copies_of_vectors_and_codes(learning, rows):
    """Distances would take 67 or 537 MB."""
    quantizer = nn.VectorQuantizer(8192, 64, learning=learning)
    x = torch.randn(rows, 64, requires_grad=True)

    def step():
        quantized, _, loss = quantizer(x)
        (loss + quantized.sum()).backward()

    def warm_up():
        step()
        x.grad = quantizer.codebook.grad = None

    assert extra_memory(step, warm_up) < 4 * (x.numel() + quantizer.codebook.numel()) * 4


@pytest.mark.parametrize("learning", LEARNING)
def test_training_lowers_the_reconstruction_error(learning, digits):
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)
    quantizer = nn.VectorQuantizer(32, 8, learning=learning, decay=0.9)
    quantizer.init_from(encoder(digits).view(-1, 8))
    modules = torch.nn.ModuleList([encoder, decoder, quantizer])
    optimizer = torch.optim.Adam(modules.parameters(), lr=5e-3)

    def error():
        quantized, _, loss = quantizer(encoder(digits).view(-1, 4, 8))
        return (decoder(quantized.flatten(1)) - digits).square().sum(-1).mean(), loss

    start = error()[0].item()
    for _ in range(60):
        optimizer.zero_grad()
        sum(error()).backward()
        optimizer.step()
    assert error()[0].item() < 0.4 * start
