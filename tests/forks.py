"""Runs code in processes of its own without the seconds that imports take: forked from a server that has imported what the
project depends on, but none of its modules, and has computed nothing (a process that has used autograd on a GPU cannot fork)."""

import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORTS = "torch torch._dynamo torch._inductor.config scipy.io matplotlib.figure matplotlib.backends.backend_agg tqdm".split()
MAIN = "import main, util; util.run_script(main.main)"
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(IMPORTS)


def start(code, *argv, stdout=os.devnull, stderr=os.devnull):
    """Starts code as `python -c` would, with the project's modules at hand unless it inserts another folder. Args: stdout,
    stderr: paths. Returns: multiprocessing.Process"""
    process = _server.Process(target=_execute, args=(code, argv, stdout, stderr, os.getcwd(), dict(os.environ)))
    process.start()
    return process


def run(code, *argv):
    """Runs code to its end. Returns: subprocess.CompletedProcess, with what it printed"""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (pathlib.Path(folder, name) for name in ("stdout", "stderr"))
        process = start(code, *argv, stdout=stdout, stderr=stderr)
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, stdout.read_text(), stderr.read_text())


def _execute(code, argv, stdout, stderr, folder, environment):
    for number, path in [(1, stdout), (2, stderr)]:
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True  # of copies that tests change
    sys.argv = ["-c", *argv]
    try:
        exec(code, {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
