"""The figures of diagnostics.py: curves, grids of drawings, drawings stroke by stroke.

Drawings are probabilities of ink, [..., R, C], from 0, white, to 1, black; nan leaves a place empty.
Figures are made without pyplot, so that they go when they are no longer referred to.
"""

import math
import textwrap

import matplotlib
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F

import rendering

MAX_POINTS = 300  # of a curve; longer ones are thinned
PIXELS_AT_ONCE = 64 * 28 * 28
EMPTY = "#e8eef4"

# ------------------------------------------------------------------ drawing programs


@torch.no_grad()
def draw(generative_model, latent, resolution):
    """latent [..., A, 2] -> probabilities of ink [..., R, R] at a resolution"""
    flat = latent.flatten(0, -3)  # [N, A, 2]
    at_once = max(PIXELS_AT_ONCE // resolution**2, 1)
    probs = [
        generative_model.get_logits(chunk, resolution, resolution).sigmoid().cpu() for chunk in flat.split(at_once)
    ]
    return torch.cat(probs).view(*latent.shape[:-2], resolution, resolution)


def draw_stages(generative_model, latent, resolution):
    """A latent after each of its visible strokes: [N, A, 2] -> [N, A - 1, R, R], nan where there are no more"""
    num_arcs = latent.shape[1]
    stages = latent.unsqueeze(1).repeat(1, num_arcs, 1, 1)  # [N, A, A, 2]: the s-th ends with arc s
    stages[..., 1] *= torch.ones(num_arcs, num_arcs, dtype=torch.long, device=latent.device).tril()
    probs = draw(generative_model, stages, resolution)  # [N, A, R, R]
    visible = latent[..., 1].cpu() > 0  # [N, A]
    order = (~visible).long().argsort(dim=1, stable=True)  # the visible ones first
    probs = probs.gather(1, order[..., None, None].expand_as(probs))
    num_visible = visible.sum(1, keepdim=True)
    probs[torch.arange(num_arcs) >= num_visible] = math.nan
    return probs[:, : max(num_arcs - 1, 1)]


def resize(obs, resolution):
    """Images [N, R, C] at another resolution, their pixels kept square"""
    return F.interpolate(obs.unsqueeze(1).cpu(), size=(resolution, resolution), mode="nearest")[:, 0]


def tile(images, num_cols, below=0):
    """[N, R, C] -> one image, row by row, with nan between, `below` pixels of it below each, and where none are left"""
    num_rows = max(math.ceil(len(images) / num_cols), 1)
    gap = max(images.shape[1] // 14, 1)
    images = F.pad(images, (0, gap, 0, gap + below, 0, num_rows * num_cols - len(images)), value=math.nan)
    height, width = images.shape[1:]
    grid = images.view(num_rows, num_cols, height, width).transpose(1, 2).reshape(num_rows * height, num_cols * width)
    return F.pad(grid, (gap, 0, gap, 0), value=math.nan).numpy()


def show(axes, image):
    """Grey levels as they are: 0 white, 1 black, a pixel a square"""
    cmap = matplotlib.colormaps["gray_r"].with_extremes(bad=EMPTY)
    axes.imshow(np.ma.masked_invalid(image), cmap=cmap, vmin=0, vmax=1, interpolation="none")
    axes.set_axis_off()


# ------------------------------------------------------------------ grids


def make_figure(width, height, title):
    """A figure of so many inches, its title broken into lines that fit"""
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, int(14 * width))]
    figure = matplotlib.figure.Figure(figsize=(width, height + 0.17 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=9)
    return figure


def grid_figure(images, num_cols, title, labels=()):
    """Images in a grid, with a label under each, if there are any"""
    below = images.shape[1] // 4 if labels else 0
    image = tile(images, num_cols, below)
    num_rows = math.ceil(len(images) / num_cols)
    figure = make_figure(0.7 * num_cols + 0.2, 0.7 * num_rows * (1.25 if labels else 1) + 0.3, title)
    axes = figure.subplots()
    show(axes, image)
    height, width = image.shape[0] / num_rows, image.shape[1] / num_cols
    for i, label in enumerate(labels):
        row, col = divmod(i, num_cols)
        axes.text((col + 0.5) * width, (row + 1) * height - below / 2, label, ha="center", va="center", fontsize=6)
    return figure


def primitives_figure(generative_model, resolution, title):
    """Every primitive [K, 5] drawn from the centre, at 56 x 56 at least, all on one scale on which none is cut off"""
    primitives = generative_model.get_primitives().detach()  # [K, 5]
    zoom = min(1.0, 0.47 / get_extent(primitives))
    primitives = primitives * primitives.new_tensor([zoom, zoom, 1, 1 / zoom, zoom])  # ink keeps its shape
    arcs = F.pad(primitives, (2, 0), value=0.5).unsqueeze(1)  # [K, 1, 7]
    on = torch.ones(len(arcs), 1, dtype=torch.long, device=arcs.device)
    resolution = max(resolution, 56)
    probs = draw_arcs(generative_model, arcs, on, resolution)
    title = f"{title}\nfrom the centre of a square {1 / zoom:.2f} characters wide"
    return grid_figure(probs, 8, title, [str(i) for i in range(len(probs))])


@torch.no_grad()
def draw_arcs(generative_model, arcs, on, resolution):
    """arcs [N, A, 7], on [N, A] -> probabilities of ink [N, R, R] at a resolution"""
    return (
        rendering.get_logits(arcs, on, generative_model.get_rendering_params(), resolution, resolution).sigmoid().cpu()
    )


def get_extent(primitives):
    """How far the ink of primitives [K, 5] goes from where they start, along an axis"""
    dx, dy, theta, sharpness, width = (x.unsqueeze(1) for x in primitives.double().unbind(1))
    # A point at t of the way is at the angle t * theta from the start's tangent, by the chord of that part.
    t = torch.linspace(0, 1, 33, dtype=torch.double, device=dx.device)
    chord = torch.where(theta.abs() < 1e-6, t, (t * theta).sin() / theta.sin())
    turn = (1 - t) * theta
    x = chord * (dx * turn.cos() - dy * turn.sin())
    y = chord * (dx * turn.sin() + dy * turn.cos())
    reach = (
        torch.stack([x.abs(), y.abs()]).amax((0, 2)) + (width.squeeze(1) ** 2 + 3 / sharpness.squeeze(1) ** 2).sqrt()
    )
    return reach.max().item()


def stroke_figures(obs, stages, labels, title, num_rows=20):
    """Pages of rows: an image, then the drawing after each visible stroke.

    Args: obs [N, R, R]; stages [N, S, R, R]; labels: N strings
    """
    rows = torch.cat([obs.unsqueeze(1), stages], 1)  # [N, 1 + S, R, R]
    for page in range(0, len(rows), num_rows):
        some = rows[page : page + num_rows]
        figure = make_figure(0.6 * rows.shape[1] + 0.8, 0.6 * len(some) + 0.3, title)
        axes = figure.subplots()
        image = tile(some.flatten(0, 1), rows.shape[1])
        show(axes, image)
        height = image.shape[0] / len(some)
        for i, label in enumerate(labels[page : page + num_rows]):
            axes.text(-0.1 * height, (i + 0.5) * height, label, ha="right", va="center", fontsize=6)
        yield figure


def panels_figure(panels, num_cols, title):
    """Grids of images side by side: panels: {title: [N, R, R]}"""
    num_rows = math.ceil(max(len(images) for images in panels.values()) / num_cols)
    figure = make_figure(0.55 * num_cols * len(panels) + 0.4, 0.55 * num_rows + 0.5, title)
    for axes, (name, images) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        show(axes, tile(images, num_cols))
        axes.set_title(name, fontsize=8)
    return figure


def to_frame(image, title, num_pixels=6):
    """An image as an RGB frame of a film, num_pixels inches wide at 100 a piece, with a title"""
    figure = make_figure(num_pixels, num_pixels * image.shape[0] / image.shape[1], title)
    show(figure.subplots(), image)
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ------------------------------------------------------------------ curves


def thin(values):
    """A curve [N] in at most MAX_POINTS bins: their middles (from 1), means, 5th and 95th percentiles"""
    bins = np.array_split(np.asarray(values, dtype=np.float64), min(len(values), MAX_POINTS))
    ends = np.cumsum([len(b) for b in bins])
    middles = ends - np.array([(len(b) - 1) / 2 for b in bins])
    low, high = (np.array([np.percentile(b, q) for b in bins]) for q in (5, 95))
    return middles, np.array([b.mean() for b in bins]), low, high


def smooth(values):
    """The moving average over a twentieth of the points, fewer at the ends"""
    reach = len(values) // 40
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])


def plot_curve(axes, values, label=None):
    """A curve [N], smoothed; behind it the band of its raw values, or where it is short these themselves"""
    x, mean, low, high = thin(values)
    line = axes.plot(x, smooth(mean), lw=1.3, label=label)[0]
    if len(values) > MAX_POINTS:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
    else:
        axes.plot(x, mean, lw=0.6, alpha=0.4, color=line.get_color())


def losses_figure(statistics, log_num_images, title):
    """Curves of training. Args: statistics as in a checkpoint; log_num_images: where the prior loss has its dashed
    line, log of the number of images (an alphabet's, if conditional), or None"""
    panels = [name for name in ["theta_loss", "phi_loss", "prior_loss"] if name in statistics]
    panels += ["shares"] * ("novel_proportion" in statistics)
    panels += [name for name in ["test_log_p", "test_kl", "pretrain_loss"] if name in statistics]
    num_cols = min(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_cols)
    figure = make_figure(4 * num_cols, 2.8 * num_rows, title)
    for axes in (all_axes := figure.subplots(num_rows, num_cols, squeeze=False).flatten())[len(panels) :]:
        axes.set_axis_off()
    for axes, name in zip(all_axes, panels, strict=False):
        axes.set_xlabel("iteration of pretraining" if name == "pretrain_loss" else "iteration")
        axes.set_ylabel("share of proposals / of images" if name == "shares" else "nats an image")
        axes.set_title(TITLES[name], fontsize=9)
        axes.grid(alpha=0.25)
        if name == "shares":
            plot_curve(axes, statistics["novel_proportion"], "novel proposals")
            plot_curve(axes, statistics["new_map"], "new best programs")
            axes.set_ylim(-0.02, 1.02)
        elif name.startswith("test_"):
            axes.plot(statistics["test_iteration"], statistics[name], marker=".")
        else:
            plot_curve(axes, statistics[name])
        if name == "prior_loss" and log_num_images is not None:
            axes.axhline(log_num_images, ls="--", color="black", lw=1, label="log number of images")
        if name in ("shares", "prior_loss"):
            axes.legend(fontsize=7)
    return figure


TITLES = {
    "theta_loss": "θ loss: generative model",
    "phi_loss": "φ loss: inference network",
    "prior_loss": "prior loss: -log p(program)",
    "shares": "memory",
    "test_log_p": "test log p(x), estimated",
    "test_kl": "test KL(q || p), estimated",
    "pretrain_loss": "pretraining: sleep loss",
}
