"""Makes the listings of TensorRT's names beside this file, from NVIDIA's own bindings.

    uv run python tests/backends/tensorrt/listing.py 10.13.3.9 > tests/backends/tensorrt/tensorrt_10_13.json
    uv run python tests/backends/tensorrt/listing.py 10.3.0 > tests/backends/tensorrt/tensorrt_10_3.json

The bindings load once empty libraries stand in for TensorRT's: importing looks for these functions and calls none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FUNCTIONS = (
    *(f"createInfer{name}_INTERNAL" for name in ("Builder", "Refitter", "Runtime")),
    *(f"createNvOnnxParser{name}_INTERNAL" for name in ("", "Refitter")),
    *("getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
    *("getInferLibVersion", "createNvOnnxParser"),
)
DUMP = """
import json, tensorrt_bindings as module
def public(owner):
    return [name for name in dir(owner) if not name.startswith("_")]
classes = {name: isinstance(getattr(module, name), type) for name in public(module)}
rows = [(name, " ".join(public(getattr(module, name))) if own else "") for name, own in classes.items()]
print("{\\n" + ",\\n".join(f"{json.dumps(name)}: {json.dumps(members)}" for name, members in rows) + "\\n}", end="")
"""


def listing(version: str) -> str:
    """JSON of the public names of a TensorRT, each class with its members."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "empty.c"
        source.write_text("".join(f"void {function}(void) {{}}\n" for function in FUNCTIONS))
        for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
            target = folder / f"{library}.so.{version.split('.')[0]}"
            subprocess.run([shutil.which("gcc") or "cc", "-shared", "-fPIC", "-o", target, source], check=True)
        wanted = f"tensorrt-cu12-bindings=={version}"
        uv = [shutil.which("uv") or "uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        subprocess.run([*uv, "--target", folder / "site", wanted], cwd="/", check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": str(folder / "site")}
        command = [sys.executable, "-c", DUMP]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.stdout.write(listing(sys.argv[1]))
