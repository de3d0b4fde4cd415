"""Tasks on Slurm: as one job array that requeues itself, or each repeated by openmind-tools' om-repeat.

Nothing passes through a shell here; what om-repeat cannot carry is refused.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import torch

import util
from tasks import ROOT, Task, open_log
from util import UserError

TIME = "12:00:00"
TIME_OF_REPEATED = "2:00:00"
WARNING = 120  # seconds before a job's time is up
FOLDER = util.SAVE / ".sweep"  # lists of submitted tasks, and what Slurm itself prints


class Job(NamedTuple):
    """A task of this sweep in Slurm's queue"""

    number: str  # as scancel takes it
    kind: str  # train or eval
    index: int  # of the task
    state: str  # Slurm's: PENDING, RUNNING, ...


def get_tag(test_run, data_location):
    """What this sweep's jobs are called: the same folder and flags, the same tag"""
    where = [str(util.SAVE.resolve()), str(test_run), str(data_location)]
    return "strokes-" + hashlib.sha1("\0".join(where).encode()).hexdigest()[:8]


def require(command):
    """Raises: UserError if a command of Slurm's is not there"""
    if shutil.which(command) is None:
        raise UserError(f"there is no {command} on the PATH; run on a machine of the cluster, or without --cluster")


# ------------------------------------------------------------------ submitting


def get_seconds(limit):
    """Slurm's time formats: minutes, minutes:seconds, hours:minutes:seconds, each after days-"""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise UserError(f"--time {limit} is none of Slurm's times, such as 2:00:00, 90 or 1-12:00:00")
    days, *rest = (None if part is None else int(part) for part in match.groups())
    numbers = [number for number in rest if number is not None]
    if days is not None:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(numbers)]
    return (days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def get_options(args, repeated):
    """sbatch's options that do not depend on the task, each one word"""
    limit = args.time or (TIME_OF_REPEATED if repeated else TIME)
    seconds = get_seconds(limit)
    options = [f"--time={limit}", f"--mem={args.mem}"]
    options += [f"--partition={args.partition}"] * bool(args.partition)
    options += [f"--gres={args.gres}"] * (args.gres not in ("", "none"))
    if not repeated:
        options += [f"--signal=B:USR1@{min(WARNING, max(seconds // 2, 1))}", "--requeue", "--open-mode=append"]
    return options


def get_commands(tasks, args, listing, repeated):
    """The commands that submit tasks [(index, Task)]: one of an array, or one each"""
    run = [str(ROOT / "slurm_job.sh"), sys.executable, str(ROOT / "sweep.py")]
    kind, options = "eval" if args.eval_logp else "train", get_options(args, repeated)
    tag = get_tag(args.test_run, args.data_location)
    if not repeated:
        indices = ",".join(str(index) for index, _ in tasks)
        output = listing.with_name("%A_%a.out")
        options += [f"--array={indices}", f"--output={output}", "-J", f"{tag}-{kind}"]
        return [["sbatch", *options, *run, f"--task={listing}"]]
    commands = []
    for index, task in tasks:
        output = (util.SAVE / task.model / "logs" / "slurm-%j.out").resolve()
        words = [*options, f"--output={output}", "-J", f"{tag}-{kind}-{index}", *run, f"--task={listing}:{index}"]
        commands.append(["om-repeat", "sbatch", *words])
    for word in (word for command in commands for word in command):
        if not re.fullmatch(r"[\w./=:,@%+-]+", word, re.ASCII):
            raise UserError(
                f"om-repeat splits its command at spaces and special characters, and {word!r} has some;"
                " move to another folder, or give --no-repeat"
            )
    return commands


def submit(tasks, args):
    """Submits tasks, [(index, Task)], or with --dry-run prints the commands"""
    repeated = not args.no_repeat and shutil.which("om-repeat") is not None
    kind = "eval" if args.eval_logp else "train"
    listing = (FOLDER / f"{get_tag(args.test_run, args.data_location)}-{kind}.json").resolve()
    commands = get_commands(tasks, args, listing, repeated)
    if args.dry_run:
        return commands
    listed = json.loads(listing.read_text()) if listing.exists() else {}  # for jobs that are in the queue
    util.write(listing, json.dumps({**listed, **{str(index): task for index, task in tasks}}, indent=1).encode())
    for _, task in tasks:
        task.get_path("log").parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if process.returncode != 0:
            raise UserError(f"{command[0]} refused the job: {' '.join(process.stdout.split())}")
        print(process.stdout.strip())
    return commands


# ------------------------------------------------------------------ in a job


def run_task(where):
    """What a job runs: a task of a listing, FILE:INDEX or FILE with the array's index. Its output goes
    to the task's log, its exit status beside it."""
    path, _, index = where.rpartition(":") if re.search(r":\d+$", where) else (where, "", None)
    index = os.environ.get("SLURM_ARRAY_TASK_ID") if index is None else index
    try:
        task = Task(*json.loads(pathlib.Path(path).read_text())[index])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--task {where!r} is none of a sweep's tasks; jobs on Slurm run it, not people") from None
    with open_log(task) as log:
        command = task.get_command()
        if torch.cuda.is_available():
            command.append("--cuda")
        elif os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS"):
            log.write(f"no usable GPU on {os.uname().nodename}: on its CPU\n")
            log.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with util.StopSignal() as stop:
            while process.poll() is None:
                if stop.received is not None:
                    process.send_signal(stop.received)
                    stop.received = None
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    task.get_path("status").write_text(f"{status}\n")
    return status


# ------------------------------------------------------------------ the queue


def get_jobs(test_run, data_location):
    """This sweep's jobs in the queue; none where there is no Slurm"""
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%j|%K|%T"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise UserError(f"squeue failed: {' '.join(process.stderr.split())}")
    jobs = []
    for line in process.stdout.splitlines():
        number, name, array_index, state = line.split("|")
        match = re.match(rf"{get_tag(test_run, data_location)}-(train|eval)(?:-(\d+))?(?!\d)", name)
        if match and (match[2] or array_index.isdigit()):
            jobs.append(Job(number, match[1], int(match[2] or array_index), state))
    return jobs


def cancel(test_run, data_location):
    """Cancels this sweep's jobs. Returns: how many"""
    require("scancel")
    jobs = get_jobs(test_run, data_location)
    if jobs:
        subprocess.run(["scancel", *sorted({job.number for job in jobs})], check=True)
    return len(jobs)
