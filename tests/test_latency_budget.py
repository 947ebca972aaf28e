"""A recipe whose budget is latency, the whole way: measured, trained, exported at the level that was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_deploy.card import ModelCard
from rkd_deploy.models import zoo
from rkd_deploy.models.separation import separate
from rkd_deploy.models.separation.latency import ROUNDING
from rkd_deploy.pipeline import Exported, export_run
from rkd_deploy.recipe import Recipe
from rkd_deploy.train.fitting import fit


def card_of(exported: Exported) -> ModelCard:
    return ModelCard.from_json((exported.folder / "model.json").read_text(encoding="utf-8"), "model.json")


@pytest.mark.slow
def test_s_and_a_that_were_measured_ship_as_they_were_measured(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 8x8 pixels calls are bound by their number: side by side is the way."""
    monkeypatch.setattr(separate, "MAX_SECONDS", 15.0)  # the search ends with the widest that it has by then
    recipe = tiny_recipe("student.budget=latency", "student.latency_threads=1", "student.latency_batches=[1,4]")
    run = fit(recipe, root=tmp_path)
    latency = run.read_json("facts.json")["separation"]["latency"]["fused"]
    assert latency["level"] == "wide"
    confirmed = [row for row in latency["readings"] if row["confirm"]]
    *_, at = (index for index, row in enumerate(confirmed) if row["fraction"] == latency["fraction_of_macs"])
    chosen = confirmed[at]
    assert max(chosen["ratios"].values()) == latency["worst_ratio"] <= 1 + ROUNDING
    assert list(chosen["ratios"]) == ["1", "4"]
    # On a busy machine a wider one may be tried after it, and found slower.
    assert all(max(row["ratios"].values()) > 1 + ROUNDING for row in confirmed[at + 1 :])
    S, A = chosen["widths"]
    assert all(s + a <= s0_width for s, a, s0_width in zip(S, A, zoo.create("resnet8", 10).widths, strict=True))
    assert card_of(export_run(run, test_images=False)).fusion == "wide"
    assert card_of(export_run(run, level="tail", test_images=False)).fusion == "tail"
    assert card_of(export_run(run, part="s0", test_images=False)).fusion == "none"
