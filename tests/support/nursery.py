"""Forks processes that train, for tests that kill them. Run as a script, never imported.

Everything heavy is imported once, here; a child starts in a moment and is a process of its own, with the default
handlers. Each line of standard input is a JSON object: the folder of runs, a recipe, a signal and how many seconds into
its training to send it. The answer is the exit code of the child and for how many seconds it trained.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import tomllib
import traceback
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.ticker  # noqa: F401
import torch
import torch.utils.tensorboard
from preparing import facts_of

from rkd_deploy.errors import ModelFileError, RkdError
from rkd_deploy.recipe import parse_recipe
from rkd_deploy.train import preparation
from rkd_deploy.train.display import Silent
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.runs import newest_run


class Telling(Silent):
    """Tells through a pipe that a phase begins."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def phase(self, name: str, epochs: int, steps_per_epoch: int, done: int) -> None:
        os.write(self.pipe, b".")


def train(task: dict[str, Any], pipe: int) -> int:
    """What the child does; gives its exit code."""
    root = Path(task["root"])
    try:
        try:
            run = newest_run(root, finished=False)
        except ModelFileError:
            fit(parse_recipe(tomllib.loads(task["recipe"])), root=root, display=Telling(pipe))
        else:
            resume(run, display=Telling(pipe))
    except RkdError as error:
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def supervise(task: dict[str, Any]) -> tuple[int, float]:
    """Fork a child, wait until it trains, send the signal when it is time, and wait for its end."""
    recipe = parse_recipe(tomllib.loads(task["recipe"]))
    facts_of(recipe)  # the children inherit what it remembers
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os._exit(train(task, writing))
    os.close(writing)
    os.read(reading, 1)  # returns at the first phase, or when the child ends
    began = time.perf_counter()
    if task["signal"] is not None:
        time.sleep(task["after"])
        os.kill(pid, task["signal"])  # not waited for yet, so the number is still the child's
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - began


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that no pool of threads is begun before a fork
    preparation.separate = functools.cache(preparation.separate)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(supervise(json.loads(line))), flush=True)
