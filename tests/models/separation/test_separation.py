from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_deploy.errors import BudgetError, UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.families.cifar_resnet import CifarResNet
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import Separation, separate
from rkd_deploy.models.separation.widths import widest

Widths = tuple[int, ...]
NARROW = (16, 16, 32, 64)


def wider(widths: Widths, full: Widths, round_to: int) -> list[Widths]:
    """Every way to widen one stage, by any number of steps."""
    return [
        (*widths[:stage], width, *widths[stage + 1 :])
        for stage in range(len(full))
        for width in steps(full[stage], round_to)
        if width > widths[stage]
    ]


def steps(full: int, round_to: int) -> list[int]:
    """The widths a stage may have: multiples of the step, and the given network's own width."""
    return [*range(round_to, full, round_to), full]


# The rows of the method notes' table that hold no width which one step more would still fit.
@pytest.mark.parametrize(
    ("name", "share", "assistant", "student", "of_budget"),
    [("resnet20", 0.1, (5, 5, 10, 19), (15, 15, 30, 61), 0.994)],
)
def test_the_row_of_the_method_notes(
    name: str, share: float, assistant: Widths, student: Widths, of_budget: float
) -> None:
    cut = separate(name, num_classes=100, input_size=32, assistant_share=share, round_to=1)
    assert (cut.assistant.widths, cut.student.widths) == (assistant, student)
    assert cut.budget == 40_818_944
    assert cut.cost / cut.budget == pytest.approx(of_budget, abs=5e-4)


# The other rows: a plain multiplier stops there, a step more in some stage fits.
@pytest.mark.parametrize(
    ("name", "share", "assistant", "of_budget"),
    [("resnet20", 0.3, (8, 8, 17, 34), 0.976), ("resnet8x4", 0.2, (14, 28, 55, 111), 0.995)],
)
def test_never_narrower_than_a_plain_multiplier(name: str, share: float, assistant: Widths, of_budget: float) -> None:
    cut = separate(name, num_classes=100, input_size=32, assistant_share=share, round_to=1)
    assert all(ours >= theirs for ours, theirs in zip(cut.assistant.widths, assistant, strict=True))
    assert of_budget - 5e-4 <= cut.cost / cut.budget <= 1


def check(cut: Separation, closed_form: Any, *, full: Widths, share: float, round_to: int, **how: Any) -> None:
    """Everything that is promised of a separation, with the costs in closed form."""
    depth, unit, classes, size, channels = (how[key] for key in ("depth", "unit", "classes", "size", "channels"))
    k = how.get("assistants", 1)
    assert [assistant.widths for assistant in cut.assistants] == [cut.assistant.widths] * k
    s, a = cut.student.widths, cut.assistant.widths

    def branch(widths: Widths) -> int:
        network = closed_form.network(unit, depth, widths, None, size)
        return int(network + closed_form.adapter(unit, widths[-1], channels, size))

    head = channels * classes + (classes if unit == "params" else 0)
    assert cut.unit == unit
    assert cut.budget == closed_form.network(unit, depth, full, classes, size)
    assert cut.parts == {
        "student": closed_form.network(unit, depth, s, None, size),
        "assistant": k * closed_form.network(unit, depth, a, None, size),
        "student_adapter": closed_form.adapter(unit, s[-1], channels, size),
        "assistant_adapter": k * closed_form.adapter(unit, a[-1], channels, size),
        "head": head,
    }
    assert cut.cost == branch(s) + k * branch(a) + head <= cut.budget
    assert k * branch(a) <= share * cut.budget
    for widths in (s, a):
        assert all(width in steps(width_of_s0, round_to) for width, width_of_s0 in zip(widths, full, strict=True))
    assert all(k * branch(widths) > share * cut.budget - k for widths in wider(a, full, round_to))
    assert all(k * branch(a) + branch(widths) + head > cut.budget for widths in wider(s, full, round_to))


@settings(max_examples=6)
@given(
    depth=st.sampled_from([8, 14]),
    full=st.sampled_from([NARROW, (32, 64, 64, 96), (8, 16, 16, 24)]),
    unit=st.sampled_from(["macs", "params"]),
    share=st.floats(0.05, 0.6),
    round_to=st.sampled_from([3, 4, 8, 10]),
    classes=st.integers(2, 100),
    size=st.sampled_from([(32, 32), (8, 8), (12, 20)]),
    channels=st.none() | st.sampled_from([16, 64, 256]),
    assistants=st.sampled_from([1, 1, 2, 3]),
)
def test_no_budget_is_exceeded_and_none_left_that_a_step_more_would_use(
    closed_form: Any,
    depth: int,
    full: Widths,
    unit: str,
    share: float,
    round_to: int,
    classes: int,
    size: tuple[int, int],
    channels: int | None,
    assistants: int,
) -> None:
    how: dict[str, Any] = {"num_classes": classes, "input_size": size, "budget": unit, "channels": channels}
    how["assistants"] = assistants
    given_network = CifarResNet(depth, full, classes)
    try:
        cut = separate(given_network, assistant_share=share, round_to=round_to, **how)
    except BudgetError:  # right only if the narrowest of one or the other are too dear
        narrowest = tuple(min(width, round_to) for width in full)
        c = channels or full[-1]
        branch = closed_form.network(unit, depth, narrowest, None, size)
        branch += closed_form.adapter(unit, narrowest[-1], c, size)
        budget = closed_form.network(unit, depth, full, classes, size)
        head = c * classes + (classes if unit == "params" else 0)
        assert assistants * branch > share * budget - assistants or branch + head > (1 - share) * budget
        return
    check(
        cut,
        closed_form,
        full=full,
        share=share,
        round_to=round_to,
        depth=depth,
        unit=unit,
        classes=classes,
        size=size,
        channels=channels or full[-1],
        assistants=assistants,
    )


def test_the_check_says_no_to_a_student_that_is_one_step_narrower(closed_form: Any) -> None:
    cut = separate("resnet8", num_classes=10, input_size=32, round_to=4)
    how = {"depth": 8, "unit": "macs", "classes": 10, "size": (32, 32), "channels": 64}
    check(cut, closed_form, full=NARROW, share=0.2, round_to=4, **how)
    widths = (*cut.student.widths[:-1], cut.student.widths[-1] - 4)
    with pytest.raises(AssertionError):
        check(separate_as(cut, widths, closed_form), closed_form, full=NARROW, share=0.2, round_to=4, **how)


def separate_as(cut: Separation, widths: Widths, closed_form: Any) -> Separation:
    """The same with another student, its account kept right: only its being the widest is lost."""
    parts = cut.parts | {
        "student": closed_form.macs(8, widths, None),
        "student_adapter": closed_form.adapter("macs", widths[-1], 64),
    }
    return Separation(
        student=cut.student.rebuilt(widths, None),
        assistants=cut.assistants,
        s0_widths=cut.s0_widths,
        cost=sum(parts.values()),
        budget=cut.budget,
        unit=cut.unit,
        level=cut.level,
        parts=parts,
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_account_is_that_of_the_network_that_ships(unit: str, k: int) -> None:
    """What the parts add up to is what counting the whole of S + A gives."""
    from rkd_deploy.models.cost import count

    how = {"assistant_share": 0.3, "assistants": k, "round_to": 4}
    cut = separate("resnet14", num_classes=10, input_size=32, budget=unit, channels=128, **how)
    cost = count(ResidualStudent(cut.student, cut.assistants, 128, 10), 32)
    assert (cost.macs if unit == "macs" else cost.parameters) == cut.cost


def test_a_network_and_its_name_are_the_same() -> None:
    by_name = separate("resnet8", num_classes=10, input_size=16)
    by_network = separate(zoo.create("resnet8", 10), num_classes=10, input_size=(16, 16))
    assert (by_name.parts, by_name.budget) == (by_network.parts, by_network.budget)
    assert by_name.student.fc is by_name.assistant.fc is None


def test_the_networks_are_ready_to_run_and_not_alike() -> None:
    cut = separate("resnet8", num_classes=10, input_size=16)
    with torch.no_grad():
        shapes = [network(torch.randn(2, 3, 16, 16)).shape for network in (cut.student, cut.assistant)]
    assert shapes == [(2, cut.student.channels), (2, cut.assistant.channels)]
    assert cut.assistant.channels < cut.student.channels


# The search alone, on prices that are cheap to compute.


def price_of(weights: tuple[int, ...]) -> Callable[[Widths], int]:
    """Rises with every width, as chains of convolutions do."""

    def price(widths: Widths) -> int:
        pairs = zip((3, *widths), (*widths, widths[-1]), weights, strict=True)
        return sum(before * after * weight for before, after, weight in pairs)

    return price


@given(
    full=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)),
    weights=st.tuples(*[st.integers(1, 20)] * 4),
    part=st.floats(0, 1.2),
    round_to=st.integers(1, 5),
)
@settings(max_examples=200)
def test_widest_is_maximal_among_all_that_fit(
    full: Widths, weights: tuple[int, ...], part: float, round_to: int
) -> None:
    price = price_of(weights)
    limit = int(part * price(full))
    everything = list(itertools.product(*(steps(width, round_to) for width in full)))
    fitting = [widths for widths in everything if price(widths) <= limit]
    best = widest(price, full, limit, round_to)
    if best is None:
        assert fitting == []
        return
    assert best in fitting
    larger = [widths for widths in fitting if widths != best and all(map(int.__ge__, widths, best))]
    assert larger == []
    # At least as wide, stage by stage, as the plain multiplier m in 1/1024 that is the largest to fit.
    multiples = [tuple(min(w, max(round_to, m * w // (1024 * round_to) * round_to)) for w in full) for m in range(1025)]
    plain = [widths for widths in multiples if price(widths) <= limit][-1]
    assert all(map(int.__ge__, best, plain))


def test_the_whole_budget_gives_the_whole_network() -> None:
    price = price_of((1, 1, 1, 1, 1))
    assert widest(price, NARROW, price(NARROW), 8) == NARROW
    assert widest(price, NARROW, price(NARROW) - 1, 8) != NARROW


def test_the_relatively_narrowest_stage_is_widened_first() -> None:
    # A step costs 1. The multiplier 2/3 gives (2, 1, 1), which are 2/3, 1/2 and 1/2 of (3, 2, 2); one step is left.
    assert widest(sum, (3, 2, 2), 5, 1) == (2, 2, 1)


# Budgets that are too small


def test_a_budget_too_small_for_the_assistant_is_stated_in_numbers(closed_form: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        separate("resnet8", num_classes=10, input_size=32, assistant_share=0.02, round_to=8)
    limit = closed_form.macs(8, NARROW, 10)
    branch = closed_form.macs(8, (8, 8, 8, 8), None) + closed_form.adapter("macs", 8, 64)
    message = str(caught.value)
    assert message.startswith("The budget is too small for the assistant alone")
    assert re.findall(r"[\d,]{4,}\d", message) == [f"{n:,}" for n in (limit, limit // 50, branch, branch + 640)]
    assert "(8, 8, 8, 8)" in message
    assert "Lower student.round_to" in message


def test_a_chain_that_is_too_long_is_stated_with_the_share_of_each(closed_form: Any) -> None:
    with pytest.raises(BudgetError, match=r"gives each of 9 assistants [\d,]+;.*Lower .* or student\.assistants"):
        separate("resnet8", num_classes=10, input_size=32, assistants=9)
    with pytest.raises(UsageError, match="assistants = 0 must be at least 1"):
        separate("resnet8", num_classes=10, input_size=32, assistants=0)


def test_a_budget_too_small_for_what_is_left_is_stated(closed_form: Any) -> None:
    with pytest.raises(BudgetError, match=r"^The budget is too small for the student with what the assistant left"):
        separate("resnet8", num_classes=10, input_size=32, assistant_share=0.9, round_to=16)


def test_adapters_to_a_wide_teacher_can_be_too_dear() -> None:
    with pytest.raises(BudgetError):
        separate("resnet8", num_classes=10, input_size=32, channels=100_000)
    assert separate("resnet8", num_classes=10, input_size=32, channels=256).cost > 0


@pytest.mark.parametrize(
    ("model", "budget", "message"),
    [
        ("resnet9", "macs", r"Unknown network 'resnet9'\. Did you mean"),
        ("resnet8", "flops", r"Unknown budget 'flops'\..*Choices: latency, macs, params"),
        ("resnet8", "latency", r"budget = 'latency' and a stopwatch is not given"),
    ],
)
def test_unknown_names_are_refused(model: str, budget: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        separate(model, num_classes=10, input_size=32, budget=budget)
