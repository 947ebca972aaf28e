"""Networks of the kinds that people bring: each is cut into S and A and fused, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.nn.utils import parametrizations

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import BudgetError, DivergenceError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.fusion import fuse
from rkd_deploy.models.cost import count
from rkd_deploy.models.external import External
from rkd_deploy.models.foreign import check_real, plain, with_current_norms
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import Separation, separate
from tests.support.networks import ConcatPooled, GeM, Hidden, Lazy, Loose, Shared, Tutorial, Wrapped, body

SIZE, K = (32, 48), 5


def network(*middle: nn.Module, head: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    """A stem of 32 channels, layers of 32 channels, a stage of 64 channels, and a head."""
    ends = head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, K))
    first = (nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(*first, *middle, nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), *ends)


class Wrapping(nn.Module):
    """A network, and what is done to its images or to its answer."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.network, self.before = network(), before

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.before(x))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActiveNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ActiveInstanceNorm(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.fc = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Linear(32, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(3):
            x = self.again(x).relu() + x
        return self.fc(x.mean((2, 3)))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.one, self.other = network()[:6], nn.Linear(64, K), nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        v = self.features(x).mean((2, 3))
        return self.one(v) + self.other(v)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = network()[:6], nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        return linear(normalize(self.features(x).mean((2, 3))), normalize(self.fc.weight))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network(nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1))
        self.network[4].weight = self.network[3].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).squeeze()


class Pooling(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


def parametrised(change: Callable[[nn.Module], Any], *places: int) -> nn.Module:
    made = network()
    for place in places:
        change(made[place])
    return made


def chooses_by_value(x: Tensor) -> Tensor:
    return 2 * x if x.mean() > 100 else x


# The kind of head: whether the logits are a function of the pooled last map.
POOLED, OTHER = True, False
SEPARATES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "no batch norm": (lambda: torchvision.models.alexnet(num_classes=K), OTHER),
    "instance norm without weights": (lambda: network(nn.InstanceNorm2d(32)), POOLED),
    "group norm without weights": (lambda: network(nn.GroupNorm(4, 32, affine=False)), POOLED),
    "layer norm over channels": (lambda: network(ChannelNorm(32)), POOLED),
    "subclass of batch norm": (lambda: network(ActiveNorm(32)), POOLED),
    "subclass of instance norm": (lambda: network(ActiveInstanceNorm(32, affine=True)), POOLED),
    "squeeze and excitation": (lambda: network(SqueezeExcite()), POOLED),
    "depthwise": (lambda: network(nn.Conv2d(32, 32, 3, 1, 1, groups=32)), POOLED),
    "two outputs for each input": (
        lambda: network(nn.Conv2d(32, 64, 3, 1, 1, groups=32), nn.Conv2d(64, 32, 1)),
        POOLED,
    ),
    "grouped": (lambda: network(nn.Conv2d(32, 32, 3, 1, 1, groups=4)), POOLED),
    "one slope for all": (lambda: network(nn.PReLU()), POOLED),
    "a slope for each": (lambda: network(nn.PReLU(32)), POOLED),
    "a layer called three times": (Repeated, POOLED),
    "two heads": (TwoHeads, POOLED),
    "a tensor of the forward pass": (
        lambda: Wrapping(lambda x: x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]),
        POOLED,
    ),
    "weight norm": (lambda: parametrised(parametrizations.weight_norm, 0, 3), POOLED),
    "spectral norm": (lambda: parametrised(parametrizations.spectral_norm, 3), POOLED),
    "half": (lambda: network().half(), POOLED),
    "bfloat16": (lambda: network().bfloat16(), POOLED),
    "double": (lambda: network().double(), POOLED),
    "a convolution classifies": (
        lambda: network(head=(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, K, 1), nn.Flatten())),
        POOLED,
    ),
    "the largest of a map": (lambda: network(head=(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, K))), OTHER),
    "a root of the mean": (lambda: network(head=(Pooling(lambda x: x.mean((2, 3)).sqrt()), nn.Linear(64, K))), POOLED),
    "a child called network": (lambda: Wrapped(K), POOLED),
    "largest values beside means": (lambda: ConcatPooled(K), OTHER),
    "log-softmax": (lambda: network(head=(*network()[6:], nn.LogSoftmax(1))), POOLED),
    "flattened, a hidden layer": (
        lambda: network(head=(nn.Flatten(), nn.Linear(64 * 8 * 12, 20), nn.ReLU(), nn.Linear(20, K))),
        OTHER,
    ),
}


def cut(model: nn.Module, size: tuple[int, int] = SIZE, **settings: Any) -> tuple[External, Separation]:
    s0 = External(model, input_size=size)
    return s0, separate(s0, num_classes=K, input_size=size, **settings)


@pytest.mark.parametrize("name", SEPARATES)
@torch.no_grad()
def test_it_separates(name: str) -> None:
    make, pooled = SEPARATES[name]
    size = (64, 64) if name == "no batch norm" else SIZE
    s0, separation = cut(make(), size)
    assert (s0.fc is not None) is pooled or name == "no batch norm"
    model = ResidualStudent(separation.student, separation.assistants, s0.channels, K).eval()
    nn.init.ones_(model.assistant_adapters[0].norm.weight)  # silent before it is trained
    x = torch.randn(2, 3, *size)
    z = model(x)
    assert z.shape == (2, K)
    assert z.dtype == torch.float32
    assert count(model, size).macs == separation.cost <= separation.budget
    torch.testing.assert_close(fuse(model, "tail").eval()(x), z, rtol=0, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch statistics": (
        lambda: network(nn.BatchNorm2d(32, track_running_stats=False)),
        "answers the same image in another way when it is alone.*track_running_stats",
    ),
    "random numbers": (lambda: Wrapping(lambda x: x + torch.rand_like(x)), "draws random numbers in evaluation too"),
    "a dimension too many dropped": (
        lambda: network(head=(Drops(), nn.Linear(64, K))),
        r"\(5,\) for one image.*flatten",
    ),
    "one weight of two layers": (Tied, "network.3.weight and network.4.weight are one weight of two layers"),
    "a head that reads weights": (Cosine, "its forward reads the weights of some itself"),
    "a way chosen by values": (lambda: Wrapping(chooses_by_value), "reads a value of a map, and chooses its way by it"),
    "a weight of no layer": (lambda: Loose(K), r"multiply-adds only [\d,]+ are in nn\.Conv2d and nn\.Linear layers"),
    "logits that are not finite": (
        lambda: network(head=(Pooling(lambda x: (x.mean((2, 3)) - 100).sqrt()), nn.Linear(64, K))),
        "gives logits that are not finite, for 2 of the 2 images",
    ),
    "images of one channel": (
        lambda: nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), *list(network())[1:]),
        r"does not run on RGB images of 32 x 48 pixels: Given groups=1[^\n]*\. Give it images of the size",
    ),
    "transposed convolution": (
        lambda: network(nn.ConvTranspose2d(32, 32, 2, 2)),
        r"^S0 cannot be narrowed: layer 3 is a ConvTranspose2d, whose channels cannot be removed\. Give another S0: a "
        r"convolutional network\. Any network can be the teacher\.$",
    ),
    "softmax": (lambda: network(head=(*network()[6:], nn.Softmax(1))), "probabilities in place of logits"),
    "sigmoid": (lambda: network(head=(*network()[6:], nn.Sigmoid())), "probabilities in place of logits"),
    "split attention": (
        lambda: timm.create_model("resnest14d", num_classes=K),
        "a map of 128 channels is seen as 2 times 64, and not to shuffle them",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises((UsageError, DivergenceError), match=reason):
        cut(make())


@pytest.mark.parametrize(("make", "advice"), [(Tutorial, "round_to to 4 with"), (Hidden, "")])
def test_a_flattened_map_leaves_no_head_and_the_advice_works(make: Callable[[int], nn.Module], advice: str) -> None:
    """Heads that take a flattened map are no function of the pooled one."""
    network = make(K)
    with pytest.raises(BudgetError) as caught:
        cut(network, (32, 32))
    message = str(caught.value)
    assert advice in message
    share = float(message.partition("student.assistant_share = ")[2].partition(",")[0])
    s0, separation = cut(network, (32, 32), assistant_share=share, round_to=4 if advice else 8)
    assert s0.fc is None
    assert separation.cost <= separation.budget == count(network, 32).macs


def test_a_layer_that_waits_for_its_first_images_takes_the_shape_of_those_given() -> None:
    """Stages are looked for on enlarged images too, which once came first and gave the layer their shape."""
    s0 = External(Lazy(K), input_size=(32, 32))
    assert s0.num_classes == K
    assert s0.network.fc.weight.shape == (K, 32 * 8 * 8)


def test_no_advice_is_given_where_nothing_helps() -> None:
    with pytest.raises(BudgetError, match=r"No student\.assistant_share and no student\.round_to makes room"):
        separate("resnet8", num_classes=10, input_size=32, channels=1_000_000)


def card(**more: Any) -> ModelCard:
    preprocess = Preprocess(height=SIZE[0], width=SIZE[1], mean=(0.5,) * 3, std=(0.5,) * 3)
    return ModelCard(name="x", labels=tuple("abcde"), preprocess=preprocess, part="s0", **more)


@pytest.mark.parametrize("name", ["weight norm", "half", "a tensor of the forward pass", "flattened, a hidden layer"])
def test_it_is_exported(name: str, tmp_path: Any) -> None:
    """Parity with PyTorch within 1e-4 is the gate's."""
    model = SEPARATES[name][0]().eval()
    before = copy.deepcopy(model.state_dict())
    proof = export_bundle(External(model, input_size=SIZE), card(), tmp_path / "bundle")
    assert proof.parity.max_abs_diff < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_blocks_are_exported(tmp_path: Any) -> None:
    torch.manual_seed(0)
    proof = export_bundle(External(Shared(K).eval(), input_size=SIZE), card(), tmp_path / "bundle")
    assert proof.parity.max_abs_diff < 1e-4


def test_answers_that_hang_on_the_batch_are_not_exported(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="in another way when it is alone"):
        export_bundle(REFUSED["batch statistics"][0]().eval(), card(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_plain_weights_are_those_that_the_layers_use() -> None:
    model = SEPARATES["weight norm"][0]().double().eval()
    x = torch.randn(2, 3, *SIZE)
    expected = model(x.double())
    made = plain(model)
    torch.testing.assert_close(made(x).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x.double()), expected)  # the original is as it was
    assert {key for key in made.state_dict() if "parametriz" in key} == set()
    assert plain(network()[0]).weight.dtype == torch.float32
    unchanged = network()
    assert plain(unchanged) is unchanged


@torch.no_grad()
def test_the_deprecated_hook_becomes_a_parametrisation_of_the_same_value() -> None:
    model = network().eval()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model[3])
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, *SIZE)
    expected = model(x)
    made = with_current_norms(model, "the network")
    torch.testing.assert_close(made(x), expected)
    made[3].parametrizations.weight.original0.zero_()
    made.load_state_dict(state)
    torch.testing.assert_close(copy.deepcopy(made)(x), expected)
    nn.utils.spectral_norm(model[0])
    with pytest.raises(UsageError, match=r"layer 0 has the hook of torch\.nn\.utils\.spectral_norm"):
        with_current_norms(model, "the network")


def test_complex_weights_are_refused() -> None:
    model = network()
    model[0].register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(UsageError, match=r"the network has complex weights \(0\.phase, torch\.complex64\)"):
        check_real(model, "the network")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_subclass_of_batch_norm_learns_as_it_does_alone(momentum: float | None) -> None:
    torch.manual_seed(0)
    alone = nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, K))
    alone[1] = ActiveNorm(16, momentum=momentum)
    seen = External(copy.deepcopy(alone), input_size=SIZE).train()
    x = torch.randn(4, 3, *SIZE)
    for _ in range(2):
        torch.testing.assert_close(seen.maps_and_logits(x)[1], alone.train()(x))
    torch.testing.assert_close(seen.network[1].running_mean, alone[1].running_mean)
    torch.testing.assert_close(seen.network[1].running_var, alone[1].running_var)


def test_one_class_and_frozen_weights_stay_what_they_are() -> None:
    model = network(head=(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))).requires_grad_(False)
    s0 = External(model, input_size=SIZE)
    assert s0.num_classes == 1
    separation = separate(s0, num_classes=1, input_size=SIZE)
    assert separation.cost <= separation.budget
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gem_under_a_head_of_its_own_has_a_sign() -> None:
    head = External(GeM(K), input_size=SIZE).fc
    assert head is not None
    assert not head(-torch.ones(1, 64)).isfinite().any()
