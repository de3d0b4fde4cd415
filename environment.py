"""What torch reads from the environment when it is loaded; imported before it.

Threads of torch's OpenMP wait for work in a loop that takes a core for milliseconds. Where other
processes need the cores, too, all then wait for each other: a run was ten times slower than it need be.
After some microseconds they sleep instead, which costs nothing measurable on an idle machine.

torch makes the folder of its compiler's cache even where nothing is compiled, and fails where it cannot.
"""

import os
import pathlib

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _can_be_written(folder):
    """Without touching anything"""
    path = pathlib.Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    read_only = path.exists() and os.statvfs(path).f_flag & os.ST_RDONLY
    return path.is_dir() and not read_only and os.access(path, os.W_OK | os.X_OK)


UNUSABLE_CACHE = None  # the folder that the user chose, if nothing can be written there
if (chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) and not _can_be_written(chosen):
    UNUSABLE_CACHE = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
