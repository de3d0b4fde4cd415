"""Tasks on Slurm: job arrays that requeue themselves, or chains of jobs repeated by openmind-tools' om-repeat.

Large, since a sweep outlives what clusters do to jobs (docs/slurm.md, "What happens when"), and both kinds differ in all of it.
Nothing passes through a shell here; arguments that om-repeat would mangle are refused.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import util
from cluster import attempts, commands
from cluster.tasks import (
    ROOT,
    Task,
    describe_signal,
    get_progress,
    get_visible_gpus,
    is_trained,
    open_log,
    run_all,
    was_stopped,
)
from runs.saving import StopSignal, get_job_end
from util import UserError

TIME = "12:00:00"
TIME_OF_REPEATED = "2:00:00"
WARNING = 120  # seconds before a job's time limit
EARLY = 60  # seconds by which Slurm's warning may come too early
MAX_NAMED = 64  # tasks of an array that get names of their own
HOLD = 600  # seconds that a task repeated by om-repeat waits to be killed
FOLDER = util.SAVE / ".sweep"  # listings of submitted tasks, and Slurm's own output


class Job(NamedTuple):
    """A task in Slurm's queue"""

    number: str | None  # the name by which scancel knows it; None if the training's job will submit it
    model: str
    kind: str
    state: str  # Slurm's: PENDING, RUNNING, ...
    reason: str  # why it is pending
    repeated: bool  # part of a chain of jobs, by om-repeat


def get_tag():
    """The prefix of the comments of jobs submitted from this folder, by which they are found"""
    return "strokes-" + hashlib.sha1(os.fsencode(util.SAVE.resolve())).hexdigest()[:8]


# ------------------------------------------------------------------ listings of submitted tasks


class Listing(NamedTuple):
    """The tasks submitted by one call of sweep.py, in which its jobs look up theirs"""

    path: pathlib.Path
    repeated: bool  # whether om-repeat repeats its jobs
    setup: str  # a line of shell code
    warning: int  # seconds before a job's time limit at which it should save and stop
    tasks: list
    packs: list  # for each job, by its index in an array: the indices of the tasks that it runs
    max_requeues: int = attempts.MAX_REQUEUES  # limit of requeues without progress
    environment: dict = {}  # variables that the tasks need; a site may pass none of the user's on to jobs

    def get_pack(self, index):
        """The tasks that a job runs. Raises: IndexError if there is none"""
        return [self.tasks[i] for i in self.packs[index]]

    @property
    def name(self):
        """8 hexadecimal digits"""
        return self.path.stem


def write_listing(listing):
    content = {name: value for name, value in listing._asdict().items() if name != "path"}
    util.write(listing.path, json.dumps(content, indent=1).encode())


def read_listing(path):
    """Raises: UserError if there is none"""
    try:
        content = json.loads(pathlib.Path(path).read_text())
        content["tasks"] = [Task(*task) for task in content["tasks"]]
        return Listing(pathlib.Path(path), **content)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a listing of submitted tasks") from None


def get_submitted():
    """What was submitted from this folder, newest first: pairs of Listing and its tasks of runs that are still there"""
    found = []
    for path in FOLDER.glob("*.json"):
        try:
            listing = read_listing(path.resolve())
            tasks = [task for task in listing.tasks if (util.SAVE / task.model).is_dir()]
            found.append((path.stat().st_mtime, listing, tasks))
        except (UserError, OSError):
            continue
    return [(listing, tasks) for _, listing, tasks in sorted(found, key=lambda item: item[0], reverse=True)]


# ------------------------------------------------------------------ options for sbatch


def get_seconds(limit):
    """Parses Slurm's time formats: minutes, minutes:seconds, hours:minutes:seconds, optionally after days-"""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise UserError(f"--time {limit} is not a Slurm time limit, such as 2:00:00, 90 or 1-12:00:00")
    days, *rest = (None if part is None else int(part) for part in match.groups())
    numbers = [number for number in rest if number is not None]
    if days is not None:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(numbers)]
    return (days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def is_repeated(args):
    return not args.no_repeat and shutil.which("om-repeat") is not None


# Options of sweep.py that --sbatch may override, in all of their forms
OVERRIDABLE = {
    "time": ["-t", "--time"],
    "mem": ["--mem"],
    "cpus-per-task": ["-c", "--cpus-per-task"],
    "partition": ["-p", "--partition"],
    "gres": ["--gres"],
}
# Options that would break a sweep, by the reason
REFUSED = {
    "it changes what sbatch prints": "parsable quiet Q",
    "nothing would be submitted; --dry-run shows what would be": "test-only",
    "use --wait of sweep.py": "wait W",
    "jobs run in the folder that holds save/": "chdir D",
    "sweep.py could not find its jobs; set $SLURM_CLUSTERS": "clusters M",
    "sweep.py gives jobs their commands": "wrap",
    "sweep.py numbers its tasks": "array a",
    "sweep.py names its jobs": "job-name J",
    "sweep.py finds its jobs by it": "comment",
    "sweep.py shows where it is": "output o",
    "it is in the output": "error e",
    "sweep.py sets when a job is warned": "signal",
    "sweep.py decides it": "requeue no-requeue",
    "sweep.py sets it": "open-mode",
}


def get_option(args, name):
    """The value of an option of sweep.py, which --sbatch may override; None if there is none"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*OVERRIDABLE[name], dest="value", default=getattr(args, name.replace("-", "_")))
    try:
        value = parser.parse_known_args(split_options(args.sbatch))[0].value
    except argparse.ArgumentError as error:
        raise UserError(f"--sbatch {args.sbatch!r}: {error}") from None
    return None if value in (None, "", "none") else value


def get_limit(args):
    """The time limit of a job, or None: that of the partition"""
    if args.time is None and get_option(args, "time") is None:
        return TIME_OF_REPEATED if is_repeated(args) else TIME
    return get_option(args, "time")


def get_warning(args):
    """Seconds before the time limit; a fifth of a short limit"""
    limit = get_limit(args)
    if limit is None or limit.upper() in ("UNLIMITED", "INFINITE"):
        return WARNING
    return min(WARNING, max(get_seconds(limit) // 5, 1))


def get_options(args):
    """sbatch options that do not depend on the task, each one word; the user's own come last and take precedence"""
    repeated = is_repeated(args)
    options = [f"--time={get_limit(args)}"] * (get_limit(args) is not None)
    options += [f"--mem={args.mem}"] * (args.mem not in ("", "none"))
    options += [f"--cpus-per-task={args.cpus_per_task}"] * (args.cpus_per_task is not None)
    options += [f"--partition={args.partition}"] * bool(args.partition)
    options += [f"--gres={args.gres}"] * (args.gres not in ("", "none"))
    if args.mail:
        address, _, types = args.mail.partition(":")
        options += [f"--mail-user={address}", f"--mail-type={types or 'END,FAIL'}"]
    if repeated:
        options += ["--no-requeue"]  # om-repeat's chain goes on with another job
    else:
        options += [f"--signal=B:USR1@{get_warning(args)}", "--requeue", "--open-mode=append"]
    return options + split_options(args.sbatch)


def split_options(text):
    """Splits --sbatch into words. Raises: UserError for an open quote, or for options that would break the sweep"""
    words = util.split_words("--sbatch", text)
    for word in words:
        match = re.match(r"--([\w-]+)|-([A-Za-z])", word)
        name = match[1] or match[2] if match else None
        for reason, names in REFUSED.items():
            if name in names.split():
                raise UserError(f"--sbatch {word}: leave it out, since {reason}")
    return words


# ------------------------------------------------------------------ submitting


def get_script(listing, index=None):
    """The command of a job: it runs a pack of a listing, the one at the job's array index or at a given index"""
    where = listing.path if index is None else f"{listing.path}:{index}"
    return [str(ROOT / "cluster/slurm_job.sh"), sys.executable, str(ROOT / "sweep.py"), f"--task={where}"]


def get_job_name(task):
    """What squeue and mails show: mws_20, or mws_20:rws for an evaluation"""
    return task.model if task.kind == "train" else f"{task.model}:{task.kind}"


def name_jobs(tasks):
    """Gives the jobs of an array names of their own, if there are not too many to ask Slurm for that. Args: tasks: {job: task}"""
    if 1 < len(tasks) <= MAX_NAMED:
        for job, task in tasks.items():
            with contextlib.suppress(UserError):  # they may be running, or over, already
                commands.call(["scontrol", "update", f"JobId={job}", f"JobName={get_job_name(task)}"])


def get_array(listing, indices, args, dependency=None):
    """The command that submits some of a listing's tasks as a job array, --tasks-per-job of them in each job"""
    first = len(listing.packs)
    listing.packs.extend(indices[i : i + args.tasks_per_job] for i in range(0, len(indices), args.tasks_per_job))
    throttle = f"%{args.jobs}" if args.jobs else ""
    options = [*get_options(args), f"--array={first}-{len(listing.packs) - 1}{throttle}"]
    names = {get_job_name(listing.tasks[i]) for i in indices}
    options += [f"--output={FOLDER.resolve() / '%A_%a.out'}", f"--comment={get_tag()}-{listing.name}"]
    options += ["-J", names.pop() if len(names) == 1 else f"{len(names)}_strokes"]
    # an evaluation whose training fails leaves the queue
    options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return ["sbatch", *options, *get_script(listing)]


def get_repeated(listing, index, args):
    """The command that submits a task by om-repeat. Raises: UserError if om-repeat would mangle it"""
    output = (util.SAVE / listing.tasks[index].model / "logs" / "slurm-%j.out").resolve()
    comment = f"--comment={get_tag()}-{index}-{listing.name}"
    name = re.sub(r"[^\w./=:,@%+-]", "_", get_job_name(listing.tasks[index]))
    options = [*get_options(args), f"--output={output}", comment, "-J", name]
    command = ["om-repeat", "sbatch", *options, *get_script(listing, index)]
    for word in command:
        if not re.fullmatch(r"[\w./=:,@%+-]+", word, re.ASCII):
            raise UserError(
                f"om-repeat splits its command at spaces and special characters, and {word!r} has some;"
                " move to another folder, or give --no-repeat"
            )
    return command


def submit_tasks(tasks, args, queue, environment, dry_run=False):
    """Submits tasks. Evaluations whose training is in the queue (a list of jobs) start after it.

    Args: environment: variables that the tasks need, a dict
    Raises: UserError at the first job that Slurm refuses, or if something cannot be submitted
    """
    repeated = is_repeated(args)
    for flag, wanted in {"--tasks-per-job": args.tasks_per_job > 1, "--jobs": args.jobs}.items():
        if repeated and wanted:
            raise UserError(f"{flag} is for job arrays, which om-repeat does not submit; give --no-repeat")
    name = hashlib.sha1(f"{time.time_ns()} {os.getpid()}".encode()).hexdigest()[:8]
    path, warning = (FOLDER / f"{name}.json").resolve(), get_warning(args)
    packs = [[i] for i in range(len(tasks))] if repeated else []
    listing = Listing(path, repeated, args.setup, warning, tasks, packs, args.max_requeues, environment)
    submissions, later = get_submissions(listing, args, queue)
    if dry_run:
        print("\n".join(shlex.join(command) for command in [*(command for _, command in submissions), *later.values()]))
        return
    write_listing(listing)
    for task in tasks:
        util.make_folder(task.get_path("log").parent)
    submit_commands(listing, submissions)
    for i, command in later.items():
        put_after_training(tasks[i].model, [(tasks[i], command)])
        if is_trained(tasks[i]):  # its training may have ended before its successor was recorded
            print("\n".join(submit_after_training(tasks[i].model)))
    for i, task in enumerate(tasks):
        print(f"{task}: {'will be submitted when its training is complete' if i in later else 'submitted'}")
    output = util.SAVE / "RUN/logs/slurm-JOB.out" if repeated else FOLDER / "JOB_INDEX.out"
    log = "eval_ALGORITHM.log" if args.eval_logp else "train.log"
    print(f"their logs are {util.SAVE}/RUN/logs/{log}, Slurm's own output {output}; see python sweep.py --status")


def get_submissions(listing, args, queue):
    """Returns: pairs of the indices of tasks and the command that submits them now; {index: the command that submits it after
    its training}, of those whose training, or they themselves, are repeated by om-repeat"""
    tasks, trainings = listing.tasks, collections.defaultdict(list)  # model -> the jobs that train it
    for job in queue:
        trainings[job.model] += [job] * (job.kind == "train")
    waiting = [i for i, task in enumerate(tasks) if task.kind != "train" and trainings[task.model]]
    ready = [i for i in range(len(tasks)) if i not in waiting]
    after = [i for i in waiting if listing.repeated or any(job.repeated for job in trainings[tasks[i].model])]
    if listing.repeated:
        chains = [get_repeated(listing, i, args) for i in range(len(tasks))]
        return [([i], chains[i]) for i in ready], {i: chains[i] for i in after}
    dependent = [i for i in waiting if i not in after]
    return get_arrays(listing, ready, dependent, trainings, args), {i: get_array(listing, [i], args) for i in after}


def submit_commands(listing, submissions):
    """Runs pairs of the indices of tasks and the command that submits them, and records their jobs. Raises: UserError at the
    first that Slurm refuses"""
    num_submitted, positions = 0, {i: position for position, pack in enumerate(listing.packs) for i in pack}
    for indices, command in submissions:
        try:
            number = submit_command(command)
        except UserError as error:
            before = f"; {num_submitted} jobs were submitted before it" if num_submitted else ""
            raise UserError(f"{error}{before}") from None
        num_submitted += 1
        jobs = {}
        for i in indices:
            job, task = number if listing.repeated else f"{number}_{positions[i]}", listing.tasks[i]
            attempts.note_submission(task, listing.name, job, get_output(listing, i, job))
            take_after_training(task.model, [task.kind])
            jobs[job] = task
        print(f"Submitted batch job {number}")
        if len(jobs) == len(indices):  # none runs several tasks
            name_jobs(jobs)


def get_arrays(listing, ready, waiting, trainings, args):
    """The tasks and sbatch command of each array. With --jobs everything goes into one, since Slurm limits arrays."""
    tasks = listing.tasks
    if args.jobs and waiting:
        numbers = dict.fromkeys(job.number for i in waiting for job in trainings[tasks[i].model])
        dependency = "afterany:" + ":".join(numbers)
        return [(ready + waiting, get_array(listing, ready + waiting, args, dependency))]
    submissions = [(ready, get_array(listing, ready, args))] if ready else []
    for model in dict.fromkeys(tasks[i].model for i in waiting):
        indices = [i for i in waiting if tasks[i].model == model]
        numbers = [job.number for job in trainings[model]]
        submissions.append((indices, get_array(listing, indices, args, "afterok:" + ":".join(numbers))))
    return submissions


def submit_command(command):
    """Returns: the job's number. Raises: UserError with Slurm's reason if there is none; om-repeat's exit status does not
    tell, and it prints more than sbatch does"""
    answer = commands.call(command)
    text = answer.stdout + answer.stderr
    match = re.search(r"^Submitted batch job (\d+)", text, re.M)
    if answer.status == 0 and match:
        return match[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " ".join([line for line in lines if "error" in line.lower()] or lines[-3:]) or "it said nothing"
    raise UserError(f"{command[0]} refused the job: {reason}")


def get_output(listing, index, job):
    """Path of Slurm's own output of a task"""
    if listing.repeated:
        return str((util.SAVE / listing.tasks[index].model / "logs" / f"slurm-{job}.out").resolve())
    return str(FOLDER.resolve() / f"{job}.out")


# ------------------------------------------------------------------ after a training that om-repeat repeats

# Slurm's dependencies refer to single jobs, but a repeated task is a chain of jobs, and om-repeat sets the dependencies
# of its jobs itself. So the last job of a training submits what comes after it.


def get_after_path(model):
    return util.SAVE / model / "logs" / "after_training.json"


def put_after_training(model, left):
    """Leaves pairs (task, command) for the training of a model to submit"""
    left = [*take_after_training(model), *left]
    if left:
        util.write(get_after_path(model), json.dumps(left, indent=1).encode())


def take_after_training(model, kinds=None):
    """Takes what was left for the training of a model to submit, all of it or the tasks of some kinds; nothing is taken twice.
    Returns: [(task, command)]"""
    path = get_after_path(model)
    taken = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        os.rename(path, taken)
    except FileNotFoundError:
        return []
    left = [(Task(*task), command) for task, command in json.loads(taken.read_text())]
    taken.unlink()
    wanted = [(task, command) for task, command in left if kinds is None or task.kind in kinds]
    if len(wanted) < len(left):
        put_after_training(model, [pair for pair in left if pair not in wanted])
    return wanted


def submit_after_training(model):
    """Submits what was left for the training of a model; what Slurm refuses stays on the list, for the next submission to
    take up. Returns: lines of text that say what was submitted"""
    lines, refused = [], []
    for task, command in take_after_training(model):
        try:
            number = submit_command(command)
            lines.append(f"submitted {task} as job {number}")
            attempts.note_submission(task, "", number, "")
        except UserError as error:
            lines.append(f"{task}: {error}")
            refused.append((task, command))
            attempts.write(task, attempts.read(task)._replace(refused=str(error)))
    put_after_training(model, refused)
    return lines


# ------------------------------------------------------------------ the queue


def get_queue():
    """The jobs submitted from this folder, a list of Job, and the number from each other folder, {folder: number}.
    Raises: UserError if Slurm does not answer"""
    if shutil.which("squeue") is None:
        return [], {}
    answer = commands.call(["squeue", "--me", "--noheader", "--array", "--format=%i|%K|%T|%r|%k|%Z"])
    if answer.status != 0:
        *_, reason = ["squeue failed", *answer.stderr.strip().splitlines()]
        raise UserError(f"Slurm does not answer ({reason})")
    jobs, others, listings = [], collections.Counter(), {}
    for line in answer.stdout.splitlines():
        number, array_index, state, reason, comment, folder = line.split("|", 5)
        match = re.fullmatch(r"(strokes-[0-9a-f]{8})-(?:(\d+)-)?([0-9a-f]{8})", comment)
        if match and match[1] == get_tag():
            for task in find_tasks(match, array_index, listings):
                reason = reason if state == "PENDING" else ""
                jobs.append(Job(number, task.model, task.kind, state, reason, listings[match[3]].repeated))
        elif match:
            others[folder] += 1
    jobs += [job for job in get_waiting() if (job.model, "train") in {(job.model, job.kind) for job in jobs}]
    return jobs, others


def find_tasks(match, array_index, listings):
    """Finds the tasks of a job by the parts of its comment; none if it is not ours"""
    if match[3] not in listings:
        try:
            listings[match[3]] = read_listing(FOLDER / f"{match[3]}.json")
        except UserError:
            listings[match[3]] = None
    listing = listings[match[3]]
    index = match[2] if listing and listing.repeated else array_index
    if not listing or not str(index).isdigit() or int(index) >= len(listing.packs):
        return []
    return listing.get_pack(int(index))


def get_waiting():
    """The evaluations that trainings will submit"""
    jobs = []
    for path in util.SAVE.glob("*/logs/after_training.json"):
        try:
            tasks = [Task(*task) for task, _ in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            continue
        jobs += [Job(None, task.model, task.kind, "PENDING", "", False) for task in tasks]
    return jobs


def cancel(jobs):
    """Cancels jobs, and those that om-repeat has queued behind them since. Returns: how many"""
    commands.require("scancel")
    waiting = [job for job in jobs if job.number is None]
    for job in waiting:
        take_after_training(job.model, [job.kind])
    wanted, cancelled = {(job.model, job.kind) for job in jobs}, set()
    for _ in range(10):
        numbers = {job.number for job in jobs if job.number is not None} - cancelled
        if not numbers:
            break
        answer = commands.call(["scancel", *sorted(numbers)])
        if answer.status != 0:
            raise UserError(f"scancel failed: {' '.join(answer.stderr.split())}")
        cancelled |= numbers
        jobs = [job for job in get_queue()[0] if (job.model, job.kind) in wanted and job.state != "COMPLETING"]
    return len(cancelled) + len(waiting)


# ------------------------------------------------------------------ what a job runs


def run_task(where):
    """Args: where: FILE:INDEX, or FILE with the array's index. Returns: the exit status"""
    listing, pack = find_own_tasks(where)
    os.environ.update(listing.environment)
    if len(pack) > 1:
        return run_pack(listing, pack)
    (task,), job = pack, get_job_number()
    with StopSignal() as stop, open_log(task) as log:
        stopped = attempts.note_start(task, listing.name, job, listing.max_requeues) or check_trained(task)
        if stopped:
            log.write(f"{stopped}\n")
            status = 1
        else:
            if listing.repeated:
                check_successor(task, log)
            status = run_command(get_command(listing, task), log, stop, listing.warning)
            if status == 128 + signal.SIGKILL:
                log.write(f"{describe_signal(signal.SIGKILL)}; Slurm may say more: sweep.py --status\n")
        task.get_path("status").write_text(f"{status}\n")
        if status == 0 and task.kind == "train":
            log.writelines(f"{line}\n" for line in submit_after_training(task.model))
        if listing.repeated and was_stopped(status):
            hold(log)
    return status


def run_pack(listing, pack):
    """Runs several tasks side by side in one job, as a sweep does on its own machine; warned, all of them save and stop.
    Returns: the exit status"""
    left, num_refused = [], 0
    for task in pack:
        stopped = get_progress(task).done or attempts.note_start(task, listing.name, get_job_number(), listing.max_requeues)
        stopped = stopped or check_trained(task)
        if not stopped:
            left.append(task)
        elif stopped is not True:
            num_refused += 1
            with open_log(task) as log:
                log.write(f"{stopped}\n")
            task.get_path("status").write_text("1\n")
    with StopSignal() as stop:
        num_gpus = len(get_visible_gpus()) if any("--cuda" in task.flags for task in left) else 0
        num_done = run_all(left, len(left), num_gpus, stop, lambda task: get_command(listing, task))
    for task in pack:
        if task.kind == "train" and is_trained(task):
            print("\n".join(submit_after_training(task.model)))
    if stop.received is not None:
        return 128 + stop.received
    return 0 if num_done == len(left) and not num_refused else 1


def check_trained(task):
    """Why a task cannot run yet, or "" """
    if task.kind != "train" and not is_trained(task):
        return "its model is not fully trained: nothing to evaluate"
    return ""


def get_job_number():
    """The number of the job around this process, as scancel takes it"""
    array, index = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def check_successor(task, log):
    """om-repeat's chain ends, without a word, if Slurm refuses the next job: then says so in the log and in --status"""
    try:
        others = [job for job in get_queue()[0] if (job.model, job.kind) == (task.model, task.kind)]
    except UserError:
        return
    if len(others) == 1:
        refused = "no job is queued behind this one, so the task ends with it; submit it again if it is not complete then"
        log.write(f"warning: {refused}\n")
        log.flush()
        attempts.write(task, attempts.read(task)._replace(refused=refused))


def find_own_tasks(where):
    """Returns: a Listing, and the tasks of this job. Raises: UserError if there is none"""
    path, _, index = where.rpartition(":") if re.search(r":\d+$", where) else (where, "", None)
    index = os.environ.get("SLURM_ARRAY_TASK_ID") if index is None else index
    try:
        listing = read_listing(path)
        return listing, listing.get_pack(int(index))
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
    job_end = get_job_end()  # known before the warning, at which Slurm might take its time to answer, or be down
    if job_end is not None:
        environment["SLURM_JOB_END_TIME"] = str(int(job_end))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=_ignore_warning
    )
    warn_at = None
    while process.poll() is None:
        number, stop.received = stop.received, None
        if number == signal.SIGUSR1 and warn_at is None:
            warn_at = time.monotonic() + get_delay(warning, job_end)
        elif number not in (None, signal.SIGUSR1):
            process.send_signal(number)
        if warn_at is not None and time.monotonic() >= warn_at:
            process.send_signal(signal.SIGUSR1)
            warn_at = time.monotonic() + 5  # again, in case it was still starting
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _ignore_warning():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it can save


def get_delay(warning, job_end):
    """Slurm may warn up to a minute early, which could leave nothing of a short job. Returns: seconds to wait until the
    warning is due; 0 for signals even earlier than that, which somebody sent to stop the job now"""
    early = 0 if job_end is None else job_end - warning - time.time()
    return early if 0 < early <= EARLY else 0


def hold(log):
    """Waits to be killed: if the job ended by itself, om-repeat would take it for complete and not repeat it"""
    log.write("saved; waiting for Slurm to end this job, so that om-repeat starts the next\n")
    log.flush()
    time.sleep(HOLD)
