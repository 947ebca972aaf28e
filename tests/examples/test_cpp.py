"""The C++ example is built against OpenVINO's wheel, and answers the golden photo as the bundle does."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import openvino
import pytest
from PIL import Image

import rkd_deploy

CPP = Path(__file__).parents[2] / "examples/cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    lacking = [name for name in ("cmake", "g++") if shutil.which(name) is None]
    if not lacking:
        includes = "#include <cstdio>\n#include <jpeglib.h>\n"
        tried = subprocess.run(
            ["g++", "-fsyntax-only", "-xc++", "-"], input=includes, capture_output=True, text=True, check=False
        )
        lacking = ["libjpeg-dev"] if tried.returncode else []
    if lacking:
        pytest.skip(f"C++ cannot be built without: apt-get install {' '.join(lacking)}")
    if (json := find_spec("nlohmann_json")) is None:
        pytest.skip("C++ cannot be built without: pip install nlohmann-json")
    build = tmp_path_factory.mktemp("cpp")
    places = {
        "OpenVINO_DIR": Path(openvino.__path__[0]) / "cmake",
        "JSON_INCLUDE": Path(next(iter(json.submodule_search_locations))) / "include",
        "CMAKE_BUILD_TYPE": "Debug",  # optimising takes twice as long to compile
    }
    configure = ["cmake", "-S", CPP, "-B", build, *(f"-D{name}={place}" for name, place in places.items())]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return build / "classify"


def answers(program, bundle, *files):
    done = subprocess.run([program, bundle, *files], capture_output=True, text=True, timeout=60, check=False)
    best = re.findall(r"^(.*): (\w+) ([\d.]+) %", done.stdout, re.MULTILINE)
    return done, {Path(file): (label, float(percent) / 100) for file, label, percent in best}


def test_the_golden_photo_gets_its_class(program, golden):
    done, found = answers(program, golden.bundle, golden.photo)
    assert (done.returncode, done.stderr) == (0, "")
    assert found == {golden.photo: (golden.label, pytest.approx(golden.probability, abs=1e-3))}


def test_every_jpeg_is_decoded_as_pillow_decodes_it(program, golden, variants, tmp_path):
    expected = {file: answer for file, answer in variants.items() if file.suffix == ".jpg"}
    with Image.open(golden.photo) as photo, rkd_deploy.load(golden.bundle) as classifier:
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            photo.save(file := tmp_path / f"{orientation}.jpg", exif=exif)
            (best,) = classifier.predict(file)
            expected[file] = (best.label, best.probability)
        photo.convert("L").save(grey := tmp_path / "grey.jpg")
        (best,) = classifier.predict(grey)
        expected[grey] = (best.label, best.probability)
    _, found = answers(program, golden.bundle, *expected)
    assert found == {file: (label, pytest.approx(share, abs=2e-5)) for file, (label, share) in expected.items()}


def test_what_is_no_whole_jpeg_is_named_and_the_others_are_classified(program, golden, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "half.jpg").write_bytes(golden.photo.read_bytes()[:3000])
    with Image.open(golden.photo) as photo:
        photo.convert("CMYK").save(tmp_path / "print.jpg")
    refused = [tmp_path / name for name in ("text.jpg", "half.jpg", "print.jpg", "missing.jpg")]
    done, found = answers(program, golden.bundle, *refused, golden.photo)
    assert done.returncode == 1
    assert list(found) == [golden.photo]
    assert [line.split(" cannot be classified")[0] for line in done.stderr.splitlines()] == list(map(str, refused))
