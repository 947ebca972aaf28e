"""benchmarks/gpu.py on a CPU: a record after each part, what fails is a row, nothing is measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))


def measured(*more: object) -> tuple[str, dict[str, Any]]:
    """What a call printed, and its record."""
    command = [sys.executable, REPO / "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--only", "machine", *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout, json.loads(Path(json.loads(done.stdout.splitlines()[-1])["record"]).read_text())


def test_a_part_is_recorded_and_a_resumed_record_goes_on_where_it_was(tmp_path: Path) -> None:
    _, record = measured("--minutes", 3, "--out", tmp_path / "first")
    rows = {row["key"]: row for row in record["parts"]["machine"]["rows"]}
    assert record["parts"]["machine"]["complete"]
    assert rows["flops_fp32"]["value"] > 0
    assert {one["name"] for one in rows["facts"]["backends"]} >= {"onnxruntime", "pytorch", "tensorrt"}
    record["parts"]["machine"]["complete"] = False  # as if it had been cut off after its last row but one
    record["parts"]["machine"]["rows"] = [rows["facts"], {"key": "flops_fp32", "value": 1.0}]
    (tmp_path / "first" / "gpu.json").write_text(json.dumps(record))
    _, resumed = measured("--minutes", 3, "--resume", tmp_path / "first", "--out", tmp_path / "second")
    rows = {row["key"]: row for row in resumed["parts"]["machine"]["rows"]}
    assert rows["flops_fp32"]["value"] == 1.0  # measured before, and not again
    assert rows["bytes"]["value"] > 0
    said, _ = measured("--minutes", 0.1, "--resume", tmp_path / "first")
    assert "no time left; go on with --resume" in said


def test_what_fails_is_a_row_with_its_traceback_and_the_end_of_time_is_none(tmp_path: Path) -> None:
    from gpu_rows import OutOfTime, Rows, check_time, read_rows

    file = tmp_path / "rows.jsonl"
    rows = Rows(file, "cpu", True, time.monotonic() - 1)
    with rows.attempt("one"):
        raise ValueError("no such kernel")
    with pytest.raises(OutOfTime), rows.attempt("two"):
        check_time(rows, 1.0)
    file.write_text(file.read_text() + '{"key": "cut off')
    (row,) = read_rows(file)
    assert (row["key"], row["failed"]) == ("one", "ValueError: no such kernel")
    assert "raise ValueError" in "\n".join(row["traceback"])
    assert "one" in Rows(file, "cpu", True, 0.0)


def test_a_floor_is_the_larger_of_arithmetic_memory_and_launches() -> None:
    import torch
    from floors import Work, forward_work
    from torch import nn

    work = forward_work(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(2, 3, 6, 6))
    assert work == Work(flops=2 * 2 * 8 * 16 * 27, bytes=4 * (2 * (108 + 128) + 216), launches=1)
    machine = {"flops_fp32": 1e6, "bytes": 1e6, "kernel_s": 0.05}
    assert work.floor_ms(machine, "fp32") == pytest.approx(50.0)
    assert work.floor_ms(machine | {"kernel_s": 0.0}, "fp32") == pytest.approx(work.flops / 1e3)
    assert work.trained().launches == 3
