from __future__ import annotations

from rkd_deploy.commands.options import fact_lines

CARD = {
    "name": "digits S + A",
    "outputs": ["logits", "features"],
    "early_exit": {},
    "device": None,
    "labels": [],
    "exported with": [{}],
    "macs": 1_010_944,
    "shift": 0,
    "parity": {"passed": True, "max_abs_diff": 1.1444091796875e-05, "gate": {"top1": 96.37883008356546}},
    "steps": [{"threshold": 0.5, "shares": [0.25, 0.75]}, {"threshold": 1.0, "shares": [0.0, 1.0], "forced": False}],
}


def test_a_line_for_every_fact_and_none_for_what_is_empty():
    assert fact_lines(CARD) == [
        "name                 digits S + A",
        "outputs              logits features",
        "macs                 1010944",
        "shift                0",
        "parity.passed        yes",
        "parity.max_abs_diff  1.14441e-05",
        "parity.gate.top1     96.3788",
        "steps                threshold 0.5, shares 0.25 0.75",
        "steps                threshold 1, shares 0 1, forced no",
    ]


def test_one_long_key_does_not_push_every_value_aside():
    long = "early_exit.lowering.calibration.sha256"
    assert fact_lines({"a": 1, long: 2}) == ["a" + " " * 29 + "1", f"{long}  2"]
    assert fact_lines({}) == []
