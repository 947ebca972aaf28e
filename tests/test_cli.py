"""The command line as a person and as a script use it: output, JSON, exit codes."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from recorded import make_record

from rkd_deploy import cli
from rkd_deploy.backends.files import with_checksums
from rkd_deploy.card import ModelCard
from rkd_deploy.commands.options import output_folder
from rkd_deploy.pipeline import export_run
from rkd_deploy.train.runs import Run

TINY = ["data.image_size=8", "data.train_limit=100", "data.test_limit=50", "teacher.name=resnet8", "teacher.epochs=1"]
TINY += ["train.epochs=1", "train.assistant_epochs=1", "train.device=cpu"]


@pytest.fixture(scope="module")
def exported_once(tiny_run, tmp_path_factory):
    """A finished run with the bundles of its teacher and of S + A; read only."""
    run = Run(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("exported") / tiny_run.folder.name))
    for part in ("teacher", "fused"):  # S + A last: the newest bundle is what commands take
        export_run(run, part=part)
    return run.folder


@pytest.fixture
def exported(exported_once, tmp_path):
    """A copy of it under runs/ of the working folder."""
    return shutil.copytree(exported_once, tmp_path / "runs" / exported_once.name)


def test_train_export_bench_without_an_argument_take_the_newest(rkd, tmp_path):
    made = rkd("train", "--json", *(word for value in TINY for word in ("--set", value)))
    assert made.code == 0, made.err
    assert set(made.json["parts"]) == {"teacher", "s0", "control", "student", "fused"}
    assert made.json["separation"]["cost"] <= made.json["separation"]["budget"]
    assert "S + A" in made.err  # text for people leaves standard output to the JSON

    exported = rkd("export", "--format", "onnx", "--json")
    assert exported.code == 0, exported.err
    assert exported.json["bundle"] == str(Path("runs/digits-001/bundle"))
    assert exported.json["onnx_top1"] == pytest.approx(made.json["parts"]["fused"]["test_top1"])
    assert exported.json["differing"] == 0

    timed = rkd("bench", "--backend", "onnxruntime", "--batch", "1,4", "--seconds", "0.01", "--count", "5", "--json")
    assert timed.code == 0, timed.err
    assert [row["batch"] for row in timed.json["results"]] == [1, 4]
    wanted = {"backend", "batch", "precision", "p50_ms", "p90_ms", "p99_ms", "throughput_per_s"}
    assert wanted <= set(timed.json["results"][0])
    record = json.loads(Path(timed.json["record"]).read_text())
    assert len(record["results"][0]["samples_ms"]) == record["results"][0]["runs"] >= 5

    proven = rkd("verify", "--json")
    assert proven.code == 0, proven.err
    rows = {row["backend"]: row["parity"] for row in proven.json["backends"]}
    assert rows["onnxruntime"]["passed"]
    assert rows["pytorch"] is None  # works here, but the bundle has no model.pt2
    assert "on pytorch: not run: " in proven.err
    card = rkd("info", "--json").json
    assert card["labels"] == [str(digit) for digit in range(10)]
    shown = rkd("info").out
    for fact in ("fp32", "tail", card["checksums"]["model.onnx"], f"torch {card['versions']['torch']}"):
        assert fact in shown


def test_compare_takes_the_newest_run_and_writes_where_it_says(rkd, runs):
    found = rkd("compare", "--no-latency", "--output", "side", "--json")
    assert found.code == 0, found.err
    metrics = json.loads((runs / "metrics.json").read_text())["parts"]
    fused = next(row for row in found.json["rows"] if row["part"] == "fused")
    assert fused["top1"] == metrics["fused"]["test_top1"]
    assert "S + A, sequential" in found.err
    assert {path.name for path in Path("side").iterdir()} == {"compare.json", "compare.md", "compare.png"}


def test_a_report_is_made_while_measuring_and_from_the_record_later(rkd, exported):
    options = ("--batch", "1,4", "--seconds", 0.01, "--count", 5, "--threads", 1)
    made = rkd("bench", *options, "--report", "page", "--json")
    assert made.code == 0, made.err
    assert {path.name for path in Path("page").iterdir()} == {
        "accuracy_latency.png",
        "bench.html",
        "bench.json",
        "bench.md",
    }
    assert made.json["report"] == "page/bench.html"
    predicted = made.json["roofline"]["predictions"]
    assert [one["batch"] for one in predicted] == [1, 4]
    assert predicted[1]["macs"] == 4 * predicted[0]["macs"]
    assert made.err.index("Predicted: no call can be faster than") < made.err.index("Images/s")  # first
    record = json.loads(Path("page/bench.json").read_text())
    assert record["layers"][0]["layers"]
    later = rkd("report", "page/bench.json", "--output", "later", "--json")
    assert later.code == 0, later.err
    assert Path("later/bench.html").read_bytes() == Path("page/bench.html").read_bytes()
    assert "leave" not in later.err
    twice = rkd("bench", *options, "--report", "page", "--output", "other")
    assert twice.code == 2
    assert "Give --report alone" in twice.err


def test_a_comparison_is_reported_with_its_measurements(rkd, runs):
    options = ("--batch", "1,2", "--seconds", 0.01, "--threads", 1)
    found = rkd("compare", *options, "--report", "side", "--json")
    assert found.code == 0, found.err
    names = {"compare.json", "compare.md", "compare.png", "compare.html"}
    assert {path.name for path in Path("side").iterdir()} == names
    record = json.loads(Path("side/compare.json").read_text())
    rows = [row["name"] for row in record["rows"]]
    assert [result["model"] for result in record["results"]] == 2 * rows
    assert [one["model"] for one in record["roofline"]["predictions"]] == 2 * rows
    assert record["rows"][0]["p50_ms"] == record["results"][0]["p50_ms"]
    assert [one["model"] for one in record["layers"]] == rows
    mixed = rkd("report", "side/compare.json", "side/compare.json")
    assert mixed.code == 2


def test_bench_compare_measures_models_side_by_side(rkd, exported):
    options = ("--batch", 32, "--seconds", 0.2, "--threads", 1)
    pair = (exported / "bundle", exported / "bundle-teacher")
    faster = rkd("bench-compare", *pair, *options, "--tolerance", 1000, "--json")
    assert faster.code == 0, faster.err
    (one,) = faster.json["ratios"]
    assert one["count"] == 8
    assert one["low"] <= one["ratio"] <= one["high"]
    mixed = rkd("bench-compare", pair[0], "bench.json")
    assert mixed.code == 2


@pytest.mark.parametrize(("factor", "code"), [(1.5, 3), (1.05, 0), (0.7, 0)])
def test_bench_compare_of_records_exits_with_3_when_the_second_is_slower(rkd, tmp_path, factor, code):
    row = make_record()["results"][0]
    paths = []
    for name, scale in (("a", 1.0), ("b", factor)):
        turns = [scale * (1 + 0.001 * place) for place in range(20)]
        paths.append(tmp_path / f"{name}.json")
        record = make_record() | {"results": [row | {"model": name, "round_medians_ms": turns}]}
        paths[-1].write_text(json.dumps(record))
    judged = rkd("bench-compare", *paths, "--tolerance", 0.1)
    assert judged.code == code
    if code:
        assert "b is slower than a at batch 1: 1.500 times its latency" in judged.err


UNGATED = [("tolerance", "nan"), ("tolerance", "-1"), ("tolerance", "inf"), ("seconds", "nan"), ("seconds", "-5")]


@pytest.mark.parametrize(("option", "value"), UNGATED)
def test_no_value_of_an_option_switches_the_gate_off(rkd, exported, option, value):
    refused = rkd("bench-compare", exported / "bundle", exported / "bundle-teacher", f"--{option}={value}")
    assert refused.code == 2
    assert f"--{option} {float(value)} must be between 0 and " in refused.err


def test_two_benches_in_one_second_have_a_folder_each(tmp_path):
    with ExitStack() as stack:
        folders = [stack.enter_context(output_folder(None, tmp_path / "runs", "bench")) for _ in range(20)]
        assert len(set(folders)) == 20
        (folders[3] / "bench.json").write_text("{}")
    assert list((tmp_path / "runs").iterdir()) == [folders[3]]  # nothing is left of what wrote nothing
    with output_folder(tmp_path / "mine", tmp_path / "runs", "bench") as folder:
        assert folder == tmp_path / "mine"


def test_predict_names_the_class_of_an_image_file(rkd, exported, tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "black.png")
    found = rkd("predict", exported / "bundle", "black.png", "--top", 2, "--json")
    best = found.json["predictions"]["black.png"]
    assert len(best) == 2
    assert best[0]["probability"] >= best[1]["probability"] > 0
    assert "black.png" in found.err


def test_a_changed_weight_in_the_bundle_exits_with_3(rkd, exported):
    path = exported / "bundle/model.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = numpy_helper.to_array(weight) + np.float32(0.1)  # all of it: a single weight may see nothing but padding
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, path)
    outcome = rkd("verify", "--json")
    assert outcome.code == 1
    assert "model.onnx changed (by the checksums in model.json)" in outcome.err
    card = ModelCard.from_json((exported / "bundle/model.json").read_text(), "model.json")
    (exported / "bundle/model.json").write_text(with_checksums(card, exported / "bundle"))  # as a forger would
    outcome = rkd("verify", exported / "bundle", "--backend", "onnxruntime", "--json")
    assert outcome.code == 3
    assert "Parity failed" in outcome.err
    assert outcome.json["exit_code"] == 3


def test_an_impossible_tolerance_stops_the_export_with_3_and_leaves_nothing(rkd, runs):
    before = sorted(runs.rglob("*"))
    outcome = rkd("export", "--tolerance", "0")
    assert outcome.code == 3
    assert "the tolerance is 0" in outcome.err
    assert sorted(runs.rglob("*")) == before


def test_lower_precision_is_gated_with_exit_code_3_and_its_report_kept(rkd, runs):
    asked = ["export", "--part", "teacher", "--precision", "int8", "--calibration-count", "32", "--json"]
    passed = rkd(*asked, "--max-drop", "20", "--min-agreement", "50")
    assert passed.code == 0, passed.err
    assert passed.json["precision"] == "int8"
    assert passed.json["gate"]["images"] == 30  # the run's validation images
    card = rkd("info", runs / "bundle-teacher", "--json").json
    assert card["precision"] == "int8"
    assert card["lowering"]["calibration"]["images"] == 32
    assert card["lowering"]["calibration"]["source"] == "digits training images"
    assert card["lowering"]["held_out"] == "digits validation images"
    for backend in ("onnxruntime", "openvino"):
        assert rkd("verify", runs / "bundle-teacher", "--backend", backend).code == 0
    missing = rkd(*asked, "--calibration", "nowhere")
    assert (missing.code, "nowhere is no folder" in missing.err) == (1, True)
    assert not list(runs.glob("bundle-teacher-2*"))


def test_every_part_and_option_of_export(rkd, runs):
    for arguments in (
        ["--part", "teacher", "--random-images"],
        ["--part", "student", "--fuse", "sum"],
        ["--fuse", "sum", "--outputs", "logits,probabilities,features"],
        ["--input", "float32", "--with-pytorch"],
    ):
        outcome = rkd("export", *arguments)
        assert outcome.code == 0, outcome.err
    assert {path.name for path in runs.glob("bundle*")} == {"bundle-teacher", "bundle-student", "bundle", "bundle-2"}
    assert rkd("verify", runs / "bundle-2", "--backend", "pytorch").code == 0


def test_early_exit_is_exported_reported_and_used(rkd, runs, tmp_path):
    outcome = rkd("export", "--early-exit", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json["early_exit"]
    assert report["chosen_on"] == "30 held-out images"
    assert [report["test"][index]["shares"] for index in (0, -1)] == [[1, 0], [0, 1]]
    assert f"{100 * report['test'][1]['saved']:.1f}" in outcome.err  # the table
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "photo.png")
    for threshold, left in (("0", [1, 0]), ("1.5", [0, 1])):
        found = rkd("predict", runs / "bundle", "photo.png", "--exit-threshold", threshold, "--json")
        assert found.json["exits"] == left
    assert "exits" not in rkd("predict", runs / "bundle", "photo.png", "--json").json
    refused = rkd("export", "--part", "student", "--exit-threshold", "0.5")
    assert refused.code == 2
    assert "no second step" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export"], 1, ["no finished run in runs/", "rkd-deploy train"]),
        (["bench"], 1, ["no bundle in runs/", "rkd-deploy export"]),
        (["verify"], 1, ["no bundle in runs/"]),
        (["train", "--resume"], 1, ["no unfinished run to resume"]),
        (
            ["bench", "--backend", "tensorrt"],
            1,
            ["tensorrt is needed here and is not installed", "pip install 'rkd-deploy[tensorrt]'"],
        ),
        (["bench", "--backend", "onnxrutime"], 2, ["Did you mean 'onnxruntime'"]),
        (["bench", "--batch", "1,x"], 2, ["--batch '1,x'"]),
        (["export", "--format", "onxn"], 2, ["Did you mean 'onnx'"]),
        (["train", "--set", "train.epoch=3"], 2, ["train.epoch", "Did you mean 'train.epochs'"]),
        (["train", "--set", "student.assistant_share=0.05"], 1, ["budget is too small", "student.round_to"]),
        (["train", "nothing.toml"], 2, ["nothing.toml"]),
        (["predict", "nothing.onnx", "x.png"], 1, ["nothing.onnx"]),
        (["trian"], 2, ["No such command 'trian'"]),
        (
            ["train", "--resume", "--set", "train.epochs=2"],
            2,
            ["--device cannot change it"],
        ),
        (["train", "--budget", "flops"], 2, ["student.budget 'flops'", "latency, macs, params"]),
    ],
)
def test_what_cannot_be_is_said_with_its_exit_code(rkd, tmp_path, arguments, code, words):
    outcome = rkd(*arguments)
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--backend", "--device", "--batch", "--threads"])
def test_an_option_of_auto_is_refused_at_a_fixed_level(rkd, runs, option):
    outcome = rkd("export", "--fuse", "tail", option, "1")
    assert outcome.code == 2
    assert f"{option} 1 says what --fuse auto measures on; --fuse tail measures nothing." in outcome.err


def test_json_tells_of_errors_too(rkd):
    outcome = rkd("export", "--json")
    assert outcome.json["exit_code"] == outcome.code == 1
    assert outcome.json["error"] in outcome.err


def test_debug_shows_the_traceback(rkd):
    from rkd_deploy.errors import ModelFileError

    with pytest.raises(ModelFileError):
        rkd("export", "--debug")


def test_an_unfinished_run_is_pointed_at(rkd, runs):
    (runs / "metrics.json").unlink()
    outcome = rkd("export")
    assert outcome.code == 1
    assert f"rkd-deploy train runs/{runs.name} --resume" in outcome.err
    assert rkd("train", "--resume").code == 0  # every phase is there: only the evaluation is made again
    assert rkd("export").code == 0


def test_backends_lists_all_with_the_reason(rkd):
    found = {row["name"]: row for row in rkd("backends", "--json").json["backends"]}
    assert set(found) >= {"pytorch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"}
    assert found["onnxruntime"]["ok"]
    assert all(row["ok"] or row["reason"] for row in found.values())


def test_every_command_has_help(rkd):
    shown = rkd("--help").out
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in shown
        assert rkd(name, "--help").code == 0


def test_seeds_end_with_mean_and_deviation_and_go_on_after_an_interruption(rkd, tmp_path):
    settings = [*TINY, "train.curves=false", "train.tensorboard=false"]
    settings += ["method.name=cross_entropy"]
    words = [word for value in settings for word in ("--set", value)]
    made = rkd("train", "--seeds", "1,2", "--json", *words)
    assert made.code == 0, made.err
    assert made.json["seeds"] == [1, 2]
    part = made.json["parts"]["s0"]
    assert part["mean"] == pytest.approx(np.mean(part["test_top1"]))
    assert part["std"] == pytest.approx(np.std(part["test_top1"], ddof=1))
    assert "Std" in made.err
    shutil.rmtree(tmp_path / made.json["runs"][1])
    again = rkd("train", "--seeds", "1,2", "--resume", "--json", *words)
    assert again.json == made.json
    assert rkd("train", "--seeds", "1,x").code == rkd("train", "--seeds", "1").code == 2
