"""Trains and evaluates the models of the paper, here or on Slurm.

    python sweep.py --jobs 2              # train all models here, two at a time
    python sweep.py --jobs 2 --eval-logp  # then evaluate each by three algorithms
    python sweep.py --cluster             # train all models on Slurm
    python sweep.py --cluster --eval-logp # evaluations start as soon as their models are trained
    python sweep.py --status              # their progress
    python sweep.py --models mws_5 rws_5 --seeds 0 1 2 -- --batch-size 50   # other settings of main.py

Complete tasks are skipped, so rerun the same command to resume a sweep that was stopped.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import argparse
import collections
import contextlib
import functools
import itertools
import os
import shlex
import shutil
import sys
import time

import torch

import data
import eval_logp
import main as training
import util
from cluster import slurm, status, tasks
from cluster.tasks import Task
from results import report
from runs import checkpoints, locks
from runs.saving import StopSignal
from util import UserError

WAIT_SECONDS = 20  # between checks of Slurm's queue
# Files of a run, of which it has at least one
SIGNS = ["lock", "checkpoints/latest.pt", "checkpoints/[0-9]*.pt", "logs/train.log", "logs/eval_*.log"]
TEST_RUN_EVALUATION = ["--effort=0.01", "--num-data=5", "--num-iterations=10", "--num-particles=10", "--test-num-particles=100"]

# ------------------------------------------------------------------ the models


def get_sweep_argss(test_run=False, data_location=None, large_conditional=False):
    """Yields main.py's arguments, a namespace for each model of section 4.2: mws, rws and vimco with 3 to 40 latents, and the
    alphabet-conditional mws model, on the small data set or, with large_conditional, on all of it"""
    common = ["--test-run"] * test_run + ["--data-location", data_location] * (data_location is not None)
    for algorithm, num_latents in itertools.product(["mws", "rws", "vimco"], report.NUM_LATENTS):
        memory_size = (num_latents + 1) // 2 if algorithm == "mws" else 0
        flags = ["--small-dataset", "--algorithm", algorithm, "--num-particles", str(num_latents - memory_size)]
        flags += ["--memory-size", str(memory_size)] if memory_size else []
        yield training.parse_args([*common, *flags])
    size = [] if large_conditional else ["--small-dataset"]
    yield training.parse_args([*common, *size, *"--condition-on-alphabet --num-particles 20 --memory-size 20".split()])


def get_runs(args):
    """main.py's arguments for each run, by the name of its folder: the sweep's models, or those of --models, with each seed and
    the settings after --. Raises: UserError if a model is not in the sweep, or two runs would share a folder"""
    runs, known, load_data = {}, set(), functools.cache(data.load)
    models = [util.get_path_base(model_args) for model_args in get_sweep_argss(False, None, args.large_conditional)]
    argss = get_sweep_argss(args.test_run, args.data_location, args.large_conditional)
    for seed, (model, model_args) in itertools.product(args.seeds or [None], zip(models, argss, strict=True)):
        left_out = ["--small-dataset"] if "--dataset-size" in args.given else []
        flags = [flag for flag in util.get_flags(model_args) if flag not in left_out]
        flags += [*args.settings, *[f"--seed={seed}"] * (seed is not None)]
        run_args = training.parse_args(flags)
        if run_args.cuda:
            raise UserError("give --cuda before the --: it is not a setting of a run")
        path_base = checkpoints.find_run(run_args, functools.partial(get_fingerprint, run_args, load_data))
        names = {model, util.get_path_base(model_args), util.get_path_base(run_args), path_base}
        known |= names
        if args.models and not names & set(args.models):
            continue
        if path_base in runs:
            raise UserError(f"two of these runs would share {util.SAVE / path_base}; give other --models, --seeds or settings")
        runs[path_base] = run_args
    unknown = [model for model in args.models or [] if model not in known]
    if unknown:
        raise UserError(f"--models: not in the sweep: {', '.join(unknown)}; it has {', '.join(models)}")
    return runs


def get_fingerprint(run_args, load):
    """The fingerprint of a run's data; "" if they are missing, since nothing is downloaded just to name a run"""
    location = run_args.data_location
    with contextlib.suppress(UserError):
        if location not in data.SITES or data.find_site(location).exists():
            dataset = load(location, run_args.small_dataset, run_args.dataset_size, run_args.find_characters)
            return data.get_fingerprint(dataset.train)
    return ""


def get_tasks(args):
    """The sweep's tasks: trainings, or evaluations with --eval-logp"""
    runs = get_runs(args).items()
    if not args.eval_logp:
        return [Task(model, "train", util.get_flags(run_args), run_args.num_iterations) for model, run_args in runs]
    algorithms = dict.fromkeys(args.eval_algorithms or report.TRAINED)
    return [get_evaluation(args, *run, algorithm) for run in runs for algorithm in algorithms]


def get_evaluation(args, model, run_args, algorithm):
    """The Task of evaluating a run, given main.py's run_args, with its seed. Raises: UserError if --eval-options are invalid"""
    flags = [f"--checkpoint-path={checkpoints.get_path(model)}", f"--algorithm={algorithm}"]
    if args.data_location is not None or "--data-location" in args.given:
        flags += [f"--data-location={run_args.data_location}"]
    flags += [f"--seed={run_args.seed}"] * (run_args.seed != util.Config.seed)
    flags += TEST_RUN_EVALUATION * args.test_run + util.split_words("--eval-options", args.eval_options)
    parsed = eval_logp.parse_args(flags)
    same = parsed.algorithm == algorithm and parsed.checkpoint_path == str(checkpoints.get_path(model))
    if not same or parsed.report or parsed.every_checkpoint or parsed.cuda:
        raise UserError("--eval-options: the sweep itself sets model, algorithm and device, and takes the latest checkpoint")
    kind = algorithm if parsed.mode == "test" else f"{parsed.mode}_{algorithm}"
    chosen = {name: getattr(parsed, name) for name in tasks.CHOICE_OF_IMAGES}
    # Where the training's data are now, which may have moved since; a run found by --name may be of other data
    if parsed.data_location == run_args.data_location and not run_args.name:
        chosen["data_location"] = None
    return Task(model, kind, flags, run_args.num_iterations, {**eval_logp.get_choices(parsed), **chosen})


def choose_tasks(args, queue=None):
    """Chooses the remaining tasks, and prints which are skipped. Args: queue: the jobs in Slurm's queue; None to run tasks here.
    Returns: the tasks; whether they are all that remain"""
    all_tasks, left, num_done = get_tasks(args), [], 0
    jobs = {job.task.key: job for job in queue or []}
    for task in all_tasks:
        progress, trained = tasks.get_progress(task), tasks.get_training_progress(task)
        if progress.done:
            num_done += 1
        elif task.key in jobs:
            job = jobs[task.key]
            ending = ", which is ending: submit again in a minute" * (job.state == "COMPLETING")
            print(f"{task}: in the queue already, as job {job.number}{ending or describe_change(job.task, task)}")
        elif task.kind != "train" and not trained.done and (task.model, "train") not in jobs:
            print(f"{task}: skipped, its model is not trained yet ({trained.iteration} of {task.total} iterations)")
        elif progress.others and "--force" not in task.flags:
            print(f"{task}: skipped, a different evaluation is saved: {progress.others}; --eval-options=--force replaces it")
        elif queue is None or tasks.wait_for_lock(task, 0):
            left.append(task._replace(flags=task.flags + ["--force"] * progress.replaces))
    if num_done:
        print(f"{util.count(num_done, 'task')} complete already")
    return left, num_done + len(left) == len(all_tasks)


def describe_change(submitted, task):
    """How a task in the queue differs from what is asked for now, in words; "" if it does not"""
    try:
        differences = util.describe_differences(*map(get_options, (submitted, task)))
    except UserError as error:  # settings may have gone since
        differences = str(error)
    return f", but with other options: {differences}; --cancel cancels it" if differences else ""


def get_options(task):
    """Everything that a task's command line says of what it does: a dict of plain values"""
    options = {**task.settings, "training_iterations": task.total}
    if task.kind == "train":
        options = {**vars(training.parse_args(task.flags)), "cuda": None}
    return tasks.name_images(options, util.Config.data_location)


# ------------------------------------------------------------------ here


def run_here(args):
    """Runs the remaining tasks on this machine. Returns: 0 if all succeeded, else 1, or 128 + the signal that stopped it.
    Raises: UserError if GPUs are requested and there are none"""
    has_gpus = torch.cuda.is_available()
    if args.cuda and not has_gpus:
        raise UserError("--cuda: there is no usable GPU; run without --cuda")
    left, is_all = choose_tasks(args)
    gpus = tasks.get_visible_gpus() if has_gpus and args.cuda is not False else []
    if gpus:
        left = [task._replace(flags=[*task.flags, "--cuda"]) for task in left]
    if args.dry_run:
        for task in left:
            print(shlex.join(task.get_command()))
        return 0
    with StopSignal() as stop:
        num_done = tasks.run_all(left, args.jobs or 1, gpus, stop)
    resume = "; rerun the same command to resume" if num_done < len(left) else ""
    print(f"{num_done} of {len(left)} done, in {util.SAVE}/{resume}")
    if stop.received is not None:
        return 128 + stop.received
    return 0 if is_all and num_done == len(left) else 1


# ------------------------------------------------------------------ on Slurm


def submit(args):
    """Submits the tasks that are neither complete nor in the queue to Slurm; with --dry-run, prints the commands. Returns: the
    exit status"""
    held = locks.lock(slurm.FOLDER / "lock", f"a sweep of {util.SAVE} is being submitted")  # or tasks might be submitted twice
    with contextlib.nullcontext() if args.dry_run else held:
        queue = slurm.get_queue(essential=not args.dry_run)
        left, _ = choose_tasks(args, queue)
        if left and not args.dry_run:
            check_data(args)
        if left:
            slurm.submit_tasks(left, args, queue)
        else:
            print("nothing to submit")
    return wait(args) if args.wait and not args.dry_run else 0


def wait(args):
    """Waits until the chosen tasks are complete or no longer in Slurm's queue. Returns: 0 if all are complete, else 1"""
    some_tasks = get_tasks(args)
    keys = {task.key for task in some_tasks}
    while not all(tasks.get_progress(task).done for task in some_tasks):
        with contextlib.suppress(UserError):  # Slurm may answer next time
            if not any(job.task.key in keys for job in slurm.get_queue()):
                break
        time.sleep(WAIT_SECONDS)
    status.show(some_tasks, [])
    return 0 if all(tasks.get_progress(task).done for task in some_tasks) else 1


def check_data(args):
    """Loads the data once, here, so that jobs neither download it nor find out one by one that it is missing.
    Raises: UserError if it does not fit the models"""
    names = ["data_location", "small_dataset", "dataset_size", "condition_on_alphabet"]
    argss = {tuple(getattr(run_args, name) for name in names): run_args for run_args in get_runs(args).values()}
    for run_args in argss.values():
        training.load_data(run_args)


def cancel(args):
    """Cancels the jobs of the chosen tasks, and prints what else from this folder is in the queue"""
    queue, models = slurm.get_queue(essential=not args.dry_run), get_runs(args)
    jobs = [job for job in queue if job.task.model in models or not has_choice(args)]
    if args.eval_logp:
        chosen = {task.key for task in get_tasks(args)}
        all_chosen = not (args.eval_algorithms or args.eval_options)
        jobs = [job for job in jobs if job.task.kind != "train" and (all_chosen or job.task.key in chosen)]
    if args.dry_run:
        for job in jobs:
            print(f"would cancel {job.number}: {' '.join(job.task.key)}")
    else:
        print(f"cancelled {util.count(slurm.cancel(jobs), 'job')}")
    rest = collections.Counter(job.task.model for job in queue if job not in jobs)
    if rest:
        others = ", ".join(f"{model} ({util.count(n, 'job')})" for model, n in rest.items())
        print(f"other runs from here are in the queue: {others}")
    return 0


# ------------------------------------------------------------------ runs


def has_choice(args):
    """Whether options choose runs"""
    names = ["models", "seeds", "settings", "data_location", "test_run", "large_conditional", "eval_algorithms", "eval_options"]
    return any(getattr(args, name) for name in names)


def show_status(args):
    """Prints a table of the chosen tasks or, if no option chooses any, of the sweep's and all submitted from this folder.
    Returns: 1 if a task has failed, else 0"""
    found = {task.key: task for task in get_tasks(args)}
    if not has_choice(args) and not args.eval_logp:
        found |= {task.key: task for task in slurm.get_submitted() if task.key not in found}
    return status.show(found.values(), slurm.get_queue(essential=False))


def plot(args):
    """Draws log p of the chosen runs in the course of training in one figure"""
    print("\n".join(report.compare_milestones(get_runs(args))))
    return 0


def get_removable(args, folder, evaluations):
    """The paths that --rm deletes of a run's folder, if they exist. Args: evaluations: Tasks of all runs, or None for all"""
    if not args.eval_logp:
        return [folder]
    if evaluations is None:
        return [folder / "logp"]
    ours = [(task, path) for task in evaluations if task.model == folder.name for path in task.get_saved_paths()]
    return [path for task, path in ours if not args.eval_options or tasks.is_as_asked(task, path)]


def remove(args):
    """Deletes runs after asking: all, or those chosen by options; with --eval-logp, only their evaluations, all or those chosen
    by --eval-algorithms and --eval-options. Folders that are not runs stay, as do runs that are in use or in the queue."""
    signs = [*SIGNS, *["logp/*.pt"] * args.eval_logp]  # a checkpoint from elsewhere may have been evaluated
    found = {util.SAVE / path.relative_to(util.SAVE).parts[0] for name in signs for path in util.SAVE.glob(f"[!.]*/{name}")}
    if has_choice(args):
        found &= {util.SAVE / path_base for path_base in get_runs(args)}
    folders = leave_used([folder for folder in sorted(found) if not folder.is_symlink()], args)
    evaluations = get_tasks(args) if args.eval_algorithms or args.eval_options else None
    paths = {folder: list(filter(os.path.exists, get_removable(args, folder, evaluations))) for folder in folders}
    paths = {folder: some for folder, some in paths.items() if some}
    print("\n".join(map(str, sum(paths.values(), []))) or f"there is nothing to delete in {util.SAVE}/")
    if args.dry_run or not paths:
        return 0
    evaluations_of, all_of_it = "the evaluations of " * args.eval_logp, ", checkpoints and all" * (not args.eval_logp)
    if not args.yes:
        print(f"delete {evaluations_of}{util.count(len(paths), 'run')}{all_of_it}? [y/N] ", end="", flush=True)
        answer = sys.stdin.readline() if sys.stdin is not None else ""
        if not answer:
            raise UserError("there is no terminal to ask; give --yes to delete them")
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing is deleted")
            return 1
    folders = leave_used(paths, args)  # a run may have started since
    for path in itertools.chain(*(paths[folder] for folder in folders)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    print(f"deleted {evaluations_of}{util.count(len(folders), 'run')}")
    return 0


def leave_used(folders, args):
    """Returns: those of some runs' folders that are neither in use nor in the queue; names the others"""
    queued = {job.task.model for job in slurm.get_queue(essential=slurm.FOLDER.exists() and not args.dry_run)}
    unused = []
    for folder in folders:
        if folder.name in queued:
            print(f"{folder} has jobs in the queue and stays")
        elif any(map(locks.is_locked, [folder / "lock", *folder.rglob(".*lock")])):
            print(f"{folder} is in use and stays")
        else:
            unused.append(folder)
    return unused


# ------------------------------------------------------------------ script


def main(argv=None):
    args = parse_args(argv)
    if args.task is not None:
        return slurm.run_task(args.task)
    actions = [(args.status, show_status), (args.rm, remove), (args.cancel, cancel), (args.plot, plot), (args.cluster, submit)]
    return next((action for wanted, action in actions if wanted), run_here)(args)


def get_parser():
    parser = util.ArgumentParser(description=__doc__, usage="%(prog)s [options] [-- options of main.py for all runs]")
    add, boolean, seed = parser.add, "store_true", util.in_range(int, 0, 2**63 - 1)
    parser.start_group("which runs")
    add("--models", "only these models, by name (default: all)", nargs="+")
    add("--seeds", "train each model with each of these seeds (default: main.py's)", nargs="+", type=seed)
    add("--test-run", "make everything small, as main.py --test-run does", action=boolean)
    add("--data-location", "as for main.py (default: main.py's)", type=util.to_location, default=None)
    add("--large-conditional", "train the conditional model on the whole data set (a_mws_40_large)", action=boolean)
    add("--eval-logp", "instead, evaluate trained models on test images: a task for each of --eval-algorithms", action=boolean)
    algorithms = "algorithms of eval_logp.py by which to evaluate (default: sleep, rws and vimco)"
    add("--eval-algorithms", algorithms, nargs="+", choices=eval_logp.ALGORITHMS)
    options = 'options of eval_logp.py for all evaluations, as one string: "--mode train" for training images'
    add("--eval-options", options, default="")
    parser.start_group("what to do (default: run them here)")
    add("--cluster", "submit them to Slurm; evaluations start when their training is complete", action=boolean)
    add("--wait", "with --cluster, return once all are complete (status 0) or no longer in the queue (1)", action=boolean)
    add("--status", "print each task's progress, job and log", action=boolean)
    add(
        "--plot", "draw log p against iterations, by eval_logp.py --every-checkpoint, with the range over seeds", action=boolean
    )
    add("--cancel", "cancel the jobs of these runs (with --eval-logp only their evaluations)", action=boolean)
    add("--rm", "delete these runs, after asking (with --eval-logp only their evaluations)", action=boolean)
    add("--yes", "do not ask", action=boolean)
    add("--dry-run", "print what would be run, submitted, cancelled or deleted", action=boolean)
    parser.start_group("how they run")
    add("--jobs", "tasks at a time (default: 1 here, on Slurm as many as it runs)", type=util.in_range(int, 1), default=None)
    cuda = "use GPUs (default: here, if there are any; on Slurm, if --gres asks for one; a job that finds none fails)"
    add("--cuda", cuda, action=argparse.BooleanOptionalAction)
    parser.start_group("Slurm")
    add("--gres", "resources of a job, such as gpu:a100:1, or none (default: gpu:1, with --no-cuda none)", default=None)
    add("--cpus-per-task", "CPUs, and threads, of a job (default: Slurm's)", type=util.in_range(int, 1), default=None)
    add("--mem", "memory of a job, or none: the site's default", default="16G")
    limits = f"default: {slurm.TIME_OF_REPEATED} with om-repeat, else {slurm.TIME}"
    add("--time", f"time limit of a job, or none: the partition's ({limits})", default=None)
    add("--partition", "partition", default=None)
    add("--sbatch", 'further options of sbatch, as one string: "--account=lab --qos=long"', default="")
    add("--setup", 'line of shell code to run before each task: "module load cuda"', default="")
    add("--no-repeat", "do not use om-repeat, even if it is installed", action=boolean)
    parser.add_argument("--task", help=argparse.SUPPRESS)  # what a job runs
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range, missing, or exclude each other"""
    argv = sys.argv[1:] if argv is None else list(argv)
    for flag in ["--sbatch", "--eval-options", "--setup"]:  # argparse takes a value that looks like an option for a flag
        if flag in argv[:-1]:
            at = argv.index(flag)
            argv[at : at + 2] = [f"{flag}={argv[at + 1]}"]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = get_parser().parse_args(argv[:cut])
    args.settings = argv[cut + 1 :]
    args.given = {word.split("=")[0] for word in args.settings}  # main.py's flags among them
    if args.seeds and "--seed" in args.given:
        raise UserError("--seeds and, after the --, --seed exclude each other; give one")
    if sum([args.cluster, args.status, args.plot, args.cancel, args.rm]) > 1:
        raise UserError("--cluster, --status, --plot, --cancel and --rm exclude each other; give one")
    if (args.eval_algorithms or args.eval_options) and not args.eval_logp:
        raise UserError("--eval-algorithms and --eval-options are for --eval-logp; give that, or leave them out")
    if args.wait and not args.cluster:
        raise UserError("--wait is for --cluster; a sweep on this machine waits anyway")
    if (args.cluster or args.cancel) and not args.dry_run:
        slurm.call(["sbatch", "--version"])  # is there a Slurm?
    if args.gres is None:
        args.gres = "none" if args.cuda is False else "gpu:1"
    return args


if __name__ == "__main__":
    util.run_script(main)
