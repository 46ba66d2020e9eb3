"""The `isthmus` command: what it prints and how it refuses."""

import importlib
import importlib.util

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import isthmus
import isthmus.cli


def test_info_prints_versions_levels_and_cuda():
    result = CliRunner().invoke(isthmus.cli.app, ["info"])
    assert result.exit_code == 0
    build = isthmus.build_info()
    for word in (build["version"], build["torch"], *build["isa_compiled"], build["cuda"][:20]):
        assert word in result.output


def test_help_lists_every_command():
    result = CliRunner().invoke(isthmus.cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "info", "train"))


def test_demo_refuses_a_missing_directory_before_it_trains(tmp_path):
    result = CliRunner().invoke(isthmus.cli.app, ["demo", "--out", str(tmp_path / "no" / "r.html")])
    assert result.exit_code != 0
    assert "is not a directory" in str(result.exception)


def test_missing_extra_is_named_in_one_sentence(monkeypatch):
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else find_spec(name))
        bare = importlib.reload(isthmus.cli)
        with pytest.raises(SystemExit, match=r'needs typer: run pip install "isthmus\[cli\]"'):
            bare.app()
    importlib.reload(isthmus.cli)
