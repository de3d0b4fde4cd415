"""Figures: curves, grids of drawings, drawings stroke by stroke.

Drawings are probabilities of ink, [..., R, C], from 0 (white) to 1 (black); NaN leaves a place empty.
Figures are made without pyplot, so that they are freed once nothing refers to them.
"""

import io
import itertools
import math
import textwrap
import warnings

import matplotlib
import matplotlib.backends.backend_agg
import matplotlib.colors
import matplotlib.patches
import numpy as np
import torch
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

import util
from reading import variation
from results import drawings

MAX_POINTS = 300  # in a curve; longer curves are thinned
EMPTY, NEWEST, PEN_UP, START = "#e8eef4", "#d1410c", "#3b7dd8", "#3b7dd8"
RIGHT, WRONG = "#2a8a3e", "#c0281e"
SHARES, LEAST_SHARE = ("novel_proportion", "new_map"), 1e-5  # statistics on a logarithmic axis, and where it begins
SETTLED = 0.05  # share of a curve at its beginning that does not affect the axis

warnings.filterwarnings("ignore", "Glyph .* missing from font")  # letters of a file's name, shown as boxes

# ------------------------------------------------------------------ tiles


def tile(images, num_cols, below=0):
    """Arranges tiles [N, R, C] or, in colour, [N, R, C, 3] in one image, row by row; NaN fills the gaps (`below` more pixels
    under each tile) and empty tiles"""
    size, num_rows = images.shape[1], max(math.ceil(len(images) / num_cols), 1)
    left, top = place(num_rows, num_cols, size, below)
    grid = images.new_full((top, left, *images.shape[3:]), math.nan)
    for i, image in enumerate(images):
        left, top = place(*divmod(i, num_cols), size, below)
        grid[top : top + size, left : left + images.shape[2]] = image
    return grid.numpy()


def get_gap(size):
    """The number of pixels between tiles of a size"""
    return max(size // 14, 1)


def place(row, col, size, below=0):
    """The upper left corner of a tile, in pixels: column and row"""
    gap = get_gap(size)
    return gap + col * (size + gap), gap + row * (size + gap + below)


def to_colour(ink):
    """Ink [...] in black on white: [..., 3]"""
    return 1 - ink.unsqueeze(-1).expand(*ink.shape, 3)


def show(axes, image):
    """Shows ink [H, W], 0 white and 1 black, or colours [H, W, 3], pixels as squares"""
    if image.ndim == 2:
        image = to_colour(torch.as_tensor(image)).numpy()
    image = np.where(np.isnan(image), matplotlib.colors.to_rgb(EMPTY), image.clip(0, 1))
    axes.imshow(image, interpolation="none")
    axes.set_axis_off()
    axes.autoscale(False)


def make_figure(width, height, title):
    """A figure of the given size in inches. A title too long for a line continues on the next; a word too long for one loses its
    middle"""
    length = int(13 * width)  # of a line, in characters
    wrap = textwrap.TextWrapper(length, break_long_words=False, break_on_hyphens=False).wrap
    lines = [shorten(part, length) for line in title.split("\n") for part in wrap(line)]
    figure = Figure(figsize=(width, height + 0.17 * len(lines)), layout="constrained")
    figure.suptitle(literal("\n".join(lines)), fontsize=9)
    return figure


def save_pdf(path, some_figures):
    """Writes a PDF with a page for each of an iterable of figures. Returns: path"""
    file = io.BytesIO()
    with PdfPages(file, metadata={"CreationDate": None}) as pages:
        for figure in some_figures:
            pages.savefig(figure)
    util.write(path, file.getvalue())
    return path


def literal(text):
    """Text from outside (names of files, say), so that matplotlib shows it literally: not as mathematics, and with bytes that
    are not UTF-8 as escapes"""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("$", r"\$")


def shorten(text, length):
    """Shortens a text to a number of characters by leaving out its middle"""
    return text if len(text) <= length else f"{text[: (length - 2) // 2]}…{text[-(length - 1) // 2 :]}"


def write(axes, x, y, text, **options):
    """Writes a small text into a picture"""
    axes.text(x, y, literal(text), **{"ha": "center", "va": "center", "fontsize": 7, **options})


def grid_figure(images, num_cols, title, labels=()):
    """A grid of images, with labels underneath if there are any"""
    size = images.shape[1]
    below = size // 4 if labels else 0
    num_rows = math.ceil(len(images) / num_cols)
    figure = make_figure(0.7 * num_cols + 0.2, 0.7 * num_rows * (1.25 if labels else 1) + 0.3, title)
    axes = figure.subplots()
    show(axes, tile(images, num_cols, below))
    for i, label in enumerate(labels):
        left, top = place(*divmod(i, num_cols), size, below)
        write(axes, left + size / 2, top + size + get_gap(size) / 2 + below / 2, label, fontsize=6)
    return figure


def choose_num_cols(num_images, most=10):
    """The number of columns, at most `most`, that leaves the fewest gaps in the last row"""
    return min(range(min(most, num_images), min(most, num_images) // 2, -1), key=lambda cols: -num_images % cols)


def primitives_figure(generative_model, resolution, title, usage, source):
    """All primitives, the most used first: usage [K], as shares of the strokes of the source (memory or prior)"""
    resolution = max(resolution, 56)
    probs, start, side = drawings.draw_primitives(generative_model, resolution)
    order = usage.argsort(descending=True, stable=True)
    labels = [f"{i}: {usage[i]:.1%}" for i in order.tolist()]
    most = min(int((usage[order].cumsum(0) < 0.9).sum()) + 1, len(order))
    title += f"\n{most} of {len(order)} make 90 % of the strokes in the {source} (shares below each)"
    figure = grid_figure(probs[order], 8, f"{title}\ndot: start; tile: {side:.2f} characters wide", labels)
    left, top = place(*np.divmod(np.arange(len(order)), 8), resolution, resolution // 4)
    figure.axes[0].plot(left + start[order, 0].numpy(), top + start[order, 1].numpy(), ".", color=START, ms=3)
    return figure


def panels_figure(panels, num_cols, title):
    """Grids of images side by side: panels: {title: [N, R, R]}"""
    num_rows = math.ceil(max(len(images) for images in panels.values()) / num_cols)
    widths = [min(num_cols, len(images)) for images in panels.values()]
    figure = make_figure(max(0.55 * sum(widths) + 0.4, 4), 0.55 * num_rows + 0.5, title)
    all_axes = np.atleast_1d(figure.subplots(1, len(panels), width_ratios=widths))
    for axes, width, (name, images) in zip(all_axes, widths, panels.items(), strict=True):
        show(axes, tile(images, width))
        axes.set_title(literal(name), fontsize=8)
    return figure


def row_figure(rows, labels, title, headings=()):
    """Rows of pictures with a label each, and perhaps a heading for each column.

    Args: rows [N, S, R, R] or [N, S, R, R, 3]; labels: N strings; headings: S strings
    Returns: the figure, its axes
    """
    longest = max(len(line) for label in labels for line in label.split("\n"))
    num_rows, num_cols, size = rows.shape[:3]
    gap = get_gap(size)
    figure = make_figure(0.7 * num_cols + max(0.07 * longest, 1) + 0.5, 0.7 * num_rows + 0.6, title)
    axes = figure.subplots()
    axes.set_anchor("W")  # the labels on its left are part of the layout, whatever the picture's proportions
    show(axes, tile(rows.flatten(0, 1), num_cols))
    for col, heading in enumerate(headings):
        write(axes, place(0, col, size)[0] + size / 2, -gap, heading, va="bottom")
    for row, label in enumerate(labels):
        write(axes, -gap, place(row, 0, size)[1] + size / 2, label, ha="right")
    return figure, axes


def example_figures(obs, examples, names, title):
    """Pages of rows: a character's name, its image, and new examples of it: obs [N, R, R], examples [N, E, R, R]"""
    rows = torch.cat([obs.unsqueeze(1), examples], 1)
    for ids in torch.arange(len(rows)).split(12):
        figure, axes = row_figure(rows[ids], [names[i] for i in ids], title)
        axes.axvline(place(0, 1, obs.shape[1])[0] - get_gap(obs.shape[1]) / 2 - 0.5, color="black", lw=0.8)
        yield figure


def matches_figure(tests, characters, best, probs, answers, title):
    """Test images, each with its best characters and, over the test image, their strokes varied to fit it.

    Args: tests [M, R, R]; characters [N, R, R]; best [M, S], characters, best first; probs [M, S, R, R], of the strokes' ink;
        answers [M], the right characters
    """
    grey = to_colour(0.35 * tests.unsqueeze(1))
    fitted = grey + probs.unsqueeze(-1) * (torch.tensor(matplotlib.colors.to_rgb(NEWEST)) - grey)  # [M, S, R, R, 3]
    pairs = torch.stack([to_colour(characters[best]), fitted], 2)  # [M, S, 2, R, R, 3]
    rows = torch.cat([to_colour(tests.unsqueeze(1)), pairs.flatten(1, 2)], 1)
    is_right, size = best == answers.unsqueeze(1), tests.shape[1]  # [M, S]
    labels = [f"{i + 1}: {'right' if right else 'wrong'}" for i, right in enumerate(is_right[:, 0])]
    figure, axes = row_figure(rows, labels, title)
    for row, rank in np.ndindex(*best.shape):
        if rank == 0 or is_right[row, rank]:
            left, top = (x - (get_gap(size) + 1) / 2 for x in place(row, 2 * rank + 1, size))
            width, height = (n * (size + get_gap(size)) for n in (2, 1))
            color = RIGHT if is_right[row, rank] else WRONG
            axes.add_patch(matplotlib.patches.Rectangle((left, top), width, height, fill=False, ec=color, lw=1, clip_on=False))
    return figure


def pair_frame(obs, probs, title):
    """Renders images beside drawings, [N, R, R] each, as an RGB frame of an animation, with a title of one line, since all frames
    are of the same size"""
    image = tile(torch.stack([obs, probs], 1).flatten(0, 1), 8)
    figure = make_figure(6, 6 * image.shape[0] / image.shape[1], shorten(title, 78))
    show(figure.subplots(), image)
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ------------------------------------------------------------------ stroke by stroke


def colour_newest(stages, strokes, paper):
    """Drawings after each stroke, as RGB with the newest stroke in colour, also where it retraces others: [N, S, R, R, 3].
    Args: stages, strokes [N, S, R, R], the latter of each stroke alone; paper [N, 1, R, R], without any"""
    new = ((strokes - paper) / stages.clamp(min=1e-3)).clamp(0, 1).unsqueeze(-1)
    colour = torch.tensor(matplotlib.colors.to_rgb(NEWEST))
    return 1 - stages.unsqueeze(-1) * (1 - new * colour)


def stroke_figures(obs, drawing, labels, title, resolution):
    """Pages of rows: an image, its program as the model sees it, and the drawing after each visible stroke, with the
    newest one in colour and the pen's path to it dotted.

    Args: obs [N, R, C]; drawing: a reading.variation.Drawing of N programs; labels: N strings
    """
    moves, off_page = drawings.get_pen_path(drawing, resolution), drawings.is_off_page(drawing)
    num_stages = max(int(drawing.on.sum(1).max()), 1)
    headings = ["image", "as the\nmodel\nsees it", *(f"stroke\n{i + 1}" for i in range(num_stages))]
    for ids in torch.arange(len(obs)).split(20):
        some = drawing.select(ids)
        pair = [drawings.resize(images, resolution) for images in (obs[ids], variation.get_probs(some, *obs.shape[1:]))]
        stages, strokes = (drawings.draw_stages(some, resolution, num_stages, alone) for alone in (False, True))
        paper = drawings.draw_parts(some, torch.zeros_like(some.on).unsqueeze(1), resolution)
        rows = torch.cat([to_colour(torch.stack(pair, 1)), colour_newest(stages, strokes, paper)], 1)  # [n, columns, R, R, 3]
        figure, axes = row_figure(rows, [labels[i] for i in ids], title, headings)
        write(axes, -get_gap(resolution), -get_gap(resolution), "log p(z, x)", ha="right", va="bottom")
        for row, i in enumerate(ids.tolist()):
            visible = drawing.on[i].nonzero().squeeze(1).tolist()
            for step, (previous, stroke) in enumerate(itertools.pairwise([-1, *visible])):
                left, top = place(row, 2 + step, resolution)
                draw_pen(axes, moves[i, previous + 1 : stroke], left, top, resolution)
                if off_page[i, stroke]:
                    stage, band = stages[row, step], resolution // 4
                    y = 0.9 if stage[-band:].sum() <= stage[:band].sum() else 0.1  # beside the ink
                    write(axes, left + resolution / 2, top + resolution * y, "off page", color=NEWEST)
        yield figure


def draw_pen(axes, moves, left, top, size):
    """Draws pen-up moves [M, 2, 2] as dotted lines, clipped to a tile"""
    page = matplotlib.patches.Rectangle((left - 0.5, top - 0.5), size, size, transform=axes.transData)
    for start, end in moves:
        (line,) = axes.plot([left + start[0], left + end[0]], [top + start[1], top + end[1]], ":", color=PEN_UP, lw=0.6)
        line.set_clip_path(page)


# ------------------------------------------------------------------ curves


def get_curves(statistics):
    """The curves of a run without those that have no finite value: {(phase, name): (iterations [N], values [N])}, float64"""
    curves = {}
    for phase, table in statistics.items():
        iteration = table["iteration"].double().numpy()
        for name in [name for name in table if name != "iteration"]:
            value = table[name].double().numpy()
            recorded = np.isfinite(value)
            if recorded.any():
                curves[phase, name] = iteration[recorded], value[recorded]
    return curves


def thin(curve):
    """Thins a curve to at most MAX_POINTS bins: their centres, means, 5th and 95th percentiles"""
    iterations, bins = (np.array_split(x, min(len(x), MAX_POINTS)) for x in curve)
    centres, means = (np.array([b.mean() for b in some]) for some in (iterations, bins))
    low, high = np.transpose([np.percentile(b, (5, 95)) for b in bins])
    return centres, means, low, high


def smooth(values):
    """Moving average over a twentieth of the points, and fewer at the ends"""
    reach = len(values) // 40
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


def plot_curve(axes, curve):
    """Plots a smoothed curve over a band of its raw values. Returns: their range, without the beginning"""
    x, mean, low, high = thin(curve)
    (line,) = axes.plot(x, smooth(mean), lw=1.3, marker="." * (len(x) == 1), label="moving average")
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0.6, label="5th to 95th percentile")
    settled = int(SETTLED * len(x))
    return low[settled:].min(), high[settled:].max()


def losses_figure(statistics, log_num_images, title, tested="test images"):
    """The learning curves.

    Args: statistics: as in a checkpoint; log_num_images: the dashed line of the prior loss, log of the number
        of images (per alphabet, if conditional), or None; tested: the images of tests during training, in words
    """
    curves = get_curves(statistics)
    num_cols = choose_num_cols(len(curves), most=4)
    num_rows = math.ceil(len(curves) / num_cols)
    figure = make_figure(3.6 * num_cols, 2.8 * num_rows, title)
    for number, ((phase, name), curve) in enumerate(curves.items(), start=1):
        plot_panel(figure.add_subplot(num_rows, num_cols, number), phase, name, curve, log_num_images, tested)
    return figure


def plot_panel(axes, phase, name, curve, log_num_images, tested):
    """Plots a statistic of a phase of training; other arguments as for `losses_figure`"""
    words = literal(name.replace("_", " "))
    axes.set_title(words if phase == "train" or name.startswith(phase) else f"{phase} {words}", fontsize=9)
    axes.set_xlabel("iteration of pretraining" if phase == "pretrain" else "iteration")
    axes.grid(alpha=0.25)
    if phase == "test":
        axes.plot(*curve, marker=".", label=f"estimate, {tested}")
    else:
        is_share = name in SHARES
        low, high = plot_curve(axes, (curve[0], curve[1].clip(min=LEAST_SHARE / 10)) if is_share else curve)
        if name == "prior_loss" and log_num_images is not None:
            axes.axhline(log_num_images, ls="--", color="black", lw=1, label="log number of images to tell apart")
            low, high = min(low, log_num_images), max(high, log_num_images)
        if math.isfinite(high - low) and high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if name.endswith("_loss") or name in ("test_log_p", "test_kl"):
        axes.set_ylabel("nats per image")
    elif name in SHARES:
        axes.set(ylabel="share", yscale="log", ylim=(LEAST_SHARE, 1.2))
    axes.legend(fontsize=7)
