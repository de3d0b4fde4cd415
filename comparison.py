"""The learning curves of a sweep in one figure, with their spread over seeds."""

import collections

import matplotlib.figure

import checkpoints
import report
import util
from util import UserError, warn

WINDOW = 100  # iterations averaged for each point


def get_curves(models):
    """Theta losses of runs, by model: name -> a tensor [iterations] per seed"""
    curves = collections.defaultdict(list)
    for model in models:
        try:
            checkpoint = checkpoints.load(util.get_checkpoint_path(model))
        except UserError as error:
            warn(f"{error}; left out of the figure")
            continue
        theta_loss = checkpoint["statistics"].get("theta_loss", [])
        if len(theta_loss) >= WINDOW:
            curves[report.get_name(model)].append(theta_loss)
    return curves


def draw(models):
    """Writes save/theta_loss.pdf. Returns: its path, and a line of text per model: mean and range over seeds of the last
    WINDOW iterations. Raises: UserError if no run has that many"""
    curves = get_curves(models)
    if not curves:
        raise UserError(f"none of these runs has {WINDOW} iterations yet")
    figure, lines = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained"), []
    axes = figure.subplots()
    for name, some in curves.items():
        length = min(map(len, some)) // WINDOW
        means = [[part.mean().item() for part in theta_loss[: length * WINDOW].split(WINDOW)] for theta_loss in some]
        x = [WINDOW * (i + 1) for i in range(length)]
        low, middle, high = zip(*((min(v), sum(v) / len(v), max(v)) for v in zip(*means, strict=True)), strict=True)
        (line,) = axes.plot(x, middle, label=f"{name} ({len(some)} seeds)" if len(some) > 1 else name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.25, lw=0)
        lines.append(f"{name}: theta loss {middle[-1]:.1f} ({low[-1]:.1f} to {high[-1]:.1f}, {len(some)} seeds) at {x[-1]}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("theta loss, nats per image")
    axes.set_title(f"means over {WINDOW} iterations; line: mean over seeds, band: their range", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    path = util.SAVE / "theta_loss.pdf"
    report.save_figure(path, figure)
    return path, lines
