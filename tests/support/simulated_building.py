"""The half of a simulated TensorRT that makes engines: enumerations, parser, configuration, builder.

A plan is a line of facts (for which device and version, which profiles) and the ONNX file after it. Every name here is
held against the real libraries' by tests/backends/tensorrt/test_api.py.
"""

import enum
import functools
import json
from types import ModuleType, SimpleNamespace

import onnx

MAGIC = b"SIMULATED"
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.FLOAT16: "HALF",
         onnx.TensorProto.INT64: "INT64", onnx.TensorProto.BFLOAT16: "BF16"}  # fmt: skip


def tensorrt(version, rtx):
    """The module tensorrt (or tensorrt_rtx), so far with its enumerations only."""
    trt = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    trt.__version__ = version

    def enumeration(name, *members):
        setattr(trt, name, enum.IntEnum(name, list(members), start=0))

    enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    enumeration("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "INT64", "BF16")
    enumeration("LayerType", "CONVOLUTION")
    enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
    enumeration("LayerInformationFormat", "ONELINE", "JSON")
    enumeration("BuilderFlag", "TF32", "VERSION_COMPATIBLE")
    levels = ["NONE", "AMPERE_PLUS"] + ["SAME_COMPUTE_CAPABILITY"] * (not version.startswith("10.3"))
    enumeration("HardwareCompatibilityLevel", *levels)
    enumeration("MemoryPoolType", "WORKSPACE")
    ten = version.startswith("10.")
    enumeration("NetworkDefinitionCreationFlag", *(["EXPLICIT_BATCH", "STRONGLY_TYPED"] if ten else ["STRONGLY_TYPED"]))
    if rtx:
        enumeration("ComputeCapability", "NONE", "CURRENT", "SM80", "SM86", "SM89", "SM120", "SM121")
        enumeration("EngineValidity", "VALID", "SUBOPTIMAL", "INVALID")
        enumeration("DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE")
    trt._MAGIC, trt._described = MAGIC, functools.partial(described, trt)
    return trt


def described(trt, value):
    tensor = value.type.tensor_type
    shape = [size.dim_value or -1 for size in tensor.shape.dim]
    return SimpleNamespace(name=value.name, shape=shape, dtype=trt.DataType[TYPES[tensor.elem_type]])


def add_building(trt, device):
    """Put the classes into the module."""

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
            return trt._described(self.model.graph.input[index])

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
            device.note("set_memory_pool_limit", pool.name, size)

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
            device.note("create_network", flags)
            return INetworkDefinition()

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            device.note("build", tuple(sorted(flag.name for flag in config._flags)))
            if "build" in device.failing:
                self._logger.log(trt.ILogger.ERROR, "Out of\n memory")
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
            facts = {"device": device.name, "version": trt.__version__, "profiles": config._profiles}
            return MAGIC + json.dumps(facts).encode() + b"\n" + network.content

    for cls in (ILogger, IProgressMonitor, IProfiler, ILayer, INetworkDefinition, ParserError, OnnxParser,
                IOptimizationProfile, ITimingCache, IBuilderConfig, Builder):  # fmt: skip
        setattr(trt, cls.__name__, cls)
