"""Trains and evaluates the models of the paper, here or on Slurm.

    python sweep.py --jobs 2              # train all here, two at a time; then
    python sweep.py --jobs 2 --eval-logp  # evaluate each three times
    python sweep.py --cluster             # the same on Slurm, and
    python sweep.py --cluster --eval-logp
    python sweep.py --status              # how far it is

What is complete is left alone, so that a sweep that was stopped goes on when it is started again.
"""

import environment  # noqa: F401  # isort: skip  (before torch)
import argparse
import itertools
import shlex
import shutil
import sys
import time

import torch

import main as training
import report
import slurm
import tasks
import util
from tasks import Task
from util import UserError

NUM_LATENTS = [3, 5, 10, 20, 40]  # of an image; for mws, remembered and proposed ones
TEST_RUN_EVALUATION = ["--num-data=5", "--num-iterations=10", "--num-particles=10", "--test-num-particles=100"]

# ------------------------------------------------------------------ the models


def get_sweep_argss(test_run=False, data_location=None):
    """Yields main.py's arguments, a namespace for each model of section 4.2: mws, rws and vimco with 3 to 40 latents
    on the small data set, and the alphabet-conditional mws model.

    Args: test_run: with --test-run; data_location: instead of the default
    """
    common = ["--test-run"] * test_run + ["--data-location", data_location] * (data_location is not None)
    for algorithm, num_latents in itertools.product(["mws", "rws", "vimco"], NUM_LATENTS):
        memory_size = (num_latents + 1) // 2 if algorithm == "mws" else 0
        flags = ["--small-dataset", "--algorithm", algorithm, "--num-particles", str(num_latents - memory_size)]
        flags += ["--memory-size", str(memory_size)] if memory_size else []
        yield training.parse_args([*common, *flags])
    yield training.parse_args([*common, *"--condition-on-alphabet --num-particles 20 --memory-size 20".split()])


def get_flags(args):
    """main.py's flags for a namespace of its arguments, each one word"""
    flags, defaults = [], vars(training.parse_args([]))
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value == defaults.get(name) or value is None or name == "cuda":
            continue
        if name == "compile":
            flags.append(flag if value else "--no-compile")
        else:
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def get_tasks(args):
    """The sweep's tasks, [(index, Task)], with --models those of some models.
    Raises: UserError if one of these is not in the sweep"""
    all_tasks = []
    for model_args in get_sweep_argss(args.test_run, args.data_location):
        model, total = util.get_path_base(model_args), model_args.num_iterations
        if not args.eval_logp:
            all_tasks.append(Task(model, "train", get_flags(model_args), total))
            continue
        for algorithm in report.ALGORITHMS:
            flags = [f"--checkpoint-path={util.get_checkpoint_path(model)}", f"--algorithm={algorithm}"]
            flags += [f"--data-location={args.data_location}"] * (args.data_location is not None)
            all_tasks.append(Task(model, algorithm, flags + TEST_RUN_EVALUATION * args.test_run, total))
    models = list(dict.fromkeys(task.model for task in all_tasks))
    unknown = [model for model in args.models or [] if model not in models]
    if unknown:
        raise UserError(f"--models: {', '.join(unknown)} is not in the sweep, which has {', '.join(models)}")
    return [(i, task) for i, task in enumerate(all_tasks) if not args.models or task.model in args.models]


def choose_tasks(args):
    """The tasks that are left to do; what is left out is counted or named"""
    left, num_done = [], 0
    for index, task in get_tasks(args):
        progress = tasks.get_progress(task)
        if progress.done:
            num_done += 1
        elif task.kind != "train" and (progress.iteration or 0) < task.total:
            print(f"{task}: its model is not trained yet ({progress.iteration or 0} of {task.total}), left out")
        else:  # an evaluation of the model as it was before is out of date
            flags = ["--force"] if progress.value and task.kind != "train" else []
            left.append((index, task._replace(flags=task.flags + flags)))
    if num_done:
        print(f"{num_done} are complete already")
    return left


# ------------------------------------------------------------------ what the script does


def run_here(args):
    """Runs what is left to do on this machine. Returns: 0 if all ended well, 1, or 128 + the signal that stopped it"""
    left = [task for _, task in choose_tasks(args)]
    use_cuda = torch.cuda.is_available() if args.cuda is None else args.cuda
    num_gpus = torch.cuda.device_count() if use_cuda else 0
    if args.dry_run:
        for task in left:
            print(shlex.join(task.get_command() + ["--cuda"] * (num_gpus > 0)))
        return 0
    with util.StopSignal() as stop:
        num_done = tasks.run_here(left, args.jobs, num_gpus, stop)
    print(
        f"{num_done} of {len(left)} done, in {util.SAVE}/"
        + ("; the same command goes on" if num_done < len(left) else "")
    )
    if stop.received is not None:
        return 128 + stop.received
    return 0 if num_done == len(left) else 1


def submit(args):
    """Submits to Slurm what is left to do and not in the queue"""
    queued = {(job.kind, job.index): job.number for job in slurm.get_jobs(args.test_run, args.data_location)}
    kind, left = "eval" if args.eval_logp else "train", []
    for index, task in choose_tasks(args):
        if (kind, index) in queued:
            print(f"{task}: in the queue already, as job {queued[kind, index]}")
        else:
            left.append((index, task))
    if not left:
        print("nothing to submit")
        return 0
    commands = slurm.submit(left, args)
    for command in commands if args.dry_run else []:
        print(shlex.join(command))
    for index, task in left:
        print(f"{'would submit' if args.dry_run else 'submitted'} {index}: {shlex.join(task.get_command())}")
    return 0


def show_status(args):
    """Prints a line for each task"""
    try:
        jobs = {(job.kind, job.index): job for job in slurm.get_jobs(args.test_run, args.data_location)}
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        jobs = {}
    some_tasks = get_tasks(args)
    width = max(len(str(task)) for _, task in some_tasks)
    value = "log p" if args.eval_logp else "theta loss"
    print(f"{'run':{width}}  state         iteration  {value:>10}  saved before  job")
    for index, task in some_tasks:
        job = jobs.get(("eval" if args.eval_logp else "train", index))
        progress = tasks.get_progress(task)
        iteration = f"{progress.iteration or 0}/{task.total}"
        print(
            f"{task!s:{width}}  {get_state(task, progress, job):8} {iteration:>14}  {progress.value:>10}"
            f"  {format_age(progress.saved):>12}  {job.number if job else '-'}"
        )
    return 0


def get_state(task, progress, job):
    """waiting, running, done or failed"""
    if progress.done:
        return "done"
    if util.is_locked(tasks.get_lock(task)) or (job and job.state in ("RUNNING", "COMPLETING")):
        return "running"
    return "failed" if job is None and tasks.is_failed(task) else "waiting"


def format_age(saved):
    """Time since then, in hours:minutes:seconds"""
    if saved is None:
        return "-"
    seconds = max(int(time.time() - saved), 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def remove(args):
    """Deletes runs, once the user has seen which: with --test-run those of test runs only. What is not a run's
    folder stays, and so does a run that is being worked on."""
    known = {task.model for _, task in get_tasks(args)}
    folders = []
    for folder in sorted(util.SAVE.glob("*")):
        is_run = (folder / "checkpoints").is_dir() or (folder / "lock").is_file() or folder.name in known
        if not is_run or folder.is_symlink() or (args.test_run and not folder.name.startswith("test_run_")):
            continue
        if args.models and folder.name not in args.models:
            continue
        if any(util.is_locked(lock) for lock in [folder / "lock", *folder.glob("logp/.*.lock")]):
            print(f"{folder} is being worked on and stays")
        else:
            folders.append(folder)
    if not folders:
        print(f"there is no run to delete in {util.SAVE}/")
        return 0
    print("\n".join(str(folder) for folder in folders))
    if args.dry_run:
        return 0
    if not args.yes:
        print(f"delete these {len(folders)} runs, checkpoints and all? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() != "y":
            print("nothing is deleted")
            return 1
    for folder in folders:
        shutil.rmtree(folder)
    print(f"deleted {len(folders)} runs")
    return 0


# ------------------------------------------------------------------ script


def main(argv=None):
    args = parse_args(argv)
    if args.task is not None:
        return slurm.run_task(args.task)
    if args.cancel:
        print(f"cancelled {slurm.cancel(args.test_run, args.data_location)} jobs")
        return 0
    for wanted, action in [(args.rm, remove), (args.status, show_status), (args.cluster, submit)]:
        if wanted:
            return action(args)
    return run_here(args)


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, boolean = parser.add, "store_true"
    add("--eval-logp", "evaluate the trained models instead: three tasks each", action=boolean)
    add("--cluster", "submit to Slurm", action=boolean)
    add("--status", "print how far each run is", action=boolean)
    add("--cancel", "cancel this sweep's jobs (those submitted from here with the same data)", action=boolean)
    add("--rm", "delete the runs in save/, after asking (with --test-run test runs only)", action=boolean)
    add("--yes", "do not ask", action=boolean)
    add("--dry-run", "print what would be run, submitted or deleted", action=boolean)
    add("--test-run", "everything small", action=boolean)
    add("--data-location", "as main.py takes it (default: main.py's)", default=None)
    add("--models", "only these models, by path base (default: all)", nargs="+")
    add("--jobs", "tasks at a time, here", type=util.in_range(int, 1), default=1)
    cuda = "use GPUs, here (default: if there are any; jobs on Slurm look for themselves)"
    add("--cuda", cuda, action=argparse.BooleanOptionalAction)
    add("--no-repeat", "do not use om-repeat, even if it is there", action=boolean)
    add("--partition", "Slurm's", default=None)
    add("--gres", "what a job asks Slurm for; none: nothing", default="gpu:1")
    add("--mem", "memory of a job", default="16G")
    add("--time", f"limit of a job (default: {slurm.TIME_OF_REPEATED} with om-repeat, else {slurm.TIME})", default=None)
    parser.add_argument("--task", help=argparse.SUPPRESS)  # what a job runs
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range, missing, or exclude each other"""
    args = get_parser().parse_args(argv)
    if sum([args.cluster, args.status, args.cancel, args.rm]) > 1:
        raise UserError("--cluster, --status, --cancel and --rm exclude each other; give one")
    if args.cluster and not args.dry_run:
        slurm.require("sbatch")
    return args


if __name__ == "__main__":
    util.run_script(main)
