"""A CUDA device and a TensorRT for machines without either: the lowest seam there is, and it computes.

What is enqueued runs when the stream is synchronised and not before; what is enqueued during a capture runs when its
graph is launched; device memory holds garbage until something is copied there. So a missing copy or synchronisation
gives a wrong answer, and not only another list of calls. The engine's arithmetic is ONNX's reference evaluator.
Every name here is held against the real libraries' by tests/serve/engines/test_api.py.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

MAGIC = b"SIMULATED"


class Device:
    """One simulated GPU: its memory, its streams, and the log of what was asked of it."""

    def __init__(self):
        self.name, self.capability, self.count, self.driver = "Simulated GPU", (9, 0), 1, 13020
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


def tensorrt(device, version="11.4.0", rtx=False):
    """The module tensorrt (or tensorrt_rtx) over a device."""
    trt = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    trt.__version__ = version

    def enumeration(name, *members):
        setattr(trt, name, enum.IntEnum(name, list(members), start=0))

    enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    enumeration("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "INT64", "BF16")
    enumeration("LayerType", "CONVOLUTION")
    enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
    enumeration("LayerInformationFormat", "ONELINE", "JSON")
    enumeration("BuilderFlag", "TF32", "REFIT", "VERSION_COMPATIBLE")
    levels = ["NONE", "AMPERE_PLUS"] + ["SAME_COMPUTE_CAPABILITY"] * (not version.startswith("10.3"))
    enumeration("HardwareCompatibilityLevel", *levels)
    enumeration("MemoryPoolType", "WORKSPACE")
    ten = version.startswith("10.")
    enumeration("NetworkDefinitionCreationFlag", *(["EXPLICIT_BATCH", "STRONGLY_TYPED"] if ten else ["STRONGLY_TYPED"]))
    if rtx:
        enumeration("ComputeCapability", "NONE", "CURRENT", "SM86", "SM120")
        enumeration("EngineValidity", "VALID", "SUBOPTIMAL", "INVALID")
        enumeration("DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE")
    types = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.FLOAT16: "HALF",
             onnx.TensorProto.INT64: "INT64", onnx.TensorProto.BFLOAT16: "BF16"}  # fmt: skip

    def log(name, *facts):
        device.log.append((name, *facts) if facts else name)

    def described(value):
        tensor = value.type.tensor_type
        shape = [size.dim_value or -1 for size in tensor.shape.dim]
        return SimpleNamespace(name=value.name, shape=shape, dtype=trt.DataType[types[tensor.elem_type]])

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self):
            pass

    class IProgressMonitor:
        def __init__(self):
            pass

    class IProfiler:
        def __init__(self):
            pass

    class ILayer:
        def __init__(self, node):
            self.name, self.type, self._node = node.name or node.op_type, trt.LayerType.CONVOLUTION, node

        def get_output(self, index):
            return SimpleNamespace(name=self._node.output[index], shape=(-1, 3), dtype=trt.DataType.FLOAT)

    class INetworkDefinition:
        content, num_inputs, num_layers = None, 0, 0

        def get_input(self, index):
            return described(self.model.graph.input[index])

        def get_layer(self, index):
            return ILayer(self.model.graph.node[index])

    class ParserError:
        def __init__(self, node, index):
            self._node, self._index = node, index

        def desc(self):
            return "no such operator"

        def node(self):
            return self._index

        def node_name(self):
            return self._node.name

        def node_operator(self):
            return self._node.op_type

    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._errors = network, []

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

        def parse(self, content):
            network = self._network
            network.content, network.model = content, onnx.load_model_from_string(content)
            graph = network.model.graph
            network.num_inputs, network.num_layers = len(graph.input), len(graph.node)
            self._errors = [ParserError(n, i) for i, n in enumerate(graph.node) if n.op_type == "Unsupported"]
            return not self._errors

    class IOptimizationProfile:
        def set_shape(self, input, min, opt, max):
            self.shapes = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content

    class IBuilderConfig:
        def __init__(self):
            self._profiles, self._flags, self._cache = [], {trt.BuilderFlag.TF32}, None
            self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
            self.progress_monitor = self.profiling_verbosity = self.builder_optimization_level = None

        def set_flag(self, flag):
            self._flags.add(flag)

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool, size):
            log("set_memory_pool_limit", pool.name, size)

        def add_optimization_profile(self, profile):
            self._profiles.append(profile.shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, content):
            return ITimingCache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert not ignore_mismatch
            self._cache = cache
            return cache.content in (b"", b"timings of " + device.name.encode())

        def get_timing_cache(self):
            self._cache.content = b"timings of " + device.name.encode()
            return self._cache

    class Builder:
        def __init__(self, logger):
            self._logger = logger

        def create_network(self, flags):
            log("create_network", flags)
            return INetworkDefinition()

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            log("build", tuple(sorted(flag.name for flag in config._flags)))
            if "build" in device.failing:
                self._logger.log(ILogger.ERROR, "Out of\n memory")
                return None
            if config.progress_monitor is not None:
                watch = config.progress_monitor
                watch.phase_start("Building engine", None, 2)
                watch.phase_start("Timing", "Building engine", 2)
                for step in range(2):
                    if not watch.step_complete("Building engine", step):
                        return None
                watch.phase_finish("Timing")
                watch.phase_finish("Building engine")
            facts = {"device": device.name, "version": trt.__version__, "profiles": config._profiles,
                     "refit": trt.BuilderFlag.REFIT in config._flags}  # fmt: skip
            return MAGIC + json.dumps(facts).encode() + b"\n" + network.content

    class EngineInspector:
        def __init__(self, engine):
            self._engine = engine

        def get_engine_information(self, layout):
            assert layout == trt.LayerInformationFormat.JSON
            return json.dumps({"Layers": self.layers(), "Bindings": []})

        def layers(self):
            *first, last = (node.op_type for node in self._engine.model.graph.node)
            output = {"Format/Datatype": "FP32", "Dimensions": [-1, 3]}
            return [{"Name": f"fused {'+'.join(first)}", "LayerType": "x"},
                    {"Name": last, "LayerType": "cast", "Outputs": [output]}]  # fmt: skip

    class IRuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy = None

    class ICudaEngine:
        def __init__(self, facts, content):
            self.facts, self.model = facts, onnx.load_model_from_string(content)
            graph = self.model.graph
            self.tensors = {value.name: described(value) for value in (*graph.input, *graph.output)}
            self.inputs = [value.name for value in graph.input]
            self.num_io_tensors = len(self.tensors)
            self.num_optimization_profiles = max(1, len(facts["profiles"]))

        def get_tensor_name(self, index):
            return list(self.tensors)[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return self.tensors[name].dtype

        def get_tensor_shape(self, name):
            return self.tensors[name].shape

        def get_tensor_profile_shape(self, name, profile_index):
            return self.facts["profiles"][profile_index]

        def create_engine_inspector(self):
            return EngineInspector(self)

        def create_execution_context(self, runtime_config=None):
            log("create_execution_context")
            if rtx:
                assert runtime_config.dynamic_shapes_kernel_specialization_strategy is not None
            return None if "create_execution_context" in device.failing else IExecutionContext(self)

        def create_runtime_config(self):
            return IRuntimeConfig()

        def serialize(self):
            return MAGIC + json.dumps(self.facts).encode() + b"\n" + self.model.SerializeToString()

    class IExecutionContext:
        profiler = None

        def __init__(self, engine):
            self._engine, self._profile, self._shape, self._addresses, self._warm = engine, 0, None, {}, False
            self._evaluator = ReferenceEvaluator(engine.model)

        def set_optimization_profile_async(self, profile_index, stream_handle):
            log("set_optimization_profile_async", profile_index)
            self._profile = profile_index
            return True

        def set_input_shape(self, name, shape):
            log("set_input_shape", tuple(shape))
            profiles = self._engine.facts["profiles"]
            if profiles:
                least, _, most = profiles[self._profile]
                if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                    return False
            self._shape, self._warm = tuple(shape), False
            return True

        def get_tensor_shape(self, name):
            found = self._engine.tensors[name].shape
            return tuple(self._shape[0] if size == -1 else size for size in found)

        def set_tensor_address(self, name, memory):
            log("set_tensor_address", name)
            device.at(memory, 1, "device")
            self._addresses[name] = memory
            return True

        def is_stream_capturable(self, stream):
            return "is_stream_capturable" not in device.failing

        def execute_async_v3(self, stream_handle):
            log("execute_async_v3", "captured" if device.capturing is not None else "enqueued")
            assert ("stream", stream_handle) in device.live, "the default stream, or a closed one"
            if "execute_async_v3" in device.failing or (device.capturing is not None and not self._warm):
                return False  # the first run of a shape must not be captured
            self._warm = True
            shape, addresses = self._shape, dict(self._addresses)
            assert set(addresses) == set(self._engine.tensors)

            def run():
                (name,) = self._engine.inputs
                dtype = np.dtype({"FLOAT": "f4", "UINT8": "u1", "HALF": "f2"}[self._engine.tensors[name].dtype.name])
                size = int(np.prod(shape)) * dtype.itemsize
                x = device.at(addresses[name], size, "device").view(dtype).reshape(shape).copy()
                names = [value.name for value in self._engine.model.graph.output]
                for name, value in zip(names, self._evaluator.run(names, {self._engine.inputs[0]: x}), strict=True):
                    value = np.ascontiguousarray(value)
                    device.at(addresses[name], value.nbytes, "device")[:] = value.view(np.uint8).reshape(-1)

            device.enqueue(run)
            if self.profiler is not None:  # with one attached, a run waits for its end and tells its layers
                assert device.capturing is None, "a captured graph tells no layers"
                while device.pending:
                    device.pending.pop(0)()
                for number, layer in enumerate(EngineInspector(self._engine).layers()):
                    self.profiler.report_layer_time(layer["Name"], 0.25 * (number + 1) * shape[0])
            return True

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self._logger = logger

        def get_engine_validity(self, buffer):
            facts = json.loads(buffer[len(MAGIC) :].split(b"\n", 1)[0])
            valid = facts["device"] == device.name
            return (trt.EngineValidity.VALID if valid else trt.EngineValidity.INVALID), 0

        def deserialize_cuda_engine(self, plan):
            if not plan.startswith(MAGIC):
                self._logger.log(ILogger.ERROR, "Magic tag does not match")
                return None
            head, content = plan[len(MAGIC) :].split(b"\n", 1)
            facts = json.loads(head)
            if (facts["device"], facts["version"]) != (device.name, trt.__version__):
                self._logger.log(ILogger.ERROR, "built for another device or version")
                return None
            return ICudaEngine(facts, content)

    class Refitter:
        def __init__(self, engine, logger):
            self.engine = engine

        def refit_cuda_engine(self):
            return self.engine.facts["refit"]

    class OnnxParserRefitter:
        def __init__(self, refitter, logger):
            self._engine, self._logger = refitter.engine, logger

        def refit_from_bytes(self, content):
            new = onnx.load_model_from_string(content)
            if [n.output for n in new.graph.node] != [n.output for n in self._engine.model.graph.node]:
                self._logger.log(ILogger.ERROR, "the graphs differ")
                return False
            self._engine.model = new
            return True

    for cls in (ILogger, IProgressMonitor, IProfiler, ILayer, INetworkDefinition, ParserError, OnnxParser,
                IOptimizationProfile,
                ITimingCache, IBuilderConfig, Builder, EngineInspector, ICudaEngine, IExecutionContext, Runtime,
                Refitter, OnnxParserRefitter):  # fmt: skip
        setattr(trt, cls.__name__, cls)
    if rtx:
        trt.IRuntimeConfig = IRuntimeConfig
    return trt
