"""Runs a script again and again: dying at the n-th file operation of a save, for n = STEP, 2 * STEP, ..., then to the
end, until it no longer dies. Prints how often it died; "{n}" in an argument counts that, and so in a folder that is
moved away after each. Usage: die.py SCRIPT STEP FOLDER DESTINATION [the script's arguments], SCRIPT without .py"""

import importlib
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import torch._dynamo  # noqa: E402, F401  an optimiser's first step would import it, in each process

import util  # noqa: E402

script, step, (folder, destination) = importlib.import_module(sys.argv[1]), int(sys.argv[2]), sys.argv[3:5]

DIED = 99


def run(argv, last):
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


n = 0
while True:
    argv = [argument.replace("{n}", str(n + 1)) for argument in sys.argv[5:]]
    status = run(argv, (n + 1) * step)
    if status == 0:
        break
    if status != DIED or run(argv, 0) != 0:
        sys.exit(f"the {n + 1}th ended with {status}")
    n += 1
    os.rename(folder.replace("{n}", str(n)), destination.replace("{n}", str(n)))
print(n)
