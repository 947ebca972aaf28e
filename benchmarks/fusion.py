"""What fusion buys: S + A at every level against S0, and what an export costs.

    uv run python benchmarks/fusion.py [SECONDS [NAME ..]]

S and A are cut from S0 by MACs; all weights are random. `student.round_to` is what the runtimes' blocks of a CPU with
AVX-512 ask for, 16 and more, where the network is wide enough for two branches of such blocks; ResNet-20 (16, 32 and 64
channels) is not and has 8. A session loads the networks afresh and lets them take turns of 0.1 s on one backend, one
thread and one batch size; its ratio is the median over the turns of the ratio within a turn, which a neighbour on the
core for some of the turns does not move. Told is the median over the sessions: a network that is loaded twice is not
equally fast twice. `auto` is the level that its rule (`rkd_deploy/export/levels.py`) takes from these; beside it
stands S + A of layout side_by_side at level wide. S + A under a latency budget are in separation.py. Each export runs
in a process of its own: uint8 in, 64 random images through the gate, at level tail.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from record import Claim, save
from torch import Tensor, nn

from rkd_deploy.backends import load_backend
from rkd_deploy.bench.sessions import SESSIONS
from rkd_deploy.bench.statistics import judge
from rkd_deploy.bench.timing import TimingLimits, Workload, measure_workloads
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.levels import fastest_level
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.staged import FeatureNetwork, Staged

BATCHES = (1, 8, 32)
ON_CUDA = torch.cuda.is_available()
BACKENDS = ("onnxruntime", "onnxruntime:cuda-graphs") if ON_CUDA else ("onnxruntime", "openvino")
"""What is measured: of a machine with a GPU, the GPU."""
PLACE: dict[str, Any] = {"device": "cuda"} if ON_CUDA else {"threads": 1}
LEVELS = ("tail", "wide")
BESIDE = "wide, side by side"
ROUND_TO = {"ResNet-20": 8, "resnet8x4": 16, "ResNet-18": 32}
CLASSES = 100
LIMIT = 1.05
EXPORT_SECONDS = {"resnet8x4": 15.0, "ResNet-18": 40.0}


def main() -> None:
    """Measure and record; in a child process, export one network."""
    if sys.argv[1:2] == ["--export"]:
        print(json.dumps(_exported(*sys.argv[2:])))
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.3
    names = sys.argv[2:] or list(CASES)
    claims = [claim for name in names for claim in _speed(name, seconds)]
    claims += [claim for name in names if name in EXPORT_SECONDS for claim in _export(name, EXPORT_SECONDS[name])]
    save("fusion", claims)


def _speed(name: str, seconds: float) -> Iterator[Claim]:
    size, _ = CASES[name]
    S0, model = _cut(name, "branches")
    _, beside = _cut(name, "side_by_side")
    networks = {"S0": fuse(S0), **{level: fuse(model, level) for level in LEVELS}, BESIDE: fuse(beside, "wide")}
    preprocess = _preprocess(size)
    with tempfile.TemporaryDirectory() as folder:
        files = {level: Path(folder) / f"{level}.onnx" for level in networks}
        for file, network in zip(files.values(), networks.values(), strict=True):
            file.write_bytes(to_onnx(ExportGraph(network.eval(), preprocess), preprocess).SerializeToString())
        for backend in BACKENDS:
            for batch in BATCHES:
                print(f"{name} on {backend}, batch {batch}", file=sys.stderr)
                sessions = [_session(files, backend, batch, size, seconds, number) for number in range(SESSIONS)]
                yield from _claims(f"{name}, round_to {ROUND_TO[name]}, {backend}, batch {batch}", sessions)


def _session(
    files: Mapping[str, Path], backend: str, batch: int, size: int, seconds: float, number: int
) -> dict[str, float]:
    """Latency over S0's, by level, of networks loaded afresh, in another order each time."""
    x = np.random.default_rng(number).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    names = list(files)
    with ExitStack() as stack:
        loaded = {
            name: Workload((stack.enter_context(load_backend(backend, files[name], **PLACE)),), x)
            for name in names[number % len(names) :] + names[: number % len(names)]
        }
        limits = TimingLimits(min_seconds=seconds, min_runs=2, warmup_seconds=0.05, warmup_runs=1)
        timings = measure_workloads(loaded, limits)
    turns = {name: timing.round_medians_ms for name, timing in timings.items()}
    return {
        name: median(a / b for a, b in zip(turns[name], turns["S0"], strict=False)) for name in names if name != "S0"
    }


def _claims(what: str, sessions: Sequence[Mapping[str, float]]) -> Iterator[Claim]:
    samples = {level: [session[level] for session in sessions] for level in sessions[0]}
    ratios = {level: median(values) for level, values in samples.items()}
    for level, ratio in ratios.items():
        limit = LIMIT if level == BESIDE else None
        yield Claim(f"{what}: S + A, level {level}, over S0", ratio, "ratio", limit, {"sessions": samples[level]})
    chosen = fastest_level(
        {level: judge([session[level] / session["tail"] for session in sessions]) for level in LEVELS}
    )
    yield Claim(f"{what}: S + A, level auto ({chosen}), over S0", ratios[chosen], "ratio", LIMIT)


def _export(name: str, limit: float) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(_cut(name, "branches")[1], file)  # the child holds S and A, and no S0 that they were cut from
        command = [sys.executable, __file__, "--export", name, str(file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, allowed = json.loads(done.stdout.splitlines()[-1])
    yield Claim(f"{name}: export with parity gate", seconds, "s", limit, {"seconds": [seconds]})
    yield Claim(f"{name}: peak memory of an export, limit 4 x the model + 1 GB", peak, "MB", allowed)


def _exported(name: str, file: str) -> tuple[float, float, float]:
    """Seconds, peak memory and its limit in MB."""
    size, _ = CASES[name]
    model = torch.load(file, weights_only=False)
    card = ModelCard(name=name, labels=tuple(map(str, range(CLASSES))), preprocess=_preprocess(size))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        export_bundle(model, card, Path(folder) / "bundle")
        seconds = time.perf_counter() - began
    kilobytes = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    model_mb = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return seconds, kilobytes * 1024 / 1e6, 4 * model_mb + 1000


def _preprocess(size: int) -> Preprocess:
    return Preprocess(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def _cut(name: str, layout: str) -> tuple[nn.Module, ResidualStudent]:
    """S0, and S + A in this layout."""
    torch.manual_seed(0)
    size, make = CASES[name]
    S0 = make()
    # Where layers lie side by side, it is their sum that has to fit the blocks, and S0's widths do.
    round_to = ROUND_TO[name] if layout == "branches" else 8
    cut = separate(S0, num_classes=CLASSES, input_size=size, layout=layout, round_to=round_to)
    return S0.eval(), ResidualStudent(cut.student, cut.assistants, S0.channels, CLASSES).eval()


class ResNet18(Staged):
    """torchvision's ResNet-18 with other widths, for 224 x 224 pixels."""

    def __init__(self, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.network = torchvision.models.resnet18()
        before, *stages = self.widths
        self.network.conv1, self.network.bn1 = nn.Conv2d(3, before, 7, 2, 3, bias=False), nn.BatchNorm2d(before)
        for number, width in enumerate(stages, start=1):
            blocks: list[nn.Module] = []
            for stride in (1 if number == 1 else 2, 1):
                shortcut = None
                if stride != 1 or before != width:
                    shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                blocks.append(torchvision.models.resnet.BasicBlock(before, width, stride, shortcut))
                before = width
            setattr(self.network, f"layer{number}", nn.Sequential(*blocks))
        self.network.fc = nn.Identity()
        self.linear = None if num_classes is None else nn.Linear(self.channels, num_classes)

    @property
    def fc(self) -> nn.Linear | None:
        """The network's head, a linear layer."""
        return self.linear

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The four stage maps."""
        network: Any = self.network
        maps = [network.maxpool(network.relu(network.bn1(network.conv1(x_NCHW))))]
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            maps.append(layer(maps[-1]))
        return tuple(maps[1:])

    def stages(self) -> tuple[nn.Module, ...]:
        """The stem and the first stage, then each of the others."""
        network: Any = self.network
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        return nn.Sequential(stem, network.layer1), network.layer2, network.layer3, network.layer4

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> ResNet18:
        """A network of this depth at other widths."""
        return ResNet18(widths, num_classes)


CASES: dict[str, tuple[int, Callable[[], FeatureNetwork]]] = {
    "ResNet-20": (32, lambda: zoo.create("resnet20", CLASSES)),
    "resnet8x4": (32, lambda: zoo.create("resnet8x4", CLASSES)),
    "ResNet-18": (224, lambda: ResNet18((64, 64, 128, 256, 512), CLASSES)),
}


if __name__ == "__main__":
    main()
