"""What the compiled extension may and may not contain."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import isthmus

ROOT = pathlib.Path(__file__).parents[1]
# A pointer to the exception handler that every object with a destructor carries: data, the same at all levels.
PERSONALITY = "DW.ref.__gxx_personality_v0"
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")


def symbols(path, *flags):
    listing = subprocess.run(["nm", "-C", *flags, str(path)], capture_output=True, text=True, check=True)
    return listing.stdout.splitlines()


@needs_nm
def test_only_the_stable_abi_is_used():
    """A C++ symbol of ATen or c10 would tie the binary to one torch version."""
    undefined = symbols(isthmus._C.__file__, "--dynamic", "--undefined-only")  # survives stripping
    assert undefined
    assert not [s for s in undefined if " at::" in s or " c10::" in s]


@needs_nm
def test_simd_objects_export_no_weak_symbol():
    """The linker keeps one copy of a weak symbol: one compiled for AVX-512 could end up in code for older CPUs."""
    levels = ("avx2", "avx512", "avx512_bf16", "amx")
    objects = [path for level in levels for path in ROOT.glob(f"build/**/cpu_{level}.cpp.o")]
    if not objects:
        pytest.skip("installed from a wheel: the object files are not here")
    for path in objects:
        weak = [s for s in symbols(path, "--defined-only") if re.search(r" [WVu] ", s) and PERSONALITY not in s]
        assert not weak, f"{path} exports {weak}"


def test_threads_are_used():
    """Our loops run on torch's pool: the threads of one op are as many as torch.set_num_threads says."""
    script = (
        "import os, torch, isthmus; torch.set_num_threads(3);"
        "isthmus.ops.gaussian_noise(isthmus.key(0), (1 << 22,));"
        "print(len(os.listdir('/proc/self/task')))"
    )
    if not pathlib.Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) >= 3


def test_isa_can_be_chosen():
    for level in isthmus.build_info()["isa_available"]:
        isthmus.set_isa(level)
        assert isthmus.get_isa() == level
    with pytest.raises(ValueError, match="unknown instruction set level 'mmx'"):
        isthmus.set_isa("mmx")


def test_isa_comes_from_the_environment():
    script = "import isthmus; print(isthmus.get_isa())"

    def run(level):
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"ISTHMUS_ISA": level, "PATH": ""}
        )

    assert run("baseline").stdout.strip() == "baseline"
    assert "ISTHMUS_ISA" in run("mmx").stderr or "mmx" in run("mmx").stderr


def test_build_info():
    info = isthmus.build_info()
    assert info["torch"] == torch.__version__
    assert info["isa"] in info["isa_available"]
    assert info["version"] == isthmus.__version__
    assert info["cuda"]


UNRESOLVED = """
import importlib
def refuse(name, *package):
    raise OSError("undefined symbol: torch_parallel_for")
importlib.import_module = refuse
"""


@pytest.mark.parametrize(
    ("preparation", "sentence"),
    [
        ("sys.modules['isthmus._C'] = None", "isthmus is not compiled: its extension isthmus._C does not exist"),
        (UNRESOLVED, "its extension does not load under torch"),
        (UNRESOLVED, "undefined symbol: torch_parallel_for"),
        ("torch.__version__ = '2.9.1'", "isthmus needs torch 2.10 or later; this is torch 2.9.1"),
    ],
)
def test_a_broken_installation_says_so(preparation, sentence):
    script = f"import sys, torch\n{preparation}\nimport isthmus"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError" in run.stderr and sentence in run.stderr
