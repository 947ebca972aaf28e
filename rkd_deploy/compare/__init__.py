"""Compare: networks of several runs side by side, with their controls."""

from __future__ import annotations

from rkd_deploy.compare.report import (
    Files,
    print_comparison,
    read_comparison,
    write_comparison,
    write_comparison_report,
)
from rkd_deploy.compare.rows import Comparison, NetworkRow, compare_runs
from rkd_deploy.compare.timing import timed

__all__ = [
    "Comparison",
    "Files",
    "NetworkRow",
    "compare_runs",
    "print_comparison",
    "read_comparison",
    "timed",
    "write_comparison",
    "write_comparison_report",
]
