"""The stopwatch on two networks of which one is plainly slower."""

from __future__ import annotations

import json
from dataclasses import asdict

from rkd_deploy.backends import RunOn
from rkd_deploy.bench.sessions import SESSIONS
from rkd_deploy.export.stopwatch import ExportStopwatch
from rkd_deploy.models.families.cifar_resnet import CifarResNet


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
    assert 1 < low <= slower.ratios[2] <= high
    assert slower.runs[2] >= SESSIONS * 2  # each session loads and times both afresh
    json.dumps(asdict(slower), allow_nan=False)
