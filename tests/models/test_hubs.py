"""Networks by name, torchvision's, timm's, a user's; published weights without internet."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from rkd_deploy.errors import CheckpointError, UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.external import External

OWN = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(self.stem(x).relu().mean((2, 3)))

def three():
    return Small(3)

def any_number(**settings):
    return Small(**settings)

trained = Small()
table = {"a": 1}
def words(num_classes):
    return "none"
class Nested:
    net = trained
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "my_nets"
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize(("name", "type_"), [("tv:resnet18", "ResNet"), ("timm:resnet10t", "ResNet")])
def test_by_name(name, type_):
    network = zoo.create(name, 6, input_size=32)
    assert isinstance(network, External)
    assert (type(network.network).__name__, network.num_classes) == (type_, 6)
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tv:resnet19", UsageError, "Unknown classifier 'resnet19' of torchvision. Near it"),
        ("timm:resnet19", UsageError, "Unknown classifier 'resnet19' of timm. Near it"),
        ("timm:resnet18.mine", CheckpointError, r"no weights timm:resnet18\.mine: Invalid pretrained tag"),
        ("timm:resnet19q", UsageError, "Unknown classifier"),
    ],
)
def test_a_normalisation_that_nobody_published(name, error, words):
    with pytest.raises(error, match=words):
        zoo.published_normalisation(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:system", "could not be called: TypeError"),
        ("..:net", r"No network '\.\.:net': TypeError"),
        ("broken_nets:net", "No network 'broken_nets:net': SyntaxError"),
    ],
)
def test_what_a_user_s_own_code_raises_is_one_error(name, words, tmp_path, monkeypatch):
    (tmp_path / "broken_nets.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        zoo.build(name, 3, (32, 32))


def test_transformers_are_built_for_the_size_of_the_images():
    assert zoo.build("tv:vit_b_32", 4, (64, 64)).image_size == 64
    assert zoo.build("timm:vit_tiny_patch16_224", 4, (64, 64)).patch_embed.grid_size == (4, 4)
    with pytest.raises(UsageError, match="square images; these have 32 x 64"):
        zoo.build("timm:vit_tiny_patch16_224", 4, (32, 64))


def test_auxiliary_classifiers_are_left_out():
    network = zoo.create("tv:googlenet", 5, input_size=64).train()
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(("attribute", "classes"), [("Small", 5), ("any_number", 5), ("three", 3), ("trained", 3)])
def test_a_users_own(users_module, attribute, classes):
    path = list(sys.path)
    network = zoo.create(f"{users_module}:{attribute}", classes, input_size=8)
    assert network.num_classes == classes
    assert sys.path == path


def test_a_module_is_copied_with_its_weights(users_module):
    first, other = (zoo.create(f"{users_module}:Nested.net", 3, input_size=8).network for _ in range(2))
    trained = sys.modules[users_module].trained
    assert torch.equal(first.fc.weight, trained.fc.weight)
    assert len({first.fc.weight.data_ptr(), other.fc.weight.data_ptr(), trained.fc.weight.data_ptr()}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet2O", "Unknown network 'resnet2O'. Did you mean.*tv:NAME"),
        ("tv:resnet19", "Unknown classifier 'resnet19' of torchvision. Near it, of .*resnet18"),
        ("timm:regnety_005", "Unknown classifier 'regnety_005' of timm. Near it, of .*regnety_00"),
        ("no_such_module:net", "No network 'no_such_module:net': No module named.*current directory"),
        ("my_nets:missing", "No network 'my_nets:missing': .*has no attribute 'missing'"),
        ("my_nets:table", "my_nets:table is of type dict. Name an nn.Module"),
        ("my_nets:words", "my_nets:words gave an object of type str"),
        ("my_nets:three", "my_nets:three gives 3 logits; the data have 5 classes"),
        (":net", "No network"),
    ],
)
def test_other_names_are_refused(users_module, name, message):
    with pytest.raises(UsageError, match=message):
        zoo.create(name, 5, input_size=8)


def test_stages_of_a_family_are_refused():
    with pytest.raises(UsageError, match="those of resnet20 are given"):
        zoo.create("resnet20", 5, stages=["layer1"])


@pytest.mark.parametrize("classes", [5, 1000])
def test_published_weights_but_for_another_classifier(monkeypatch, tmp_path, classes):
    """torchvision finds a file where it would have downloaded it to: all else is its own code and ours."""
    source = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(source, cached)

    network = zoo.build("tv:squeezenet1_1", classes, (32, 32))
    weights = zoo.published("tv:squeezenet1_1", network)
    assert weights.complete is (classes == 1000)
    assert (weights.mean, weights.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    left_out = source.keys() - weights.state.keys()
    assert left_out == ({"classifier.1.weight", "classifier.1.bias"} if classes == 5 else set())
    assert all(torch.equal(value, source[key]) for key, value in weights.state.items())


def test_without_internet_the_way_out_is_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    network = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"tv:squeezenet1_1 could not be fetched: no route.*checkpoint = PATH"):
        zoo.published("tv:squeezenet1_1", network)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match="timm:resnet10t could not be fetched"):
        zoo.published("timm:resnet10t", network)
