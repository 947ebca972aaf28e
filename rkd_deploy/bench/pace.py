"""The pace of the machine beside a measurement: the time of one fixed piece of work."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from rkd_deploy.bench.machine import cores

_SIDE = 1 << 16
"""Numbers in one pass of `Pace`: 512 KB with the result, which the second level of caches holds."""
_PASSES, _REPEATS = 8, 5


class Pace:
    """The machine's own pace: the time of one fixed piece of work, on several threads at once.

    It is reported beside a measurement and changes no figure: a neighbour that takes part of a core shows in it, which
    a virtual machine shows in no clock. Two paces compare only within one bench.

    Args:
        threads: As many as the model has, callers included; no more than there are cores.
    """

    def __init__(self, threads: int) -> None:
        self._threads = min(threads, cores())
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._arrays = [_aligned() for _ in range(self._threads)]

    def __call__(self) -> float:
        """Do the work once and time it.

        Returns:
            Time of the slowest thread in ms, each thread's the median of `_REPEATS`.
        """
        run = map if self._pool is None else self._pool.map
        return max(run(_timed, self._arrays))

    def close(self) -> None:
        """End the threads that do the work."""
        if self._pool is not None:
            self._pool.shutdown()


def _aligned() -> tuple[np.ndarray, np.ndarray]:
    """Input and output of `Pace`'s work, float32 [_SIDE], at places in memory that are equally fast in every process.

    Each begins with a cache line, and they lie at different places of their pages. Where NumPy puts them, vectors
    straddle lines, and the work takes a third longer in one process than in another.
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
    for _ in range(_REPEATS):  # of several the median: an interruption of one would be taken for the machine's pace
        start = time.perf_counter()
        for _ in range(_PASSES):
            np.exp(x, out=y)  # vector instructions, and without the interpreter's lock
        times.append(1000 * (time.perf_counter() - start))
    return median(times)
