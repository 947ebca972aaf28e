"""Repeats a measurement in sessions, with every model loaded afresh in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rkd_deploy.bench.timing import Progress

SESSIONS = 8
"""Number of sessions. Six are the fewest that bound a median on both sides with 95 % confidence (2 * 2^-6 is less than
5 %); eight, too, bound it by their extremes: to leave one out on each side takes 2 * 9 * 2^-8, more than 5 %."""

K = TypeVar("K")
V = TypeVar("V")


def measure_in_sessions(
    subjects: Sequence[K],
    measure: Callable[[Sequence[K]], Mapping[K, V]],
    progress: Progress | None = None,
) -> dict[K, list[V]]:
    """Measure several things against one another in `SESSIONS` sessions.

    A model that is loaded twice is not equally fast twice: where its memory comes to lie changes its latency, through
    the whole session. So the session is the unit that `statistics.judge` counts.

    Args:
        subjects: What is measured, e.g. files.
        measure: Loads and times the subjects in the order it is given, and lets go of them. The order turns round in
            every second session, because who is loaded first, and so lies first in memory, must not always be the same.
        progress: Called with the number of the session, and the share of them that is done.

    Returns:
        What was measured of each subject, by session.
    """
    measured: dict[K, list[V]] = {subject: [] for subject in subjects}
    for session in range(SESSIONS):
        if progress is not None:
            progress(f"session {session + 1} of {SESSIONS}", session / SESSIONS)
        values = measure(subjects if session % 2 == 0 else list(reversed(subjects)))
        for subject in subjects:
            measured[subject].append(values[subject])
    return measured
