"""What `compare` says of runs, against their metrics.json read by hand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from preparing import reseal

from rkd_deploy.compare import compare_runs
from rkd_deploy.errors import ModelFileError, UsageError
from rkd_deploy.train.runs import Run


def top1(run, part):
    return json.loads((run.folder / "metrics.json").read_text())["parts"][part]["test_top1"]


def by_name(runs):
    return {row.name: row for row in compare_runs(runs).rows}


def test_every_network_has_a_row_and_the_controls_stand_before_what_they_control(finished):
    rows = compare_runs([finished["at"], finished["kd"], finished["seed0"]]).rows
    assert [row.name for row in rows] == [
        "T, resnet8",
        "S0, cross_entropy",
        "S0, cross_entropy + at",
        "S0, kd",
        "S0, same losses, sequential",
        "S alone, sequential",
        "S + A, sequential",
        "S0, same losses, sequential + at",
        "S alone, sequential + at",
        "S + A, sequential + at",
    ]


def test_weights_met_in_several_runs_make_one_row(finished):
    # T has the same seed and recipe in all three: it is one network, and so is nothing else here.
    rows = compare_runs([finished["at"], finished["kd"], finished["seed0"]]).rows
    (teacher,) = [row for row in rows if row.part == "teacher"]
    assert len(teacher.runs) == 1
    assert teacher.deviation is None


def test_seeds_are_joined_to_mean_and_sample_deviation(finished):
    runs = [finished["seed0"], finished["seed1"]]
    actual = by_name(runs)
    for name, part in (("T, resnet8", "teacher"), ("S + A, sequential", "fused"), ("S0, cross_entropy", "s0")):
        accuracies = [top1(run, part) for run in runs]
        assert actual[name].top1 == pytest.approx(np.mean(accuracies))
        assert actual[name].deviation == pytest.approx(np.std(accuracies, ddof=1))
        assert actual[name].runs == tuple(str(run.folder) for run in runs)
    gains = [top1(run, "fused") - top1(run, "s0") for run in runs]
    assert actual["S + A, sequential"].over_s0 == pytest.approx(np.mean(gains))


def test_gains_are_against_the_controls_of_the_same_run(finished):
    run = finished["at"]
    actual = by_name([run, finished["seed0"]])
    fused, student = actual["S + A, sequential + at"], actual["S alone, sequential + at"]
    assert fused.over_s0 == pytest.approx(top1(run, "fused") - top1(run, "s0"))
    assert fused.over_student == pytest.approx(top1(run, "fused") - top1(run, "student"))
    assert student.over_s0 == pytest.approx(top1(run, "student") - top1(run, "s0"))
    assert actual["T, resnet8"].over_s0 is None
    assert student.over_student is None


def test_the_standard_error_is_that_of_a_share_of_the_test_images(finished):
    row = by_name([finished["kd"]])["S0, kd"]
    share = top1(finished["kd"], "s0") / 100
    assert row.test_images == 50
    assert row.standard_error == pytest.approx(100 * math.sqrt(share * (1 - share) / 50))


def test_held_out_accuracy_and_time_are_those_of_the_phases_that_trained_a_network(finished):
    run = finished["seed0"]
    actual = by_name([run])
    log = [json.loads(line) for line in run.log.path.read_text().splitlines()]
    rows = {row["phase"]: row for row in log if row["event"] == "epoch"}
    assert actual["S0, cross_entropy"].val_last == rows["s0"]["val_top1"]
    assert actual["S alone, sequential"].val_last == rows["student"]["val_top1"]
    assert actual["S + A, sequential"].val_last == rows["assistant"]["val_top1"]
    assert actual["S alone, sequential"].seconds == pytest.approx(rows["student"]["seconds"])
    both = rows["student"]["seconds"] + rows["assistant"]["seconds"]
    assert actual["S + A, sequential"].seconds == pytest.approx(both)


def test_a_control_that_was_left_out_is_named(finished):
    (sentence,) = compare_runs([finished["lone"], finished["seed0"]]).missing
    assert "lone-001 has no S0" in sentence
    assert "student.baseline = false" in sentence
    (sentence,) = compare_runs([finished["kd"]]).missing
    assert "baselines only" in sentence


def test_rows_that_the_recipes_words_do_not_tell_apart_are_named_by_their_runs(finished, tiny_recipe, tmp_path):
    from rkd_deploy.train.fitting import fit

    softer = fit(tiny_recipe("name=kd", "method.name=kd", "train.epochs=1", "method.temperature=2.0"), root=tmp_path)
    runs = [softer, finished["kd"]]
    names = [row.name for row in compare_runs(runs).rows if row.part == "s0"]
    assert names == [f"S0, kd ({run.folder})" for run in runs]


def test_runs_tested_on_other_images_are_refused(finished, copied):
    other = copied("kd")
    facts = json.loads((other.folder / "facts.json").read_text())
    facts["images"]["test"] = 49
    (other.folder / "facts.json").write_text(json.dumps(facts))
    reseal(other.folder)
    with pytest.raises(UsageError, match=r"number of test images 50 and 49.*data\.test_limit"):
        compare_runs([finished["seed0"], other])


def test_runs_judged_on_other_images_of_the_same_number_are_refused_by_their_hash(copied):
    runs = [copied("seed0"), copied("kd")]
    for run, judged in zip(runs, ("a" * 64, "b" * 64), strict=True):
        metrics = json.loads(run.metrics_path.read_text())
        run.metrics_path.write_text(json.dumps(metrics | {"test_sha256": judged}))
    with pytest.raises(UsageError, match=r"images and labels, SHA-256 aaaa.* and bbbb.*data\.test_limit"):
        compare_runs(runs)
    metrics = json.loads(runs[1].metrics_path.read_text())
    del metrics["test_sha256"]  # an older run does not say what it was judged on
    runs[1].metrics_path.write_text(json.dumps(metrics))
    assert compare_runs([Run(run.folder) for run in runs]).rows


def with_given(run, folder, weights):
    """The run as if its T had been given as a file."""
    file = folder / "given" / run.folder.name / "t.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(weights, file)
    shutil.copy(weights, run.weights("teacher"))
    recipe = run.folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[teacher]\n", f'[teacher]\ncheckpoint = "{file}"\n'))
    return Run(run.folder)


def test_given_weights_count_by_their_content_and_not_by_their_paths(finished, copied, tmp_path):
    """Two seeds that were given the same T from two folders are seeds of the same networks."""
    weights = finished["seed0"].weights("teacher")
    runs = [with_given(copied(name), tmp_path, weights) for name in ("seed0", "seed1")]
    rows = compare_runs(runs).rows
    assert [row.part for row in rows] == ["teacher", "s0", "control", "student", "fused"]
    assert [len(row.runs) for row in rows] == [1, 2, 2, 2, 2]


def test_the_same_path_with_other_weights_is_another_network(finished, copied, tmp_path):
    runs = [with_given(copied(name), tmp_path, finished[name].weights("teacher")) for name in ("seed0", "seed1")]
    rows = compare_runs(runs).rows
    assert [len(row.runs) for row in rows if row.part == "fused"] == [1, 1]


def test_s_is_held_against_the_s0_of_its_own_run(finished, copied):
    """The same S and A beside another S0 are not taken for the first run's."""
    first, second = finished["seed0"], copied("seed0")
    shutil.copy(finished["seed1"].weights("s0"), second.weights("s0"))
    metrics = json.loads(second.metrics_path.read_text())
    metrics["parts"]["s0"]["test_top1"] = 71.0
    second.metrics_path.write_text(json.dumps(metrics))
    (row,) = [row for row in compare_runs([first, second]).rows if row.part == "fused"]
    gains = [top1(first, "fused") - top1(first, "s0"), top1(first, "fused") - 71.0]
    assert row.over_s0 == pytest.approx(np.mean(gains))


def test_no_run_and_an_unfinished_run_are_refused(copied):
    with pytest.raises(UsageError, match="no run"):
        compare_runs([])
    other = copied("kd")
    (other.folder / "metrics.json").unlink()
    with pytest.raises(ModelFileError, match="--resume"):
        compare_runs([other])


def test_s_and_a_are_held_against_the_best_control(finished):
    outcome = compare_runs([finished["at"]])
    (verdict,) = outcome.verdicts
    metrics = finished["at"].read_json("metrics.json")
    best = max(("s0", "control", "student"), key=lambda part: metrics["parts"][part]["test_top1"])
    top1s = {row.part: row for row in outcome.rows}
    assert top1s[verdict.control].top1 == metrics["parts"][best]["test_top1"]
    pairs = metrics["pairs"][verdict.control]
    assert verdict.gain.points == pytest.approx(2 * (pairs["gained"] - pairs["lost"]))  # 50 test images
    assert verdict.gain.seeds == 1
    assert top1s["fused"].over_control == pytest.approx(top1s["fused"].top1 - top1s["control"].top1)
    both = compare_runs([finished["seed0"], finished["seed1"]])
    assert [verdict.gain.seeds for verdict in both.verdicts] == [2]
    assert not compare_runs([finished["kd"]]).verdicts
