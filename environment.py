"""Environment variables that torch reads when it is imported; scripts import this module first.

By default torch's OpenMP threads spin for milliseconds while they wait for work. Where other processes
need the cores as well, everyone ends up waiting for everyone else, and a run can become ten times slower.
Here they go to sleep after some microseconds, which costs nothing measurable on an idle machine.

torch creates its compiler's cache folder even if nothing is compiled, and fails if it cannot.
"""

import os
import pathlib

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _can_be_written(folder):
    """Looks only: creates and changes nothing"""
    path = pathlib.Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    read_only = path.exists() and os.statvfs(path).f_flag & os.ST_RDONLY
    return path.is_dir() and not read_only and os.access(path, os.W_OK | os.X_OK)


UNUSABLE_CACHE = None  # the folder chosen by the user, if it is not writable
if (chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) and not _can_be_written(chosen):
    UNUSABLE_CACHE = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
