"""The table of a sweep's progress."""

import datetime
import time

from cluster import slurm, tasks
from runs import locks


def show(some_tasks, queue):
    """Prints a line per task, in separate tables for trainings and evaluations, with notes under tasks that have stopped. Args:
    queue: a list of slurm.Job. Returns: 1 if a task has failed, else 0"""
    queue = sorted(queue, key=lambda job: job.state == "RUNNING")  # running jobs win over those queued behind them
    jobs = {job.task.key: job for job in queue}
    failed = False
    for value, are_trainings in [("theta loss", True), ("log p", False)]:
        group = [task for task in some_tasks if (task.kind == "train") == are_trainings]
        rows = [(["run", "state", "iteration", value, "saved before", "on", "job", "log"], [])]
        rows += [get_row(task, jobs.get(task.key)) for task in group]
        widths = [max(map(len, column)) for column in zip(*(cells for cells, _ in rows), strict=True)]
        for cells, notes in rows if group else []:
            print("  ".join(f"{word:{width}}" for word, width in zip(cells, widths, strict=True)).rstrip())
            for note in notes:
                print(f"    {note}")
            failed |= cells[1] == "failed"
    return int(failed)


def get_row(task, job):
    """Returns: the cells of a task's line, and the lines below it"""
    progress = tasks.get_progress(task)
    state, notes = get_state(task, progress, job), []
    if state in ("failed", "stopped"):
        verdict, failed = slurm.describe(task)
        ended = task.get_path("status").exists()  # by itself: Slurm only repeats its exit status, which is known
        state = "failed" if failed and not ended else state
        notes = [tasks.get_log_end(task, 1)] * (state == "failed") + [verdict]
        notes += [f"a different evaluation is saved: {progress.others}"] * bool(progress.others)
    iteration, log = f"{progress.iteration}/{progress.total}", task.get_path("log")
    age = datetime.timedelta(seconds=max(int(time.time() - progress.saved), 0)) if progress.saved else ""
    number = job.number + f" ({job.reason})" * (job.reason not in ("", "None")) if job else ""
    cells = [task, state, iteration, progress.value, age, tasks.get_device(task), number, log if log.exists() else ""]
    return [str(cell) or "-" for cell in cells], list(filter(None, [progress.damage, *notes]))


def get_state(task, progress, job):
    """One of waiting (never started or submitted), queued, running, stopped, done, failed"""
    if progress.done:
        return "done"
    if locks.is_locked(task.get_lock()) or (job and job.state in ("RUNNING", "COMPLETING")):
        return "running"
    if job:
        return "queued"
    if tasks.is_failed(task):
        return "failed"
    return "stopped" if progress.iteration or task.get_path("log").exists() else "waiting"
