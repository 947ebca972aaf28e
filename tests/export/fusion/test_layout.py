"""S and A side by side: widths that add up to S0's, a merged graph with S0's work, and the level export takes."""

from __future__ import annotations

from typing import Any

import pytest

from rkd_deploy.backends.files import read_card
from rkd_deploy.errors import RecipeError, UsageError
from rkd_deploy.export.fusion import fuse
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.pipeline import export_run
from rkd_deploy.train.fitting import fit

SIDE, CLASSES = 32, 10


def merged_macs(separation: Any, channels: int) -> int:
    model = ResidualStudent(separation.student, separation.assistants, channels, CLASSES).eval()
    return count(fuse(model, "wide"), SIDE).macs


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize(("name", "assistants"), [("resnet20", 1), ("resnet8x4", 2), ("vgg8", 1), ("wrn_16_2", 1)])
def test_widths_add_up_to_those_of_S0_and_merged_they_do_no_more_than_it(name, assistants, budget):
    S0 = zoo.create(name, CLASSES)
    how = {"num_classes": CLASSES, "input_size": SIDE, "budget": budget, "assistants": assistants}
    outcome = separate(S0, layout="side_by_side", assistant_share=0.3, **how)
    assert outcome.level == "wide"
    for s, a, w, step in zip(outcome.student.widths, outcome.assistant.widths, S0.widths, S0.steps(8), strict=True):
        assert s + assistants * a <= w
        assert s % step == a % step == 0
    assert outcome.cost <= outcome.budget
    s0_macs = count(S0, SIDE).macs
    assert 0.8 * s0_macs < merged_macs(outcome, S0.channels) <= s0_macs
    # Two branches within the same budget are more work when they are merged: the comparison above can say no.
    branches = separate(S0, layout="branches", assistant_share=0.3, **how)
    assert branches.level == "tail"
    assert merged_macs(branches, S0.channels) > s0_macs


def test_branches_are_the_default():
    how: dict[str, Any] = {"num_classes": CLASSES, "input_size": SIDE}
    default, named = (separate("resnet8", **how, **more) for more in ({}, {"layout": "branches"}))
    assert (default.student.widths, default.assistant.widths) == (named.student.widths, named.assistant.widths)


def test_an_unknown_layout_is_refused():
    with pytest.raises(UsageError, match=r"layout.*branches"):
        separate("resnet8", num_classes=CLASSES, input_size=SIDE, layout="stacked")


def test_a_run_side_by_side_is_exported_as_wide(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        "student.layout=side_by_side", "student.round_to=4", "train.epochs=1", "student.baseline=false"
    )
    run = fit(recipe, root=tmp_path)
    exported = export_run(run)
    assert exported.folder.name == "bundle"
    card = read_card(exported.folder, {})
    assert card is not None
    assert card.fusion == "wide"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("student.layout=stacked",), "student.layout.*branches"),
        (("student.layout=side_by_side", "method.scheme=progressive"), "cannot be merged"),
        (("student.layout=branches", "method.name=kd"), "without assistants"),
    ],
)
def test_layouts_without_effect_are_refused(tiny_recipe, settings, said):
    with pytest.raises(RecipeError, match=said):
        tiny_recipe(*settings)


def test_what_cannot_be_merged_is_refused_before_the_training(tiny_recipe, tmp_path):
    how = ("student.name=timm:convnext_atto", "data.image_size=32", "student.layout=side_by_side")
    recipe = tiny_recipe(*how, "student.baseline=false")
    with pytest.raises(UsageError, match="Level wide cannot merge"):
        fit(recipe, root=tmp_path)
