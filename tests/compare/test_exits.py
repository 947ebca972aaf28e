"""Early exit in a comparison: what it says at each threshold, by the networks that it lies between."""

from __future__ import annotations

import html

import pytest

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import BenchSettings
from rkd_deploy.compare import compare_runs, read_comparison, timed, write_comparison, write_comparison_report
from rkd_deploy.compare import timing as timing_of_rows
from rkd_deploy.errors import UsageError

SETTINGS = BenchSettings(run_on=(RunOn(threads=1),), batches=(1,), min_seconds=0.01)


@pytest.fixture(scope="module")
def comparison(finished):
    return timed(compare_runs([finished["seed0"], finished["kd"]]), SETTINGS, early_exit=True)


def test_a_curve_leads_from_s_alone_to_s_and_a(comparison):
    rows = {row.part: row for row in comparison.rows}
    (curve,) = comparison.exits
    first, *_, last = curve.points
    assert curve.network == rows["fused"].name
    assert (first.assistant_share, last.assistant_share) == (0, 1)
    assert first.top1 == pytest.approx(rows["student"].top1)
    assert last.top1 == pytest.approx(rows["fused"].top1)
    assert last.macs == rows["fused"].graph_macs
    assert last.macs_ratio == pytest.approx(last.macs / rows["s0"].macs)
    assert [point.threshold for point in curve.points] == sorted(point.threshold for point in curve.points)
    assert [point.chosen for point in curve.points].count(True) == 1
    step_ms, step_macs = last.mean_ms - first.mean_ms, last.macs - first.macs
    for point in curve.points:  # one assistant: every mean lies on the line between its two ways
        assert point.mean_ms == pytest.approx(first.mean_ms + point.assistant_share * step_ms)
        assert point.macs == pytest.approx(first.macs + point.assistant_share * step_macs)
        assert point.mean_ms / point.time_ratio == pytest.approx(first.mean_ms / first.time_ratio)


def test_record_and_page_hold_it(comparison, tmp_path):
    files = write_comparison(comparison, tmp_path)
    recorded = read_comparison(files.record)
    assert recorded.comparison.exits == comparison.exits
    assert comparison.exits[0].sentence() in files.table.read_text()
    pages = write_comparison_report(recorded, tmp_path)
    assert comparison.exits[0].sentence() in html.unescape(pages.page.read_text())


def test_what_cannot_leave_early_is_named(finished, monkeypatch):
    export = timing_of_rows.export_run

    def refusing(run, **how):
        if how.get("early_exit"):
            raise UsageError("no images are held out")
        return export(run, **how)

    monkeypatch.setattr(timing_of_rows, "export_run", refusing)
    comparison = timed(compare_runs([finished["seed0"]]), SETTINGS, early_exit=True)
    assert comparison.exits == ()
    assert any(
        line.startswith("early exit of S + A") and "no images are held out" in line for line in comparison.missing
    )
    with pytest.raises(UsageError, match=r"pytorch does not run"):
        timed(comparison, BenchSettings(run_on=(RunOn("pytorch"),), batches=(1,)), early_exit=True)
