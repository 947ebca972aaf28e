"""The examples in Python: photos from a shell, and a folder that is watched."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / "examples/python"


def test_classify_names_the_golden_photo(golden):
    command = [sys.executable, PYTHON / "classify.py", golden.bundle, golden.photo]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"{golden.photo} {golden.label} {golden.probability:.1%}" in said


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


@pytest.fixture
def watched(golden, tmp_path):
    """Starts the watcher; ends it as Ctrl-C does."""
    (tmp_path / "photos").mkdir()
    started = []

    def start(until: int) -> list[dict[str, str]]:
        labels = tmp_path / "labels.csv"
        command = [sys.executable, PYTHON / "watch.py", golden.bundle, tmp_path / "photos", labels, "--seconds", "0.02"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        started.append(process)
        end = time.monotonic() + 60
        while len(rows(labels)) < until and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        return rows(labels)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_watch_writes_a_row_for_every_photo_once(watched, golden, tmp_path):
    shutil.copy(golden.photo, tmp_path / "photos/a.jpg")
    (tmp_path / "photos/b.png").write_text("no image")
    (tmp_path / "photos/notes.txt").write_text("nothing")
    first, second = watched(until=2)
    assert (first["photo"], first["label"]) == ("a.jpg", golden.label)
    assert float(first["probability"]) == pytest.approx(golden.probability, abs=1e-3)
    assert second["photo"] == "b.png"
    assert "cannot be read as an image" in second["error"]
    (tmp_path / "photos/later").mkdir()
    shutil.copy(golden.photo, tmp_path / "photos/later/c.jpg")
    again = watched(until=3)
    assert [row["photo"] for row in again] == ["a.jpg", "b.png", "later/c.jpg"]
