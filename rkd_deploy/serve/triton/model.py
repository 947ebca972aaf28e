"""Triton's python backend: ONNX Runtime runs the model.onnx beside this file.

Copied into every version of a model of that backend. The server's Python needs numpy and onnxruntime, nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# ONNX Runtime reads it when it is imported; without it, an identifier is kept below the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model; Triton makes as many as instance_group says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model on the device that Triton chose for this instance."""
        config = json.loads(args["model_config"])
        self.input_name: str = config["input"][0]["name"]
        self.outputs: list[str] = [output["name"] for output in config["output"]]
        on_gpu = args["model_instance_kind"] == "GPU"
        self.session = _open(Path(__file__).with_name("model.onnx"), config["parameters"], on_gpu, args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests that the scheduler joined as one batch, and hand each its own part."""
        arrays = [pb_utils.get_input_tensor_by_name(request, self.input_name).as_numpy() for request in requests]
        try:
            results = self.session.run(self.outputs, {self.input_name: np.concatenate(arrays)})
        except Exception as error:  # ONNX Runtime's own exceptions have no other base; each request gets to know
            failed = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"ONNX Runtime: {error}"))
            return [failed for _ in requests]
        ends = np.cumsum([len(array) for array in arrays])[:-1]
        parts = zip(*(np.split(result, ends) for result in results), strict=True)
        return [self._response(request, part) for request, part in zip(requests, parts, strict=True)]

    def finalize(self) -> None:
        """Give the model's memory back."""
        del self.session

    def _response(self, request: Any, results: tuple[Any, ...]) -> Any:
        wanted = request.requested_output_names()
        named = zip(self.outputs, results, strict=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in named if name in wanted])


def _open(file: Path, parameters: dict[str, Any], on_gpu: bool, args: dict[str, str]) -> Any:
    if not file.is_file():  # a named pipe would hold up the server for ever
        raise RuntimeError(f"{file} is missing, or no regular file: export the model into this repository again")
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    if "intra_op_thread_count" in parameters:
        options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
    # Without VNNI, x86 saturates uint8 times int8 in 16 bits; this takes the slower exact kernels there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    cuda = ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"], "use_tf32": "0"})
    wanted = cuda if on_gpu else ("CPUExecutionProvider", {})
    session = ort.InferenceSession(str(file), options, providers=[wanted], enable_fallback=False)
    if session.get_providers()[0] != wanted[0]:  # it is silent about a missing CUDA library
        raise RuntimeError(f"{wanted[0]} was asked for, ONNX Runtime took {session.get_providers()[0]}: see nvidia-smi")
    return session
