"""Which process may write to a run's folder: the one that holds its lock file, which the kernel frees when that ends."""

import contextlib
import fcntl
import os
import pathlib
import signal
import sys
import time

import util

PATIENCE = 300  # seconds that a job waits for the one before it, which may still be saving


@contextlib.contextmanager
def lock(path, what, stop=None):
    """Holds a lock file for this process. In a job of Slurm's it waits a while for a process that has it.

    Args: what: what the one that has it is at; stop: a StopSignal, which ends the waiting
    Raises: UserError if another process has it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end, told = time.monotonic() + PATIENCE * ("SLURM_JOB_ID" in os.environ), False
    with open(path, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                what_it_does = f"{what} by {file.read().strip() or 'another process'}"
            if stop is not None and stop.received is not None:
                print(f"stopped by {signal.Signals(stop.received).name} before it began")
                sys.exit(128 + stop.received)
            if time.monotonic() >= end:
                raise util.UserError(f"{what_it_does}; wait for it or stop it")
            if not told:
                util.warn(f"{what_it_does}; waiting up to {PATIENCE} seconds for it to end")
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def is_locked(path):
    """Whether a process of this machine holds a lock file. The kernel's list of locks tells without taking one, which
    would keep a run from starting at that moment."""
    try:
        status = os.stat(path)
        table = pathlib.Path("/proc/locks").read_text()
    except OSError:
        return False
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    return f" {major:02x}:{minor:02x}:{status.st_ino} " in table


@contextlib.contextmanager
def lock_run(path_base, stop=None):
    """Holds a run's folder for this process, as `lock` does. Raises: UserError if another has it."""
    folder = util.SAVE / path_base
    with lock(folder / "lock", f"{folder} is being trained", stop):
        for leftover in (folder / "checkpoints").glob(".*.tmp"):  # of a run that was killed
            leftover.unlink()
        yield
