"""Learning curves: what a run records of its statistics, save/<run>/losses.csv for plotting tools and, on request,
TensorBoard's format.

The statistics of a run are a dict of curves, name -> [times recorded], float32: pretrain_loss, at each iteration of
pretraining; test_iteration, test_log_p and test_kl, for each test; and whatever the objective returns, at each iteration
of training, NaN where it was not returned yet.
"""

import math

import torch

import util
from util import UserError

DIVERGED = (
    "{} is no longer finite: training has diverged; what was saved before is intact, but will diverge again: train"
    " another run, with another --seed or --prior-lr-factor"
)

# ------------------------------------------------------------------ recording


def append_statistics(statistics, pending):
    """Moves pending statistics, a list of dicts of scalars on the device, to the CPU in one go, appends them to the curves
    and empties the list. Raises: UserError if training has diverged"""
    num_before = {phase: get_num_recorded(statistics, phase) for phase in PHASES}
    names = {name: None for row in pending for name in row}  # in order of appearance
    values = {name: [torch.as_tensor(row[name]) for row in pending if name in row] for name in names}
    for name in names:
        new = torch.stack(values[name]).float().cpu()
        if not new.isfinite().all():
            raise UserError(DIVERGED.format(name))
        statistics[name] = torch.cat([statistics.get(name, new.new_full([num_before[get_phase(name)]], math.nan)), new])
    pending.clear()


def check_finite(tensors):
    """Raises: UserError if a parameter is not finite"""
    if not torch.stack([x.detach().isfinite().all() for x in tensors]).all().cpu():
        raise UserError(DIVERGED.format("a parameter"))


# ------------------------------------------------------------------ phases

PHASES = ["pretrain", "train", "test"]


def get_phase(name):
    """The phase in which a statistic is recorded"""
    prefix = name.split("_")[0]
    return prefix if prefix in ("pretrain", "test") else "train"


def get_names(statistics, phase):
    """The names of a phase's statistics, but for the iterations of tests"""
    return [name for name in statistics if get_phase(name) == phase and name != "test_iteration"]


def get_num_recorded(statistics, phase):
    """How often the statistics of a phase were recorded"""
    return max((len(statistics[name]) for name in get_names(statistics, phase)), default=0)


# ------------------------------------------------------------------ files


class Curves:
    """Writes a run's losses.csv, a row per iteration, with a column for each statistic. An existing file is rewritten from
    the statistics, which drops the rows of iterations that a killed run had not saved.

    Args: folder: of the run; statistics: as above; use_tensorboard: also write folder/tensorboard
    Raises: UserError if the file cannot be written, or the package tensorboard is missing
    """

    def __init__(self, folder, statistics, use_tensorboard):
        self.path, self.columns, self.writer = folder / "losses.csv", None, None
        self.num_written = dict.fromkeys(PHASES, 0)
        self.update(statistics)
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            # TensorBoard hides what was logged before from this step on: the iterations of training that a killed run had
            # not saved, but those of pretraining as well, which are logged again
            start = get_num_recorded(statistics, "train") + 1
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=start)
            rows = self._get_rows(statistics, dict.fromkeys(PHASES, 0))
            self._log([row for row in rows if row[0] == "pretrain" and row[1] >= start])

    def update(self, statistics):
        """Writes what is new in the statistics; all of it if there are new columns"""
        rows = self._get_rows(statistics, self.num_written)
        self._log(rows)
        columns = [*dict.fromkeys(["theta_loss", "phi_loss", *get_names(statistics, "train"), *get_names(statistics, "test")])]
        try:
            if columns == self.columns:
                with open(self.path, "a") as file:
                    file.writelines(self._get_lines(rows))
            else:
                self.columns, rows = columns, self._get_rows(statistics, dict.fromkeys(PHASES, 0))
                lines = [",".join(["phase", "iteration", *columns]) + "\n", *self._get_lines(rows)]
                util.write(self.path, "".join(lines).encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); what was saved before is intact") from None
        self.num_written = {phase: get_num_recorded(statistics, phase) for phase in PHASES}

    def _get_rows(self, statistics, start):
        """[(phase, iteration, {name: value})] from the start-th entry of each phase on, each test after its iteration"""
        rows = []
        for phase in PHASES:
            names, first = get_names(statistics, phase), start[phase]
            columns = [statistics[name][first:].tolist() for name in names]
            iterations = range(first + 1, first + 1 + max(map(len, columns), default=0))
            if phase == "test" and names:
                iterations = [int(i) for i in statistics["test_iteration"][first:].tolist()]
            for iteration, *values in zip(iterations, *columns, strict=True):
                rows.append((phase, iteration, dict(zip(names, values, strict=True))))
        return sorted(rows, key=lambda row: (row[0] != "pretrain", row[1], row[0] == "test"))

    def _get_lines(self, rows):
        for phase, iteration, values in rows:
            values = {"phi_loss": values["pretrain_loss"]} if phase == "pretrain" else values
            cells = [values.get(name, math.nan) for name in self.columns]
            yield f"{phase},{iteration}," + ",".join("" if math.isnan(x) else f"{x:.9g}" for x in cells) + "\n"

    def _log(self, rows):
        """Sends rows to TensorBoard"""
        if self.writer:
            for phase, iteration, values in rows:
                for name, value in values.items():
                    self.writer.add_scalar(f"{phase}/{name}", value, iteration)
            self.writer.flush()
