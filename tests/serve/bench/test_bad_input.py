"""What a bench refuses, each on a real file and a real runtime: the error names the value, the rule and the way out."""

from __future__ import annotations

import sys

import pytest
from onnx import TensorProto, helper

from rkd_deploy import cli
from rkd_deploy.errors import BackendError, DataError, ModelFileError, UsageError
from rkd_deploy.serve.bench import bench
from rkd_deploy.serve.engines.build import build_engine

SHORT = {"min_seconds": 0.0, "min_runs": 2, "warmup_seconds": 0.0}
FLOAT, STRING = TensorProto.FLOAT, TensorProto.STRING


def write(path, nodes, inputs, outputs, constants=(), opset=18, ir=10):
    """An ONNX file of inputs and outputs {name: (type, shape)}."""
    described = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in each.items()]
        for each in (inputs, outputs)
    ]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", *described, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path.write_bytes(model.SerializeToString())
    return path


def relu(path, shape=("n", 3), **options):
    return write(path, [("Relu", ["x"], ["y"])], {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)}, **options)


def two_inputs(path):
    rows = (FLOAT, ["n", 3])
    return write(path, [("Add", ["a", "b"], ["y"])], {"a": rows, "b": rows}, {"y": rows})


def strings(path):
    return write(path, [("StringNormalizer", ["x"], ["y"])], {"x": (STRING, ["n"])}, {"y": (STRING, ["n"])})


def huge(path):
    """Adds up 2^42 copies of its input: 48 TiB at once."""
    constants = [
        helper.make_tensor("size", TensorProto.INT64, [3], [1 << 42, 1, 1]),
        helper.make_tensor("axes", TensorProto.INT64, [1], [0]),
    ]
    nodes = [("Expand", ["x", "size"], ["copies"]), ("ReduceSum", ["copies", "axes"], ["y"])]
    return write(path, nodes, {"x": (FLOAT, ["n", 3])}, {"y": (FLOAT, [1, "n", 3])}, constants)


CASES = {
    "several inputs": (two_inputs, BackendError, r"has 2 inputs \(a .*b .*\).*one numeric input"),
    "no rank": (lambda path: relu(path, None), BackendError, "no known rank .*export the classifier alone"),
    "free size": (lambda path: relu(path, ["n", 3, "h", "w"]), UsageError, "--shape 3,224,224"),
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_models_that_cannot_be_measured(case, backend, tmp_path):
    build, error, words = CASES[case]
    with pytest.raises(error, match=words) as found:
        bench([build(tmp_path / "m.onnx")], backend=backend, batches=[1], **SHORT)
    assert "Copy the file again" not in str(found.value)  # the file is as its author wrote it


def test_strings_are_refused_for_their_type_or_their_operators(tmp_path):
    model = strings(tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=r"tensor\(string\).*no numbers for"):
        bench([model], **SHORT)
    with pytest.raises(BackendError, match=r"does not know what .* computes: .*StringNormalizer.*another backend"):
        bench([model], backend="openvino", **SHORT)


def test_an_opset_or_a_format_that_is_too_new_is_named_with_the_newest_one(tmp_path):
    opset, form = relu(tmp_path / "o.onnx", opset=99), relu(tmp_path / "f.onnx", ir=99)
    with pytest.raises(BackendError, match=r"opset 99, and ONNX Runtime .* reads up to opset \d+\. Update"):
        bench([opset], **SHORT)
    with pytest.raises(BackendError, match=r"IR version 99, and ONNX Runtime .* reads up to version \d+\. Update"):
        bench([form], **SHORT)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (two_inputs, BackendError, "has 2 inputs"),
        (lambda path: relu(path, ["n", 3, "h", "w"]), BackendError, "leaves more open than its batch"),
        (lambda path: relu(path, opset=99), ModelFileError, r"opset 99, and onnx .* knows up to opset \d+"),
        (huge, BackendError, "could not build"),
    ],
)
def test_tensorrt_rtx_s_own_builder_refuses_them_too(build, error, words, tmp_path):
    with pytest.raises(error, match=words):
        build_engine(build(tmp_path / "m.onnx"), "tensorrt-rtx")


def test_a_static_model_is_measured_at_its_own_batch_unless_told_otherwise(tmp_path):
    model = relu(tmp_path / "m.onnx", [4, 3])
    assert [result.batch for result in bench([model], batches=None, **SHORT)] == [4]
    with pytest.raises(UsageError, match="A batch of 8 was asked for, and the model takes 4"):
        bench([model], batches=[4, 8], **SHORT)
    other = relu(tmp_path / "other.onnx", [2, 3])
    with pytest.raises(UsageError, match=r"differ: \{'m': 4, 'other': 2\}"):
        bench([model, other], batches=None, **SHORT)


def test_an_open_image_size_can_be_given(tmp_path):
    model = relu(tmp_path / "m.onnx", ["n", 3, "h", "w"])
    assert len(bench([model], batches=[2], shape=[3, 8, 8], **SHORT)) == 1
    for shape in ([3, 8], [1, 8, 8]):
        with pytest.raises(UsageError, match=r"Inputs of .* were asked for, and the model takes \[3, None, None\]"):
            bench([model], shape=shape, **SHORT)


def test_running_out_of_memory_says_how_much_was_asked_for(tmp_path):
    with pytest.raises(BackendError, match=r"ran out of memory: [\d,]{18} bytes more were asked for\. Use a smaller"):
        bench([huge(tmp_path / "m.onnx")], batches=[1], **SHORT)


def test_a_batch_beyond_the_memory_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(BackendError, match=r"12,000,000,000,000 bytes.* are free\. Use a smaller batch"):
        bench([relu(tmp_path / "m.onnx")], batches=[10**12], **SHORT)


def test_a_gpu_that_is_too_small_is_refused(gpu, zoo, tmp_path):
    model = zoo.build(tmp_path / "m.onnx")
    gpu.device.free_bytes = 64
    with pytest.raises(BackendError, match=r"bytes were asked for\. Use a smaller batch"):
        bench([model], backend="tensorrt", batches=[8], **SHORT)


@pytest.mark.parametrize("options", [{"min_runs": 0}, {"min_seconds": -1}, {"streams": 0}, {"threads": 0}])
def test_nothing_is_loaded_for_settings_that_cannot_be(options, tmp_path):
    with pytest.raises(UsageError):
        bench([tmp_path / "absent.onnx"], **SHORT | options)


def test_an_engine_runs_on_nothing_but_tensorrt(tmp_path):
    (tmp_path / "m.engine").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"m\.engine is an engine.*openvino was asked for"):
        bench([tmp_path / "m.engine"], backend="openvino", **SHORT)


def test_accuracy_needs_a_card_and_a_folder_of_its_classes(bundle, tmp_path):
    with pytest.raises(UsageError, match="has no card"):
        bench([relu(tmp_path / "m.onnx")], data=tmp_path, **SHORT)
    with pytest.raises(DataError, match="no folder"):
        bench([bundle], data=tmp_path / "absent", **SHORT)
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="folders cats are none of its 3 classes"):
        bench([bundle], data=tmp_path, **SHORT)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--count", "0"], 2, "min_runs must be at least 1"),
        (["--batch", "0"], 2, "whole numbers from 1"),
        (["--threads", "a"], 2, "--threads 'a'"),
        (["--streams", "0"], 2, "none below 1"),
        (["--resident", "--end-to-end"], 2, "leave nothing to measure"),
        (["--no-cuda-graph"], 2, "has no effect on onnxruntime"),
        (["--memory-limit", "64"], 2, "has no effect on onnxruntime on cpu"),
        (["--memory-limit", "0"], 2, "must be at least 1"),
        (["--target-qps", "5"], 2, "give --scenario Server too"),
        (["--scenario", "server"], 2, "Did you mean 'Server'"),
        (["--device", "cuda"], 1, "built without it|does not fit"),
        (["--backend", "onnxrutime"], 2, "Did you mean 'onnxruntime'"),
    ],
)
def test_the_command_says_so_with_its_exit_code(arguments, code, words, tmp_path, monkeypatch, capsys):
    model = relu(tmp_path / "m.onnx")
    monkeypatch.setattr(sys, "argv", ["rkd-deploy", "bench", str(model), "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert any(word in error for word in words.split("|")), error
    assert not (tmp_path / "out").exists()
