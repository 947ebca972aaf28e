"""A browser, and the pages that it shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from headless_browser import Browser
from recorded import make_comparison, make_record

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get update && apt-get install -y --no-install-recommends chromium"


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a bench and of a comparison, drawn once."""
    from rkd_deploy.bench.reading import bench_record
    from rkd_deploy.compare import write_comparison_report
    from rkd_deploy.compare.report import recorded_comparison
    from rkd_deploy.report.writing import write_bench_report

    folder = tmp_path_factory.mktemp("pages")
    return {
        "bench": write_bench_report([bench_record(make_record())], folder).page,
        "compare": write_comparison_report(recorded_comparison(make_comparison()), folder).page,
    }


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], NoReturn]) -> Iterator[Any]:
    """Chromium; where it is not, what to do is said."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        reason = f"no Chromium to look at the pages with ({', '.join(PROGRAMS)}). Install it with: {INSTALL}"
        absent(reason)
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
