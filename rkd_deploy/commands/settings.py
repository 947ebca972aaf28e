"""Command options made from the fields of settings, in panels by what they apply to."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter
from typing import Any, Generic, TypeVar

import typer
from typer.core import TyperCommand

from rkd_deploy.fields import Option, options_of

S = TypeVar("S")


@dataclass(frozen=True)
class SettingsOptions(Generic[S]):
    """What a command line says for the fields of a settings class.

    Attributes:
        kind: The settings class.
        values: As typed, by field, where they differ from the option's default.
    """

    kind: type[S]
    values: Mapping[str, Any]

    def make(self, **others: Any) -> S:
        """The settings; `others` are fields that the command declares by itself.

        Raises:
            UsageError: A value that cannot be read, or that the settings refuse.
        """
        declared = options_of(self.kind)
        parsed = {name: (declared[name].parse or _as_typed)(value) for name, value in self.values.items()}
        return self.kind(**parsed, **others)


Groups = Callable[[], Mapping[str, tuple[type, str]]]
"""Imports settings classes: parameter of the command, to the class and the help panel of its options."""


def with_settings(groups: Groups) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Give a command one option for each declared field of some settings classes.

    The command takes a `SettingsOptions` under each name in `groups`; the command line has the options in its place.
    Register what is returned with ``cls=SettingsCommand``, which calls `groups` when its options are first asked for:
    settings stand in rooms that import numpy, and no other command is to wait for that.
    """

    def decorate(command: Callable[..., None]) -> Callable[[], None]:
        def stub() -> None:
            raise AssertionError("SettingsCommand runs the command itself")

        # Typer reads name and help of every command at once, and parameters only of the one that runs.
        stub.__name__, stub.__doc__ = command.__name__, command.__doc__
        setattr(stub, "complete", functools.partial(_complete, command, groups))  # noqa: B010  (unknown to mypy)
        return stub

    return decorate


def _complete(command: Callable[..., None], groups: Groups) -> Callable[..., None]:
    """The command as typer reads it: with an option a parameter."""
    kinds = groups()
    known = {kind.__name__: kind for kind, _ in kinds.values()}  # the command's module names them for mypy alone
    hints = typing.get_type_hints(command, localns=known, include_extras=True)
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in kinds:
            parameters += _parameters(parameter.name, parameter.kind, *kinds[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
    defaults = {parameter.name: parameter.default for parameter in parameters}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        settings: dict[str, SettingsOptions[Any]] = {}
        for group, (kind, _) in kinds.items():
            typed = {name: values.pop(f"{group}_{name}") for name in _declared(kind)}
            changed = {name: value for name, value in typed.items() if _differs(value, defaults[f"{group}_{name}"])}
            settings[group] = SettingsOptions(kind, changed)
        command(**values, **settings)

    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010  (unknown to mypy)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _declared(kind: type) -> dict[str, Option]:
    return {name: declared for name, declared in options_of(kind).items() if not declared.shared}


def _parameters(group: str, place: Any, kind: type, panel: str) -> list[Parameter]:
    hints, defaults = typing.get_type_hints(kind), {field.name: field.default for field in fields(kind)}
    parameters = []
    for name, declared in _declared(kind).items():
        as_field = declared.parse is None and declared.reads is None
        # A field in another form than what is typed has its default in the settings alone.
        default = defaults[name] if as_field else None
        annotation = hints[name] if as_field else declared.reads | None
        metavar = "<str>" if annotation == list[str] | None else None  # typer's own is <list[str]>
        info = typer.Option(declared.flag, help=declared.help, metavar=metavar, rich_help_panel=panel)
        parameters.append(
            Parameter(
                f"{group}_{name}",
                place,
                default=default,
                annotation=typing.Annotated[annotation, info],
            )
        )
    return parameters


def _differs(value: Any, default: Any) -> bool:
    return bool(value != default and value not in ([], ()))  # a repeatable option that was not given is empty


def _as_typed(value: Any) -> Any:
    return value


def changed_options(context: typer.Context) -> dict[str, str | None]:
    """The options of a command line that differ from their defaults: as typed, to their help panel."""
    changed = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        if parameter.param_type_name != "option" or name not in context.params:  # --help and its like have no value
            continue
        if _differs(context.params[name], parameter.get_default(context)):
            # --random-images is the second name of --test-images, for its other value
            names = parameter.secondary_opts if context.params[name] is False else parameter.opts
            changed[names[0]] = getattr(parameter, "rich_help_panel", None)
    return changed


class SettingsCommand(TyperCommand):
    """A command made by `with_settings`, whose plain help shows options in their panels, as typer leaves to rich."""

    @functools.cached_property
    def _completed(self) -> Any:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command()(getattr(inspect.unwrap(self.callback), "complete")())  # type: ignore[arg-type]  # noqa: B009
        return typer.main.get_command(app)

    @property
    def params(self) -> Any:
        """Arguments and options of the command, made when they are first asked for."""
        return self._completed.params

    @params.setter
    def params(self, value: Any) -> None:
        """Typer's constructor sets those of the stub, which has none."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command with what was parsed."""
        return self._completed.invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then a section for each panel, in the order of their first options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)
