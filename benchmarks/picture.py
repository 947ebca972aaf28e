"""Draws docs/results/ladder.png, the README's picture, from the newest record of the ladder.

uv run python benchmarks/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = {"sum": "S + A", "control": "S0, same losses", "no A": "no A, same trunk"}


def main() -> None:
    """Draw it."""
    record = json.loads(max(HERE.glob("ladder_resnet56_resnet20_*.json")).read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, float]]] = {}
    for line in record["rows"]:
        if line["kind"] in NAMES or line["kind"] == "baseline":
            rows.setdefault(NAMES.get(line["kind"], line["name"]), []).append(line)
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    ordered = sorted(rows.items(), key=lambda row: fmean(line["sum_top1"] for line in row[1]))
    for place, (name, lines) in enumerate(ordered):
        values = [line["sum_top1"] for line in lines]
        colour = "#d1495b" if name == "S + A" else "#8d99ae" if name.startswith("S0") else "#2f6690"
        axes.barh(place, fmean(values) - 60, left=60, color=colour, height=0.62)
        axes.plot(values, [place] * len(values), "o", color="#22223b", markersize=3)
        axes.text(max(values) + 0.12, place, f"{fmean(values):.2f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_xlim(60, 69)
    axes.set_xlabel("top-1 on CIFAR-100, %, at S0's multiply-adds (dots: three seeds)")
    axes.set_title("ResNet-56 teaches ResNet-20, 18 epochs", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "results" / "ladder.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
