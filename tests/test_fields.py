"""Fields that a command line sets: their rule for numbers and choices, and the options made of them."""

import math
from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from rkd_deploy.cli import app
from rkd_deploy.commands.settings import SettingsCommand, SettingsOptions, changed_options, with_settings
from rkd_deploy.errors import UsageError
from rkd_deploy.fields import changed_flags, check_fields, check_number, option


@dataclass(frozen=True, kw_only=True)
class Oven:
    """Settings of one's own, with every kind of field."""

    degrees: float = option("--degrees", "How hot.", default=180.0, low=0, high=300)
    trays: tuple[int, ...] = option(
        "--tray", "Where.", default=(2,), reads=list[str], parse=lambda texts: tuple(map(int, texts))
    )
    grams: int | None = option("--kilograms", "How much.", default=None, reads=int, parse=lambda kg: 1000 * kg, low=1)
    mode: str = option("--mode", "Grill or bake.", default="bake", choices=("bake", "grill"))
    light: bool = option("--light", "Whether.", default=False)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("value", "low", "high", "whole", "rule"),
    [
        (math.nan, 0, None, False, "at least 0"),
        (math.inf, 0, None, False, "at least 0"),
        (math.nan, None, None, False, "finite"),
        (-math.inf, None, 3, False, "between -inf and 3"),
        (301, 0, 300, False, "between 0 and 300"),
        (1.0, 0, 3, True, "a whole number between 0 and 3"),
        (True, 0, 3, True, "a whole number between 0 and 3"),
        ("2", 0, 3, True, "a whole number between 0 and 3"),
        (-1, 0, None, True, "a whole number at least 0"),
    ],
)
def test_a_number_outside_of_its_range_is_refused_with_the_range(value, low, high, whole, rule):
    with pytest.raises(UsageError) as refused:
        check_number("--x", value, low, high, whole=whole)
    assert str(refused.value) == f"--x {value} must be {rule}."


@pytest.mark.parametrize(("value", "low", "high"), [(0, 0, 3), (3, 0, 3), (2.5, 0, 3), (10**30, 0, None)])
def test_a_number_within_its_range_passes(value, low, high):
    check_number("--x", value, low, high)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"degrees": math.nan}, "--degrees nan must be between 0 and 300."),
        ({"grams": 0}, "--kilograms: grams = 0 must be a whole number at least 1."),  # not the unit that is typed
        ({"mode": "fry"}, "Unknown --mode 'fry'. Choices: bake, grill."),
    ],
)
def test_a_field_is_held_to_its_rule_and_called_by_its_option(given, message):
    with pytest.raises(UsageError) as refused:
        Oven(**given)
    assert str(refused.value) == message


def test_fields_that_differ_from_their_defaults_are_called_by_their_options():
    assert changed_flags(Oven()) == []
    assert changed_flags(Oven(grams=5, degrees=180.0, light=True)) == ["--kilograms", "--light"]
    assert changed_flags(Oven(grams=5, light=True), "light", "mode") == ["--light"]


def parsed(*arguments: str) -> tuple[Oven, dict[str, str | None]]:
    """What a command of these options is called with."""
    heard: list[tuple[Oven, dict[str, str | None]]] = []

    @with_settings(lambda: {"oven": (Oven, "Oven")})
    def bake(context: typer.Context, oven: SettingsOptions[Oven], quick: bool = False) -> None:
        heard.append((oven.make(), changed_options(context)))

    program = typer.Typer()
    program.command(cls=SettingsCommand)(bake)
    outcome = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return heard[0]


def test_a_command_has_an_option_for_each_field():
    assert parsed() == (Oven(), {})
    typed = ("--degrees", "200", "--tray", "1", "--tray", "3", "--kilograms", "2", "--mode", "bake", "--quick")
    settings, changed = parsed(*typed)
    assert settings == Oven(degrees=200.0, trays=(1, 3), grams=2000)
    assert changed == {"--degrees": "Oven", "--tray": "Oven", "--kilograms": "Oven", "--quick": None}


def test_the_options_of_export_stand_in_panels_by_format():
    shown = CliRunner().invoke(app, ["export", "--help"]).output
    sections = dict(part.split(":\n", 1) for part in shown.split("\n\n") if ":\n" in part)
    where = {"--fuse": "bundle", "--batch": "--fuse auto", "--keep": "Precision", "--workspace": "Engine"}
    for option_name, title in {**where, "--queue-delay": "Model repository", "--format": "Options"}.items():
        (section,) = (name for name, text in sections.items() if f"  {option_name} " in text)
        assert title in section


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workspace", "5", "--tf32"], "builds no engine, and has no use for --tf32, --workspace."),
        (["--format", "triton", "--profile", "4"], "builds no engine, and has no use for --profile."),
        (["--config", "keep"], "writes no model repository, and has no use for --config."),
    ],
)
def test_what_a_format_has_no_use_for_is_named_as_it_was_typed(arguments, named):
    refused = CliRunner().invoke(app, ["export", *arguments])
    assert isinstance(refused.exception, UsageError)
    assert named in str(refused.exception)
