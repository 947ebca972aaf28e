"""Where the time of a call goes, layer by layer, as the runtime itself tells it.

The model is loaded once more with its runtime's profiling on, after the timed runs and apart from them: profiling costs
time in every layer, so these figures divide a call and do not add up to its latency exactly.

    onnxruntime   kernel times of its profile file, CPU only: on CUDA they would be those of the launches
    openvino      InferRequest.get_profiling_info

The others give none: TensorRT's own layer times need its profiler in an execution context, which a captured graph has
not; PyTorch's runs whole exported programs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rkd_deploy.errors import require
from rkd_deploy.serve.backends import Array, load_backend
from rkd_deploy.serve.bench import random_input
from rkd_deploy.serve.bench.timing import Progress
from rkd_deploy.serve.files import model_name, model_path, read_card

_WARMUP, _RUNS = 5, 30


@dataclass(frozen=True)
class Layer:
    """One operator that runs, after the runtime's fusions."""

    name: str
    op: str
    """Its type, as the runtime calls it."""
    ms: float
    """Median over the runs of the time in it."""


@dataclass(frozen=True)
class LayerTimes:
    """Of one model at one batch size."""

    model: str
    file_bytes: int
    backend: str
    device: str
    threads: int | None
    batch: int
    runs: int
    layers: tuple[Layer, ...]
    """In the order they run; empty where the backend gives none."""

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def layer_times(
    models: Sequence[str | os.PathLike[str]],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerTimes]:
    """Time every layer of each model, on seeded random inputs; none where the backend does not give it.

    Args:
        models: Bundle folders or ONNX files.
        backend: As for `load_backend`, and so `device` and `threads`.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
        batch: Images in one call.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        seed: Of the inputs.
        progress: Told which model is looked at.

    Raises:
        UsageError: A model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: The backend cannot run here.
    """
    profile = _PROFILERS.get(backend)
    if profile is None or device not in (None, "cpu"):
        return []
    found = []
    for number, path in enumerate(models):
        with load_backend(backend, path, device=device, threads=threads) as loaded:
            card = read_card(path, loaded.metadata())
            x, input_name = random_input(loaded, card, batch, seed), loaded.input_name
        name, file = card.name if card is not None else model_name(path), model_path(path)
        if progress is not None:
            progress(f"layers of {name}", number / len(models))
        runs = profile(file, input_name, x, threads)
        found.append(LayerTimes(name, file.stat().st_size, backend, "cpu", threads, batch, len(runs), _medians(runs)))
    return found


_Run = list[Layer]


def _medians(runs: Sequence[_Run]) -> tuple[Layer, ...]:
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        totals: dict[tuple[str, str], float] = {}
        for layer in run:  # names need not be unique
            totals[layer.name, layer.op] = totals.get((layer.name, layer.op), 0.0) + layer.ms
        for key, ms in totals.items():
            times.setdefault(key, []).append(ms)
    return tuple(Layer(name, op, statistics.median(values)) for (name, op), values in times.items())


def _onnxruntime(file: Path, input_name: str, x: Array, threads: int | None) -> list[_Run]:
    from rkd_deploy.serve.backends.onnxrt import session_options

    ort = require("onnxruntime", "cpu")
    with tempfile.TemporaryDirectory(prefix="rkd-layers-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(_WARMUP + _RUNS):
            session.run(None, {input_name: x})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return read_profile(events)[_WARMUP:]


def read_profile(events: Sequence[dict[str, Any]]) -> list[_Run]:
    """The kernels of each run of an ONNX Runtime profile: events of category Node named NAME_kernel_time, in us."""
    runs: list[_Run] = []
    seen: set[str] = set()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        index, op = event["args"]["node_index"], event["args"].get("op_name", "")
        if not runs or index in seen:  # every run begins with the same node, and has each once
            runs.append([])
            seen = set()
        seen.add(index)
        name = event["name"].removesuffix("_kernel_time") or f"{op} {index}"
        runs[-1].append(Layer(name, op, event["dur"] / 1000))
    return runs


def _openvino(file: Path, input_name: str, x: Array, threads: int | None) -> list[_Run]:
    from rkd_deploy.serve.backends.ov import compile_options

    core = require("openvino", "openvino").Core()
    compiled = core.compile_model(str(file), "CPU", {**compile_options(threads), "PERF_COUNT": True})
    request, runs = compiled.create_infer_request(), []
    for _ in range(_WARMUP + _RUNS):
        request.infer({0: x}, share_inputs=True)
        executed = [node for node in request.get_profiling_info() if node.status.name == "EXECUTED"]
        runs.append([Layer(node.node_name, node.node_type, 1000 * node.real_time.total_seconds()) for node in executed])
    return runs[_WARMUP:]


_PROFILERS: dict[str, Callable[[Path, str, Array, int | None], list[_Run]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
