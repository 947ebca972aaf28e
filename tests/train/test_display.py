from __future__ import annotations

from typing import Any

import pytest

from rkd_deploy.train.display import ProgressDisplay


def row(epoch: int, **more: Any) -> dict[str, Any]:
    return {
        "phase": "student",
        "epoch": epoch,
        "lr": 0.1,
        "explained": 0.98765,
        "train_top1": 97.5,
        "val_top1": 81.25,
        "seconds": 1.0,
        "images_per_s": 12345.6,
        **more,
    }


def test_an_epoch_is_a_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as progress:
        progress.phase("student", 2, 5, 0)
        for epoch in (1, 2):
            for _ in range(5):
                progress.step()
            progress.epoch(row(epoch, val_top1=None if epoch == 2 else 81.25))
    printed = capsys.readouterr()
    assert printed.out == ""  # that is for results
    lines = [line.split() for line in printed.err.splitlines() if line.strip()]
    assert lines == [
        ["student", "1/2", "explained", "0.9877", "train", "97.50", "%", "val", "81.25", "%", "12,346", "images/s"],
        ["student", "2/2", "explained", "0.9877", "train", "97.50", "%", "12,346", "images/s"],
    ]


@pytest.mark.parametrize(("epochs", "most"), [(19, 19), (20, 20), (100, 20), (239, 22), (240, 20)])
def test_a_long_phase_is_about_twenty_lines_and_ends_with_its_last_epoch(
    capsys: pytest.CaptureFixture[str], epochs: int, most: int
) -> None:
    with ProgressDisplay() as progress:
        progress.phase("teacher", 1, 1, 0)
        progress.phase("student", epochs, 1, 0)
        for epoch in range(1, epochs + 1):
            progress.step()
            progress.epoch(row(epoch))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == most
    assert lines[-1].split()[:2] == ["student", f"{epochs}/{epochs}"]
