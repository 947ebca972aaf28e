"""Measures what a machine can do at the most, through the backend that the model runs on.

Device and threads are the model's own too.

Multiply-adds per second: the better of a large matrix product and a 3x3 convolution, models of one operator. Bytes per
second: the better of a copy (one elementwise operator) and of reading weights (a matrix times one vector), of as many
bytes as the model must move, again and again, so that what stays in the caches for the model stays there for them too.
Each is the best of its runs: a ceiling is what was once reached. As in McCalpin's STREAM (1995), a write counts as its
own bytes, without the line that is fetched for it.

It is measured in a process of its own, so that its memory and threads are none of the bench's.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends import Array, RunOn
from rkd_deploy.bench.graph_cost import macs
from rkd_deploy.errors import BackendError, RkdError, require

ARITHMETIC = ("float32", "float16", "int8")
"""Types of multiply-adds that a ceiling can be measured for."""
CEILING_BACKENDS = ("onnxruntime", "onnxruntime:cuda-graphs", "openvino", "tensorrt", "tensorrt-rtx")
"""Backends whose ceilings can be measured: those that run an ONNX file. PyTorch's runs exported programs."""
SMALLEST, LARGEST = 1 << 22, 1 << 27
"""Bounds of the bytes that one run moves: below, the call itself would be measured; above, caches are full anyway."""
_SECONDS, _RUNS = 0.15, 5


@dataclass(frozen=True)
class Ceilings:
    """What one backend on one device, with so many threads, reaches at the most."""

    backend: str
    device: str
    threads: int | None
    arithmetic: str
    macs_per_s: float
    """Multiply-adds per second of the fastest of `kernels`."""
    kernels: Mapping[str, float]
    """Multiply-adds per second of each kernel that was measured, by its name."""
    bytes_per_s: Mapping[int, float]
    """Bytes per second by the bytes that one run reads and writes: the better of a copy and a matrix times a vector."""


def footprint(bytes_moved: int) -> int:
    """Bytes of the copy that stands for a model: the next power of two, within `SMALLEST` and `LARGEST`."""
    return min(LARGEST, max(SMALLEST, 1 << math.ceil(math.log2(max(1, bytes_moved)))))


def measure_ceilings(
    run_on: RunOn,
    *,
    arithmetic: str = "float32",
    footprints: Sequence[int] = (LARGEST,),
) -> Ceilings:
    """Measure ceilings in a process of their own: about 0.2 s for each kernel and footprint, and the process's start.

    Args:
        run_on: Where; the backend is one of `CEILING_BACKENDS`.
        arithmetic: One of `ARITHMETIC`.
        footprints: Bytes that one run reads and writes together.

    Raises:
        MissingDependencyError: onnx is not installed.
        BackendError: The backend cannot run here.
    """
    require("onnx", "export")
    backend = run_on.backend
    wanted = {"backend": backend, "device": run_on.device, "threads": run_on.threads, "arithmetic": arithmetic}
    # In a process of its own: what this one has loaded (thread pools, arenas, warmed caches) would be in the way, and
    # what the probes take goes back when they end.
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _answer; _answer()"],
        input=json.dumps({**wanted, "footprints": list(footprints)}),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # the same modules as here
        capture_output=True,
        text=True,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BackendError(
            f"The ceilings of {backend} could not be measured: {reason}. Bench without --roofline."
        ) from error
    if "error" in answer:
        raise BackendError(f"The ceilings of {backend} could not be measured: {answer['error']}")
    copies = {int(size): rate for size, rate in answer.pop("bytes_per_s").items()}
    return Ceilings(**answer, bytes_per_s=copies)


def _answer() -> None:
    """Main function of the measuring process: a question on standard input, the answer on the last line of output."""
    try:
        answer: dict[str, Any] = asdict(_measured(**json.load(sys.stdin)))
    except RkdError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


def _measured(
    backend: str, device: str | None, threads: int | None, arithmetic: str, footprints: Sequence[int]
) -> Ceilings:
    # Memory is as fast for any type, and not every runtime copies int8.
    dtype = np.dtype("float32" if arithmetic == "int8" else arithmetic)
    kernels: dict[str, float] = {}
    copies: dict[int, float] = {}
    ran_on, run_on = "cpu", RunOn(backend, device=device, threads=threads)
    with tempfile.TemporaryDirectory(prefix="rkd-ceilings-") as folder:

        def rate(work: int, op: str, *shapes: tuple[int, ...], as_int8: bool = False, **attributes: Any) -> float:
            nonlocal ran_on
            file = Path(folder) / "probe.onnx"
            if as_int8:
                x = _write_quantised(file, op, *shapes, signed=backend.startswith("tensorrt"), **attributes)
            else:
                x = _write(file, op, dtype, *shapes, **attributes)
            with run_on.load(file) as loaded:
                ran_on = loaded.device
                return work / _best(loaded.prepare(x), loaded.synchronize)

        # Large enough that starting the kernel does not count, small enough to be done in a moment.
        cuda = (device or "").startswith("cuda") or backend.startswith("tensorrt")
        side, images, channels = (8192, 32, 256) if cuda else (1024, 1, 128)
        square, maps, kernel = (side, side), (images, channels, 56, 56), (channels, channels, 3, 3)
        product, window = macs("MatMul", square, square, square), macs("Conv", maps, kernel, maps)
        # Two shapes of work, because a library may be tuned for one of them alone: the ceiling is the better.
        int8 = arithmetic == "int8"
        kernels[f"matrix product, side {side}"] = rate(product, "MatMul", square, square, square, as_int8=int8)
        kernels[f"3x3 convolution of {'x'.join(map(str, maps))}"] = rate(
            window, "Conv", maps, maps, kernel, as_int8=int8, pads=[1] * 4
        )
        for size in footprints:
            copied, read = size // 2 // dtype.itemsize, size // 1024 // dtype.itemsize
            copies[size] = max(
                # A copy reads and writes, a matrix times a vector reads alone; either may be badly tuned in a runtime.
                rate(size, "Relu", (1, copied), (1, copied)),
                rate(size, "MatMul", (1, 1024), (1, read), (1024, read)),
            )
    return Ceilings(backend, ran_on, threads, arithmetic, max(kernels.values()), kernels, copies)


def _write(
    file: Path,
    op: str,
    dtype: np.dtype[Any],
    x: tuple[int, ...],
    y: tuple[int, ...],
    weight: tuple[int, ...] = (),
    **attributes: Any,
) -> Array:
    """Write a model of one operator, x and y the shapes of input and output, and give an input for it."""
    onnx = require("onnx", "export")
    kind, generator = onnx.helper.np_dtype_to_tensor_dtype(dtype), np.random.default_rng(0)
    constants = {"weight": (generator.random(weight, np.float32) - 0.5).astype(dtype)} if weight else {}
    node = onnx.helper.make_node(op, ["x", "weight"] if weight else ["x"], ["y"], **attributes)
    _save(file, [node], kind, x, y, constants)
    return (generator.random(x, np.float32) - 0.5).astype(dtype)


def _write_quantised(
    file: Path,
    op: str,
    x: tuple[int, ...],
    y: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    signed: bool,
    **attributes: Any,
) -> Array:
    """Write a product between quantised ends, the form of which runtimes make one int8 kernel; give an input for it.

    Args:
        file: Where the model goes.
        op: Name of the operator.
        x: Shape of the input.
        y: Shape of the output.
        weight: Shape of the weight.
        signed: Activations in int8, which TensorRT takes alone; else in uint8, which is fast on CPUs.
        attributes: Attributes of the operator.
    """
    onnx = require("onnx", "export")
    generator, dtype = np.random.default_rng(0), np.dtype(np.int8 if signed else np.uint8)
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    constants = {
        "weight": generator.integers(-127, 128, weight, np.int8),
        "scale": np.float32(0.01),
        "middle": dtype.type(0 if signed else 128),
        "zero": np.int8(0),
    }
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["x", "scale", "middle"], ["x_real"]),
        onnx.helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["weight_real"]),
        onnx.helper.make_node(op, ["x_real", "weight_real"], ["y_real"], **attributes),
        onnx.helper.make_node("QuantizeLinear", ["y_real", "scale", "middle"], ["y"]),
    ]
    _save(file, nodes, kind, x, y, {name: np.asarray(value) for name, value in constants.items()})
    return generator.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, x, dtype)


def _save(
    file: Path, nodes: Sequence[Any], kind: int, x: tuple[int, ...], y: tuple[int, ...], constants: Mapping[str, Array]
) -> None:
    onnx = require("onnx", "export")
    ends = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", x), ("y", y))]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "probe", ends[:1], ends[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(file))


def _best(enqueue: Callable[[], None], synchronize: Callable[[], None]) -> float:
    """Seconds of the fastest run: whatever disturbs a run only ever makes it longer."""
    best, runs, end = math.inf, 0, math.inf
    while runs < _RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        enqueue()
        synchronize()
        now = time.perf_counter()
        best, runs = min(best, now - start), runs + 1
        end = now + _SECONDS if runs == 1 else end  # the first run allocates and chooses kernels
    return best
