"""Learning curves: what a run records of its statistics, save/<run>/losses.csv for plotting tools and, on request,
TensorBoard's format.

The statistics of a run are a table for each phase (pretrain, train, test): {phase: {"iteration": [T], name: [T], ...}}, the
iterations as int32, everything else as float32, NaN where a statistic was not recorded.
"""

import csv
import io
import math

import torch

import util
from util import UserError

DIVERGED = (
    "a parameter is no longer finite: training has diverged; what was saved before is intact, but will diverge again: train"
    " another run, with another --seed or --prior-lr-factor"
)

# ------------------------------------------------------------------ recording


def append_statistics(statistics, pending):
    """Moves pending statistics, a list of (phase, iteration, {name: scalar on the device}), to the CPU in one go, appends them
    to the tables and empties the list"""
    for phase in dict.fromkeys(phase for phase, *_ in pending):
        rows = [(iteration, values) for some, iteration, values in pending if some == phase]
        table = statistics.setdefault(phase, {"iteration": torch.zeros(0, dtype=torch.int32)})
        num_before = len(table["iteration"])
        table["iteration"] = torch.cat(
            [table["iteration"], torch.tensor([iteration for iteration, _ in rows], dtype=torch.int32)]
        )
        names = dict.fromkeys([*list(table)[1:], *(name for _, values in rows for name in values)])  # in order of appearance
        for name in names:
            before = table.get(name, torch.full([num_before], math.nan))
            table[name] = torch.cat([before, _stack([values.get(name, math.nan) for _, values in rows])])
    pending.clear()


def _stack(values):
    """A list of scalars, tensors or not, as float32 on the CPU: [N]"""
    device = next((x.device for x in values if torch.is_tensor(x)), "cpu")
    return torch.stack([torch.as_tensor(x, device=device).float() for x in values]).cpu()


def check_finite(tensors):
    """Raises: UserError if a parameter is not finite"""
    if not torch.stack([x.detach().isfinite().all() for x in tensors]).all().cpu():
        raise UserError(DIVERGED)


def get_last(statistics, phase):
    """The last values of a phase's statistics, by name"""
    table = statistics.get(phase, {})
    return {name: values[-1].item() for name, values in table.items() if name != "iteration" and len(values)}


# ------------------------------------------------------------------ files


class Curves:
    """Writes a run's losses.csv, a row per iteration, with a column for each statistic. An existing file is rewritten from
    the statistics, which drops the rows of iterations that a killed run had not saved.

    Args: folder: of the run; statistics: as above; use_tensorboard: also write folder/tensorboard
    Raises: UserError if the file cannot be written, or the package tensorboard is missing
    """

    def __init__(self, folder, statistics, use_tensorboard):
        self.path, self.columns, self.writer = folder / "losses.csv", None, None
        self.num_written = {}  # by phase
        self.update(statistics)
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            # TensorBoard hides what was logged before from this step on: the iterations of training that a killed run had
            # not saved, but those of pretraining as well, which are logged again
            start = max([0, *statistics.get("train", {}).get("iteration", torch.zeros(0)).tolist()[-1:]]) + 1
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=start)
            rows = get_rows(statistics)
            self._log([row for row in rows if row[0] == "pretrain" and row[1] >= start])

    def update(self, statistics):
        """Writes what is new in the statistics; all of it if there are new columns"""
        rows = get_rows(statistics, self.num_written)
        self._log(rows)
        names = [
            name
            for phase in dict.fromkeys(["train", "test", *statistics])
            for name in statistics.get(phase, {})
            if name != "iteration"
        ]
        columns = list(dict.fromkeys(["theta_loss", "phi_loss", *names]))
        try:
            if columns == self.columns:
                with open(self.path, "a", newline="") as file:
                    self._write_rows(file, rows)
            else:
                self.columns, rows = columns, get_rows(statistics)
                file = io.StringIO()
                csv.writer(file, lineterminator="\n").writerow(["phase", "iteration", *columns])
                self._write_rows(file, rows)
                util.write(self.path, file.getvalue().encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); what was saved before is intact") from None
        self.num_written = {phase: len(table["iteration"]) for phase, table in statistics.items()}

    def _write_rows(self, file, rows):
        writer = csv.writer(file, lineterminator="\n")
        for phase, iteration, values in rows:
            cells = [values.get(name, math.nan) for name in self.columns]
            writer.writerow([phase, iteration, *("" if math.isnan(x) else f"{x:.9g}" for x in cells)])

    def _log(self, rows):
        """Sends rows to TensorBoard"""
        if self.writer:
            for phase, iteration, values in rows:
                for name, value in values.items():
                    if not math.isnan(value):
                        self.writer.add_scalar(f"{phase}/{name}", value, iteration)
            self.writer.flush()


def get_rows(statistics, start=None):
    """[(phase, iteration, {name: value})] from the start[phase]-th entry of each phase on (by default, the first); tests come
    after their iteration"""
    rows = []
    for phase, table in statistics.items():
        columns = {name: values[(start or {}).get(phase, 0) :].tolist() for name, values in table.items()}
        iterations = columns.pop("iteration")
        rows += [(phase, i, {name: values[row] for name, values in columns.items()}) for row, i in enumerate(iterations)]
    return sorted(rows, key=lambda row: (row[0] != "pretrain", row[1], row[0] == "test"))
