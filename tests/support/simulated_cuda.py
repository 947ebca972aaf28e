"""A CUDA device for machines without one: the lowest seam there is, and it computes.

What is enqueued runs when the stream is synchronised and not before; what is enqueued during a capture runs when its
graph is launched; device memory holds garbage until something is copied there. So a missing copy or synchronisation
gives a wrong answer, and not only another list of calls. simulated_building.py and simulated_running.py are a TensorRT
on it. Every name here is held against the real library's by tests/backends/tensorrt/test_api.py.
"""

from __future__ import annotations

import ctypes
import enum
from types import ModuleType, SimpleNamespace

import numpy as np


class Device:
    """One simulated GPU: its memory, its streams, and the log of what was asked of it."""

    def __init__(self):
        self.name, self.capability, self.count, self.driver = "Simulated GPU", (12, 0), 1, 13020
        self.free_bytes = 1 << 30
        self.memory = {}  # address -> (space, buffer)
        self.freed = []  # kept, so that a use after free is found and does no harm
        self.pending, self.capturing, self.graphs, self.live = [], None, {}, set()
        self.log, self.current, self.handles, self.failing = [], None, 100, set()

    def handle(self, kind):
        self.handles += 1
        self.live.add((kind, self.handles))
        return self.handles

    def enqueue(self, operation):
        (self.pending if self.capturing is None else self.capturing).append(operation)

    def note(self, name, *facts):
        self.log.append((name, *facts) if facts else name)

    def at(self, address, size, space):
        found, buffer = self.memory[address]
        assert found == space, f"{space} memory was meant, {found} memory was given"
        assert size <= len(buffer)
        return np.frombuffer(buffer, np.uint8)[:size]


def cuda_runtime(device):
    """The module cuda.bindings.runtime over a device."""
    module = ModuleType("cuda.bindings.runtime")
    errors = enum.IntEnum(
        "cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorInvalidValue": 1,
                        "cudaErrorNoDevice": 100, "cudaErrorLaunchFailure": 719},
    )  # fmt: skip
    kinds = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    modes = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    module.cudaError_t, module.cudaMemcpyKind, module.cudaStreamCaptureMode = errors, kinds, modes
    module.cudaStreamNonBlocking, module.cudaHostAllocDefault = 1, 0
    ok = errors.cudaSuccess

    def function(call):
        name = call.__name__

        def logged(*arguments):
            device.log.append(name.removeprefix("cuda"))
            if name in device.failing:
                return (errors.cudaErrorLaunchFailure, None)
            return call(*arguments)

        setattr(module, name, logged)

    def allocate(size, space):
        if size > device.free_bytes:
            return errors.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_byte * size)()
        ctypes.memset(buffer, 0xAB, size)
        device.memory[ctypes.addressof(buffer)] = (space, buffer)
        return ok, ctypes.addressof(buffer)

    def free(address):
        if address not in device.memory:
            return (errors.cudaErrorInvalidValue,)
        device.freed.append(device.memory.pop(address))
        return (ok,)

    @function
    def cudaGetDeviceCount():
        return (ok, device.count) if device.count else (errors.cudaErrorNoDevice, None)

    @function
    def cudaSetDevice(index):
        device.current = index
        return (ok,)

    @function
    def cudaGetDeviceProperties(index):
        major, minor = device.capability
        return ok, SimpleNamespace(name=device.name.encode() + b"\0" * 8, major=major, minor=minor)

    @function
    def cudaDriverGetVersion():
        return ok, device.driver

    @function
    def cudaGetErrorString(error):
        return ok, error.name.encode()

    @function
    def cudaMalloc(size):
        return allocate(size, "device")

    @function
    def cudaHostAlloc(size, flags):
        return allocate(size, "pinned")

    @function
    def cudaFree(address):
        return free(address)

    @function
    def cudaFreeHost(address):
        return free(address)

    @function
    def cudaStreamCreateWithFlags(flags):
        assert flags == module.cudaStreamNonBlocking
        return ok, device.handle("stream")

    @function
    def cudaStreamDestroy(stream):
        device.live.remove(("stream", stream))
        return (ok,)

    @function
    def cudaStreamSynchronize(stream):
        assert device.capturing is None, "a capturing stream cannot be synchronised"
        while device.pending:
            device.pending.pop(0)()
        return (ok,)

    @function
    def cudaMemcpyAsync(target, source, size, kind, stream):
        spaces = ("device", "pinned") if kind == kinds.cudaMemcpyHostToDevice else ("pinned", "device")

        def copy():
            device.at(target, size, spaces[0])[:] = device.at(source, size, spaces[1])

        device.enqueue(copy)
        return (ok,)

    @function
    def cudaStreamBeginCapture(stream, mode):
        device.capturing = []
        return (ok,)

    @function
    def cudaStreamEndCapture(stream):
        captured, device.capturing = device.capturing, None
        graph = device.handle("graph")
        device.graphs[graph] = captured
        return ok, graph

    @function
    def cudaGraphInstantiate(graph, flags):
        executable = device.handle("executable")
        device.graphs[executable] = device.graphs[graph]
        return ok, executable

    @function
    def cudaGraphLaunch(executable, stream):
        assert ("executable", executable) in device.live
        device.pending.extend(device.graphs[executable])
        return (ok,)

    @function
    def cudaGraphExecDestroy(executable):
        device.live.remove(("executable", executable))
        return (ok,)

    @function
    def cudaGraphDestroy(graph):
        device.live.remove(("graph", graph))
        return (ok,)

    return module
