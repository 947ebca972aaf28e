"""A changed byte is noticed, whatever file it is in, by whoever opens the bundle."""

import hashlib
import shutil
from dataclasses import replace

import onnx
import pytest
from onnx import numpy_helper

import rkd_deploy
from rkd_deploy.backends import describe_model
from rkd_deploy.backends.files import check_files, with_checksums
from rkd_deploy.bench import BenchSettings, bench
from rkd_deploy.bench.parity import verify, verify_everywhere
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import BackendError, ModelFileError

OPENERS = {
    "verify": verify,
    "verify everywhere": verify_everywhere,
    "info": describe_model,
    "load": lambda path: rkd_deploy.load(path).close(),
    "bench": lambda path: bench([path], BenchSettings(batches=(1,), min_seconds=0, min_runs=1, warmup_seconds=0)),
}


@pytest.fixture
def sound(bundle, tmp_path):
    """A sealed bundle of one's own."""
    folder = shutil.copytree(bundle, tmp_path / "sealed")
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    card = ModelCard.from_json((folder / "model.json").read_text(), "model.json")
    (folder / "model.json").write_text(with_checksums(card, folder))
    return folder


def test_the_sums_are_those_of_sha256sum(sound):
    sums = check_files(sound, complete=True)
    assert set(sums) == {file.name for file in sound.iterdir()}
    for name, checksum in sums.items():
        text = (sound / name).read_bytes()
        if name == "model.json":
            text = text.replace(checksum.encode(), b"0" * 64)
        assert checksum == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("opener", OPENERS)
def test_an_untouched_bundle_opens(sound, opener):
    OPENERS[opener](sound)


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "labels.txt", "golden.npz", "model.pt2"])
def test_any_changed_byte_is_noticed(sound, name):
    file = sound / name
    content = file.read_bytes()
    for place in {*range(0, len(content), max(1, len(content) // 100)), len(content) - 1}:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ModelFileError):
            check_files(sound, complete=False)
    file.write_bytes(content[:-1])
    with pytest.raises(ModelFileError):
        check_files(sound, complete=False)


@pytest.mark.parametrize("opener", OPENERS)
def test_every_opener_names_the_changed_file(sound, opener):
    (sound / "labels.txt").write_text("red\ngreen\nblux\n")
    with pytest.raises(ModelFileError, match=r"not as it was written: labels\.txt changed .*Copy it again"):
        OPENERS[opener](sound)


def test_what_an_app_leaves_out_is_missed_by_a_proof_and_not_by_load(sound):
    (sound / "model.pt2").unlink()
    OPENERS["load"](sound)
    for opener in ("verify", "info"):
        with pytest.raises(ModelFileError, match=r"model\.pt2 missing"):
            OPENERS[opener](sound)


@pytest.mark.parametrize("name", ["../secret", "/secret", "golden/../../secret", "..\\secret"])
def test_no_sum_leads_out_of_the_folder(sound, name):
    card = ModelCard.from_json((sound / "model.json").read_text(), "model.json")
    text = replace(card, checksums={name: "0" * 64}).to_json()
    (sound / "model.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"lists the file .*secret', which is not in the folder"):
        check_files(sound, complete=True)


def test_a_bundle_of_a_newer_schema_says_so(sound):
    text = (sound / "model.json").read_text().replace('"schema": 1', '"schema": 2')
    (sound / "model.json").write_text(text)
    for opener in OPENERS.values():
        with pytest.raises(ModelFileError, match=r"card schema 2; this version reads schema 1.*pip install -U"):
            opener(sound)


def test_every_backend_that_can_proves_it(sound):
    verdicts = {verdict.backend: verdict for verdict in verify_everywhere(sound)}
    assert set(verdicts) >= {"onnxruntime", "pytorch", "openvino"}
    assert all(verdict.parity is not None and verdict.parity.passed for verdict in verdicts.values())


def test_a_backend_that_cannot_run_the_bundle_says_why(bundle, zoo, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bare")
    (folder / "model.pt2").unlink()
    zoo.seal(folder)
    verdicts = {verdict.backend: verdict for verdict in verify_everywhere(folder)}
    assert verdicts["onnxruntime"].parity.passed
    assert verdicts["pytorch"].parity is None
    assert "--with-pytorch" in verdicts["pytorch"].reason


@pytest.mark.parametrize("how", ["absent", "without sums"])
def test_a_bundle_without_its_checksums_proves_nothing(sound, how):
    card = ModelCard.from_json((sound / "model.json").read_text(), "model.json")
    (sound / "model.json").unlink()
    if how == "without sums":
        (sound / "model.json").write_text(replace(card, checksums={}).to_json())
    OPENERS["load"](sound)  # an app may leave model.json out
    for opener in ("verify", "verify everywhere"):
        with pytest.raises(ModelFileError, match=r"has no checksums: its model\.json is missing or holds none"):
            OPENERS[opener](sound)


def test_no_backend_at_all_is_an_error(sound):
    with pytest.raises(BackendError, match=r"No backend here can run .* on cuda.*onnxruntime: "):
        verify_everywhere(sound, device="cuda")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_of_the_folder_are_not_read(bundle, tmp_path, backend, absolute):
    folder, outside = shutil.copytree(bundle, tmp_path / "leaving"), tmp_path / "outside.bin"
    (folder / "model.json").unlink()  # the case of a foreign ONNX file: sums would notice the change
    model = onnx.load(folder / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    outside.write_bytes(numpy_helper.to_array(bias).tobytes())
    bias.ClearField("float_data")
    bias.ClearField("raw_data")
    bias.data_location = onnx.TensorProto.EXTERNAL
    entry = bias.external_data.add()
    entry.key, entry.value = "location", str(outside) if absolute else "../outside.bin"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises((ModelFileError, BackendError), match=r"outside\.bin|[Ee]xternal"):
        rkd_deploy.load_backend(backend, folder)
