from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rkd_deploy.errors import CheckpointError, StorageError
from rkd_deploy.models import zoo
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.train.checkpoints import load_checkpoint, read_labels, reorder_classes
from rkd_deploy.train.facts import WeightsFacts
from rkd_deploy.train.weights import load_tensors, load_weights, save_tensors

TINY = (4, 4, 4, 4)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Weights of a small network."""
    return CifarResNet(8, TINY, 5).state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in ours.items()
    )


# Our own files


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_and_facts_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 2, dtype=dtype),
    }
    facts = {"classes": ["ä", "b"], "epoch": 3, "mean": [0.1, 0.2], "none": None}
    save_tensors(tmp_path / "f.safetensors", tensors, facts)
    ours, our_facts = load_tensors(tmp_path / "f.safetensors")
    assert same(ours, tensors)
    assert our_facts == facts


def test_views_and_shared_memory_are_written_out(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    save_tensors(tmp_path / "f.safetensors", {"base": base, "row": base[1], "turned": base.T}, {})
    ours, _ = load_tensors(tmp_path / "f.safetensors")
    assert same(ours, {"base": base.detach(), "row": base[1].detach(), "turned": base.T.detach()})


def test_equal_content_gives_equal_bytes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for name in ("a", "b"):
        save_tensors(tmp_path / name, state, {"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    state["fc.bias"] += 1
    save_tensors(tmp_path / "b", state, {"x": 1})
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_others_can_read_our_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_tensors(tmp_path / "f.safetensors", state, {"x": 1})
    assert same(safetensors.torch.load_file(tmp_path / "f.safetensors"), state)


def test_a_file_of_others_has_no_facts(tmp_path: Path, state: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "f.safetensors", {"format": "pt"})
    ours, facts, *_ = load_checkpoint(tmp_path / "f.safetensors")
    assert same(ours, state)
    assert facts == WeightsFacts()


def test_a_file_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").mkdir()
    with pytest.raises(StorageError, match=r"f\.safetensors"):
        save_tensors(tmp_path / "f.safetensors", {"a": torch.zeros(1)}, {})


# Foreign files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_read(tmp_path: Path, state: dict[str, Tensor], suffix: str, zipped: bool) -> None:
    path = tmp_path / f"f{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    ours, facts, *_ = load_checkpoint(path)
    assert same(ours, state)
    assert facts == WeightsFacts()


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_come_off(tmp_path: Path, state: dict[str, Tensor], wrapper: str, prefix: str) -> None:
    wrapped = {
        "epoch": 3,
        "best": 71.2,
        "optimizer": {"state": {0: torch.zeros(1)}, "param_groups": [{"lr": 0.1}]},
        wrapper: collections.OrderedDict((prefix + key, value) for key, value in state.items()),
    }
    torch.save(wrapped, tmp_path / "f.pth")
    ours = load_checkpoint(tmp_path / "f.pth").state
    assert same(ours, state)


def test_a_wrapper_in_a_wrapper_comes_off(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"model": {"state_dict": state}}, tmp_path / "f.pth")
    assert same(load_checkpoint(tmp_path / "f.pth").state, state)


@pytest.mark.parametrize("inside", ["", "network.", "module.network.", "model."])
def test_a_network_whose_own_layers_are_called_so_keeps_its_names(
    tmp_path: Path, state: dict[str, Tensor], inside: str
) -> None:
    """A prefix is stripped only where the names do not fit as they are: a child may be called `network` or `model`."""
    prefixed = {inside + key: value for key, value in state.items()}
    for outside in ("", "module.", "network.", "_orig_mod.module."):
        torch.save({outside + key: value for key, value in prefixed.items()}, tmp_path / "f.pth")
        assert same(load_checkpoint(tmp_path / "f.pth", prefixed.keys()).state, prefixed)


def test_the_counter_of_an_average_is_no_weight(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    torch.save(torch.optim.swa_utils.AveragedModel(module).state_dict(), tmp_path / "f.pth")
    assert same(load_checkpoint(tmp_path / "f.pth", module.state_dict().keys()).state, module.state_dict())


def test_of_several_sets_the_choice_is_said_and_can_be_made(tmp_path: Path) -> None:
    """As timm writes them, the average beside the weights."""
    sets = {name: {"w": torch.full((2,), value)} for name, value in (("ema", 3.0), ("state_dict", 1.0))}
    torch.save({"epoch": 3, **sets, "deeper": {"model_ema": {"w": torch.full((2,), 2.0)}}}, tmp_path / "f.pth")
    read = load_checkpoint(tmp_path / "f.pth")
    assert (read.chosen, set(read.others)) == ("state_dict", {"ema", "deeper.model_ema"})
    assert read.state["w"][0] == 1
    for key, value in (("ema", 3), ("deeper.model_ema", 2)):
        assert load_checkpoint(tmp_path / "f.pth", key=key).state["w"][0] == value
    with pytest.raises(CheckpointError, match=r"Unknown set of weights 'emma'.*Did you mean 'ema'.*state_dict"):
        load_checkpoint(tmp_path / "f.pth", key="emma")
    torch.save(sets["ema"], tmp_path / "one.pth")
    assert load_checkpoint(tmp_path / "one.pth").others == ()


@pytest.mark.parametrize("prefix", ["net.", "backbone.", "module.net.", "net.model.", "_orig_mod.student."])
@pytest.mark.parametrize("companions", [{}, {"criterion.weight": torch.ones(3)}, {"train_acc.total": torch.ones(())}])
def test_a_network_is_found_under_whatever_attribute_a_trainer_had_it(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, companions: dict[str, Tensor]
) -> None:
    """As Lightning writes them: the module's attribute before every name, and what else the module holds beside."""
    tensors = {prefix + key: value for key, value in state.items()} | companions
    torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / "f.ckpt")
    read = load_checkpoint(tmp_path / "f.ckpt", state.keys())
    assert (same(read.state, state), read.others) == (True, ())
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors", {"format": "pt"})
    assert same(load_checkpoint(tmp_path / "f.safetensors", state.keys()).state, state)


def test_of_two_networks_in_one_set_the_choice_is_said_and_can_be_made(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    average = {key: value + 1 for key, value in state.items()}
    tensors = {f"{name}.{key}": part[key] for name, part in (("ema", average), ("model", state)) for key in state}
    torch.save({"state_dict": tensors}, tmp_path / "f.ckpt")
    read = load_checkpoint(tmp_path / "f.ckpt", state.keys())
    assert (read.chosen, read.others) == ("state_dict.model", ("state_dict.ema",))
    assert same(read.state, state)
    assert same(load_checkpoint(tmp_path / "f.ckpt", state.keys(), "state_dict.ema").state, average)


def test_settings_that_training_scripts_store_beside_the_weights_are_no_objects_to_refuse(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """timm's and torchvision's own scripts store the command line, an argparse.Namespace."""
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, model="resnet8")}, tmp_path / "f.pth")
    assert same(load_checkpoint(tmp_path / "f.pth", state.keys()).state, state)


def test_labels_are_read_as_editors_write_them(tmp_path: Path) -> None:
    for content in (b"a\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\r\n\r\nb", "a\nb".encode("utf-8-sig"), b"a\rb"):
        (tmp_path / "labels.txt").write_bytes(content)
        assert read_labels(tmp_path / "labels.txt") == ("a", "b")
    (tmp_path / "labels.txt").write_bytes("a\nb".encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"labels\.txt cannot be read as a list of classes"):
        read_labels(tmp_path / "labels.txt")


def test_a_file_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    for key in ("model", "x"):
        content: dict[str, Any] = {"epoch": 1}
        content[key] = content
        torch.save(content, tmp_path / "f.pth")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            load_checkpoint(tmp_path / "f.pth")
    deep: dict[str, Any] = {}
    for _ in range(50):
        deep = {"model": deep}
    torch.save(deep, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_checkpoint(tmp_path / "f.pth")


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """torch.load reads every one of these; the checksums are in the file."""
    torch.save(state, tmp_path / "f.pth")
    whole = (tmp_path / "f.pth").read_bytes()
    weights = max(state.values(), key=Tensor.numel).numpy().tobytes()
    first = whole.index(weights)
    for place in range(first, first + len(weights), len(weights) // 15):
        content = bytearray(whole)
        content[place] ^= 4
        (tmp_path / "f.pth").write_bytes(content)
        torch.load(tmp_path / "f.pth", weights_only=True)
        with pytest.raises(CheckpointError, match=r"f\.pth is damaged: the checksum of .* differs"):
            load_checkpoint(tmp_path / "f.pth")


def test_classes_are_put_into_another_order() -> None:
    """Also where another layer has as many rows: the logits decide which one it is."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    x_NCHW, order = torch.rand(5, 3, 6, 6), (2, 0, 3, 1)
    before = network(x_NCHW)
    assert reorder_classes(network, order, (6, 6))
    torch.testing.assert_close(network(x_NCHW), before[:, list(order)])
    no_such_layer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    no_such_layer.append(nn.Linear(4, 5)).append(nn.AdaptiveAvgPool1d(4))
    unchanged = {key: value.clone() for key, value in no_such_layer.state_dict().items()}
    assert not reorder_classes(no_such_layer, order, (6, 6))
    assert same(no_such_layer.state_dict(), unchanged)


def test_a_prefix_that_some_keys_have_is_a_name(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "f.pth")
    assert load_checkpoint(tmp_path / "f.pth").state.keys() == {"module.a", "b"}


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"a": torch.zeros(1), "lr": 0.1}, {"a": [1, 2]}, {0: torch.zeros(1)}, {"state_dict": {}}],
)
def test_a_dictionary_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"f\.pth holds no state dict: expected tensors by name, found "):
        load_checkpoint(tmp_path / "f.pth")


@pytest.mark.parametrize(("content", "kind"), [([torch.zeros(1)], "list"), (torch.zeros(1), "Tensor"), (3, "int")])
def test_what_is_no_dictionary_is_refused(tmp_path: Path, content: Any, kind: str) -> None:
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=rf"f\.pth holds a {kind}, not a state dict"):
        load_checkpoint(tmp_path / "f.pth")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["zip", "legacy", "bare pickle", "whole model"])
def test_a_pickled_object_is_refused_and_not_executed(tmp_path: Path, state: dict[str, Tensor], way: str) -> None:
    path, trace = tmp_path / "f.pth", tmp_path / "executed"
    content: Any = {"state_dict": state, "extra": Bomb(trace)}
    if way == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    elif way == "whole model":
        model = CifarResNet(8, TINY, 5)
        model.bomb = Bomb(trace)  # type: ignore[assignment]
        torch.save(model, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(CheckpointError, match=r"f\.pth is damaged, or holds Python objects .* which is refused"):
        load_checkpoint(path)
    assert not trace.exists()


def test_the_bomb_goes_off_where_pickles_are_trusted(tmp_path: Path) -> None:
    """The judge above can say no."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


# Damage


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=rf"There is no checkpoint at {path}\. Name a \.safetensors"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: it is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read as safetensors"):
        load_tensors(tmp_path / "absent.safetensors")


def written(path: Path, kind: str, state: dict[str, Tensor]) -> bytes:
    if kind == "safetensors":
        save_tensors(path, state, {"x": 1})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_breaks_off(
    tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    path = tmp_path / ("f.safetensors" if kind == "safetensors" else "f.pth")
    whole = written(path, kind, state)
    for length in [*range(0, 64, 4), *range(64, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"f\.(pth|safetensors)"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert same(load_checkpoint(path).state, state)  # says yes to the whole


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_tensors_or_an_error_of_checkpoints(
    tmp_path: Path, state: dict[str, Tensor], kind: str, data: st.DataObject
) -> None:
    """Bits flipped in a header or an index; any other exception would reach a person as a traceback."""
    path = tmp_path / ("f.safetensors" if kind == "safetensors" else "f.pth")
    content = bytearray(written(path, kind, state))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(3000, len(content) - 1)) | st.integers(-min(3000, len(content)), -1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        ours = load_checkpoint(path).state
    except CheckpointError:
        return
    assert all(isinstance(value, Tensor) for value in ours.values())


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (
            lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path),
            r"is a TorchScript program\. Save its weights: torch\.save\(torch\.jit\.load",
        ),
        (
            lambda path: torch.save(nn.Linear(2, 3), path),
            r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\) ",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_file_without_a_state_dict_is_called_what_it_is(
    tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    write(tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(tmp_path / "f.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02", bytes(1000), b"<html></html>"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_something_else_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"f{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"f\{suffix}"):
        load_checkpoint(tmp_path / f"f{suffix}")


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "f.safetensors")


# Weights that do not fit


def test_weights_that_fit_are_loaded() -> None:
    source, target = CifarResNet(8, TINY, 5), CifarResNet(8, TINY, 5)
    load_weights(target, source.state_dict(), "f.pth", "teacher")
    assert same(target.state_dict(), source.state_dict())


def test_checkpoints_from_before_batch_counters_are_loaded(state: dict[str, Tensor]) -> None:
    older = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    target = CifarResNet(8, TINY, 5)
    load_weights(target, older, "f.pth", "teacher")
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in older.items())


def test_another_architecture_is_answered_with_the_first_keys() -> None:
    other, wanted = zoo.create("resnet14", 5), zoo.create("resnet8", 5)
    with pytest.raises(CheckpointError) as caught:
        load_weights(wanted, other.state_dict(), "f.pth", "teacher resnet8")
    extra = [key for key in other.state_dict() if key not in wanted.state_dict()]
    message = str(caught.value)
    assert message.startswith("f.pth is not a checkpoint of teacher resnet8: 0 of its ")
    assert f"{len(extra)} are foreign (first: {', '.join(extra[:3])})" in message
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, wanted.state_dict(), "f.pth", "teacher resnet14")
    missing = [key for key in extra if not key.endswith("num_batches_tracked")]
    assert (
        f"{len(missing)} of its {len(other.state_dict())} weights are missing (first: {', '.join(missing[:3])})"
        in str(caught.value)
    )


def test_another_number_of_classes_is_said(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"f\.pth was trained on 5 classes; the data have 7\. Use a teacher"):
        load_weights(CifarResNet(8, TINY, 7), state, "f.pth", "teacher")


def test_other_widths_are_said(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit teacher: \d+ weights .*layer3\S* is \(4, 4, 3, 3\), not"):
        load_weights(CifarResNet(8, (4, 4, 4, 6), 5), state, "f.pth", "teacher")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda w: w.to(torch.complex64), "complex64"),
        (lambda w: w.to(torch.int64), "int64"),
        (lambda w: w.to_sparse(), "sparse_coo"),
        (lambda w: torch.empty_like(w, device="meta"), "on meta"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_that_would_be_others_as_floats_are_refused(
    state: dict[str, Tensor], change: Callable[[Tensor], Tensor], kind: str
) -> None:
    state["fc.weight"] = change(state["fc.weight"])
    with pytest.raises(CheckpointError, match=rf"1 weights are of another kind \(first: fc\.weight\): .*{kind}"):
        load_weights(CifarResNet(8, TINY, 5), state, "f.pth", "teacher")


def test_half_weights_are_loaded_as_floats(state: dict[str, Tensor]) -> None:
    target = CifarResNet(8, TINY, 5)
    load_weights(
        target, {key: v.half() if v.is_floating_point() else v for key, v in state.items()}, "f.pth", "teacher"
    )
    torch.testing.assert_close(target.fc.weight, state["fc.weight"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_diverged_network_are_refused(state: dict[str, Tensor], value: float) -> None:
    state["layer1.0.bn1.running_var"][2] = value
    target = CifarResNet(8, TINY, 5)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite weights \(first: layer1\.0\.bn1\.running_var\)"):
        load_weights(target, state, "f.pth", "teacher")
    assert same(target.state_dict(), before)  # nothing was loaded
