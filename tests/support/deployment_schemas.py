"""Schemas by which others read what we write for them, copied from their sources (tests/serve/schemas)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs

_FOLDER = Path(__file__).parents[1] / "serve/schemas"


def faults(schema: str, document: Any) -> list[str]:
    """What a document breaks of a schema, ovms_config or kserve_inferenceservice; a field unknown there is a fault."""
    validator = jsonschema_rs.validator_for(json.loads((_FOLDER / f"{schema}.json").read_text()))
    return [error.message for error in validator.iter_errors(document)]
