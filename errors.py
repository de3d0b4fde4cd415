"""How scripts fail: with one line that says what is wrong and what to do, wherever their output goes."""

import contextlib
import pathlib
import re
import signal
import sys

import torch


class UserError(ValueError):
    """A problem that the user can fix; the message says in one line what it is and how."""


def run_script(main):
    """Calls main() and exits. Errors that the user can fix become one line on standard error
    and exit status 2."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError:
        message = "out of GPU memory; use a smaller --batch-size, fewer --num-particles or another GPU"
    except MemoryError:
        message = OUT_OF_MEMORY
    except RuntimeError as error:
        if not re.search("can't allocate memory|not enough memory|Storage size calculation overflowed", str(error)):
            raise
        message = OUT_OF_MEMORY
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


OUT_OF_MEMORY = "out of memory: use fewer or smaller --batch-size, --num-particles, --memory-size or sizes of the model"


class Stream:
    """A standard stream that may be closed, full, or no longer read by anyone: what a run computes and saves must not
    depend on it"""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self):
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def warn(message):
    """Prints a warning, as one line, to standard error"""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)
