"""A bench as a process of its own, which gets a real Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = (sys.executable, "-m", "rkd_deploy.cli", "bench")


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[..., tuple[str, str, dict[str, Any]]]:
    """Runs `bench`, sends SIGINT at a moment, and gives what it printed on either stream and the record it left."""

    def run(moment: Callable[[int], object], *options: object) -> tuple[str, str, dict[str, Any]]:
        command = [*COMMAND, *map(str, options), "--threads", "1", "--output", str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while not moment(process.pid):
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 130
        assert "Interrupted. " in err
        assert "Traceback" not in err
        record = json.loads((tmp_path / "out/bench.json").read_text())
        assert record["partial"] is True
        return out, err, record

    return run


@pytest.fixture
def cpu_seconds() -> Callable[[int], float]:
    """What a process has used so far."""

    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return used
