"""Runs scripts again and again: dying at the n-th file operation of a save, for n = STEP, 2 * STEP, ..., then to the
end, until a script no longer dies. The argument is a JSON list of cases, each SCRIPT (without .py), STEP, FOLDER,
DESTINATION and the script's arguments; the folder is moved to the destination, in which "{n}" counts, after each death and
what followed. Prints a JSON list: how often each died."""

import importlib
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import torch._dynamo  # noqa: E402, F401  torch would import it, and the next, in each process
import torch._inductor.config  # noqa: E402, F401

import util  # noqa: E402

DIED = 99


def run(script, argv, last):
    """In a process of its own, forked after the imports; with `last`, that call of os.replace or os.fsync is its end.
    Returns: its exit status"""
    pid = os.fork()
    if pid == 0:
        left = [last]

        def dying(function):
            def call(*args):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(DIED)  # as kill -9 ends it: nothing is cleaned up
                return function(*args)

            return call

        os.replace, os.fsync = dying(os.replace), dying(os.fsync)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [f"{script.__name__}.py", *argv]
        try:
            util.run_script(script.main)
        except SystemExit as end:
            os._exit(end.code or 0)  # a fork of much takes long to take down in order
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_deaths(script, step, folder, destination, argv):
    n = 1
    while True:
        status = run(script, argv, n * step)
        if status == 0:
            return n - 1
        if status != DIED or run(script, argv, 0) != 0:
            sys.exit(f"the {n}th ended with {status}")
        os.rename(folder, destination.replace("{n}", str(n)))
        n += 1


print(json.dumps([count_deaths(importlib.import_module(script), *case) for script, *case in json.loads(sys.argv[1])]))
