"""`isthmus train sae`: it learns, resumes bit for bit and refuses clearly; its page is whole whatever the data."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from safetensors.torch import load_file
from typer.testing import CliRunner

from isthmus.cli import app
from isthmus.cli.train.charts import Series, histogram, line_chart, number
from isthmus.cli.train.checkpoint import load_sae
from isthmus.cli.train.evaluate import Entries, Strongest, activations_around, evaluate
from isthmus.cli.train.features import write_page
from isthmus.cli.train.settings import KINDS, Settings
from isthmus.cli.train.trainer import Trainer
from isthmus.data import ActivationShards, ActivationWriter
from isthmus.nn import TopKSAE

DIM, FEATURES = 8, 24
WORDS = ["<b>", "&", "a\nb", '"', "\x00", " word"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """2000 sums of two of twelve directions, in sequences of 50 tokens."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, DIM, generator=generator)
    chosen = torch.randint(12, (2000, 2), generator=generator)
    rows = 5.0 + directions[chosen].sum(dim=1)
    tokens, sequences = chosen[:, 0] % 7, torch.arange(2000) // 50
    with ActivationWriter(folder, rows_per_shard=700, format="npy", vocabulary=WORDS) as writer:
        writer.metadata["layer"] = "blocks.<3>"
        writer.write(rows, tokens=tokens, sequences=sequences)
    return folder


def train(shards, out, **options):
    given = {"features": FEATURES, "steps": 60, "batch_size": 64, "lr": 0.01, "held_out": 0.1, "warmup": 0.1}
    given |= {"log_every": 5, "eval_every": 20, "checkpoint_every": 20, "buffer_rows": 256, "dead_after": 500}
    given |= {"page_features": 6} | options
    if "k" in KINDS.get(given.get("kind", "topk"), ("", {"k"}))[1]:
        given = {"k": 2} | given
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "resume"]
    flags += ["--resume"] if options.get("resume") else []
    return CliRunner().invoke(app, ["train", "sae", f"--data={shards}", f"--out={out}", *flags])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class _Checker(HTMLParser):
    """Every element that is opened is closed, in order, and nothing is fetched from elsewhere."""

    VOID = frozenset(("meta", "br", "link", "img"))

    def __init__(self):
        super().__init__()
        self.open, self.text, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        for name, value in attrs:
            assert name not in ("src", "srcset") and not (name == "href" and not value.startswith("#"))
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    text = page.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert not re.search(r"@import|url\(|nan|\binf\b", text)
    assert "prefers-color-scheme: dark" in text
    return checker


def test_training_learns_and_leaves_everything_behind(shards, tmp_path):
    result = train(shards, tmp_path / "run", steps=200)
    assert result.exit_code == 0, result.output
    assert "Feature page" in result.output
    history = lines(tmp_path / "run")
    train_lines = [line for line in history if line["split"] == "train"]
    held_out = [line for line in history if line["split"] == "held_out"]
    assert [line["step"] for line in train_lines] == list(range(5, 201, 5))
    assert [line["step"] for line in held_out] == list(range(20, 201, 20))
    assert held_out[-1]["explained_variance"] > held_out[0]["explained_variance"] > 0
    assert held_out[-1]["explained_variance"] > 0.8
    assert held_out[-1]["rows"] == 200 and train_lines[-1]["rows"] == 200 * 64
    # Up in a tenth of the steps, down in the last fifth.
    rates = {line["step"]: line["lr"] for line in train_lines}
    assert rates[5] == pytest.approx(0.01 * 5 / 20) and rates[100] == 0.01
    assert rates[200] == pytest.approx(0.01 / 40)
    text = "".join(check(tmp_path / "run" / "features.html").text)
    for word in ("Features of blocks.<3>", "Explained variance", "Dead features", "Density", "never fire"):
        assert word in text


def test_the_saved_autoencoder_explains_raw_activations(shards, tmp_path):
    train(shards, tmp_path / "run", steps=200)
    sae, scale = load_sae(tmp_path / "run" / "sae.safetensors")
    x = ActivationShards(shards).read(0, 500)
    assert scale == pytest.approx(math.sqrt(DIM / x.square().sum(-1).mean().item()), rel=0.02)
    rest = x - sae(x * scale).reconstruction / scale
    assert 1 - rest.square().sum() / (x - x.mean(0)).square().sum() > 0.8
    assert not sae.training


def cut_at(patch, stop):
    advance = Trainer.advance

    def stopped(trainer):
        if trainer.step == stop:
            raise InterruptedError("power cut")
        return advance(trainer)

    patch.setattr(Trainer, "advance", stopped)


def assert_same_run(ours, theirs):
    assert lines(ours) == lines(theirs)
    for name in ("checkpoint.safetensors", "sae.safetensors"):
        tensors, expected = load_file(ours / name), load_file(theirs / name)
        assert tensors.keys() == expected.keys()
        for key in tensors:
            assert torch.equal(tensors[key], expected[key]), key


@pytest.mark.parametrize("stop", [17, 20, 47])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(shards, tmp_path, monkeypatch, stop):
    assert train(shards, tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        cut_at(patch, stop)
        assert isinstance(train(shards, tmp_path / "cut").exception, InterruptedError)
    torch.manual_seed(123)
    result = train(shards, tmp_path / "cut", resume=True)
    assert result.exit_code == 0, result.output
    assert ("Resuming after step" in result.output) == (stop >= 20)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert not list(tmp_path.glob("*/*.partial"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_resumes_and_is_judged(shards, tmp_path, monkeypatch, kind):
    options = {"kind": kind, "steps": 200, "checkpoint_every": 50}
    # An L0 of 24 features, and two L1 norms.
    penalties = {"jumprelu": 0.003, "gated": 0.1, "relu": 0.1}
    if kind in penalties:
        options["sparsity"] = penalties[kind]
    if kind == "matryoshka":
        options["levels"] = 2
    assert train(shards, tmp_path / "whole", **options).exit_code == 0
    with monkeypatch.context() as patch:
        cut_at(patch, 120)
        train(shards, tmp_path / "cut", **options)
    result = train(shards, tmp_path / "cut", resume=True, **options)
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    last = lines(tmp_path / "whole")[-1]
    assert last["explained_variance"] > 0.7
    assert last["l0"] < FEATURES / 2
    assert "fires in" in "".join(check(tmp_path / "whole" / "features.html").text)
    sae, _ = load_sae(tmp_path / "whole" / "sae.safetensors")
    assert type(sae).__name__ == KINDS[kind][0]


def test_a_target_l0_is_met(shards, tmp_path):
    result = train(shards, tmp_path / "run", kind="jumprelu", target_l0=2, steps=200)
    assert result.exit_code == 0, result.output
    last = lines(tmp_path / "run")[-1]
    assert last["l0"] == pytest.approx(2, rel=0.2)
    assert last["explained_variance"] > 0.7


def test_resuming_a_finished_run_changes_nothing(shards, tmp_path):
    train(shards, tmp_path / "run", steps=20)
    before = load_file(tmp_path / "run" / "sae.safetensors"), lines(tmp_path / "run")
    assert train(shards, tmp_path / "run", steps=20, resume=True).exit_code == 0
    after = load_file(tmp_path / "run" / "sae.safetensors"), lines(tmp_path / "run")
    assert before[1] == after[1]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tok"}, "kind must be one of topk, batch_topk, .*, got 'tok'"),
        ({"kind": "relu", "k": 2}, "kind relu has no k; it has aux_k, sparsity"),
        ({"sparsity": 0.1}, "kind topk has no sparsity; it has aux_k, k"),
        ({"levels": 2}, "kind topk has no levels"),
        ({"kind": "gated", "target_l0": 2}, "kind gated has no target_l0; it has sparsity"),
        ({"kind": "jumprelu", "target_l0": 25}, r"target_l0 must be in \(0, num_features=24\], got 25"),
        ({"k": 2.5}, r"k must be a whole number for kind topk, got 2\.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 20}, r"warmup is a fraction of the steps, in \[0, 1\], got 20"),
        ({"k": 25}, r"k must be in \[1, num_features=24\], got 25"),
        ({"held_out": 1.5}, r"held_out must be in \(0, 1\), got 1\.5"),
        ({"held_out": 0.0001}, "leaves none to judge by"),
    ],
)
def test_bad_options_are_named(shards, tmp_path, options, message):
    result = train(shards, tmp_path / "run", **options)
    assert result.exit_code != 0
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()


def test_folders_that_do_not_fit_are_named(shards, tmp_path):
    result = train(tmp_path / "none", tmp_path / "run")
    assert "none does not exist" in str(result.exception)
    train(shards, tmp_path / "run", steps=20)
    result = train(shards, tmp_path / "run", steps=20)
    assert "already holds a run: go on with it by --resume" in str(result.exception)
    result = train(shards, tmp_path / "run", steps=20, seed=1, resume=True)
    assert "seed was 0 when this run was started, now it is 1" in str(result.exception)


def test_hopeless_data_is_refused(tmp_path):
    np.save(tmp_path / "zeros.npy", np.zeros((100, DIM), np.float32))
    result = train(tmp_path / "zeros.npy", tmp_path / "run")
    assert "the activations are all 0, NaN or infinite" in str(result.exception)


def test_rows_that_are_not_finite_and_constant_columns_do_no_harm(tmp_path):
    rows = torch.randn(2000, DIM)
    rows[:, 3] = 7.0
    rows[:, 4] = 0.0
    rows[::100, 0] = math.nan
    rows[1::100, 1] = math.inf
    # The last tenth is held out: some of its rows are not finite, too.
    with ActivationWriter(tmp_path / "data", format="npy") as writer:
        writer.write(rows)
    result = train(tmp_path / "data", tmp_path / "run")
    assert result.exit_code == 0, result.output
    last = [line for line in lines(tmp_path / "run") if line["split"] == "train"][-1]
    assert 0.01 < last["skipped"] / last["rows"] < 0.03
    text = "".join(check(tmp_path / "run" / "features.html").text)
    assert "rows with NaN or infinity" in text and "4 left out" in text
    assert re.search(r"activations-00000\.npy, row 1 ?[89]\d\d", text)


@pytest.fixture
def sae():
    return TopKSAE(DIM, FEATURES, 2)


def test_evaluation_agrees_with_the_definition(shards, sae):
    table = ActivationShards(shards)
    x = table.read(0, 2000) * 0.5
    sae.init_from(x)
    found = evaluate(sae, table, scale=0.5, strongest=3)
    values, indices = sae.encode(x)
    dense = torch.zeros(2000, FEATURES).scatter_(1, indices, values.detach())
    rest = x - sae.decode(values, indices)
    explained = 1 - rest.double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert found.explained_variance == pytest.approx(explained.item(), abs=1e-5)
    assert found.rows == 2000 and found.skipped == 0
    assert found.l0 == pytest.approx((dense > 0).sum().item() / 2000)
    torch.testing.assert_close(found.density, (dense > 0).float().mean(0))
    assert found.silent == int((dense == 0).all(0).sum())
    torch.testing.assert_close(found.strongest.values, dense.T.topk(3).values)
    fired = found.strongest.values > 0
    assert torch.equal(dense.T.gather(1, found.strongest.rows.clamp_min(0))[fired], found.strongest.values[fired])
    assert (found.strongest.rows[~fired] == -1).all()
    assert sae.training


def test_strongest_does_not_depend_on_the_blocks():
    features, values = torch.randint(5, (1000,)), torch.rand(1000)
    whole, parts = Strongest(6, 4), Strongest(6, 4)
    whole.add(Entries(torch.arange(1000), features, values))
    for part in torch.arange(1000).split(7):
        parts.add(Entries(part, features[part], values[part]))
    assert torch.equal(whole.values, parts.values) and torch.equal(whole.rows, parts.rows)
    assert (whole.rows[5] == -1).all()


def test_a_limit_spreads_over_all_rows(tmp_path, sae):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(20_000, DIM)).astype(np.float32))
    found = evaluate(sae, ActivationShards(tmp_path), limit=8192)
    assert found.rows == 8192 and found.strongest.rows.max() > 8192


def test_activations_around_follow_one_feature(shards, sae):
    table = ActivationShards(shards)
    values, indices = sae.encode(table.read(0, 100))
    dense = torch.zeros(100, FEATURES).scatter_(1, indices, values.detach())
    found = activations_around(sae, table, [(3, 10), (50, 51), (90, 100)], torch.tensor([2, 5, 2]))
    for part, expected in zip(found, (dense[3:10, 2], dense[50:51, 5], dense[90:, 2]), strict=True):
        torch.testing.assert_close(part, expected)


def test_the_page_shows_contexts_of_the_features_asked_for(shards, tmp_path, sae):
    table = ActivationShards(shards)
    sae.init_from(table.read(0, 2000))
    found = write_page(tmp_path / "page.html", sae, table, features=[5, 2], title="A & <B>", facts={"seed": "<0>"})
    checker = check(tmp_path / "page.html")
    text = "".join(checker.text)
    assert checker.ids == ["f5", "f2"]
    assert "A & <B>" in text and "seed <0>" in text and "Training" not in text
    # The vocabulary is shown as it is, line breaks and control characters as signs; unknown tokens as numbers.
    assert "a↵b" in text and "<b>" in text and "·" in text and "\x00" not in text and "6 " in text
    peak = found.strongest.values[5, 0].item()
    assert f"{peak:#.3g}" in text


def test_features_are_chosen_from_frequent_to_rare(shards, tmp_path, sae):
    table = ActivationShards(shards)
    sae.init_from(table.read(0, 2000))
    found = write_page(tmp_path / "page.html", sae, table, features=4)
    shown = [int(name[1:]) for name in check(tmp_path / "page.html").ids]
    density = found.density[shown].tolist()
    assert density == sorted(density, reverse=True) and density[-1] > 0
    assert density[0] == found.density.max()


@pytest.mark.parametrize("fill", [math.nan, 0.0])
def test_a_page_of_nothing_is_whole(tmp_path, sae, fill):
    np.save(tmp_path / "a.npy", np.full((50, DIM), fill, np.float32))
    with torch.no_grad():
        sae.encoder_bias.fill_(-1.0)
    history = [{"step": step, "split": "train", "loss": None, "explained_variance": math.nan} for step in (1, 2)]
    found = write_page(tmp_path / "page.html", sae, ActivationShards(tmp_path), history=history)
    assert math.isnan(found.explained_variance) and found.silent == FEATURES
    text = "".join(check(tmp_path / "page.html").text)
    assert "No feature fires in any row." in text and "no finite values" in text and "–" in text


def test_lines_break_where_values_are_missing():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0), (6.0, 1.5)]
    chart = line_chart("t", [Series("a", "isthmus", points)], "step")
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


@pytest.mark.parametrize("values", [[3.0], [1e-30, 2e-30], [-5.0, 5.0], [1e9] * 3, [1e-6, 1e6], [0, 0], [0.017, 1]])
def test_axes_hold_any_values(values):
    chart = line_chart("t", [Series("a", "isthmus", list(enumerate(values)))], "step")
    places = [float(y) for y in re.findall(r'(?:cy="|\d,)(-?[\d.]+)', chart)]
    assert places and all(0 <= y <= 230 for y in places)


def test_long_curves_are_thinned_to_their_medians():
    points = [(float(x), 100.0 if x % 10 == 0 else 1.0) for x in range(3000)]
    (line,) = re.findall(
        r'<polyline class="isthmus" points="([^"]+)"', line_chart("t", [Series("a", "isthmus", points)], "")
    )
    assert len(line.split()) == 300
    assert len({point.split(",")[1] for point in line.split()}) == 1


def test_every_feature_is_in_the_histogram():
    values = [-4.0, -3.95, -1.0, 0.0]
    chart = histogram("t", values, silent=3, x_label="x")
    assert sorted(int(n) for n in re.findall(r"<title>(\d+)</title>", chart)) == [1, 1, 2, 3]
    assert "never" in chart and "never" not in histogram("t", values, silent=0, x_label="x")


def test_numbers_for_people():
    assert [number(x) for x in (0.92346, 12.0, 1234567, math.nan, None, 1e-5)] == [
        "0.9235", "12", "1 234 567", "–", "–", "1e-05",
    ]  # fmt: skip


def test_the_default_rate_and_patience_follow_the_size_of_the_run():
    assert Settings(data="", features=16384, warmup=0.0).learning_rate(0) == pytest.approx(2e-4)
    assert Settings(data="", features=4 * 16384).learning_rate(5000) == pytest.approx(1e-4)
    assert Settings(data="", features=8, k=1, steps=100, batch_size=10).module(4).dead_after == 100
    assert set(KINDS) == {"topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu"}
