"""benchmarks/photos.py: what is trained in which order, who chooses, and what is made of the logits."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rkd_deploy.data.splits import ImageSet, Split
from rkd_deploy.models import zoo
from rkd_deploy.storage import write_json

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "benchmarks"))

import photos  # noqa: E402
import photos_latency  # noqa: E402
import photos_shown  # noqa: E402
from photos_loop import Builder, Joint, Photos, exits, logits  # noqa: E402
from photos_rows import TINY, Group, Row, as_json, best, chosen_teacher, from_json, groups, row_of  # noqa: E402


def line(row: Row, held_out: float, seed: int = 0) -> dict[str, Any]:
    """A line of the record."""
    return {"row": asdict(row), "seed": seed, "held_out": held_out}


def images(count: int, pixels: int = 16) -> ImageSet:
    """Noise in three classes."""
    g = torch.Generator().manual_seed(0)
    whole = Split(
        images_NCHW=torch.randint(0, 256, (count, 3, pixels, pixels), generator=g, dtype=torch.uint8),
        labels_N=torch.arange(count) % 3,
    )
    return ImageSet(
        name="noise", classes=("a", "b", "c"), mean=(0.5,) * 3, std=(0.25,) * 3, train=whole, val=whole, test=whole
    )


def conducted(refused: tuple[str, ...] = ()) -> list[Group]:
    """All groups of the tiny study in the order in which one process would train them."""
    lines: list[dict[str, Any]] = []
    done: list[Group] = []
    while left := [group for group in groups(TINY, lines, {g.key for g in done}) if group not in done]:
        done.append(left[0])
        lines += [
            line(row, 10 * row.x + number, left[0].seed)
            for number, row in enumerate(left[0].rows)
            if row.kind not in refused
        ]
    return done


def test_the_first_seed_chooses_and_the_others_train_what_it_chose() -> None:
    order = conducted()
    assert len({group.key for group in order}) == len(order)
    assert order[0].of_teacher
    searched = {row for group in order if group.seed == 0 for row in group.rows}
    again = [row for group in order if group.seed == 1 for row in group.rows]
    assert set(again) <= searched
    assert len({row.place for row in again}) == len(again)  # one setting a place
    assert {row.x for row in again if row.kind in ("branches", "side_by_side", "trunk", "control")} == {3.0}
    assert {row.kind for row in again} == {row.kind for row in searched if not row.kind.endswith("epochs")}


def test_what_is_refused_keeps_nothing_else_from_its_seeds() -> None:
    kinds = {row.kind for group in conducted(refused=("trunk",)) if group.seed == 1 for row in group.rows}
    assert {"branches", "side_by_side", "control", "distilled", "cross-entropy", "T"} <= kinds
    assert not {"trunk", "early trunk"} & kinds


def test_held_out_photos_choose_within_a_place_and_by_the_first_seed_alone() -> None:
    slow, fast = Row("n", "control", x=1.0), Row("n", "control", x=3.0)
    lines = [line(slow, 60), line(fast, 61), line(slow, 90, seed=1), line(Row("n", "branches"), 99)]
    assert best(lines, slow.place) == fast
    assert best(lines, "another") is None
    T = Row("resnet8", "T", "ce", mixed=True)
    assert chosen_teacher(TINY, [*lines, line(T, 40), line(Row("resnet8", "T", "ce"), 39)]) == T


def test_a_group_is_the_same_after_its_way_through_json() -> None:
    group = Group("g", (Row("n", "narrowed", "lskd", fraction=0.5), Row("n", "T", "ce", mixed=True)), 2)
    assert from_json(as_json(group)) == group
    assert row_of({"row": asdict(group.rows[0])}) == group.rows[0]


def test_rows_learn_side_by_side_from_one_batch_and_from_what_the_teacher_says_of_it() -> None:
    data = images(13)
    shown = Photos(data, 4, torch.device("cpu"))
    T = zoo.create("resnet8", 3).eval()
    builder = Builder(16, 3, T)
    joint = Joint(shown, T)
    rows = (Row("resnet8", "distilled", "kd"), Row("resnet8", "branches"), Row("resnet8", "T", "ce", mixed=True))
    rows += (Row("resnet8", "inherited, 2 epochs", fraction=1.0),)
    for row in rows:
        joint.add(row, builder(row, 0))
    before = [[p.clone() for p in learner.parameters] for learner in joint.learners]
    assert len(joint.train(0, 2)) == 2
    for learner, weights in zip(joint.learners, before, strict=True):
        assert learner.loss.isfinite()
        assert any(not torch.equal(p, q) for p, q in zip(learner.parameters, weights, strict=True))
    assert joint.given is not None
    torch.testing.assert_close(joint.given.logits_NK, T(shown.x), rtol=1e-4, atol=1e-5)
    assert shown.y_mixed.sum(1).allclose(torch.ones(4))
    assert set(exits(joint.learners[1].network)) == {"sum", "student"}
    z = logits(joint.learners[1].network, data.test, shown)  # type: ignore[arg-type]
    assert z.shape == (13, 3)


def test_gradients_are_no_longer_than_the_limit_and_the_rate_scales_the_step() -> None:
    shown = Photos(images(8), 4, torch.device("cpu"))
    joint = Joint(shown, None)
    row = Row("resnet8", "cross-entropy", "ce", weight_decay=0.0)
    joint.add(row, Builder(16, 3)(row, 0))
    learner = joint.learners[0]
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.mul_(10)
    before = [p.clone() for p in learner.parameters]
    learner.lr.fill_(0.5)
    learner.step()
    moved = torch.stack([(p - q).norm() for p, q in zip(learner.parameters, before, strict=True)]).norm()
    assert moved <= 0.5 * 1.9 * 5.0 * 1.001  # Nesterov's first step is 1 + 0.9 gradients


def test_accuracies_and_exits_are_those_of_the_logits() -> None:
    labels = [0, 1, 2, 3]
    z_S = np.full((4, 10), -2.0, np.float32)
    z_S[[0, 1, 2, 3], [0, 1, 5, 6]] = [9, 0, 9, 0]  # sure and right, unsure and right, sure and wrong, unsure and wrong
    z = np.full((4, 10), -2.0, np.float32)
    z[range(4), labels] = 3
    content = {name: photos.encoded(torch.from_numpy(value)) for name, value in (("student", z_S), ("sum", z))}
    of_split = {f"{part}_{split}": text for part, text in content.items() for split in ("held", "test")}
    row = Row("n", "early branches")
    known = {"held": labels, "test": labels}
    result = photos_latency.tested({**line(row, 50.0), **of_split}, known, ("row", "seed", "held_out"))
    assert (result["sum_top1"], result["student_top1"]) == (100.0, 50.0)
    assert np.unpackbits(np.frombuffer(bytes.fromhex(result["student_right"]), np.uint8))[:4].tolist() == [1, 1, 0, 0]
    curve = photos_latency.exit_curve({**line(row, 50.0), **of_split}, known)
    by_threshold = {point["threshold"]: point for point in curve["curve"]}
    assert (by_threshold[0.0]["test"], by_threshold[0.0]["asked"]) == (50.0, 0.0)
    assert (by_threshold[0.6]["test"], by_threshold[0.6]["asked"]) == (75.0, 0.5)  # who is sure and wrong stays wrong
    assert (by_threshold[1.01]["test"], by_threshold[1.01]["asked"]) == (100.0, 1.0)
    assert curve["chosen"] == 1.01


def test_what_the_time_did_not_suffice_for_is_listed_and_what_was_refused_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(photos_latency, "Study", lambda: TINY)
    (T, *_) = groups(TINY, [], set())
    nothing = {"groups": {T.key: {"trained": 0}}, "lines": [], "refused": {}}
    everything = photos_latency.left(nothing)
    assert {(row["network"], row["kind"]) for row in everything} >= {("resnet8", "T"), (TINY.s0[0], "trunk")}
    trained = {
        "groups": {T.key: {"trained": 2}},
        "lines": [line(row, 50) for row in T.rows],
        "refused": {f"{TINY.s0[0]}, trunk": "no"},
    }
    left = photos_latency.left(trained)
    assert not any(row["kind"] == "trunk" or (row["kind"], row["seed"]) == ("T", 0) for row in left)
    assert {"network": TINY.s0[0], "kind": "branches", "seed": 0} in left
    text = photos_shown.missing({"left": left})
    assert f"| {TINY.s0[0].partition(':')[2]} | S0, cross-entropy;" in text
    assert photos_shown.missing({"left": []}) == ""


def test_a_gain_of_one_seed_is_that_of_the_photos_which_one_of_the_two_has_right() -> None:
    ours = {"seed": 0, "sum_top1": 75.0, "sum_right": "f0f0"}  # 8 of 16
    others = {"seed": 0, "sum_top1": 25.0, "sum_right": "f00f"}  # 4 shared, 4 gained, 4 lost
    assert photos_shown.gain([ours], [others], 16).startswith("+0.0 (")
    assert photos_shown.gain([ours], [{**others, "sum_right": "f000"}], 16).startswith("+25.0 (")
    assert photos_shown.gain([ours], [{**others, "seed": 1}], 16) == ""
    seeds = [[{"seed": seed, "sum_top1": top1 + seed} for seed in range(3)] for top1 in (60.0, 58.0)]
    assert photos_shown.gain(*seeds, 16) == "+2.0 (+2.0 to +2.0)"


def test_an_interval_holds_the_photos_binomial_variance_and_that_of_the_seeds() -> None:
    assert photos_shown.half_width([50.0], 100) == pytest.approx(9.8)
    assert photos_shown.half_width([40.0, 60.0], 100) == pytest.approx(1.96 * (25 + 100) ** 0.5)


def test_the_teachers_weights_come_back_from_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_LARGEST_FILE", 20_000)
    network = zoo.create("resnet8", 3)
    photos.save(network, tmp_path / "candidate-1.safetensors")
    photos.keep_teacher(tmp_path / "candidate-1.safetensors", tmp_path)
    assert len(list(tmp_path.glob("teacher-*.safetensors"))) > 1
    T = photos.teacher(tmp_path, Builder(16, 3), Row("resnet8", "T", "ce"))
    for name, value in T.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_what_failed_or_was_refused_is_tried_again_and_what_was_trained_is_not(tmp_path: Path) -> None:
    kept = {"T": {"trained": 2, "seconds": 1.0}}
    gone = {"n trunk": {"trained": 0, "seconds": 1.0}, "n cut": {"trained": 0, "error": "RuntimeError", "seconds": 1.0}}
    write_json(tmp_path / photos.RECORD, {"groups": kept | gone, "lines": [], "refused": {}})
    assert photos.begun(tmp_path)["groups"] == kept  # type: ignore[index]
    assert photos.begun(tmp_path / "absent") is None
