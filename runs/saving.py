"""When a run saves: every few minutes, and on signals that stop it. This has no effect on what the run computes."""

import signal
import threading
import time


class SaveClock:
    """Tells when it is time to save: some minutes after the clock was made or restarted"""

    def __init__(self, minutes):
        self.seconds = 60 * minutes
        self.restart()

    def is_due(self):
        return time.monotonic() - self.saved >= self.seconds

    def restart(self):
        self.saved = time.monotonic()  # the machine's clock may be set back


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # the last is Slurm's warning


class StopSignal:
    """A context in which SIGNALS are recorded in `received`, so that a loop can save and return. A second SIGINT (Ctrl-C) ends the
    program at once."""

    def __init__(self):
        self.received = None

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()  # others receive no signals
        self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
