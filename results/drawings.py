"""Drawings of programs: canonical, or as the model sees them, through an affine map.

Drawings are probabilities of ink, [..., R, R], from 0 (white) to 1 (black); NaN leaves a place empty.
Under an affine likelihood an image is a drawing seen through one of T maps, so a program matches its
image only through the most probable map. Programs also become SVG files whose arcs are real arcs, and JSON.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

import rendering
import util
from reading import variation

FAINT = 0.05  # probability of ink that is invisible
NUM_TRIES = 3  # at a new example that stays within the page
NUM_PIXELS = 28  # along a character's side; units of the SVG
FLAT = 1e-3  # pixels; an arc that bulges less than this is drawn as a line


def get_map_ids(generative_model, latent, obs):
    """The number of the most probable map of each program and image, or None without maps: latent [N, A, 2], obs [N, R, C] ->
    a list of N"""
    if generative_model.likelihood.maps is None:
        return [None] * len(latent)
    return generative_model.get_map_log_posterior(latent, obs).argmax(1).tolist()


@torch.no_grad()
def draw(generative_model, latent, resolution, maps=None):
    """latent [N, A, 2] -> probabilities of ink [N, R, R] at a resolution, canonical, or through maps [N, 2, 3]"""
    probs = generative_model.get_logits(latent, resolution, resolution).sigmoid()
    return (probs if maps is None else rendering.apply_maps(probs, maps)).cpu()


# ------------------------------------------------------------------ stroke by stroke

# These take a reading.variation.Drawing of N programs, with original or refitted strokes.


@torch.no_grad()
def draw_parts(drawing, on, resolution):
    """Draws some of the strokes: on [N, S, A] -> [N, S, R, R]"""
    many = variation.change(drawing, lambda x: x.unsqueeze(1).expand(-1, on.shape[1], *x.shape[1:]))
    return variation.get_probs(many._replace(on=on), resolution, resolution)


def draw_stages(drawing, resolution, num_stages=None, alone=False):
    """Draws programs after each visible stroke, or each of these strokes alone: [N, S, R, R], NaN after the last. Args:
    num_stages: S, by default as many as the longest program has"""
    num_visible = drawing.on.sum(1)  # [N]
    stage = torch.arange(num_stages or max([1, *num_visible.tolist()]))  # [S]
    rank = (drawing.on.cumsum(1) - 1).unsqueeze(1)  # each stroke's number among the visible ones: [N, 1, A]
    drawn = rank == stage.unsqueeze(1) if alone else rank <= stage.unsqueeze(1)  # [N, S, A]
    probs = draw_parts(drawing, drawing.on.unsqueeze(1) & drawn, resolution)
    probs[stage >= num_visible.unsqueeze(1)] = math.nan
    return probs


def is_off_page(drawing):
    """Which visible strokes leave no ink on the page: [N, A]"""
    alone = drawing.on.unsqueeze(1) & torch.eye(drawing.on.shape[1], dtype=torch.bool)  # [N, A, A]
    return (draw_parts(drawing, alone, NUM_PIXELS).flatten(2).amax(2) < FAINT) & drawing.on


@torch.no_grad()
def get_pen_path(drawing, resolution):
    """Start and end of each stroke, in pixels (column, row), as seen through the maps: [N, A, 2, 2]"""
    arcs = variation.get_arcs(drawing)  # [N, A, 7]
    points = torch.stack([arcs[..., :2], arcs[..., :2] + arcs[..., 2:4]], 2)  # [N, A, 2, 2]
    points = torch.stack([2 * points[..., 0] - 1, 1 - 2 * points[..., 1]], -1)  # in affine_grid's coordinates
    maps = drawing.map.double()
    inverse = torch.linalg.pinv(maps[:, :, :2])  # [N, 2, 2]
    moved = points.double() - maps[:, None, None, :, 2]
    points = torch.einsum("nij,napj->napi", inverse, moved)
    return (points + 1) / 2 * (resolution - 1)


def resize(obs, resolution):
    """Scales images [N, R, C] to another resolution, without smoothing"""
    return F.interpolate(obs.unsqueeze(1).cpu(), size=(resolution, resolution), mode="nearest")[:, 0]


@torch.no_grad()
def vary_strokes(drawing, num_examples, resolution):
    """Draws programs as other hands would: [N, E, R, R]. Each is the first of a few tries that stays within the page, if any"""
    ids = torch.arange(len(drawing.on)).repeat_interleave(num_examples * NUM_TRIES)
    varied = variation.sample(drawing.select(ids))
    probs = variation.get_probs(varied, resolution, resolution).unflatten(0, (-1, NUM_TRIES))  # [N * E, T, R, R]
    edge = (probs > 0.5).sum((2, 3)) - (probs[..., 1:-1, 1:-1] > 0.5).sum((2, 3))  # pixels of ink on it: [N * E, T]
    return probs[torch.arange(len(probs)), edge.argmin(1)].unflatten(0, (-1, num_examples))


# ------------------------------------------------------------------ primitives


def get_points(primitives, num=33):
    """Points along primitives [K, 5] from where they start: x and y, each [K, num]"""
    dx, dy, theta = (x.unsqueeze(1) for x in primitives.double()[:, :3].unbind(1))
    # A point a fraction t along the arc: the chord to it is at the angle t * theta from the tangent at the start.
    t = torch.linspace(0, 1, num, dtype=torch.double, device=dx.device)
    chord = torch.where(theta.abs() < 1e-6, t, (t * theta).sin() / theta.sin())
    turn = (1 - t) * theta
    return chord * (dx * turn.cos() - dy * turn.sin()), chord * (dx * turn.sin() + dy * turn.cos())


@torch.no_grad()
def draw_primitives(generative_model, resolution):
    """Draws every primitive in the middle of a tile, all on the scale at which the largest fills its tile.

    Returns: probabilities of ink [K, R, R]; where each starts, in pixels (column, row) [K, 2]; a tile's side, in units of a
        character's
    """
    primitives = generative_model.get_primitives()  # [K, 5]
    x, y = get_points(primitives)
    middle = torch.stack([(p.amax(1) + p.amin(1)) / 2 for p in (x, y)], 1)  # [K, 2]
    size = torch.stack([p.amax(1) - p.amin(1) for p in (x, y)], 1).amax(1)
    params = generative_model.get_rendering_params()
    half_widths = size.new_tensor([get_half_width(*stroke[3:], *params.tolist()) for stroke in primitives.tolist()])
    zoom = 0.9 / max((size + 2 * half_widths.clamp(max=0.5)).max().item(), 1e-3)  # some strokes may cover the whole square
    start = 0.5 - middle * zoom  # [K, 2]
    scaled = primitives * primitives.new_tensor([zoom, zoom, 1, 1 / zoom, zoom])  # keeps the shape of the ink
    arcs = torch.cat([start.to(scaled.dtype), scaled], 1).unsqueeze(1)  # [K, 1, 7]
    on = torch.ones(len(arcs), 1, dtype=torch.long, device=arcs.device)
    pixel = torch.stack([start[:, 0], 1 - start[:, 1]], 1) * (resolution - 1)
    return rendering.get_logits(arcs, on, params, resolution, resolution).sigmoid().cpu(), pixel.cpu(), 1 / zoom


# ------------------------------------------------------------------ SVG and JSON


def get_half_width(sharpness, width, scale, bias):
    """Half the width of a stroke's ink, in units of the square: the distance at which its probability is half that of the
    centre line. 0 if there is no ink."""
    darkest = math.exp(scale + bias) + 1e-6  # exp of the logit, see rendering.py
    edge = darkest / (1 + darkest) / 2
    ink = (math.log(max(edge / (1 - edge) - 1e-6, 1e-30)) - bias) / scale  # exp(sharpness^2 (width^2 - distance^2))
    if ink <= 0 or sharpness == 0:  # the whole square is equally dark
        return 0.0
    return math.sqrt(max(width**2 - math.log(ink) / sharpness**2, 0))


def get_path(arc):
    """An arc (x_start, y_start, dx, dy, theta, ...) as commands of an SVG path. Row 0 is the top of a character; pixel centres
    are at half-integers."""
    x, y, dx, dy, theta = arc[:5]
    side = NUM_PIXELS - 1
    start = f"M {side * x + 0.5:.4f} {side * (1 - y) + 0.5:.4f}"
    end = f"{side * (x + dx) + 0.5:.4f} {side * (1 - y - dy) + 0.5:.4f}"
    chord = side * math.hypot(dx, dy)
    if chord * abs(math.tan(theta / 2)) / 2 < FLAT:  # how far the arc bulges
        return f"{start} L {end}"
    radius = chord / (2 * abs(math.sin(theta)))
    large, clockwise = int(abs(theta) > math.pi / 2), int(theta > 0)
    return f"{start} A {radius:.4f} {radius:.4f} 0 {large} {clockwise} {end}"


def get_program(drawing, latent, map_id=None):
    """A Drawing of one program, latent [A, 2], as plain values: its strokes in order, in coordinates of the unit square (y
    upwards), each with its primitive; and the 2 x 3 affine map that it is seen through, from the picture (-1 to 1, y
    downwards) to the drawing, with its number if it is one of the model's"""
    names = ["x_start", "y_start", "dx", "dy", "theta", "sharpness", "width"]
    arcs = variation.get_arcs(drawing)[0].tolist()  # [A, 7]
    strokes = [
        {"primitive": primitive, "on": bool(on), **dict(zip(names, arc, strict=True))}
        for (primitive, on), arc in zip(latent.tolist(), arcs, strict=True)
    ]
    scale, bias = drawing.params.tolist()
    number = {} if map_id is None else {"map_id": map_id}
    return {"strokes": strokes, "scale": scale, "bias": bias, **number, "map": drawing.map[0].tolist()}


def get_transform(affine_map):
    """An affine map of a program as SVG's matrix(a b c d e f), from the drawing to the picture"""
    affine = np.vstack([affine_map, [0, 0, 1]])
    scale, middle = (NUM_PIXELS - 1) / 2, NUM_PIXELS / 2
    units = np.array([[scale, 0, middle], [0, scale, middle], [0, 0, 1]])  # from -1..1 to the SVG's
    (a, c, x), (b, d, y), _ = units @ np.linalg.pinv(affine) @ np.linalg.inv(units)
    return f"matrix({a:.6f} {b:.6f} {c:.6f} {d:.6f} {x:.4f} {y:.4f})"


def to_svg(program):
    """The text of an SVG file for a program from `get_program`: arcs, seen through its map"""
    page = f'width="{NUM_PIXELS}" height="{NUM_PIXELS}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {NUM_PIXELS} {NUM_PIXELS}" width="280" height="280">',
        f'<rect {page} fill="white"/>',
        f'<clipPath id="page"><rect {page}/></clipPath>',  # ink beyond the drawing's edge is invisible
        f'<g transform="{get_transform(program["map"])}" clip-path="url(#page)">',
    ]
    for stroke in program["strokes"]:
        half = get_half_width(stroke["sharpness"], stroke["width"], program["scale"], program["bias"])
        if stroke["on"] and half > 0:
            arc = [stroke[name] for name in ["x_start", "y_start", "dx", "dy", "theta"]]
            lines.append(
                f'<path d="{get_path(arc)}" fill="none" stroke="black" stroke-linecap="round"'
                f' stroke-width="{2 * half * (NUM_PIXELS - 1):.4f}"/>'
            )
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"


def save_program(path, program, **details):
    """Writes a program from `get_program` to <path>.svg and, with whatever else is known about it, to <path>.json"""
    util.write(path.with_name(f"{path.name}.svg"), to_svg(program).encode())
    util.write(path.with_name(f"{path.name}.json"), (json.dumps({**details, **program}, indent=1) + "\n").encode())
