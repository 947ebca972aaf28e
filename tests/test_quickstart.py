"""The README's first command, whole, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
def test_quickstart_ends_with_a_table_and_a_plot(tmp_path):
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "rkd_deploy.cli", "quickstart", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout.splitlines()[-1])
    parts = {row["part"]: row for row in made["results"]}
    assert set(parts) == {"teacher", "s0", "student", "fused"}
    assert all(row["accuracy"] > 80 for row in parts.values())  # chance is 10
    assert parts["fused"]["macs"] <= parts["s0"]["macs"]
    with Image.open(tmp_path / made["plot"]) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").get_flattened_data())) > 10  # not an empty canvas
    assert all(len(line) <= 80 for line in result.stderr.splitlines() if "│" in line or "─" in line)
