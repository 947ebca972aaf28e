"""LoadGen itself drives real models; its log is held against what the model got."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from rkd_deploy.backends import load_backend
from rkd_deploy.backends.protocol import ModelInfo
from rkd_deploy.bench.mlperf import (
    LIBRARY,
    MULTI_STREAM_IMAGES,
    SCENARIOS,
    Load,
    check_scenarios,
    library,
    read_loadgen_log,
    run_scenario,
)
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.errors import BackendError, UsageError
from rkd_deploy.report.writing import bench_markdown
from tests.support.benching import bench_settings

BRIEF = {"min_seconds": 0.2, "min_queries": 10}
SLEEP = 0.002


class Sleeper:
    """A backend that takes 2 ms a call and remembers the batches it was given."""

    name, device = "sleeper", "cpu"

    def __init__(self, fixed=None, cuda_graph=None):
        self.batches = []
        self.info = ModelInfo(input_name="x", input_shape=(fixed, 4), input_dtype="float32", cuda_graph=cuda_graph)

    def infer(self, x):
        self.batches.append(len(x))
        time.sleep(SLEEP)
        return np.zeros((len(x), 3), np.float32)


@pytest.mark.parametrize(
    ("scenario", "batches"),
    [("SingleStream", {1}), ("MultiStream", {MULTI_STREAM_IMAGES}), ("Offline", {4})],
)
def test_each_scenario_asks_in_its_own_way_and_is_told_the_time_it_took(scenario, batches, tmp_path):
    backend = Sleeper()
    load = Load(**BRIEF, max_batch=4 if scenario == "Offline" else 32)
    facts = run_scenario(backend, library(backend, None, 0), scenario, tmp_path / "logs", load)
    assert batches <= set(backend.batches)
    if scenario != "Offline":
        assert set(backend.batches) == batches
        # A sleep never ends early; LoadGen measures at least that, in its own clock.
        assert 1000 * SLEEP <= facts["p50_ms"] < 1000 * SLEEP + 30
        assert facts["p50_ms"] <= facts["p90_ms"] <= facts["p99_ms"]
    images = max(batches)
    assert 0 < facts["samples_per_s"] <= images / SLEEP
    assert facts["target_qps"] is None
    summary = (tmp_path / "logs/mlperf_log_summary.txt").read_text()
    assert f"Scenario : {scenario}" in summary
    assert f"Result is : {'VALID' if facts['valid'] else 'INVALID'}" in summary


@pytest.mark.parametrize("cuda_graph", [None, True])
def test_a_server_answers_what_waits_together_unless_that_means_a_new_graph(cuda_graph, tmp_path):
    """1,500 queries a second of a model that takes 2 ms a call: one at a time it could answer a third of them."""
    backend = Sleeper(cuda_graph=cuda_graph)
    load = Load(min_seconds=0.3, min_queries=10, target_qps=1500, target_latency_ms=50, max_batch=20)
    facts = run_scenario(backend, library(backend, None, 0), "Server", tmp_path / "logs", load)
    assert facts["target_qps"] == 1500
    assert facts["p50_ms"] >= 1000 * SLEEP
    if cuda_graph:
        assert set(backend.batches) == {1}
        assert facts["samples_per_s"] <= 1 / SLEEP
        assert not facts["valid"]
    else:
        assert set(backend.batches) <= {1, 2, 4, 8, 16}
        assert facts["samples_per_s"] > 2 / SLEEP
    assert "Scenario : Server" in (tmp_path / "logs/mlperf_log_summary.txt").read_text()


def test_what_the_model_answers_reaches_loadgen_for_every_query(zoo, tmp_path):
    with load_backend("onnxruntime", zoo.build(tmp_path / "m.onnx"), threads=1) as backend:
        inputs = library(backend, None, seed=0)
        assert len({x.tobytes() for x in inputs}) == LIBRARY
        facts = run_scenario(backend, inputs, "SingleStream", tmp_path / "logs", Load(**BRIEF))
    assert facts["valid"]
    assert facts["queries"] >= 10
    assert read_loadgen_log(tmp_path / "logs/mlperf_log_detail.txt")["result_query_count"] == facts["queries"]


def test_a_fixed_batch_of_one_is_asked_for_one_by_one(tmp_path):
    backend = Sleeper(fixed=1)
    run_scenario(backend, library(backend, None, 0), "MultiStream", tmp_path / "logs", Load(**BRIEF))
    assert set(backend.batches) == {1}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_model_that_fails_in_the_middle_is_an_error_and_no_crash(scenario, tmp_path):
    class Failing(Sleeper):
        queries = 0

        def infer(self, x):
            self.queries += any(tmp_path.glob(".logs.*"))  # before, it is our own estimate that runs
            if self.queries == 5:
                raise BackendError("out of memory")
            return super().infer(x)

    backend = Failing()
    load = Load(min_seconds=0.5, min_queries=50, target_qps=400, max_batch=1)
    with pytest.raises(BackendError, match="out of memory"):
        run_scenario(backend, library(backend, None, 0), scenario, tmp_path / "logs", load)
    assert not list(tmp_path.iterdir())


def test_a_log_without_a_result_is_refused(tmp_path):
    (tmp_path / "mlperf_log_detail.txt").write_text(':::MLLOG {"key": "loadgen_version", "value": "6"}\n')
    for name in ("mlperf_log_detail.txt", "absent.txt"):
        with pytest.raises(BackendError, match="wrote no result"):
            read_loadgen_log(tmp_path / name)


@pytest.mark.parametrize("field", ["min_seconds", "min_queries", "target_qps", "target_latency_ms", "max_batch"])
def test_numbers_that_are_not_above_zero_are_refused(field):
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=rf"{field} (is 0|{value} must be)"):
            Load(**{field: value})


def test_scenarios_are_spelled_as_mlperf_spells_them():
    check_scenarios(SCENARIOS)
    with pytest.raises(UsageError, match="Did you mean 'SingleStream'"):
        check_scenarios(["singlestream"])


def test_a_report_calls_it_unofficial_everywhere_and_keeps_the_logs(bundle, tmp_path):
    short = {"batches": [1], "threads": 1, "min_seconds": 0.01, "min_runs": 5, "warmup_seconds": 0.0}
    stale = tmp_path / "out/loadgen-SingleStream-onnxruntime-1-1-sums/stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier bench")
    done = record_bench(
        [bundle],
        bench_settings(**short),
        tmp_path / "out",
        scenarios=["SingleStream", "MultiStream"],
        load=Load(**BRIEF),
    )
    assert not stale.exists()
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert [row["scenario"] for row in record["loadgen"]] == ["SingleStream", "MultiStream"]
    for row in record["loadgen"]:
        assert row["label"] == "LoadGen, unofficial"
        assert (row["model"], row["backend"], row["threads"]) == ("sums", "onnxruntime", 1)
        assert "MLPerf Results Summary" in (tmp_path / "out" / row["logs"] / "mlperf_log_summary.txt").read_text()
    assert "LoadGen, unofficial" in bench_markdown(read_bench(done.path))
    assert len(done.scenarios) == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_ctrl_c_during_loadgen_keeps_the_bench_and_drops_the_half_log(zoo, tmp_path, interrupted):
    options = ("--end-to-end", "--batch", 1, "--seconds", 1, "--warmup", 0, "--scenario", "SingleStream")

    def loading(_):
        begun = list(tmp_path.glob("out/.loadgen-*"))
        time.sleep(0.1 * len(begun))  # into its queries
        return begun

    _, err, record = interrupted(loading, zoo.build(tmp_path / "m.onnx"), *options)
    assert "marked as partial" in err
    assert (len(record["results"]), record["loadgen"]) == (1, [])
    assert record["results"][0]["complete"]
    assert not list(tmp_path.glob("out/*loadgen*"))
