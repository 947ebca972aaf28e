from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path

import pytest

from rkd_deploy import errors
from rkd_deploy.errors import (
    MissingDependencyError,
    RkdError,
    command_line,
    install_line,
    require,
    shortened,
    unknown_name,
)


def tree_in_docstring() -> dict[str, tuple[str, int]]:
    """Class -> (parent, exit code), read from the tree that the module's docstring draws."""
    found: dict[str, tuple[str, int]] = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^([ |+`-]*)(\w+)\s{2,}(\d+)\s", line):
            depth = len(match[1])
            parents = [(other, name) for other, name in parents if other < depth]
            found[match[2]] = (parents[-1][1] if parents else "Exception", int(match[3]))
            parents.append((depth, match[2]))
    return found


def test_classes_and_exit_codes_are_those_of_the_documented_tree() -> None:
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    actual = {
        name: (owner.__bases__[0].__name__, owner.exit_code)
        for name, owner in classes.items()
        if issubclass(owner, RkdError)
    }
    assert actual["GateError"] == ("RkdError", 3)
    assert actual == tree_in_docstring()


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("UsageError", "ValueError"),
        ("MissingDependencyError", "ImportError"),
        ("BackendError", "RuntimeError"),
        ("BudgetError", "ValueError"),
        ("StorageError", "OSError"),
        ("DivergenceError", "ArithmeticError"),
    ],
)
def test_an_error_is_caught_as_the_builtin_it_is_a_case_of(name: str, base: str) -> None:
    message = "value, rule and way out"
    error = getattr(errors, name)(message)
    assert isinstance(error, getattr(builtins, base))
    assert str(error) == message


def test_a_word_without_end_is_cut_in_its_middle() -> None:
    path = "/" + "a" * 5000 + ".onnx"
    for name in ("ModelFileError", "UsageError", "StorageError", "MissingDependencyError"):
        message = str(getattr(errors, name)(f"There is no {path} here. Name another."))
        assert len(message) < 300
        assert message.startswith("There is no /aaa")
        assert message.endswith("aaa.onnx here. Name another.")
        assert "[4,806 characters]" in message
    assert str(RkdError("a" * 999)) == "a" * 999
    assert str(RkdError("word " * 5000)) == "word " * 5000


def test_a_path_that_begins_with_a_dash_is_no_option_in_a_command_to_paste() -> None:
    command = command_line("train", Path("-runs/a b"), "--resume", "-x")
    assert command == "rkd-deploy train './-runs/a b' --resume -x"


def test_a_value_that_python_cannot_write_is_shortened_too() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (10**5000, [10**5000], {1: [10**5000]}, deep):
        assert len(shortened(value)) <= 80


def test_require_gives_the_module() -> None:
    assert require("json.decoder", "cpu").JSONDecoder().decode("[1]") == [1]


@pytest.mark.parametrize("module", ["rkd_absent_module", "rkd_absent_module.part"])
def test_require_ends_in_the_exact_install_line(module: str) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require(module, "tensorrt")
    assert str(caught.value) == (
        f"{module} is needed here and is not installed. Install it with: pip install 'rkd-deploy[tensorrt]'"
    )
    assert str(caught.value).endswith(install_line("tensorrt"))


def test_require_lets_a_broken_installation_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rkd_broken_module.py").write_text("import rkd_absent_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="rkd_absent_part") as caught:
        require("rkd_broken_module", "cpu")
    assert not isinstance(caught.value, RkdError)


def test_unknown_name_puts_the_nearest_first_and_sorts_the_choices() -> None:
    assert unknown_name("network", "resnet21", ["vgg8", "resnet20"]) == (
        "Unknown network 'resnet21'. Did you mean 'resnet20'? Choices: resnet20, vgg8."
    )


def test_unknown_name_suggests_nothing_where_nothing_is_near() -> None:
    assert unknown_name("unit", "zzz", ["macs", "params"]) == "Unknown unit 'zzz'. Choices: macs, params."
