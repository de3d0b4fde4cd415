"""Traces: strokes of a model's library that follow the ink of an image.

1. The ink is thinned to lines one pixel wide, between junctions and ends. Lines that go straight on across a junction are
   joined (`find_lines`).
2. Each line, or (where `corners` is given) each of its parts between sharp corners, is divided into strokes, at points
   s_0 < ... < s_K, by dynamic programming (`divide`). The division minimises

       sum_k  COST + |e_k|^2 / 2 + 1 / (2 TAU^2) integral of dist_k(s)^2 ds

   where e_k is the deviation of the arc from s_(k-1) to s_k from the closest stroke of the library, in units of variation.OWN,
   and dist_k(s) is the distance from a point of the line to that arc.
3. The first line begins closest to the page's top left corner, each other one closest to the pen; in between, the pen is up.
   Further traces of an image take other orders, and may continue differently where lines cross.

The result, where variation.refit begins, is a program and the variation of strokes that lays it on the ink. An image has as
many strokes as its ink takes.

Source: thinning and the graph of lines follow, in outline, the inference of Lake, Salakhutdinov and Tenenbaum (2015).
"""

import collections
import itertools
import math

import numpy as np
import scipy.ndimage
import skimage
import torch
from torch.nn.utils.rnn import pad_sequence

from images import SIDE, make_square
from reading import variation
from reading.variation import OWN

# Pixels of a 105 x 105 page, as in Omniglot; scaled for other pages
PAGE = 105
SPUR = 6  # shorter lines that end at a junction are frayed ink
CROSSING = 8  # closer junctions are merged
REACH = 8  # length of a line used for its direction at a junction
SMOOTH = 2  # standard deviation of the Gaussian that smooths lines
STRAIGHT = math.radians(60)  # the sharpest turn of a line across a junction
CORNER, SHARP = math.radians(45), 0.7  # the least turn at a corner, and its least share of the turn within twice REACH

# Fractions of the page
STEP = 0.03  # distance between the points at which a line may be divided
TAU = 0.004
PEN_UP = 0.03  # smaller gaps between two lines are ignored
DOT = 0.012  # the length of a stroke that draws a dot

COST = 1.5  # nats
LONGEST = 40  # steps in a stroke, at most
TURN_NOISE, ORDER_NOISE = 0.3, 0.5  # in further traces: of turns in radians, of the logarithms of distances


def trace(generative_model, inks, rngs=None, corners=False):
    """Traces N images with A strokes each, as many as the longest trace takes; other traces end with strokes of no length.

    Args:
        inks: a list of arrays [H, W] of bool, of any size
        rngs: for each, None for the most obvious trace or a numpy.random.Generator for another one
        corners: divide lines at corners, round which strokes would go otherwise: closer to the ink, but more strokes
    Returns: Drawing of the library's strokes, starting where the trace does, with one pen; Variation that lays them on the ink
    """
    primitives = generative_model.get_primitives().detach().float()  # [P, 5]
    library = primitives[:, :3].double().numpy()
    rngs = rngs or [None] * len(inks)
    traces = [_trace(make_square(ink), library, rng, corners) for ink, rng in zip(inks, rngs, strict=True)]
    starts, *lists = zip(*traces, strict=True)
    latent, arcs, used = (pad_sequence(tensors, batch_first=True) for tensors in lists)
    centre = variation.get_drawing(generative_model, latent)
    sharpness, width = (primitives[:, i].mean().expand(used.shape) for i in (3, 4))
    displacement, theta, start = centre.displacement * used.unsqueeze(2), centre.theta * used, torch.stack(starts)
    centre = centre._replace(displacement=displacement, theta=theta, start=start, sharpness=sharpness, width=width)
    moved, turned = (arcs[..., :2] - displacement) / OWN.displacement, (arcs[..., 2] - theta) / OWN.theta
    return centre, variation.get_none(centre)._replace(displacement=moved, theta=turned)


def _trace(ink, library, rng, corners):
    """Returns: start of the first stroke [2]; of each stroke, primitive and pen [A, 2], dx, dy and theta [A, 3], and True"""
    lines, latent, arcs, pen, start = find_lines(ink, rng), [], [], None, [0.5, 0.5]
    while lines:
        line, lines = _take_next(lines, pen, rng)
        if pen is None:
            start = pen = line[0]
        if np.linalg.norm(line[0] - pen) > PEN_UP:
            arcs.append(np.append(line[0] - pen, 0.0))
            latent.append([find_nearest(arcs[-1][None], library)[0][0], 0])
            pen = line[0]
        parts = divide_at_corners(line, len(ink)) if corners else [line]
        for primitive, end, theta in [stroke for part in parts for stroke in divide(part, library)]:
            dot = np.linalg.norm(end - pen) < DOT
            arcs.append(np.array([DOT, 0, 0]) if dot else np.append(end - pen, theta))
            latent.append([primitive, 1])
            pen = pen + arcs[-1][:2]
    latent, arcs = np.array(latent, dtype=int).reshape(-1, 2), np.array(arcs, dtype=np.float32).reshape(-1, 3)
    return torch.tensor(start).float(), torch.tensor(latent), torch.tensor(arcs), torch.ones(len(arcs), dtype=torch.bool)


def _take_next(lines, pen, rng):
    """The line, in either direction, whose beginning is closest to the pen, and the rest"""
    choices = [(i, line) for i, one in enumerate(lines) for line in (one, one[::-1])]
    first = np.array([line[0] for _, line in choices])  # [2 * lines, 2]
    distance = np.abs(first - [0, 1]).sum(1) if pen is None else np.linalg.norm(first - pen, axis=1)
    if rng is not None:
        distance = distance * np.exp(ORDER_NOISE * rng.standard_normal(len(distance)))
    i, line = choices[distance.argmin()]
    return line, lines[:i] + lines[i + 1 :]


# ------------------------------------------------------------------ lines to strokes


def divide(line, library):
    """Divides a line into strokes.

    Args: line [n, 2], points (x, y) of the unit square, y upwards; library [P, 3], dx, dy and theta of its strokes
    Returns: (primitive, end (x, y), theta) of each stroke, in order
    """
    points, step = _resample(line)
    first, last = np.triu_indices(len(points), 1)  # of each possible stroke, [S]
    short = last - first <= LONGEST
    first, last = first[short], last[short]
    chord, theta, error = _fit_arcs(points, first, last, step)
    primitive, distance = find_nearest(np.column_stack([chord, theta]), library)
    cost = COST + distance + error / (2 * TAU**2)
    total, chosen = np.zeros(len(points)), np.zeros(len(points), int)  # up to each point: the least cost, its last stroke
    for point in range(1, len(points)):
        strokes = np.flatnonzero(last == point)
        costs = total[first[strokes]] + cost[strokes]
        total[point], chosen[point] = costs.min(), strokes[costs.argmin()]
    strokes, point = [], len(points) - 1
    while point > 0:
        s = chosen[point]
        strokes.append((int(primitive[s]), points[point], theta[s]))
        point = first[s]
    return strokes[::-1]


def divide_at_corners(line, side):
    """Divides a line where it turns sharply: [n, 2] -> a list of [m, 2]. Args: side: of the ink, in pixels"""
    reach, point = max(round(REACH * side / PAGE), 4), line @ [1, 1j]  # coarse ink is jagged
    middle, cuts = np.arange(reach, len(line) - reach), []

    def get_turn(reach):
        before, after = np.maximum(middle - reach, 0), np.minimum(middle + reach, len(line) - 1)
        return np.abs(np.angle((point[after] - point[middle]) * (point[middle] - point[before]).conj()))

    turn = get_turn(reach)
    turn = np.where(turn >= SHARP * get_turn(2 * reach), turn, 0)  # an arc turns twice as much within twice the reach
    for i in (-turn).argsort(kind="stable"):  # the sharpest turn first
        if turn[i] >= CORNER and all(abs(middle[i] - cut) > reach for cut in cuts):
            cuts.append(middle[i])
    return [line[first : last + 1] for first, last in itertools.pairwise([0, *sorted(cuts), len(line) - 1])]


def _resample(line):
    """Points equally spaced along a line, about STEP apart, and their spacing"""
    length = np.append(0, np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum())
    num = max(round(length[-1] / STEP), 1)
    at = np.linspace(0, length[-1], num + 1)
    return np.column_stack([np.interp(at, length, x) for x in line.T]), length[-1] / num


def _fit_arcs(points, first, last, step):
    """Arcs through three points of a line, the first, middle and last: chords [S, 2]; theta [S], half the angle they span,
    positive if the arc is to the left of its chord; the integral of the line's squared distance, [S]"""
    chord = points[last] - points[first]  # [S, 2]
    length = np.linalg.norm(chord, axis=1).clip(1e-4)  # [S]
    along = chord / length[:, None]
    left = np.column_stack([-along[:, 1], along[:, 0]])
    middle = (points[(first + last) // 2] + points[(first + last + 1) // 2]) / 2
    theta = 2 * np.arctan2(2 * ((middle - points[first]) * left).sum(1), length)
    offset = np.arange((last - first).max() + 1)
    inside = offset <= (last - first)[:, None]  # [S, L]
    between = points[np.minimum(first[:, None] + offset, len(points) - 1)] - points[first][:, None]  # [S, L, 2]
    u = (between * along[:, None]).sum(2) - length[:, None] / 2  # from the chord's middle
    v = (between * left[:, None]).sum(2)
    flat = np.abs(theta) < 0.05
    bent = np.where(flat, 0.05, theta)
    radius = length / 2 / np.sin(np.abs(bent))
    centre = -np.sign(bent) * radius * np.cos(bent)  # of the circle, to the left of the chord
    distance = np.where(flat[:, None], v, np.hypot(u, v - centre[:, None]) - radius[:, None])
    closed = np.linalg.norm(chord, axis=1) < 1e-3  # such a stroke is a dot
    distance = np.where(closed[:, None], np.linalg.norm(between, axis=2), distance)
    return chord, theta, (inside * distance**2).sum(1) * step


def find_nearest(arcs, library):
    """The library's [P, 3] nearest strokes to arcs [S, 3], and |e|^2 / 2 of each arc as a variation of it, in nats: [S], [S]"""
    difference = (arcs[:, None] - library) / [OWN.displacement, OWN.displacement, OWN.theta]  # [S, P, 3]
    distance = (difference**2).sum(2) / 2
    return distance.argmin(1), distance.min(1)


# ------------------------------------------------------------------ ink to lines


def find_lines(ink, rng=None):
    """The lines of ink [H, H]: a list of arrays [n, 2], points (x, y) of the unit square, y upwards"""
    side, scale = len(ink), len(ink) / PAGE
    lines = [_smooth(line, SMOOTH * scale) for line in _join(_get_edges(ink), max(round(REACH * scale), 1), rng)]
    points = [np.column_stack([line[:, 1] + 0.5, side - 0.5 - line[:, 0]]) / side for line in lines]  # from edge to edge
    return [(SIDE * some - 0.5) / (SIDE - 1) for some in points]  # from the first of 28 pixels' centre to the last one's


def find_ends(ink):
    """Where the lines of ink [H, H] end: points (row, column), [n, 2]; a dot has two ends"""
    edges = _get_edges(ink)
    degree = collections.Counter(node for edge in edges for node in edge[:2])
    dots = [point for a, b, points in edges if a == b and degree[a] == 2 and len(points) == 2 for point in points]
    ends = [point for a, b, points in edges for node, point in ((a, points[0]), (b, points[-1])) if degree[node] == 1]
    return np.array(ends + dots).reshape(-1, 2)


def _get_edges(ink):
    """Thinned ink, without frayed ends, as edges (node, node, points [n, 2])"""
    scale = len(ink) / PAGE
    return _simplify(*_get_graph(ink), SPUR * scale, CROSSING * scale)


def _get_graph(ink):
    """Thinned ink as a graph. Returns: positions (row, column) of its nodes, and edges (node, node, points [n, 2])"""
    padded = np.ascontiguousarray(np.pad(ink, 1) > 0)  # older versions of skimage reject transposed arrays
    thin = skimage.morphology.skeletonize(padded)[1:-1, 1:-1]
    pixels = dict.fromkeys(map(tuple, np.argwhere(thin).tolist()))  # in order
    beside = {pixel: _get_neighbours(pixel, pixels) for pixel in pixels}
    node_of = {pixel: i for i, pixel in enumerate(p for p in pixels if len(beside[p]) != 2)}
    edges, seen = [], set()  # inner pixels of edges, and the first two from either end
    for pixel in [*node_of, *pixels]:
        if pixel in seen:
            continue
        node_of.setdefault(pixel, len(node_of))  # a closed line may begin anywhere
        for following in beside[pixel] or [pixel]:  # a dot is an edge to itself
            if (pixel, following) in seen:
                continue
            path = [pixel, following]
            while path[-1] not in node_of:
                path.append(next(other for other in beside[path[-1]] if other != path[-2]))
            seen.update([*path[1:-1], tuple(path[:2]), tuple(path[:-3:-1])])
            edges.append((node_of[pixel], node_of[path[-1]], np.array(path, float)))
    return [np.array(pixel, float) for pixel in node_of], edges


def _get_neighbours(pixel, pixels):
    """The neighbours (row, column) of a pixel of thinned ink. One that touches it only at a corner does not count if another
    pixel touches both along a side"""
    (row, col), found = pixel, []
    for down, right in [(-1, 0), (0, 1), (1, 0), (0, -1), (-1, 1), (1, 1), (1, -1), (-1, -1)]:
        at_corner = down != 0 and right != 0 and ((row + down, col) in pixels or (row, col + right) in pixels)
        if (row + down, col + right) in pixels and not at_corner:
            found.append((row + down, col + right))
    return found


def _simplify(nodes, edges, spur, crossing):
    """Joins junctions closer than `crossing`, and removes lines shorter than `spur` that lead nowhere. Returns: edges"""
    while True:
        edges = [(a, b, np.concatenate([[nodes[a]], points[1:-1], [nodes[b]]])) for a, b, points in edges]
        lengths = np.array([np.linalg.norm(np.diff(points, axis=0), axis=1).sum() for _, _, points in edges])
        degree = np.bincount([node for edge in edges for node in edge[:2]], minlength=len(nodes))
        for i in lengths.argsort(kind="stable"):
            a, b, points = edges[i]
            degrees = sorted([degree[a], degree[b]])
            joins = a != b and lengths[i] < crossing and degrees[0] >= 3
            if a == b:  # a small hole
                leads_nowhere = degree[a] > 2 and np.linalg.norm(points - nodes[a], axis=1).max() < crossing
            else:
                leads_nowhere = degrees[0] == 1 and degrees[1] >= 3 and lengths[i] < spur
            if joins or leads_nowhere:
                break
        else:
            return edges
        del edges[i]
        if joins:  # node b goes to node a
            nodes[a] = (nodes[a] + nodes[b]) / 2
            edges = [(*(a if node == b else node for node in ends), points) for *ends, points in edges]


def _join(edges, reach, rng):
    """Joins edges that go straight on across a node, or meet at a node of just two: a list of lines, [n, 2] each"""
    ways = [way for _, _, points in edges for way in (points, points[::-1])]  # of edge i: 2 i forward, 2 i + 1 backward
    ways_from, following = {}, {}
    for way, node in enumerate(node for edge in edges for node in edge[:2]):
        ways_from.setdefault(node, []).append(way)
    for some in ways_from.values():
        for turn, one, other in _get_turns(ways, some, reach, rng):
            if one not in following and other not in following and (turn < STRAIGHT or len(some) == 2):
                following[one], following[other] = other, one
    lines, done = [], set()
    for way in [way for way in range(len(ways)) if way not in following] + list(range(0, len(ways), 2)):  # closed lines last
        line = []
        while way // 2 not in done:
            done.add(way // 2)
            line.append(ways[way][1 if line else 0 :])
            way = following.get(way ^ 1, way)  # from where it ends
        if line:
            lines.append(np.concatenate(line))
    return lines


def _get_turns(ways, some, reach, rng):
    """How sharp the turn between each two of the ways that leave a node is: a list of (radians, way, way), least first"""

    def get_direction(points):
        last = len(points) - 1
        first = min(reach // 2, last // 2)  # thinned ink is bent at the end
        difference = points[min(reach + reach // 2, last)] - points[first]
        return difference / max(np.linalg.norm(difference), 1e-9)

    turns = []
    for one, other in itertools.combinations(some, 2):
        turn = math.acos(np.clip(-get_direction(ways[one]) @ get_direction(ways[other]), -1, 1))
        turns.append((turn + (0 if rng is None else TURN_NOISE * rng.standard_normal()), one, other))
    return sorted(turns, key=lambda turn: turn[0])


def _smooth(line, sigma):
    """Smooths a line, keeping its ends"""
    if len(line) < 5:
        return line
    return np.concatenate([line[:1], scipy.ndimage.gaussian_filter1d(line, sigma, axis=0, mode="nearest")[1:-1], line[-1:]])
