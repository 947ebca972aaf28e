"""Every module with each optional package absent: it imports all the same, or ends in the install line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_deploy.errors import EXTRAS, MissingDependencyError, missing_package

REPO = Path(__file__).parents[1]

# In a process of its own: each module is imported anew for each package, and the test's are those of other tests.
PROGRAM = """
import importlib, json, pkgutil, sys
from pathlib import Path

import torch, torchvision  # once: what is hidden below is put back
import rkd_deploy

sys.path.insert(0, "benchmarks")
NAMES = [one.name for one in pkgutil.walk_packages(rkd_deploy.__path__, "rkd_deploy.")]
NAMES = [name for name in NAMES if name not in ("rkd_deploy.serve.triton.model", "rkd_deploy.serve.triton.pixels")]
# .. which run inside of Triton alone.
BENCHMARKS = [file.stem for file in Path("benchmarks").glob("*.py")]

OF_BENCHMARKS = ("torch", "torchvision", "onnx", "onnxruntime", "safetensors", "matplotlib")

def imported(package):
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == package}
    sys.modules[package] = None
    for loaded in [name for name in sys.modules if name.split(".")[0] == "rkd_deploy" or name in BENCHMARKS]:
        del sys.modules[loaded]
    ends = {}
    for name in [*NAMES, *(() if package in OF_BENCHMARKS else BENCHMARKS)]:
        try:
            importlib.import_module(name)
        except Exception as error:
            ends[name] = [type(error).__name__, str(error)]
    del sys.modules[package]
    sys.modules.update(hidden)
    return ends

print(json.dumps({package: imported(package) for package in sys.argv[1:]}))
"""

NEEDED = {
    "torch": ("train", "models", "data", "export", "pipeline", "compare", "backends.pytorch"),
    "torchvision": ("data", "train", "pipeline", "compare"),
    "safetensors": ("train", "pipeline", "compare"),
    "starlette": ("serve.http",),
    "uvicorn": ("serve.http",),
}
"""Rooms that are nothing without a package, and import it at their top: what asks for them ends in the line. Those
that benchmarks are nothing without (OF_BENCHMARKS above) are not tried with them."""


@pytest.fixture(scope="module")
def ends() -> dict[str, dict[str, list[str]]]:
    """By package that is absent, the modules that cannot be imported: type and message of the error."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *EXTRAS]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actual: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return actual


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_a_module_imports_without_it_or_ends_in_the_install_line(
    package: str, ends: dict[str, dict[str, list[str]]]
) -> None:
    line = f"pip install 'rkd-deploy[{EXTRAS[package]}]'"
    for module, (kind, message) in ends[package].items():
        if kind == "MissingDependencyError":
            assert message.endswith(line)
            continue
        # Of this package, or of another one that this environment has not.
        assert kind == "ModuleNotFoundError", f"{module}: {kind}: {message}"
        (named,) = [name for name in EXTRAS if re.search(rf"\b{name}\b", message)]
        assert module.removeprefix("rkd_deploy.").startswith(NEEDED.get(named, ())), f"{module}: {message}"


def test_what_is_missing_ends_a_command_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever room meets it first, at its top or in the middle."""
    from rkd_deploy import cli

    def command() -> None:
        raise ModuleNotFoundError("No module named 'torch_pruning.ops'", name="torch_pruning.ops")

    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(sys, "argv", ["rkd-deploy"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert re.search(
        r"^Error: torch_pruning .*pip install 'rkd-deploy\[train\]'$", capsys.readouterr().err, re.MULTILINE
    )


def test_a_module_of_ours_that_is_missing_is_no_package_to_install() -> None:
    assert missing_package(ModuleNotFoundError("no", name="rkd_deploy.lost")) is None
    assert isinstance(missing_package(ModuleNotFoundError("no", name="timm.models")), MissingDependencyError)
