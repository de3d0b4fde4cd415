"""Learning curves as they happen, for plotting tools: save/<run>/losses.csv and, on request, TensorBoard's format."""

import util
from util import UserError

COLUMNS = "theta_loss phi_loss prior_loss novel_proportion new_map test_log_p test_kl".split()


class Curves:
    """Writes a run's losses.csv, a row per iteration. An existing file is rewritten from the statistics, which drops the
    rows of iterations that a killed run had not saved.

    Args: folder: of the run; statistics: name -> [times recorded]; use_tensorboard: also write folder/tensorboard
    Raises: UserError if the file cannot be written, or the package tensorboard is missing
    """

    def __init__(self, folder, statistics, use_tensorboard):
        self.path, self.num_written, self.writer = folder / "losses.csv", {}, None
        header = ",".join(["phase", "iteration", *COLUMNS])
        util.write(self.path, "".join(f"{line}\n" for line in [header, *self._get_lines(statistics)]).encode())
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=len(statistics.get("theta_loss", [])) + 1)

    def update(self, statistics):
        """Appends what is new in the statistics"""
        lines = self._get_lines(statistics)
        try:
            with open(self.path, "a") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); what was saved before is intact") from None
        if self.writer:
            self.writer.flush()

    def _get_lines(self, statistics):
        """CSV lines for the new entries: pretraining, then training, each test after its iteration"""
        rows = []
        for i, phi_loss in self._get_new(statistics, "pretrain_loss"):
            rows.append((0, i, "pretrain", {"phi_loss": phi_loss}))
        names = [name for name in COLUMNS if name in statistics and not name.startswith("test_")]
        for values in zip(*(self._get_new(statistics, name) for name in names), strict=True):
            rows.append((1, values[0][0], "train", {name: value for name, (_, value) in zip(names, values, strict=True)}))
        names = ["test_iteration", "test_log_p", "test_kl"]
        for (_, i), (_, log_p), (_, kl) in zip(*(self._get_new(statistics, name) for name in names), strict=True):
            rows.append((1, int(i), "test", {"test_log_p": log_p, "test_kl": kl}))
        rows.sort(key=lambda row: (row[0], row[1], row[2] == "test"))
        if self.writer:
            for _, i, phase, values in rows:
                for name, value in values.items():
                    self.writer.add_scalar(f"{phase}/{name}", value, i)
        return [
            f"{phase},{i}," + ",".join(f"{values[name]:.9g}" if name in values else "" for name in COLUMNS)
            for _, i, phase, values in rows
        ]

    def _get_new(self, statistics, name):
        """[(iteration, value)] of a statistic since the last update"""
        start, values = self.num_written.get(name, 0), statistics.get(name, [])
        self.num_written[name] = len(values)
        return [(start + 1 + i, value) for i, value in enumerate(values[start:].tolist() if len(values) else [])]
