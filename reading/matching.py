"""How well the strokes of one image explain another: the match that one-shot classification rests on.

The ink of each image is traced with strokes of the model's library (tracing.py), in several ways, and these are refitted to it
(`find_strokes`). Strokes explain another image as well as their best variation e_k does, summed over the traces k of an image:

    s(x' | x) = log sum_k exp(log p(x' | v_k(e_k)) - |e_k|^2 / 2),    e_k = argmax_e log p(x' | v_k(e)) - |e|^2 / 2

with v_k(e) as in variation.py. Once strokes are in place, pixels should count for less: in the score, though not in the search
for e_k, probabilities are clamped to [f', 1 - f'], f' = 0.03.

`compare` does this in both directions. Forward, the strokes of each character c explain a test image t: s(t | c). Backward, the
strokes of the test image explain each character. Some characters are harder to explain than others, so the mean of two other
scores is subtracted, those of the character's own best strokes and, on average, of the other characters' strokes:

    s(c | t) - (max_k log p(c | v_k of c) + mean_{c' != c} s(c | c')) / 2

docs/oneshot.md ("Method") has the steps, and why structure counts as well.
"""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.spatial
import torch
import torch.nn.functional as F

from images import make_square
from reading import tracing, variation
from reading.variation import HAND, OWN, Drawing, Schedule

NUM_TRACES = 4  # of each image
NUM_CANDIDATES, NUM_REFINED = 6, 2  # characters per test image, and traces of each, that are fitted on all pixels
FLOOR = 0.03  # f'

# Nats by which the same character becomes less probable, by maximum likelihood on forty runs of background alphabets:
PART, HOLE = 8.0, 4.0  # for each extra or missing part or hole of the ink
MOST = 3  # at most so many count
END, UNMATCHED = 18.0, 0.45  # for each end of a line, times the distance to its partner; that distance if it has none
TRACING = Schedule(60, 0.5, 1.0, 0.6)  # to the image itself, whose ink the traces already follow
COARSE = Schedule(50, 0.25, 0.6, 0.8)  # to another image, on a coarse grid
FINE = Schedule(60, 0.6, 1.0, 0.8)  # and on all pixels


class Strokes(NamedTuple):
    """K traces of each of N images, refitted to it"""

    obs: torch.Tensor  # [N, R, C], the images
    drawing: Drawing  # of [K, N]

    def select(self, ids):
        """Selects images by ids [M]"""
        return Strokes(self.obs[ids], self.drawing.select(slice(None), ids))


def find_strokes(generative_model, inks, obs, num_traces=NUM_TRACES, seed=0, deviations=OWN, corners=False, tick=lambda: None):
    """Traces images and refits the strokes to them.

    Args:
        inks: the N images, a list of arrays [H, W] of bool, of any size; obs [N, R, C] in [0, 1]: the same, scaled down
        seed: of the stroke order in further traces
        deviations: Deviations from the library's strokes; corners: as for tracing.trace
        tick: called after each step of each variation.AT_ONCE drawings
    Returns: Strokes, with num_traces per image, the first trace being the most obvious one
    """
    rng = np.random.default_rng(seed)
    rngs = [None] * len(inks) + [rng] * len(inks) * (num_traces - 1)
    centre, start = tracing.trace(generative_model, inks * num_traces, rngs, corners)
    images = obs.repeat(num_traces, 1, 1)  # [K * N, R, C]
    drawing, _, _ = variation.refit(centre, images, deviations, TRACING, start, tick=tick)
    return Strokes(obs, variation.change(drawing, lambda x: x.unflatten(0, (num_traces, len(inks)))))


def match(strokes, obs, deviations=HAND):
    """Refits the strokes of N images to each of M other images [M, R, C], blurred, on a grid half as fine.

    Returns: Variation of [K, M, N] drawings; log p(x' | v) - |e|^2 / 2 of each, on all pixels: [K, M, N], nats
    """
    sizes = len(strokes.drawing.on), len(obs), len(strokes.obs)
    trace, image, source = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")  # [K, M, N] each
    centre = strokes.drawing.select(trace, source)
    sources = _halve(strokes.obs)[source]
    drawing, e, distance = variation.refit(centre, _halve(obs)[image], deviations, COARSE, aligned_to=sources)
    return e, _score(drawing, distance, obs[image])


def refine(strokes, obs, e, score, image, source, deviations=HAND, schedule=FINE):
    """Refits the strokes of some of N images to some of M others, starting where `match` ended.

    Args: e, score: from `match`; image, source [...]: which of the M images is to be explained by which of the N
    Returns: Drawing of [T, ...], the best NUM_REFINED traces of each pair, and log p(x' | v) - |e|^2 / 2, of the same shape
    """
    trace = score[:, image, source].topk(min(NUM_REFINED, len(score)), 0).indices  # [T, ...]
    image, source = image.expand_as(trace), source.expand_as(trace)
    start = variation.change(e, lambda x: x[trace, image, source])
    centre = strokes.drawing.select(trace, source)
    drawing, _, distance = variation.refit(centre, obs[image], deviations, schedule, start)
    return drawing, _score(drawing, distance, obs[image])


def _halve(obs):
    """Images on the renderer's grid at half the resolution: [N, R, C] -> [N, R / 2, C / 2]"""
    size = [side // 2 for side in obs.shape[1:]]
    return F.interpolate(F.avg_pool2d(obs.unsqueeze(1), 3, 1, 1), size, mode="bilinear", align_corners=True).squeeze(1)


def _score(drawing, distance, obs):
    """log p(x' | v) - |e|^2 / 2, as classification counts it: Drawing, distance [...], obs [..., R, C] -> [...], nats"""
    drawing, obs = variation.change(drawing, lambda x: x.flatten(0, distance.dim() - 1)), obs.flatten(0, -3)
    rows = torch.arange(len(obs)).split(variation.AT_ONCE)
    log_p = torch.cat([variation.get_log_likelihood(drawing.select(some), obs[some], FLOOR) for some in rows])
    return log_p.view_as(distance) - distance


class Comparison(NamedTuple):
    """M test images and N characters"""

    forward: torch.Tensor  # [M, N], the score of each test image under the strokes of each character, nats
    backward: torch.Tensor  # [M, N], that of each character under the strokes of each test image, relative to others', nats
    structure: torch.Tensor  # [M, N], structural distances, nats
    candidates: torch.Tensor  # [M, S], the characters that were refined; the scores of others are lower bounds
    drawing: Drawing  # of [M, S], the strokes of each candidate, varied to fit the test image


@torch.no_grad()
def compare(tests, characters, structure, schedule=FINE):
    """Compares M test images with N characters, both Strokes; structure [M, N]: structural distances. Returns: Comparison"""
    e, score = match(characters, tests.obs)  # [K, M, N]
    back_e, back_score = match(tests, characters.obs)  # [K, N, M]
    _, among = match(characters, characters.obs)  # [K, N, N]
    own = variation.get_log_likelihood(characters.drawing, characters.obs.expand(len(among), -1, -1, -1), FLOOR)  # [K, N]
    baseline = get_baseline(own.amax(0), among.logsumexp(0))
    forward, backward = score.logsumexp(0), back_score.logsumexp(0).t() - baseline
    candidates = combine(forward, backward, structure).topk(min(NUM_CANDIDATES, forward.shape[1]), 1).indices  # [M, S]
    test = torch.arange(len(candidates)).unsqueeze(1).expand_as(candidates)
    drawing, refined = refine(characters, tests.obs, e, score, test, candidates, schedule=schedule)  # [T, M, S]
    _, back_refined = refine(tests, characters.obs, back_e, back_score, candidates, test, schedule=schedule)
    forward[test, candidates] = refined.logsumexp(0)
    backward[test, candidates] = back_refined.logsumexp(0) - baseline[candidates]
    best = drawing.select(refined.argmax(0), test, torch.arange(test.shape[1]).expand_as(test))
    return Comparison(forward, backward, structure, candidates, best)


def get_baseline(own, among):
    """How well each character can be explained: own [N], log p under its own strokes; among [N, N], the score of each under the
    strokes of each -> [N]"""
    if len(own) == 1:
        return own
    others = (among.sum(1) - among.diagonal()) / (len(own) - 1)
    return (own + others) / 2


def combine(forward, backward, structure):
    """The match of each test image and character: [M, N] each -> [M, N], nats"""
    return forward + backward - structure


# ------------------------------------------------------------------ structure


class Structure(NamedTuple):
    """Features of a character that another hand hardly changes"""

    ends: np.ndarray  # of lines, about the middle of the ink's box, in units of its longer side: [n, 2]
    num_parts: int
    num_holes: int


def get_structure(ink):
    """ink [H, W], bool, not blank -> Structure"""
    ink = make_square(ink)
    place = np.argwhere(ink)
    low, high = place.min(0), place.max(0)
    ends = (tracing.find_ends(ink) - (low + high) / 2) / max((high - low).max(), 1)
    _, num_parts = scipy.ndimage.label(ink, np.ones((3, 3)))
    _, num_empty = scipy.ndimage.label(~np.pad(ink, 1))
    return Structure(ends, num_parts, num_empty - 1)


def get_structural_distance(one, other):
    """How much the differences between two Structures count against one character, in nats. Ends are matched one to one, as
    cheaply as possible"""
    num, num_other = len(one.ends), len(other.ends)
    cost = np.full([max(num, num_other)] * 2, UNMATCHED)
    cost[:num, :num_other] = scipy.spatial.distance.cdist(one.ends, other.ends).clip(max=2 * UNMATCHED)  # if farther, unmatched
    ends = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    num_parts, num_holes = (min(abs(a - b), MOST) for a, b in zip(one[1:], other[1:], strict=True))
    return END * ends + PART * num_parts + HOLE * num_holes


# ------------------------------------------------------------------ without strokes


def get_points(ink, scale=False):
    """The positions of ink [H, W] relative to its middle, in pixels or, scaled, in units of its longer side: [n, 2]"""
    points = np.argwhere(ink).astype(float)
    points -= points.mean(0)
    return points / max(np.ptp(points, axis=0).max(), 1) if scale else points


def get_hausdorff_distance(points, others):
    """The modified Hausdorff distance between [n, 2] and [m, 2] (Dubuisson and Jain, 1994), Omniglot's one-shot baseline: the
    mean distance from a point to the nearest one in the other set, the greater of both directions"""
    pairs = (points, others), (others, points)
    return max(scipy.spatial.KDTree(some).query(of)[0].mean() for of, some in pairs)
