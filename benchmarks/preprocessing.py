"""Compares other decoders and resizes with Pillow's, byte by byte, on real photos as JPEG files.

    uv run python benchmarks/preprocessing.py NODE_FOLDER [DATA]

sharp is looked for in NODE_FOLDER/node_modules (npm i --ignore-scripts sharp); DATA is the folder that holds
imagenette-224-subset.tar. Each photo is enlarged to about 640 x 480, saved with one of three subsamplings, and
resized to 256 and cropped to 224 as a bundle's card says.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.card import Preprocess
from rkd_deploy.images import decoded, fitted
from rkd_deploy.storage import write_json

PHOTOS = 24
RULE = Preprocess(height=224, width=224, mean=(0.5,) * 3, std=(0.25,) * 3, crop_fraction=0.875)
SCRIPT = FOLDER.parent / "examples" / "browser" / "preprocess.js"

Pixels = npt.NDArray[np.uint8]


def main() -> None:
    """Decode and resize every photo in each way, and record how the bytes differ from Pillow's."""
    node = Path(sys.argv[1])
    data = Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER.parent.parent / "shared" / "data"
    with tempfile.TemporaryDirectory() as folder:
        photos = _photos(data / "imagenette-224-subset.tar", Path(folder))
        rule = Path(folder) / "rule.json"
        write_json(rule, dataclasses.asdict(RULE))
        command = ["node", *map(str, (Path(__file__).with_suffix(".mjs").resolve(), SCRIPT.resolve(), rule, *photos))]
        done = subprocess.run(command, cwd=node, check=True, stdout=subprocess.PIPE, text=True)
        sharp = f"sharp {json.loads(done.stdout)['sharp']}"
        wholes = [decoded(photo, photo.name) for photo in photos]
        crops = [fitted(whole, RULE) for whole in wholes]
        rows = [
            _row("decoding", sharp, [_read(photo, "decoded") for photo in photos], [np.asarray(w) for w in wholes]),
            _row("resize and crop", "examples/browser/preprocess.js", [_read(p, "preprocess") for p in photos], crops),
            _row("resize and crop", f"{sharp}, kernel linear", [_read(photo, "sharp") for photo in photos], crops),
            _row(
                "resize and crop", f"torchvision {version('torchvision')}, antialias", map(_torchvision, wholes), crops
            ),
            _row("resize and crop", "torchvision, no antialias", [_torchvision(w, False) for w in wholes], crops),
            _row("resize and crop", f"OpenVINO {version('openvino')}, linear", map(_openvino, wholes), crops),
        ]
    facts = dataclasses.asdict(provenance())
    path = FOLDER / f"preprocessing_{hardware(facts)}_{datetime.now(UTC):%Y%m%d}.json"
    content = {
        "theme": "preprocessing",
        "provenance": facts,
        "pillow": version("pillow"),
        "photos": PHOTOS,
        "rows": rows,
    }
    write_json(path, content)
    print(json.dumps({"record": path.name, "rows": rows}))


def _row(step: str, by: str, found: Any, expected: list[Pixels]) -> dict[str, Any]:
    pairs = zip(found, expected, strict=True)
    gaps = np.concatenate([np.abs(one.ravel().astype(int) - other.ravel()) for one, other in pairs])
    return {
        "step": step,
        "by": by,
        "differing": float((gaps > 0).mean()),
        "mean": float(gaps.mean()),
        "max": int(gaps.max()),
    }


def _photos(archive: Path, folder: Path) -> list[Path]:
    files: list[Path] = []
    with tarfile.open(archive) as content:
        for member in content:
            if not member.name.endswith((".jpg", ".JPEG")) or len(files) == PHOTOS:
                continue
            stream = content.extractfile(member)
            assert stream is not None
            number = len(files)
            image = Image.open(io.BytesIO(stream.read())).convert("RGB").resize((640 + 7 * number, 480 + 5 * number))
            image.save(folder / f"{number}.jpg", quality=90, subsampling=number % 3)
            files.append(folder / f"{number}.jpg")
    return files


def _read(photo: Path, kind: str) -> Pixels:
    return np.fromfile(f"{photo}.{kind}", np.uint8)


def _torchvision(whole: Image.Image, antialias: bool = True) -> Pixels:
    from torchvision.transforms.v2 import functional

    tensor = functional.pil_to_tensor(whole)
    resized = functional.resize(tensor, [RULE.resize_to[0]], antialias=antialias)
    cropped: Pixels = functional.center_crop(resized, [RULE.height, RULE.width]).permute(1, 2, 0).numpy()
    return cropped


def _openvino(whole: Image.Image) -> Pixels:
    """OpenVINO's own pre-processing: linear resize to the size that Pillow would make, then Pillow's crop."""
    openvino, ops = import_module("openvino"), import_module("openvino.opset13")
    steps_of = import_module("openvino.preprocess")

    width, height = whole.size
    scale = RULE.resize_to[0] / min(width, height)
    wide, high = max(RULE.resize_to[1], int(width * scale)), max(RULE.resize_to[0], int(height * scale))
    taken = ops.parameter([1, high, wide, 3], np.uint8)
    steps = steps_of.PrePostProcessor(openvino.Model([ops.result(taken)], [taken]))
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().tensor().set_spatial_static_shape(height, width)
    steps.input().preprocess().resize(steps_of.ResizeAlgorithm.RESIZE_LINEAR)
    steps.input().model().set_layout(openvino.Layout("NHWC"))
    compiled = openvino.Core().compile_model(steps.build(), "CPU")
    resized = next(iter(compiled(np.asarray(whole)[np.newaxis]).values()))[0]
    left, top = round((wide - RULE.width) / 2), round((high - RULE.height) / 2)
    cropped: Pixels = resized[top : top + RULE.height, left : left + RULE.width]
    return cropped


if __name__ == "__main__":
    main()
