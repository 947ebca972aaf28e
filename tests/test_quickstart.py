"""The README's first command, whole, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image


def operators(bundle: Path) -> list[tuple[str, list[list[int]]]]:
    """Every operator of the file with the shapes of its weights."""
    graph = onnx.load(bundle / "model.onnx").graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    return [(node.op_type, [shapes[name] for name in node.input if name in shapes]) for node in graph.node]


@pytest.mark.slow
def test_quickstart_ends_with_a_table_and_a_plot(tmp_path):
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "rkd_deploy.cli", "quickstart", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    parts = {row["part"]: row for row in outcome["results"]}
    assert set(parts) == {"teacher", "s0", "control", "student", "fused"}
    assert all(row["accuracy"] > 80 for row in parts.values())  # chance is 10
    assert parts["fused"]["macs"] <= parts["s0"]["macs"]
    fused, s0, teacher = (operators(tmp_path / outcome["bundles"][part]) for part in ("fused", "s0", "teacher"))
    assert fused == s0  # S and A side by side: S0's shapes, S0's time
    assert fused != teacher
    with Image.open(tmp_path / outcome["plot"]) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").get_flattened_data())) > 10  # not an empty canvas
    assert all(len(line) <= 80 for line in result.stderr.splitlines() if "│" in line or "─" in line)
