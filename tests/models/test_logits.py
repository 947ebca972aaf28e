"""Probabilities and numbers that are not finite are none of a classifier's logits."""

import pytest
import torch
from torch import nn

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.errors import DivergenceError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.models.external import External
from rkd_deploy.models.foreign import check_classifier, check_logits
from rkd_deploy.train.evaluation import predictions
from tests.support.networks import Answering, GeM, Normalised

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Reshaped(nn.Module):
    """Softmax, and operations after it that change no value."""

    def forward(self, z_NK):
        return z_NK.unsqueeze(2).softmax(1).flatten(1).clone()


class Bounded(nn.Module):
    """Sigmoid, kept away from 0 and 1, as before a logarithm."""

    def forward(self, z_NK):
        return z_NK.sigmoid().clamp(1e-6, 1 - 1e-6)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (nn.Softmax(1), "softmax"),
        (nn.Softmin(1), "softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (Reshaped(), "softmax"),
        (Bounded(), "sigmoid"),
    ],
)
def test_a_network_that_ends_in_probabilities_is_refused(last, kind, tmp_path):
    network = Answering(4, last).eval()
    with pytest.raises(UsageError, match=rf"probabilities in place of logits: its last operation is a {kind}"):
        External(network, input_size=16)
    preprocess = Preprocess(height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UsageError, match=f"last operation is a {kind}"):
        export_bundle(network, ModelCard(name="x", labels=tuple("abcd"), preprocess=preprocess), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "last", [nn.Identity(), nn.LogSoftmax(1), nn.ReLU(), nn.Sequential(nn.Sigmoid(), nn.Linear(4, 4))]
)
def test_other_endings_are_logits(last):
    network = Answering(4, last).train()
    check_classifier(network, IMAGES, "the network")
    assert network.training
    with torch.no_grad():
        check_logits(network.eval()(IMAGES), "the network")


def test_untrained_answers_are_no_probabilities():
    for answer_NK in (torch.zeros(3, 4), torch.full((3, 4), 0.3), torch.ones(3, 1)):
        check_logits(answer_NK, "the network")


def test_rows_that_share_another_sum_than_one_are_probabilities_too():
    shares = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    with pytest.raises(UsageError, match=r"the network gives probabilities .* sums to 100\."):
        check_logits(100 * shares, "the network")
    check_logits(100 * shares + torch.rand(8, 1), "the network")  # logits may be positive
    check_logits(shares[:2] * 100, "the network")  # of two rows it may be chance


def test_probabilities_that_no_operation_shows_are_refused_before_training():
    with pytest.raises(UsageError, match=r"gives probabilities .* sums to 1\."):
        External(Answering(4, Normalised()).eval(), input_size=16)


def evaluated(network):
    split = Split(images_NCHW=torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), labels_N=torch.zeros(5).long())
    return predictions(network, split, Normaliser((0.5,) * 3, (0.5,) * 3, torch.device("cpu")), name="S + A")


def test_rows_that_sum_to_one_are_refused_where_they_are_evaluated():
    with pytest.raises(UsageError, match=r"^S \+ A gives probabilities .* sums to 1"):
        evaluated(Answering(4, Normalised()))


def test_a_head_that_is_not_defined_for_a_negative_sum_stops_the_evaluation():
    """GeM takes a root of the pooled map, as T's head under S + A does where the sum is negative."""
    network = External(GeM(4).eval(), input_size=16)
    evaluated(network)
    assert network.fc is not None
    head_of_negative = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Negative(), network.fc)
    with pytest.raises(
        DivergenceError, match=r'^S \+ A gives logits that are not finite, for 5 of the 5 images .*"trained"'
    ):
        evaluated(head_of_negative)


class Negative(nn.Module):
    def forward(self, v):
        return -v.abs().mean(1, keepdim=True).expand(-1, 64)
