"""How long the command and the import take to be there.

    uv run python benchmarks/startup.py

An import is compared with a bare interpreter, started in turn; the figure is the difference of medians.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from record import Claim, save

RUNS = 20
HEAVY = ("torch", "onnxruntime")


def main() -> None:
    """Measure, and write the record."""
    command = str(Path(sys.executable).with_name("rkd-deploy"))
    bare, imported, helped = [], [], []
    for _ in range(RUNS):
        bare.append(_seconds([sys.executable, "-c", "pass"]))
        imported.append(_seconds([sys.executable, "-c", "import rkd_deploy"]))
        helped.append(_seconds([command, "--help"]))
    _check_light()
    difference = median(imported) - median(bare)
    save(
        "startup",
        [
            Claim("rkd-deploy --help", median(helped), "s", 0.3, {"seconds": helped}),
            Claim(
                "import rkd_deploy, beyond a bare interpreter",
                difference,
                "s",
                0.05,
                {"import": imported, "bare": bare},
            ),
        ],
    )


def _seconds(command: list[str]) -> float:
    # Bytecode may be written, as on a user's machine: otherwise every start compiles the package anew.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def _check_light() -> None:
    code = f"import sys, rkd_deploy, rkd_deploy.cli; assert not {{*{HEAVY}}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
