"""The files of a comparison, read back; the picture by what is drawn in it."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import BenchSettings
from rkd_deploy.compare import compare_runs, print_comparison, timed, write_comparison
from rkd_deploy.compare.report import comparison_figure

SETTINGS = BenchSettings(run_on=(RunOn(threads=1),), batches=(1,), min_seconds=0.01)


@pytest.fixture(scope="session")
def comparison(finished):
    return timed(compare_runs([finished["seed0"], finished["kd"]]), SETTINGS)


def test_every_network_is_timed(comparison):
    for row in comparison.rows:
        assert 0 < row.p50_ms <= row.p90_ms
        # Of a hundredth of a second on a busy machine, an end of the interval may not exist.
        assert (row.p50_low_ms or 0) <= row.p50_ms <= (row.p50_high_ms or math.inf)


def test_the_files_hold_every_row(comparison, tmp_path):
    files = write_comparison(comparison, tmp_path)
    record = json.loads(files.record.read_text())
    assert [row["name"] for row in record["rows"]] == [row.name for row in comparison.rows]
    assert record["provenance"]["python"]
    how = {"backend": "onnxruntime", "device": None, "batches": [1], "threads": 1, "min_seconds": 0.01}
    assert record["settings"] == how
    lines = files.table.read_text().splitlines()
    fused = next(row for row in comparison.rows if row.part == "fused")
    (line,) = [line for line in lines if line.startswith("| S + A, sequential |")]
    assert f"| {fused.top1:.2f} |" in line
    assert f"| {fused.over_student:+.2f} |" in line
    assert files.plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_terminal_gets_the_table_and_what_is_missing(finished):
    console = Console(file=io.StringIO(), width=200)
    print_comparison(compare_runs([finished["lone"]]), console)
    shown = console.file.getvalue()
    assert "S + A, sequential" in shown
    assert "Missing:" in shown
    assert "p50" not in shown  # nothing was timed


def test_the_picture_shows_the_numbers_of_the_rows(comparison):
    accuracy, macs, latency = comparison_figure(comparison).axes
    drawn = [container.lines[0].get_xdata()[0] for container in accuracy.containers]
    assert drawn == pytest.approx([row.top1 for row in comparison.rows])
    assert [bar.get_width() for bar in macs.patches] == pytest.approx([row.macs / 1e6 for row in comparison.rows])
    assert [bar.get_width() for bar in latency.patches] == pytest.approx([row.p50_ms for row in comparison.rows])
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [row.name for row in comparison.rows]
    low, high = accuracy.get_xlim()
    assert all(low < row.top1 < high for row in comparison.rows)


def test_without_latency_there_are_two_panels(finished):
    assert len(comparison_figure(compare_runs([finished["kd"]])).axes) == 2
