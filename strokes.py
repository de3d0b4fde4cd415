"""Programs as vector drawings: SVG paths whose arcs are real arcs, and JSON."""

import json
import math

import torch

NUM_PIXELS = 28  # along a character's side; the SVG's units
FLAT = 1e-3  # pixels; an arc that bulges less than this is drawn as a line


def get_half_width(sharpness, width, scale, bias):
    """Half the width of a stroke's ink, in units of the square: the distance at which its
    probability is half that of the centre line. 0 if there is no ink."""

    darkest = math.exp(scale + bias) + 1e-6  # exp of the logit, see rendering.py
    edge = darkest / (1 + darkest) / 2
    ink = (math.log(max(edge / (1 - edge) - 1e-6, 1e-30)) - bias) / scale  # exp(sharpness^2 (width^2 - distance^2))
    if ink <= 0 or sharpness == 0:  # the whole square is equally dark
        return 0.0
    return math.sqrt(max(width**2 - math.log(ink) / sharpness**2, 0))


def get_path(arc):
    """An arc (x_start, y_start, dx, dy, theta, ...) as the commands of an SVG path. Row 0 is the top
    of a character; pixel centres are at half-integers."""
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


@torch.no_grad()
def get_program(generative_model, latent, map_id=None):
    """A latent [A, 2] as plain values: its strokes in order, in coordinates of the unit square, y upwards; with map_id,
    also the 2 x 3 affine map that it is seen through, which takes points of the picture (from -1 to 1, y downwards) to
    the points of the drawing that appear there"""
    names = ["x_start", "y_start", "dx", "dy", "theta", "sharpness", "width"]
    arcs = generative_model.get_arcs(latent.unsqueeze(0))[0].tolist()  # [A, 7]
    strokes = [
        {"primitive": primitive, "on": bool(on), **dict(zip(names, arc, strict=True))}
        for (primitive, on), arc in zip(latent.tolist(), arcs, strict=True)
    ]
    scale, bias = generative_model.get_rendering_params().tolist()
    seen = {} if map_id is None else {"map_id": int(map_id), "map": generative_model.theta_affine[map_id].tolist()}
    return {"strokes": strokes, "scale": scale, "bias": bias, **seen}


def get_transform(affine_map):
    """An affine map of a program as SVG's matrix(a b c d e f), from the drawing to the picture. None if the map is
    singular"""
    (a, b, x), (c, d, y) = affine_map
    determinant = a * d - b * c
    if abs(determinant) < 1e-6:
        return None
    # A point u of the drawing, in the SVG's units, is scale * position + middle.
    scale, middle = (NUM_PIXELS - 1) / 2, NUM_PIXELS / 2
    a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
    move_x = middle - (a + b) * middle - scale * (a * x + b * y)
    move_y = middle - (c + d) * middle - scale * (c * x + d * y)
    return f"matrix({a:.6f} {c:.6f} {b:.6f} {d:.6f} {move_x:.4f} {move_y:.4f})"


def to_svg(program):
    """The text of an SVG file for a program from `get_program`: arcs, seen through its map if it has one"""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {NUM_PIXELS} {NUM_PIXELS}" width="280" height="280">',
        f'<rect width="{NUM_PIXELS}" height="{NUM_PIXELS}" fill="white"/>',
    ]
    transform = get_transform(program["map"]) if "map" in program else None
    if transform:  # what lies beyond the drawing's edge is invisible
        side = f'width="{NUM_PIXELS}" height="{NUM_PIXELS}"'
        lines.append(f'<clipPath id="page"><rect {side}/></clipPath>')
        lines.append(f'<g transform="{transform}" clip-path="url(#page)">')
    for stroke in program["strokes"]:
        half = get_half_width(stroke["sharpness"], stroke["width"], program["scale"], program["bias"])
        if stroke["on"] and half > 0:
            arc = [stroke[name] for name in ["x_start", "y_start", "dx", "dy", "theta"]]
            lines.append(
                f'<path d="{get_path(arc)}" fill="none" stroke="black" stroke-linecap="round"'
                f' stroke-width="{2 * half * (NUM_PIXELS - 1):.4f}"/>'
            )
    return "\n".join([*lines, *["</g>"] * bool(transform), "</svg>"]) + "\n"


def to_json(program, **details):
    """The text of a JSON file for a program and what else is known about it"""
    return json.dumps({**details, **program}, indent=1) + "\n"
