"""Learning curves: a run's statistics, in save/<run>/losses.csv for plotting tools and, on request, in TensorBoard's format.

The statistics are a table for each phase (pretrain, train, test): {phase: {"iteration": [T], name: [T], ...}}, iterations as
int32, everything else as float32, NaN where a statistic was not recorded.
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
    """Moves pending statistics, a list of (phase, iteration, {name: scalar on the device}), to the CPU at once, appends them to
    the tables and empties the list"""
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
    """The latest values of a phase's statistics, by name. Callbacks may record in the same phase, each at its own iterations"""
    latest = {}
    for name, values in statistics.get(phase, {}).items():
        recorded = values if phase in ("pretrain", "train") else values[~values.isnan()]
        if name != "iteration" and len(recorded):
            latest[name] = recorded[-1].item()
    return latest


# ------------------------------------------------------------------ files


class Curves:
    """Writes a run's losses.csv, with a row per iteration and a column per statistic. An existing file is rewritten from the
    statistics, which drops iterations that a killed run had not saved.

    Args: folder: of the run; statistics: as above; use_tensorboard: also write folder/tensorboard
    Raises: UserError if the file cannot be written or the package tensorboard is missing
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
            # From this step on, TensorBoard hides what was logged before: iterations of training that a killed run had not
            # saved, but also those of pretraining, which are logged again
            rows = get_rows(statistics)
            start = max((iteration for phase, iteration, _ in rows if phase == "train"), default=0) + 1
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=start)
            self._log([row for row in rows if row[0] == "pretrain" and row[1] >= start])

    def update(self, statistics):
        """Writes new statistics, or all of them if there are new columns"""
        new = get_rows(statistics, self.num_written)
        self._log(new)
        names = [name for phase in dict.fromkeys(["train", "test", *statistics]) for name in statistics.get(phase, {})]
        columns = [name for name in dict.fromkeys(["theta_loss", "phi_loss", *names]) if name != "iteration"]
        if columns == self.columns:
            with util.writing(self.path), open(self.path, "ab") as file:
                file.write(to_csv(columns, new))
        else:
            util.write(self.path, to_csv(columns, get_rows(statistics), with_heading=True))
        self.columns, self.num_written = columns, {phase: len(table["iteration"]) for phase, table in statistics.items()}

    def _log(self, rows):
        """Sends rows to TensorBoard"""
        if self.writer:
            for phase, iteration, values in rows:
                for name, value in values.items():
                    self.writer.add_scalar(f"{phase}/{name}", value, iteration)
            self.writer.flush()


def to_csv(columns, rows, with_heading=False):
    """The bytes of a table of rows from `get_rows`"""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([["phase", "iteration", *columns]] * with_heading)
    for phase, iteration, values in rows:
        writer.writerow([phase, iteration, *(f"{values[name]:.9g}" if name in values else "" for name in columns)])
    return file.getvalue().encode()


def get_rows(statistics, start=None):
    """[(phase, iteration, {name: value, unless it is NaN})], from entry start[phase] of each phase on (by default, the first);
    tests come after their iteration"""
    rows = []
    for phase, table in statistics.items():
        columns = {name: values[(start or {}).get(phase, 0) :].tolist() for name, values in table.items()}
        for i, iteration in enumerate(columns.pop("iteration")):
            values = {name: column[i] for name, column in columns.items() if not math.isnan(column[i])}
            rows.append((phase, iteration, values))
    return sorted(rows, key=lambda row: (row[0] != "pretrain", row[1], row[0] == "test"))
