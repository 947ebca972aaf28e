"""The resize that the examples in JavaScript and C++ carry gives Pillow's bytes, whatever the size and the filter."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_deploy.card import Preprocess
from rkd_deploy.images import to_array

REPO = Path(__file__).parents[2]
PREPROCESS = REPO / "examples/browser/preprocess.js"
CPP = REPO / "examples/cpp"
COLOUR = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
GREY = {"mean": (0.5,), "std": (0.25,)}

SIZES = [(640, 480), (375, 500), (224, 224), (1024, 97), (31, 300), (7, 5), (1, 1), (2, 333), (225, 224), (256, 171)]
"""Width and height of the source: larger, smaller, as large as the input, and strips."""


def rules():
    for interpolation in ("bilinear", "bicubic", "nearest"):
        yield Preprocess(height=224, width=224, interpolation=interpolation, **COLOUR)
        yield Preprocess(height=224, width=224, interpolation=interpolation, crop_fraction=0.875, **COLOUR)
        yield Preprocess(height=96, width=160, interpolation=interpolation, crop_fraction=0.95, **COLOUR)
        yield Preprocess(height=33, width=17, interpolation=interpolation, **COLOUR)
        yield Preprocess(height=64, width=64, interpolation=interpolation, crop_fraction=0.8, **GREY)


def cases(photo: Path) -> list[tuple[np.ndarray, Preprocess]]:
    """Pixels of a real photo, of noise and of hard edges, in colour, grey and with transparency."""
    with Image.open(photo) as image:
        real = image.convert("RGB")
    random = np.random.default_rng(0)
    sources = []
    for width, height in SIZES:
        sources.append(np.asarray(real.resize((width, height))))
        sources.append(random.choice(np.array([0, 255], np.uint8), (height, width, 3)))  # bicubic goes beyond these
    sources.append(random.integers(0, 256, (120, 90, 4), dtype=np.uint8))
    sources.append(random.integers(0, 256, (120, 90), dtype=np.uint8))
    return [(source, rule) for source in sources for rule in rules()]


def differences(photo: Path, folder: Path, run) -> list[str]:
    """Which cases come out in other bytes than Pillow's."""
    listed, wanted = [], []
    for number, (source, rule) in enumerate(cases(photo)):
        (folder / f"{number}").write_bytes(source.tobytes())
        height, width = source.shape[:2]
        channels = 1 if source.ndim == 2 else source.shape[2]
        shape = {"file": str(folder / f"{number}"), "width": width, "height": height, "channels": channels}
        listed.append(shape | {"rule": dataclasses.asdict(rule)})
        wanted.append(to_array(Image.fromarray(source), rule))
    run(listed)
    wrong = []
    for case, expected in zip(listed, wanted, strict=True):
        found = np.frombuffer(Path(case["file"] + ".out").read_bytes(), np.uint8)
        off = int((found != expected.ravel()).sum()) if found.size == expected.size else -1
        if off:
            wrong.append(f"{case}: {off} of {expected.size} values differ")
    return wrong


@pytest.fixture(scope="module")
def photo(photos_once: Path) -> Path:
    return sorted((photos_once / "val").glob("*/*"))[0]


def node_runner(folder: Path, script: Path):
    def run(listed):
        if shutil.which("node") is None:
            pytest.skip("node is not installed, and preprocess.js is JavaScript")
        (folder / "cases.json").write_text(json.dumps(listed))
        command = ["node", Path(__file__).with_name("resize_cases.mjs"), script, folder / "cases.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    return run


def cpp_runner(folder: Path):
    """The header of examples/cpp takes RGB, as its decoder gives; other sources are made that first."""
    program = folder / "resize_cases"

    def run(listed):
        if (compiler := shutil.which("g++")) is None:
            pytest.skip("g++ is not installed, and preprocess.hpp is C++ (apt-get install g++)")
        source = Path(__file__).with_name("resize_cases.cpp")
        options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{CPP}"]
        built = subprocess.run(
            [compiler, *options, source, "-o", program], capture_output=True, text=True, timeout=300, check=False
        )
        assert built.returncode == 0, built.stderr
        lines = []
        for case in listed:
            pixels = np.fromfile(case["file"], np.uint8).reshape(case["height"], case["width"], case["channels"])
            (pixels.repeat(3, axis=2) if case["channels"] == 1 else pixels[:, :, :3]).tofile(case["file"])
            rule = case["rule"]
            shape = (case["width"], case["height"], rule["height"], rule["width"], len(rule["mean"]))
            lines.append(" ".join(map(str, (case["file"], *shape, rule["interpolation"], rule["crop_fraction"]))))
        (folder / "cases.txt").write_text("\n".join(lines) + "\n")
        subprocess.run([program, folder / "cases.txt"], check=True, timeout=120)

    return run


def test_cpp_gives_pillows_bytes(photo, tmp_path):
    assert differences(photo, tmp_path, cpp_runner(tmp_path)) == []


def test_javascript_gives_pillows_bytes(photo, tmp_path):
    assert differences(photo, tmp_path, node_runner(tmp_path, PREPROCESS)) == []


def test_a_weight_rounded_otherwise_is_noticed(photo, tmp_path):
    script = tmp_path / "preprocess.mjs"
    script.write_text(PREPROCESS.read_text().replace("scaled + 0.5", "scaled"))
    assert differences(photo, tmp_path, node_runner(tmp_path, script))
