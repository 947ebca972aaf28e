"""Shows the record of photos.py: its tables for the docs, and the picture of accuracy over latency.

uv run python benchmarks/photos_shown.py      # draws docs/results/photos.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from photos_rows import TITLES
from record import FOLDER

from rkd_deploy.train.verdict import gain_of_pairs, gain_of_seeds

PICTURE = FOLDER.parent / "docs" / "results" / "photos.png"
LOSS = "distilled"
"""The kind that S + A has to beat."""
COLOURS = {"T": "#22223b", "cross-entropy": "#adb5bd", "distilled": "#8d99ae", "control": "#2f6690"}
"""By kind; S + A is red."""

Lines = list[dict[str, Any]]


def newest() -> dict[str, Any]:
    """The newest record."""
    path = max(FOLDER.glob("photos_*.json"), key=lambda file: file.stem.rsplit("_", 1)[1])
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def by_place(record: Mapping[str, Any]) -> dict[str, Lines]:
    """The lines of every network that was chosen, a line for each seed."""
    places: dict[str, Lines] = {}
    for line in sorted(record["rows"], key=lambda row: int(row["seed"])):
        places.setdefault(line["place"], []).append(line)
    return places


def top1(lines: Sequence[Mapping[str, Any]], part: str = "sum") -> list[float]:
    """Accuracy on the test photos with each seed, in %."""
    return [float(line[f"{part}_top1"]) for line in lines]


def half_width(values: Sequence[float], images: int) -> float:
    """Half of a 95 % interval of a mean accuracy in %: the photos' binomial variance, and that of the seeds.

    All seeds are judged on the same photos, so their number makes the first no smaller.
    """
    p = fmean(values) / 100
    of_seeds = variance(values) / len(values) if len(values) > 1 else 0.0
    return float(1.96 * (1e4 * p * (1 - p) / images + of_seeds) ** 0.5)


def network_name(name: str) -> str:
    """A network's name without its library."""
    return name.partition(":")[2] or name


def tables(record: Mapping[str, Any]) -> str:
    """Every network beside S0: cost, latency, accuracy, and what it has over S0 trained by the best loss."""
    places, times = by_place(record), record["times"]
    head = ("network", "trained as", "MMAC", "p50, ms", "time of its S0's", "top-1, %", "over S0 + best loss, points")
    text = ["| " + " | ".join(head) + " |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for place, lines in sorted(places.items(), key=lambda item: -fmean(top1(item[1]))):
        first = lines[0]
        ms, values = times["p50_ms"][place], top1(lines)
        s0_ms = times["p50_ms"].get(f"{first['network']}, {LOSS}")
        rival = places.get(f"{first['network']}, {LOSS}")
        ratio = "" if s0_ms is None or first["kind"] == "T" else f"{ms / s0_ms:.2f}"
        accuracy = f"{fmean(values):.1f} ± {half_width(values, record['test_images']):.1f}"
        title = TITLES[first["kind"]]
        title += f" ({first['row']['fraction']:g} of its MACs)" if first["row"].get("fraction") else ""
        bold = "**" if title.startswith("S + A") else ""
        cells = (
            network_name(first["network"]),
            f"{bold}{title}{bold}",
            f"{first['macs'] / 1e6:.0f}",
            f"{ms:.2f}",
            ratio,
        )
        over = "" if rival is None or lines is rival else gain(lines, rival, record["test_images"])
        text.append("| " + " | ".join((*cells, accuracy, over)) + " |")
        if "student_top1" in first and not first["kind"].startswith("early"):
            alone = top1(lines, "student")
            text.append(f"| | S of it alone | | | | {fmean(alone):.1f} | |")
    return "\n".join(text) + f"\n\n{conditions(record, places)}\n" + refusals(record) + missing(record) + early(record)


def gain(ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], images: int) -> str:
    """What is gained over other lines: seed by seed, or of one seed from the photos that one of the two has right."""
    seeds = sorted({line["seed"] for line in ours} & {line["seed"] for line in others})
    if not seeds:
        return ""
    mine, theirs = ([line for line in lines if line["seed"] in seeds] for lines in (ours, others))
    if len(seeds) > 1:
        over = gain_of_seeds(top1(mine), top1(theirs))
    else:
        right, others_right = (int(lines[0]["sum_right"], 16) for lines in (mine, theirs))
        over = gain_of_pairs((right & ~others_right).bit_count(), (others_right & ~right).bit_count(), images)
    return f"{over.points:+.1f} ({over.low:+.1f} to {over.high:+.1f})" + (", one seed" if len(seeds) == 1 else "")


def conditions(record: Mapping[str, Any], places: Mapping[str, Lines]) -> str:
    """What the figures of the table hold for, in words."""
    scale, facts, cpu = record["scale"], record["provenance"], record["times"]["provenance"]
    where = (facts.get("gpus") or [{"name": facts["cpu"]}])[0]["name"]
    seeds = sorted({len(lines) for lines in places.values()}, reverse=True)
    counts = " or ".join(map(str, seeds))
    return (
        f"From scratch on {scale['train']} photos of {scale['pixels']} px, {scale['epochs']} epochs (T: "
        f"{scale['teacher_epochs']}), {where}; {record['held_out']} held-out photos chose every kind's settings; "
        f"{counts} seeds, {record['test_images']} test photos, read once. ±: 95 %, photos and seeds together. Time: "
        f"batch 1, ONNX Runtime {cpu['versions']['onnxruntime']}, one thread, {cpu['cpu']}."
    )


def refusals(record: Mapping[str, Any]) -> str:
    """What could not be cut, and why."""
    lines = [f"- {place}: {reason.split('. ')[0]}." for place, reason in record["refused"].items()]
    return "\nRefused:\n\n" + "\n".join(lines) + "\n" if lines else ""


def missing(record: Mapping[str, Any]) -> str:
    """What the study was to train, and its time did not suffice for."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for row in record["left"]:
        seeds.setdefault((row["network"], TITLES.get(row["kind"], row["kind"])), []).append(str(row["seed"]))
    kinds: dict[tuple[str, str], list[str]] = {}
    for (network, title), numbers in seeds.items():
        kinds.setdefault((network, ", ".join(numbers)), []).append(title)
    lines = [f"| {network_name(name)} | {'; '.join(titles)} | {numbers} |" for (name, numbers), titles in kinds.items()]
    head = ["", "| not trained, for want of time | as | seeds |", "| --- | --- | --- |"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def early(record: Mapping[str, Any]) -> str:
    """Early exit: mean time and accuracy at each threshold, beside S0 and S0 at smaller widths."""
    curves: dict[str, Lines] = {}
    for line in record["early"]:
        curves.setdefault(line["place"], []).append(line)
    if not curves:
        return ""
    text = [
        "",
        "| early exit | threshold | asks A | top-1, % | mean time of S0's |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for place, lines in curves.items():
        for number, point in enumerate(exit_points(record, lines)):
            name = f"{network_name(lines[0]['network'])}, {TITLES[place.rpartition(', ')[2]]}" if number == 0 else ""
            cells = (f"{point['threshold']:g}", f"{point['asked']:.2f}", f"{point['top1']:.1f}", f"{point['time']:.2f}")
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        chosen = ", ".join(f"{line['chosen']:g}" for line in lines)
        text.append(f"| held-out photos chose | {chosen} | | | |")
    return "\n".join(text) + "\n"


def exit_points(record: Mapping[str, Any], lines: Lines) -> list[dict[str, float]]:
    """Means over seeds at every threshold: share that asks A, accuracy, and mean time as a share of S0's."""
    graphs, network = record["times"]["graphs_ms"], lines[0]["network"]
    s0, place = record["times"]["p50_ms"][f"{network}, {LOSS}"], lines[0]["place"]
    first, second = (graphs[f"{place} @{name}"] / s0 for name in ("first", "second"))
    points = []
    for number, point in enumerate(lines[0]["curve"]):
        of_seeds = [line["curve"][number] for line in lines]
        asked = fmean(seed["asked"] for seed in of_seeds)
        points.append(
            {
                "threshold": point["threshold"],
                "asked": asked,
                "top1": fmean(seed["test"] for seed in of_seeds),
                "time": first + asked * second,
            }
        )
    return points


def draw(record: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Accuracy over latency of every network, with 95 % intervals, and the curves of early exit."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for place, lines in by_place(record).items():
        kind, values = lines[0]["kind"], top1(lines)
        if kind.startswith("early"):
            continue
        ms, name = record["times"]["p50_ms"][place], network_name(lines[0]["network"])
        colour = COLOURS.get(kind, "#d1495b" if kind != "narrowed" else "#ced4da")
        wide = half_width(values, record["test_images"])
        axes.errorbar(ms, fmean(values), wide, fmt="o", color=colour, markersize=5, elinewidth=0.8, capsize=2)
        if kind != "narrowed":
            label = name if kind == "cross-entropy" else TITLES[kind] if kind == "T" else ""
            label = TITLES[kind].removeprefix("S + A, ") if kind in ("branches", "side_by_side", "trunk") else label
            axes.annotate(label, (ms, fmean(values)), xytext=(4, 3), textcoords="offset points", fontsize=7)
    curves: dict[str, Lines] = {}
    for line in record["early"]:
        curves.setdefault(line["place"], []).append(line)
    for lines in curves.values():
        s0 = record["times"]["p50_ms"][f"{lines[0]['network']}, {LOSS}"]
        points = exit_points(record, lines)
        axes.plot(
            [s0 * point["time"] for point in points], [point["top1"] for point in points], color="#d1495b", lw=0.9
        )
    axes.set_xscale("log")
    axes.set_xlabel("p50 of one photo, ms (ONNX Runtime, one thread)")
    axes.set_ylabel("top-1 on the test photos, %")
    for kind in ("T", "cross-entropy", "distilled", "control"):
        axes.plot([], [], "o", color=COLOURS[kind], label=TITLES[kind])
    axes.plot([], [], "o-" if curves else "o", color="#d1495b", label="S + A; line: early exit" if curves else "S + A")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    draw(newest())
