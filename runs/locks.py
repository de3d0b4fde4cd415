"""Locks: only the process that holds a run's lock file may write to its folder. The kernel releases the lock when
the process ends, however it ends."""

import contextlib
import fcntl
import os
import pathlib
import signal
import sys
import time

import util

PATIENCE = 300  # seconds a job waits for its predecessor, which may still be saving


@contextlib.contextmanager
def lock(path, what, stop=None):
    """Holds a lock file. In a Slurm job, waits a while for another process to release it.

    Args: what: what a process that holds it is doing, in words; stop: a StopSignal, which ends the waiting
    Raises: UserError if another process holds it
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
                print(f"stopped by {signal.Signals(stop.received).name} before it started")
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
    """Whether a process on this machine holds a lock file. Reads the kernel's list of locks, since taking the lock to
    find out could keep a run from starting at that moment."""
    try:
        status = os.stat(path)
        table = pathlib.Path("/proc/locks").read_text()
    except OSError:
        return False
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    return f" {major:02x}:{minor:02x}:{status.st_ino} " in table


@contextlib.contextmanager
def lock_run(path_base, stop=None):
    """Locks a run's folder, as `lock` does. Raises: UserError if another process holds it"""
    folder = util.SAVE / path_base
    with lock(folder / "lock", f"{folder} is being trained", stop):
        for leftover in (folder / "checkpoints").glob(".*.tmp"):  # left by a run that was killed
            leftover.unlink()
        yield
