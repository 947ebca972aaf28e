"""The half of a simulated TensorRT that runs engines: the reference evaluator of ONNX on the simulated device."""

import json

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator


def add_running(trt, device, rtx):
    """Put the classes into the module."""

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
            self.tensors = {value.name: trt._described(value) for value in (*graph.input, *graph.output)}
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
            device.note("create_execution_context")
            if rtx:
                assert runtime_config.dynamic_shapes_kernel_specialization_strategy is not None
            return None if "create_execution_context" in device.failing else IExecutionContext(self)

        def create_runtime_config(self):
            return IRuntimeConfig()

        def serialize(self):
            return trt._MAGIC + json.dumps(self.facts).encode() + b"\n" + self.model.SerializeToString()

    class IExecutionContext:
        profiler = None

        def __init__(self, engine):
            self._engine, self._profile, self._shape, self._addresses, self._warm = engine, 0, None, {}, False
            self._evaluator = ReferenceEvaluator(engine.model)

        def set_optimization_profile_async(self, profile_index, stream_handle):
            device.note("set_optimization_profile_async", profile_index)
            self._profile = profile_index
            return True

        def set_input_shape(self, name, shape):
            device.note("set_input_shape", tuple(shape))
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
            device.note("set_tensor_address", name)
            device.at(memory, 1, "device")
            self._addresses[name] = memory
            return True

        def is_stream_capturable(self, stream):
            return "is_stream_capturable" not in device.failing

        def execute_async_v3(self, stream_handle):
            device.note("execute_async_v3", "captured" if device.capturing is not None else "enqueued")
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
            facts = json.loads(buffer[len(trt._MAGIC) :].split(b"\n", 1)[0])
            valid = facts["device"] == device.name
            return (trt.EngineValidity.VALID if valid else trt.EngineValidity.INVALID), 0

        def deserialize_cuda_engine(self, plan):
            if not plan.startswith(trt._MAGIC):
                self._logger.log(trt.ILogger.ERROR, "Magic tag does not match")
                return None
            head, content = plan[len(trt._MAGIC) :].split(b"\n", 1)
            facts = json.loads(head)
            if (facts["device"], facts["version"]) != (device.name, trt.__version__):
                self._logger.log(trt.ILogger.ERROR, "built for another device or version")
                return None
            return ICudaEngine(facts, content)

    for cls in (EngineInspector, ICudaEngine, IExecutionContext, Runtime):
        setattr(trt, cls.__name__, cls)
    if rtx:
        trt.IRuntimeConfig = IRuntimeConfig
