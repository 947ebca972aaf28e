"""What ONNX has no words for is named with the path of its module, and nothing is left behind."""

import pytest
import torch
from torch import nn

from rkd_deploy.errors import ExportError
from rkd_deploy.export.bundle import export_bundle


class Bessel(nn.Module):
    def forward(self, x_NCHW):
        return torch.special.bessel_j0(x_NCHW)


class Choosing(nn.Module):
    def forward(self, x_NCHW):
        return x_NCHW if x_NCHW.sum() > 0 else -x_NCHW


class Foreign(nn.Module):
    """A classifier that is none of ours, with something odd deep inside."""

    def __init__(self, *odd):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), layer) for layer in odd)
        self.fc = nn.Linear(4, 5)

    def forward(self, x_NCHW):
        x_NCHW = self.stem(x_NCHW)
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        return self.fc(x_NCHW.mean((2, 3)))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (
            (nn.ReLU(), Bessel()),
            r"no operator for aten\.special_bessel_j0\.default, which is in blocks\.1\.1 \(Bessel\)\. Replace it",
        ),
        ((nn.ReLU(), Choosing()), r"cannot be traced in blocks\.1\.1 \(Choosing\): .*torch\.where"),
    ],
    ids=["operator", "choice by value"],
)
def test_an_operation_that_cannot_be_exported_is_named_with_its_module(card, tmp_path, odd, words):
    with pytest.raises(ExportError, match=words) as caught:
        export_bundle(Foreign(*odd).eval(), card, tmp_path / "bundle")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
