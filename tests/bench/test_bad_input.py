"""What a bench refuses: the error names the value, the rule and the way out."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from onnx import TensorProto, helper

from rkd_deploy import cli
from rkd_deploy.backends.tensorrt.build import build_engine
from rkd_deploy.bench import bench
from rkd_deploy.errors import BackendError, DataError, UsageError
from tests.support.benching import bench_settings

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


def large(path):
    """Writes 2^20 copies of its input down: of a batch of 2^18 3 TiB."""
    size = helper.make_tensor("size", TensorProto.INT64, [3], [1 << 20, 1, 1])
    nodes = [("Expand", ["x", "size"], ["copies"]), ("Relu", ["copies"], ["y"])]
    return write(path, nodes, {"x": (FLOAT, ["n", 3])}, {"y": (FLOAT, [1 << 20, "n", 3])}, [size])


def string_input(path):
    return write(path, [("Identity", ["x"], ["y"])], {"x": (STRING, ["n"])}, {"y": (STRING, ["n"])})


ONNX_BACKENDS = ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
"""Those that read the file itself; the last two on a simulated device."""
CASES = {
    "several inputs": (two_inputs, BackendError, r"has 2 inputs \(a .*b .*\).*one numeric input"),
    "no rank": (lambda path: relu(path, None), BackendError, "no known rank .*export the classifier alone"),
    "free size": (
        lambda path: relu(path, ["n", 3, "h", "w"]),
        (UsageError, BackendError),
        r"--shape 3,224,224|\[-1, 3, -1, -1\].*fixed image size",
    ),
    "a string input": (string_input, BackendError, "(?i)x .*string.*no number.*one numeric input"),
    "opset too new": (
        lambda path: relu(path, opset=99),
        BackendError,
        r"opset 99, and (ONNX Runtime|OpenVINO|onnx) [\d.]+ reads up to opset \d+\. Update .* or export",
    ),
    "wrong batch": (
        lambda path: relu(path, [4, 3]),
        UsageError,
        "batch of 1 was asked for, and the model takes 4 .*Ask",
    ),
}


@pytest.fixture
def measured(request, monkeypatch, tmp_path, capsys):
    """A bench of one model on one backend, as the command does it: exit code and what it said."""

    def run(backend, model, *arguments):
        if backend.startswith("tensorrt"):
            request.getfixturevalue("gpu")
        command = ["rkd-deploy", "bench", str(model), "--backend", backend, "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, "--seconds", "0", "--count", "2", "--warmup", "0", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not (tmp_path / "out").exists()
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_models_that_cannot_be_measured(case, backend, tmp_path, measured):
    build, error, words = CASES[case]
    code, message = measured(backend, build(tmp_path / "m.onnx"), "--batch", "1")
    assert re.search(words, message), message
    assert code in {kind.exit_code for kind in (error if isinstance(error, tuple) else (error,))}
    assert len(message.splitlines()) == 1  # and no page of a library's own
    assert "Copy the file again" not in message  # the file is as its author wrote it


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["--resident", "--end-to-end"])
def test_running_out_of_memory_is_said_in_words(backend, kind, tmp_path):
    """In a process of its own: what a runtime leaves of its memory when it could get no more is not for other tests."""
    command = [sys.executable, "-m", "rkd_deploy.cli", "bench", large(tmp_path / "m.onnx"), "--backend", backend, kind]
    command += ["--seconds", "0", "--count", "2", "--warmup", "0"]
    command += ["--batch", str(1 << 18), "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    words = r"ran out of memory: [\d,]{17,} bytes more were asked for\. Use a smaller batch"
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


class Program(torch.nn.Module):
    """A program of one input unless it is given two, and as large as its arguments say."""

    def __init__(self, copies=1):
        super().__init__()
        self.copies = copies

    def forward(self, x, other=None):
        y = x.mean((2, 3)).expand(self.copies, -1, -1).relu().sum(0)
        return y if other is None else y + other


@pytest.mark.parametrize(
    ("copies", "free", "inputs", "arguments", "code", "words"),
    [
        (1, (0,), 2, [], 1, r"has 2 inputs \(x, other\).*one numeric input"),
        (1, (0, 2, 3), 1, [], 2, "--shape 3,224,224"),
        (1, (), 1, ["--batch", "8"], 2, "batch of 8 was asked for, and the model takes 2"),
        (1, (0,), 1, ["--batch", "65"], 1, "on a batch of 65: .*<= 64.*smaller batch"),
        (1 << 42, (0,), 1, ["--batch", "1"], 1, r"allocate \d+ bytes.*Try a smaller batch"),
    ],
)
def test_programs_that_cannot_be_measured(copies, free, inputs, arguments, code, words, tmp_path, measured):
    x, other = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3)
    sizes = {axis: torch.export.Dim(f"axis{axis}", min=1, max=64) for axis in free}
    program = torch.export.export(
        Program(copies).eval(),
        (x, other)[:inputs],
        dynamic_shapes=(sizes, {0: sizes[0]} if inputs == 2 else None)[:inputs] if free else None,
    )
    torch.export.save(program, tmp_path / "model.pt2")
    exit_code, message = measured("pytorch", relu(tmp_path / "model.onnx").parent, *arguments)
    assert (exit_code, len(message.splitlines())) == (code, 1)
    assert re.search(words, message), message


def test_an_operator_that_openvino_does_not_know_is_named(tmp_path):
    with pytest.raises(BackendError, match=r"does not know what .* computes: .*StringNormalizer.*another backend"):
        bench([strings(tmp_path / "m.onnx")], bench_settings(backend="openvino", **SHORT))


def test_a_format_that_is_too_new_is_named_with_the_newest_one(tmp_path):
    form = relu(tmp_path / "f.onnx", ir=99)
    with pytest.raises(BackendError, match=r"IR version 99, and ONNX Runtime .* reads up to version \d+\. Update"):
        bench([form], bench_settings(**SHORT))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (two_inputs, BackendError, "has 2 inputs"),
        (lambda path: relu(path, ["n", 3, "h", "w"]), BackendError, "leaves more open than its batch"),
        (lambda path: relu(path, opset=99), BackendError, r"opset 99, and onnx .* reads up to opset \d+"),
        (lambda path: relu(path, ir=99), BackendError, r"IR version 99, and onnx .* reads up to version \d+"),
        (huge, BackendError, "could not build"),
    ],
)
def test_tensorrt_rtx_s_own_builder_refuses_them_too(build, error, words, tmp_path):
    with pytest.raises(error, match=words):
        build_engine(build(tmp_path / "m.onnx"), "tensorrt-rtx")


def test_a_static_model_is_measured_at_its_own_batch_unless_told_otherwise(tmp_path):
    model = relu(tmp_path / "m.onnx", [4, 3])
    assert [result.batch for result in bench([model], bench_settings(batches=None, **SHORT))] == [4]
    with pytest.raises(UsageError, match="A batch of 8 was asked for, and the model takes 4"):
        bench([model], bench_settings(batches=[4, 8], **SHORT))
    other = relu(tmp_path / "other.onnx", [2, 3])
    with pytest.raises(UsageError, match=r"differ: \{'m': 4, 'other': 2\}"):
        bench([model, other], bench_settings(batches=None, **SHORT))


def test_an_open_image_size_can_be_given(tmp_path):
    model = relu(tmp_path / "m.onnx", ["n", 3, "h", "w"])
    assert len(bench([model], bench_settings(batches=[2], shape=[3, 8, 8], **SHORT))) == 1
    for shape in ([3, 8], [1, 8, 8]):
        with pytest.raises(UsageError, match=r"Inputs of .* were asked for, and the model takes \[3, None, None\]"):
            bench([model], bench_settings(shape=shape, **SHORT))


def test_running_out_of_memory_says_how_much_was_asked_for(tmp_path):
    with pytest.raises(BackendError, match=r"ran out of memory: [\d,]{18} bytes more were asked for\. Use a smaller"):
        bench([huge(tmp_path / "m.onnx")], bench_settings(batches=[1], **SHORT))


def test_a_batch_beyond_the_memory_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(BackendError, match=r"12,000,000,000,000 bytes.* are free\. Use a smaller batch"):
        bench([relu(tmp_path / "m.onnx")], bench_settings(batches=[10**12], **SHORT))


def test_a_gpu_that_is_too_small_is_refused(gpu, zoo, tmp_path):
    model = zoo.build(tmp_path / "m.onnx")
    gpu.device.free_bytes = 64
    with pytest.raises(BackendError, match=r"bytes were asked for\. Use a smaller batch"):
        bench([model], bench_settings(backend="tensorrt", batches=[8], **SHORT))


@pytest.mark.parametrize("options", [{"min_runs": 0}, {"min_seconds": -1}, {"streams": 0}, {"threads": 0}])
def test_nothing_is_loaded_for_settings_that_cannot_be(options, tmp_path):
    with pytest.raises(UsageError):
        bench([tmp_path / "absent.onnx"], bench_settings(**SHORT | options))


def test_an_engine_runs_on_nothing_but_tensorrt(tmp_path):
    (tmp_path / "m.engine").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"m\.engine is an engine.*openvino was asked for"):
        bench([tmp_path / "m.engine"], bench_settings(backend="openvino", **SHORT))


def test_accuracy_needs_a_card_and_a_folder_of_its_classes(bundle, tmp_path):
    with pytest.raises(UsageError, match="has no card"):
        bench([relu(tmp_path / "m.onnx")], bench_settings(data=tmp_path, **SHORT))
    with pytest.raises(DataError, match="no folder"):
        bench([bundle], bench_settings(data=tmp_path / "absent", **SHORT))
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="folders cats are none of its 3 classes"):
        bench([bundle], bench_settings(data=tmp_path, **SHORT))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--count", "0"], 2, "min_runs 0 must be a whole number between 1 and "),
        (["--batch", "0"], 2, "whole numbers from 1"),
        (["--threads", "a"], 2, "--threads 'a'"),
        (["--streams", "0"], 2, "streams 0 must be a whole number between 1 and 4096"),
        (["--resident", "--end-to-end"], 2, "leave nothing to measure"),
        (["--no-cuda-graph"], 2, "has no effect on onnxruntime"),
        (["--memory-limit", "64"], 2, "has no effect on onnxruntime on cpu"),
        (["--memory-limit", "0"], 2, "memory_limit 0 must be a whole number between 1"),
        (["--target-qps", "5"], 2, "give --scenario Server too"),
        (["--scenario", "server"], 2, "Did you mean 'Server'"),
        (["--device", "cuda"], 1, "built without it|does not fit"),
        (["--backend", "onnxrutime"], 2, "Did you mean 'onnxruntime'"),
        (["--backend", "openvino, onnxrutime"], 2, "Unknown backend 'onnxrutime'"),
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
