"""The stopwatch: ratios of turns in closed form, and two networks of which one is plainly slower."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from rkd_deploy.backends import RunOn
from rkd_deploy.bench.timing import Timing
from rkd_deploy.export.measuring import ExportStopwatch, paired_ratio
from rkd_deploy.models.families.cifar_resnet import CifarResNet

DRIFT = [1.0, 1.0, 1.5, 2.0, 4.0, 4.0, 3.0, 1.0, 1.0, 1.0, 1.0]


def timing(turns: list[float]) -> Timing:
    """Turns of three calls each: the median, and one on either side."""
    samples = tuple(sample for turn in turns for sample in (0.9 * turn, turn, 5 * turn))
    return Timing(samples, 1, True, 1.0, 2, 0.1, rounds=(3,) * len(turns))


def test_what_slows_both_down_cancels_out() -> None:
    ratio, interval = paired_ratio(timing([1.25 * one for one in DRIFT]), timing(DRIFT))
    assert ratio == pytest.approx(1.25)
    assert interval == pytest.approx((1.25, 1.25))


def test_a_turn_that_was_disturbed_is_left_out_and_the_interval_is_that_of_the_binomial() -> None:
    """The 2nd and the 10th of 11 turns bound the median: P(B <= 1) = 12 / 2048, P(B <= 2) = 67 / 2048, 2.5 % amid."""
    factors = [9.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 0.1]
    ratio, interval = paired_ratio(timing([f * d for f, d in zip(factors, DRIFT, strict=True)]), timing(DRIFT))
    assert ratio == pytest.approx(1.4)
    assert interval == pytest.approx((1.0, 1.8))


def test_the_slower_of_two_networks_is_told() -> None:
    S0 = CifarResNet(8, (16, 16, 32, 64), 4).eval()
    wide = CifarResNet(8, (32, 32, 64, 128), 4).eval()
    with ExportStopwatch(RunOn(threads=1), (2,), input_size=(16, 16)) as stopwatch:
        same, slower = (stopwatch.compare(network, S0, level="tail", confirm=True) for network in (S0, wide))
        assert 0.8 < same.worst < 1.25
        assert slower.worst > 1.5  # 4 times the MACs
        assert stopwatch.compare(wide, S0, level="tail", confirm=False).worst > 1.5
        assert stopwatch.describe()["clock"] == "CPU time of the process"
    low, high = slower.intervals[2]
    assert low <= slower.ratios[2] <= high
    json.dumps(asdict(slower), allow_nan=False)
