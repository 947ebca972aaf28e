"""Trains S0 by every loss, S0 with S + A's losses, and S + A in each layout, seed by seed.

    uv run python benchmarks/ladder.py digits --seeds 10 --root runs/ladder
    uv run python benchmarks/ladder.py cifar100_resnet20_resnet8 --seeds 3 --data FOLDER --teacher cifar100_resnet20.pth

A row is a recipe; each of its seeds is a run folder under the root, so an interrupted ladder goes on where it stands:
the same command again. Settings stand here and are changed by what held-out images say: --held-out prints those
accuracies alone. The test images of a run are classified once, when it is finished. The record has a line for each
network of each row: settings, accuracy of each seed, MACs, parameters, and what S + A has over each control, with its
interval. Latencies are taken in turn in one run at the end (--latency).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.compare import compare_runs, timed
from rkd_deploy.errors import InterruptedTraining
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.storage import write_json
from rkd_deploy.train.display import ProgressDisplay
from rkd_deploy.train.embedded import embedded_recipe
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.networks import PARTS
from rkd_deploy.train.runs import Run, runs_of
from rkd_deploy.train.verdict import CONTROLS, gain_of_seeds

BASELINES: dict[str, tuple[str, ...]] = {
    "S0, cross-entropy": ("method.name=cross_entropy",),
    "S0, KD": ("method.name=kd",),
    "S0, DKD": ("method.name=dkd",),
    "S0, KD standardised": (
        "method.name=kd",
        "method.standardise=true",
        "method.temperature=2.0",
        "method.base_weight=9.0",
    ),
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "S + A, branches": ("method.scheme=end_to_end",),
    "S + A, side by side": ("method.scheme=end_to_end", "student.layout=side_by_side"),
    "S + A, trunk": ("method.scheme=end_to_end", "student.layout=trunk"),
    "S + A, trunk, losses on S too": (
        "method.scheme=end_to_end",
        "student.layout=trunk",
        "method.student_weight=1.0",
    ),
    "S + A, sequential": (),
}


@dataclass(frozen=True)
class Rung:
    """One pair of networks on one data set.

    Attributes:
        base: What all rows share, as `--set` takes it; on digits beside the embedded recipe.
        embedded: Whether the embedded recipe is the start.
    """

    base: tuple[str, ...]
    embedded: bool = False

    def recipe(self, row: Sequence[str], seed: int, more: Sequence[str]) -> Recipe:
        """The recipe of a row and seed."""
        how = (*self.base, *more, *row, f"train.seed={seed}", "train.curves=false")
        return embedded_recipe(how) if self.embedded else read_recipe(None, how)


_CIFAR = ("data.name=cifar100", "train.batch_size=128", "train.nesterov=true", "train.warmup_epochs=0.5")
RUNGS = {
    "digits": Rung((), embedded=True),
    "cifar100_resnet20_resnet8": Rung(
        (*_CIFAR, "teacher.name=resnet20", "student.name=resnet8", "train.epochs=12", "data.val_fraction=0.1")
    ),
    "cifar100_resnet56_resnet20": Rung(
        (*_CIFAR, "teacher.name=resnet56", "student.name=resnet20", "train.epochs=18", "data.val_fraction=0.1")
    ),
    "cifar100_resnet32x4_resnet8x4": Rung(
        (*_CIFAR, "teacher.name=resnet32x4", "student.name=resnet8x4", "train.epochs=18", "data.val_fraction=0.1")
    ),
}


def main() -> None:
    """Train and compare the networks of one rung."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rung", choices=RUNGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--data", help="data.root")
    parser.add_argument("--teacher", help="teacher.checkpoint; default: trained once for each seed, shared by its rows")
    parser.add_argument("--set", dest="more", action="append", default=[], help="for every row, e.g. train.epochs=4")
    parser.add_argument("--row", action="append", help="only these rows, by name")
    parser.add_argument("--latency", action="store_true", help="time the networks of the first seed in turn")
    parser.add_argument("--held-out", action="store_true", help="print held-out accuracies only, and write no record")
    chosen = parser.parse_args()
    more = [*chosen.more]
    more += [f"data.root={chosen.data}"] if chosen.data else []
    rows = {name: how for name, how in {**BASELINES, **LAYOUTS}.items() if not chosen.row or name in chosen.row}
    root: Path = chosen.root / chosen.rung
    runs: dict[str, list[Run]] = {name: [] for name in rows}
    for seed in range(chosen.seeds):  # seed by seed: an interrupted ladder has whole seeds
        teacher = chosen.teacher
        for name, how in sorted(rows.items(), key=lambda row: "cross_entropy" in " ".join(row[1])):
            known = [f"teacher.checkpoint={teacher}"] if teacher and "cross_entropy" not in " ".join(how) else []
            run = _trained(RUNGS[chosen.rung].recipe(how, seed, [*more, *known]), root)
            runs[name].append(run)
            if teacher is None and run.weights("teacher").exists():
                teacher = str(run.weights("teacher"))
    if chosen.held_out:
        for line in _held_out(runs):
            print(line)
        return
    _record(chosen, rows, runs)


def _trained(recipe: Recipe, root: Path) -> Run:
    """The finished run of a recipe: found, gone on with, or begun."""
    runs = runs_of(root, recipe)
    with ProgressDisplay() as progress:
        try:
            return resume(runs[-1], display=progress) if runs else fit(recipe, root=root, display=progress)
        except InterruptedTraining as error:
            raise SystemExit(f"{error} The same command goes on.") from error


def _held_out(runs: dict[str, list[Run]]) -> Iterator[str]:
    for name, trained in runs.items():
        last = [list(run.read_json("metrics.json")["phases"].values())[-1]["val_top1_last"] for run in trained]
        yield f"{name}: {', '.join(f'{top1:.2f}' for top1 in last)}; mean {statistics.fmean(last):.2f} % held out"


def _record(chosen: argparse.Namespace, rows: dict[str, tuple[str, ...]], runs: dict[str, list[Run]]) -> None:
    lines: list[dict[str, Any]] = []
    for name, trained in runs.items():
        metrics = [run.read_json("metrics.json") for run in trained]
        for part in metrics[0]["parts"]:
            accuracies = [run_metrics["parts"][part]["test_top1"] for run_metrics in metrics]
            facts = metrics[0]["parts"][part]
            line = {"row": name, "part": part, "network": PARTS[part], "settings": list(rows[name])}
            line |= {"test_top1": accuracies, "mean": statistics.fmean(accuracies)}
            line |= {"deviation": statistics.stdev(accuracies) if len(trained) > 1 else None}
            line |= {"macs": facts["macs"], "parameters": facts["parameters"]}
            line["training_seconds"] = statistics.fmean(run_metrics["training_seconds"] for run_metrics in metrics)
            lines.append(line)
    controls = [line for line in lines if line["part"] in CONTROLS]
    for line in lines:
        if line["part"] == "fused" and chosen.seeds > 1:
            line["gains"] = {
                f"{other['row']}: {other['network']}": asdict(gain_of_seeds(line["test_top1"], other["test_top1"]))
                for other in controls
            }
            best = max(controls, key=lambda other: other["mean"])
            line["best_control"] = f"{best['row']}: {best['network']}"
    record: dict[str, Any] = {"theme": "ladder", "rung": chosen.rung, "seeds": chosen.seeds, "set": chosen.more}
    record |= {"provenance": (facts := asdict(provenance())), "rows": lines}
    if chosen.latency:
        comparison = timed(compare_runs([trained[0] for trained in runs.values()]))
        record["latency_p50_ms"] = {row.name: row.p50_ms for row in comparison.rows}
    path = FOLDER / f"ladder_{chosen.rung}_{hardware(facts)}.json"
    write_json(path, record)
    for line in lines:
        print(f"{line['row']:<34} {line['network']:<18} {line['mean']:6.2f} {line['macs'] / 1e6:8.2f} MMAC")
    print(json.dumps({"record": str(path)}))


if __name__ == "__main__":
    main()
