"""When a run saves: on signals that stop it, and by the clock, every few minutes and, in a Slurm job, shortly before the
job's time is up.

When a run saves has no effect on what it computes.
"""

import datetime
import os
import signal
import subprocess
import time

LAST_MINUTE = 60  # seconds before a job's end, in which a run saves every INTERVAL seconds: the job is killed without
INTERVAL = 10  # a warning that reaches the run, and Slurm checks time limits only now and then
GRACE = 300  # seconds after a job's end; a job still running then has evidently been extended


class SaveClock:
    """Tells when it is time to save again; the clock starts when it is made

    Args: minutes: between two saves
    """

    def __init__(self, minutes):
        self.seconds, self.saved, self.job_end = 60 * minutes, time.monotonic(), get_job_end()

    def is_due(self):
        is_ending = self.job_end is not None and -LAST_MINUTE <= time.time() - self.job_end <= GRACE
        return time.monotonic() - self.saved >= (min(INTERVAL, self.seconds) if is_ending else self.seconds)

    def restart(self):
        """Call after each save"""
        self.saved = time.monotonic()  # the machine's clock may be set back


def get_job_end():
    """When the Slurm job around this process must end, in seconds since the epoch; None outside a job or if Slurm
    does not say. Slurm sets it in the job's environment; versions before 23 have to be asked."""
    job = os.environ.get("SLURM_JOB_ID")
    try:
        if job is None:
            return None
        if os.environ.get("SLURM_JOB_END_TIME"):
            return float(os.environ["SLURM_JOB_END_TIME"])
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%A %e"]
        environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        ends = {line.split()[0]: line.split()[1] for line in process.stdout.splitlines()}
        return datetime.datetime.fromisoformat(ends[job]).timestamp()
    except (OSError, ValueError, KeyError, IndexError, subprocess.TimeoutExpired):
        return None


# ------------------------------------------------------------------ signals


class StopSignal:
    """A context in which SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) are recorded in `received`, so that a loop can save
    and return. A second SIGINT (Ctrl-C) ends the program at once."""

    def __init__(self):
        self.received = None

    def __enter__(self):
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        self.handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
