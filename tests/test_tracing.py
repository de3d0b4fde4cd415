"""Traces: lines of ink, their division into strokes of a library, and the programs they make."""

import itertools
import math

import numpy as np
import pytest
import torch

import images
import models
from reading import matching, tracing, variation
from reading.variation import OWN

SIDE = 105
LIBRARY = np.array([[0.2, 0, 0], [0, 0.2, 0], [0.3, 0, 0], [0, -0.3, 0], [0.15, 0.15, 0.8], [0.1, -0.1, -1.2]])  # dx, dy, theta


def draw_ink(*lines, radius=1.5):
    """Ink [SIDE, SIDE] within a radius in pixels of points (x, y) of the unit square"""
    row, col = np.mgrid[:SIDE, :SIDE]
    ink = np.zeros((SIDE, SIDE), bool)
    for line in lines:
        for x, y in line:
            x_from_edge, y_from_edge = (SIDE * (27 * place + 0.5) / 28 for place in (x, 1 - y))
            ink |= (col + 0.5 - x_from_edge) ** 2 + (row + 0.5 - y_from_edge) ** 2 <= radius**2
    return ink


def get_line(*corners, num=200):
    """Points along straight lines between corners"""
    parts = [np.linspace(a, b, num) for a, b in itertools.pairwise(np.array(corners, float))]
    return np.concatenate([part[1 if i else 0 :] for i, part in enumerate(parts)])


def get_arc(start, dx, dy, theta, num=100):
    """Points of a stroke as the renderer draws it: its direction turns by 2 theta, clockwise where theta is positive"""
    heading = math.atan2(dy, dx) + np.linspace(theta, -theta, num)
    steps = np.column_stack([np.cos(heading), np.sin(heading)])
    way = np.concatenate([[[0, 0]], (steps[1:] + steps[:-1]).cumsum(0)])
    return np.array(start) + way * math.hypot(dx, dy) / np.linalg.norm(way[-1])


LINES = {
    "corner": [get_line((0.2, 0.8), (0.2, 0.2), (0.7, 0.2))],
    "crossing": [get_line((0.2, 0.5), (0.8, 0.5)), get_line((0.5, 0.2), (0.5, 0.8))],
    "T": [get_line((0.2, 0.8), (0.8, 0.8)), get_line((0.5, 0.8), (0.5, 0.2))],
    "circle": [0.5 + 0.3 * np.column_stack([np.cos(a := np.linspace(0, 2 * np.pi, 400)), np.sin(a)])],
    "two": [get_line((0.2, 0.2), (0.2, 0.8)), get_line((0.6, 0.2), (0.8, 0.8))],
    "dot": [get_line((0.3, 0.6), (0.3, 0.6))],
}


@pytest.mark.parametrize("name", LINES)
def test_lines_are_found(name):
    """As many as were drawn, and within a pixel and a half of them, as far as their ends"""
    drawn, found = LINES[name], tracing.find_lines(draw_ink(*LINES[name]))
    assert len(found) == len(drawn)
    ours, theirs = np.concatenate(found), np.concatenate(drawn)
    distance = np.linalg.norm(ours[:, None] - theirs, axis=2) * SIDE * 27 / 28  # pixels
    assert distance.min(1).max() < 1.5 and distance.min(0).max() < 3.5
    if name == "crossing":
        assert sorted(round(float(abs(line[-1] - line[0])[0]), 1) for line in found) == [0, 0.6]  # neither turns


@pytest.mark.parametrize("place", [0.07, 0.5, 0.93])
def test_lines_lie_where_the_renderer_puts_the_ink(place):
    """Its unit square reaches from the centre of the first pixel to that of the last"""
    ink = draw_ink(get_line((place, 0.2), (place, 0.8)))
    obs, centre = images.shrink(ink.astype(float)), np.linspace(0, 1, 28)  # of each pixel
    for axis, image in enumerate([ink, ink.T[::-1]]):  # upright, and turned on its side
        (line,) = tracing.find_lines(image)
        np.testing.assert_allclose(line[:, axis].mean(), (obs.sum(0) * centre).sum() / obs.sum(), atol=0.1 / 28)


def test_frayed_ink_is_no_line():
    line = get_line((0.2, 0.5), (0.8, 0.5))
    frayed = draw_ink(line, get_line((0.5, 0.5), (0.5, 0.54)))
    assert len(tracing.find_lines(frayed)) == 1
    assert len(tracing.find_lines(draw_ink(line, get_line((0.5, 0.5), (0.5, 0.62))))) == 2


def test_a_line_of_strokes_of_the_library_is_divided_into_them():
    arcs = [LIBRARY[4], LIBRARY[5], LIBRARY[3]]
    line = np.array([[0.2, 0.5]])
    for arc in arcs:
        line = np.concatenate([line, get_arc(line[-1], *arc)[1:]])
    strokes = tracing.divide(line, LIBRARY)
    assert [primitive for primitive, _, _ in strokes] == [4, 5, 3]
    ends = np.array([0.2, 0.5]) + np.array(arcs)[:, :2].cumsum(0)
    np.testing.assert_allclose([end for _, end, _ in strokes], ends, atol=tracing.STEP)
    np.testing.assert_allclose([theta for _, _, theta in strokes], [arc[2] for arc in arcs], atol=0.3)


@pytest.mark.parametrize("radius", [0.05, 0.15, 0.3])
def test_a_closed_line_is_not_taken_for_a_dot(radius):
    """Its strokes lead around it"""
    angle = np.linspace(0, 2 * np.pi, 200)
    strokes = tracing.divide(0.5 + radius * np.column_stack([np.cos(angle), np.sin(angle)]), LIBRARY)
    assert len(strokes) > 1
    start, points = np.array([0.5 + radius, 0.5]), []
    for _, end, theta in strokes:
        points.append(get_arc(start, *(end - start), theta))
        start = end
    distance = np.linalg.norm(np.concatenate(points) - 0.5, axis=1)
    np.testing.assert_allclose(distance, radius, atol=0.03)


def test_the_division_is_the_best_of_all():
    """Against trying every division of a short line"""
    line = np.random.RandomState(0).uniform(0, 0.05, (9, 2)).cumsum(0) * [1, 0.5]
    points, step = tracing._resample(line)
    num = len(points)

    def get_cost(cuts):
        first, last = np.array(cuts[:-1]), np.array(cuts[1:])
        chord, theta, error = tracing._fit_arcs(points, first, last, step)
        e = (np.column_stack([chord, theta])[:, None] - LIBRARY) / [OWN.displacement, OWN.displacement, OWN.theta]
        return ((e**2).sum(2).min(1) / 2 + tracing.COST + error / (2 * tracing.TAU**2)).sum()

    inner = [cuts for n in range(num - 1) for cuts in itertools.combinations(range(1, num - 1), n)]
    best = min(([0, *cuts, num - 1] for cuts in inner), key=get_cost)
    assert 8 <= num <= 14
    np.testing.assert_allclose([end for _, end, _ in tracing.divide(line, LIBRARY)], points[best[1:]])


def test_lines_are_cut_at_corners():
    """Within the pixels by which smoothing rounds them, and nowhere else; strokes end there"""
    box = get_line((0.2, 0.2), (0.2, 0.8), (0.8, 0.8), (0.8, 0.2))
    (line,) = tracing.find_lines(draw_ink(box))
    parts = tracing.divide_at_corners(line, SIDE)
    corners = [part[-1] for part in parts[:-1]]
    assert all((one[-1] == other[0]).all() for one, other in itertools.pairwise(parts))
    expected = [(0.2, 0.8), (0.8, 0.8)]
    np.testing.assert_allclose(corners, expected if line[0][0] < 0.5 else expected[::-1], atol=2.5 / SIDE)
    (circle,) = tracing.find_lines(draw_ink(*LINES["circle"]))
    (small,) = tracing.find_lines(draw_ink(0.5 + 0.1 * (LINES["circle"][0] - 0.5) / 0.3))
    for smooth in (circle, small, line[:5], line[:1]):
        (part,) = tracing.divide_at_corners(smooth, SIDE)
        assert (part == smooth).all()
    torch.manual_seed(1)
    model = models.GenerativeModel(64).requires_grad_(False)
    centre, start = tracing.trace(model, [draw_ink(box)], corners=True)
    arcs = variation.get_arcs(variation.vary(centre, start, OWN))[0]  # [A, 7]
    ends = (arcs[:, :2] + arcs[:, 2:4]).numpy()
    assert np.linalg.norm(ends[:, None] - expected, axis=2).min(0).max() < 2.5 / SIDE


def test_traces_lie_on_the_ink():
    """Of letters: nearly all the ink is drawn, and little else, before any refit; in whatever order"""
    model = models.GenerativeModel(64, likelihood="learned-affine").requires_grad_(False)
    glyphs, _, _ = images.draw_glyphs()
    obs = torch.as_tensor(np.stack([glyphs[20 * i] for i in range(12)])).float()
    inks = [np.kron(image.bool().numpy(), np.ones((4, 4), bool)) for image in obs]
    rng = np.random.default_rng(0)
    for rngs in (None, [rng] * 12):
        centre, start = tracing.trace(model, inks, rngs)
        drawing = variation.vary(centre, start, OWN)
        log_p = variation.get_log_likelihood(drawing, obs)
        blank = variation.get_log_likelihood(drawing._replace(on=torch.zeros_like(drawing.on)), obs)
        assert (log_p > blank / 2).all(), (log_p, blank)
        used = centre.displacement.any(2)
        assert (centre.displacement[used].unsqueeze(1) == model.get_primitives()[:, :2]).all(2).any(1).all()
        assert not drawing.on[~used].any() and not start.displacement[~used].any()


def test_any_image_has_a_trace():
    model = models.GenerativeModel(8).requires_grad_(False)
    wide = np.zeros((20, 60), bool)
    wide[8:11, 10:50] = True
    inks = [
        np.zeros((28, 28), bool),
        np.ones((28, 28), bool),
        wide,
        wide.T,
        np.eye(1, dtype=bool),
        np.random.RandomState(0).rand(50, 50) < 0.3,
    ]
    centre, start = tracing.trace(model, inks)
    assert not centre.on[0].any() and centre.on[1:].any(1).all()
    assert all(x.isfinite().all() for x in start)
    drawing = variation.vary(centre, start, OWN)
    start_x = (28 * 10.5 / 60 - 0.5) / 27
    torch.testing.assert_close(drawing.start[2], torch.tensor([start_x, 0.5]), atol=0.01, rtol=0)  # in the middle of a square
    torch.testing.assert_close(drawing.displacement[2].sum(0), torch.tensor([28 / 27 * 39 / 60, 0]), atol=0.02, rtol=0)


def test_structure_of_ink():
    """Parts, holes and ends of a T, a T with a dot, and a circle; and the nats between them"""
    inks = [draw_ink(*lines) for lines in (LINES["T"], [*LINES["T"], *LINES["dot"]], LINES["circle"])]
    wide = inks[0][5:, :]  # is put in the middle of a square
    t, with_dot, circle, moved = map(matching.get_structure, [*inks, wide])
    assert [(s.num_parts, s.num_holes, len(s.ends)) for s in (t, with_dot, circle)] == [(1, 0, 3), (2, 0, 5), (1, 1, 0)]
    np.testing.assert_allclose(t.ends[t.ends.sum(1).argsort()], [[-0.5, -0.5], [-0.5, 0.5], [0.5, 0]], atol=0.05)
    distances = [matching.get_structural_distance(t, other) for other in (t, moved, with_dot, circle)]
    unmatched = matching.END * matching.UNMATCHED
    assert distances == pytest.approx([0, 0, matching.PART + 2 * unmatched, 3 * unmatched + matching.HOLE])
    assert distances == pytest.approx([matching.get_structural_distance(other, t) for other in (t, moved, with_dot, circle)])
