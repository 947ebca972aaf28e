"""How a command ends: by a signal, on an output that cannot be written to, on a terminal of any width."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys

import pytest

from rkd_deploy import cli
from rkd_deploy.commands.options import console_for
from rkd_deploy.errors import command_line
from rkd_deploy.report.tables import Column, print_table

RKD = [sys.executable, "-m", "rkd_deploy.cli"]


def run(*arguments, **how):
    return subprocess.run([*RKD, *map(str, arguments)], stderr=subprocess.PIPE, text=True, timeout=60, **how)


def test_a_full_output_is_said_in_a_line(bundle):
    with open("/dev/full", "w") as full:
        ended = run("info", bundle, stdout=full)
    assert ended.stderr == "Error: standard output cannot be written to: No space left on device.\n"
    assert ended.returncode == 1


def test_a_closed_output_is_said_in_a_line(bundle):
    command = f"{shlex.join([*RKD, 'info', str(bundle)])} >&-"
    ended = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.stderr == "Error: standard output cannot be written to: it is closed.\n"
    assert ended.returncode == 1


def test_a_reader_that_went_away_is_no_news(bundle):
    with subprocess.Popen([*RKD, "info", bundle], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_an_output_without_the_letters_gets_them_escaped(tmp_path):
    missing = tmp_path / "猫"
    ended = run("info", missing, env={"PYTHONIOENCODING": "latin-1"})
    assert "\\u732b" in ended.stderr
    assert ended.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_command_with_130_and_say_so(bundle, tmp_path, number):
    # What Python imports when it starts tells when the command is under way, and holds it there.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'onnxruntime':\n"
        "            print('under way', flush=True)\n"
        "            __import__('time').sleep(60)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    process = subprocess.Popen(
        [*RKD, "predict", bundle, "x.png", "--json"],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "under way\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("Error: Interrupted.\n")
    assert json.loads(out) == {"error": "Interrupted.", "exit_code": 130}


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["train"], ["export"], ["bench-compare"]])
def test_help_has_a_short_name(rkd, command, option):
    shown = rkd(*command, option)
    assert shown.code == 0
    assert "Usage: rkd-deploy" in shown.out


def test_defaults_are_values_to_type(rkd):
    for command in ("quickstart", "train", "export", "bench", "bench-compare", "compare", "predict", "verify"):
        defaults = re.findall(r"\[default:\s+([^\]]+)\]", rkd(command, "-h").out)
        assert not [text for text in defaults if text.startswith("(")], command


def test_the_shell_can_complete_commands():
    environment = {"_RKD_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "rkd-deploy bench", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['rkd-deploy']; from rkd_deploy.cli import app; app(prog_name='rkd-deploy')"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert {"bench", "bench-compare"} <= set(ended.stdout.split())


@pytest.mark.parametrize("columns", ["0", "1", "10", "40", "79"])
def test_a_narrow_terminal_wraps_whole_lines(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    console = console_for(as_json=False)
    console.file = io.StringIO()
    table = [
        Column(name, lambda row, index=index: row[index]) for index, name in enumerate(("Model", "p50, ms", "Top-1, %"))
    ]
    print_table(table, [("photos S + A", "0.123", "92.76"), ("photos S0", "0.120", "93.00")], console)
    shown = console.file.getvalue()
    assert re.search(r"photos S \+ A +0\.123 +92\.76", shown)
    assert re.search(r"photos S0 +0\.120 +93\.00", shown)


@pytest.mark.parametrize("folder", ["runs/digits-001", "my runs/it's", "runs/$(reboot)", "runs/a;b"])
def test_what_is_printed_can_be_pasted(folder):
    line = command_line("export", folder, "--fuse", "tail")
    assert shlex.split(line) == ["rkd-deploy", "export", folder, "--fuse", "tail"]
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == ["rkd-deploy", "export", folder, "--fuse", "tail"]


def test_a_signal_before_a_command_is_at_work_is_said_too(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(sys, "argv", ["rkd-deploy", "train", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    assert (ended.value.code, output.err) == (130, "Error: Interrupted.\n")
    assert json.loads(output.out) == {"error": "Interrupted.", "exit_code": 130}


@pytest.mark.parametrize(("words", "raised"), [(["train"], SystemExit), (["train", "--debug"], OSError)])
def test_a_file_s_error_that_no_room_made_its_own_is_a_line(monkeypatch, capsys, words, raised):
    def broken():
        raise PermissionError(13, "Permission denied", "a\x1b[31m")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(sys, "argv", ["rkd-deploy", *words])
    with pytest.raises(raised):
        cli.main()
    assert capsys.readouterr().err in ("", "Error: 'a\\x1b[31m' cannot be used: Permission denied.\n")
