"""Strokes as vectors, against the renderer's pixels and by known arcs."""

import math
import re

import numpy as np
import pytest
import torch

import models
import rendering
from reading import variation
from results import drawings


def sample_svg_path(path, num=200):
    """Points of "M x y L x y" or "M x y A r r 0 large sweep x y", by the formulas of
    the SVG standard (appendix B.2.4): [num, 2]"""
    tokens = path.split()
    x1, y1, x2, y2 = (float(token) for token in (*tokens[1:3], *tokens[-2:]))
    t = np.linspace(0, 1, num)[:, None]
    start, end = np.array([x1, y1]), np.array([x2, y2])
    if tokens[3] == "L":
        return start + t * (end - start)
    radius, large, sweep = float(tokens[4]), tokens[7] == "1", tokens[8] == "1"
    half = (start - end) / 2
    radius = max(radius, np.hypot(*half))
    factor = math.sqrt(max(radius**2 / (half @ half) - 1, 0)) * (-1 if large == sweep else 1)
    centre = factor * np.array([half[1], -half[0]]) + (start + end) / 2
    first, last = (math.atan2(*(point - centre)[::-1]) for point in (start, end))
    angle = (last - first) % (2 * math.pi) if sweep else -((first - last) % (2 * math.pi))
    phi = first + t[:, 0] * angle
    return centre + radius * np.stack([np.cos(phi), np.sin(phi)], 1)


def rasterise(svg, resolution):
    """Ink [R, R] of an SVG file's paths at the points where the renderer has its pixels' centres, which are those of
    the SVG's pixels at 28 x 28"""
    side = np.linspace(0.5, drawings.NUM_PIXELS - 0.5, resolution)
    centres = np.stack(np.meshgrid(side, side), -1)  # x, y
    ink = np.zeros((resolution, resolution), bool)
    found = re.search(r'transform="matrix\(([^)]*)\)"', svg)
    a, b, c, d, e, f = map(float, found[1].split()) if found else (1, 0, 0, 1, 0, 0)
    canonical = (centres - [e, f]) @ np.linalg.inv([[a, c], [b, d]]).T  # where each point of the picture is drawn
    for path, width in re.findall(r'<path d="([^"]*)".*stroke-width="([^"]*)"', svg):
        points = sample_svg_path(path)
        distance = np.min([np.hypot(*(canonical - point).transpose(2, 0, 1)) for point in points], 0)
        ink |= distance <= float(width) / 2
    if found:
        ink &= ((canonical >= 0) & (canonical <= drawings.NUM_PIXELS)).all(-1)
    return ink


def get_mean_distance(a, b):
    """Between the ink of two images, in pixels: the mean way from a pixel of one to the nearest of the other"""

    def one_way(a, b):
        a, b = np.argwhere(a), np.argwhere(b)
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1).mean()

    return max(one_way(a, b), one_way(b, a))


@pytest.mark.parametrize("big_arcs", [False, True])
def test_svg_agrees_with_the_renderer(big_arcs):
    torch.manual_seed(2)
    model = models.GenerativeModel(big_arcs=big_arcs, initial_max_curve=0.9 if big_arcs else 0.3, num_arcs=5)
    with torch.no_grad():
        model.pre_width.copy_(torch.linspace(-3, -0.5, 64))
        model.pre_rendering_params.copy_(torch.tensor([8.0, -4.0]))
        model.pre_theta[:4] = 0 if not big_arcs else 1  # straight
    latent, _ = model.sample(6)
    latent[..., 1:, 1] = 1
    resolution = 112  # four times as fine, so that half a pixel is two here
    probs = drawings.draw(model, latent, resolution).numpy()
    distances = []
    canonical = variation.get_drawing(model, latent)
    for i, drawn in enumerate(probs):
        ink = rasterise(drawings.to_svg(drawings.get_program(canonical.select([i]), latent[i])), resolution)
        distances.append(get_mean_distance(drawn > 0.5, ink) / 4)
    assert max(distances) < 0.1


def test_programs_lie_over_their_images():
    """Seen through the most probable map: as SVG, within half a pixel of the model's probabilities"""
    torch.manual_seed(3)
    model = models.GenerativeModel()
    with torch.no_grad():
        model.pre_rendering_params.copy_(torch.tensor([8.0, -4.0]))
        model.likelihood.theta_affine += 0.1 * torch.randn(40, 2, 3)
    latent, obs = model.sample(12)
    map_ids = drawings.get_map_ids(model, latent, obs)
    maps = model.likelihood.maps[map_ids].detach()
    by_map = [
        rendering.apply_maps(model.get_logits(latent).sigmoid(), m.expand(12, 2, 3)) for m in model.likelihood.theta_affine
    ]
    scores = torch.stack([get_log_likelihood(probs, obs) for probs in by_map])
    assert scores.argmax(0).tolist() == map_ids
    seen, canonical = (drawings.draw(model, latent, 28, m) for m in (maps, None))
    assert (get_log_likelihood(seen, obs) - get_log_likelihood(canonical, obs)).mean() > 20
    distances = []
    drawing = variation.get_drawing(model, latent, obs)
    assert torch.equal(drawing.map, maps)
    for i, (z, probs) in enumerate(zip(latent, drawings.draw(model, latent, 112, maps).numpy(), strict=True)):
        svg = drawings.to_svg(drawings.get_program(drawing.select([i]), z, map_ids[i]))
        assert svg.count("<path") == z[:, 1].sum() and "matrix(" in svg
        if (probs > 0.5).sum() > 50:
            distances.append(get_mean_distance(probs > 0.5, rasterise(svg, 112)) / 4)
    assert len(distances) > 6 and max(distances) < 0.3
    pen = drawings.get_pen_path(drawing, 28)
    assert torch.equal(pen[:, 0, 1], pen[:, 1, 0]) and pen.shape == (12, 10, 2, 2)


def get_log_likelihood(probs, obs):
    """Of images [N, R, C] under probabilities of ink: [N]"""
    probs = probs.clamp(1e-6, 1 - 1e-6)
    return (obs * probs.log() + (1 - obs) * (1 - probs).log()).flatten(1).sum(1).detach()


def test_strokes_off_the_page():
    model = models.GenerativeModel(num_primitives=2, num_arcs=4)
    with torch.no_grad():
        model.pre_dxdy.copy_(torch.tensor([[0.3, 0.0], [3.0, 0.0]]))
    latent = torch.tensor([[[0, 0], [0, 1], [1, 0], [0, 1]]])
    assert drawings.is_off_page(variation.get_drawing(model, latent)).tolist() == [[False, False, False, True]]


def test_path_of_a_known_arc():
    # A quarter circle from the left to the top of a circle around the middle: clockwise.
    quarter = drawings.get_path([0.25, 0.5, 0.25, 0.25, math.pi / 4])
    points = sample_svg_path(quarter)
    assert np.hypot(*(points - 14).T) == pytest.approx(27 / 4, abs=1e-3)
    assert points[-1] == pytest.approx([14, 14 - 27 / 4], abs=1e-3)
    assert drawings.get_path([0.5, 0.5, 0.1, 0, 0.0]).split()[3] == "L"
    assert drawings.get_path([0.5, 0.5, 0.1, 0, 2.0]).split()[7:9] == ["1", "1"]


def test_half_width():
    # scale 10, bias -5: half of the highest probability is that of the logit where exp(...) is ink
    half = drawings.get_half_width(20.0, 0.05, 10.0, -5.0)
    ink = 10 * math.exp(400 * (0.05**2 - half**2)) - 5
    assert 1 / (1 + math.exp(-ink)) == pytest.approx(0.5 / (1 + math.exp(-5)), rel=1e-5)
    assert drawings.get_half_width(20.0, 0.0, 3.0, 8.0) == 0  # all black
    assert drawings.get_half_width(0.0, 0.1, 3.0, -3.0) == 0
