"""fused(x) = h(GAP(P_S f_S + P_A f_A)), against the formula written out here with einsum, in float64."""

import pytest
import torch
from torch import nn

from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import LEVELS, FoldedTail, fuse
from rkd_deploy.models.residual import StudentAlone
from tests.support.adapters import adapted


def formula(model, x, assistants=None):
    total = 0
    pairs = [*zip(model.assistants, model.assistant_adapters, strict=True)][:assistants]
    for branch, P in [(model.student, model.student_adapter), *pairs]:
        total = total + adapted(P, branch.features(x)[-1])
    return torch.einsum("kt,nt->nk", model.head.weight, total.mean((2, 3))) + model.head.bias


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_the_formula_in_float64(chain, level):
    model = chain.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = formula(model, x)
    assert expected.abs().max() > 0.1  # a comparison with zeros would prove nothing
    assert (expected - formula(model, x, len(model.assistants) - 1)).abs().max() > 1e-3  # the last one does matter
    torch.testing.assert_close(fuse(model, level)(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
def test_the_student_alone_is_the_formula_without_the_assistant(model, level):
    model = model.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = formula(model, x, assistants=0)
    torch.testing.assert_close(fuse(StudentAlone(model), level)(x), expected, rtol=0, atol=1e-10)
    assert (expected - formula(model, x)).abs().max() > 1e-3  # the assistant does matter


def test_a_plain_classifier_keeps_its_value(classifier):
    classifier = classifier.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fuse(classifier)(x), classifier(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
def test_no_batch_norm_is_left(model, level):
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fuse(model, level).modules())


def test_tail_is_one_matrix_on_the_pooled_maps(model):
    fused = fuse(model, "tail")
    assert isinstance(fused, FoldedTail)
    assert tuple(fused.head.weight.shape) == (5, 24 + 8)
    W, U_S = model.head.weight, model.student_adapter.folded().weight[:, :, 0, 0]
    torch.testing.assert_close(fused.head.weight[:, :24], W @ U_S)


def test_the_given_model_is_left_as_it_is(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for level in LEVELS:
        fuse(model, level)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_unknown_level_names_the_choices(model):
    with pytest.raises(UsageError, match=r"fusion level 'tial'.*Did you mean 'tail'"):
        fuse(model, "tial")
