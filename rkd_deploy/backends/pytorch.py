"""Runs a live PyTorch module, the parity gate's reference, or a bundle's exported program.

Three ways to run one: eagerly (`pytorch`), compiled by torch.compile (`pytorch:compile`), and recorded as a CUDA graph
(`pytorch:cuda-graphs`), which is how a small network is launched once and not kernel by kernel.

This file, `pytorch_cuda.py` and `pytorch_profile.py` are the only ones of `backends` that import torch; they are loaded
by name, so nothing else reaches torch through them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from rkd_deploy.backends.files import broken_model, failed_load, program_path
from rkd_deploy.backends.protocol import (
    Array,
    Backend,
    InputSpec,
    LayerRun,
    ModelInfo,
    check_rows,
    closed_backend,
    parse_device,
)
from rkd_deploy.backends.pytorch_cuda import RecordedRun, limit_memory, on_stream
from rkd_deploy.backends.pytorch_profile import profile_operators
from rkd_deploy.backends.runtimes import RunOn
from rkd_deploy.errors import BackendError


class PyTorchBackend(Backend):
    """An nn.Module in inference mode. On CUDA it has a stream of its own, and float32 is exact: TF32 is off."""

    name = "pytorch"

    def __init__(
        self,
        module: nn.Module,
        run_on: RunOn | None = None,
        *,
        input_shape: Sequence[int | None],
        input_dtype: str,
        precision: str = "fp32",
        shared: bool = False,
        file: Path | None = None,
    ) -> None:
        """Take a copy of a live module, in eval mode, on the device; the module itself is left as it is.

        Args:
            module: Gives a tensor [N, K], or a tuple that begins with it.
            run_on: Where. Threads (`torch.set_num_threads`) and memory limit hold for the whole process. Default: the
                backend's own device.
            input_shape: Batch first; None is free.
            input_dtype: NumPy name.
            precision: What the module's arithmetic is, for reports.
            shared: On a CPU, hold the module's own weights and no copies: they must not be changed meanwhile.
            file: The exported program that the module was read from.

        Raises:
            UsageError: A memory limit beyond the GPU's memory.
            BackendError: CUDA was asked for and is not to be had here.
        """
        run_on = run_on or RunOn(self.name)
        self._place, self._process = _place(run_on.where), os.getpid()
        if run_on.threads is not None:
            torch.set_num_threads(run_on.threads)
        if run_on.memory_limit is not None:
            limit_memory(self._place, run_on.memory_limit)
        self._input = InputSpec("input", tuple(input_shape), np.dtype(input_dtype))
        self._info = ModelInfo(
            input_name=self._input.name, input_shape=self._input.shape, input_dtype=self._input.dtype.name, file=file
        )
        self.precision = precision
        kind, index = parse_device(run_on.where)
        self.device = "cpu" if kind == "cpu" else f"cuda:{index}"
        weights = [*module.parameters(), *module.buffers()] if shared and self.device == "cpu" else []
        # What deepcopy finds in its memo it takes for copied already: so the weights stay the module's.
        self._module: nn.Module | None = copy.deepcopy(module, {id(weight): weight for weight in weights}).to(
            self._place
        )
        with contextlib.suppress(NotImplementedError):  # what torch.export wrote has its mode fixed
            self._module.eval()
        # Streams of callers run side by side only where each has a stream of the device.
        self._stream: torch.cuda.Stream | None = None
        if self._place.type == "cuda":
            self._stream = torch.cuda.Stream(self._place)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._place))  # the weights are copied on that

    @classmethod
    def open(cls, path: str | os.PathLike[str], run_on: RunOn) -> Self:
        """Load the exported program of a bundle, model.pt2. Load only files that you trust.

        Raises:
            BackendError: The bundle has no exported program, or CUDA was asked for and is not to be had here.
            ModelFileError: The file is corrupt.
        """
        file = program_path(path)
        place = _place(run_on.where)
        if not zipfile.is_zipfile(file):  # torch logs a page of traceback before it raises
            raise broken_model(file, "it is no PyTorch archive")
        try:
            program = move_to_device_pass(torch.export.load(file), place)
            inputs = program.graph_signature.user_inputs
            values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in inputs}
            module = program.module()
        except Exception as error:  # zipfile, JSON and torch errors of every kind, none with a common base
            reason = " ".join(str(error).split()) or type(error).__name__
            raise failed_load(file, f"PyTorch {torch.__version__}", reason) from error
        if len(values) != 1:
            raise BackendError(
                f"{file} has {len(values)} inputs ({', '.join(values) or 'none'}). rkd-deploy runs models with one "
                "numeric input, batch first: export the classifier alone."
            )
        (value,) = values.values()
        shape = [size if isinstance(size, int) else None for size in value.shape]
        dtype = str(value.dtype).removeprefix("torch.")
        return cls(module, run_on, input_shape=shape, input_dtype=dtype, file=file)

    @property
    def info(self) -> ModelInfo:
        """What the model takes and gives; an exported program holds no metadata."""
        return self._info

    def infer(self, x: Array) -> Array:
        """Run one batch, host to host, in inference mode."""
        module = self._live()
        self._input.check(x)
        with self._on_device():
            return _to_numpy(_run(module, self._tensor(x)))

    def prepare(self, x: Array) -> Callable[[], None]:
        """Copy `x` to the device once; each call of what is returned starts one run there."""
        self._live()
        self._input.check(x)
        with self._on_device():
            resident = self._tensor(x).clone()

        def run() -> None:
            with self._on_device():
                _run(self._live(), resident)

        return run

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """Times of the operators of an exported program; none of a module, whose operators have no names."""
        module = self._live()
        self._input.check(x)
        if not isinstance(module, torch.fx.GraphModule):
            return []
        with self._on_device(), _explained(len(x)):
            return profile_operators(module, self._tensor(x), count)

    def synchronize(self) -> None:
        """Wait until the device has done all that was enqueued; on a CPU every run has ended already."""
        self._live()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Let go of the module and its weights."""
        self._module = None
        if self._place.type == "cuda":  # else the next backend's memory would be hidden in what PyTorch has kept
            torch.cuda.empty_cache()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Enqueue what runs inside on the backend's stream, with exact float32; on a CPU there is nothing to say."""
        return contextlib.nullcontext() if self._stream is None else on_stream(self._stream)

    def _live(self) -> nn.Module:
        if self._module is None:
            raise closed_backend(self.name)
        if os.getpid() != self._process:
            self._check_fork()
        return self._module

    def _check_fork(self) -> None:
        # PyTorch's threads, and what a process has on a GPU, do not come along in a fork: a run would wait for ever.
        if self._place.type == "cpu" and torch.get_num_threads() == 1:
            return
        raise BackendError(
            f"The {self.name} backend was loaded in process {self._process}, and this is a fork of it, {os.getpid()}, "
            "where PyTorch's threads are gone and a run would never end. Load the model after the fork, start the "
            "process with multiprocessing's spawn, or load with threads=1 on the CPU."
        )

    def _tensor(self, x: Array) -> Tensor:
        # from_numpy warns about read-only memory and refuses negative strides; such arrays are copied.
        with _explained(len(x)):
            return torch.from_numpy(np.require(x, requirements=["C", "W"])).to(self._place)


class CompiledPyTorchBackend(PyTorchBackend):
    """A module or program compiled by torch.compile.

    The first run compiles, and so does the first of another batch size, which then stands for all further ones.
    """

    name = "pytorch:compile"

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """No layers: compiled kernels are no longer the program's operators."""
        return []

    def __init__(self, module: nn.Module, run_on: RunOn | None = None, **facts: Any) -> None:
        """Take a copy of a live module; arguments and errors as for `PyTorchBackend`."""
        super().__init__(module, run_on, **facts)
        # fullgraph: what cannot be compiled is an error; else torch runs it eagerly, and says nothing.
        compiled: Any = torch.compile(self._live(), fullgraph=True)
        self._module = compiled


class GraphedPyTorchBackend(PyTorchBackend):
    """A module or program recorded as a CUDA graph and replayed, for each input shape anew; threads take turns."""

    name = "pytorch:cuda-graphs"

    def layer_runs(self, x: Array, count: int) -> list[LayerRun]:
        """No layers: a captured graph is one launch."""
        return []

    def __init__(self, module: nn.Module, run_on: RunOn | None = None, **facts: Any) -> None:
        """Take a copy of a live module; arguments and errors as for `PyTorchBackend`.

        Raises:
            BackendError: Another device than CUDA.
        """
        run_on = run_on or RunOn(self.name)
        if run_on.where == "cpu":
            raise BackendError(
                f"Device 'cpu' was asked for; the {self.name} backend runs on device='cuda' or 'cuda:N' only. On a CPU "
                "run pytorch, or pytorch:compile."
            )
        super().__init__(module, run_on, **facts)
        self._info = replace(self._info, cuda_graph=True)
        self._recorded: RecordedRun | None = None
        self._lock = threading.Lock()

    def infer(self, x: Array) -> Array:
        """Replay the graph of this input shape on one batch, host to host; record it first where it is new."""
        module = self._live()
        self._input.check(x)
        with self._lock, self._on_device():
            tensor = self._tensor(x)
            if self._recorded is None or self._recorded.shape != tensor.shape:
                self._recorded = None  # gives its memory back first
                self._recorded = _record(module, tensor)
            return _to_numpy(self._recorded.run(tensor).to("cpu", copy=True))

    def prepare(self, x: Array) -> Callable[[], None]:
        """Record a graph of its own for `x`; each call of what is returned replays it."""
        module = self._live()
        self._input.check(x)
        with self._on_device():
            recorded = _record(module, self._tensor(x))

        def run() -> None:
            self._live()
            with self._on_device():
                recorded.replay()

        return run

    def close(self) -> None:
        """Let go of the module and of the recorded graph."""
        self._recorded = None
        super().close()


def devices() -> tuple[str, ...]:
    """Devices that PyTorch would run on here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _record(module: nn.Module, x: Tensor) -> RecordedRun:
    with _explained(len(x)):
        return RecordedRun(lambda resident: _run(module, resident), x)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    with _explained(len(x)), torch.inference_mode():
        result: Any = module(x)
    logits = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(logits, Tensor):
        raise BackendError(
            f"The module gave a {type(result).__name__}; a backend needs a tensor of logits [N, K], "
            "or a tuple that begins with one. Wrap the module so that it returns that."
        )
    check_rows(logits.shape, len(x))
    return logits


@contextlib.contextmanager
def _explained(batch: int) -> Iterator[None]:
    """Raise PyTorch's errors (memory, a shape that was not exported, no compiler) as a BackendError."""
    try:
        yield
    except BackendError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"PyTorch failed to run the model on a batch of {batch}: {' '.join(str(error).split())}. "
            "Try a smaller batch, or check that the module takes this input."
        ) from error


def _to_numpy(logits: Tensor) -> Array:
    if logits.dtype is torch.bfloat16:
        logits = logits.float()  # NumPy has no bfloat16
    array: Array = logits.cpu().numpy()
    return array


def _place(device: str) -> torch.device:
    kind, index = parse_device(device)
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise BackendError(
            f"Device {device!r} was asked for, and PyTorch {torch.__version__} sees {count} CUDA devices here. "
            "Check with nvidia-smi, install a CUDA build of PyTorch (https://pytorch.org/get-started), "
            "or run on device='cpu'."
        )
    return torch.device(kind, index)
