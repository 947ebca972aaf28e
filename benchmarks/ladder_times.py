"""Times the networks of a record of ladder_joint.py against S0 on this machine's ONNX Runtime, and adds that to it.

    uv run python benchmarks/ladder_times.py RECORD.json

Fresh weights, fused at level tail, batch 1, one thread; all networks take turns in one process. A ratio is that of
the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from ladder_loop import build
from ladder_rows import Row
from torch import nn

from rkd_deploy.bench.machine import provenance
from rkd_deploy.export.fusion import fuse
from rkd_deploy.storage import write_json

BATCHES = {1: 1500}
"""Runs of each network by batch size."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    path: Path = parser.parse_args().record
    record = json.loads(path.read_text(encoding="utf-8"))
    s0_name = record["settings"]["pair"].split("_")[1]
    sessions = {"S0": session_of(Row("S0", own_head=True), s0_name)}
    for line in record["rows"]:
        if line["assistant"] or not line["own_head"]:
            fields: dict[str, Any] = {k: v for k, v in line.items() if k in Row.__dataclass_fields__}
            fields |= {k: None if line[k] is None else tuple(line[k]) for k in ("student", "assistant")}
            if line["name"] not in sessions:
                sessions[line["name"]] = session_of(Row(**fields), s0_name)
    times: dict[str, dict[str, float]] = {name: {} for name in sessions}
    for batch, runs in BATCHES.items():
        x = np.random.default_rng(0).random((batch, 3, 32, 32), np.float32)
        samples: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(runs):
            for name, session in sessions.items():
                began = time.perf_counter()
                session.run(None, {"x": x})
                samples[name].append(time.perf_counter() - began)
        s0 = statistics.median(samples["S0"])
        for name, values in samples.items():
            times[name][str(batch)] = statistics.median(values) / s0
            print(f"batch {batch}: {times[name][str(batch)]:.3f} of S0's {1e3 * s0:.3f} ms  {name}")
    record["times"] = {"of_s0": times, "provenance": asdict(provenance())}
    write_json(path, record)


def session_of(row: Row, s0_name: str) -> ort.InferenceSession:
    """A network with fresh weights as it ships."""
    network = build(row, s0_name, nn.Linear(64, 100), 0).eval()
    shipped = network if row.own_head else fuse(network, "tail")
    program = torch.onnx.export(
        shipped.eval(),
        (torch.zeros(2, 3, 32, 32),),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(program.model_proto.SerializeToString(), options)


if __name__ == "__main__":
    main()
