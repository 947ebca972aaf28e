"""Costs of others' networks, against the numbers that torchvision publishes."""

import pytest
import torch
import torchvision

from rkd_deploy.models.cost import count

NAMES = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
)


@pytest.mark.parametrize("name", NAMES)
def test_macs_and_parameters_are_those_that_torchvision_publishes(name):
    meta = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    with torch.device("meta" if name != "regnet_y_400mf" else "cpu"):  # that one computes its widths with tensors
        network = torchvision.models.get_model(name)
    cost = count(network, 224)
    assert cost.parameters == meta["num_params"]
    assert cost.macs / 1e9 == pytest.approx(meta["_ops"], abs=0.0006), cost  # published to three places
    assert cost.unsupported == ()
