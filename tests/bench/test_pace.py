"""The machine's own pace: it is reported, and changes no figure."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import _pace, bench
from rkd_deploy.bench.compare import recorded_ratio, recorded_ratios
from rkd_deploy.bench.pace import Pace, _aligned
from rkd_deploy.bench.results import Figures, Result, result_of_row
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.report.conditions import pace_lines
from tests.support.benching import bench_settings

TIMING = Timing(
    samples_ms=(4.0, 5.0, 6.0) * 100,
    batch=1,
    transfers=True,
    first_run_ms=9.0,
    warmup_runs=1,
    warmup_seconds=0.1,
    rounds=(50,) * 6,
    paces_ms=(0.9, 0.6, 0.7, 0.7, 0.8, 0.6),
)


def result(pace_ms, **facts):
    known = {"model": "m", "backend": "b", "device": "cpu", "precision": "fp32", "file_bytes": 1}
    return Result.from_timing(replace(TIMING, paces_ms=(pace_ms,)), **known | facts)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pace_is_the_time_of_some_work(threads):
    pace = Pace(threads)
    times = [pace() for _ in range(3)]
    pace.close()
    assert all(0.01 < ms < 1000 for ms in times)


def test_the_same_samples_give_the_same_figures_whatever_the_pace():
    quiet, disturbed = Figures.of(TIMING), Figures.of(replace(TIMING, paces_ms=(70.0,)))
    assert (quiet.pop("pace_ms"), disturbed.pop("pace_ms")) == (0.7, 70.0)
    assert quiet == disturbed
    assert quiet["percentiles"][50].low_ms == TIMING.interval(50)[0]


def test_records_that_told_a_slowdown_are_read_and_compared_by_their_turns_alone():
    row = json.loads(json.dumps(result(0.7).to_row()))
    quiet, disturbed = result_of_row(row), result_of_row(row | {"slowdown": 1.7})
    assert quiet == disturbed
    (ratio,) = recorded_ratios([quiet], [disturbed])
    expected = recorded_ratio(quiet.round_medians_ms, quiet.round_medians_ms)
    assert (ratio.ratio, ratio.low, ratio.high) == (expected.ratio, expected.low, expected.high)


def test_a_bench_reports_the_pace_beside_each_kind_of_figures(bundle):
    (first,) = bench(
        [bundle], bench_settings(batches=[1], threads=1, min_seconds=0, min_runs=20, warmup_seconds=0, transfers=None)
    )
    assert first.pace_ms > 0
    assert first.device_only.pace_ms > 0
    assert "slowdown" not in first.to_row()


def test_a_pace_that_changed_within_a_bench_is_said_of_equal_threads_alone():
    assert pace_lines([result(1.0), result(1.05)]) == []
    assert pace_lines([result(1.0, threads=1), result(2.0, threads=2)]) == []
    (line,) = pace_lines([result(1.0), result(1.6), result(1.2)])
    assert "up to 1.60 times slower" in line


def test_the_work_lies_alike_in_every_process():
    x, y = _aligned()
    assert (x.ctypes.data % 64, y.ctypes.data % 64) == (0, 0)
    assert abs(y.ctypes.data - x.ctypes.data) % 4096 == 2048
    assert not np.shares_memory(x, y)


def test_cores_tell_nothing_of_a_gpu():
    assert _pace(RunOn("tensorrt"), "cuda:0") is None
