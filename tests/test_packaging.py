"""The wheel, and an app's environment made from it: no torch, no onnx, and yet predictions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_servers import served

from rkd_deploy.pipeline import export_run

REPO = Path(__file__).parents[1]
UV = shutil.which("uv") or "uv"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([UV, "build", "--wheel", "--quiet", "--out-dir", folder, REPO], check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {name for name in names if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(REPO))
        for path in (REPO / "rkd_deploy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert code == sources
    assert {"rkd_deploy/py.typed", "rkd_deploy/train/digits.toml", "rkd_deploy/train/photos.toml"} <= code
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_app_without_torch_classifies_photos(wheel, tiny_run, tmp_path, monkeypatch):
    """A real environment of its own, from the wheel and its extras `cpu` and `serve`, as in serve/Dockerfile."""
    bundle = export_run(tiny_run, folder=tmp_path / "bundle").folder
    rows = np.linspace(0, 255, 40, dtype=np.uint8)
    Image.fromarray(np.stack([np.tile(rows, (30, 1))] * 3, axis=2)).save(tmp_path / "photo.png")
    python = tmp_path / "venv/bin/python"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, f"{wheel}[cpu,serve]"], check=True)
    installed = subprocess.run(
        [UV, "pip", "list", "--python", python, "--format", "json"], capture_output=True, check=True
    )
    names = {row["name"] for row in json.loads(installed.stdout)}
    assert {"rkd-deploy", "onnxruntime", "starlette", "uvicorn"} <= names
    assert not names & {"torch", "torchvision", "onnx", "scikit-learn", "matplotlib", "safetensors"}

    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    example = [python, REPO / "examples/python/classify.py", bundle, "photo.png"]
    shown = subprocess.run(example, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("photo.png ")
    assert shown.count("%") == 3

    command = tmp_path / "venv/bin/rkd-deploy"
    for arguments in (["predict", bundle, "photo.png"], ["verify", bundle], ["info", bundle], ["backends"]):
        subprocess.run([command, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with served(bundle, tmp_path, command=[command]) as server:
        assert server.ask("/v1/classify", (bundle / "golden/photo.jpg").read_bytes()).status == 200
        assert b"classify.js" in server.ask("/").body  # the page is in the wheel
    asked = "import rkd_deploy; print(rkd_deploy.RkdError); rkd_deploy.fit"
    told = subprocess.run([python, "-c", asked], env=environment, check=False, capture_output=True, text=True)
    assert told.stderr.rstrip().endswith("Install it with: pip install 'rkd-deploy[train]'")
    assert "RkdError" in told.stdout
    refused = subprocess.run(
        [command, "train"], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "pip install 'rkd-deploy[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr
