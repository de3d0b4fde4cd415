"""Prepares the environment before torch is imported; scripts import this module first.

By default, torch's OpenMP threads spin for milliseconds while they wait for work: if other processes need the cores too, a run
can become ten times slower. Here they go to sleep after a few microseconds.

torch and Triton keep compiled code in folders that may not be writable (in a container, say); a temporary folder then takes
their place.

While a script is still importing, Ctrl-C ends it without a traceback; util.run_script takes over from there.
"""

import contextlib
import getpass
import os
import pathlib
import signal
import sys
import tempfile

_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and pathlib.Path(_script).resolve().parent == pathlib.Path(__file__).resolve().parents[1]:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored in background processes
        signal.signal(signal.SIGINT, signal.SIG_DFL)

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _choose_cache(variable, default=None):
    """Sets the variable to a temporary folder if the user's choice, or the default, is not writable"""
    chosen = os.environ.get(variable, default)
    try:
        if not chosen:
            getpass.getuser()  # torch's own folder has the user's name, which one in a container may lack
            return
        folder = pathlib.Path(chosen).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (KeyError, OSError, RuntimeError, ValueError):
        name = f"{variable.split('_')[0].lower()}_cache_{os.getuid()}"
        with contextlib.suppress(OSError):  # there may be no folder for temporary files, either
            os.environ[variable] = os.path.join(tempfile.gettempdir(), name)


_choose_cache("TORCHINDUCTOR_CACHE_DIR")
_choose_cache("TRITON_CACHE_DIR", default="~/.triton/cache")
