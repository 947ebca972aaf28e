"""A benchmark record: what was measured against which limit, on what, with every sample."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rkd_deploy.bench.machine import provenance
from rkd_deploy.storage import write_json

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Claim:
    """One figure and the limit it is held to.

    Attributes:
        what: What was measured, in words.
        value: The figure.
        unit: s, MB, or ratio.
        limit: What it must not exceed, or None for a figure that is only told.
        samples: What the figure was taken from, by name.
    """

    what: str
    value: float
    unit: str
    limit: float | None
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit."""
        return self.limit is None or self.value <= self.limit


def ratio_of_medians(what: str, limit: float | None, numerator: Sequence[float], denominator: Sequence[float]) -> Claim:
    """A ratio of two things measured in turn, in one run."""
    return Claim(
        what,
        median(numerator) / median(denominator),
        "ratio",
        limit,
        {"numerator": list(numerator), "denominator": list(denominator)},
    )


def save(theme: str, claims: Sequence[Claim]) -> Path:
    """Write THEME_HARDWARE_YYYYMMDD.json, print what was found, and end standard output with one JSON line."""
    facts = asdict(provenance())
    path = FOLDER / f"{theme}_{hardware(facts)}_{datetime.now(UTC):%Y%m%d}.json"
    content = {"theme": theme, "provenance": facts, "claims": [asdict(claim) for claim in claims]}
    write_json(path, content)
    for claim in claims:
        limit = "" if claim.limit is None else f"  limit {claim.limit:g}  {'holds' if claim.holds else 'DOES NOT HOLD'}"
        print(f"{claim.what}: {claim.value:.3f} {claim.unit}{limit}")
    summary = {claim.what: claim.value for claim in claims}
    print(json.dumps({"record": path.name, "claims": summary, "hold": all(claim.holds for claim in claims)}))
    return path


def hardware(facts: dict[str, Any]) -> str:
    """The machine of a provenance as part of a file name."""
    gpus = facts.get("gpus") or []
    name = gpus[0]["name"] if gpus else f"{facts['cores']}x {facts['cpu']}"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
