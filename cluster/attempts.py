"""What Slurm did with a task: a record beside its log, save/<run>/logs/<task>.jobs, of the submission, of each start with
how far the task had got by then, and of why it must not start again."""

import json
import pathlib
import re
from typing import NamedTuple

import util
from cluster import commands
from cluster.tasks import get_position

MAX_REQUEUES = 3  # limit of requeues without progress
FAILURES = ["BOOT_FAIL", "DEADLINE", "FAILED", "OUT_OF_MEMORY"]  # states after which a job does not start again


class Record(NamedTuple):
    listing: str = ""  # name of the submission
    job: str = ""  # its number
    output: str = ""  # Slurm's own output file
    starts: list = []  # [job, position] of each
    stopped: str = ""  # why it does not start again
    refused: str = ""  # why Slurm refused a successor, or an evaluation after its training


def read(task):
    """The record of a task; an empty one if there is none"""
    try:
        return Record(**json.loads(task.get_path("jobs").read_text()))
    except (OSError, ValueError, TypeError):
        return Record()


def write(task, record):
    util.write(task.get_path("jobs"), json.dumps(record._asdict(), indent=1).encode())


def note_submission(task, listing, job, output):
    """A new submission begins a new record"""
    write(task, Record(listing, job, output))


def note_start(task, listing, job, max_requeues=MAX_REQUEUES):
    """Records that a job starts a task. Returns: why it should not run, in words, or "" """
    record = read(task)
    if record.listing != listing:
        record = Record(listing)
    stopped = record.stopped or get_memory_fault(record, job)
    record = record._replace(job=job, starts=[*record.starts, [job, get_position(task)]])
    positions = [position for _, position in record.starts[-max_requeues - 1 :]]
    if not stopped and len(positions) > max_requeues and len(set(positions)) == 1:
        stopped = (
            f"{max_requeues} requeues without progress (at iteration {positions[0]}): it does not start again;"
            " its output says why, and --max-requeues allows more"
        )
    write(task, record._replace(stopped=stopped))
    return stopped


def get_memory_fault(record, job):
    """A sentence if the job before this one was killed for memory, else "" """
    before = record.starts[-1][0] if record.starts else job
    verdict = commands.get_verdict(before) if before != job else None
    if verdict is not None and was_killed_for_memory(verdict, verdict.output):
        return f"job {before} was killed for memory, and would be again: ask for more with --mem"
    return ""


def was_killed_for_memory(verdict, output):
    """By the state that Slurm reports or, where that says nothing, by the end of its own output"""
    if verdict.state.startswith("OUT_OF_ME"):
        return True
    try:
        end = pathlib.Path(output).read_bytes()[-20_000:].decode(errors="replace") if output else ""
    except OSError:
        return False
    return re.search("exceeded .*memory limit|oom.kill|out of memory", end, re.I) is not None


def describe(task):
    """What became of a task that is neither done, running nor in the queue. Returns: words, or ""; whether it has failed"""
    record = read(task)
    parts = [record.stopped] if record.stopped else []
    parts += [f"Slurm refused what follows: {record.refused}"] if record.refused else []
    failed = bool(record.stopped)
    if record.job:
        verdict, number = commands.get_verdict(record.job), len(record.starts)
        output = (verdict.output if verdict else "") or record.output
        if verdict is None:
            parts.append(
                f"job {record.job}: unknown to Slurm by now, " + (f"started {number} times" if number else "never started")
            )
        else:
            for_memory = was_killed_for_memory(verdict, output)
            failed |= for_memory or verdict.state.split()[0] in FAILURES
            parts.append(f"job {record.job}: {verdict}" + ", killed for memory: ask for more with --mem" * for_memory)
        parts += [f"Slurm's own output: {output}"] if output else []
    return "; ".join(parts), failed
