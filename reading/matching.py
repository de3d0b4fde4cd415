"""How well the strokes of one image explain another: the match that one-shot classification rests on.

The ink of each image is traced by strokes of the model's library (tracing.py), in several ways, and these are refitted to it
(`find_strokes`). Strokes explain another image as well as their best variation e_k does, summed over the traces k of an image:

    s(x' | x) = log sum_k exp(log p(x' | v_k(e_k)) - |e_k|^2 / 2),    e_k = argmax_e log p(x' | v_k(e)) - |e|^2 / 2

with v_k(e) as in variation.py. Once strokes are where they belong, pixels should count for less: for the score, though not for
finding e_k, probabilities are held to [f', 1 - f'], f' = 0.03.

`compare` does so in both directions. Forwards, the strokes of each character c explain a test image t: s(t | c). Backwards,
the strokes of the test image explain each character. Some characters are harder to explain than others, so how well a
character's own best strokes do, and how well those of the other characters do, is subtracted, half each:

    s(c | t) - (max_k log p(c | v_k of c) + mean_{c' != c} s(c | c')) / 2

All pairs are fitted blurred, and on a coarse grid (`match`); the best few characters of each test image also sharply, in 28 x 28
pixels (`refine`). `combine` adds both directions.
"""

from typing import NamedTuple

import numpy as np
import scipy.spatial
import torch
import torch.nn.functional as F

from reading import tracing, variation
from reading.variation import HAND, OWN, Drawing, Variation

NUM_TRACES = 4  # of each image
NUM_TRACE_STEPS = 60  # of the refit to the image itself
NUM_COARSE_STEPS, NUM_STEPS = 50, 60  # of the refit to another image, on a coarse grid and in all pixels
NUM_CANDIDATES, NUM_REFINED = 6, 2  # characters of a test image, and their traces, that are fitted in all pixels
LEARNING_RATE = 0.1  # of all
TRACE_BLUR, COARSE_BLUR, FINE_BLUR = (0.5, 1.0), (0.25, 0.6), (0.6, 1.0)  # traces lie on the ink already
FLOOR = 0.03  # f'


class Strokes(NamedTuple):
    """K programs of each of N images, refitted to it"""

    obs: torch.Tensor  # [N, R, C], the images
    latent: torch.Tensor  # [K, N, A, 2], the programs
    drawing: Drawing  # of K * N drawings
    score: torch.Tensor  # [K, N], log p(x | v) - |e|^2 / 2, nats

    def select(self, ids):
        """Selects images by ids [M]"""
        rows = (torch.arange(len(self.score)).unsqueeze(1) * len(self.obs) + ids).flatten()  # [K * M]
        return Strokes(self.obs[ids], self.latent[:, ids], self.drawing.select(rows), self.score[:, ids])


def find_strokes(generative_model, inks, obs, num_traces=NUM_TRACES, seed=0, deviations=OWN, tick=lambda: None):
    """Traces images and refits the strokes to them.

    Args:
        inks: the N images, a list of arrays [H, W] of bool, of any size; obs [N, R, C] in [0, 1]: the same, scaled down
        seed: of the order of strokes in further traces
        deviations: Deviations from the library's strokes
        tick: called after each step of each variation.AT_ONCE drawings
    Returns: Strokes, of num_traces programs per image, the first trace the most obvious one
    """
    rng = np.random.default_rng(seed)
    traces = tracing.trace(generative_model, inks * num_traces, [None] * len(inks) + [rng] * len(inks) * (num_traces - 1))
    images = obs.repeat(num_traces, 1, 1)  # [K * N, R, C]
    fit = variation.refit(
        traces.centre,
        images,
        deviations,
        NUM_TRACE_STEPS,
        start=traces.variation,
        blur=TRACE_BLUR,
        lr=LEARNING_RATE,
        tick=tick,
    )
    shape = num_traces, len(inks)
    return Strokes(obs, traces.latent.unflatten(0, shape), fit.drawing, (fit.log_likelihood - fit.distance).view(shape))


def match(strokes, obs, deviations=HAND, num_steps=NUM_COARSE_STEPS, tick=lambda: None):
    """Refits the strokes of N images to each of M other images [M, R, C], blurred, and on a grid half as fine.

    Returns: Variation of K * M * N drawings; and log p(x' | v) - |e|^2 / 2 of each, in all pixels: [K, M, N], nats
    """
    num_kept, num_images = strokes.score.shape
    grid = torch.cartesian_prod(torch.arange(num_kept), torch.arange(len(obs)), torch.arange(num_images))
    program, image, source = grid.unbind(1)  # [K * M * N] each
    centre = strokes.drawing.select(program * num_images + source)
    coarse, aligned_to = (_halve(x)[ids] for x, ids in [(obs, image), (strokes.obs, source)])
    fit = variation.refit(
        centre, coarse, deviations, num_steps, aligned_to=aligned_to, blur=COARSE_BLUR, sharp_after=0.8, lr=LEARNING_RATE,
        tick=tick,
    )  # fmt: skip
    score = _score(fit, obs[image])
    return fit.variation, score.view(num_kept, len(obs), num_images)


def refine(strokes, obs, start, score, pairs, deviations=HAND, num_steps=NUM_STEPS, tick=lambda: None):
    """Refits the strokes of some of N images to some of M others, beginning where `match` ended.

    Args: start, score: from `match`; pairs [P, 2], image and source
    Returns: Fit of T * P drawings, the best NUM_REFINED traces of each pair, and log p(x' | v) - |e|^2 / 2, [T, P], nats
    """
    num_images, (image, source) = len(strokes.obs), pairs.unbind(1)
    trace = score[:, image, source].topk(min(NUM_REFINED, len(score)), 0).indices  # [T, P]
    rows = (trace * len(obs) + image) * num_images + source
    start = Variation(*(x[rows.flatten()] for x in start))
    centre, images = strokes.drawing.select((trace * num_images + source).flatten()), obs[image.expand_as(trace).flatten()]
    fit = variation.refit(
        centre, images, deviations, num_steps, start, blur=FINE_BLUR, sharp_after=0.8, lr=LEARNING_RATE, tick=tick
    )
    return fit, _score(fit, images).view_as(trace)


def _halve(obs):
    """Images on the grid on which the renderer draws in half as many pixels: [N, R, C] -> [N, R / 2, C / 2]"""
    size = [side // 2 for side in obs.shape[1:]]
    return F.interpolate(F.avg_pool2d(obs.unsqueeze(1), 3, 1, 1), size, mode="bilinear", align_corners=True).squeeze(1)


def _score(fit, obs):
    """log p(x' | v) - |e|^2 / 2 of Fits, as classification counts it: [N], nats"""
    rows = torch.arange(len(obs)).split(variation.AT_ONCE)
    return torch.cat([variation.get_log_likelihood(fit.drawing.select(some), obs[some], FLOOR) for some in rows]) - fit.distance


class Comparison(NamedTuple):
    """M test images and N characters"""

    forward: torch.Tensor  # [M, N], the score of each test image under the strokes of each character, nats
    backward: torch.Tensor  # [M, N], that of each character under the strokes of each test image, less what it takes, nats
    candidates: torch.Tensor  # [M, S], the characters that were refined; the scores of others are lower bounds
    drawing: Drawing  # of M * S drawings, the strokes of each candidate as they were varied to fit the test image


@torch.no_grad()
def compare(tests, characters, num_coarse_steps=NUM_COARSE_STEPS, num_steps=NUM_STEPS, tick=lambda: None):
    """Compares test images with characters, both Strokes. Returns: Comparison"""
    (start, scores), (back_start, back_scores), (_, among) = (
        match(strokes, obs, num_steps=num_coarse_steps, tick=tick)
        for strokes, obs in [(characters, tests.obs), (tests, characters.obs), (characters, characters.obs)]
    )  # [K, M, N], [K, N, M], [K, N, N]
    images = characters.obs.repeat(len(characters.score), 1, 1)  # [K * N, R, C]
    own = variation.get_log_likelihood(characters.drawing, images, FLOOR).view_as(characters.score)  # [K, N]
    effort = get_effort(own.amax(0), among.logsumexp(0))
    forward, backward = scores.logsumexp(0), back_scores.logsumexp(0).t() - effort
    candidates = combine(forward, backward).topk(min(NUM_CANDIDATES, forward.shape[1]), 1).indices  # [M, S]
    test = torch.arange(len(candidates)).unsqueeze(1).expand_as(candidates)
    pairs = torch.stack([test, candidates], 2).flatten(0, 1)  # [M * S, 2]
    fit, refined = refine(characters, tests.obs, start, scores, pairs, num_steps=num_steps, tick=tick)  # [T, M * S]
    _, back_refined = refine(tests, characters.obs, back_start, back_scores, pairs.flip(1), num_steps=num_steps, tick=tick)
    forward[test, candidates] = refined.logsumexp(0).view_as(test)
    backward[test, candidates] = back_refined.logsumexp(0).view_as(test) - effort[candidates]
    best = refined.argmax(0) * len(pairs) + torch.arange(len(pairs))
    return Comparison(forward, backward, candidates, fit.drawing.select(best))


def get_effort(own, among):
    """What it takes to explain each character: own [N], log p under its own strokes; among [N, N], the score of each under
    the strokes of each -> [N]"""
    num = len(own)
    if num == 1:
        return own
    others = (among.sum(1) - among.diagonal()) / (num - 1)
    return (own + others) / 2


def combine(forward, backward):
    """The match of each test image and character: [M, N] each -> [M, N], nats"""
    return forward + backward


# ------------------------------------------------------------------ without strokes


def get_points(ink, scale=False):
    """Where ink [H, W] is, about its middle, in pixels or, scaled, in units of its longer side: [n, 2]"""
    points = np.argwhere(ink).astype(float)
    points -= points.mean(0)
    return points / max(np.ptp(points, axis=0).max(), 1) if scale else points


def get_hausdorff_distance(points, others):
    """The modified Hausdorff distance of [n, 2] and [m, 2] (Dubuisson and Jain, 1994), with which Omniglot's own one-shot
    baseline compares images: the mean distance of a point to the nearest other one, the greater of both directions"""
    distance = scipy.spatial.distance.cdist(points, others)
    return max(distance.min(1).mean(), distance.min(0).mean())
