"""Shards of activations: what is written is read, the stream is shuffled and resumes, the hook takes what it should."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.data import ActivationLoader, ActivationShards, ActivationWriter, _safetensors, harvest

needs_safetensors = pytest.mark.skipif(find_spec("safetensors") is None, reason="safetensors is not installed")
FORMATS = ["npy", pytest.param("safetensors", marks=needs_safetensors)]


def numbered(rows, dim=4, first=0, dtype=torch.float32):
    """Rows that can be told apart: the first column counts them."""
    table = torch.randn(rows, dim)
    table[:, 0] = torch.arange(first, first + rows)
    return table.to(dtype)


def write(folder, table, rows_per_shard=100, format="npy", **sidecars):
    with ActivationWriter(folder, rows_per_shard=rows_per_shard, format=format) as writer:
        writer.write(table, **sidecars)
    return folder


def numbers(batches):
    return [int(n) for batch in batches for n in batch[:, 0]]


def take(loader, count):
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_rows_are_read_again(tmp_path, format, dtype):
    table = numbered(257, dtype=dtype)
    tokens, sequences = torch.arange(257) % 7, torch.arange(257) // 10
    with ActivationWriter(tmp_path, rows_per_shard=50, format=format, vocabulary=list("abcdefg")) as writer:
        for part in torch.arange(257).tensor_split((3, 3, 110, 256)):
            writer.write(table[part], tokens=tokens[part], sequences=sequences[part])
    shards = ActivationShards(tmp_path)
    assert len(list(tmp_path.glob(f"activations-*[0-9].{format}"))) == 6
    assert (len(shards), shards.dim, shards.dtype, shards.has_tokens) == (257, 4, dtype, True)
    assert shards.vocabulary == list("abcdefg")
    for start, stop in ((0, 257), (49, 51), (120, 120), (99, 256)):
        assert torch.equal(shards.read(start, stop), table[start:stop])
        assert torch.equal(shards.read(start, stop, "tokens"), tokens[start:stop])
        assert torch.equal(shards.read(start, stop, "sequences"), sequences[start:stop])
    assert shards.place(120) == (f"activations-00002.{format}", 20)


def test_a_writer_keeps_no_reference_to_what_it_was_given(tmp_path):
    rows = torch.zeros(5, 3)
    with ActivationWriter(tmp_path, format="npy") as writer:
        writer.write(rows)
        rows.fill_(1.0)
    assert not ActivationShards(tmp_path).read(0, 5).any()


@pytest.mark.parametrize("format", FORMATS)
def test_shards_have_the_mode_of_any_new_file(tmp_path, format):
    write(tmp_path, numbered(10), format=format)
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_rows_written_before_an_error_are_kept(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ActivationWriter(tmp_path, format="npy") as writer:
        writer.write(numbered(30))
        raise RuntimeError("stop")
    assert len(ActivationShards(tmp_path)) == 30
    assert not list(tmp_path.glob("*.partial"))


def test_files_of_other_programs(tmp_path):
    np.save(tmp_path / "layer3.npy", np.ones((10, 4), np.float16))
    assert len(ActivationShards(tmp_path / "layer3.npy")) == 10
    np.save(tmp_path / "layer4.npy", np.asfortranarray(np.arange(40, dtype=np.float16).reshape(10, 4)))
    assert torch.equal(ActivationShards(tmp_path).read(10, 12)[1], torch.arange(4, 8).half())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"blocks.3": torch.ones(5, 4).half()}, tmp_path / "z.safetensors")
    assert len(ActivationShards(tmp_path)) == 25
    safetensors.save_file({"a": torch.ones(5, 4), "b": torch.ones(5, 4)}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"z\.safetensors holds several tensors, none of them named 'activations'"):
        ActivationShards(tmp_path)


def test_slices_are_disjoint_and_complete(tmp_path):
    shards = ActivationShards(write(tmp_path, numbered(257)))
    parts = [shards.slice(rank, 3) for rank in range(3)]
    assert sorted(n for part in parts for n in numbers([part.read(0, len(part))])) == list(range(257))
    assert max(map(len, parts)) - min(map(len, parts)) <= len(shards.segments)
    train, held_out = shards.split(0.1)
    assert sorted(numbers([train.read(0, len(train)), held_out.read(0, len(held_out))])) == list(range(257))
    assert len(held_out) == 10 + 10 + 6
    assert held_out.place(0) == ("activations-00000.npy", 90)
    assert numbers([held_out.slice(1, 2).read(0, 3)]) == [95, 96, 97]


def test_blocks_cover_all_rows_or_spread_evenly(tmp_path):
    shards = ActivationShards(write(tmp_path, numbered(1000)))
    blocks = list(shards.blocks(64))
    assert numbers(rows for _, rows in blocks) == list(range(1000))
    assert [start for start, _ in blocks] == list(range(0, 1000, 64))
    assert [start for start, _ in shards.blocks(64, limit=256)] == [0, 256, 512, 768]
    assert [len(rows) for _, rows in shards.blocks(64, limit=10)] == [10]


def test_contexts_end_where_shard_or_sequence_ends(tmp_path):
    sequences = torch.arange(200) // 30
    shards = ActivationShards(write(tmp_path, numbered(200), tokens=torch.arange(200), sequences=sequences))
    assert shards.context(45, 5) == (40, 51)
    assert shards.context(31, 5) == (30, 37)
    assert shards.context(29, 5) == (24, 30)
    assert shards.context(99, 50) == (90, 100)
    assert shards.context(0, 3) == (0, 4)


@pytest.mark.parametrize("format", FORMATS)
def test_each_epoch_draws_every_row_once(tmp_path, format):
    loader = ActivationLoader(write(tmp_path, numbered(1000), format=format), batch_size=50, buffer_rows=200)
    # The buffer runs ahead: after an epoch of draws it holds 200 rows that have been read but not drawn.
    drawn = numbers(take(loader, 100))
    counts = Counter(drawn)
    assert loader.epoch == 5.0
    assert set(counts) == set(range(1000)) and set(counts.values()) <= {4, 5, 6}
    # Within a round a batch is a random part of the buffer, so the order is far from that of the files.
    steps = np.diff(drawn)
    assert (steps == 1).mean() < 0.05


def test_a_row_leaves_within_two_rounds_and_once(tmp_path):
    loader = ActivationLoader(write(tmp_path, numbered(1000), rows_per_shard=1000), batch_size=20, buffer_rows=100)
    drawn = numbers(take(loader, 50))
    assert len(set(drawn)) == len(drawn)
    assert all(row <= place + 100 and place <= row + 200 for place, row in enumerate(drawn))


def test_same_seed_same_stream_other_seed_another(tmp_path):
    folder = write(tmp_path, numbered(500))
    streams = [numbers(take(ActivationLoader(folder, 32, buffer_rows=128, seed=s), 20)) for s in (3, 3, 4)]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 5, 17, 63])
def test_resuming_is_bit_identical(tmp_path, format, batches):
    folder = write(tmp_path, numbered(500, dtype=torch.bfloat16), rows_per_shard=70, format=format)

    def loader():
        return ActivationLoader(folder, 32, buffer_rows=128, seed=5, rank=1, world_size=2)

    first, second = loader(), loader()
    take(first, batches)
    state = json.loads(json.dumps(first.state_dict()))
    next(second)
    second.load_state_dict(state)
    for ours, theirs in zip(take(first, 30), take(second, 30), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_draw_disjoint_rows(tmp_path):
    folder = write(tmp_path, numbered(600), rows_per_shard=60)
    drawn = [set(numbers(take(ActivationLoader(folder, 10, rank=r, world_size=3), 20))) for r in range(3)]
    assert all(len(rows) == 200 for rows in drawn)
    assert set.union(*drawn) == set(range(600))


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    batch = next(ActivationLoader(write(tmp_path, numbered(30)), batch_size=64))
    assert set(numbers([batch])) == set(range(30)) and len(batch) == 64


def test_batches_have_the_dtype_asked_for(tmp_path):
    folder = write(tmp_path, numbered(30, dtype=torch.float16))
    assert next(ActivationLoader(folder, 8)).dtype == torch.float32
    assert next(ActivationLoader(folder, 8, dtype=None)).dtype == torch.float16


def test_the_loader_keeps_only_its_buffer(tmp_path):
    """A table of 64 MB is streamed by a process whose memory grows by a fraction of it."""
    np.save(tmp_path / "a.npy", np.zeros((250_000, 64), np.float32))
    script = """
import sys, resource
import torch
from isthmus.data import ActivationLoader
next(ActivationLoader(sys.argv[1], 1024, buffer_rows=1024))

def private():
    # Mapped pages of the file belong to the page cache and can be dropped at any time.
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0])

before = private()
loader = ActivationLoader(sys.argv[1], 1024, buffer_rows=16384)
most = 0
for _ in range(250):
    next(loader)
    most = max(most, private())
print(most - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    grown = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 24_000, grown  # kB; the buffer has 4 MB


@pytest.mark.parametrize("arguments", [{"batch_size": 16}, {"seed": 1}, {"buffer_rows": 96}, {"rank": 1}])
def test_a_loader_refuses_the_state_of_another(tmp_path, arguments):
    folder = write(tmp_path, numbered(500))
    given = {"batch_size": 32, "buffer_rows": 128, "rank": 0, "world_size": 2}
    state = ActivationLoader(folder, **given).state_dict()
    other = ActivationLoader(folder, **{**given, **arguments})
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} of the saved loader is"):
        other.load_state_dict(state)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no does not exist"):
        ActivationShards(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"holds no shards: expected \.safetensors or \.npy"):
        ActivationShards(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="hold no rows"):
        ActivationShards(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.zeros((5, 3), np.float32), r"differ in width: .*a\.npy has 4 columns, .*b\.npy has 3"),
        (np.zeros((5, 4), np.float16), r"differ in dtype: .*a\.npy is torch.float32, .*b\.npy is torch.float16"),
        (np.zeros((5, 4), np.float64), r"b\.npy holds torch.float64; expected float32"),
        (np.zeros((5, 4), ">f4"), r"b\.npy holds >f4; expected .* little-endian"),
        (np.zeros((5, 4), np.int16), r"b\.npy holds int16"),
        (np.zeros(5, np.float32), r"b\.npy holds a tensor of shape \[5\]; expected \[rows, D\]"),
    ],
)
def test_shards_that_do_not_fit_are_named(tmp_path, second, message):
    np.save(tmp_path / "a.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "b.npy", second)
    with pytest.raises(ValueError, match=message):
        ActivationShards(tmp_path)


def test_sidecars_that_do_not_fit_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "a.tokens.npy", np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"tokens of .*a\.npy are torch.int64 of shape \[4\]; expected int64 \[5\]"):
        ActivationShards(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_broken_and_missing_files_are_named(tmp_path, format):
    folder = write(tmp_path, numbered(300), format=format)
    loader = ActivationLoader(folder, 10, buffer_rows=20)
    next(loader)
    path = folder / f"activations-00001.{format}"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"activations-00001\.{format} is not a whole"):
        ActivationShards(folder)
    for file in folder.glob(f"*.{format}"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the shard .*\.{format} is gone"):
        take(loader, 50)


def test_missing_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "isthmus\[data\]"'):
        _safetensors.write(tmp_path / "a.safetensors", {"activations": torch.zeros(2, 2)})


def test_importing_the_package_needs_no_extra():
    script = "import sys, isthmus, isthmus.data; print(*sys.modules.keys() & {'safetensors', 'typer', 'rich'})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_bad_writes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"format must be one of 'npy', 'safetensors', got 'csv'"):
        ActivationWriter(tmp_path, format="csv")
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1, got 0"):
        ActivationWriter(tmp_path, rows_per_shard=0)
    with ActivationWriter(tmp_path, format="npy") as writer:
        with pytest.raises(ValueError, match=r"rows are torch.float64 of shape \[2, 3\]"):
            writer.write(torch.zeros(2, 3, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"tokens are torch.float32 of shape \[2\]; expected int64 \[2\]"):
            writer.write(torch.zeros(2, 3), tokens=torch.zeros(2))
        writer.write(torch.zeros(2, 3))
        for rows, sidecars in (
            (torch.zeros(2, 4), {}),
            (torch.zeros(2, 3).half(), {}),
            (torch.zeros(2, 3), {"tokens": torch.zeros(2).long()}),
        ):
            with pytest.raises(ValueError, match="so far, got"):
                writer.write(rows, **sidecars)
    with pytest.raises(FileExistsError, match=r"already holds shards, such as activations-00000\.npy"):
        ActivationWriter(tmp_path)


class Block(nn.Module):
    """A layer that returns a tuple, as attention does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, *, scale=1.0):
        return self.linear(x) * scale, None


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids, mask=None):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)[0]
        return {"last": x}


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]])


def seen(layer, side="output", **options):
    model, rows = Network(), []
    with harvest(model, layer, rows.append, side=side, **options):
        model(IDS)
    return model, rows[0]


def test_the_hook_takes_outputs_and_inputs():
    model, rows = seen("embedding")
    embedded = model.embedding(IDS).flatten(0, 1)
    assert torch.equal(rows, embedded) and not rows.requires_grad
    model, rows = seen("blocks.0")
    torch.testing.assert_close(rows, model.blocks[0].linear(model.embedding(IDS)).flatten(0, 1))
    model, rows = seen("blocks.0", "input")
    assert torch.equal(rows, model.embedding(IDS).flatten(0, 1))
    model, rows = seen("")
    torch.testing.assert_close(rows, model(IDS)["last"].flatten(0, 1))


def test_the_hook_takes_an_input_given_by_name():
    block, rows = Block(), []
    x = torch.randn(5, 6)
    with torch.no_grad(), harvest(block, "linear", rows.append, side="input"):
        block(x=x)
    with torch.no_grad(), harvest(block, "", rows.append, side="input"):
        block(x=x)
    assert torch.equal(rows[0], x) and torch.equal(rows[1], x)


@needs_safetensors
def test_the_hook_leaves_out_padding_and_keeps_tokens(tmp_path):
    model = Network()
    with (
        ActivationWriter(tmp_path, vocabulary=[str(n) for n in range(10)]) as writer,
        harvest(
            model,
            "blocks.1",
            writer,
            dtype=torch.float16,
            mask=lambda ids, mask: mask,
            tokens=lambda ids, mask: ids,
        ),
        torch.no_grad(),
    ):
        for _ in range(2):
            model(IDS, mask=IDS != 0)
    shards = ActivationShards(tmp_path)
    kept = IDS[IDS != 0]
    assert shards.dtype == torch.float16
    assert shards.read(0, 18, "tokens").tolist() == kept.tolist() * 2
    assert shards.read(0, 18, "sequences").tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 5]
    assert shards.metadata == {"layer": "blocks.1", "side": "output", "module": "Network"}
    with torch.no_grad():
        x = model.embedding(IDS)
        x = x + model.blocks[0](x)[0]
        expected = model.blocks[1](x)[0][IDS != 0].half()
    assert torch.equal(shards.read(0, 9), expected)


def test_the_hook_changes_neither_outputs_nor_gradients():
    model = Network()
    model(IDS)["last"].square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with harvest(model, "blocks.0", lambda rows: rows.zero_() if rows.numel() == 0 else None):
        model(IDS)["last"].square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_the_hook_is_gone_afterwards_even_after_an_error():
    model, rows = Network(), []
    with pytest.raises(RuntimeError, match="stop"), harvest(model, "blocks.0", rows.append):
        raise RuntimeError("stop")
    with pytest.raises(IndexError), harvest(model, "blocks.0", rows.append):
        model(torch.tensor([[100]]))
    model(IDS)
    assert rows == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_harvests_are_named():
    model = Network()
    ignore = lambda rows, **_: None  # noqa: E731
    with (
        pytest.raises(ValueError, match=r"layer 'blocks.7' is not in the module; did you mean 'blocks"),
        harvest(model, "blocks.7", ignore),
    ):
        pass
    with pytest.raises(ValueError, match="side must be 'input' or 'output', got 'both'"):
        harvest(model, "blocks.0", ignore, side="both").__enter__()
    with (
        pytest.raises(ValueError, match=r"layer gives torch.int64 of shape \[3, 4\]; expected a floating-point"),
        harvest(model, "embedding", ignore, side="input"),
    ):
        model(IDS)
    with (
        pytest.raises(ValueError, match=r"mask has shape \[4\]; expected \[3, 4\]"),
        harvest(model, "embedding", ignore, mask=lambda ids: ids[0]),
    ):
        model(IDS)
    with torch.no_grad():
        model.embedding.weight.fill_(1e6)
    with pytest.raises(ValueError, match="overflows float16"), harvest(model, "embedding", ignore, dtype=torch.float16):
        model(IDS)
