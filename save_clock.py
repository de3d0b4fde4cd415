"""When a run saves by the clock: every few minutes and, in a job of Slurm's, shortly before the job's time is up.

When a run saves changes nothing in what it computes.
"""

import datetime
import os
import subprocess
import time

LAST_MINUTE = 60  # seconds before a job's end, in which a run saves every INTERVAL seconds: the job is killed without
INTERVAL = 10  # a warning that reaches the run, and Slurm looks at time limits only now and then
GRACE = 300  # seconds after a job's end: from then on it has evidently been prolonged


class SaveClock:
    """Tells when it is time to save again; the clock starts when it is made

    Args: minutes: between two saves
    """

    def __init__(self, minutes):
        self.seconds, self.saved, self.job_end = 60 * minutes, time.time(), get_job_end()

    def is_due(self):
        now = time.time()
        is_ending = self.job_end is not None and -LAST_MINUTE <= now - self.job_end <= GRACE
        return now - self.saved >= (min(INTERVAL, self.seconds) if is_ending else self.seconds)

    def restart(self):
        """To be called after each save"""
        self.saved = time.time()


def get_job_end():
    """When the job that this process runs in has to end, seconds since the epoch; None outside of a job or if Slurm
    does not say. Slurm puts it into the job's environment, old versions (before 23) answer when asked."""
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
