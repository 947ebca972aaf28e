"""The tables of a rung of the ladder, from the record of ladder_joint.py."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from rkd_deploy.train.verdict import gain_of_pairs, gain_of_seeds

KINDS = {
    "sum": "**S + A, trunk**",
    "timed": "S + A, trunk, cut for S0's time",
    "no A": "no A: the trunk under one wide end",
    "same trunk": "no A: S + A's own trunk under one wide end",
    "control": "S0, same losses",
}
"""Rows of a rung of the ladder, by what they compete as."""


def table(record: dict[str, Any]) -> str:
    """A rung of the ladder: accuracy of each row, what S + A has over it, seed by seed, and what early exit gives."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in record["rows"]:
        if line["kind"] != "early":
            rows.setdefault(KINDS.get(line["kind"], line["name"]), []).append(line)
    ours = rows[KINDS["sum"]]
    times = record.get("times", {}).get("of_s0", {})
    text = ["| network | widths | MMAC | time of S0's | top-1, % | S + A has over it, points |"]
    text.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, lines in sorted(rows.items(), key=lambda row: -fmean(line["sum_top1"] for line in row[1])):
        first = lines[0]
        widths = " ".join(map(str, first["student"])) + (f" + {first['assistant'][-1]}" if first["assistant"] else "")
        top1 = [line["sum_top1"] for line in lines]
        accuracy = f"{fmean(top1):.2f}" + (f" ({', '.join(f'{value:.2f}' for value in top1)})" if top1[1:] else "")
        over = "" if lines is ours else _gain(ours, lines)
        timed = times.get("S0" if first["own_head"] else first["name"], {})
        time = ", ".join(f"{ratio:.2f}" for ratio in timed.values())
        text.append(f"| {name} | {widths} | {first['macs'] / 1e6:.1f} | {time} | {accuracy} | {over} |")
    facts = record["provenance"]
    where = (facts.get("gpus") or [{"name": facts["cpu"]}])[0]["name"]
    text += [
        "",
        f"{ours[0]['epochs']} epochs, batch {record['batch']}, {where}, torch {facts['versions']['torch']}; "
        "intervals: 95 %." + _timed_on(record),
    ]
    return "\n".join(text) + "\n" + _early(record)


def _timed_on(record: dict[str, Any]) -> str:
    if "times" not in record:
        return ""
    facts = record["times"]["provenance"]
    return f" Time: batch 1, ONNX Runtime {facts['versions']['onnxruntime']}, one thread, {facts['cpu']}."


def _gain(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    if len(ours) > 1:
        gain = gain_of_seeds([line["sum_top1"] for line in ours], [line["sum_top1"] for line in others])
    else:
        bits = [
            np.unpackbits(np.frombuffer(bytes.fromhex(lines[0]["sum_right"]), np.uint8)) for lines in (ours, others)
        ]
        gained, lost = int((bits[0] > bits[1]).sum()), int((bits[1] > bits[0]).sum())
        gain = gain_of_pairs(gained, lost, ours[0]["test_images"])
    return f"{gain.points:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"


EARLY_THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 1.01)
"""Of those in the record, the ones that the table shows."""


def _early(record: dict[str, Any]) -> str:
    """Early exit: means over seeds; accuracy, mean MACs and mean time at some thresholds."""
    if "early" not in record:
        return ""
    head = ("early exit: widths of the trunk, of S + A", "seeds", *(f"threshold {t:g}" for t in EARLY_THRESHOLDS))
    text = ["", "| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in record["early"]:
        rows.setdefault(line["name"], []).append(line)
    for name, lines in rows.items():
        cells = [name.removeprefix("early: trunk "), str(len(lines))]
        for place, point in enumerate(lines[0]["curve"]):
            if point["threshold"] in EARLY_THRESHOLDS:
                cells.append(_point([(line, line["curve"][place]) for line in lines]))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + (
        "\n\nTop-1 in % (mean MACs, mean time of S0's). S answers where its largest probability reaches the threshold: "
        "at 0 always, above 1 never. These networks were trained without the held-out images. ONNX Runtime, "
        "batch 1, one thread.\n"
    )


def _point(lines: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Means over seeds at one threshold."""
    top1 = fmean(point["test"] for _, point in lines)
    macs = fmean((line["first_macs"] + point["asked"] * line["second_macs"]) / line["s0_macs"] for line, point in lines)
    time = fmean(line["first_time"] + point["asked"] * line["second_time"] for line, point in lines)
    return f"{top1:.2f} ({macs:.2f}, {time:.2f})"
