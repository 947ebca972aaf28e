"""The machine's own pace: what it is, what is remembered, what it does to an interval."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import _pace, bench
from rkd_deploy.bench.compare import recorded_ratio
from rkd_deploy.bench.machine import Pace, _aligned, remembered_paces
from rkd_deploy.bench.records import record_bench
from rkd_deploy.bench.results import Figures
from rkd_deploy.bench.statistics import Timing
from tests.support.benching import bench_settings

TIMING = Timing(
    samples_ms=(4.0, 5.0, 6.0) * 100,
    batch=1,
    transfers=True,
    first_run_ms=9.0,
    warmup_runs=1,
    warmup_seconds=0.1,
    rounds=(100, 100, 100),
    paces_ms=(0.9, 0.6, 0.7),
)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_fastest_pace_is_remembered_between_benches(tmp_path, threads):
    kept = tmp_path / "cache" / "pace.json"
    first = Pace(threads, kept)
    assert first.best_ms is None
    found = [first() for _ in range(5)]
    first.close()
    assert min(found) > 0
    assert first.best_ms == min(found) == Pace(threads, kept).best_ms


def test_a_faster_pace_of_before_stands_and_a_slower_one_does_not(tmp_path):
    kept = tmp_path / "pace.json"
    pace = Pace(1, kept)
    (key,) = _remember(pace, kept)
    for known, stands in ((1e-6, True), (1e6, False)):
        kept.write_text(json.dumps({key: known, "another machine": 0.5}))
        again = Pace(1, kept)
        found = again()
        again.close()
        assert again.best_ms == (known if stands else found)
        assert json.loads(kept.read_text()) == {key: again.best_ms, "another machine": 0.5}


def _remember(pace, kept):
    pace()
    pace.close()
    return json.loads(kept.read_text())


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"key": "text"}', "no JSON"])
def test_a_spoilt_file_is_forgotten(tmp_path, content):
    kept = tmp_path / "pace.json"
    kept.write_text(content)
    pace = Pace(1, kept)
    assert pace.best_ms is None
    assert list(_remember(pace, kept).values()) == [pace.best_ms]


def test_a_place_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    pace = Pace(1, tmp_path / "file" / "pace.json")
    pace()
    pace.close()


def test_slowdown_is_the_median_pace_over_the_fastest_known_and_never_below_1():
    assert TIMING.slowdown(0.35) == pytest.approx(0.7 / 0.35)
    assert TIMING.slowdown(0.8) == 1
    assert TIMING.slowdown(None) == replace(TIMING, paces_ms=()).slowdown(0.1) == 1


def test_the_low_ends_are_divided_by_the_slowdown_and_nothing_else_is_touched():
    plain, disturbed = Figures.of(TIMING), Figures.of(TIMING, 0.35)
    changed = {key: (plain[key], value) for key, value in disturbed.items() if value != plain[key]}
    assert changed.pop("slowdown") == (1, 2)
    assert set(changed) == {f"p{q}_low_ms" for q in ("50", "90", "95", "99", "99_9")} - {
        key for key, value in plain.items() if value is None
    }
    assert all(after == before / 2 for before, after in changed.values())
    assert disturbed["pace_ms"] == 0.7


def test_records_of_a_disturbed_and_a_quiet_machine_do_not_contradict_one_another():
    quiet, disturbed = [1.0] * 20, [1.6] * 20
    assert recorded_ratio(quiet, disturbed)[1] > 1
    assert recorded_ratio(quiet, disturbed, (1, 1.7)) == pytest.approx((1.6, 1.6 / 1.7, 1.6))
    assert recorded_ratio(disturbed, quiet, (1.7, 1)) == pytest.approx((1 / 1.6, 1 / 1.6, 1.7 / 1.6))


def test_a_bench_says_how_much_slower_the_machine_was(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("RKD_DEPLOY_CACHE", str(tmp_path))
    settings = {"batches": [1], "threads": 1, "min_seconds": 0, "min_runs": 20, "warmup_seconds": 0}
    (first,) = bench([bundle], bench_settings(**settings))
    key, best = next(iter(json.loads(remembered_paces().read_text()).items()))
    assert first.slowdown == pytest.approx(max(1, first.pace_ms / best))

    remembered_paces().write_text(json.dumps({key: best / 100}))
    told = record_bench([bundle], bench_settings(**settings), tmp_path / "out")
    (second,) = told.results
    assert second.slowdown == pytest.approx(100 * second.pace_ms / best)
    assert f"up to {second.slowdown:.2f} times slower" in told.conditions[-1]


def test_the_work_lies_alike_in_every_process():
    x, y = _aligned()
    assert (x.ctypes.data % 64, y.ctypes.data % 64) == (0, 0)
    assert abs(y.ctypes.data - x.ctypes.data) % 4096 == 2048
    assert not np.shares_memory(x, y)


def test_cores_tell_nothing_of_a_gpu():
    assert _pace(RunOn("tensorrt"), "cuda:0") is None
