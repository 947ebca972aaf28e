"""How fast the machine itself is at the moment: a fixed piece of work, timed beside each turn of a measurement.

Another program on the same core, or another tenant of the same host, slows whatever runs there, by half as much again
and for seconds or minutes, and a virtual machine shows it neither in its clock nor in its load. Samples of one bench
then agree with one another and not with those of the next. The pace tells: it is taken on as many threads as the model
has, and held against the fastest that this machine was ever seen at, which is remembered between benches.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from rkd_deploy.errors import StorageError
from rkd_deploy.serve.bench.provenance import cores, cpu_model
from rkd_deploy.serve.engines.cache import cache_folder
from rkd_deploy.storage import write_json

_SIDE = 1 << 16
"""Numbers in one pass: 512 KB with the result, which the second level of caches holds."""
_PASSES, _REPEATS = 8, 5


def remembered_paces() -> Path:
    """Where the fastest paces are kept; removing the file forgets them."""
    return cache_folder().with_name("pace.json")


class Pace:
    """Times the same work again and again, on several threads at once.

    Args:
        threads: As many as the model has, callers included; no more than there are cores.
        kept: Where the fastest pace is remembered.
    """

    def __init__(self, threads: int, kept: Path) -> None:
        self._threads = min(threads, cores())
        self._kept = kept
        self._key = f"{cpu_model()}, {self._threads} threads, numpy {np.__version__}"
        self._known = _read(kept)
        self.best_ms: float | None = self._known.get(self._key)
        """The fastest that is known: of earlier benches, and of all calls so far."""
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._arrays = [_aligned() for _ in range(self._threads)]

    def __call__(self) -> float:
        """Do the work.

        Returns:
            Time of the slowest thread in ms, each thread's the median of `_REPEATS`.
        """
        own = map if self._pool is None else self._pool.map
        found = max(own(_timed, self._arrays))
        self.best_ms = found if self.best_ms is None else min(self.best_ms, found)
        return found

    def close(self) -> None:
        """End the threads, and remember the fastest pace for later benches, where that can be written."""
        if self._pool is not None:
            self._pool.shutdown()
        if self.best_ms is not None and self.best_ms != self._known.get(self._key):
            try:
                write_json(self._kept, {**_read(self._kept), self._key: self.best_ms})
            except StorageError:  # an app's user may have no home: the next bench begins anew
                return


def _aligned() -> tuple[np.ndarray, np.ndarray]:
    """Input and output at the beginning of a cache line each, and at different places of their pages.

    Where NumPy puts them, vectors straddle lines, and the work takes a third longer in one process than in another.
    """
    line, page = 64 // 4, 4096 // 4
    memory = np.empty(2 * _SIDE + page, np.float32)
    first = -(memory.ctypes.data // 4) % line
    second = first + _SIDE + page // 2
    x, y = memory[first : first + _SIDE], memory[second : second + _SIDE]
    x[:] = np.linspace(-1, 1, _SIDE)
    return x, y


def _timed(arrays: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = arrays
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(_PASSES):
            np.exp(x, out=y)  # vector instructions, and without the interpreter's lock
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _read(kept: Path) -> dict[str, float]:
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, float)} if isinstance(known, dict) else {}
