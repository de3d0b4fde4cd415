"""Runs main.py's arguments again and again, killed (SIGKILL) at random moments, then
to the end. Usage: kill.py NUM_KILLS SEED SECONDS [main.py's arguments]

Each attempt is a process of its own, forked after the imports, which would
otherwise take nearly all the time. It is killed SECONDS at most after its start.
"""

import os
import pathlib
import random
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import main  # noqa: E402
import util  # noqa: E402

num_kills, seed, seconds, argv = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
moments = random.Random(seed)
killed = 0
while True:
    pid = os.fork()
    if pid == 0:
        sys.argv = ["main.py", *argv]
        util.run_script(main.main)
    if killed < num_kills:
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        print(f"killed {killed} times")
        sys.exit(os.waitstatus_to_exitcode(status))
    killed += 1
