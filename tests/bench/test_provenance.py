import getpass
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rkd_deploy.bench import machine as module
from rkd_deploy.bench.machine import command_without_folders, parse_gpus, provenance


def test_it_is_json_and_says_what_ran_where():
    facts = json.loads(json.dumps(asdict(provenance()), allow_nan=False))
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["onnxruntime"]
    assert facts["python"] == platform.python_version()
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["memory_bytes"] > 2**28
    assert facts["cpu"]
    assert facts["time_utc"].endswith("+00:00")


def test_it_names_no_host_and_no_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / "rkd-deploy"), "bench", str(Path.home() / "m.onnx")])
    text = json.dumps(asdict(provenance()))
    assert platform.node() not in text
    assert str(Path.cwd()) not in text
    assert getpass.getuser() not in provenance().command


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{folder}/bin/rkd-deploy", "bench", "--batch", "8"], "rkd-deploy bench --batch 8"),
        (["x", "{folder}/run", "--out={folder}/a.json", "~/b"], "x run --out=a.json b"),
        (["x", "--set", "data.root={folder}/cifar", "a/b"], "x --set data.root=cifar a/b"),
        (["x", "train:{folder}/a,{folder}/b"], "x train:a,b"),
        ([], ""),
    ],
)
def test_commands_lose_their_folders(argv, expected, tmp_path):
    assert command_without_folders([argument.format(folder=tmp_path) for argument in argv]) == expected


def test_gpus_are_read_from_nvidia_smis_answer():
    answer = "NVIDIA H200, 575.57.08, 143771 MiB, 512 MiB, 1980 MHz, 3201 MHz, 1980 MHz, 700.00 W, 81.5 W, 31, P0\n" * 2
    first, second = parse_gpus(answer)
    assert first == second
    assert first["name"] == "NVIDIA H200"
    assert first["clocks.sm"] == "1980 MHz"
    assert first["power.limit"] == "700.00 W"
    assert first["temperature.gpu"] == "31"


def test_what_is_absent_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance().gpus is None
    assert provenance().git is None


@pytest.mark.parametrize(("change", "dirty"), [(False, False), (True, True)])
def test_the_commit_of_a_checkout_that_tracks_the_package(tmp_path, change, dirty):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "machine.py").write_text("")
    assert module._git(tmp_path) is None  # there, but not tracked
    git("add", "machine.py")
    assert module._git(tmp_path) is None  # tracked, but never committed
    git("commit", "-q", "-m", "first")
    if change:
        (tmp_path / "machine.py").write_text("changed")
    assert module._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": dirty}


def test_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "from rkd_deploy.bench.machine import provenance\n"
        "provenance()\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'torchvision'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
