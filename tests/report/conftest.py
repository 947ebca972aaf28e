"""The pages that a browser shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import make_comparison, make_record


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
