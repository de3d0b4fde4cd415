"""Programs as vector drawings: SVG paths whose arcs are real arcs, and JSON."""

import json
import math

import torch

NUM_PIXELS = 28  # of a character's side; the SVG's units
FLAT = 1e-3  # pixels: an arc that bulges less than this is drawn as a line


def get_half_width(sharpness, width, scale, bias):
    """How far from its middle a stroke's ink reaches, in units of the square: to where its
    probability is half of what it is in the middle. 0 if there is no ink."""

    darkest = math.exp(scale + bias) + 1e-6  # exp of the logit, see rendering.py
    edge = darkest / (1 + darkest) / 2
    ink = (math.log(max(edge / (1 - edge) - 1e-6, 1e-30)) - bias) / scale  # exp(sharpness^2 (width^2 - distance^2))
    if ink <= 0 or sharpness == 0:  # all of the square is as dark
        return 0.0
    return math.sqrt(max(width**2 - math.log(ink) / sharpness**2, 0))


def get_path(arc):
    """An arc (x_start, y_start, dx, dy, theta, ...) as the commands of an SVG path. Row 0 is the top
    of a character, and pixels have their centres at a half."""
    x, y, dx, dy, theta = arc[:5]
    side = NUM_PIXELS - 1
    start = f"M {side * x + 0.5:.4f} {side * (1 - y) + 0.5:.4f}"
    end = f"{side * (x + dx) + 0.5:.4f} {side * (1 - y - dy) + 0.5:.4f}"
    chord = side * math.hypot(dx, dy)
    if chord * abs(math.tan(theta / 2)) / 2 < FLAT:  # how far it bulges
        return f"{start} L {end}"
    radius = chord / (2 * abs(math.sin(theta)))
    large, clockwise = int(abs(theta) > math.pi / 2), int(theta > 0)
    return f"{start} A {radius:.4f} {radius:.4f} 0 {large} {clockwise} {end}"


@torch.no_grad()
def get_program(generative_model, latent):
    """A latent [A, 2] as plain values: its strokes in order, in units of the unit square, y upwards"""
    names = ["x_start", "y_start", "dx", "dy", "theta", "sharpness", "width"]
    arcs = generative_model.get_arcs(latent.unsqueeze(0))[0].tolist()  # [A, 7]
    strokes = [
        {"primitive": primitive, "on": bool(on), **dict(zip(names, arc, strict=True))}
        for (primitive, on), arc in zip(latent.tolist(), arcs, strict=True)
    ]
    scale, bias = generative_model.get_rendering_params().tolist()
    return {"strokes": strokes, "scale": scale, "bias": bias}


def to_svg(program):
    """A program of `get_program` as the text of an SVG file"""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {NUM_PIXELS} {NUM_PIXELS}" width="280" height="280">',
        f'<rect width="{NUM_PIXELS}" height="{NUM_PIXELS}" fill="white"/>',
    ]
    for stroke in program["strokes"]:
        half = get_half_width(stroke["sharpness"], stroke["width"], program["scale"], program["bias"])
        if stroke["on"] and half > 0:
            arc = [stroke[name] for name in ["x_start", "y_start", "dx", "dy", "theta"]]
            lines.append(
                f'<path d="{get_path(arc)}" fill="none" stroke="black" stroke-linecap="round"'
                f' stroke-width="{2 * half * (NUM_PIXELS - 1):.4f}"/>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def to_json(program, **details):
    """A program with what else is known of it, as the text of a JSON file"""
    return json.dumps({**details, **program}, indent=1) + "\n"
