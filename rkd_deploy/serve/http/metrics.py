"""Counts requests and times in Prometheus' text format, over all workers of a server.

Each worker writes a row of its own in memory that all of them share, and whoever is asked adds the rows up: a scrape
reaches any one of them. The row of a worker that has died keeps its counts, because a counter must never fall.
"""

from __future__ import annotations

import itertools
import multiprocessing
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

ENDPOINTS = ("classify", "infer", "other")
CODES = (200, 400, 404, 405, 408, 413, 415, 499, 500, 503)
"""499: the client left before its answer. Any other code is counted with the first of its hundred."""
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper ends in seconds; the last bucket has none."""
HISTOGRAMS = {
    "decode": "Time to read, resize and crop the images of a request.",
    "inference": "Time of the model for a request.",
    "request": "Time of a request from its first byte to its answer.",
}
ROWS = 256
"""Workers that a server can have started; later ones share the last row."""

_COUNTS = len(ENDPOINTS) * len(CODES)
_WIDTH = len(BUCKETS) + 2  # one more bucket, and the sum
_STARTS = {name: _COUNTS + number * _WIDTH for number, name in enumerate(HISTOGRAMS)}
_COLUMNS = _COUNTS + len(HISTOGRAMS) * _WIDTH


class SharedCounts:
    """Memory of the counts of all workers; goes to them when they are started."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._values: Any = spawn.RawArray("d", ROWS * _COLUMNS)
        self._started: Any = spawn.Value("i", 0)

    def claim(self) -> Metrics:
        """The row of a worker that begins."""
        with self._started.get_lock():
            row = min(self._started.value, ROWS - 1)
            self._started.value += 1
        return Metrics(np.frombuffer(self._values, np.float64).reshape(ROWS, _COLUMNS), row)


class Metrics:
    """What one worker counts; not for several threads at once."""

    def __init__(self, values: np.ndarray[Any, np.dtype[np.float64]], row: int) -> None:
        self._all, self._row = values, values[row]

    def count(self, endpoint: str, code: int) -> None:
        """One request was answered."""
        known = code if code in CODES else code // 100 * 100
        place = CODES.index(known) if known in CODES else CODES.index(500)
        self._row[ENDPOINTS.index(endpoint) * len(CODES) + place] += 1

    def observe(self, name: str, seconds: float) -> None:
        """One of `HISTOGRAMS` took so long."""
        start = _STARTS[name]
        self._row[start + bisect_left(BUCKETS, seconds)] += 1
        self._row[start + _WIDTH - 1] += seconds

    def text(self) -> str:
        """All counts of all workers (https://prometheus.io/docs/instrumenting/exposition_formats)."""
        return "\n".join(self._lines(self._all.sum(axis=0))) + "\n"

    def _lines(self, totals: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[str]:
        yield "# HELP rkd_requests_total Requests by endpoint and status code."
        yield "# TYPE rkd_requests_total counter"
        for (endpoint, code), value in zip(itertools.product(ENDPOINTS, CODES), totals, strict=False):
            if value:
                yield f'rkd_requests_total{{endpoint="{endpoint}",code="{code}"}} {value:.0f}'
        for name, meaning in HISTOGRAMS.items():
            *buckets, total = totals[_STARTS[name] :][:_WIDTH]
            full = f"rkd_{name}_seconds"
            yield f"# HELP {full} {meaning}"
            yield f"# TYPE {full} histogram"
            sums = list(itertools.accumulate(buckets))
            for end, value in zip((*map(str, BUCKETS), "+Inf"), sums, strict=True):
                yield f'{full}_bucket{{le="{end}"}} {value:.0f}'
            yield f"{full}_sum {total:.6f}"
            yield f"{full}_count {sums[-1]:.0f}"
