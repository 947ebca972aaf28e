"""A recorded step against the same step made eagerly; folded copies against networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkd_deploy.data.augment import Mixing
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.splits import Split
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train import capture, recording
from rkd_deploy.train.frozen import ConvAddReLU, folded_copy
from rkd_deploy.train.methods.base import Method, WeightedLoss
from rkd_deploy.train.methods.baseline import CrossEntropy, Distilled
from rkd_deploy.train.methods.dkd import DKD
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.kd import KD
from rkd_deploy.train.methods.residual import AssistantStep, StudentStep, relative
from rkd_deploy.train.passes import Speedups
from rkd_deploy.train.recording import EagerSteps, RecordedSteps
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper
from tests.support import simulated_graphs

CLASSES, BATCH, IMAGES = 4, 8, 28
PLAIN = Speedups(
    folded=False, fused=False, meanwhile=False, cast_once=False, counted_once=False, cudnn_benchmark=False,
    channels_last=False,
)  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(capture, "_REPLAYS", 1)
    monkeypatch.setattr(capture, "_WARM_UPS", 2)
    # Nothing is captured here, and a collection takes a second in a process that has run a thousand tests.
    monkeypatch.setattr(capture, "gc", SimpleNamespace(collect=lambda: 0))
    return simulated_graphs.install(monkeypatch)


def shaken(network: FeatureNetwork) -> FeatureNetwork:
    """With statistics and weights of batch norm that are no identities."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


def made(name: str) -> Method:
    torch.manual_seed(0)
    T = shaken(CifarResNet(8, (8, 8, 16, 16), CLASSES)).eval()
    S0 = CifarResNet(8, (8, 8, 8, 8), CLASSES)
    model = ResidualStudent(S0.without_head(), [S0.without_head()], 16, CLASSES)
    match name:
        case "cross-entropy":
            return CrossEntropy(S0)
        case "kd":
            return Distilled(T, S0, WeightedLoss(KD(4.0, False)), 0.1)
        case "dkd":
            return Distilled(T, S0, WeightedLoss(DKD(1.0, 2.0, 4.0, False), 1.0, 4), 1.0)
        case "student":
            return StudentStep(T, model, 1.0)
        case "assistant":
            shaken(model.student)
            return AssistantStep(T, model, 1.0)
    weights = Weights(feature=1.0, assistant=1.0, ce=1.0, student=0.5, step_decay=1.0)
    return EndToEnd(T, model, relative, weights, detach=True, train_head=True)


METHODS = ("cross-entropy", "kd", "dkd", "student", "assistant", "end to end")


def loader(device: str = "cpu", **how: Any) -> DeviceLoader:
    generator = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 256, (IMAGES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels_N = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    split = Split(images_NCHW=images_NCHW.to(device), labels_N=labels_N.to(device))
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3, torch.device(device))
    settings: dict[str, Any] = {"batch_size": BATCH, "augmentations": ("crop", "flip"), "crop_padding": 2, "seed": 0}
    return DeviceLoader(split, normalise, **settings | how)


def recipe(**how: Any) -> TrainRecipe:
    return TrainRecipe(**{"batch_size": BATCH, "momentum": 0.9, "weight_decay": 1e-2, "clip_norm": 1.0, **how})


def rates(epoch: int) -> list[float]:
    return [0.1 / (epoch + 1), 0.05, 0.02]


def ended(method: Method, rows: list[dict[str, float]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training left behind: the log's rows, the weights, the momenta."""
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state_dict()["state"].values()]
    values = {f"{n} {key}": torch.tensor(value) for n, row in enumerate(rows) for key, value in row.items()}
    return values | dict(method.state_dict()) | {f"momentum {n}": value for n, value in enumerate(momenta)}


def eagerly(method: Method, epochs: int = 3, **how: Any) -> dict[str, Tensor]:
    stepper, rows = Stepper(method, recipe(**how)), []
    parameter = next(method.parameters())
    batches = loader(str(parameter.device))
    for epoch in range(epochs):
        stepper.start_epoch(epoch + 1)
        sums = EpochSums()
        for step, (x, y) in enumerate(batches.epoch(epoch)):
            sums.add(stepper.step(x.to(parameter.dtype), y, rates(epoch)[step]), y, step + 1)
        rows.append(sums.means())
    return ended(method, rows, stepper.optimizer)


def recorded(
    method: Method, speedups: Speedups, loader: DeviceLoader, epochs: int = 3, **how: Any
) -> dict[str, Tensor]:
    stepper, rows = Stepper(method, recipe(**how)), []
    steps = RecordedSteps(method, stepper.optimizer, recipe(**how), loader, speedups)
    for epoch in range(epochs):
        stepper.start_epoch(epoch + 1)
        sums = EpochSums()
        assert len(list(steps.epoch(epoch, 0, sums, rates(epoch)))) == len(loader)
        assert sums.first_bad() is None
        rows.append(sums.means())
    return ended(method, rows, stepper.optimizer)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_recorded_steps_learn_what_eager_steps_learn(graphs: list[Any], name: str) -> None:
    """Three epochs with all speedups: weights, statistics, counters, momenta and the log's figures."""
    assert_close(recorded(made(name), Speedups(), loader()), eagerly(made(name)), 1e-3)
    assert graphs[-1].replays == (3 if name == "dkd" else 9)


def test_without_speedups_a_recorded_step_is_the_eager_one_to_the_bit(graphs: list[Any]) -> None:
    assert_close(recorded(made("kd"), PLAIN, loader()), eagerly(made("kd")), 0.0)


def test_no_autograd_node_of_another_stream_lives_when_a_step_is_captured(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of values that were put aside with their gradients: a GPU refuses to capture the backward pass then."""
    method, alive = made("kd"), []

    def step(self: RecordedSteps) -> None:
        nodes = [parameter.view_as(parameter).grad_fn for parameter in self._trained]
        accumulators = [node.next_functions[0][0] for node in nodes if node is not None]
        alive.extend("seen" in node.metadata for node in accumulators if node is not None)
        for node in accumulators:
            assert node is not None
            node.metadata["seen"] = True
        del nodes, accumulators, node

    monkeypatch.setattr(RecordedSteps, "_step", step)
    stepper = Stepper(method, recipe())
    stepper.start_epoch(1)
    next(RecordedSteps(method, stepper.optimizer, recipe(), loader(), PLAIN).epoch(0, 0, EpochSums(), rates(0)))
    assert alive
    assert not any(alive)


def test_what_cannot_be_recorded_is_trained_eagerly_and_says_so(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*_: Any) -> None:
        raise RuntimeError("no capture\nand much about it")

    monkeypatch.setattr(recording, "captured", captured)
    method, batches = made("cross-entropy"), loader()
    stepper, sums = Stepper(method, recipe()), EpochSums()
    with pytest.raises(RuntimeError, match="no capture"):
        next(RecordedSteps(method, stepper.optimizer, recipe(), batches, PLAIN).epoch(0, 0, sums, rates(0)))
    eager = EagerSteps(stepper, batches)
    steps = RecordedSteps(method, stepper.optimizer, recipe(), batches, PLAIN, otherwise=eager)
    rows = []
    for epoch in range(3):
        stepper.start_epoch(epoch + 1)
        sums = EpochSums()
        assert len(list(steps.epoch(epoch, 0, sums, rates(epoch)))) == 3
        rows.append(sums.means())
    assert steps.news()["failure"] == "no capture"
    assert_close(ended(method, rows, stepper.optimizer), eagerly(made("cross-entropy")), 0.0)


def test_a_weight_that_changes_is_recorded_anew_and_no_other(graphs: list[Any]) -> None:
    recorded(made("dkd"), PLAIN, loader(), epochs=6)  # its weight rises over 4 epochs
    assert [graph.replays for graph in graphs] == [3, 3, 3, 9]
    graphs.clear()
    recorded(made("kd"), PLAIN, loader(), epochs=3)
    assert [graph.replays for graph in graphs] == [9]


def test_weights_cast_once_are_autocasts(graphs: list[Any]) -> None:
    """In bfloat16 throughout: the same casts, made at another place."""
    plain = recorded(made("student"), PLAIN, loader(), epochs=1, amp=True)
    cast = Speedups(**{**vars(PLAIN), "cast_once": True})
    assert_close(recorded(made("student"), cast, loader(), epochs=1, amp=True), plain, 1e-6)


def test_batches_that_the_host_makes_are_copied_into_place(graphs: list[Any]) -> None:
    """Mixup draws on the host: the recorded step gets images and targets."""
    mixed = loader(mixing=Mixing(classes=CLASSES, mixup=0.2))
    method, rows = made("cross-entropy"), EpochSums()
    stepper = Stepper(method, recipe())
    stepper.start_epoch(1)
    steps = RecordedSteps(method, stepper.optimizer, recipe(), mixed, PLAIN)
    assert len(list(steps.epoch(0, 0, rows, rates(0)))) == 3
    other, sums = made("cross-entropy"), EpochSums()
    eager = Stepper(other, recipe())
    eager.start_epoch(1)
    for step, (x, y) in enumerate(mixed.epoch(0)):
        sums.add(eager.step(x, y, rates(0)[step]), y, step + 1)
    assert_close(dict(method.state_dict()), dict(other.state_dict()), 0.0)
    assert rows.means() == sums.means()


def test_an_epoch_goes_on_where_it_was_left(graphs: list[Any]) -> None:
    whole, parts = made("kd"), made("kd")
    stepper, sums = Stepper(whole, recipe()), EpochSums()
    stepper.start_epoch(1)
    list(RecordedSteps(whole, stepper.optimizer, recipe(), loader(), PLAIN).epoch(0, 0, sums, rates(0)))
    stepper, halves = Stepper(parts, recipe()), EpochSums()
    stepper.start_epoch(1)
    first = RecordedSteps(parts, stepper.optimizer, recipe(), loader(), PLAIN).epoch(0, 0, halves, rates(0))
    next(first)
    rest = RecordedSteps(parts, stepper.optimizer, recipe(), loader(), PLAIN)
    for state in stepper.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].clone()  # as a checkpoint gives them back
    assert len(list(rest.epoch(0, 1, halves, rates(0)))) == 2
    assert_close(dict(parts.state_dict()), dict(whole.state_dict()), 0.0)
    assert halves.means() == sums.means()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_compiled_passes_learn_what_eager_ones_learn() -> None:
    ours = recorded(made("student").cuda().double(), Speedups(compiled=True), loader("cuda"))
    theirs = eagerly(made("student").cuda().double())
    assert_close({key: ours[key].cpu() for key in ours}, {key: theirs[key].cpu() for key in theirs}, 1e-4)


def test_a_copy_that_gives_other_maps_is_not_used(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a fused kernel that cuDNN gets wrong: the plain folded copy stands in."""
    monkeypatch.setattr(ConvAddReLU, "forward", lambda self, x, z=None: torch.full_like(self.conv(x), torch.nan))
    assert_close(recorded(made("kd"), Speedups(), loader()), eagerly(made("kd")), 1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_folded_copy_gives_the_maps_and_logits_of_its_network(fused: bool) -> None:
    torch.manual_seed(0)
    network = shaken(CifarResNet(14, (4, 4, 8, 8), CLASSES)).double().eval()
    copy = folded_copy(network, torch.float64, fused)
    assert copy is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert sum(isinstance(module, ConvAddReLU) for module in copy.modules()) == (13 if fused else 0)
    x_NCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    (maps, logits_NK), (wanted, z_NK) = copy.maps_and_logits(x_NCHW), network.maps_and_logits(x_NCHW)
    for value, other in zip((*maps, logits_NK), (*wanted, z_NK), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


def test_a_learning_rate_on_the_device_is_the_number() -> None:
    ends = []
    for rate in (0.3, torch.tensor(0.3)):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            optimizer.param_groups[0]["lr"] = rate
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        ends.append(dict(layer.state_dict()))
    assert_close(*ends, 1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("speedups", [PLAIN, Speedups()], ids=["plain", "fast"])
def test_on_a_gpu_recorded_steps_learn_what_eager_steps_learn(name: str, speedups: Speedups) -> None:
    """In float64: nine steps make much of float32's rounding. Batch norm's statistics too: warm-ups leave no trace."""
    ours = recorded(made(name).cuda().double(), speedups, loader("cuda"))
    theirs = eagerly(made(name).cuda().double())
    assert_close({key: ours[key].cpu() for key in ours}, {key: theirs[key].cpu() for key in theirs}, 1e-4)
