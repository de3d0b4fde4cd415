"""The tasks of a sweep: what each runs, how far it has got, how tasks run on this machine, and the table of progress."""

import ctypes
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch

import util
from runs import checkpoints, curves, locks
from util import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHOICE_OF_IMAGES = ["num_data", "images"]  # arguments of an evaluation; its settings hold the images themselves
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # on Linux only


class Task(NamedTuple):
    """The training of a model, or one of its evaluations"""

    model: str  # path base
    kind: str  # train, or the algorithm of an evaluation, after train_ if it is of training images: rws, train_rws, ...
    flags: list  # words of the command line of main.py or eval_logp.py
    total: int  # iterations of the training
    settings: dict = {}  # what the result of an evaluation must have been made with

    def __str__(self):
        return self.model if self.kind == "train" else f"{self.model} {self.kind}"

    def get_path(self, suffix):
        """Path of the task's log, or of the exit status of its last attempt"""
        stem = "train" if self.kind == "train" else f"eval_{self.kind}"
        return util.SAVE / self.model / "logs" / f"{stem}.{suffix}"

    def get_evaluation_path(self):
        """Where the result of an evaluation lies"""
        return pathlib.Path(util.SAVE, self.model, "logp", f"{self.settings['mode']}_{self.settings['algorithm']}.pt")

    def get_state_path(self):
        """Where an evaluation is saved while it runs; of mws, its first half"""
        return checkpoints.get_state_path(self.get_evaluation_path(), 1 if self.settings["algorithm"] == "mws" else None)

    def get_command(self):
        script = "main.py" if self.kind == "train" else "eval_logp.py"
        return [sys.executable, str(ROOT / script), *self.flags]


# ------------------------------------------------------------------ how far a task is


class Progress(NamedTuple):
    """What is saved of a task"""

    done: bool
    iteration: int = 0  # iterations done of the training or of the evaluation
    total: int = 0
    value: str = ""  # the last loss, or log p
    saved: float | None = None  # when, seconds since the epoch
    others: bool = False  # whether another evaluation, or one of an older model, would be replaced


def get_progress(task):
    """Reads a task's progress from its files; damaged ones count as missing"""
    return get_training_progress(task) if task.kind == "train" else get_evaluation_progress(task)


def get_training_progress(task):
    path = checkpoints.get_path(task.model)
    try:
        checkpoint = checkpoints.load(path)
        losses = curves.get_last(checkpoint["statistics"], "train")
        value = f"{losses['theta_loss']:.2f}" if "theta_loss" in losses else ""
        done, saved = checkpoints.is_complete(checkpoint, task.total), path.stat().st_mtime
        return Progress(done, checkpoint["iteration"], task.total, value, saved)
    except (UserError, OSError):
        return Progress(False, 0, task.total)


def get_evaluation_progress(task):
    """Done means: of the current model, with the settings in the task's flags. Others: different evaluations, finished or
    not, are in its place"""
    asked, total = task.settings, task.settings["num_iterations"]
    iteration = get_training_progress(task).iteration
    progress = Progress(False, 0, total)
    for path, keys in [(task.get_evaluation_path(), checkpoints.RESULT_KEYS), (task.get_state_path(), {"settings", "log_p"})]:
        try:
            saved, when = util.load_checkpoint(path, keys=keys), path.stat().st_mtime
        except (UserError, OSError):  # missing or damaged
            continue
        is_ours = is_as_asked(saved, asked) and saved["settings"]["model"].endswith(f" {iteration}")
        if "model_iteration" not in saved:
            return Progress(False, saved["iteration"] * is_ours, total, "", when, others=not is_ours)
        if is_ours:
            return Progress(True, total, total, f"{saved['log_p']:.2f}", when)
        progress = Progress(False, 0, total, f"{saved['log_p']:.2f}", when, others=True)
    return progress


def get_position(task):
    """How many iterations are saved, of pretraining, training or evaluation: what must grow from attempt to attempt"""
    try:
        if task.kind == "train":
            checkpoint = util.load_checkpoint(checkpoints.get_path(task.model))
            return checkpoint["pretrain_iteration"] + checkpoint["iteration"]
        if task.get_evaluation_path().exists() and get_evaluation_progress(task).done:
            return task.settings["num_iterations"]
        state = util.load_checkpoint(task.get_state_path(), keys={"iteration", "log_p"})
        return state["iteration"] + len(state["log_p"]) + state["num_searched"]
    except (UserError, OSError):
        return 0


def is_trained(task):
    """Whether the task's model is fully trained"""
    return get_training_progress(task).done


def is_as_asked(saved, asked):
    """Whether what is saved of an evaluation, finished or not, has the settings that a task asks for"""
    settings = {**saved["settings"], **{name: saved["args"].get(name) for name in CHOICE_OF_IMAGES}}
    return all(settings.get(name) == value for name, value in asked.items())


def get_lock(task):
    """The lock file that the task's process holds"""
    if task.kind == "train":
        return util.SAVE / task.model / "lock"
    path = task.get_evaluation_path()
    return path.with_name(f".{path.stem}.lock")


def was_stopped(status):
    """Whether a process ended because of one of the signals on which runs save and stop"""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    return status in [128 + number for number in numbers] or -status in numbers


def is_failed(task):
    """Whether the last attempt ended with an error"""
    try:
        status = int(task.get_path("status").read_text())
    except (OSError, ValueError):
        return False
    return status != 0 and not was_stopped(status)


def read_log(task):
    """The lines of a task's log, without progress bars"""
    try:
        text = task.get_path("log").read_text(errors="replace")
    except OSError:
        return []
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"\d+/\d+ \[[\d:]+<", line)]


def get_log_end(task, num_lines=4):
    return "\n".join(read_log(task)[-num_lines:])


def get_device(task):
    """What the last attempt ran on, GPU or CPU; "" if there was none"""
    starts = [line for line in read_log(task) if line.startswith("--- ")]
    return "" if not starts else "GPU" if "--cuda" in starts[-1].split() else "CPU"


def open_log(task):
    """Opens the task's log for appending, and writes the command"""
    path = task.get_path("log")
    util.make_folder(path.parent)
    task.get_path("status").unlink(missing_ok=True)
    log = open(path, "a")
    when, node = time.strftime("%Y-%m-%d %H:%M:%S"), os.uname().nodename
    log.write("\n" if log.tell() else "")  # after an interrupted progress bar
    log.write(f"--- {when} on {node}: {shlex.join(task.get_command())}\n")
    log.flush()
    return log


# ------------------------------------------------------------------ running tasks here


class Worker(NamedTuple):
    """A task that runs on this machine, as a child process"""

    task: Task
    process: subprocess.Popen
    slot: int
    start: float  # by time.monotonic


def _prepare_child():
    """If the sweep is killed, its runs save and stop. Ctrl-C reaches them through the sweep alone, and so only once"""
    os.setpgid(0, 0)
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def get_visible_gpus():
    """The GPUs visible to this process, by numbers or other names: of the parts of a divided GPU, torch would count one"""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names or [str(number) for number in range(torch.cuda.device_count())]


def start(task, slot, num_slots, num_gpus, get_command=lambda task: task.get_command()):
    """Starts a task on its slot's share of the cores, and on its GPU if there are several"""
    cores = util.get_cores()
    share = cores[slot % len(cores) :: num_slots]
    # Processes with as many threads as cores would slow each other down several times over.
    environment = {"OMP_NUM_THREADS": str(len(share)), **os.environ}
    if num_gpus:
        task = task._replace(flags=[*task.flags, *["--cuda"] * ("--cuda" not in task.flags)])
        environment["CUDA_VISIBLE_DEVICES"] = get_visible_gpus()[slot % num_gpus]
    with open_log(task) as log:
        process = subprocess.Popen(
            get_command(task),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=_prepare_child,
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, share)
    return Worker(task, process, slot, time.monotonic())


def finish(worker):
    """Prints how a task ended. Returns: whether it succeeded"""
    task, status = worker.task, worker.process.returncode
    task.get_path("status").write_text(f"{status}\n")
    if status == 0:
        progress = get_progress(task)
        what = "theta loss" if task.kind == "train" else "log p"
        seconds = time.monotonic() - worker.start
        print(f"{task}: done, {progress.iteration} iterations, {what} {progress.value}, {seconds:.0f} s", flush=True)
    elif was_stopped(status):
        print(f"{task}: stopped, resumes when the sweep does", flush=True)
    else:
        how = f"failed with status {status}" if status > 0 else describe_signal(-status)
        print(f"{task}: {how}, see {task.get_path('log')}; its end:\n{get_log_end(task)}", flush=True)
    return status == 0


def describe_signal(number):
    """How a process ended that a signal ended, in words"""
    return f"killed by {signal.Signals(number).name}" + ", perhaps for want of memory" * (number == signal.SIGKILL)


def wait_for_lock(task, seconds=5):
    """Waits a moment for a process that is ending and may still be saving. Returns: whether the task is free"""
    end = time.monotonic() + seconds
    while locks.is_locked(get_lock(task)):
        if time.monotonic() > end:
            holder = get_lock(task).read_text().strip()
            print(f"{task}: skipped, {holder} is working on it", flush=True)
            return False
        time.sleep(0.1)
    return True


def run_all(tasks, num_slots, num_gpus, stop, get_command=lambda task: task.get_command()):
    """Runs tasks as child processes, a number of them at a time, until all have ended or a signal
    arrives, which is passed on so that they save. Args: get_command: gives the command of a task
    Returns: how many succeeded"""
    waiting, workers, num_done, told = list(tasks), [], 0, False
    with util.show_progress(total=len(tasks), unit="task", disable=not sys.stderr.isatty()) as bar:
        while workers or (waiting and stop.received is None):
            if stop.received is None and waiting and len(workers) < num_slots:
                task = waiting.pop(0)
                if wait_for_lock(task):
                    slot = min(set(range(num_slots)) - {worker.slot for worker in workers})
                    workers.append(start(task, slot, num_slots, num_gpus, get_command))
                    bar.set_description(", ".join(str(worker.task) for worker in workers))
                continue
            if stop.received is not None and not told:
                told = True
                for worker in workers:
                    worker.process.send_signal(stop.received)
            for worker in [worker for worker in workers if worker.process.poll() is not None]:
                workers.remove(worker)
                num_done += finish(worker)
                bar.update()
            time.sleep(0.05)
    return num_done


# ------------------------------------------------------------------ the table of progress

HEADINGS = ["run", "state", "iteration", "", "saved before", "on", "job", "log"]


def show_status(some_tasks, queue, describe):
    """Prints a line per task and, under one that does not go on, why. Args: queue: a list of slurm.Job; describe: what
    Slurm knows of a task that is not in its queue, in words, and whether it has failed
    Returns: 1 if a task has failed, else 0"""
    jobs = {}
    for job in queue:  # a running job before the one that om-repeat has queued behind it
        if (job.model, job.kind) not in jobs or job.state == "RUNNING":
            jobs[job.model, job.kind] = job
    value = "theta loss" if some_tasks[0].kind == "train" else "log p"
    rows = [[value if heading == "" else heading for heading in HEADINGS]]
    notes, failed = [""], False
    for task in some_tasks:
        row, note = get_row(task, jobs.get((task.model, task.kind)), describe)
        failed |= row[1] == "failed"
        rows.append(row)
        notes.append(note)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, note in zip(rows, notes, strict=True):
        print("  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
        if note:
            print(f"    {note}")
    return int(failed)


def get_row(task, job, describe):
    """Returns: the cells of a task's line, and a line to go under it"""
    progress = get_progress(task)
    state = get_state(task, progress, job)
    log = task.get_path("log")
    number = "-" if job is None else job.number or "after training"
    waiting_for = f" ({job.reason})" if job and job.reason and job.reason != "None" else ""
    row = [
        str(task),
        state,
        f"{progress.iteration}/{progress.total}",
        progress.value or "-",
        format_age(progress.saved),
        get_device(task) or "-",
        number + waiting_for,
        str(log) if log.exists() else "-",
    ]
    left, failed = describe(task) if state in ("failed", "stopped", "waiting") else ("", False)
    row[1] = "failed" if failed else state
    return row, "; ".join(filter(None, [get_log_end(task, 1) if row[1] == "failed" else "", left]))


def get_state(task, progress, job):
    """One of waiting (not started or queued), queued, running, stopped, done, failed"""
    if progress.done:
        return "done"
    if locks.is_locked(get_lock(task)) or (job and job.state in ("RUNNING", "COMPLETING")):
        return "running"
    if job:
        return "queued"
    if is_failed(task):
        return "failed"
    return "stopped" if progress.iteration or task.get_path("log").exists() else "waiting"


def format_age(saved):
    """Time elapsed since then, in hours:minutes:seconds"""
    if saved is None:
        return "-"
    seconds = max(int(time.time() - saved), 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
