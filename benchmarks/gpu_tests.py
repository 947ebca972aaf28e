"""Parts `tests` and `rung` of gpu.py: tests under the mark gpu, a rung of the ladder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from gpu_rows import Rows

REPO = Path(__file__).parents[1]


def run(rows: Rows) -> None:
    """Run every test that has the mark and no row yet; each gets its row when it is over, so a crash loses one."""
    files = [file for file in sorted((REPO / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    os.chdir(REPO)
    plain = "addopts=--import-mode=importlib --strict-markers"
    # Other versions than those that the tests are pinned to warn of other things.
    options = ["-o", plain, "-o", "filterwarnings=", "-m", "gpu", "-p", "no:cacheprovider", "-q", "--no-header"]
    options += ["--tb=no", "--no-summary", "--disable-warnings", "--continue-on-collection-errors"]
    code = pytest.main([*options, *map(str, files)], plugins=[_Reporter(rows)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")


class _Reporter:
    """Writes a row for each test; those without what they need share one."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._skipped: dict[str, int] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._rows]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._rows.add(report.nodeid, outcome="error", why=report.longreprtext.splitlines()[-12:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            self._skipped[reason] = self._skipped.get(reason, 0) + 1
        elif report.when == "call" or report.failed:
            why = {} if report.passed else {"why": report.longreprtext.splitlines()[-16:]}
            self._rows.add(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **why)

    def pytest_sessionfinish(self) -> None:
        if self._skipped:
            self._rows.add("skipped", reasons=self._skipped)


def run_rung(rows: Rows) -> None:
    """One seed of the ladder's rung on scikit-learn's digits, held-out accuracies."""
    with tempfile.TemporaryDirectory(prefix="rkd-gpu-") as folder:
        command = [sys.executable, str(REPO / "benchmarks/ladder.py"), "digits", "--seeds", "1", "--root", folder]
        command += ["--held-out", "--set", f"train.device={rows.device}"]
        if rows.tiny:
            command += ["--row", "S0, KD", "--set", "train.epochs=1", "--set", "teacher.epochs=1"]
        environment = {**os.environ, "COLUMNS": "120"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(5.0, rows.seconds_left), env=environment
        )
    for line in done.stdout.splitlines():
        name, _, figures = line.partition(": ")
        if "held out" in figures:
            rows.add(name, held_out=figures)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-12:]))
