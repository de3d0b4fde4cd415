"""Reads handwritten characters: traces those on photographs and scans with the strokes that a model has learned.

    python read.py my/*.png
    python read.py page.jpg --examples 9            # also draws nine new examples of each character, as by other hands
    python read.py page.jpg --program               # also searches for programs of the model's fixed strokes

Writes into save/<model>/read/: strokes.pdf, every character stroke by stroke; for each character, <name>.svg, its strokes as
real arcs, and <name>.json, its strokes in order, with log p(x | strokes), how probable they make the ink (closer to 0 is
better), and their deviation from the library's nearest (0: they are in it), in nats. --examples also writes
examples.pdf; --program also writes programs.pdf and <name>-program.svg and .json, with log p(z, x), the log-probability of the
program and the ink under the model. docs/reading.md explains the numbers.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import math
import pathlib

import torch
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

import models
import rendering
import util
from reading import characters, matching, search, variation
from results import drawings, figures
from runs import checkpoints

MODEL = "pretrained/mws_20"
RESOLUTION = 56  # of examples and programs, in pixels
PER_PAGE = 20  # rows of a figure

# ------------------------------------------------------------------ pictures


def strokes_figures(found, reading, title):
    """Pages of rows: a character, then the drawing after each visible stroke, with that one in colour and the pen's way to it
    dotted"""
    num_cols, arcs = 1 + int(reading.drawing.on.sum(1).max()), variation.get_arcs(reading.drawing)  # [N, A, 7]
    points = torch.stack(drawings.get_points(arcs[..., 2:].flatten(0, 1)), 2)  # [N * A, T, 2], from where each starts
    lines = (points.unflatten(0, arcs.shape[:2]) + arcs[..., None, :2]).numpy()  # [N, A, T, 2]
    lines = lines * [1, -1] + [0, 1]  # y downwards
    for first in range(0, len(found), PER_PAGE):
        rows = range(first, min(first + PER_PAGE, len(found)))
        figure = figures.make_figure(0.7 * num_cols + 1.8, 0.7 * len(rows) + 0.5, title)
        axes = figure.subplots()
        axes.set(xlim=(-0.05, 1.1 * num_cols), ylim=(1.1 * len(rows), -0.2), aspect="equal")
        axes.set_axis_off()
        for row, i in enumerate(rows):
            label = f"{found.names[i]}\nlog p(x | strokes) {reading.log_likelihood[i]:.0f}\ndeviation {reading.deviation[i].sum():.1f}"
            axes.text(-0.1, 1.1 * row + 0.5, figures.literal(label), ha="right", va="center", fontsize=6)
            on = reading.drawing.on[i].nonzero().squeeze(1).tolist()
            for col in range(len(on) + 1):
                draw_cell(axes, (1.1 * col, 1.1 * row), found.obs[i].numpy(), lines[i], on[:col])
        yield figure


def draw_cell(axes, corner, ink, lines, on):
    """The ink [R, C], and over it the strokes `on` among lines [A, T, 2] and the pen's way to the last of them"""
    (left, top), half = corner, 0.5 / (len(ink) - 1)  # the page's edge is in the middle of a pixel
    box = left - half, left + 1 + half, top + 1 + half, top - half
    page = Rectangle((left - half, top - half), 1 + 2 * half, 1 + 2 * half, transform=axes.transData)
    axes.imshow(-ink * (0.3 if on else 1), cmap="gray", vmin=-1, vmax=0, extent=box, interpolation="none")
    up = range(on[-2] + 1 if len(on) > 1 else 0, on[-1]) if on else []
    styles = [(on[:-1], "black", "-", 1.2), (up, figures.PEN_UP, ":", 0.6), (on[-1:], figures.NEWEST, "-", 1.6)]
    for strokes, colour, style, width in styles:
        some = lines[list(strokes)] + [left, top]
        drawn = LineCollection(some, colors=colour, ls=style, lw=width, capstyle="round")
        axes.add_collection(drawn).set_clip_path(page)


# ------------------------------------------------------------------ strokes and programs


def get_strokes(reading, i):
    """The strokes of a character as plain values (see drawings.get_program)"""
    program = drawings.get_program(reading.drawing.select([i]), reading.latent[i])
    del program["strokes"][reading.num_strokes[i] :]
    for stroke, deviation in zip(program["strokes"], reading.deviation[i].tolist(), strict=False):
        stroke["deviation"] = deviation
    return program


def save_searched(model, network, found, folder, name):
    """Searches for the best programs of the model's own strokes, and writes each as it is found, then their drawings. Args:
    name: of the model"""
    obs, latents, labels = (found.obs >= 0.5).float(), [], []
    rendering.set_compile(True)  # takes a while, but a search takes longer
    for i, (latent, log_joint, alphabet) in enumerate(search.read(model, network, obs)):
        rendering.set_compile(False)  # the drawings have other sizes, each of which would take longer to compile
        image, stem = obs[i : i + 1], found.names[i]
        (map_id,) = drawings.get_map_ids(model, latent[None], image)
        program = drawings.get_program(variation.get_drawing(model, latent[None], image), latent, map_id)
        details = dict(image=found.files[i], model=name, log_joint=log_joint)
        if alphabet is not None:
            details["alphabet"] = alphabet.argmax().item()
        drawings.save_program(folder / f"{stem}-program", program, **details)
        latents.append(latent)
        labels.append(f"{stem}\n{log_joint:.0f} nats")
        rendering.set_compile(True)
    rendering.set_compile(False)
    drawing = variation.get_drawing(model, torch.stack(latents), obs)
    title = f"best programs found of {name}'s own strokes, as the model sees them"
    pages = figures.stroke_figures(obs, drawing, labels, title, RESOLUTION)
    return figures.save_pdf(folder / "programs.pdf", pages)


# ------------------------------------------------------------------ script


def main(argv=None):
    args = get_parser().parse_args(argv)
    checkpoint = checkpoints.load_given(args.checkpoint_path)
    name = checkpoints.get_run_name(checkpoint)
    model, network = models.from_checkpoint(checkpoint)
    folder = util.SAVE / name / "read" if args.output is None else util.expand_user(args.output)
    util.set_seed(args.seed)
    found = characters.find(args.images, args.as_is)
    with util.writing(folder):  # before the work, if it cannot be written
        folder.mkdir(parents=True, exist_ok=True)
    num_steps = matching.TRACING.num_steps * math.ceil(len(found) / variation.AT_ONCE)
    with util.show_progress(total=num_steps, desc=f"reading {util.count(len(found), 'character')}", unit="step") as bar:
        reading = characters.read(model, found, bar.update)
    for i, (stem, file) in enumerate(zip(found.names, found.files, strict=True)):
        details = dict(image=file, model=name, log_likelihood=reading.log_likelihood[i].item())
        drawings.save_program(folder / stem, get_strokes(reading, i), deviation=reading.deviation[i].sum().item(), **details)
        print(f"{file}: {util.count(int(reading.drawing.on[i].sum()), 'stroke')}: {folder / stem}.svg, {stem}.json")
    title = f"strokes of {name}'s library, varied to lie on the ink"
    title += (
        "\nlog p(x | strokes): how probable they make the ink\ndeviation: how far they are from the library's (both in nats)"
    )
    print(f"stroke by stroke: {figures.save_pdf(folder / 'strokes.pdf', strokes_figures(found, reading, title))}")
    if args.examples:
        drawn = drawings.vary_strokes(reading.drawing, args.examples, RESOLUTION)  # [N, E, R, R]
        obs = drawings.resize(found.obs, RESOLUTION)
        pages = figures.example_figures(obs, drawn, found.names, "new examples: the strokes vary as from hand to hand")
        print(f"new examples: {figures.save_pdf(folder / 'examples.pdf', pages)}")
    if args.program:
        print(f"programs: {save_searched(model, network, found, folder, name)}")
    return 0


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add = parser.add
    parser.add_argument("images", nargs="+", help="image files: photographs, scans, drawings", type=pathlib.Path)
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one", default=MODEL)
    add("--output", "folder to write into (default: save/<model>/read)")
    add("--examples", "new examples to draw of each character", type=util.in_range(int, 1, 1000))
    add("--program", "also search for the best program of the model's fixed strokes, seconds a character", action="store_true")
    add("--as-is", "take images as they are: one character each, of Omniglot's size and stroke width", action="store_true")
    add("--seed", "seed of examples and search", type=util.in_range(int, 0, 2**63 - 1), default=0)
    return parser


if __name__ == "__main__":
    util.run_script(main)
