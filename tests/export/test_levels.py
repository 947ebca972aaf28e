"""Level auto: the rule, by figures worked out here; and a bundle that says what was measured."""

import json

import numpy as np
import onnx
import pytest

from rkd_deploy.backends import RunOn
from rkd_deploy.bench import bench
from rkd_deploy.bench.parity import verify
from rkd_deploy.bench.sessions import SESSIONS
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import UsageError
from rkd_deploy.export import levels
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.levels import Target, fastest_level, judge_levels
from rkd_deploy.export.precision.images import Calibration, PrecisionJob
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.models.residual import StudentAlone


def sessions(**ratios):
    """Sessions of latencies whose ratios to `tail` are given, on a machine that drifts."""
    return {level: [{1: 10 * drift * ratio} for drift in DRIFT] for level, ratio in ratios.items()}


DRIFT = [1.0, 1.5, 4.0, 3.0, 1.0, 1.0, 2.0, 1.0]


def test_every_batch_size_counts_alike():
    # Twice as fast at batch 1, 1.5 times as slow at batch 32: sqrt(0.5 * 1.5) = 0.866, though all in all it is slower.
    judgements = judge_levels({"tail": [{1: 1.0, 32: 30.0}] * 8, "wide": [{1: 0.5, 32: 45.0}] * 8})
    assert judgements["wide"].ratio == pytest.approx(0.75**0.5)
    assert judgements["tail"].ratio == 1
    assert fastest_level(judgements) == "wide"


@pytest.mark.parametrize(("wide", "chosen"), [(0.97, "wide"), (1.0, "tail"), (1.4, "tail")])
def test_drift_that_hits_all_levels_cancels_out(wide, chosen):
    assert fastest_level(judge_levels(sessions(tail=1.0, wide=wide))) == chosen


def test_tail_stays_where_a_level_is_not_faster_beyond_chance():
    p50_ms = sessions(tail=1.0, wide=0.9)
    p50_ms["wide"][3] = {1: 31.0}  # slower in one of eight sessions: the interval of their median holds 1
    judgement = judge_levels(p50_ms)["wide"]
    assert judgement.ratio == pytest.approx(0.9)
    assert judgement.high > 1
    assert fastest_level(judge_levels(p50_ms)) == "tail"


def test_the_least_of_several_wins():
    assert fastest_level(judge_levels(sessions(tail=1.0, wide=0.8, grouped=0.7))) == "grouped"


def test_the_bundle_holds_the_whole_measurement(model, card, tmp_path):
    reported = []
    target = Target(RunOn(threads=1), batches=(1, 2), min_seconds=0.01)
    folder = tmp_path / "bundle"
    export_bundle(model, card, folder, level="auto", target=target, progress=lambda name, share: reported.append(name))
    written = ModelCard.from_json((folder / "model.json").read_text(), "model.json")
    search = written.fusion_search
    assert written.fusion == search["chosen"]
    assert (search["backend"], search["batches"], search["threads"]) == ("onnxruntime", [1, 2], 1)
    assert set(search["p50_ms"]) == {"tail", "wide", "wide-grouped"}  # S and A are equally wide in the first stage
    record = json.loads((folder / "fusion.json").read_text())
    p50_ms = {level: [{} for _ in range(SESSIONS)] for level in search["p50_ms"]}
    assert len(record["results"]) == SESSIONS * 3 * 2
    for place, row in enumerate(record["results"]):
        middle = sorted(row["samples_ms"])[(len(row["samples_ms"]) + 1) // 2 - 1]
        assert middle == row["p50_ms"]
        p50_ms[row["model"]][place // (3 * 2)][row["batch"]] = middle
    judgements = judge_levels(p50_ms)
    assert fastest_level(judgements) == search["chosen"]
    assert {level: judgement.ratio for level, judgement in judgements.items()} == search["ratio_to_tail"]
    for level, (low, high) in search["interval_of_ratio"].items():
        assert (low, high) == (judgements[level].low, judgements[level].high)
    assert "session 8 of 8" in reported
    assert verify(folder).passed


def test_files_of_lower_precision_are_measured_as_they_would_ship(model, card, tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (32, *card.preprocess.input_shape), dtype=np.uint8)
    job = PrecisionJob(
        options=PrecisionOptions(precision="int8", agreement=0),
        held_out=[(x, np.full(32, -1))],
        held_out_source="noise",
        calibration=Calibration(x, "noise", 0),
    )
    measured = []

    def bench_of(files, settings, **how):
        measured.extend(onnx.load(file) for file in files if len(measured) < 3)
        return bench(files, settings, **how)

    monkeypatch.setattr(levels, "bench", bench_of)  # looks at the files on their way
    folder = tmp_path / "bundle"
    target = Target(RunOn(threads=1), batches=(1, 2), min_seconds=0.01)
    export_bundle(model, card, folder, level="auto", target=target, job=job)
    assert len(measured) == 3
    assert all("QuantizeLinear" in {node.op_type for node in proto.graph.node} for proto in measured)
    written = ModelCard.from_json((folder / "model.json").read_text(), "model.json")
    search = written.fusion_search
    assert (search["precision"], search["target"], search["batches"]) == ("int8", "cpu", [1, 2])
    assert (search["backend"], search["device"]) == ("onnxruntime", "cpu")
    assert (written.precision, written.fusion) == ("int8", search["chosen"])
    chosen = measured[list(search["p50_ms"]).index(search["chosen"])]
    shipped = onnx.load(folder / "model.onnx")
    assert [node.op_type for node in shipped.graph.node] == [node.op_type for node in chosen.graph.node]
    assert verify(folder).passed


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({"target": "openvino"}, Target(), r"measure on onnxruntime files .+--target openvino, which openvino is to"),
        ({"target": "tensorrt"}, Target(), r"which tensorrt or tensorrt-rtx is to run"),
        ({"keep": ("fc",)}, None, r"--keep fc names layers of one fusion level"),
    ],
)
def test_what_auto_cannot_compare_is_refused(model, card, tmp_path, options, target, message):
    x = np.zeros((16, *card.preprocess.input_shape), np.uint8)
    job = PrecisionJob(
        options=PrecisionOptions(precision="int8", **options),
        held_out=[(x, np.zeros(16, np.int64))],
        held_out_source="black",
        calibration=Calibration(x, "black", 0),
    )
    with pytest.raises(UsageError, match=message):
        export_bundle(model, card, tmp_path / "bundle", level="auto", target=target, job=job)
    assert list(tmp_path.iterdir()) == []


def test_one_network_alone_leaves_nothing_to_choose(model, card, tmp_path):
    export_bundle(StudentAlone(model), card, tmp_path / "bundle", level="auto")
    written = ModelCard.from_json((tmp_path / "bundle/model.json").read_text(), "model.json")
    assert (written.fusion, written.fusion_search) == ("tail", {})


def test_a_target_without_auto_is_refused(model, card, tmp_path):
    with pytest.raises(UsageError, match="level 'tail', which is not measured"):
        export_bundle(model, card, tmp_path / "bundle", target=Target())
    assert list(tmp_path.iterdir()) == []
