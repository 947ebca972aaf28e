"""What a model repository is made of, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
import yaml
from deployment_schemas import faults
from onnx import TensorProto, helper

from rkd_deploy.backends.tensorrt.record import EngineRecord, write_engine
from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.errors import BackendError, ModelFileError, StorageError, UsageError
from rkd_deploy.images import to_array
from rkd_deploy.serve.kserve import service_name
from rkd_deploy.serve.triton import repository as repository_module
from rkd_deploy.serve.triton.repository import export_triton, inference_service
from rkd_deploy.serve.triton.settings import Instances, Serving

NAME = "tiny-s-a"
# An editable install puts the package on the path, or finds it by a finder of its own.
HIDING = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import pathlib
sys.path[:] = [place for place in sys.path if not (pathlib.Path(place) / "rkd_deploy/cli.py").exists()]
"""
LABELS = "ant\nbee\ncat\ndog\nelk\n"


MODULES = ("__init__", "card", "decoding", "errors", "fields", "image_folders", "images", "storage")


def pixels(version):
    """The files of a version that prepares images."""
    modules = (f"{version}/rkd_deploy/{module}.py" for module in MODULES)
    return {f"{version}/model.py", f"{version}/model.json", *modules}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def with_plan(bundles, tmp_path):
    """A copy of the first bundle with a plan in it, as `rkd-deploy export --format tensorrt` records it."""

    def make(*profiles):
        folder = shutil.copytree(bundles[0], tmp_path / "planned")
        source = read_source(folder)
        record = EngineRecord(
            library="tensorrt", version="10.9.0.34", device="NVIDIA H200", compute_capability="9.0",
            compute_capabilities=(), driver=12080, profiles=profiles, precision="fp32", settings={},
            onnx_name="model.onnx", onnx_sha256=source.sha256, engine_bytes=4, build_seconds=1.0,
            engine_sha256=hashlib.sha256(b"plan").hexdigest(),
        )  # fmt: skip
        write_engine(folder / "model.tensorrt.engine", b"plan", record)
        return folder

    return make


def test_a_new_model(bundles, tmp_path):
    written = export_triton(bundles[0], tmp_path / "models")
    assert (written.name, written.version, written.unchanged) == (NAME, 1, ())
    contents = files(tmp_path / "models")
    assert set(contents) == {
        f"{NAME}.kserve.yaml",
        *(f"{NAME}/{file}" for file in ("config.pbtxt", "labels.txt", "1/model.onnx")),
        *(f"{NAME}-pixels/{file}" for file in ("config.pbtxt", *pixels(1))),
        *(f"{NAME}-images/{file}" for file in ("config.pbtxt", "labels.txt", "1/keep.txt")),
    }
    assert contents[f"{NAME}/1/model.onnx"] == (bundles[0] / "model.onnx").read_bytes()
    assert contents[f"{NAME}/labels.txt"].decode() == LABELS


def test_the_next_version_stands_beside_the_old_one(bundles, tmp_path):
    export_triton(bundles[0], tmp_path)
    before = files(tmp_path)
    assert export_triton(bundles[1], tmp_path).version == 2
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {f"{NAME}/2/model.onnx", *(f"{NAME}-pixels/{file}" for file in pixels(2))}
    shutil.rmtree(tmp_path / NAME / "1")  # retired by hand: its number is not given again
    assert export_triton(bundles[0], tmp_path).version == 3


def test_configuration_that_differs_is_replaced_or_kept_as_asked(bundles, tmp_path):
    export_triton(bundles[0], tmp_path)
    config, service = tmp_path / NAME / "config.pbtxt", tmp_path / f"{NAME}.kserve.yaml"
    config.write_text(config.read_text() + "# tuned by hand\n")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"(?s)config.pbtxt stands there already.*-# tuned by hand.*--config keep"):
        export_triton(bundles[1], tmp_path)
    assert files(tmp_path) == before
    unreplaced = export_triton(bundles[1], tmp_path, Serving(config="keep", storage_uri="s3://b/m"))
    assert (unreplaced.version, unreplaced.unchanged) == (2, (config, service))
    assert config.read_bytes() == before[f"{NAME}/config.pbtxt"]
    assert service.read_bytes() == before[f"{NAME}.kserve.yaml"]
    replaced = export_triton(bundles[1], tmp_path, Serving(config="replace", max_batch=4, preferred=(2,)))
    assert (replaced.version, replaced.unchanged) == (3, ())
    assert "max_batch_size: 4\n" in config.read_text()


@pytest.mark.parametrize(("changed", "what"), [("other backend", "backend"), ("labels", "labels")])
def test_another_model_is_no_next_version(bundles, tmp_path, changed, what):
    export_triton(bundles[0], tmp_path)
    serving = Serving(config="replace")
    if changed == "labels":
        (tmp_path / NAME / "labels.txt").write_text(LABELS.replace("ant", "auk"))
    else:
        serving = Serving(config="replace", backend="python")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=f"other {what}.*--model-name"):
        export_triton(bundles[1], tmp_path, serving)
    assert files(tmp_path) == before
    assert export_triton(bundles[1], tmp_path, Serving(name="another")).version == 1


def test_a_folder_of_something_else_is_left_alone(bundles, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "diary.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds no model with a version"):
        export_triton(bundles[0], tmp_path)
    assert set(files(tmp_path)) == {f"{NAME}/diary.txt"}


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_left_where_writing_fails(bundles, tmp_path, monkeypatch, version):
    if version == 2:
        export_triton(bundles[0], tmp_path)
    before = files(tmp_path)

    def full(path, content):
        raise StorageError(f"{path}: no space left")

    monkeypatch.setattr(repository_module, "write_bytes", full)
    with pytest.raises(StorageError, match="no space left"):
        export_triton(bundles[1], tmp_path)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == (
        {NAME, f"{NAME}-pixels", f"{NAME}-images", f"{NAME}.kserve.yaml"} if version == 2 else set()
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_python_variant_brings_its_code(bundles, tmp_path):
    export_triton(bundles[0], tmp_path, Serving(backend="python"))
    assert set(files(tmp_path / NAME / "1")) == {"model.onnx", "model.py"}
    code = (tmp_path / NAME / "1/model.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported - {"json", "os", "pathlib", "typing", "__future__"} == {
        "numpy", "onnxruntime", "triton_python_backend_utils",
    }  # fmt: skip


def python_variant(repository, monkeypatch):
    """The code of the python variant, imported as Triton would, but for Triton's own module."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("triton_model", repository / NAME / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARGS = {
    "model_config": json.dumps({"input": [{"name": "input"}], "output": [{"name": "logits"}], "parameters": {}}),
    "model_instance_kind": "CPU",
    "model_instance_device_id": "0",
}


def test_the_python_variant_keeps_no_identifier_and_waits_for_no_pipe(bundles, tmp_path, monkeypatch):
    export_triton(bundles[0], tmp_path, Serving(backend="python"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    variant = python_variant(tmp_path, monkeypatch)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    code = (tmp_path / NAME / "1/model.py").read_text()
    assert code.index("ORT_DISABLE_TELEMETRY") < code.index("import onnxruntime")  # it is read when that is imported
    model = variant.TritonPythonModel()
    model.initialize(ARGS)
    model.finalize()
    file = tmp_path / NAME / "1/model.onnx"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("absent")):
        file.unlink()
        make(file)
        with pytest.raises(RuntimeError, match=r"model\.onnx is missing, or no regular file: export the model"):
            model.initialize(ARGS)


@pytest.mark.parametrize("name", ["config.pbtxt", "labels.txt"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "no text"])
def test_what_stands_in_a_repository_and_is_no_file_is_said(bundles, tmp_path, name, kind):
    export_triton(bundles[0], tmp_path)
    file = tmp_path / NAME / name
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b"\xff\xfe")
    with pytest.raises(StorageError, match=f"{name}|holds no model with a version"):
        export_triton(bundles[1], tmp_path)


def test_a_file_in_the_place_of_a_model_is_said(bundles, tmp_path):
    (tmp_path / NAME).write_text("")
    with pytest.raises(StorageError, match="cannot be read as a model's folder"):
        export_triton(bundles[0], tmp_path)


def test_a_plan_and_its_batch_sizes(with_plan, tmp_path):
    bundle = with_plan("1:8:16")
    written = export_triton(bundle, tmp_path / "models", Serving(backend="tensorrt"))
    folder = tmp_path / "models" / NAME
    assert (folder / "1/model.plan").read_bytes() == b"plan"
    assert json.loads((folder / "1/model.plan.json").read_text())["version"] == "10.9.0.34"
    config = (folder / "config.pbtxt").read_text()
    for line in ('backend: "tensorrt"', "max_batch_size: 16", "preferred_batch_size: [ 8, 16 ]", "kind: KIND_GPU"):
        assert line in config
    assert "profile:" not in config
    assert yaml.safe_load(written.service.read_text())["spec"]["predictor"]["model"]["modelFormat"] == {
        "name": "tensorrt"
    }
    with pytest.raises(UsageError, match=r"built for 1:8:16.*--max-batch 32.*17 too.*--profile 1:OPT:MAX"):
        export_triton(bundle, tmp_path / "more", Serving(backend="tensorrt", max_batch=32))
    assert not (tmp_path / "more").exists()


def test_several_profiles_are_all_used(with_plan, tmp_path):
    export_triton(with_plan("1:1:1", "2:8:32"), tmp_path / "models", Serving(backend="tensorrt"))
    config = (tmp_path / "models" / NAME / "config.pbtxt").read_text()
    for line in ('profile: [ "0", "1" ]', "max_batch_size: 32", "preferred_batch_size: [ 1, 8, 32 ]"):
        assert line in config


def test_without_a_fitting_plan_it_is_said_how_to_get_one(bundles, with_plan, tmp_path):
    wanted = r"export \S+first --format tensorrt.*trtexec --onnx=model.onnx --saveEngine=model.tensorrt.engine"
    wanted += " --minShapes=input:1x8x8x3 --optShapes=input:8x8x8x3 --maxShapes=input:32x8x8x3"
    with pytest.raises(UsageError, match=wanted):
        export_triton(bundles[0], tmp_path / "models", Serving(backend="tensorrt"))
    foreign = with_plan("1:8:16")
    shutil.copy(bundles[1] / "model.onnx", foreign / "model.onnx")
    (foreign / "model.json").unlink()  # else its checksums notice first
    with pytest.raises(ModelFileError, match=r"built from another model\.onnx"):
        export_triton(foreign, tmp_path / "models", Serving(backend="tensorrt"))
    (foreign / "model.tensorrt.engine.json").unlink()  # what trtexec writes has no record
    written = export_triton(foreign, tmp_path / "models", Serving(backend="tensorrt"))
    assert set(files(written.repository / NAME / "1")) == {"model.plan"}


def test_it_needs_no_torch(bundles, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from rkd_deploy.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        bundles[0],
        "--format",
        "triton",
        "--repository",
        tmp_path / "models",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "models" / NAME / "1/model.onnx").exists()


def test_a_changed_bundle_is_refused(bundles, tmp_path):
    bundle = shutil.copytree(bundles[0], tmp_path / "bundle")
    (bundle / "labels.txt").write_text("x\n")
    with pytest.raises(ModelFileError, match=r"labels\.txt changed"):
        export_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def save(path, shapes, dtype=TensorProto.FLOAT):
    """An ONNX file of others: the sum of its inputs."""
    values = [helper.make_tensor_value_info(f"in{index}", dtype, shape) for index, shape in enumerate(shapes)]
    result = helper.make_tensor_value_info('say "hi"\\', dtype, shapes[0])
    node = helper.make_node("Sum", [value.name for value in values], [result.name])
    graph = helper.make_graph([node], "g", values, [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("shapes", "error", "reason"),
    [
        ([["n", 3], ["n", 3]], BackendError, "has 2 inputs"),
        ([[4, 3]], UsageError, r"the shape \[4, 3\]: its batch is fixed"),
        ([["n", "w"]], UsageError, r"the shape \[\?, \?\]: only the batch may be free"),
    ],
)
def test_what_cannot_be_batched_is_refused(tmp_path, shapes, error, reason):
    file = save(tmp_path / "model.onnx", shapes)
    with pytest.raises(error, match=reason):
        export_triton(file, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_file_of_others_has_no_labels(tmp_path):
    written = export_triton(save(tmp_path / "Foo_v2.onnx", [["n", 3]]), tmp_path / "models")
    assert written.name == "foo-v2"
    assert not (written.repository / "foo-v2/labels.txt").exists()
    assert not (written.repository / "foo-v2-images").exists()  # nothing is known of what is done to images
    assert "label_filename" not in (written.repository / "foo-v2/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "onnx"}, "Did you mean 'onnxruntime'"),
        ({"name": "../up"}, "'../up' names a folder"),
        ({"max_batch": 0}, "--max-batch 0 must be a whole number between 1 and 65536"),
        ({"max_batch": 999_999_999_999}, "--max-batch 999999999999 must be a whole number between 1 and 65536"),
        ({"max_batch": 1.5}, "--max-batch 1.5 must be a whole number between 1 and 65536"),
        ({"max_batch": True}, "--max-batch True must be a whole number"),
        ({"threads": 2**31}, "--threads 2147483648 must be a whole number between 1 and 1024"),
        ({"versions": 0}, "--serve-versions: versions = 0 must be"),
        ({"queue_delay_us": -1}, "--queue-delay -1"),
        ({"config": "overwrite"}, "Choices: keep, replace"),
        ({"backend": "tensorrt", "instances": Instances("cpu")}, "plans on GPUs only"),
        ({"instances": Instances("gpu"), "threads": 2}, "--threads 2 has no effect"),
        ({"storage_uri": "ftp://host/models"}, "'ftp://host/models' must be an address"),
        ({"storage_uri": "s3://a b"}, "must be an address"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(UsageError, match=re.escape(reason)):
        Serving(**settings)


@pytest.mark.parametrize("text", ["tpu", "cpu:0", "gpu:-1", "cpu:1.5", ""])
def test_instances_are_cpu_or_gpu_and_a_number(text):
    assert Instances.parse("cpu:3") == Instances("cpu", 3)
    with pytest.raises(UsageError, match="must be cpu or gpu"):
        Instances.parse(text)


def test_a_batch_size_above_the_largest_is_refused(bundles, tmp_path):
    with pytest.raises(UsageError, match="--preferred-batch 8,16: each must be between 1 and the largest batch, 8"):
        export_triton(bundles[0], tmp_path / "models", Serving(max_batch=8, preferred=(8, 16)))


@pytest.mark.parametrize(
    ("serving", "model_format", "gpus"),
    [
        (Serving(storage_uri="s3://bucket/models"), "onnx", None),
        (Serving(storage_uri="pvc://volume/models", instances=Instances("gpu", 2)), "onnx", "1"),
        (Serving(storage_uri="gs://bucket/models", backend="tensorrt"), "tensorrt", "1"),
        (Serving(storage_uri="oci://registry/models:1", backend="python"), "triton", None),
    ],
)
def test_the_kserve_resource(serving, model_format, gpus):
    """Field by field as serving.kserve.io/v1beta1 has them; formats are those of KServe's own runtime for Triton."""
    resource = yaml.safe_load(inference_service("Foo_1.2", serving))
    model = {
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "modelFormat": {"name": model_format},
        "storageUri": serving.storage_uri,
    }
    if gpus is not None:
        model["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    assert resource == {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "foo-1-2"},
        "spec": {"predictor": {"model": model}},
    }
    assert faults("kserve_inferenceservice", resource) == []


@pytest.mark.parametrize("name", ["a", "Foo_1.2", "7up", "x" * 100, "a." + "-" * 80, "0", "NO", "1e3"])
def test_the_name_of_a_kserve_resource(name):
    service = service_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service)  # KServe's rule (inference_service_validation.go)
    assert len(service) <= 63
    assert yaml.safe_load(inference_service(name, Serving()))["metadata"]["name"] == service  # text, never a number


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "python"])
def test_the_configuration_is_triton_s(triton, with_plan, tmp_path, backend):
    """Read by Triton's own protobuf definition, which knows no field that is not its own."""
    bundle = with_plan("1:1:1", "2:8:32")
    on_cpu = {} if backend == "tensorrt" else {"threads": 2, "instances": Instances("cpu", 3)}
    serving = Serving(backend=backend, queue_delay_us=500, versions=None if backend == "python" else 2, **on_cpu)
    export_triton(bundle, tmp_path / "models", serving)
    config = json.loads(triton.client("config", tmp_path / "models" / NAME / "config.pbtxt"))
    sizes = [1, 8, 32] if backend == "tensorrt" else [8, 32]
    image = {"data_type": "TYPE_UINT8", "dims": ["8", "8", "3"]}
    group = {"kind": "KIND_CPU", "count": 3}
    if backend == "tensorrt":
        group = {"kind": "KIND_GPU", "count": 1, "profile": ["0", "1"]}
    wanted = {
        "name": NAME,
        "backend": backend,
        "max_batch_size": 32,
        "input": [{"name": "input", **image}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["5"], "label_filename": "labels.txt"}],
        "dynamic_batching": {"preferred_batch_size": sizes, "max_queue_delay_microseconds": "500"},
        "instance_group": [group],
        "version_policy": {"all": {}} if backend == "python" else {"latest": {"num_versions": 2}},
        "model_warmup": [
            {"name": f"batch_{size}", "batch_size": size, "inputs": {"input": {**image, "zero_data": True}}}
            for size in sorted({1, *sizes})
        ],
    }
    if on_cpu:
        wanted["parameters"] = {"intra_op_thread_count": {"string_value": "2"}}
    assert config == wanted


@pytest.mark.slow
def test_the_ensemble_is_triton_s(triton, bundles, tmp_path):
    export_triton(bundles[0], tmp_path, Serving(max_batch=16))
    config = json.loads(triton.client("config", tmp_path / f"{NAME}-images/config.pbtxt"))
    assert config == {
        "name": f"{NAME}-images",
        "platform": "ensemble",
        "max_batch_size": 16,
        "input": [{"name": "input", "data_type": "TYPE_STRING", "dims": ["1"]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["5"], "label_filename": "labels.txt"}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{NAME}-pixels",
                    "model_version": "-1",
                    "input_map": {"images": "input"},
                    "output_map": {"pixels": "pixels"},
                },
                {
                    "model_name": NAME,
                    "model_version": "-1",
                    "input_map": {"input": "pixels"},
                    "output_map": {"logits": "logits"},
                },
            ]
        },
    }
    config = json.loads(triton.client("config", tmp_path / f"{NAME}-pixels/config.pbtxt"))
    assert config["backend"] == "python"
    assert config["output"] == [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": ["8", "8", "3"]}]


def test_what_prepares_images_needs_nothing_but_its_own_folder(bundles, tmp_path):
    """Its code in a Python that has no rkd_deploy: the pixels are those of `images.to_array`."""
    export_triton(bundles[0], tmp_path / "models")
    photo = bundles[0] / "golden/photo.jpg"
    script = """
import sys, types
class Tensor:
    def __init__(self, name, array): self.name, self.array = name, array
    def as_numpy(self): return self.array
stub = types.ModuleType("triton_python_backend_utils")
stub.Tensor, stub.TritonError = Tensor, str
stub.InferenceResponse = lambda tensors=None, error=None: (tensors, error)
stub.get_input_tensor_by_name = lambda request, name: request[name]
sys.modules["triton_python_backend_utils"] = stub
import importlib.util, numpy as np
assert importlib.util.find_spec("rkd_deploy") is None
spec = importlib.util.spec_from_file_location("model", sys.argv[1] + "/model.py")
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
model = module.TritonPythonModel(); model.initialize({})
photo = open(sys.argv[2], "rb").read()
good, bad = model.execute([{"images": Tensor("images", np.array([[image]], object))} for image in (photo, b"none")])
assert "Image 0 cannot be read as an image" in bad[1], bad
np.save(sys.argv[3], good[0][0].array)
"""
    places = [tmp_path / f"models/{NAME}-pixels/1", photo, tmp_path / "pixels.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", HIDING + script, *places]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    rule = read_source(bundles[0]).card.preprocess
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), to_array(photo, rule)[None])


@pytest.mark.slow
def test_names_of_others_are_quoted(triton, tmp_path):
    written = export_triton(save(tmp_path / "model.onnx", [["n", 3]]), tmp_path / "models")
    config = json.loads(triton.client("config", written.repository / "model/config.pbtxt"))
    assert config["output"] == [{"name": 'say "hi"\\', "data_type": "TYPE_FP32", "dims": ["3"]}]


@pytest.mark.slow
def test_a_field_that_triton_does_not_know_is_seen(triton, tmp_path):
    (tmp_path / "config.pbtxt").write_text("dynamic_batching { preferred_batch_sizes: [ 8 ] }\n")
    with pytest.raises(AssertionError, match='has no field named "preferred_batch_sizes"'):
        triton.client("config", tmp_path / "config.pbtxt")
