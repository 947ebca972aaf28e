from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2

from rkd_deploy.data.augment import Mixing, cutmix, draw_box, hard_labels, mixup, smoothed

K = 7


def batch(count: int = 5, size: tuple[int, int] = (6, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, *size), torch.randint(0, K, (count,))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_is_torchvisions(share: float) -> None:
    x, y = batch()
    params = {"labels": y, "batch_size": len(y), "lam": share}
    theirs = v2.MixUp(num_classes=K)
    torch.testing.assert_close(mixup(x, x.roll(1, 0), share), theirs.transform(x, params))
    targets = smoothed(y, K, 0)
    torch.testing.assert_close(mixup(targets, targets.roll(1, 0), share), theirs.transform(y, params))


def test_cutmix_is_torchvisions() -> None:
    x, y = batch()
    box = draw_box(0.4, (6, 8), np.random.default_rng(3))
    pasted, share = cutmix(x, x.roll(1, 0), box)
    params = {
        "labels": y,
        "batch_size": len(y),
        "box": (box.left, box.top, box.right, box.bottom),
        "lam_adjusted": 1 - (box.right - box.left) * (box.bottom - box.top) / 48,
    }
    theirs = v2.CutMix(num_classes=K)
    assert torch.equal(pasted, theirs.transform(x, params))
    targets = smoothed(y, K, 0)
    torch.testing.assert_close(mixup(targets, targets.roll(1, 0), share), theirs.transform(y, params))
    assert 0 < share < 1


def test_boxes_have_the_area_and_aspect_they_are_drawn_for() -> None:
    random = np.random.default_rng(0)
    boxes = [draw_box(0.75, (64, 32), random) for _ in range(500)]
    assert all(0 <= b.top <= b.bottom <= 64 and 0 <= b.left <= b.right <= 32 for b in boxes)
    whole = [b for b in boxes if b.top > 0 and b.left > 0 and b.bottom < 64 and b.right < 32]
    assert {(b.bottom - b.top, b.right - b.left) for b in whole} == {(32, 16)}  # a quarter of the area, half the sides
    assert len(whole) < 500  # some were cut off at the edge


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_smoothed_targets_give_pytorchs_smoothed_loss(epsilon: float) -> None:
    z, y = torch.randn(5, K, dtype=torch.float64), torch.randint(0, K, (5,))
    ours = cross_entropy(z, smoothed(y, K, epsilon).double())
    torch.testing.assert_close(ours, cross_entropy(z, y, label_smoothing=epsilon), rtol=1e-6, atol=1e-6)


def test_nothing_to_do_leaves_labels_as_they_are() -> None:
    x, y = batch()
    same_x, same_y = Mixing(classes=K)(x, y, np.random.default_rng(0))
    assert same_x is x
    assert same_y is y


@pytest.mark.parametrize("how", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_mixed_batch_is_made_of_each_image_and_the_one_before_it(how: dict[str, float]) -> None:
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    for seed in range(8):
        mixed, targets = Mixing(classes=K, **how)(x, y, np.random.default_rng(seed))
        assert mixed.shape == (5, 3, 8, 8)
        share_N = targets[torch.arange(5), y[1:]]
        assert torch.allclose(targets.sum(1), torch.ones(5))
        wanted = share_N[:, None] * one_hot(y[1:], K) + (1 - share_N[:, None]) * one_hot(y[:-1], K)
        torch.testing.assert_close(targets, wanted)
        unmixed = torch.isclose(mixed, x[1:], atol=1e-6).float().mean()
        blended = torch.isclose(mixed, share_N[0] * x[1:] + (1 - share_N[0]) * x[:-1], atol=1e-5).all()
        pasted = (torch.isclose(mixed, x[1:]) | torch.isclose(mixed, x[:-1])).all()
        assert blended or (pasted and abs(unmixed - share_N[0]) < 1e-5)


def test_both_occur_where_both_are_on_and_lambda_is_of_the_beta_distribution() -> None:
    mixing, x, y = Mixing(classes=2, mixup=0.3, cutmix=1.0), torch.zeros(2, 1, 40, 40), torch.tensor([0, 1])
    x[1] = 1
    shares, cuts = [], 0
    for seed in range(400):
        mixed, targets = mixing(x, y, np.random.default_rng(seed))
        if bool(((mixed == 0) | (mixed == 1)).all()) and 0 < targets[0, 1] < 1:
            cuts += 1
        else:
            shares.append(targets[0, 1].item())
    assert 150 < cuts < 250
    wanted = np.random.default_rng(1).beta(0.3, 0.3, 100_000)
    assert abs(np.mean(shares) - 0.5) < 0.1
    assert abs(np.std(shares) - wanted.std()) < 0.05


def test_the_class_of_a_target_is_its_largest() -> None:
    y = torch.tensor([2, 0, 1])
    assert torch.equal(hard_labels(y), y)
    assert torch.equal(hard_labels(smoothed(y, 3, 0.2)), y)
