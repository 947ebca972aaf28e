"""Ratios of latencies: by hand, coverage by simulation, the command by its exit codes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rkd_deploy.bench import compare
from rkd_deploy.bench.compare import differing_environment, recorded_ratio, recorded_ratios
from rkd_deploy.bench.machine import Provenance
from rkd_deploy.bench.results import result_of_row
from rkd_deploy.bench.statistics import Judgement, judge
from rkd_deploy.errors import UsageError


def result(medians, model="net", batch=1, **facts):
    known = {"backend": "onnxruntime", "precision": "fp32", "device": "cpu", "batch": batch, "threads": None}
    figures = {
        "transfers": True,
        "p50_ms": 1.0,
        "mean_ms": 1.0,
        "cv": 0.1,
        "throughput_per_s": 1.0,
        "first_run_ms": 1.0,
    }
    row = {"model": model, "file_bytes": 1, "runs": 1, **figures, **known, **facts}
    return result_of_row({**row, "round_medians_ms": medians})


def test_sessions_are_judged_by_the_median_of_their_ratios_and_eight_bound_it_by_the_extremes():
    # Of 8, all lie on one side of the median with probability 2 / 2^8 = 0.8 %; 7 or more would be 7 %, too likely.
    judgement = judge([1.1, 0.9, 1.2, 1.0, 1.3, 1.05, 1.15, 0.95])
    assert (judgement.ratio, judgement.low, judgement.high) == (1.05, 0.9, 1.3)
    # Of 11 the 2nd and the 10th: P(B <= 1) = 12 / 2048, P(B <= 2) = 67 / 2048, with 2.5 % between them.
    judgement = judge([9.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 0.1])
    assert (judgement.ratio, judgement.low, judgement.high) == (1.4, 1.0, 1.8)


def test_too_few_sessions_bound_nothing():
    assert judge([2.0] * 5) == Judgement(2.0, 0.0, math.inf)


def test_drift_widens_the_ratio_of_records():
    drift = np.linspace(1, 3, 20)
    judgement = recorded_ratio(drift.tolist(), (1.1 * drift).tolist())
    assert judgement.low < 1 < 1.1 < judgement.high


def by_sessions(a, b):
    return judge([y / x for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("compared", [by_sessions, recorded_ratio])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(compared):
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        # Log-normal, skewed as latencies are: the median is exp(0) = 1 for A and 1.05 for B.
        a, b = np.exp(generator.normal(0, 0.1, (2, 20)))
        judgement = compared(a.tolist(), (1.05 * b).tolist())
        covered += judgement.low <= 1.05 <= judgement.high
    # Binomial(400, 0.95) lies above 362 with 99.9 %; a method of 85 % would be found.
    assert covered > 362


@pytest.mark.parametrize(
    ("b", "verdict"), [([0.9] * 20, "faster"), ([1.1] * 20, "slower"), ([0.9, 1.1] * 10, "not shown")]
)
def test_a_verdict_needs_an_interval_without_1(b, verdict):
    (ratio,) = recorded_ratios([result([1.0] * 20)], [result(b)])
    assert ratio.verdict == verdict
    assert json.loads(json.dumps(ratio.to_dict(), allow_nan=False))["verdict"] == verdict


def test_records_are_joined_by_the_conditions_they_share():
    ratios = recorded_ratios(
        [result([1.0] * 9), result([2.0] * 9, batch=8)], [result([3.0] * 9, batch=8), result([1.0] * 9, batch=32)]
    )
    assert [(ratio.batch, ratio.ratio, ratio.unit, ratio.count) for ratio in ratios] == [(8, 1.5, "turns", 9)]


def test_records_without_a_common_condition_and_with_several_models_are_refused():
    with pytest.raises(UsageError, match="same conditions"):
        recorded_ratios([result([1.0])], [result([1.0], backend="openvino")])
    with pytest.raises(UsageError, match=r"several models \(net, other\)"):
        recorded_ratios([result([1.0]), result([1.0], model="other")], [result([1.0])])


def test_records_without_turns_are_refused():
    with pytest.raises(UsageError, match="net holds no turns"):
        recorded_ratios([result([1.0])], [result([])])


def test_differences_of_machine_and_versions_are_named():
    first = Provenance(cpu="X", cores=2, versions={"onnxruntime": "1.32", "torch": None})
    other = Provenance(cpu="Y", cores=2, versions={"onnxruntime": "1.33"})
    assert differing_environment(first, other) == ["cpu: X and Y", "onnxruntime: 1.32 and 1.33"]
    assert differing_environment(first, first) == []


def test_both_models_are_loaded_first_by_turns_and_keep_their_sides(monkeypatch):
    from types import SimpleNamespace

    loaded = []

    def bench(models, settings):
        loaded.append(tuple(models))
        facts = {"backend": "onnxruntime", "device": "cpu", "threads": None}
        times = {"a": 1.0, "b": 1.5}
        return [
            SimpleNamespace(model=m, batch=n, p50_ms=n * times[m], **facts) for n in settings.batches for m in models
        ]

    monkeypatch.setattr(compare, "bench", bench)  # its times are known here; the real one is run by the command's test
    ratios = compare.measure_ratios("a", "b", batches=(1, 8))
    assert loaded == [("a", "b"), ("b", "a")] * 4
    assert [(ratio.a, ratio.b, ratio.batch, ratio.ratio, ratio.low, ratio.high) for ratio in ratios] == [
        ("a", "b", 1, 1.5, 1.5, 1.5),
        ("a", "b", 8, 1.5, 1.5, 1.5),
    ]
