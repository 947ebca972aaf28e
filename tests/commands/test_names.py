"""The names of all commands, arguments and options: people's scripts hold them, so none changes by accident."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import typer.main

from rkd_deploy import cli

LIST = Path(__file__).with_name("names.txt")


def names(group: click.Group, prefix: str = "") -> list[str]:
    """A line for each argument and option: command, name, second name; commands within commands too."""
    lines = []
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            lines += names(command, f"{prefix}{name} ")
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                lines.append(f"{prefix}{name} {parameter.human_readable_name}")
            else:
                lines.append(" ".join([f"{prefix}{name}", *parameter.opts, *parameter.secondary_opts]))
    return lines


def differing(listed: list[str], there: list[str]) -> str:
    """What to do about names that are not as they are listed; empty where they are."""
    changes = [f"- {line}" for line in listed if line not in there] + [
        f"+ {line}" for line in there if line not in listed
    ]
    if not changes:
        return ""
    advice = (
        f"These are not as {LIST.name} lists them, and scripts of users may hold them. If the change is meant, put it "
        "into that file, and a line into CHANGELOG.md that says what to write instead."
    )
    return "\n".join([*changes, advice])


def test_names_are_as_they_are_listed():
    there = names(typer.main.get_command(cli.app))
    assert len(there) > 100
    listed = LIST.read_text(encoding="utf-8").splitlines()
    if message := differing(listed, there):
        pytest.fail(message, pytrace=False)
    assert listed == sorted(set(listed))


def test_a_new_and_a_lost_name_are_both_told():
    message = differing(["bench --batch", "bench --count"], ["bench --batch", "bench --runs-at-least"])
    assert message.startswith("- bench --count\n+ bench --runs-at-least\n")
    assert "CHANGELOG.md" in message
    assert differing(["bench --batch"], ["bench --batch"]) == ""
