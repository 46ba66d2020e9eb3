"""Measures everything and writes the report: `python bench/run.py [--threads N] [pytest arguments]`."""

from __future__ import annotations

import argparse
import sys

import machine
import pytest
import report


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=machine.DEFAULT_THREADS)
    known, others = parser.parse_known_args()
    report.RESULTS.mkdir(exist_ok=True)
    target = report.RESULTS / f"{machine.name(known.threads)}.json"
    options = [f"--threads={known.threads}", f"--benchmark-json={target}", *others]
    code = pytest.main([str(report.ROOT / "bench"), *options])
    if code == 0:
        report.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
