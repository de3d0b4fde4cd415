"""Calls to Slurm's commands, with a time limit, and without the user's settings that change what they print."""

import os
import re
import shutil
import subprocess
from typing import NamedTuple

from util import UserError

TIMEOUT = 120  # seconds
# sbatch's variables that change what it prints, or what sweep.py decides
OURS = "ARRAY_INX NO_REQUEUE OPEN_MODE REQUEUE SIGNAL WAIT JOB_NAME TEST_ONLY QUIET PARSABLE COMMENT".split()


class Answer(NamedTuple):
    status: int
    stdout: str
    stderr: str


def get_environment():
    """The environment without SQUEUE_FORMAT, SLURM_TIME_FORMAT and the like. Variables that choose the cluster (SLURM_CONF,
    SLURM_CLUSTERS), or are meant for sbatch (such as SBATCH_ACCOUNT), stay"""
    unwanted = re.compile("(SQUEUE|SCANCEL|SCONTROL|SACCT|SINFO)_.*|SLURM_TIME_FORMAT|SBATCH_(" + "|".join(OURS) + ")")
    return {name: value for name, value in os.environ.items() if not unwanted.fullmatch(name)}


def require(command):
    """Raises: UserError if a Slurm command is not installed"""
    if shutil.which(command) is None:
        raise UserError(f"{command} is not on the PATH; run on a machine of the cluster, or without --cluster")


def call(command):
    """Runs a command. Returns: Answer. Raises: UserError if it is missing, or does not end in time"""
    require(command[0])
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=get_environment(), timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm does not answer ({command[0]} takes longer than {TIMEOUT} seconds); try again later") from None
    return Answer(process.returncode, process.stdout, process.stderr)


# ------------------------------------------------------------------ what became of a job


class Verdict(NamedTuple):
    """What Slurm says of a job that is not in the queue any more"""

    state: str  # COMPLETED, FAILED, OUT_OF_MEMORY, TIMEOUT, NODE_FAIL, PREEMPTED, CANCELLED by 1000, ...
    exit_code: str  # "status:signal"
    restarts: str
    output: str  # path of Slurm's own output file, "" if unknown

    def __str__(self):
        status, _, number = self.exit_code.partition(":")
        how = f", signal {number}" if number not in ("", "0") else f", status {status}" if status not in ("", "0") else ""
        restarts = f", {self.restarts} restarts" if self.restarts not in ("", "0") else ""
        return f"{self.state}{how}{restarts}"


def get_verdict(job):
    """Asks Slurm what became of a job, by its number: its accounting where that runs, else the scheduler, which remembers it for
    a while. Returns: Verdict, or None if neither knows"""
    for ask in (_ask_accounting, _ask_scheduler):
        try:
            verdict = ask(job)
        except UserError:
            continue
        if verdict is not None:
            return verdict
    return None


def _ask_accounting(job):
    answer = call(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State,ExitCode,Restarts"])
    lines = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2]
    return Verdict(*lines[-1], "") if answer.status == 0 and lines else None


def _ask_scheduler(job):
    answer = call(["scontrol", "--oneliner", "show", "job", job])
    if answer.status != 0:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", answer.stdout))
    state = fields.get("JobState", "")
    if state == "FAILED" and fields.get("Reason") == "OutOfMemory":
        state = "OUT_OF_MEMORY"
    return Verdict(state, fields.get("ExitCode", ""), fields.get("Restarts", ""), fields.get("StdOut", "")) if state else None
