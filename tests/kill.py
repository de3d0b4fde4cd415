"""Runs a script again and again, killed (SIGKILL) at random moments, then to the end.
Usage: kill.py SCRIPT NUM_KILLS SEED SECONDS [the script's arguments], SCRIPT without .py

Each attempt is a process of its own, forked after the imports, which would
otherwise take nearly all the time. It is killed SECONDS at most after its start.
"""

import importlib
import os
import pathlib
import random
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import torch._inductor.config  # noqa: E402, F401  torch would import it in each process

import util  # noqa: E402

script = importlib.import_module(sys.argv[1])
num_kills, seed, seconds, argv = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
moments = random.Random(seed)
killed = 0
while True:
    pid = os.fork()
    if pid == 0:
        sys.argv = [f"{script.__name__}.py", *argv]
        util.run_script(script.main)
    if killed < num_kills:
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        print(f"killed {killed} times")
        sys.exit(os.waitstatus_to_exitcode(status))
    killed += 1
