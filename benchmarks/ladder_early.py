"""What early exit gives on a rung of the ladder: accuracy against mean cost, over thresholds.

    uv run python benchmarks/ladder_early.py FOLDER --data FOLDER --teacher WEIGHTS --record FILE

FOLDER holds what `ladder_joint.py --early` wrote. S answers alone where its largest probability reaches the threshold;
else A's end runs on the trunk's map and the sum answers. Networks of these rows were trained without the held-out
images, so these choose the threshold, and the test images are read at all of them. Times are medians of ONNX Runtime,
batch 1, one thread, taken in turn with S0's: of the graph of trunk and S, and of A's end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import torch
from ladder_joint import HELD_OUT, SPLIT_SEED, Split, split_of
from ladder_loop import MEAN, STD, build, shipped_macs
from ladder_rows import EARLY, Row
from safetensors.torch import load_file
from torch import Tensor, nn

from rkd_deploy.export.fusion import fuse_branch
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.storage import write_json

THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
PASSES = 400


def exit_graphs(model: ResidualStudent) -> tuple[nn.Module, nn.Module]:
    """The graphs that early exit ships: S's, images to (z_S and) the trunk's map; A's, what it adds to z_S."""
    unbiased = copy.deepcopy(cast(nn.Linear, model.head))
    nn.init.zeros_(unbiased.bias)  # z_S has it
    return fuse_branch(model, 0, model.head), fuse_branch(model, 1, unbiased)


def main() -> None:
    """Judge, time, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pair", default="resnet20_resnet8")
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--record", type=Path, required=True, help="of ladder_joint.py; gets the key early")
    how = parser.parse_args()
    teacher, s0_name = how.pair.split("_")
    T = zoo.create(teacher, 100)
    T.load_state_dict(torch.load(how.teacher, map_location="cpu", weights_only=True))
    train, test = split_of(how.data, True, None), split_of(how.data, False, None)
    held = train[torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))[:HELD_OUT]]
    lines = []
    for row in EARLY:
        name = "".join(c if c.isalnum() else "_" for c in row.name)
        for path in sorted(how.folder.glob(f"{how.pair}_{name}_*.safetensors")):
            model = cast(ResidualStudent, build(row, s0_name, cast(nn.Module, T.fc), 0))
            model.load_state_dict(load_file(path))
            model.eval()
            line: dict[str, Any] = {
                "name": row.name,
                "seed": int(path.stem.rsplit("_", 1)[1]),
                **_costs(row, model, s0_name, cast(nn.Module, T.fc)),
            }
            line["curve"] = [
                {"threshold": t, "held_out": h, "test": v, "asked": asked}
                for t, (h, _), (v, asked) in zip(THRESHOLDS, _curve(model, held), _curve(model, test), strict=True)
            ]
            lines.append(line)
            print(json.dumps(line), flush=True)
    record = json.loads(how.record.read_text(encoding="utf-8"))
    write_json(how.record, record | {"early": lines})


@torch.inference_mode()
def _curve(model: ResidualStudent, split: Split) -> list[tuple[float, float]]:
    """Accuracy in % and share of images that asked A, at each threshold."""
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (MEAN, STD))
    first, second = exit_graphs(model)
    S, Z = [], []
    for pixels in split.pixels.split(500):  # type: ignore[no-untyped-call]
        x = (pixels.permute(0, 3, 1, 2).float() - mean) / std
        z, trunk = first(x)
        S.append(z)
        Z.append(z + second(trunk))
    z_S, z = torch.cat(S), torch.cat(Z)
    sure = z_S.softmax(1).amax(1)
    points = []
    for threshold in THRESHOLDS:
        asked = sure < threshold
        right = torch.where(asked, z.argmax(1), z_S.argmax(1)) == split.labels
        points.append((100 * right.float().mean().item(), asked.float().mean().item()))
    return points


def _costs(row: Row, model: ResidualStudent, s0_name: str, head: nn.Module) -> dict[str, float]:
    """MACs of S0, of trunk and S, and of A's end; their times over S0's."""
    s0 = build(Row("S0", own_head=True), s0_name, nn.Identity(), 0).eval()
    first, second = exit_graphs(model)
    x = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        _, trunk = first(x)
    graphs = {"s0": (s0, (x,)), "first": (first, (x,)), "second": (second, (trunk,))}
    sessions = {name: _session(module, inputs) for name, (module, inputs) in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(PASSES):
        for name, (session, feeds) in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds)
            samples[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "s0_macs": count(s0, 32).macs,
        "first_macs": count(first, 32).macs,
        "second_macs": shipped_macs(row, s0_name, head) - count(first, 32).macs,
        "first_time": medians["first"] / medians["s0"],
        "second_time": medians["second"] / medians["s0"],
    }


def _session(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[ort.InferenceSession, dict[str, np.ndarray]]:
    program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options)
    return session, {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}


if __name__ == "__main__":
    main()
