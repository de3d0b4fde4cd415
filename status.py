"""The sweep's table of the progress of its tasks."""

import time

import locks
import tasks

HEADINGS = ["run", "state", "iteration", "", "saved before", "on", "job", "log"]


def show(some_tasks, queue):
    """Prints a line per task and, under a failed one, the last line of its log. Args: queue: a list of slurm.Job"""
    jobs = {}
    for job in queue:  # a running job before the one that om-repeat has queued behind it
        if (job.model, job.kind) not in jobs or job.state == "RUNNING":
            jobs[job.model, job.kind] = job
    value = "theta loss" if some_tasks[0].kind == "train" else "log p"
    rows = [[value if heading == "" else heading for heading in HEADINGS]]
    notes = [""]
    for task in some_tasks:
        row, note = get_row(task, jobs.get((task.model, task.kind)))
        rows.append(row)
        notes.append(note)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, note in zip(rows, notes, strict=True):
        print("  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
        if note:
            print(f"    {note}")
    return 0


def get_row(task, job):
    """Returns: the cells of a task's line, and a line to go under it"""
    progress = tasks.get_progress(task)
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
        tasks.get_device(task) or "-",
        number + waiting_for,
        str(log) if log.exists() else "-",
    ]
    return row, (tasks.get_log_end(task, 1) if state == "failed" else "")


def get_state(task, progress, job):
    """One of waiting (not started or queued), queued, running, stopped, done, failed"""
    if progress.done:
        return "done"
    if locks.is_locked(tasks.get_lock(task)) or (job and job.state in ("RUNNING", "COMPLETING")):
        return "running"
    if job:
        return "queued"
    if tasks.is_failed(task):
        return "failed"
    return "stopped" if progress.iteration or task.get_path("log").exists() else "waiting"


def format_age(saved):
    """Time elapsed since then, in hours:minutes:seconds"""
    if saved is None:
        return "-"
    seconds = max(int(time.time() - saved), 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
