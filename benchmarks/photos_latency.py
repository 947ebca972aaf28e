"""Times the networks of photos.py as they ship, on this machine's ONNX Runtime, and writes the record of the study.

Fresh weights, exported by the package, batch 1, one thread; the CPU time of the process, so that what else a machine
does counts little. Networks take turns; a ratio is that of the medians. S + A is timed at every level of fusion that
its layout can be brought to, and the fastest counts, as `export --fuse auto` does. The logits that were kept of the
held-out photos set the thresholds of early exit; those of the test photos are read here for the first time, and only
of the rows that were chosen.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from ladder_early import THRESHOLDS, exit_graphs
from photos_loop import Builder
from photos_rows import TITLES, Row, Study, best, groups, row_of
from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.card import Preprocess
from rkd_deploy.errors import RkdError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.storage import write_json

Array = npt.NDArray[np.float32]

CLASSES = 10
LEVELS = ("tail", "wide")
ROUNDS, TURN_S = 40, 0.05
"""Turns of each network, and seconds of one."""


class Timed:
    """Sessions of ONNX Runtime that take turns."""

    def __init__(self) -> None:
        self.sessions: dict[str, tuple[ort.InferenceSession, dict[str, Array]]] = {}

    def add(self, name: str, model: bytes, inputs: Sequence[Array]) -> None:
        """Load a model; the inputs are in its order."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value for entry, value in zip(session.get_inputs(), inputs, strict=True)}
        self.sessions[name] = session, feeds

    def medians_ms(self) -> dict[str, float]:
        """Median of each, in ms of CPU time."""
        samples: dict[str, list[float]] = {name: [] for name in self.sessions}
        for number in range(ROUNDS):
            for name in sorted(self.sessions, reverse=bool(number % 2)):
                session, feeds = self.sessions[name]
                session.run(None, feeds)  # finds the caches full of another network
                ends = time.perf_counter() + TURN_S
                while time.perf_counter() < ends:
                    began = time.process_time_ns()
                    session.run(None, feeds)
                    samples[name].append((time.process_time_ns() - began) / 1e6)
        return {name: statistics.median(values) for name, values in samples.items()}


def measure(path: Path) -> Path:
    """Read the record of the training, time its networks, and write the record of the study beside the others."""
    trained: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines = trained["lines"]
    chosen = {place: cast(Row, best(lines, place)) for place in dict.fromkeys(row_of(line).place for line in lines)}
    T = row_of({"row": trained["teacher"]})
    chosen = {place: row for place, row in chosen.items() if row.kind in TITLES and (row.kind != "T" or row == T)}
    timed = timings(trained, list(chosen.values()))
    calls = trained["calls"]
    record: dict[str, Any] = {key: trained[key] for key in ("theme", "scale", "teacher", "groups", "refused")}
    record |= {"provenance": calls[-1], "calls": len(calls), "held_out": len(trained["labels"]["held"])}
    record |= {"test_images": len(trained["labels"]["test"]), "times": timed | {"provenance": asdict(provenance())}}
    keys = ("row", "seed", "epochs", "macs", "parameters", "loss", "held_out", "held_out_student")
    record["search"] = [{key: line[key] for key in keys if key in line} for line in lines if line["seed"] == 0]
    ours = [line for line in lines if chosen.get(row_of(line).place) == row_of(line)]
    record["refused"] = {place: reason for place, reason in trained["refused"].items() if place not in chosen}
    record["left"] = left(trained)
    record["rows"] = [tested(line, trained["labels"], keys) for line in ours]
    record["early"] = [
        exit_curve(line, trained["labels"])
        for line in ours
        if row_of(line).kind.startswith("early") and "student_test" in line
    ]
    name = f"photos_{hardware(calls[-1])}_{datetime.now(UTC):%Y%m%d}.json"
    write_json(FOLDER / name, record)
    print(json.dumps({"record": name}))
    return FOLDER / name


def left(trained: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the study that its time did not suffice for: network, kind and seed, each once; without the refused."""
    done = {key for key, group in trained["groups"].items() if group["trained"]}
    rows = [
        (row.network, row.kind, group.seed)
        for group in groups(Study(), trained["lines"], done)
        if group.key not in done
        for row in group.rows
        if row.place not in trained["refused"]
    ]
    return [dict(zip(("network", "kind", "seed"), row, strict=True)) for row in dict.fromkeys(rows)]


def timings(trained: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Milliseconds of every network as it ships, by place; of early exit the graphs that answer first and second."""
    pixels = trained["scale"]["pixels"]
    teacher = Builder(pixels, CLASSES).create(trained["teacher"]["network"]).eval()
    builder = Builder(pixels, CLASSES, teacher)
    preprocess = Preprocess(height=pixels, width=pixels, mean=(0.5,) * 3, std=(0.5,) * 3, embedded=False)
    x: Array = np.random.default_rng(0).standard_normal((1, 3, pixels, pixels), dtype=np.float32)
    timed, shown = Timed(), {}
    for row in rows:
        graph = graph_of(row)
        shown[row.place] = graph
        if any(name.startswith(f"{graph} @") for name in timed.sessions):
            continue
        network = builder(row, 0).eval()
        print(f"exports {graph}", flush=True)
        for level in LEVELS if row.layout else LEVELS[:1]:
            try:
                shipped = ExportGraph(fuse(network, level), preprocess)
            except RkdError as error:
                print(f"  not at level {level}: {str(error)[:120]}")
                continue
            timed.add(f"{graph} @{level}", to_onnx(shipped, preprocess).SerializeToString(), [x])
        if row.kind.startswith("early"):
            add_exits(timed, graph, cast(ResidualStudent, network), x)
    medians = timed.medians_ms()
    p50_ms: dict[str, float] = {}
    levels: dict[str, str] = {}
    for place, graph in shown.items():
        ways = {name.partition(" @")[2]: ms for name, ms in medians.items() if name.startswith(f"{graph} @")}
        ways = {level: ms for level, ms in ways.items() if level in LEVELS}
        levels[place] = min(ways, key=lambda level: ways[level])
        p50_ms[place] = ways[levels[place]]
    return {"p50_ms": p50_ms, "level": levels, "graphs_ms": medians, "graph": shown}


def graph_of(row: Row) -> str:
    """What ships, as a key: rows that differ in their training alone have one graph."""
    if row.own_head and row.fraction is None:
        return row.network
    return row.place


def add_exits(timed: Timed, graph: str, network: ResidualStudent, x: Array) -> None:
    """Load the graph of S and that of A as early exit runs them."""
    first, second = exit_graphs(network)
    images = taken = torch.from_numpy(x)
    if network.trunk is not None:
        with torch.inference_mode():
            taken = first(images)[1].clone()
    for name, module, tensor in (("first", first, images), ("second", second, taken)):
        program = torch.onnx.export(module, (tensor,), dynamo=True, verbose=False)
        assert program is not None
        timed.add(f"{graph} @{name}", program.model_proto.SerializeToString(), [tensor.numpy()])


def decoded(text: str) -> Array:
    """Logits [N, K] of a line."""
    return np.frombuffer(base64.b64decode(text), np.float16).reshape(-1, CLASSES).astype(np.float32)


def tested(line: Mapping[str, Any], labels: Mapping[str, Sequence[int]], keys: Iterable[str]) -> dict[str, Any]:
    """A line with what its network makes of the test photos."""
    row, result = row_of(line), {key: line[key] for key in keys if key in line}
    result |= {"place": row.place, "kind": row.kind, "network": row.network}
    for part in ("sum", "student"):
        if f"{part}_test" in line:
            right = decoded(line[f"{part}_test"]).argmax(1) == np.array(labels["test"])
            result[f"{part}_top1"] = 100 * float(right.mean())
            result[f"{part}_right"] = np.packbits(right).tobytes().hex()
    return result


def exit_curve(line: Mapping[str, Any], labels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Accuracy and share of photos that ask A, at each threshold; the lowest that loses nothing held out is chosen."""
    row = row_of(line)
    held = [exit_point(line, "held", labels["held"], threshold) for threshold in THRESHOLDS]
    test = [exit_point(line, "test", labels["test"], threshold) for threshold in THRESHOLDS]
    curve = [
        {"threshold": t, "held_out": of_held[0], "test": of_test[0], "asked": of_test[1]}
        for t, of_held, of_test in zip(THRESHOLDS, held, test, strict=True)
    ]
    chosen = next(point["threshold"] for point in curve if point["held_out"] >= curve[-1]["held_out"])
    return {"place": row.place, "network": row.network, "seed": line["seed"], "curve": curve, "chosen": chosen}


def exit_point(line: Mapping[str, Any], split: str, labels: Sequence[int], threshold: float) -> tuple[float, float]:
    """Accuracy in %, and the share of the photos that ask A."""
    z_S, z = decoded(line[f"student_{split}"]), decoded(line[f"sum_{split}"])
    p = np.exp(z_S - z_S.max(1, keepdims=True))
    asked = (p / p.sum(1, keepdims=True)).max(1) < threshold
    right = np.where(asked, z.argmax(1), z_S.argmax(1)) == np.array(labels)
    return 100 * float(right.mean()), float(asked.mean())
