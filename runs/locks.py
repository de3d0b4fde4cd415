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

PATIENCE = 300  # seconds that a job waits for its predecessor, which may still be saving
MOMENT = 0.3  # seconds that every process waits, since is_locked holds a lock for an instant


@contextlib.contextmanager
def lock(path, what, stop=None):
    """Holds a lock file; where locking is impossible, warns once and continues. In a Slurm job, waits a while for another
    process to release it.

    Args: what: what a process that holds it is doing, in words; stop: a StopSignal, which ends the wait
    Raises: UserError if another process holds it or it cannot be written
    """
    patience, start = PATIENCE if "SLURM_JOB_ID" in os.environ else MOMENT, time.monotonic()
    with util.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    with file:
        while not take(file):
            holder, waited = f"{what} by {get_holder(path)}", time.monotonic() - start
            if stop is not None and stop.received is not None:
                print(f"stopped by {signal.Signals(stop.received).name} before it started")
                sys.exit(128 + stop.received)
            if waited >= patience:
                raise util.UserError(f"{holder}; wait for it or stop it")
            if waited >= MOMENT:
                util.warn_once(f"{holder}; waiting up to {PATIENCE} seconds for it to end")
            time.sleep(0.1)
        with util.writing(path):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        yield


def take(file, kind=fcntl.LOCK_EX):
    """Locks an open file, until it is closed, unless another process holds it. Returns: False if another does"""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some file systems
        return False
    except OSError as error:
        folder = os.path.dirname(os.path.abspath(file.name))
        reason = f"nothing can be locked in {folder} ({error.strerror})"
        util.warn_once(f"{reason}: let only one process at a time train or evaluate a run")
    return True


def get_holder(path):
    """Who holds a lock file, in words"""
    with contextlib.suppress(OSError):  # it may be another user's
        return pathlib.Path(path).read_text(errors="replace").strip() or "another process"
    return "another process"


def is_locked(path):
    """Whether a process holds a lock file"""
    try:
        with open(path) as file:
            return not take(file, fcntl.LOCK_SH)  # released at once
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's, who may hold it
        return True


def lock_run(path_base, stop=None):
    """Locks a run's folder, as `lock` does. Raises: UserError if another process holds it"""
    folder = util.SAVE / path_base
    return lock(folder / "lock", f"{folder} is being trained", stop)
