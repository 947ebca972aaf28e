"""Keep a training run, its export and its latency as one record.

    uv run python benchmarks/run_record.py RUN

exports every network of the run that has no bundle yet, proves each on all test images, measures all of them on ONNX
Runtime in turn, and writes RECIPE_HARDWARE_YYYYMMDD.json: the recipe as resolved, accuracies, budget, parity, latency.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from record import FOLDER, hardware

from rkd_deploy.bench import BenchSettings, bench
from rkd_deploy.bench.machine import provenance
from rkd_deploy.card import ModelCard
from rkd_deploy.pipeline import export_run
from rkd_deploy.storage import write_json
from rkd_deploy.train.runs import open_run


def main() -> None:
    """Export and measure a run, and write its record."""
    run = open_run(Path(sys.argv[1]))
    metrics, facts = run.read_json("metrics.json"), run.read_json("facts.json")
    bundles = {}
    for part in metrics["parts"]:
        folder = run.folder / ("bundle" if part == "fused" else f"bundle-{part}")
        bundles[part] = folder if folder.exists() else export_run(run, part=part, folder=folder).folder
    cards = {part: ModelCard.from_json((folder / "model.json").read_text(), part) for part, folder in bundles.items()}
    results = bench(list(bundles.values()), BenchSettings(batches=(1,), min_seconds=3.0))
    content = {
        "theme": run.recipe.name,
        "provenance": asdict(provenance()),
        "trained_with": run.read_json("environment.json"),
        "recipe": run.recipe.to_toml(),
        "parts": metrics["parts"],
        "phases": metrics["phases"],
        "separation": facts.get("separation"),
        "parity": {part: dict(card.parity) for part, card in cards.items()},
        "bench": [
            {key: row.to_row()[key] for key in ("part", "p50_ms", "p90_ms", "file_bytes", "runs")} for row in results
        ],
        "notes": _notes(run.recipe.teacher.checkpoint, run.recipe.student.checkpoint),
    }
    path = FOLDER / f"{run.recipe.name}_{hardware(content['provenance'])}_{datetime.now(UTC):%Y%m%d}.json"
    write_json(path, content)
    print(path.name)


def _notes(teacher: str | None, s0: str | None) -> dict[str, str]:
    notes = {"teacher": teacher, "s0": s0}
    return {part: f"given: {Path(checkpoint).name}" for part, checkpoint in notes.items() if checkpoint is not None}


if __name__ == "__main__":
    main()
