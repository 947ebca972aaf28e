"""The npm packages that the examples in JavaScript name, installed once for all tests, outside of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPO = Path(__file__).parents[2]

_UNREACHABLE = re.compile(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|CONNRESET|TIMEDOUT|HOSTUNREACH|NETUNREACH|403)\b|network")


def node_packages() -> tuple[str, ...]:
    """NAME@VERSION of each package that a package.json of the examples names."""
    manifests = [json.loads(file.read_text()) for file in sorted((REPO / "examples").glob("*/package.json"))]
    versions = {name: version for manifest in manifests for name, version in manifest["dependencies"].items()}
    return tuple(f"{name}@{version}" for name, version in sorted(versions.items()))


def install(missing: Callable[[str], NoReturn]) -> Path:
    """The folder with node_modules.

    Args:
        missing: Ends the test with a reason, where there is no npm or its registry cannot be reached.
    """
    packages = node_packages()
    folder = REPO / ".data" / f"node-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes at once install once
        if not (folder / ".ready").exists():
            # Without scripts: the only one would download libraries for GPUs.
            options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--fetch-retries=1"]
            done = subprocess.run(
                ["npm", "install", "--prefix", folder, *options, *packages], capture_output=True, text=True, check=False
            )
            if done.returncode:
                shutil.rmtree(folder / "node_modules", ignore_errors=True)
                if _UNREACHABLE.search(done.stderr):
                    missing(f"npm's registry cannot be reached: {done.stderr.strip()[-500:]}")
                raise AssertionError(f"npm install failed: {done.stderr}")
            (folder / ".ready").touch()
    return folder
