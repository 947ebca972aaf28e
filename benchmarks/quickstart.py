"""Runs the README's first command in a fresh folder and keeps what it printed, for the README's table.

uv run python benchmarks/quickstart.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from record import FOLDER, hardware

from rkd_deploy.bench.machine import provenance
from rkd_deploy.storage import write_json
from rkd_deploy.train.networks import PARTS
from rkd_deploy.train.runs import open_run
from rkd_deploy.train.verdict import of_metrics


def main() -> None:
    """Run it and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "rkd_deploy.cli", "quickstart", "--json"]
        result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - began
        shown = json.loads(result.stdout.splitlines()[-1])
        verdict = of_metrics(open_run(Path(folder) / shown["run"]).metrics, PARTS)
        assert verdict is not None
    facts = asdict(provenance())
    record = {"theme": "quickstart", "provenance": facts, "seconds": seconds, "verdict": verdict.sentence()}
    record["results"] = shown["results"]
    path = FOLDER / f"quickstart_{hardware(facts)}_{datetime.now(UTC):%Y%m%d}.json"
    write_json(path, record)
    print(path.name, record["verdict"])


if __name__ == "__main__":
    main()
