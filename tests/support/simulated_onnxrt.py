"""ONNX Runtime's CUDA provider on a machine without a GPU: sessions compute on the CPU, memory and captures behave.

As with the real one, a captured graph reads and writes the memory that was bound when it was captured, whatever is
bound later; an id that was captured is replayed whatever the shape; a captured run takes no array of the host. Names
and arguments are those of onnxruntime's Python API.
"""

from __future__ import annotations

import numpy as np
import onnxruntime

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
_REAL = onnxruntime.InferenceSession


class Value:
    """In place of onnxruntime.OrtValue on a device."""

    def __init__(self, array):
        self.memory = array

    @staticmethod
    def ortvalue_from_numpy(x, kind="cpu", index=0):
        assert kind == "cuda"
        assert x.flags.c_contiguous
        return Value(x.copy())

    @staticmethod
    def ortvalue_from_shape_and_type(shape, dtype, kind="cpu", index=0):
        assert kind == "cuda"
        return Value(np.full(shape, 0xAB, dtype))

    def update_inplace(self, x):
        assert x.flags.c_contiguous
        assert (x.shape, x.dtype) == (self.memory.shape, self.memory.dtype)
        self.memory[...] = x

    def numpy(self):
        return self.memory.copy()

    def shape(self):
        return list(self.memory.shape)


class Options:
    """In place of onnxruntime.RunOptions."""

    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, key, value):
        self.entries[key] = value


class Binding:
    """In place of a session's IOBinding."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value

    def bind_output(self, name, kind, index):
        self.outputs[name] = None

    def get_outputs(self):
        return list(self.outputs.values())

    def synchronize_outputs(self):
        pass


class Session:
    """In place of onnxruntime.InferenceSession."""

    def __init__(self, path, options, *, providers, enable_fallback):
        (self.provider,) = providers
        self.options = dict(self.provider[1])
        self.graphs = {}
        self._real = _REAL(path, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_providers(self):
        return PROVIDERS

    def io_binding(self):
        return Binding()

    def run(self, names, fed, options=None):
        if self.options.get("enable_cuda_graph") == "1":
            assert options.entries["gpu_graph_id"] == "-1", "a captured run needs its input on the device"
        return self._real.run(names, fed)

    def run_with_iobinding(self, binding, options=None):
        if self.options.get("enable_cuda_graph") == "1":
            binding = self.graphs.setdefault(options.entries["gpu_graph_id"], binding)
        fed = {name: value.memory for name, value in binding.inputs.items()}
        for name, found in zip(binding.outputs, self._real.run(list(binding.outputs), fed), strict=True):
            if binding.outputs[name] is None:
                binding.outputs[name] = Value(found)
            binding.outputs[name].memory[...] = found


def install(monkeypatch):
    """One simulated device for ONNX Runtime; gives the sessions, as they are opened."""
    opened = []

    def open_session(*arguments, **options):
        opened.append(Session(*arguments, **options))
        return opened[-1]

    for name, value in {
        "get_available_providers": lambda: PROVIDERS,
        "InferenceSession": open_session,
        "OrtValue": Value,
        "RunOptions": Options,
    }.items():
        monkeypatch.setattr(onnxruntime, name, value)
    return opened
