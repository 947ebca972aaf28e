"""Parts `latency ..` of benchmarks/gpu.py: T, S0 and S + A on every runtime, precision and batch, beside their floors.

Networks take turns in one process. Device-resident runs and runs from host to host are measured of each, and each is
compared with the CPU's float32 logits first: `diff` is the largest difference, `scale` the largest logit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from floors import forward_work
from gpu_networks import IMAGES, LEVELS, TINY, Measured, Networks, pixels
from gpu_rows import Rows, check_time

from rkd_deploy.backends import Array, Backend, RunOn, available, onnxrt_cuda
from rkd_deploy.backends.pytorch import GraphedPyTorchBackend, PyTorchBackend
from rkd_deploy.bench.timing import TimingLimits, Workload, measure_workloads
from rkd_deploy.export.precision.convert import DTYPES

PASSES = ((1, 32), (8, 128))
"""Batch sizes, in the order of their worth."""
TOLERANCES = {"fp32": 1e-4}
"""On the largest difference over the largest logit, where a precision is held to one."""
IN_FULL = 5
"""Ways that every network runs in; the others have `FEW`: loading and comparing takes most of the time of a way."""
FEW = ("S0", "side_by_side, wide", "trunk, wide", "trunk, tail")
_LIVE = {"pytorch": PyTorchBackend, "pytorch:cuda-graphs": GraphedPyTorchBackend}


@dataclass(frozen=True)
class Way:
    """How the networks are run.

    Attributes:
        backend: Name of the backend.
        precision: Of the network.
        options: Of ONNX Runtime's CUDA provider, in place of the package's own.
    """

    backend: str
    precision: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        more = "".join(f", {name}={value}" for name, value in self.options)
        return f"{self.backend}{more}, {self.precision}"


_NHWC = (("prefer_nhwc", "1"),)
_FUSED = (("fuse_conv_bias", "1"),)
ON_CUDA = (
    Way("onnxruntime:cuda-graphs", "fp16"),
    Way("pytorch:cuda-graphs", "fp16"),
    Way("onnxruntime:cuda-graphs", "fp32"),
    Way("onnxruntime", "fp16"),
    Way("onnxruntime", "fp32"),
    Way("onnxruntime:cuda-graphs", "fp16", (*_NHWC, *_FUSED)),
    Way("pytorch:cuda-graphs", "fp32"),
    Way("onnxruntime:cuda-graphs", "fp16", _FUSED),
    Way("onnxruntime", "fp16", (*_NHWC, *_FUSED)),
    Way("onnxruntime", "fp16", (("use_tf32", "0"),)),
    Way("onnxruntime:cuda-graphs", "fp32", (*_NHWC, *_FUSED)),
    Way("onnxruntime:cuda-graphs", "fp32", (("use_tf32", "1"),)),
    Way("pytorch", "fp16"),
    Way("pytorch:cuda-graphs", "bf16"),
    Way("pytorch", "fp32"),
    Way("tensorrt", "fp16"),
    Way("tensorrt", "fp32"),
    Way("tensorrt", "int8"),
    Way("tensorrt-rtx", "fp16"),
    Way("onnxruntime", "bf16"),
    Way("onnxruntime", "int8"),
)
"""By worth: what is cut off is the end."""
ON_CPU = (Way("pytorch", "fp32"), Way("onnxruntime", "fp32"), Way("openvino", "fp32"))


def run(rows: Rows, case: str) -> None:
    """Measure one case, the batches that matter most in every way first."""
    ways = [way for way in (ON_CUDA if rows.device == "cuda" else ON_CPU) if _is_here(way, rows)]
    passes = ((1,),) if rows.tiny else PASSES
    with (
        tempfile.TemporaryDirectory(prefix="rkd-gpu-") as folder,
        Networks(case, TINY if rows.tiny else tuple(LEVELS), Path(folder)) as networks,
    ):
        began = time.monotonic()
        networks.export(*dict.fromkeys(way.precision for way in ways[:IN_FULL] if way.backend not in _LIVE))
        rows.add("exported", seconds=time.monotonic() - began)
        precisions = [*dict.fromkeys(way.precision for way in ways)]
        _work(rows, networks, precisions, [batch for batches in passes for batch in batches])
        for batches in passes:
            for way in ways:
                left = [batch for batch in batches if f"{way}, batch {batch}" not in rows]
                if left and f"{way}" not in rows:
                    with rows.attempt(f"{way}"), ExitStack() as stack:
                        check_time(rows, 3.0)
                        _way(way, networks, networks.names if way in ways[:IN_FULL] else FEW, left, rows, stack)


def _way(
    way: Way, networks: Networks, names: Sequence[str], batches: Sequence[int], rows: Rows, stack: ExitStack
) -> None:
    if way.backend not in _LIVE:
        networks.export(way.precision)
    loaded = dict(_loaded(way, networks, names, rows, stack))
    if not loaded:
        raise RuntimeError("no network could be loaded")
    for batch in batches:
        check_time(rows, 2.0)
        _measure(way, loaded, pixels(batch, networks.size), rows)


def _is_here(way: Way, rows: Rows) -> bool:
    """Whether the backend runs on this device; where it does not, one row says why."""
    base, key = way.backend.partition(":")[0], f"{way.backend}: not here"
    status = next(one for one in available() if one.name == base)
    if status.ok and rows.device in status.devices:
        return True
    if key not in rows:
        rows.add(key, reason=status.reason or f"no {rows.device} among {', '.join(status.devices)}")
    return False


def _work(rows: Rows, networks: Networks, precisions: Sequence[str], batches: Sequence[int]) -> None:
    """What each network has to do, for the floors."""
    image = torch.randn(1, 3, networks.size, networks.size)
    for precision in precisions:
        if (key := f"work, {precision}") not in rows:
            work = {
                name: {
                    str(batch): forward_work(one.graph.network, image.expand(batch, -1, -1, -1), precision).to_dict()
                    for batch in batches
                }
                for name, one in networks.measured.items()
            }
            rows.add(key, precision=precision, work=work)


def _loaded(
    way: Way, networks: Networks, names: Sequence[str], rows: Rows, stack: ExitStack
) -> Iterator[tuple[str, Backend]]:
    """The backends that answer; each with a row of parity, or of why there is none."""
    for name, network in networks.measured.items():
        if name not in names:
            continue
        key = f"{way}: {name}"
        with rows.attempt(key):
            began = time.monotonic()
            backend = stack.enter_context(_backend(way, network, networks.file(name, way.precision), rows.device))
            found = backend.infer(pixels(IMAGES, network.size))
            _compare(way, network, found, key, time.monotonic() - began, rows, backend.info.error_lines)
            yield name, backend


def _backend(way: Way, network: Measured, file: Path, device: str) -> Backend:
    run_on = RunOn(way.backend, device=device)
    if way.backend not in _LIVE:
        with mock.patch.dict(onnxrt_cuda.OPTIONS, dict(way.options)):
            return run_on.load(file, batches=[batch for batches in PASSES for batch in batches])
    graph = network.graph if way.precision == "fp32" else network.graph.in_dtype(DTYPES[way.precision])
    shape = (None, network.size, network.size, 3)
    return _LIVE[way.backend](graph, run_on, input_shape=shape, input_dtype="uint8", precision=way.precision)


def _compare(
    way: Way, network: Measured, found: Array, key: str, seconds: float, rows: Rows, error_lines: int | None
) -> None:
    scale = float(np.abs(network.logits_NK).max())
    difference = float(np.abs(found - network.logits_NK).max())
    agree = float((found.argmax(1) == network.logits_NK.argmax(1)).mean())
    facts: dict[str, Any] = {"load_s": seconds, "diff": difference, "scale": scale, "agree": agree}
    facts |= {} if error_lines is None else {"error_lines": error_lines}
    if way.precision in TOLERANCES:
        facts["passed"] = difference <= TOLERANCES[way.precision] * scale
    rows.add(key, **facts)


def _measure(way: Way, loaded: Mapping[str, Backend], x: Array, rows: Rows) -> None:
    """One row: the median of each network, device-resident and from host to host."""
    workloads = {
        f"{name}|{kind}": Workload((backend,), x, kind == "host")
        for name, backend in loaded.items()
        for kind in ("device", "host")
    }
    seconds = 0.01 if rows.tiny else 0.08
    limits = TimingLimits(
        min_seconds=seconds, min_runs=3 if rows.tiny else 8, warmup_seconds=seconds / 4, warmup_runs=3
    )
    timings = measure_workloads(workloads, limits)
    rows.add(
        f"{way}, batch {len(x)}",
        backend=way.backend,
        precision=way.precision,
        options=dict(way.options),
        batch=len(x),
        **{f"{kind}_ms": {name: timings[f"{name}|{kind}"].p50 for name in loaded} for kind in ("device", "host")},
    )
