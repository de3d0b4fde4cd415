"""Runs a script for each of a JSON list of argument lists, one after another, each in a process
forked after the imports; prints a JSON list of [status, stdout, stderr]. Usage: fork.py main '[["--help"]]'"""

import importlib
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import util  # noqa: E402

script = importlib.import_module(sys.argv[1])
results = []
for argv in json.loads(sys.argv[2]):
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        pid = os.fork()
        if pid == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv = [f"{script.__name__}.py", *argv]
            try:
                util.run_script(script.main)
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)  # a fork of much takes long to take down in order
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        results.append([status, stdout.read(), stderr.read()])
print(json.dumps(results))
