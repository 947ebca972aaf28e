"""Real engines of a real run's S + A, built by TensorRT-RTX on a machine without a GPU."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from rkd_deploy.backends.tensorrt.build import build_engine
from rkd_deploy.backends.tensorrt.cache import export_engine
from rkd_deploy.backends.tensorrt.layers import layer_table
from rkd_deploy.backends.tensorrt.record import EngineRecord, read_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile
from rkd_deploy.bench.parity import verify
from rkd_deploy.card import METADATA_KEY, ModelCard, Preprocess
from rkd_deploy.cli import app
from rkd_deploy.errors import BackendError, MissingDependencyError, ModelFileError, StorageError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.precision.options import PrecisionOptions
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.pipeline import export_run

RTX = "tensorrt-rtx"

if os.environ.get("CI") == "true":
    import tensorrt_rtx as trt
else:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """What the command says of a run's bundle with an engine in it."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    options = ["--format", RTX, "--random-images", "--output", str(bundle), "--json"]
    options += ["--with-pytorch", "--exit-threshold", "0.9"]  # every file that a bundle can have, fusion.json aside
    result = CliRunner().invoke(app, ["export", str(tiny_run.folder), *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def files(tiny_run, exported, tmp_path_factory):
    """Precision to the ONNX file of a real bundle, all of the fused S + A."""
    folder = tmp_path_factory.mktemp("precisions")

    def lowered(precision, target):
        # How well this little network keeps its classes is none of this file's business.
        options = PrecisionOptions(precision=precision, target=target, agreement=0.0, drop=100.0)
        name = f"{target}-{precision}"
        return export_run(tiny_run, test_images=False, folder=folder / name, precision=options).folder / "model.onnx"

    return {
        "fp32": Path(exported["bundle"]) / "model.onnx",
        "fp16": lowered("fp16", "tensorrt"),
        "int8": lowered("int8", "tensorrt"),
        "cpu int8": lowered("int8", "cpu"),
    }


def with_fixed_batch(source, target, batch):
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch", ["dynamic", "static"])
def test_an_engine_of_every_precision_and_batch(files, tmp_path, precision, batch):
    source = tmp_path / "model.onnx"
    source.write_bytes(files[precision].read_bytes())
    if batch == "static":
        with_fixed_batch(files[precision], source, 8)
    exported = export_engine(source, RTX)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx", "model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json",
    ]  # fmt: skip
    plan, record = read_engine(exported.file)
    assert record == EngineRecord.from_json(json.dumps(exported.record.to_dict()), "")
    assert record.precision == precision
    assert record.profiles == (("1:8:32",) if batch == "dynamic" else ())
    assert record.onnx_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record.engine_sha256 == hashlib.sha256(plan).hexdigest()
    assert ModelCard.from_json(record.metadata[METADATA_KEY], "").precision == precision
    convolutions = [layer for layer in record.layers if layer["type"] == "convolution"]
    nodes = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    assert Counter(layer["name"] for layer in convolutions) == Counter(node.name for node in nodes)
    assert {layer["dtype"] for layer in convolutions} == {"half" if precision == "fp16" else "float"}
    assert {layer["shape"][0] for layer in convolutions} == {-1 if batch == "dynamic" else 8}
    quantised = sum(layer["type"] == "quantize" for layer in record.layers)
    assert (quantised >= len({node.input[0] for node in nodes})) == (precision == "int8")  # what layers read, once each
    assert nodes[0].name in layer_table(record.layers)


def by_hand(path, shapes):
    """Build an engine by the library's own calls: what trtexec would write."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((batch, *network.get_input(0).shape[1:]) for batch in shapes))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_two_builds_agree(files, precision):
    fixed = EngineSettings(profiles=(Profile(4, 4, 4),))
    first, second = (hashlib.sha256(build_engine(files[precision], RTX, fixed).plan).hexdigest() for _ in range(2))
    assert first == second


def test_two_builds_for_a_range_of_batches_agree_in_size_and_layers(files):
    first, second = (build_engine(files["fp32"], RTX) for _ in range(2))
    assert (len(first.plan), first.record.layers) == (len(second.plan), second.record.layers)


def test_the_file_is_the_librarys_own_bytes(files):
    ours = build_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(4, 4, 4),))).plan
    assert ours == by_hand(files["fp32"], (4, 4, 4))
    assert ours != by_hand(files["fp32"], (5, 5, 5))


def test_settings_reach_the_engine(files):
    plain = build_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(1, 1, 1),)))
    wider = build_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(1, 1, 1), Profile(2, 8, 16))))
    assert wider.record.profiles == ("1:1:1", "2:8:16")
    assert len(wider.plan) > len(plain.plan)
    settings = EngineSettings(profiles=(Profile(1, 1, 1),), compute_capabilities=("8.6",), workspace_bytes=1 << 24)
    named = build_engine(files["fp32"], RTX, settings)
    assert named.record.compute_capabilities == ("8.6",)
    assert named.plan != plain.plan
    tf32 = build_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(1, 1, 1),), tf32=True))
    assert tf32.plan != plain.plan


@pytest.mark.slow
def test_a_whole_bundle_of_resnet20(tmp_path):
    model = CifarResNet(20, (16, 16, 32, 64), num_classes=5)
    preprocess = Preprocess(height=32, width=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    card = ModelCard(name="deep", labels=tuple("abcde"), preprocess=preprocess)
    export_bundle(model.eval(), card, tmp_path / "bundle")
    exported = export_engine(tmp_path / "bundle", RTX)
    assert exported.record.precision == "fp32"
    # 19 of the main path, 2 of the shortcuts that change the width
    assert sum(layer["type"] == "convolution" for layer in exported.record.layers) == 21


def test_progress_is_told(files):
    reports = []
    build_engine(files["fp32"], RTX, progress=lambda phase, share: reports.append((phase, share)))
    assert reports[0] == ("Building engine", 0.0)
    assert reports[-1] == ("Building engine", 1.0)
    shares = [share for _, share in reports]
    assert shares == sorted(shares)


def test_a_cpu_int8_file_is_refused_with_node_operator_and_way_out(files, tmp_path):
    with pytest.raises(BackendError, match=r"at node \S+ \(\w+\).* Export the model again for this target"):
        export_engine(files["cpu int8"], RTX, output=tmp_path / "model.engine")
    assert not list(tmp_path.iterdir())


def save(path, *nodes, initializers=(), shape=("n", 2)):
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(shape))
    graph = helper.make_graph(list(nodes), "g", [value], [result], list(initializers))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_an_unknown_operator_is_named_with_its_node(tmp_path):
    file = save(tmp_path / "model.onnx", helper.make_node("Frob", ["input"], ["logits"], "stage3.frob", domain="mine"))
    with pytest.raises(BackendError, match=r"at node stage3\.frob \(Frob\).*run it on ONNX Runtime"):
        export_engine(file, RTX)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("share", [0, 10, 50, 99])
def test_a_damaged_file_is_refused_and_nothing_is_written(files, tmp_path, share):
    whole = files["fp32"].read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) * share // 100])
    with pytest.raises(ModelFileError, match=r"model\.onnx cannot be loaded as a model"):
        export_engine(tmp_path, RTX)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_card_of_a_newer_schema_is_refused(files, tmp_path):
    (tmp_path / "model.onnx").write_bytes(files["fp32"].read_bytes().replace(b'"schema": 1,', b'"schema": 9,'))
    with pytest.raises(ModelFileError, match="schema 9"):
        export_engine(tmp_path, RTX)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("shape", "rule"), [(("n", 3, "h", "w"), "leaves more open than its batch"), ((), "no known rank")]
)
def test_open_image_sizes_are_refused(tmp_path, shape, rule):
    file = save(tmp_path / "model.onnx", helper.make_node("Relu", ["input"], ["logits"]), shape=shape)
    with pytest.raises(BackendError, match=rule):
        export_engine(file, RTX)


def external(folder, location):
    """A model whose weight [2] = (3, 4) lies in another file."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2], [3.0, 4.0])
    raw = np.array([3.0, 4.0], np.float32).tobytes()
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    (folder / location).write_bytes(raw)
    model = helper.make_node("Mul", ["input", "weight"], ["logits"])
    return save(folder / "model.onnx", model, initializers=[weight])


def test_weights_in_another_file_must_lie_in_the_folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    assert build_engine(external(tmp_path / "bundle", "weights.bin"), RTX).plan
    outside = external(tmp_path / "bundle", "../weights.bin")
    with pytest.raises(ModelFileError, match=r"must lie in the same folder"):
        export_engine(outside, RTX)
    linked = external(tmp_path / "bundle", "weights.bin")
    (tmp_path / "bundle/weights.bin").unlink()
    with pytest.raises(ModelFileError, match=r"must lie in the same folder"):
        export_engine(linked, RTX)
    (tmp_path / "bundle/weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelFileError, match=r"must lie in the same folder"):
        export_engine(linked, RTX)
    assert not list(tmp_path.rglob("*.engine*"))


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"hardware": "ampere+"}, UsageError, "finished on the GPU that runs it"),
        ({"version_compatible": True}, UsageError, "lean runtime"),
        ({"timing_cache": "timings"}, UsageError, "times no kernels"),
        ({"compute_capabilities": ("8.7",)}, UsageError, "Unknown compute capability '8.7'"),
        ({"compute_capabilities": ()}, UsageError, "name at least one"),
    ],
)
def test_what_rtx_cannot_do_is_refused_with_the_reason(files, tmp_path, settings, error, reason):
    with pytest.raises(error, match=reason):
        export_engine(files["fp32"], RTX, EngineSettings(**settings), output=tmp_path / "model.engine")
    assert not list(tmp_path.iterdir())


def test_an_engine_of_ours_is_replaced_and_nothing_else_is(files, tmp_path):
    file = tmp_path / "model.engine"
    first = export_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(1, 1, 1),)), output=file)
    second = export_engine(files["fp32"], RTX, EngineSettings(profiles=(Profile(2, 2, 2),)), output=file)
    assert read_engine(file)[1] == second.record != first.record
    file.with_name("model.engine.json").unlink()
    whole = file.read_bytes()
    with pytest.raises(StorageError, match="no engine that rkd-deploy wrote"):
        export_engine(files["fp32"], RTX, output=file)
    assert file.read_bytes() == whole


def test_an_engine_without_its_record_is_not_left_behind(files, tmp_path):
    (tmp_path / "model.engine.json").mkdir()
    with pytest.raises(StorageError):
        export_engine(files["fp32"], RTX, output=tmp_path / "model.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine.json"]


def test_the_command_builds_beside_a_bundle_and_info_shows_it(files):
    bundle = str(files["fp32"].parent)
    result = CliRunner().invoke(
        app, ["export", bundle, "--format", RTX, "--profile", "1", "--profile", "2:4:8", "--json"]
    )
    assert result.exit_code == 0, result.output
    engine = json.loads(result.stdout.splitlines()[-1])["engine"]
    assert engine["profiles"] == ["1:1:1", "2:4:8"]
    shown = CliRunner().invoke(app, ["info", engine["file"]])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"^profiles +1:1:1 2:4:8$", shown.output, re.MULTILINE)
    assert re.search(r"^layer +type +data type +shape$", shown.output, re.MULTILINE)
    assert json.loads(CliRunner().invoke(app, ["info", engine["file"], "--json"]).stdout)["flavour"] == RTX


EVERYTHING = {
    "model.onnx", "model.json", "labels.txt", "preprocessor_config.json", "golden.npz", "model.pt2", "student.onnx",
    "assistant_1.onnx", "model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json", "golden/photo.jpg",
    "golden/photo.json",
}  # fmt: skip


@pytest.fixture
def whole(exported, tmp_path):
    """A bundle of one's own, moved away from the run that it came from."""
    return shutil.copytree(exported["bundle"], tmp_path / "elsewhere")


def test_a_changed_byte_is_noticed_in_every_file_of_a_bundle(whole):
    assert {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()} == EVERYTHING
    assert verify(whole).passed
    for name in sorted(EVERYTHING):
        content = (whole / name).read_bytes()
        for place in (0, len(content) // 3, len(content) - 1):
            (whole / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ModelFileError, match=re.escape(name)):
                verify(whole)
        (whole / name).write_bytes(content)
    assert verify(whole).passed


def test_an_engine_is_taken_into_the_sums_and_blesses_no_other_file(whole):
    before = json.loads((whole / "model.json").read_text())
    exported = export_engine(whole, RTX, EngineSettings(profiles=(Profile(1, 2, 4),)))
    after = json.loads((whole / "model.json").read_text())
    differing = {name for name in EVERYTHING if after["checksums"][name] != before["checksums"][name]}
    assert differing == {"model.json", exported.file.name, exported.file.name + ".json"}
    assert {**after, "checksums": 0} == {**before, "checksums": 0}
    assert verify(whole).passed
    exported.file.unlink()  # it can be built again
    assert verify(whole).passed
    (whole / "labels.txt").write_text("one\n")
    with pytest.raises(ModelFileError, match=r"labels\.txt changed"):
        export_engine(whole, RTX)
    assert not exported.file.exists()


def test_a_bundle_is_proven_and_shown_elsewhere_without_torch(whole):
    """Without the run, in another folder, in a process that cannot import torch, onnx or this package's export."""
    absent = ("torch", "onnx", "onnxscript", "rkd_deploy.export", "rkd_deploy.train", "rkd_deploy.models")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from rkd_deploy.cli import main; main()"
    shown = {}
    for command in ("verify", "info"):
        ran = subprocess.run(
            [sys.executable, "-c", code, command, whole.name], cwd=whole.parent, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        shown[command] = ran.stdout
    for backend in ("onnxruntime", "openvino"):
        assert re.search(rf"elsewhere on {backend}: logits differ by at most \S+ \(tolerance 0.0001\)", shown["verify"])
    card = json.loads((whole / "model.json").read_text())
    rows = [*card["checksums"].items(), ("fusion", "tail"), ("precision", "fp32"), ("torch", card["versions"]["torch"])]
    for key, value in [*rows, ("python", platform.python_version())]:
        assert re.search(rf"{re.escape(key)}\W.*{re.escape(value)}", shown["info"]), key


def test_the_command_exports_a_run_with_an_engine_in_its_bundle(exported):
    assert exported["engine"]["file"] == exported["bundle"] + "/model.tensorrt-rtx.engine"
    assert read_engine(exported["engine"]["file"])[1].onnx_name == "model.onnx"
    assert exported["parity"]["passed"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--tf32", "--profile", "4"], UsageError, "has no use for --profile, --tf32"),
        (["--format", RTX, "--profile", "8:1:32"], UsageError, "8:1:32 is no range"),
        (["--format", RTX, "--profile", "x"], UsageError, "MIN:OPT:MAX"),
        (
            ["--format", RTX, "--optimization", "9"],
            UsageError,
            "--optimization 9 must be a whole number between",
        ),
        (["--format", RTX, "--hardware", "ampere+"], UsageError, "finished on the GPU"),
        (["--format", "tensorrt-rx"], UsageError, "tensorrt-rtx"),
        (["--format", RTX, "--fuse", "sum", "--with-pytorch"], UsageError, "has no use for --fuse, --with-pytorch"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_exported(files, options, error, message):
    result = CliRunner().invoke(app, ["export", str(files["fp32"].parent), *options])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_library_that_is_not_installed_is_named_at_once(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    result = CliRunner().invoke(app, ["export", str(files["fp32"].parent), "--format", "tensorrt"])
    assert isinstance(result.exception, MissingDependencyError)
    assert "pip install 'rkd-deploy[tensorrt]'" in str(result.exception)
