"""Builds by TensorRT, which needs a GPU, on the simulated device."""

import dataclasses
import json
import signal

import pytest

from rkd_deploy.backends.tensorrt.build import build_engine
from rkd_deploy.backends.tensorrt.cache import export_engine
from rkd_deploy.backends.tensorrt.layers import engine_layers, layer_table
from rkd_deploy.backends.tensorrt.record import EngineRecord, read_engine
from rkd_deploy.backends.tensorrt.settings import EngineSettings, Profile, load_library, profile_for
from rkd_deploy.errors import BackendError, MissingDependencyError, ModelFileError, UsageError


def logged(gpu, name):
    return [entry[1:] for entry in gpu.device.log if entry[0] == name]


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 1 << 1), ("10.13.3", 1 << 1), ("11.4.0", 0)])
def test_networks_are_strongly_typed_in_10_and_in_11(gpu, model, version, flags):
    gpu.install(version)
    build_engine(model, "tensorrt")
    assert logged(gpu, "create_network") == [(flags,)]  # member 1 of the flags is STRONGLY_TYPED in 10


def test_older_libraries_and_unknown_flavours_are_refused(gpu, model):
    gpu.install("8.6.1")
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1 is installed.*pip install"):
        build_engine(model, "tensorrt")
    with pytest.raises(BackendError, match="Did you mean 'tensorrt'"):
        build_engine(model, "tensort")


def test_settings_become_flags(gpu, model):
    build_engine(model, "tensorrt")
    build_engine(model, "tensorrt", EngineSettings(tf32=True, version_compatible=True))
    build_engine(model, "tensorrt", EngineSettings(workspace_bytes=1 << 20))
    assert logged(gpu, "build") == [((),), (("TF32", "VERSION_COMPATIBLE"),), ((),)]
    assert logged(gpu, "set_memory_pool_limit") == [("WORKSPACE", 1 << 20)]


def test_tensorrt_needs_a_gpu_and_rtx_does_not(gpu, model):
    gpu.device.count = 0
    with pytest.raises(BackendError, match=r"CUDA device 0 cannot be used here: CUDA: cudaGetDeviceCount.*nvidia-smi"):
        build_engine(model, "tensorrt")
    record = build_engine(model, "tensorrt-rtx").record
    assert (record.device, record.compute_capability, record.layers_of) == (None, None, "network")
    assert [layer["name"] for layer in record.layers][:2] == ["Cast", "ReduceSum"]


def test_what_tensorrt_cannot_do_is_refused_with_the_reason(gpu, model):
    with pytest.raises(UsageError, match="builds for the GPU that it runs on"):
        build_engine(model, "tensorrt", EngineSettings(compute_capabilities=("8.6",)))
    gpu.install("10.3.0")
    with pytest.raises(UsageError, match="does not know this level"):
        build_engine(model, "tensorrt", EngineSettings(hardware="same-capability"))


def test_kernel_timings_are_kept_in_a_file_and_never_taken_from_another_gpu(gpu, model, tmp_path):
    settings = EngineSettings(timing_cache=tmp_path / "timings")
    build_engine(model, "tensorrt", settings)
    assert (tmp_path / "timings").read_bytes() == b"timings of Simulated GPU"
    build_engine(model, "tensorrt", settings)
    gpu.device.name = "Another GPU"
    with pytest.raises(ModelFileError, match="It belongs to the GPU and version that wrote it"):
        build_engine(model, "tensorrt", settings)
    assert (tmp_path / "timings").read_bytes() == b"timings of Simulated GPU"
    assert "timing_cache" not in settings.to_dict()


def test_what_the_parser_does_not_know_is_named_with_its_node(gpu, zoo, tmp_path):
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("input", "logits")]
    node = helper.make_node("Unsupported", ["input"], ["logits"], "stage2.odd", domain="mine")
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)],
        ir_version=10,
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match=r"no such operator at node stage2\.odd \(Unsupported\)"):
        build_engine(tmp_path / "m.onnx", "tensorrt")


def test_a_failed_build_writes_nothing(gpu, model, tmp_path):
    gpu.device.failing.add("build")
    with pytest.raises(BackendError, match="Out of memory"):
        export_engine(model, "tensorrt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_progress_is_the_outermost_phases_and_ctrl_c_ends_the_build(gpu, model, tmp_path):
    reports = []
    build_engine(model, "tensorrt", progress=lambda *report: reports.append(report))
    assert reports == [("Building engine", share) for share in (0.0, 0.5, 1.0, 1.0)]

    def interrupt(phase, share):
        if share == 0.5:
            raise KeyboardInterrupt

    def terminate(phase, share):
        reports.append(share)
        if share == 0.5:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    for stop in (interrupt, terminate):
        reports.clear()
        with pytest.raises(KeyboardInterrupt):
            export_engine(model, "tensorrt", progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert reports == [0.0, 0.5]  # the library was told to go no further


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"schema": 9}, "schema 9"),
        (lambda record: {key: value for key, value in record.items() if key != "flavour"}, "flavour"),
        (lambda record: record | {"profiles": 3}, "no record of an engine"),
        (lambda record: record | {"engine_sha256": "0" * 64}, "is not the engine that"),
    ],
)
def test_records_that_cannot_be_read_or_belong_elsewhere_are_refused(gpu, model, change, message):
    exported = export_engine(model, "tensorrt")
    beside = exported.file.with_name(exported.file.name + ".json")
    beside.write_text(json.dumps(change(json.loads(beside.read_text()))))
    with pytest.raises(ModelFileError, match=message):
        read_engine(exported.file)
    beside.write_text("{")
    with pytest.raises(ModelFileError, match="no record of an engine"):
        read_engine(exported.file)


def test_a_record_of_a_later_release_of_this_schema_is_read(gpu, model):
    record = build_engine(model, "tensorrt").record
    later = json.dumps(record.to_dict() | {"a_new_fact": 1})
    assert EngineRecord.from_json(later, "") == EngineRecord.from_json(json.dumps(record.to_dict()), "")


@pytest.mark.parametrize("text", ["0", "2:1:3", "1:2", "a", "", "1:4:2", "-1"])
def test_profiles_that_are_no_range_are_refused(text):
    with pytest.raises(UsageError, match="profile"):
        Profile.parse(text)


def test_a_batch_goes_to_the_profile_made_for_it():
    profiles = [Profile.parse(text) for text in ("1", "1:8:32", "16:32:64")]
    assert [profile_for(batch, profiles) for batch in (1, 2, 16, 21, 64, 65)] == [0, 1, 1, 2, 2, None]


def test_onnx_is_asked_for_where_it_is_missing(gpu, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="onnx"):
        build_engine(model, "tensorrt")


def test_the_inspectors_table_keeps_what_the_library_tells(gpu):
    """A layer as TensorRT's inspector prints it at detailed and at lesser verbosity."""
    content = {
        "Layers": [
            {
                "Name": "conv1 + relu1",
                "LayerType": "CaskConvolution",
                "Outputs": [{"Name": "a", "Dimensions": [8, 16, 32, 32], "Format/Datatype": "Half NHWC8"}],
                "TacticName": "sm80_xmma_fprop",
            },
            "conv2",
        ]
    }

    class Inspector:
        def get_engine_information(self, layout):
            return json.dumps(content)

    class Engine:
        def create_engine_inspector(self):
            return Inspector()

    layers = engine_layers(Engine(), load_library("tensorrt").trt)
    assert layers[0]["TacticName"] == "sm80_xmma_fprop"
    assert layer_table(layers).splitlines() == [
        "layer          type             data type   shape",
        "conv1 + relu1  CaskConvolution  Half NHWC8  8x16x32x32",
        "conv2",
    ]


def test_a_profile_must_be_there():
    with pytest.raises(UsageError, match="at least one profile"):
        EngineSettings(profiles=())
    with pytest.raises(UsageError, match="Choices: ampere"):
        EngineSettings(hardware="amper")
    assert dataclasses.replace(EngineSettings(), tf32=True).tf32
