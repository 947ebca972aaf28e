"""`compare`: every network of some runs side by side, with the controls that make its accuracy mean something.

rows.py      which networks the runs hold, one row each; seeds joined; what each gains over its controls
latency.py   the same networks exported and timed in turn
report.py    table, Markdown and JSON
plotting.py  the picture
paging.py    the page
"""

from __future__ import annotations

from rkd_deploy.compare.report import Files, print_comparison, write_comparison, write_comparison_report
from rkd_deploy.compare.rows import Comparison, Row, compare
from rkd_deploy.compare.timing import timed

__all__ = [
    "Comparison",
    "Files",
    "Row",
    "compare",
    "print_comparison",
    "timed",
    "write_comparison",
    "write_comparison_report",
]
