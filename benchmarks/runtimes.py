"""Runs a bundle in runtimes outside of this package, against its golden.npz.

    uv run python benchmarks/runtimes.py [NODE_FOLDER]

onnxruntime-node and onnxruntime-web are looked for in NODE_FOLDER/node_modules (npm i --ignore-scripts onnxruntime-node
onnxruntime-web); tract, ncnn with pnnx, and MNN among the installed Python packages. What is not there is told as such.
The bundles are a ResNet-20-sized S + A at every level of fusion, and a MobileNetV2 and a ShuffleNetV2 at level tail and
wide, all with random weights.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version as version_of
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.storage import write_json

Array = npt.NDArray[Any]
Logits = tuple[Array, str]
"""Logits, and the version of what gave them."""


def main() -> None:
    """Run every runtime on every bundle, and record the largest difference of a logit."""
    node = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    runtimes: dict[str, Callable[[Path, Array], Logits]] = {
        "onnx ReferenceEvaluator": _reference,
        "OpenVINO": _openvino,
        "onnxruntime-node": partial(_node, node, "onnxruntime-node"),
        "onnxruntime-web, wasm": partial(_node, node, "onnxruntime-web"),
        "tract": _tract,
        "MNN": _mnn,
        "ncnn": _ncnn,
    }
    with tempfile.TemporaryDirectory() as folder:
        bundles = _bundles(Path(folder))
        rows = [_row(name, run, what, bundle) for name, run in runtimes.items() for what, bundle in bundles.items()]
    facts = dataclasses.asdict(provenance())
    path = FOLDER / f"runtimes_{hardware(facts)}_{datetime.now(UTC):%Y%m%d}.json"
    write_json(path, {"theme": "runtimes", "provenance": facts, "runtimes": rows})
    print(json.dumps({"record": path.name, "runtimes": rows}))


def _row(name: str, run: Callable[[Path, Array], Logits], what: str, bundle: Path) -> dict[str, Any]:
    golden = np.load(bundle / "golden.npz")
    spread = float(golden["logits"].std(axis=0).mean())  # over the images: what a runtime could get wrong
    row: dict[str, Any] = {"runtime": name, "bundle": what, "spread": spread, "tolerance": float(golden["tolerance"])}
    try:
        # A process of its own: a runtime that dies takes nothing else with it.
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            logits, version = alone.submit(run, bundle / "model.onnx", golden["inputs"]).result()
        row |= {"version": version, "max_abs_diff": float(np.abs(logits - golden["logits"]).max())}
    except Exception as error:  # every runtime has its own; what it says is the finding
        row |= {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"}
    print(row, file=sys.stderr)
    return row


def _bundles(folder: Path) -> dict[str, Path]:
    import torch

    from rkd_deploy.card import ModelCard, Preprocess
    from rkd_deploy.export.bundle import export_bundle
    from rkd_deploy.models.families import cifar_resnet, mobilenet, shufflenet
    from rkd_deploy.models.residual import ResidualStudent
    from rkd_deploy.models.staged import Staged

    torch.manual_seed(0)
    pairs: dict[str, tuple[list[Staged], tuple[str, ...]]] = {
        "ResNet-20": (
            [cifar_resnet.CifarResNet(20, widths, None) for widths in ((16, 16, 24, 56), (8, 8, 16, 24))],
            ("sum", "tail", "wide", "wide-grouped"),
        ),
        "MobileNetV2": ([mobilenet.MobileNetV2((width,) * 9, None) for width in (16, 8)], ("tail", "wide")),
        "ShuffleNetV2": (
            [shufflenet.ShuffleNetV2(widths, None) for widths in ((24, 48, 96, 192, 256), (24, 24, 48, 96, 128))],
            ("tail", "wide"),
        ),
    }
    preprocess = Preprocess(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    card = ModelCard(name="runtimes", labels=tuple(map(str, range(100))), preprocess=preprocess)
    bundles = {}
    for name, ((student, assistant), levels) in pairs.items():
        model = ResidualStudent(student, [assistant], channels=64, num_classes=100)
        torch.nn.init.normal_(model.branches()[1][1].norm.weight, std=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = (
                    None  # fresh statistics would let maps vanish layer by layer, and all logits with them
                )
                module.reset_running_stats()
        with torch.no_grad():
            model.train()(torch.randn(64, 3, 32, 32))
        model.eval()
        for level in levels:
            bundles[f"{name} {level}"] = folder / f"{name}-{level}"
            export_bundle(model, card, bundles[f"{name} {level}"], level=level)
        if name == "ResNet-20":
            bundles[f"{name} tail, float32 input"] = folder / f"{name}-float32"
            floats = dataclasses.replace(card, preprocess=dataclasses.replace(preprocess, embedded=False))
            export_bundle(model, floats, bundles[f"{name} tail, float32 input"])
    return bundles


def _reference(file: Path, x: Array) -> Logits:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(onnx.load(file))
    return evaluator.run(["logits"], {"input": x})[0], onnx.__version__


def _openvino(file: Path, x: Array) -> Logits:
    openvino = import_module("openvino")

    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled({"input": x})["logits"]), openvino.__version__.split("-")[0]


def _node(folder: Path, package: str, file: Path, x: Array) -> Logits:
    inputs = file.with_name("inputs.bin")
    inputs.write_bytes(x.tobytes())
    script = Path(__file__).with_suffix(".mjs").resolve()
    command = ["node", str(script), package, str(file), str(inputs), x.dtype.name, json.dumps(list(x.shape))]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(lines[0] if lines else done.stderr[-200:])
    answer = json.loads(done.stdout.splitlines()[-1])
    return np.array(answer["logits"]).reshape(len(x), -1), answer["version"]


def _tract(file: Path, x: Array) -> Logits:
    tract = import_module("tract")

    runnable = tract.onnx().load(str(file)).into_model().into_runnable()
    return runnable.run([x])[0].to_numpy(), version_of("tract")


def _mnn(file: Path, x: Array) -> Logits:
    """MNN has no reader of its own for ONNX: its converter makes its format first."""
    MNN = import_module("MNN")

    converted = file.with_suffix(".mnn")
    command = ["mnnconvert", "-f", "ONNX", "--modelFile", str(file), "--MNNModel", str(converted)]
    subprocess.run(command, check=True, capture_output=True)
    module = MNN.nn.load_module_from_file(str(converted), ["input"], ["logits"])
    kind, order = (MNN.expr.uint8, MNN.expr.NHWC) if x.dtype == np.uint8 else (MNN.expr.float, MNN.expr.NCHW)
    tensor = MNN.expr.const(x, list(x.shape), order, kind)
    return np.array(module.forward([tensor])[0].read()), version_of("mnn")


def _ncnn(file: Path, x: Array) -> Logits:
    """Ncnn has no reader of its own for ONNX: pnnx makes its format first, for one image at a time; in float32."""
    ncnn = import_module("ncnn")

    kind = "u8" if x.dtype == np.uint8 else "f32"
    command = ["pnnx", str(file), f"inputshape=[1,{','.join(map(str, x.shape[1:]))}]{kind}", "fp16=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=file.parent)
    parameters = file.with_suffix(".ncnn.param")
    if not parameters.is_file():
        raise RuntimeError((done.stderr.strip().splitlines() or ["pnnx wrote nothing"])[-1])
    with ncnn.Net() as net:
        for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, half, False)
        if net.load_param(str(parameters)) or net.load_model(str(file.with_suffix(".ncnn.bin"))):
            raise RuntimeError("ncnn cannot load what pnnx wrote; it has no layer that makes floats of uint8")
        rows = []
        for image in x:
            with net.create_extractor() as extractor:  # it must not outlive its network
                extractor.input("in0", ncnn.Mat(image))
                rows.append(np.array(extractor.extract("out0")[1]))
    return np.stack(rows), version_of("ncnn")


if __name__ == "__main__":
    main()
