"""A short run of benchmarks/bad_input.py, whose judge is shown every verdict first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Faults are forked from a process that has run no operator, which that of the tests has.
SHORT = f"""
import sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import bad_input
with tempfile.TemporaryDirectory() as folder:
    material = bad_input.prepare(Path(folder))
    bad_input.import_everything()
    outcomes = list(bad_input.run(material, count=42, seed=7))
for outcome in outcomes:
    if outcome.kind != "clear":
        print(outcome.kind, outcome.fault.group, repr(outcome.fault.name), repr(outcome.reason))
print(len(outcomes), "faults")
"""


def out_of_memory() -> None:
    bytearray(2**34)


def leave_a_temporary_file() -> None:
    Path(".model.onnx.x.tmp").write_bytes(b"")


def raise_clearly() -> None:
    from rkd_deploy.errors import DataError

    raise DataError("This is an error that says what is wrong.")


def escape() -> None:
    print("\x1b[31m")


VERDICTS: dict[str, tuple[Callable[[], object], str, str]] = {
    "a result": (lambda: None, "clear", ""),
    "an error of the package": (raise_clearly, "clear", "says what is wrong"),
    "a command that was wrong": (lambda: (print("Error: no"), sys.exit(2)), "clear", "2"),  # type: ignore[func-returns-value]
    "another exception": (lambda: {}["x"], "rough", "KeyError"),
    "an exit without a word": (lambda: sys.exit(1), "rough", "without a word"),
    "an undocumented exit": (lambda: sys.exit(7), "rough", "exit code 7"),
    "no end": (lambda: time.sleep(60), "bad", "did not end in time"),
    "a process that dies": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "bad", "SIGSEGV"),
    "memory without bound": (out_of_memory, "bad", "memory"),
    "a temporary file": (leave_a_temporary_file, "bad", "left behind"),
    "an escape sequence": (escape, "bad", "reached the terminal"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_judge_gives_every_verdict(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bad_input
    from damage import Fault

    run, kind, reason = VERDICTS[name]
    seconds = 1.0 if name == "no end" else 60.0
    outcome = bad_input.judge(Fault("calls", name, run, by_command=True), seconds=seconds)
    assert (outcome.kind, reason in outcome.reason) == (kind, True), outcome


def test_a_fault_is_drawn_from_its_number_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from damage import Material
    from faults import GROUPS, draw

    (tmp_path / "recipe.toml").write_text("[data]\nname = 'digits'\n")
    (tmp_path / "bench.json").write_text("{}")
    material = Material(tmp_path, tmp_path, tmp_path / "bench.json", tmp_path / "photo.jpg")
    names = [draw(material, 3, number).name for number in range(28)]
    assert names == [draw(material, 3, number).name for number in range(28)]
    assert names != [draw(material, 4, number).name for number in range(28)]
    assert {draw(material, 3, number).group for number in range(28)} == set(GROUPS)


def test_42_faults_are_clear() -> None:
    import subprocess

    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["42 faults"]
