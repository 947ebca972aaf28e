"""Where the time of a call goes, layer by layer, as the runtime itself tells it.

The model is loaded once more with its runtime's profiling on, after the timed runs and apart from them: profiling costs
time in every layer, so these figures divide a call and do not add up to its latency exactly.

    onnxruntime               kernel times of its profile file, CPU only: on CUDA they would be those of the launches
    openvino                  InferRequest.get_profiling_info
    tensorrt, tensorrt-rtx    IProfiler, without CUDA graph
    pytorch                   torch.profiler around each operator of the exported program

The others give none: what torch.compile makes is no longer the program's operators, and a captured graph is one launch.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rkd_deploy.backends import Array, Backend, RunOn
from rkd_deploy.backends.files import model_name, model_path, read_card
from rkd_deploy.backends.protocol import LayerRun, LayerTime
from rkd_deploy.bench.loading import Case, load_model, random_input
from rkd_deploy.bench.timing import Progress
from rkd_deploy.errors import require

_WARMUP, _RUNS = 5, 30


@dataclass(frozen=True)
class Layer:
    """One operator that runs, after the runtime's fusions."""

    name: str
    op: str
    """Its type, as the runtime calls it."""
    ms: float
    """Median over the runs of the time in it."""
    precision: str | None = None
    """Type it works on, as the runtime says, which need not be the file's: most CPUs run float16 files in float32."""


@dataclass(frozen=True, kw_only=True)
class LayerTimes(Case):
    """Of one model at one batch size."""

    runs: int
    layers: tuple[Layer, ...]
    """In the order they run."""

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def layer_times(
    models: Sequence[str | os.PathLike[str]],
    run_on: RunOn,
    *,
    batch: int = 1,
    batches: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerTimes]:
    """Time every layer of each model, on seeded random inputs; none where the backend does not give it.

    Args:
        models: As for `bench`.
        run_on: Where; its streams are of no effect here.
        batch: Images in one call.
        batches: Those of the bench, so that the engine is the one that it measured; None: the usual ones.
        shape: Of one input, for models that leave it open and have no card.
        seed: Of the inputs.
        progress: Told which model is looked at.

    Raises:
        UsageError: A model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: The backend cannot run here.
    """
    alone = replace(run_on, streams=1)
    found = []
    for number, path in enumerate(models):
        with load_model(path, alone, batches, progress) as loaded:
            card, file = read_card(path, loaded.metadata()), model_path(path)
            name = card.name if card is not None else model_name(path)
            if progress is not None:
                progress(f"layers of {name} on {alone}", number / len(models))
            x = random_input(loaded, card, batch, seed, shape)
            runs = _layer_runs(loaded, file, x, run_on.threads)
        if runs:
            found.append(
                LayerTimes(
                    model=name,
                    file_bytes=file.stat().st_size,
                    backend=loaded.name,
                    device=loaded.device,
                    threads=run_on.threads,
                    batch=batch,
                    runs=len(runs),
                    layers=_medians(runs),
                )
            )
    return found


def _layer_runs(loaded: Backend, file: Path, x: Array, threads: int | None) -> list[LayerRun]:
    if (loaded.name, loaded.device) == ("onnxruntime", "cpu"):
        return _onnxruntime(file, loaded.input_name, x, threads)
    if loaded.name == "openvino":
        return _openvino(file, x, threads)
    return loaded.layer_runs(x, _WARMUP + _RUNS)[_WARMUP:]


def _medians(runs: Sequence[LayerRun]) -> tuple[Layer, ...]:
    times: dict[tuple[str, str, str | None], list[float]] = {}
    for run in runs:
        totals: dict[tuple[str, str, str | None], float] = {}
        for layer in run:  # names need not be unique
            key = (layer.name, layer.op, layer.precision)
            totals[key] = totals.get(key, 0.0) + layer.ms
        for key, ms in totals.items():
            times.setdefault(key, []).append(ms)
    return tuple(
        Layer(name, op, statistics.median(values), precision) for (name, op, precision), values in times.items()
    )


def _onnxruntime(file: Path, input_name: str, x: Array, threads: int | None) -> list[LayerRun]:
    from rkd_deploy.backends.onnxrt import session_options

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


def read_profile(events: Sequence[dict[str, Any]]) -> list[LayerRun]:
    """The kernels of each run of an ONNX Runtime profile: events of category Node named NAME_kernel_time, in us."""
    runs: list[LayerRun] = []
    seen: set[str] = set()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        index, op = facts["node_index"], facts.get("op_name", "")
        if not runs or index in seen:  # every run begins with the same node, and has each once
            runs.append([])
            seen = set()
        seen.add(index)
        name = event["name"].removesuffix("_kernel_time") or f"{op} {index}"
        precision = next((kind for one in facts.get("input_type_shape") or () for kind in one), None)
        runs[-1].append(LayerTime(name, op, event["dur"] / 1000, _numpy_name(precision)))
    return runs


def _numpy_name(kind: str | None) -> str | None:
    return {"float": "float32", "double": "float64"}.get(kind, kind) if kind else None


def _openvino(file: Path, x: Array, threads: int | None) -> list[LayerRun]:
    from rkd_deploy.backends.ov import compile_options

    core = require("openvino", "openvino").Core()
    compiled = core.compile_model(str(file), "CPU", {**compile_options(threads), "PERF_COUNT": True})
    request, runs = compiled.create_infer_request(), []
    for _ in range(_WARMUP + _RUNS):
        request.infer({0: x}, share_inputs=True)
        executed = [node for node in request.get_profiling_info() if node.status.name == "EXECUTED"]
        runs.append([_openvino_layer(node) for node in executed])
    return runs[_WARMUP:]


_OPENVINO_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i32": "int32"}


def _openvino_layer(node: Any) -> LayerTime:
    # Its kernels are named after their type: brgconv_avx512_I8, jit_gemm_FP32.
    kind = node.exec_type.rpartition("_")[2].lower().replace("fp", "f")
    return LayerTime(node.node_name, node.node_type, 1000 * node.real_time.total_seconds(), _OPENVINO_NAMES.get(kind))
