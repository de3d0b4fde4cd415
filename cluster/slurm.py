"""Tasks on Slurm: job arrays that requeue themselves, or chains of jobs repeated by openmind-tools' om-repeat.

The module is large because a sweep must survive what clusters do to jobs (docs/slurm.md, "What happens when"). Nothing passes
through a shell here; arguments that om-repeat would mangle are refused.
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import util
from cluster import tasks
from cluster.tasks import ROOT, Task
from runs.saving import StopSignal
from util import UserError, warn

TIME = "12:00:00"
TIME_OF_REPEATED = "2:00:00"
WARNING = 120  # seconds before a job's time limit at which it saves; a fifth of a short limit
EARLY = 60  # seconds by which Slurm's warning may come too early
MAX_STARTS = 4  # of a task at the same step: three requeues without progress
HOLD = 600  # seconds that a task repeated by om-repeat waits to be killed
TIMEOUT = 120  # seconds that one of Slurm's commands may take
FOLDER = util.SAVE / ".sweep"  # listings of submitted tasks, and Slurm's own output
FAILURES = {"BOOT_FAIL", "DEADLINE", "FAILED", "OUT_OF_MEMORY"}  # states after which a job does not start again

# User's variables that would change what Slurm's commands print, or override sweep.py
UNWANTED = re.compile("(SQUEUE|SCANCEL|SCONTROL|SACCT)_.*|SLURM_(TIME_FORMAT|ARRAY_.*)|SBATCH_(ARRAY_INX|ERROR|SIGNAL|WAIT)")
# Options of sbatch that would do the same
OURS = (
    "array a job-name J comment output o error e signal open-mode requeue no-requeue parsable quiet Q test-only"
    " wait W chdir D clusters M wrap"
).split()


def call(command):
    """Runs one of Slurm's commands. Returns: the process, with its stdout and stderr. Raises: UserError with Slurm's reason
    if it fails, is missing, or takes too long"""
    environment = {name: value for name, value in os.environ.items() if not UNWANTED.fullmatch(name)}
    options = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment, timeout=TIMEOUT)
    try:
        process = subprocess.run(command, **options)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH; run on a machine of the cluster, or without --cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm does not answer ({command[0]} takes longer than {TIMEOUT} seconds); try again later") from None
    if process.returncode != 0:
        raise UserError(f"{command[0]} failed: {process.stderr[-1000:]}")
    return process


def get_record(number):
    """What Slurm's scheduler knows about a job: a dict of words. Raises: UserError if it does not know it (any longer)"""
    return dict(re.findall(r"(\w+)=(\S*)", call(["scontrol", "--oneliner", "show", "job", number]).stdout))


# ------------------------------------------------------------------ listings of submitted tasks


class Listing(NamedTuple):
    """The tasks submitted by one call of sweep.py; each job looks up its task here"""

    path: pathlib.Path
    tasks: list
    options: list  # of sbatch, for all of them
    setup: str  # a line of shell code
    environment: dict  # variables that the tasks need; a site may not pass on the user's


def read_listing(path):
    """Raises: UserError if there is none"""
    try:
        content = json.loads(pathlib.Path(path).read_text())
        content |= {"path": pathlib.Path(path), "tasks": [Task(*task) for task in content["tasks"]]}
        return Listing(**content)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a listing of submitted tasks; delete it once the jobs submitted from here have ended"
        ) from None


def read_listings(essential):
    """All listings, oldest first. Raises: UserError if one cannot be read and that is essential; else it is left out"""
    listings = []
    for path in sorted(FOLDER.glob("*.json"), key=os.path.getmtime):
        try:
            listings.append(read_listing(path))
        except UserError as error:
            if essential:
                raise
            warn(str(error))
    return listings


def get_submitted():
    """All tasks submitted from this folder, in their latest form, of runs that still exist"""
    found = {task.key: task for listing in read_listings(essential=False) for task in listing.tasks}
    return [task for task in found.values() if (util.SAVE / task.model).is_dir()]


# ------------------------------------------------------------------ the commands that submit


def is_repeated(args):
    return not args.no_repeat and shutil.which("om-repeat") is not None


def get_options(args):
    """The options of sbatch that do not depend on the task, each one word; the user's come last and take precedence. Raises:
    UserError for any that would break the sweep"""
    time_limit = args.time or (TIME_OF_REPEATED if is_repeated(args) else TIME)
    words = util.split_words("--sbatch", args.sbatch)
    mem = None if any(word.startswith("--mem-per-") for word in words) else args.mem  # which excludes --mem
    options = dict(time=time_limit, mem=mem, cpus_per_task=args.cpus_per_task, partition=args.partition, gres=args.gres)
    for word in words:
        match = re.match(r"--([\w-]+)|-[HhOsvV]*([A-Za-z])", word)  # names may be abbreviated, and letters bundled
        if match and (match[2] in OURS or any(name.startswith(match[1] or "-") for name in OURS)):
            raise UserError(f"--sbatch {word}: leave it out; sweep.py sets it, or relies on its default")
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value not in (None, "none")] + words


def get_tag():
    """The prefix of comments by which jobs submitted from this folder are found"""
    return "strokes-" + hashlib.sha1(os.fsencode(util.SAVE.resolve())).hexdigest()[:8]


def get_script(where):
    """The command of a job, which runs a task: see run_task"""
    return [str(ROOT / "cluster/slurm_job.sh"), sys.executable, str(ROOT / "sweep.py"), f"--task={where}"]


def get_job_name(task):
    """The name in squeue and mails: mws_20, or mws_20:rws for an evaluation"""
    return task.model if task.kind == "train" else f"{task.model}:{task.kind}"


def get_array(listing, indices, after=(), limit=None):
    """The command that submits some of a listing's tasks as a job array. Args: after: numbers of jobs that must have ended;
    limit: of jobs at a time"""
    name = get_job_name(listing.tasks[indices[0]]) if len(indices) == 1 else f"{len(indices)}_strokes"
    options = [f"--array={','.join(map(str, indices))}" + (f"%{limit}" if limit else "")]
    options += [f"--signal=B:USR1@{WARNING}", "--requeue", "--open-mode=append", "-J", name]
    options += [f"--output={get_output('%A_%a')}", f"--comment={get_tag()}-{listing.path.stem}"]
    if after and any(re.match(r"--dep|-d", option) for option in listing.options):
        raise UserError(
            "--sbatch --dependency: evaluations wait for their training with this option; give yours when the training has ended"
        )
    options += [f"--dependency=afterany:{':'.join(after)}"] * bool(after)
    return ["sbatch", *listing.options, *options, *get_script(listing.path)]


def get_output(pattern):
    """Where Slurm writes a job's own output. Args: pattern: of its number. Raises: UserError if Slurm could not"""
    if "\\" in str(FOLDER.resolve()):
        raise UserError(f"Slurm cannot write to {FOLDER.resolve()}, whose path has a backslash: rename that folder")
    return f"{FOLDER.resolve()}/".replace("%", "%%") + f"{pattern}.out"


def get_chain(listing, index):
    """The command that submits a task by om-repeat. Raises: UserError if om-repeat would mangle it"""
    options = [f"--output={get_output('%j')}", f"--comment={get_tag()}-{listing.path.stem}-{index}"]
    options += ["--no-requeue", "-J", get_job_name(listing.tasks[index])]  # the chain's next job takes over
    command = ["om-repeat", "sbatch", *listing.options, *options, *get_script(f"{listing.path}:{index}")]
    for word in command:
        if not re.fullmatch(r"[\w./=:,@%+-]+", word, re.ASCII):
            raise UserError(
                f"om-repeat splits its command at spaces and special characters, and {word!r} has some;"
                " move to another folder, or give --no-repeat"
            )
    return command


# ------------------------------------------------------------------ submitting


def submit_tasks(some_tasks, args, queue):
    """Submits tasks; evaluations start after any queued jobs that train their models. With --dry-run, only prints the commands.
    Raises: UserError at the first job that Slurm refuses, or that cannot be submitted"""
    if is_repeated(args) and args.jobs:
        raise UserError("--jobs is for job arrays, which om-repeat does not submit; give --no-repeat")
    path, options = (FOLDER / f"{secrets.token_hex(4)}.json").resolve(), get_options(args)
    if args.cuda or args.cuda is None and asks_for_gpu(" ".join(options)):  # a job without a working GPU fails at once
        some_tasks = [task._replace(flags=[*task.flags, "--cuda"]) for task in some_tasks]
    location = os.environ.get("OMNIGLOT_PATH")
    environment = {"OMNIGLOT_PATH": os.path.abspath(os.path.expanduser(location))} if location else {}
    listing = Listing(path, some_tasks, options, args.setup, environment)
    submissions = get_submissions(listing, args, queue)
    if args.dry_run:
        for _, command in submissions:
            print(shlex.join(command))
        for task in some_tasks:
            print(f"would submit: {shlex.join(task.get_command())}")
        return
    util.write(path, json.dumps(listing._asdict(), indent=1, default=str).encode())
    for indices, command in submissions:
        print(f"Submitted batch job {submit(listing, indices, command)}")
    for task in some_tasks:
        print(f"{task}: submitted")
    log = "eval_ALGORITHM.log" if args.eval_logp else "train.log"
    print(f"their logs are {util.SAVE}/RUN/logs/{log}, Slurm's own output {FOLDER}/JOB.out; see python sweep.py --status")


def asks_for_gpu(options):
    """Whether options of sbatch, a text, ask for a GPU; the last --gres counts"""
    gres = re.findall(r"--gres[= ](\S+)", options)
    return "gpu" in "".join(gres[-1:]) or re.search(r"--gpus|--tres-per-\w+[= ]\S*gpu|(^| )-[HhOsvV]*G", options) is not None


def get_submissions(listing, args, queue):
    """Pairs of the indices of a listing's tasks and the command that submits them"""
    groups = {}  # numbers of jobs to wait for -> indices
    for i, task in enumerate(listing.tasks):
        groups.setdefault(tuple(get_trainings(task, queue)), []).append(i)
    if args.jobs:  # one array for all, since Slurm limits the jobs of each
        groups = {tuple(dict.fromkeys(itertools.chain(*groups))): range(len(listing.tasks))}
    chains = [([i], get_chain(listing, i)) for i in groups.pop((), [])] if is_repeated(args) else []
    return chains + [(indices, get_array(listing, indices, after, args.jobs)) for after, indices in groups.items()]


def get_trainings(task, queue):
    """The numbers of the jobs in the queue that train an evaluation's model"""
    return [job.number for job in queue if job.task.key == (task.model, "train")]


def submit(listing, indices, command):
    """Submits some of a listing's tasks by a command, and notes it in their logs. Returns: the job's number. Raises: UserError
    with Slurm's reason if it refuses, which om-repeat's exit status does not show"""
    process = call(command)
    text = process.stdout + process.stderr
    match = re.search(r"^Submitted batch job (\d+)", text, re.M)
    if not match:
        raise UserError(f"{command[0]} refused the job: {' '.join(re.findall('.*error.*', text))}")
    jobs = {i: match[1] if command[0] == "om-repeat" else f"{match[1]}_{i}" for i in indices}
    for i, job in jobs.items():  # at once, before they start
        tasks.open_log(listing.tasks[i], f", submitted as job {job}").close()
    for i, job in jobs.items():
        if len(jobs) > 1:  # an array has one name for all of its jobs
            with contextlib.suppress(UserError):  # it may have ended already
                call(["scontrol", "update", f"JobId={job}", f"JobName={get_job_name(listing.tasks[i])}"])
    return match[1]


# ------------------------------------------------------------------ the queue


class Job(NamedTuple):
    """A task in Slurm's queue"""

    number: str  # as scancel takes it
    state: str  # Slurm's: PENDING, RUNNING, ...
    reason: str  # why it is pending
    task: Task  # as it was submitted


def get_queue(essential=True):
    """The jobs submitted from this folder, a list of Job. Raises: UserError if Slurm does not answer and that is essential"""
    if shutil.which("squeue") is None:
        return []
    try:
        lines = call(["squeue", "--me", "--noheader", "--array", "--format=%i|%K|%T|%r|%k"]).stdout.splitlines()
    except UserError as error:
        if essential:
            raise
        warn(str(error))
        return []
    jobs, listings = [], {listing.path.stem: listing for listing in read_listings(essential)}
    for line in [line for line in lines if line.count("|") >= 4]:  # comments of other jobs may have several lines
        number, array_index, state, reason, comment = line.split("|", 4)
        match = re.fullmatch(rf"{get_tag()}-([0-9a-f]+)(?:-(\d+))?", comment)
        if match and match[1] in listings:
            task = listings[match[1]].tasks[int(match[2] or array_index)]
            jobs.append(Job(number, state, reason if state == "PENDING" else "", task))
    return jobs


def cancel(jobs):
    """Cancels jobs, and those that om-repeat has queued behind them since. Returns: how many"""
    keys, cancelled = {job.task.key for job in jobs}, set()
    while numbers := {job.number for job in jobs} - cancelled:
        call(["scancel", *sorted(numbers)])
        cancelled |= numbers
        jobs = [job for job in get_queue() if job.task.key in keys]
    return len(cancelled)


# ------------------------------------------------------------------ what became of a job


def get_attempts(task):
    """What a task's log says about its jobs since it was submitted. Returns: the number of the last job, "" if the task has run
    here since; the steps saved at each start"""
    number, starts = "", []
    for header in filter(None, map(tasks.HEADER.match, tasks.read_log(task))):
        submitted, number, step = header.groups("")
        starts = [*starts, int(step)] if step else []
    return number, starts


def describe(task):
    """What became of a task that is no longer in the queue, in Slurm's words, and whether it failed: from its accounting or,
    without that, from the scheduler, which remembers jobs for a while"""
    number, _ = get_attempts(task)
    if not number:
        return "", False
    state, words = "", "Slurm no longer knows it"
    try:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode"]
        state, exit_code = call(command).stdout.splitlines()[-1].split("|")
        words = f"{state}, exit code {exit_code}"
    except (UserError, IndexError):
        with contextlib.suppress(UserError, KeyError):
            record = get_record(number)
            state = record["JobState"]
            words = ", ".join(f"{name} {record[name]}" for name in ("JobState", "Reason", "Restarts", "ExitCode"))
    output = FOLDER / f"{number}.out"
    end = output.read_text(errors="replace").strip().split("\n")[-1] if output.exists() else ""
    return f"job {number}: {words}; the end of {output}: {end or 'nothing'}", state in FAILURES


# ------------------------------------------------------------------ what a job runs


def run_task(where):
    """Runs a task of a listing. Args: where: FILE:INDEX, in a chain of jobs, or FILE with the array's index. Returns: the exit
    status"""
    path, _, index = where.rpartition(":") if re.search(r":\d+$", where) else (where, "", os.environ.get("SLURM_ARRAY_TASK_ID"))
    try:
        listing, index = read_listing(path), int(index)
        task = listing.tasks[index]
    except (UserError, ValueError, TypeError, IndexError):
        raise UserError(f"--task {where!r} is not a task of a sweep; this option is for Slurm jobs, not for people") from None
    # Slurm falls back to /tmp if a job's folder is gone
    if not (FOLDER.exists() and os.path.samefile(FOLDER, listing.path.parent)):
        raise UserError(f"this job runs in {os.getcwd()}, whose {FOLDER} is not that of its sweep: submit it anew from there")
    os.environ.update(listing.environment)
    is_chain = path != where
    number = os.environ.get("SLURM_JOB_ID", "") if is_chain else f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{index}"
    with StopSignal() as stop, tasks.open_log(task, f", job {number} at step {tasks.get_progress(task).steps}") as log:
        try:
            status = try_to_run(listing, index, number, log, stop)
        except UserError as error:
            log.write(f"{error}\n")
            status = 2
        tasks.write_status(task, status)
        if is_chain and tasks.was_stopped(status):
            log.write("saved; waiting for Slurm to end this job, so that om-repeat starts the next\n")
            log.flush()
            time.sleep(HOLD)  # if the job ended by itself, so would the chain
        elif status == 128 + signal.SIGUSR1:
            requeue(number, stop)
    return status


def try_to_run(listing, index, number, log, stop):
    """Runs a task as the job of that number, unless it was started too often without progress; an evaluation whose model is
    still being trained is resubmitted. Returns: the exit status. Raises: UserError if it cannot run"""
    task = listing.tasks[index]
    _, starts = get_attempts(task)
    if len(starts) >= MAX_STARTS and len(set(starts[-MAX_STARTS:])) == 1:
        raise UserError(f"{MAX_STARTS - 1} requeues without progress (at step {starts[-1]}): it does not start again")
    if task.kind != "train" and not (training := tasks.get_training_progress(task)).done:
        trainings = get_trainings(task, get_queue())
        if not trainings:
            raise UserError(
                f"its model is not fully trained ({training.iteration} of {task.total} iterations): nothing to evaluate"
            )
        submit(listing, [index], get_array(listing, [index], trainings))
        return 0
    return run_command(get_command(listing, task), log, stop, get_job_end(number))


def get_command(listing, task):
    """The task's command, run after the user's line of shell code, in a login shell: on many clusters only these have
    `module`"""
    if not listing.setup:
        return task.get_command()
    script = "{ " + listing.setup + '\n} || exit\nexec "$@"'
    return ["bash", "-lc", script, "bash", *task.get_command()]


def get_job_end(number):
    """When a job must end, in seconds since the epoch; infinity if Slurm does not say. Slurm sets it in the job's environment;
    versions before 23 have to be asked"""
    with contextlib.suppress(UserError, KeyError, ValueError):
        if os.environ.get("SLURM_JOB_END_TIME"):
            return float(os.environ["SLURM_JOB_END_TIME"])
        return datetime.datetime.fromisoformat(get_record(number)["EndTime"]).timestamp()
    return math.inf


def run_command(command, log, stop, end):
    """Runs a command with one thread per CPU of the job, passes signals on, and sends SIGUSR1 shortly before the job's end.
    Args: end: of the job, in seconds since the epoch. Returns: the exit status"""
    environment, num_cpus = dict(os.environ), os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    if num_cpus:  # more would slow each other down several times over
        environment["OMP_NUM_THREADS"] = num_cpus
    start = time.time()
    ignore_warning = functools.partial(signal.signal, signal.SIGUSR1, signal.SIG_IGN)  # until it can save
    options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=ignore_warning)
    process = subprocess.Popen(command, **options)
    due, is_warned, other = end - min(WARNING, (end - start) / 5), False, None
    while process.poll() is None:
        number, stop.received = stop.received, None
        if number == signal.SIGUSR1:  # Slurm's warning comes at about `due`; an earlier one is from somebody else
            is_warned |= time.time() < end - WARNING - EARLY
        elif number is not None:
            process.send_signal(number)
            other = number if time.time() < end else other  # at the limit, Slurm sends SIGTERM to jobs that are not cancelled
        if other is None and (is_warned or time.time() >= due):  # again and again, since it may still be starting
            process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
    stop.received = other or stop.received
    if process.returncode < 0:
        log.write(f"{tasks.describe_end(process.returncode)}\n")
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def requeue(number, stop):
    """Requeues a job unless it has been cancelled, trying again while Slurm is down; it ends at its limit at the latest"""
    while stop.received in (None, signal.SIGUSR1):
        try:
            return call(["scontrol", "requeue", number])
        except UserError as error:
            print(f"job {number} cannot be requeued; trying again: {error}", flush=True)
            time.sleep(3)
