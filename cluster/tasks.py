"""The tasks of a sweep: what each runs, how far it has got, and how tasks run on this machine."""

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
from runs.saving import SIGNALS
from util import UserError, warn

ROOT = pathlib.Path(__file__).resolve().parents[1]
STATE_KEYS = {"settings", "args", "iteration", "log_p", "num_searched"}
# Arguments of an evaluation that choose images; its settings identify the images themselves
CHOICE_OF_IMAGES = ["num_data", "images", "data_location"]
# The line in a task's log with which an attempt begins: when, where and, on Slurm, in which job and after how many steps
HEADER = re.compile(r"--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d on \S+?(?:, (submitted as )?job (\w*)(?: at step (\d+))?)?: ")
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # on Linux only


class Task(NamedTuple):
    """The training of a model, or one of its evaluations"""

    model: str  # path base
    kind: str  # train, or the algorithm of an evaluation, with the prefix train_ for training images: rws, train_rws, ...
    flags: list  # words of the command line of main.py or eval_logp.py
    total: int  # iterations of the training
    settings: dict = {}  # those required of the result of an evaluation

    def __str__(self):
        return self.model if self.kind == "train" else f"{self.model} {self.kind}"

    @property
    def key(self):
        """Identifies the task within a folder"""
        return self.model, self.kind

    def get_path(self, suffix):
        """Path of the task's log, or of the exit status of its last attempt"""
        stem = "train" if self.kind == "train" else f"eval_{self.kind}"
        return util.SAVE / self.model / "logs" / f"{stem}.{suffix}"

    def get_evaluation_path(self):
        """Where the result of an evaluation is"""
        return checkpoints.get_result_path(self.model, self.settings)

    def get_state_paths(self):
        """Where an evaluation is saved while it runs; for mws, its halves"""
        halves = [1, 2] if self.settings["algorithm"] == "mws" else [None]
        return [checkpoints.get_state_path(self.get_evaluation_path(), half) for half in halves]

    def get_saved_paths(self):
        """Where an evaluation may be saved, complete or not"""
        return [self.get_evaluation_path(), *self.get_state_paths()]

    def get_lock(self):
        """The lock file that the task's process holds"""
        if self.kind == "train":
            return util.SAVE / self.model / "lock"
        path = self.get_evaluation_path()
        return path.with_name(f".{path.stem}.lock")

    def get_command(self):
        script = "main.py" if self.kind == "train" else "eval_logp.py"
        return [sys.executable, str(ROOT / script), *self.flags]


# ------------------------------------------------------------------ how far a task is


class Progress(NamedTuple):
    """What is saved of a task"""

    done: bool
    iteration: int  # iterations done of the training or of the evaluation
    total: int
    steps: int = 0  # steps of any kind, including those of pretraining and searches
    value: str = ""  # the last loss, or log p
    saved: float | None = None  # when, seconds since the epoch
    replaces: bool = False  # whether the evaluation replaces another one
    others: str = ""  # how the other one's settings differ, if it is of the same model
    damage: str = ""  # which file is damaged, in words
    model: str = ""  # of a training: the digest of its newest checkpoint
    location: str = ""  # and where its data are


def get_progress(task):
    """Reads a task's progress from its files"""
    return get_training_progress(task) if task.kind == "train" else get_evaluation_progress(task)


def get_training_progress(task):
    """Progress up to the newest intact checkpoint; a training whose latest.pt is damaged is not done"""
    checkpoint, latest, damages = None, checkpoints.get_path(task.model), []
    try:
        checkpoint = checkpoints.load_newest(latest, warn=damages.append)
    except (UserError, OSError) as error:
        damages.append(util.describe_error(error))
    damage = damages[0] if damages else ""
    if checkpoint is None:
        return Progress(False, 0, task.total, damage=damage)
    losses = curves.get_last(checkpoint["statistics"], "train")
    return Progress(
        done=checkpoints.is_complete(checkpoint, task.total) and checkpoint["path"] == str(latest),
        iteration=checkpoint["iteration"],
        total=task.total,
        steps=checkpoint["pretrain_iteration"] + checkpoint["iteration"],
        value=f"{losses['theta_loss']:.2f}" if "theta_loss" in losses else "",
        saved=os.path.getmtime(checkpoint["path"]),
        damage=damage,
        model=checkpoints.get_digest(checkpoint),
        location=checkpoint["args"]["data_location"],
    )


def get_evaluation_progress(task):
    """Done means evaluated for the current model, once that is trained, with the settings and images that the task asks for"""
    total, training = task.settings["num_iterations"], get_training_progress(task)
    path, matching, saved_at = task.get_evaluation_path(), {}, {}
    replaces, others, damage = False, "", ""
    for saved_path in filter(os.path.exists, task.get_saved_paths()):
        try:
            saved_at[saved_path] = saved_path.stat().st_mtime
            saved = util.load_checkpoint(saved_path, keys=checkpoints.RESULT_KEYS if saved_path == path else STATE_KEYS)
        except FileNotFoundError:  # the evaluation has just ended
            continue
        except UserError as error:  # it starts over, if the file is damaged
            damage = damage or str(error)
            continue
        is_current = training.done and saved["settings"]["model"] == training.model
        differences = describe_differences(saved, task, training.location) if is_current else ""
        if is_current and not differences:
            matching[saved_path] = saved
        else:
            replaces, others = True, others or differences
    if path in matching:
        return Progress(True, total, total, total, f"{matching[path]['log_p']:.2f}", saved_at[path])
    if not matching:
        return Progress(False, 0, total, replaces=replaces, others=others, damage=damage)
    steps = sum(state["iteration"] + len(state["log_p"]) + state["num_searched"] for state in matching.values())
    iteration = sum(state["iteration"] for state in matching.values()) // len(task.get_state_paths())  # the halves' mean
    newest = max(saved_at[saved_path] for saved_path in matching)
    return Progress(False, iteration, total, steps, saved=newest, replaces=replaces, damage=damage)


def describe_differences(saved, task, location):
    """How what is saved of an evaluation differs from what the task asks for, in words. Args: location: of the training's data"""
    settings = {**saved["settings"], **{name: saved["args"].get(name) for name in CHOICE_OF_IMAGES}}
    number = re.search(r"\((\d+)\)$", saved["settings"]["images"])  # of images, after their fingerprint
    if number and int(number[1]) < (settings["num_data"] or 0) and int(number[1]) <= task.settings["num_data"]:  # all there are
        settings |= {name: task.settings[name] for name in ("num_data", "images")}
    theirs, ours = (name_images(some, location) for some in (settings, task.settings))
    if task.settings.get("data_location") is None and settings.get("kind_of_images") in ("test", "training"):
        theirs["images_from"] = ours["images_from"]  # the training's data, wherever they were
    return util.describe_differences({name: theirs.get(name) for name in ours}, ours)


def is_as_asked(task, path):
    """Whether a file holds an evaluation, complete or not, with the settings and images that the task asks for"""
    try:
        saved = util.load_checkpoint(path, keys={"settings", "args"})
    except (UserError, OSError):
        return False
    return not describe_differences(saved, task, get_training_progress(task).location)


def name_images(settings, default):
    """Settings of an evaluation, with a name for where its images come from, since a location has many paths. Args: default:
    path of the training's data, from which they come if none was given"""
    return {**settings, "images_from": util.get_location_name(settings.get("data_location") or default)}


def was_stopped(status):
    """Whether a process ended because of one of the signals on which runs save and stop"""
    return status in [128 + number for number in SIGNALS] or -status in SIGNALS


def is_failed(task):
    """Whether the last attempt ended with an error"""
    path = task.get_path("status")
    words = path.read_text(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"-?\d{1,9}", words):
        return words != ""
    return int(words) != 0 and not was_stopped(int(words))


# ------------------------------------------------------------------ logs


def open_log(task, words=""):
    """Opens the task's log for appending, and writes the command. Args: words: what else to say about this attempt"""
    path, when, node = task.get_path("log"), time.strftime("%Y-%m-%d %H:%M:%S"), os.uname().nodename
    with util.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        task.get_path("status").unlink(missing_ok=True)
        log = open(path, "a", encoding="utf-8", errors="surrogateescape")
        log.write("\n" if log.tell() else "")  # after an interrupted progress bar
        log.write(f"--- {when} on {node}{words}: {shlex.join(task.get_command())}\n")
        log.flush()
    return log


def read_log(task):
    """The lines of a task's log, without progress bars"""
    path = task.get_path("log")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line.rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"\d+/\d+ \[[\d:]+<", line)]


def get_log_end(task, num_lines=4):
    """The last lines that its last attempt wrote to its log"""
    lines = read_log(task)
    first = max((i + 1 for i, line in enumerate(lines) if HEADER.match(line)), default=0)
    return "\n".join(lines[first:][-num_lines:])


def write_status(task, status):
    """Writes the exit status of its last attempt; warns if that fails, since the log says the same"""
    try:
        util.write(task.get_path("status"), f"{status}\n".encode())
    except UserError as error:
        warn(str(error))


def get_device(task):
    """What the last attempt ran on, GPU or CPU; "" if there was none"""
    starts = list(filter(HEADER.match, read_log(task)))
    return "" if not starts else "GPU" if "--cuda" in starts[-1].split() else "CPU"


# ------------------------------------------------------------------ running tasks here


def _prepare_child():
    """If the sweep is killed, its runs save and stop. Ctrl-C reaches them only through the sweep, and so only once"""
    os.setpgid(0, 0)
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def get_visible_gpus():
    """The GPUs visible to this process, by number or name: torch would count only one part of a divided GPU"""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names or [str(number) for number in range(torch.cuda.device_count())]


def start(task, slot, num_slots, gpus):
    """Starts a task on its slot's share of the cores and, if there are GPUs, on one of them. Args: gpus: their names, as in
    CUDA_VISIBLE_DEVICES. Returns: the process"""
    pins = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pins else list(range(os.cpu_count() or 1))
    share = cores[slot % len(cores) :: num_slots]
    # Processes with as many threads as cores would slow each other down several-fold.
    environment = {"OMP_NUM_THREADS": str(len(share)), **os.environ}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with open_log(task) as log:
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = subprocess.Popen(task.get_command(), env=environment, preexec_fn=_prepare_child, **streams)
    if pins:
        os.sched_setaffinity(process.pid, share)
    return process


def finish(task, process):
    """Waits until a task's process has ended, and prints how. Returns: whether it succeeded"""
    status = process.wait()
    write_status(task, status)
    if status == 0 and (progress := get_progress(task)).done:
        what = "theta loss" if task.kind == "train" else "log p"
        print(f"{task}: done, {progress.iteration} iterations, {what} {progress.value}", flush=True)
        return True
    if was_stopped(status):
        print(f"{task}: stopped, resumes when the sweep does", flush=True)
    else:
        print(f"{task}: {describe_end(status)}, see {task.get_path('log')}; its end:\n{get_log_end(task)}", flush=True)
    return False


def describe_end(status):
    """How a process failed, in words"""
    if status == 0:
        return "ended without the result that was asked for"
    if status > 0:
        return f"failed with status {status}"
    return f"killed by {signal.Signals(-status).name}" + ", perhaps because memory ran out" * (status == -signal.SIGKILL)


def wait_for_lock(task, seconds=5):
    """Waits some seconds for a process that is ending and may still be saving. Returns: whether the task is free"""
    for _ in range(10 * seconds + 1):
        if not locks.is_locked(task.get_lock()):
            return True
        time.sleep(0.1)
    print(f"{task}: skipped, {locks.get_holder(task.get_lock())} is working on it", flush=True)
    return False


def run_all(tasks, num_slots, gpus, stop):
    """Runs tasks as child processes, num_slots at a time, until all have ended or a signal arrives, which is passed on to make
    them save. Returns: how many succeeded"""
    waiting, running, num_done = list(tasks), {}, 0  # running: slot -> task, process
    while stop.received is None and (waiting or running):
        if waiting and len(running) < num_slots:
            task = waiting.pop(0)
            if wait_for_lock(task):
                slot = min(set(range(num_slots)) - running.keys())
                try:
                    running[slot] = task, start(task, slot, num_slots, gpus)
                    print(f"{task}: started, log {task.get_path('log')}", flush=True)
                except UserError as error:
                    print(f"{task}: not started: {error}", flush=True)
            continue
        for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
            num_done += finish(*running.pop(slot))
        time.sleep(0.05)
    for _, process in running.values():
        process.send_signal(stop.received)
    return num_done + sum(finish(*some) for some in running.values())
