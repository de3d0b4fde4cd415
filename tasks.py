"""The tasks of a sweep: what each runs, how far it is, and how tasks run on this machine."""

import ctypes
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import checkpoints
import eval_logp
import report
import util
from util import UserError

ROOT = pathlib.Path(__file__).resolve().parent
_libc = ctypes.CDLL(None)


class Task(NamedTuple):
    """The training of a model, or one of its evaluations"""

    model: str  # path base
    kind: str  # train, or the algorithm of an evaluation: sleep, rws, vimco
    flags: list  # of main.py or eval_logp.py, each one word
    total: int  # iterations of the training

    def __str__(self):
        return self.model if self.kind == "train" else f"{self.model} {self.kind}"

    def get_path(self, suffix):
        """Of its log, or of the exit status of its last attempt"""
        stem = "train" if self.kind == "train" else f"eval_{self.kind}"
        return util.SAVE / self.model / "logs" / f"{stem}.{suffix}"

    def get_command(self):
        script = "main.py" if self.kind == "train" else "eval_logp.py"
        return [sys.executable, str(ROOT / script), *self.flags]


# ------------------------------------------------------------------ how far a task is


class Progress(NamedTuple):
    """What of a task is saved"""

    done: bool
    iteration: int | None = None  # of the training
    value: str = ""  # the last loss, or log p
    saved: float | None = None  # when, seconds since the epoch


def get_progress(task):
    """What the files of a task say; a damaged one counts as none"""
    path = util.get_checkpoint_path(task.model)
    try:
        checkpoint = checkpoints.load(path)
        iteration, saved = checkpoint["iteration"], path.stat().st_mtime
        if task.kind == "train":
            losses = checkpoint["statistics"].get("theta_loss", [])
            return Progress(iteration >= task.total, iteration, f"{losses[-1]:.2f}" if len(losses) else "", saved)
        path = util.SAVE / task.model / "logp" / f"test_{task.kind}.pt"
        if not path.exists():
            return Progress(False, iteration)
        result = report.load_result(path)
    except (UserError, OSError):
        return Progress(False)
    current = result["model_iteration"] == iteration and is_as_asked(result, task)
    return Progress(current, iteration, f"{result['log_p']:.2f}", path.stat().st_mtime)


def is_as_asked(result, task):
    """Whether an evaluation has the settings that the task's flags ask for"""
    asked = eval_logp.parse_args(task.flags)
    same = all(result["settings"].get(name) == getattr(asked, name) for name in eval_logp.SETTINGS)
    return same and result["args"]["num_data"] == asked.num_data


def get_lock(task):
    """The file that its process holds a lock on"""
    folder = util.SAVE / task.model
    return folder / "lock" if task.kind == "train" else folder / "logp" / f".test_{task.kind}.lock"


def was_stopped(status):
    """Whether a process ended because it was asked to, by one of the signals on which runs save"""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    return status in [128 + number for number in numbers] or -status in numbers


def is_failed(task):
    """Whether its last attempt ended with an error"""
    try:
        status = int(task.get_path("status").read_text())
    except (OSError, ValueError):
        return False
    return status != 0 and not was_stopped(status)


def get_log_end(task, num_lines=4):
    """The last lines of a task's log, without progress bars"""
    try:
        text = task.get_path("log").read_text(errors="replace")
    except OSError:
        return ""
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line and "it/s" not in line and "?it" not in line][-num_lines:])


def open_log(task):
    """The task's log, to write at its end; it begins with the command"""
    path = task.get_path("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    task.get_path("status").unlink(missing_ok=True)
    log = open(path, "a")
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(task.get_command())}\n")
    log.flush()
    return log


# ------------------------------------------------------------------ running tasks here


class Worker(NamedTuple):
    """A task that runs here as a child process"""

    task: Task
    process: subprocess.Popen
    slot: int
    start: float


def _die_with_parent():
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed sweep leaves no runs behind, and they save


def start(task, slot, num_slots, num_gpus):
    """Starts a task on the slot's share of the cores, and on its GPU where there are several"""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[slot % len(cores) :: num_slots]
    # Two processes with a thread for every core each would slow each other down several times over.
    environment = {"OMP_NUM_THREADS": str(len(share)), **os.environ}
    command = task.get_command()
    if num_gpus:
        command.append("--cuda")
        # of those that this process may use, whose names may be no numbers
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % num_gpus]
    with open_log(task) as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=_die_with_parent
        )
    os.sched_setaffinity(process.pid, share)
    return Worker(task, process, slot, time.time())


def finish(worker):
    """Says in a line how a task ended. Returns: whether well"""
    task, status = worker.task, worker.process.returncode
    task.get_path("status").write_text(f"{status}\n")
    if status == 0:
        progress = get_progress(task)
        what = "theta loss" if task.kind == "train" else "log p"
        seconds = time.time() - worker.start
        print(f"{task}: done, {progress.iteration} iterations, {what} {progress.value}, {seconds:.0f} s", flush=True)
    elif was_stopped(status):
        print(f"{task}: stopped, goes on when the sweep does", flush=True)
    else:
        how = f"failed with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        print(f"{task}: {how}, see {task.get_path('log')}; its end:\n{get_log_end(task)}", flush=True)
    return status == 0


def wait_for_lock(task, seconds=5):
    """What ended a moment ago may still be saving. Returns: whether the task is free"""
    end = time.time() + seconds
    while util.is_locked(get_lock(task)):
        if time.time() > end:
            holder = get_lock(task).read_text().strip()
            print(f"{task}: is being worked on by {holder}, left to it", flush=True)
            return False
        time.sleep(0.1)
    return True


def run_here(tasks, num_slots, num_gpus, stop):
    """Runs tasks as child processes, so many at a time, until all have ended or a signal arrives,
    which the children are told, so that each saves. Returns: how many ended well"""
    waiting, workers, num_done, told = list(tasks), [], 0, False
    with util.show_progress(total=len(tasks), unit="task", disable=not sys.stderr.isatty()) as bar:
        while workers or (waiting and stop.received is None):
            if stop.received is None and waiting and len(workers) < num_slots:
                task = waiting.pop(0)
                if wait_for_lock(task):
                    slot = min(set(range(num_slots)) - {worker.slot for worker in workers})
                    workers.append(start(task, slot, num_slots, num_gpus))
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
