"""Verdicts: intervals against closed forms and draws, and each outcome once."""

from __future__ import annotations

import random

import pytest

from rkd_deploy.decoding import decode
from rkd_deploy.train.facts import Pairs, RunMetrics
from rkd_deploy.train.verdict import (
    Gain,
    Verdict,
    gain_of_pairs,
    gain_of_samples,
    gain_of_seeds,
    of_metrics,
    of_series,
    pairs_of,
)

NAMES = {"fused": "S + A", "s0": "S0", "control": "S0, same losses", "student": "S alone"}


def test_pairs_count_what_only_one_has_right() -> None:
    ours, others = [True, True, False, True, False], [True, False, True, False, False]
    assert pairs_of(ours, others) == Pairs(gained=2, lost=1)
    assert pairs_of(ours, ours) == Pairs(gained=0, lost=0)


def test_the_interval_of_pairs_is_that_of_agresti_and_min() -> None:
    """Their example, approval of a prime minister: 150 of 1,600 changed one way and 86 the other."""
    gain = gain_of_pairs(150, 86, 1600)
    assert gain.points == pytest.approx(4.0)
    assert (gain.low, gain.high) == pytest.approx((2.12, 5.87), abs=0.01)
    nothing = gain_of_pairs(0, 0, 100)  # no two answers differ: still no certainty
    assert nothing.low < 0 < nothing.high


def test_the_interval_of_pairs_holds_the_truth_in_19_of_20_draws() -> None:
    draw, n, held = random.Random(0), 400, 0
    for _ in range(500):
        kinds = draw.choices(("gained", "lost", "same"), (0.08, 0.05, 0.87), k=n)
        gain = gain_of_pairs(kinds.count("gained"), kinds.count("lost"), n)
        held += gain.low <= 3.0 <= gain.high
    assert 0.92 < held / 500 < 0.98


def test_the_interval_of_seeds_is_students() -> None:
    gain = gain_of_seeds([71.0, 72.0, 73.0], [70.0, 70.0, 70.0])
    assert (gain.points, gain.seeds) == (2.0, 3)
    assert (gain.low, gain.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    many = gain_of_seeds([71.0, 72.0] * 10, [70.0] * 20)
    assert many.high - many.low == pytest.approx(2 * 2.131 * 0.51299 / 20**0.5, rel=1e-3)


def test_two_runs_of_one_seed_are_as_two_samples() -> None:
    gain = gain_of_samples(60.0, 50.0, 100)
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * (24 + 25) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "outcome", "end"),
    [
        (0.1, 2.0, "better", "1.00 of its MACs: better."),
        (-0.1, 2.0, "open", "not shown better."),
        (-2.0, -0.1, "worse", "worse: ship S0, same losses (export --part control)."),
    ],
)
def test_outcomes(low: float, high: float, outcome: str, end: str) -> None:
    gain = Gain(points=(low + high) / 2, low=low, high=high, seeds=3)
    verdict = Verdict(network="S + A", control="control", control_name="S0, same losses", gain=gain, cost_ratio=1.0)
    assert verdict.outcome == outcome
    assert verdict.sentence().endswith(end)
    assert "3 seeds" in verdict.sentence()


def test_the_best_control_is_the_one_to_beat() -> None:
    parts = {
        part: {"test_top1": top1, "macs": 10, "test_images": 200}
        for part, top1 in (("fused", 60.0), ("s0", 50.0), ("control", 58.0), ("student", 55.0), ("teacher", 90.0))
    }
    seconds = {"training_seconds": 1.0, "evaluation_seconds": 1.0, "peak_memory_mb": 1.0}
    of_run = {"parts": {part: {"parameters": 1} | results for part, results in parts.items()}, "phases": {}, **seconds}
    pairs = {part: {"gained": 10, "lost": 6} for part in ("s0", "control", "student")}
    verdict = of_metrics(decode(RunMetrics, of_run | {"pairs": pairs}), NAMES)
    assert verdict is not None
    assert verdict.control == "control"
    assert verdict.gain.points == 2.0
    assert of_metrics(decode(RunMetrics, of_run), NAMES) is None  # a run of before, or without S + A
    series = {
        part: {**facts, "mean": facts["test_top1"], "test_top1": [facts["test_top1"]] * 2}
        for part, facts in parts.items()
    }
    judged = of_series(series, NAMES)
    assert judged is not None
    assert (judged.control, judged.gain.points, judged.gain.seeds) == ("control", 2.0, 2)
    assert of_series({"s0": series["s0"]}, NAMES) is None
