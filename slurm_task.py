"""What a Slurm job runs: a task of a listing, with its output in the task's log and its exit status beside it."""

import os
import re
import signal
import subprocess
import time

import slurm
import tasks
import util
from save_clock import get_job_end
from util import UserError

EARLY = 60  # seconds by which Slurm's warning may come too early
HOLD = 600  # seconds that a task repeated by om-repeat waits to be killed


def run_task(where):
    """Args: where: FILE:INDEX, or FILE with the array's index. Returns: the exit status"""
    listing, task = find_task(where)
    with util.StopSignal() as stop, tasks.open_log(task) as log:
        if task.kind != "train" and not tasks.is_trained(task):
            log.write("its model is not fully trained: nothing to evaluate\n")
            status = 1
        else:
            status = run_command(get_command(listing, task), log, stop, listing.warning)
        task.get_path("status").write_text(f"{status}\n")
        if status == 0 and task.kind == "train":
            log.writelines(f"{line}\n" for line in slurm.submit_after_training(task.model))
        if listing.repeated and tasks.was_stopped(status):
            hold(log)
    return status


def find_task(where):
    """Returns: a Listing and a Task. Raises: UserError if there is none"""
    path, _, index = where.rpartition(":") if re.search(r":\d+$", where) else (where, "", None)
    index = os.environ.get("SLURM_ARRAY_TASK_ID") if index is None else index
    try:
        listing = slurm.read_listing(path)
        return listing, listing.tasks[int(index)]
    except (UserError, ValueError, TypeError, IndexError):
        raise UserError(f"--task {where!r} is not a task of a sweep; this option is for Slurm jobs, not for people") from None


def get_command(listing, task):
    """The task's command, run after the user's line of shell code, in a login shell: on many clusters only these know
    `module`"""
    if not listing.setup:
        return task.get_command()
    script = "{ " + listing.setup + '\n} || exit\nexec "$@"'
    return ["bash", "-lc", script, "bash", *task.get_command()]


def run_command(command, log, stop, warning):
    """Runs a command with one thread per CPU of the job, and passes signals on. Returns: the exit status"""
    environment, num_cpus = dict(os.environ), os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    if num_cpus:  # more would slow each other down several times over
        environment["OMP_NUM_THREADS"] = num_cpus
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=_ignore_warning
    )
    warn_at = None
    while process.poll() is None:
        number, stop.received = stop.received, None
        if number == signal.SIGUSR1 and warn_at is None:
            warn_at = time.time() + get_delay(warning)
        elif number not in (None, signal.SIGUSR1):
            process.send_signal(number)
        if warn_at is not None and time.time() >= warn_at:
            process.send_signal(signal.SIGUSR1)
            warn_at = time.time() + 5  # again, in case it was still starting
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _ignore_warning():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it can save


def get_delay(warning):
    """Slurm may warn up to a minute early, which could leave nothing of a short job. Returns: seconds to wait until the
    warning is due; 0 for signals even earlier than that, which somebody sent to stop the job now"""
    job_end = get_job_end()
    early = 0 if job_end is None else job_end - warning - time.time()
    return early if 0 < early <= EARLY else 0


def hold(log):
    """Waits to be killed: if the job ended by itself, om-repeat would take it for complete and not repeat it"""
    log.write("saved; waiting for Slurm to end this job, so that om-repeat starts the next\n")
    log.flush()
    time.sleep(HOLD)
