"""What a prediction, a profile and a measurement are of: the facts by which one finds the others."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model at one batch size, where and how it ran."""

    model: str
    file_bytes: int
    backend: str
    device: str
    threads: int | None
    """As asked for; None left it to the runtime."""
    batch: int

    @classmethod
    def of(cls, one: Any) -> Case:
        """The case of anything that has these facts: two things of one case are of the same measurement."""
        return Case(**{field.name: getattr(one, field.name) for field in fields(Case)})
