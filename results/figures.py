"""The figures of diagnostics.py: curves, grids of drawings, drawings stroke by stroke.

Drawings are probabilities of ink, [..., R, C], from 0 (white) to 1 (black); NaN leaves a place empty.
Figures are made without pyplot, so that they are freed once nothing refers to them.
"""

import math
from typing import NamedTuple

import matplotlib
import matplotlib.backends.backend_agg
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import matplotlib.transforms
import numpy as np
import torch
import torch.nn.functional as F

from results.drawings import draw_primitives

MAX_POINTS = 300  # in a curve; longer ones are thinned
EMPTY, NEWEST, PEN_UP, START = "#e8eef4", "#d1410c", "#3b7dd8", "#3b7dd8"
RIGHT, WRONG = "#2a8a3e", "#c0281e"
SETTLED = 0.05  # of a curve: the beginning, which does not determine the axis

# ------------------------------------------------------------------ tiles


def tile(images, num_cols, below=0):
    """Tiles [N, R, C] into one image, row by row; NaN fills the gaps (`below` pixels under each) and the empty tiles"""
    num_rows = max(math.ceil(len(images) / num_cols), 1)
    gap = max(images.shape[1] // 14, 1)
    images = F.pad(images, (0, gap, 0, gap + below, 0, num_rows * num_cols - len(images)), value=math.nan)
    height, width = images.shape[1:]
    grid = images.view(num_rows, num_cols, height, width).transpose(1, 2).reshape(num_rows * height, num_cols * width)
    return F.pad(grid, (gap, 0, gap, 0), value=math.nan).numpy()


def show(axes, image):
    """Shows grey levels unscaled: 0 white, 1 black, pixels as squares"""
    cmap = matplotlib.colormaps["gray_r"].with_extremes(bad=EMPTY)
    axes.imshow(np.ma.masked_invalid(image), cmap=cmap, vmin=0, vmax=1, interpolation="none")
    axes.set_axis_off()


def make_figure(width, height, title):
    """A figure of the given size in inches; a title too long for its line loses its middle"""
    lines = [shorten(line, int(13 * width)) for line in title.split("\n")]
    figure = matplotlib.figure.Figure(figsize=(width, height + 0.17 * len(lines)), layout="constrained")
    figure.suptitle(literal("\n".join(lines)), fontsize=9)
    return figure


def literal(text):
    """Text from outside (names of files, say) as matplotlib shows it literally: without mathematics, and with bytes that are
    not UTF-8 as escapes"""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("$", r"\$")


def shorten(text, length):
    """Shortens a text to a number of characters by leaving out its middle"""
    return text if len(text) <= length else f"{text[: (length - 2) // 2]}…{text[-(length - 1) // 2 :]}"


def grid_figure(images, num_cols, title, labels=()):
    """A grid of images, with labels underneath if there are any"""
    below = images.shape[1] // 4 if labels else 0
    image = tile(images, num_cols, below)
    num_rows = math.ceil(len(images) / num_cols)
    figure = make_figure(0.7 * num_cols + 0.2, 0.7 * num_rows * (1.25 if labels else 1) + 0.3, title)
    axes = figure.subplots()
    show(axes, image)
    height, width = image.shape[0] / num_rows, image.shape[1] / num_cols
    for i, label in enumerate(labels):
        row, col = divmod(i, num_cols)
        axes.text((col + 0.5) * width, (row + 1) * height - below / 2, literal(label), ha="center", va="center", fontsize=6)
    return figure


def choose_num_cols(num_images, most=10):
    """The number of columns, at most 10, that leaves the fewest gaps in the last row"""
    return min(range(min(most, num_images), min(most, num_images) // 2, -1), key=lambda cols: -num_images % cols)


def primitives_figure(generative_model, resolution, title, usage, source):
    """All primitives, the most used first: usage [K], as shares of the strokes of the source (memory or prior)"""
    resolution = max(resolution, 56)
    probs, start, side = draw_primitives(generative_model, resolution)
    order = usage.argsort(descending=True, stable=True)
    labels = [f"{i}: {usage[i]:.1%}" for i in order.tolist()]
    most = int((usage[order].cumsum(0) < 0.9).sum()) + 1
    title += f"\n{most} of {len(order)} make 90 % of the strokes in the {source} (shares below each)"
    figure = grid_figure(probs[order], 8, f"{title}\ndot: start; tile: {side:.2f} characters wide", labels)
    (axes,) = figure.axes
    gap = max(resolution // 14, 1)
    row, col = np.divmod(np.arange(len(order)), 8)
    x = gap + col * (resolution + gap) + start[order, 0].numpy()
    y = gap + row * (resolution + gap + resolution // 4) + start[order, 1].numpy()
    axes.plot(x, y, ".", color=START, ms=3)
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


def example_figures(obs, examples, names, title, num_rows=12):
    """Pages of rows: a character's name, its image, and new examples of it: obs [N, R, R], examples [N, E, R, R]"""
    num_cols, side = examples.shape[1], obs.shape[1]
    gap = max(side // 14, 1)
    for first in range(0, len(obs), num_rows):
        rows = slice(first, first + num_rows)
        figure = make_figure(0.6 * (num_cols + 1) + 1.2, 0.6 * len(obs[rows]) + 0.4, title)
        axes = figure.subplots()
        show(axes, tile(torch.cat([obs[rows].unsqueeze(1), examples[rows]], 1).flatten(0, 1), num_cols + 1))
        for row, name in enumerate(names[rows]):
            axes.text(-gap, gap + row * (side + gap) + side / 2, literal(name), ha="right", va="center", fontsize=7)
        axes.axvline(side + 1.5 * gap - 0.5, color="black", lw=0.8)
        yield figure


def matches_figure(tests, characters, best, probs, answers, title, num_cols=2):
    """Test images, each with its best characters and, over the test image, their strokes as they were varied to fit it.

    Args: tests [M, R, R]; characters [N, R, R]; best [M, S], characters, best first; probs [M, S, R, R], of the strokes' ink;
        answers [M], the right characters
    """
    num_tests, num_shown = best.shape
    num_rows, side = math.ceil(num_tests / num_cols), tests.shape[1]
    figure = make_figure(0.55 * num_cols * (2 * num_shown + 1.5) + 0.3, 0.68 * num_rows + 0.2, title)
    for i, axes in enumerate(np.ravel(figure.subplots(num_rows, num_cols))):
        axes.set_axis_off()
        if i >= num_tests:
            continue
        tiles = [tests[i].unsqueeze(-1).expand(-1, -1, 3) * -1 + 1]  # [R, R, 3] each
        for character, ink in zip(best[i].tolist(), probs[i], strict=True):
            tiles += [1 - characters[character].unsqueeze(-1).expand(-1, -1, 3), overlay(tests[i], ink)]
        gap = torch.ones(side, side // 8, 3)
        axes.imshow(torch.cat([part for x in tiles for part in (x, gap)], 1).numpy(), interpolation="none")
        for rank, character in enumerate(best[i].tolist()):
            left = (2 * rank + 1) * (side + side // 8) - side // 16
            color = RIGHT if character == int(answers[i]) else WRONG if rank == 0 else "none"
            box = matplotlib.patches.Rectangle((left, -1), 2 * side + side // 4, side + 1, fill=False, ec=color, lw=1)
            axes.add_patch(box).set_clip_on(False)
        right = int(best[i, 0]) == int(answers[i])
        axes.set_title(
            f"{i + 1}: {'right' if right else 'wrong'}", fontsize=6, loc="left", pad=1, color=RIGHT if right else WRONG
        )
    return figure


def overlay(obs, ink):
    """Strokes, probabilities of ink [R, R], over an image [R, R] in grey: [R, R, 3]"""
    page = (1 - 0.35 * obs).unsqueeze(-1).expand(-1, -1, 3)
    return page + ink.unsqueeze(-1) * (torch.tensor(matplotlib.colors.to_rgb(NEWEST)) - page)


def to_frame(image, title, num_pixels=6):
    """Renders an image as an RGB frame of an animation, with a title"""
    figure = make_figure(num_pixels, num_pixels * image.shape[0] / image.shape[1], title)
    show(figure.subplots(), image)
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ------------------------------------------------------------------ stroke by stroke


def colour_newest(stages):
    """Drawings after each stroke, [N, S, R, R], as RGB with the newest ink in colour: [N, S, R, R, 3]"""
    paper = stages[:, :1].amin((2, 3), keepdim=True).expand_as(stages[:, :1])
    before = torch.cat([paper, stages[:, :-1]], 1)
    new = ((stages - before) / stages.clamp(min=1e-3)).clamp(0, 1).unsqueeze(-1)
    colour = torch.tensor(matplotlib.colors.to_rgb(NEWEST))
    return 1 - stages.unsqueeze(-1) * (1 - new * colour)


def stroke_figures(obs, seen, stages, labels, title, paths=None, off_page=None, canonical=None, num_rows=20):
    """Pages of rows: an image, its program as the model sees it, and the drawing after each visible stroke, with the
    newest one in colour and the pen's path to it dotted.

    Args: obs, seen, canonical (or None) [N, R, R]; stages [N, S, R, R]; labels: N strings; paths: for each row, a list
        of each visible stroke's pen-up moves [M, 2, 2], in pixels (column, row); off_page: for each row a list of bools
    """
    headings = ["image", "as the\nmodel\nsees it", *(f"stroke\n{i + 1}" for i in range(stages.shape[1]))]
    images = [obs.unsqueeze(1), seen.unsqueeze(1)]
    images = [x.unsqueeze(-1).neg().add(1).expand(-1, -1, -1, -1, 3) for x in images] + [colour_newest(stages)]
    if canonical is not None:
        headings.append("canonical")
        images.append(1 - canonical[:, None, :, :, None].expand(-1, -1, -1, -1, 3))
    rows = torch.cat(images, 1)  # [N, columns, R, R, 3]
    size, gap = rows.shape[2], max(rows.shape[2] // 14, 1)
    for page in range(0, len(rows), num_rows):
        chosen = range(page, min(page + num_rows, len(rows)))
        figure = make_figure(0.7 * rows.shape[1] + 1.5, 0.7 * len(chosen) + 0.6, title)
        axes = figure.subplots()
        channels = [tile(rows[page : page + num_rows, ..., c].flatten(0, 1), rows.shape[1]) for c in range(3)]
        image = np.stack(channels, -1)
        axes.imshow(np.where(np.isnan(image), matplotlib.colors.to_rgb(EMPTY), image), interpolation="none")
        axes.set_axis_off()
        axes.text(-gap, -gap, "log p(x, z)", ha="right", va="bottom", fontsize=7)
        for col, heading in enumerate(headings):
            axes.text(gap + col * (size + gap) + size / 2, -gap, heading, ha="center", va="bottom", fontsize=7)
        for row, i in enumerate(chosen):
            top = gap + row * (size + gap)
            axes.text(-gap, top + size / 2, literal(labels[i]), ha="right", va="center", fontsize=8)
            for step, moves in enumerate(paths[i] if paths else []):
                left = gap + (2 + step) * (size + gap)
                draw_pen(axes, moves, left, top, size)
                if off_page[i][step]:
                    below = stages[i, step, -size // 4 :].sum() <= stages[i, step, : size // 4].sum()  # beside the ink
                    height = top + size * (0.9 if below else 0.1)
                    axes.text(left + size / 2, height, "off page", color=NEWEST, ha="center", va="center", fontsize=7)
        yield figure


def draw_pen(axes, moves, left, top, size):
    """Draws pen-up moves [M, 2, 2] as dotted lines, clipped to a tile"""
    box = matplotlib.transforms.TransformedBbox(
        matplotlib.transforms.Bbox([[left - 0.5, top - 0.5], [left + size - 0.5, top + size - 0.5]]), axes.transData
    )
    for start, end in moves:
        (line,) = axes.plot(
            [left + start[0], left + end[0]], [top + start[1], top + end[1]], ":", color=PEN_UP, lw=0.6, scalex=False,
            scaley=False,
        )  # fmt: skip
        line.set_clip_box(box)


# ------------------------------------------------------------------ curves


class Curve(NamedTuple):
    """What was recorded of a statistic: iterations [N] and values [N], float64"""

    iteration: np.ndarray
    value: np.ndarray


def get_curves(statistics):
    """The curves of a run, (phase, name) -> Curve; those of which nothing finite was recorded are left out"""
    curves = {}
    for phase, table in statistics.items():
        for name in [name for name in table if name != "iteration"]:
            value = table[name].double().numpy()
            recorded = np.isfinite(value)
            if recorded.any():
                curves[phase, name] = Curve(table["iteration"].double().numpy()[recorded], value[recorded])
    return curves


def thin(curve):
    """Thins a Curve to at most MAX_POINTS bins: their centres, means, 5th and 95th percentiles"""
    num_bins = min(len(curve.value), MAX_POINTS)
    middles = np.array([x.mean() for x in np.array_split(curve.iteration, num_bins)])
    bins = np.array_split(curve.value, num_bins)
    low, high = (np.array([np.percentile(b, q) for b in bins]) for q in (5, 95))
    return middles, np.array([b.mean() for b in bins]), low, high


def smooth(values):
    """Moving average over a twentieth of the points, over fewer at the ends"""
    reach = len(values) // 40
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


def plot_curve(axes, curve, label="moving average"):
    """Plots a Curve, smoothed, in front of the band of its raw values or, if it is short, the values themselves.
    Returns: the range of the raw values, without the beginning"""
    x, mean, low, high = thin(curve)
    line = axes.plot(x, smooth(mean), lw=1.3, label=label)[0]
    settled = int(SETTLED * len(x))
    if len(curve.value) > MAX_POINTS:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0, label="5th to 95th percentile")
        return low[settled:].min(), high[settled:].max()
    axes.plot(x, mean, lw=0.6, alpha=0.4, color=line.get_color(), label="each iteration")
    return mean[settled:].min(), mean[settled:].max()


def losses_figure(statistics, log_num_images, title, log_iterations=False):
    """The learning curves.

    Args: statistics: as in a checkpoint; log_num_images: the dashed line of the prior loss, log of the number
        of images (per alphabet, if conditional), or None; log_iterations: whether the axis is logarithmic
    """
    panels = get_panels(get_curves(statistics))
    num_rows = math.ceil(len(panels) / 4)
    in_rows = np.array_split(list(panels), num_rows)  # lengths of rows differ by one, so that no panel is empty
    figure = make_figure(3.6 * len(in_rows[0]), 2.8 * num_rows, title)
    rows = np.atleast_1d(figure.subfigures(num_rows, 1))
    for row, titles in zip(rows, in_rows, strict=True):
        for axes, title in zip(np.atleast_1d(row.subplots(1, len(titles))), map(str, titles), strict=True):
            plot_panel(axes, title, panels[title], log_num_images)
            if log_iterations:
                axes.set_xscale("log")
    return figure


def get_panels(curves):
    """The panels of the learning curves, title -> curves by phase and name: shares (of proposals, of images) together, every
    other statistic by itself"""
    shares = {
        (phase, name): curve
        for (phase, name), curve in curves.items()
        if phase == "train" and not name.endswith("_loss") and ((0 <= curve.value) & (curve.value <= 1)).all()
    }
    panels = {get_words(*key): {key: curves[key]} for key in curves if key[0] == "train" and key not in shares}
    panels |= {"shares": shares} if shares else {}
    return panels | {get_words(*key): {key: curves[key]} for key in curves if key[0] != "train"}


def get_words(phase, name):
    """The name of a statistic in words"""
    greek = {"theta": "θ", "phi": "φ", "p": "p(x)", "map": "best program"}
    words = " ".join(greek.get(word, word) for word in name.split("_"))
    return words if phase == "train" or name.startswith(phase) else f"{phase} {words}"


def plot_panel(axes, title, curves, log_num_images):
    """Plots curves, by phase and name, into a panel; the other arguments are those of `losses_figure`"""
    (phase, name), curve = next(iter(curves.items()))
    axes.set_xlabel("iteration of pretraining" if phase == "pretrain" else "iteration")
    in_nats = name.endswith("_loss") or phase == "test"
    axes.set_ylabel("share" if title == "shares" else "nats per image" if in_nats else title)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    if title == "shares":
        for key, share in curves.items():
            x, mean, *_ = thin(share)
            axes.plot(x, smooth(mean), lw=1.3, label=get_words(*key))
        axes.set_ylim(max(get_lowest(curves.values()) / 2, 1e-5), 1.2)  # set first, since zeros alone imply none
        axes.set_yscale("log", nonpositive="clip")
    elif phase == "test":
        axes.plot(*curve, marker=".", label="estimate")
    else:
        low, high = plot_curve(axes, curve)
        if name == "prior_loss" and log_num_images is not None:
            axes.axhline(log_num_images, ls="--", color="black", lw=1, label="log number of images")
            low, high = min(low, log_num_images), max(high, log_num_images)
        if math.isfinite(high - low) and high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.legend(fontsize=7)


def get_lowest(some_curves):
    """The lowest positive value of the thinned curves; 1 if there is none"""
    means = np.concatenate([smooth(thin(curve)[1]) for curve in some_curves])
    return means[means > 0].min(initial=1)
