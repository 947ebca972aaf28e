from __future__ import annotations

import json
from collections.abc import Callable

import torch
from preparing import facts_of

from rkd_deploy.decoding import decode
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import preparation
from rkd_deploy.train.facts import RunFacts
from rkd_deploy.train.networks import build_residual, build_s0, build_teacher, derived_seed, seeded

MakeRecipe = Callable[..., Recipe]


def test_every_purpose_has_a_seed_of_its_own() -> None:
    seeds = {
        derived_seed(seed, purpose) for seed in range(100) for purpose in ("teacher", "s0", "init/teacher", "init/s0")
    }
    assert len(seeds) == 400
    # CRC-32 of "0/teacher": the same on every machine and in every version, or old runs could not be resumed.
    assert derived_seed(0, "teacher") == 3_321_158_957


def test_what_is_drawn_inside_depends_on_seed_and_purpose_alone_and_leaves_no_trace() -> None:
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        torch.rand(before)
        state = torch.get_rng_state()
        with seeded(7, "a"):
            drawn.append(torch.rand(5))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*drawn)
    for other in ((8, "a"), (7, "b")):
        with seeded(*other):
            assert not torch.equal(torch.rand(5), drawn[0])


def test_facts_say_what_building_the_networks_needs(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("student.name=resnet14", "teacher.name=resnet8x4", "data.val_fraction=0.2")
    facts = facts_of(recipe)
    cut = preparation.separate(  # with every argument, so that it is the one that is remembered
        "resnet14",
        num_classes=10,
        input_size=(8, 8),
        budget="macs",
        assistant_share=0.2,
        assistants=1,
        round_to=8,
        channels=256,
        fraction=None,
        stopwatch=None,
    )
    assert json.loads(json.dumps(facts.to_json())) == {
        "data": "digits",
        "classes": [str(digit) for digit in range(10)],
        "mean": [0.305] * 3,
        "std": [0.318] * 3,
        "image_size": [8, 8],
        "images": {"train": 80, "val": 20, "test": 50},
        "given_widths": [16, 16, 32, 64],
        "student_widths": list(cut.student.widths),
        "assistant_widths": list(cut.assistant.widths),
        "channels": 256,  # the teacher's
        "separation": {
            "unit": "macs",
            "level": "tail",
            "budget": cut.budget,
            "cost": cut.cost,
            "parts": cut.parts,
            "latency": None,
        },
        "given": {},
    }
    assert decode(RunFacts, json.loads(json.dumps(facts.to_json()))) == facts
    model = build_residual(recipe, facts)
    assert (model.student.widths, model.assistants[0].widths) == (cut.student.widths, cut.assistant.widths)
    assert model.head.weight.shape == (10, 256)
    assert build_teacher(recipe, 10, (8, 8)).channels == 256
    assert build_s0(recipe, facts).widths == (16, 16, 32, 64)
    assert torch.equal(model.head.weight, build_residual(recipe, facts).head.weight)
