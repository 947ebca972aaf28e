"""A bundle with its golden photo, and one server of it that all tests here ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_servers import Running, served

BATCH = 8


@pytest.fixture(scope="session")
def photo_bundle(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the shared run; read only."""
    from rkd_deploy.pipeline import export_run

    return export_run(tiny_run, test_images=False, folder=tmp_path_factory.mktemp("served") / "bundle").folder


@pytest.fixture(scope="session")
def photo(photo_bundle: Path) -> bytes:
    return (photo_bundle / "golden/photo.jpg").read_bytes()


@pytest.fixture(scope="session")
def expected(photo_bundle: Path) -> dict[str, Any]:
    """What must be answered for the photo."""
    content: dict[str, Any] = json.loads((photo_bundle / "golden/photo.json").read_text())
    return content


@pytest.fixture(scope="session")
def server(photo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    limits = ("--max-body", 1, "--max-pixels", 1_000_000, "--max-batch", BATCH, "--max-requests", 16)
    with served(photo_bundle, tmp_path_factory.mktemp("server"), *limits) as running:
        yield running
