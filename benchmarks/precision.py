"""What lower precision costs in accuracy and wins in size and time.

    uv run python benchmarks/precision.py WEIGHTS CIFAR [TEST_IMAGES]

WEIGHTS is a state dict of a CIFAR-100 ResNet-56, CIFAR the folder that holds cifar-100-python/. Every file is made and
judged as `rkd-deploy export` does it, calibrated on 256 training images and judged on 512 others, and then classifies
the whole test split, by which nothing was chosen. Speed: ResNet-18 at 224 x 224, one thread, float32 and int8 in turn;
its weights are random, which run as fast as trained ones. About five minutes on two cores.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from record import Claim, save
from torch import nn
from torchvision.models import resnet18

from rkd_deploy.backends.pytorch import PyTorchBackend
from rkd_deploy.bench import BenchSettings, RunOn, bench
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, stamp, to_onnx
from rkd_deploy.export.precision.convert import convert
from rkd_deploy.export.precision.gate import HeldOut, logits_of
from rkd_deploy.export.precision.int8 import Int8Quantiser
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.models.zoo import create
from rkd_deploy.pipeline import SplitBatches, precision_job
from rkd_deploy.recipe import DataRecipe

FILES = (
    ("int8", "cpu"),
    ("int8", "openvino"),
    ("int8", "tensorrt"),
    ("fp16", "cpu"),
    ("fp16", "openvino"),
    ("bf16", "openvino"),
)
LIMITS = {"fp16": 0.1, "bf16": None, "int8": 0.5}
"""Points of accuracy on the whole test split."""
FASTER = 1.8
HELD_OUT_BATCHES = 2
"""SplitBatches of 256 training images to judge on: that network knows all of them, so more would say no more."""
CIFAR = Preprocess(height=32, width=32, mean=(0.5070, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2761))
IMAGENET = Preprocess(height=224, width=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Array = npt.NDArray[Any]


def main() -> None:
    """Measure, and write the record."""
    weights, root = Path(sys.argv[1]), sys.argv[2]
    images = load_images(DataRecipe(name="cifar100", root=root, val_fraction=0), 0)
    count = int(sys.argv[3]) if len(sys.argv) > 3 else len(images.test)
    network = create("resnet56", 100)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    claims, began = [], time.monotonic()
    for claim in itertools.chain(speed(), accuracy(network.eval(), images, count)):
        print(f"{time.monotonic() - began:6.0f} s  {claim.what}: {claim.value:.3f} {claim.unit}", file=sys.stderr)
        claims.append(claim)
    save("precision", claims)


def speed() -> Iterator[Claim]:
    """Latency of ResNet-18, lower precision over float32."""
    torch.manual_seed(0)
    proto = to_onnx(ExportGraph(fuse(resnet18()), IMAGENET), IMAGENET)
    noise = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for target, backend in (("cpu", "onnxruntime"), ("openvino", "openvino")):
            with Int8Quantiser(proto, noise, target) as quantiser:
                graphs = {"fp32": proto, "int8": quantiser.quantised()}
            files = [_written(Path(folder), graph, f"{target}-{name}") for name, graph in graphs.items()]
            yield Claim(f"ResNet-18 int8 file, {target}", files[1].stat().st_size / 1e6, "MB", None)
            for batch in (1, 8):
                settings = BenchSettings(
                    run_on=(RunOn(backend, threads=1),), batches=(batch,), min_seconds=3, min_runs=10
                )
                results = bench(files, settings)
                samples = {name: list(result.samples_ms) for name, result in zip(graphs, results, strict=True)}
                ratio = results[1].p50_ms / results[0].p50_ms
                what = f"ResNet-18 at 224, {backend}, batch {batch}: int8 over fp32"
                yield Claim(what, ratio, "ratio", 1 / FASTER if target == "cpu" else None, samples)


def accuracy(network: nn.Module, images: ImageSet, count: int) -> Iterator[Claim]:
    """Points lost on the test split, and what the gate had said."""
    graph = ExportGraph(fuse(network), CIFAR).eval()
    proto = to_onnx(graph, CIFAR)
    card = ModelCard(name="resnet56", labels=images.classes, preprocess=CIFAR)
    reference = PyTorchBackend(ExportGraph(network, CIFAR), input_shape=(None, 32, 32, 3), input_dtype="uint8")
    batches = list(SplitBatches(images.test.take(torch.arange(count))))
    inputs, labels_N = [x for x, _ in batches], np.concatenate([y for _, y in batches])
    expected = logits_of(proto, inputs, "onnxruntime")
    before = _top1(expected, labels_N)
    yield Claim(f"ResNet-56, {count} test images: fp32", before, "%", None)
    yield Claim("ResNet-56 fp32 file", len(proto.SerializeToString()) / 1e6, "MB", None)
    held_out: HeldOut | None = None
    for precision, target in FILES:
        options = PrecisionOptions(precision=precision, target=target, drop=100.0, agreement=0.0)
        job = precision_job(images, options, CIFAR)
        # The same images for every file: those that int8 is not calibrated on.
        if held_out is None:
            others = precision_job(images, PrecisionOptions(precision="int8"), CIFAR).held_out
            held_out = HeldOut(reference, itertools.islice(others, HELD_OUT_BATCHES), card)
        pixels = None if job.calibration is None else job.calibration.images_NHWC
        lowered = convert(graph, proto, CIFAR, pixels, held_out, options)
        logits_NK = logits_of(lowered.proto, inputs, options.prover)
        what = f"ResNet-56 {precision} for {target} on {options.prover}"
        yield Claim(f"{what}: points lost", before - _top1(logits_NK, labels_N), "points", LIMITS[precision])
        agreement = 100 * float((logits_NK.argmax(1) == expected.argmax(1)).mean())
        yield Claim(f"{what}: same class as fp32", agreement, "%", None)
        yield Claim(f"{what}: same class on held-out images", lowered.result.agreement, "%", None)
        yield Claim(f"{what}: file", len(lowered.proto.SerializeToString()) / 1e6, "MB", None)


def _top1(logits_NK: Array, labels_N: Array) -> float:
    return 100 * float((logits_NK.argmax(1) == labels_N).mean())


def _written(folder: Path, proto: Any, name: str) -> Path:
    stamp(proto, ModelCard(name=name, labels=tuple(map(str, range(1000))), preprocess=IMAGENET))
    path = folder / f"{name}.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


if __name__ == "__main__":
    main()
