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

`combine` adds both directions.
"""

from typing import NamedTuple

import numpy as np
import scipy.spatial
import torch

from reading import tracing, variation
from reading.variation import HAND, OWN, Drawing

NUM_TRACES = 4  # of each image
NUM_TRACE_STEPS, NUM_OWN_STEPS = 60, 100  # of the refit to the image itself, of traces and of programs
NUM_STEPS = 100  # of the refit to another image
LEARNING_RATE = 0.1  # of all
TRACE_BLUR = 0.5  # traces lie on the ink already
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
        blur=(TRACE_BLUR, 1.0),
        lr=LEARNING_RATE,
        tick=tick,
    )
    shape = num_traces, len(inks)
    return Strokes(obs, traces.latent.unflatten(0, shape), fit.drawing, (fit.log_likelihood - fit.distance).view(shape))


def refit_programs(generative_model, latent, obs, num_kept=1, deviations=OWN, num_steps=NUM_OWN_STEPS, tick=lambda: None):
    """Refits programs [S, N, A, 2] to their images [N, R, C]. Returns: Strokes, of the num_kept programs that fit best, best
    first"""
    num_programs, num_images = latent.shape[:2]
    images = obs.repeat(num_programs, 1, 1)  # [S * N, R, C]
    centre = variation.get_drawing(generative_model, latent.flatten(0, 1), images)
    fit = variation.refit(centre, images, deviations, num_steps, lr=LEARNING_RATE, tick=tick)
    score = (fit.log_likelihood - fit.distance).view(num_programs, num_images)
    kept = score.topk(min(num_kept, num_programs), 0)
    rows = (kept.indices * num_images + torch.arange(num_images)).flatten()  # [K * N]
    latent = latent.flatten(0, 1)[rows].unflatten(0, kept.indices.shape)
    return Strokes(obs, latent, fit.drawing.select(rows), kept.values)


def match(strokes, obs, deviations=HAND, num_steps=NUM_STEPS, floor=FLOOR, tick=lambda: None):
    """Refits the strokes of N images to each of M other images [M, R, C].

    Args: floor: f'
    Returns: variation.Fit of K * M * N drawings; and log p(x' | v) - |e|^2 / 2 of each, [K, M, N], nats
    """
    num_kept, num_images = strokes.score.shape
    grid = torch.cartesian_prod(torch.arange(num_kept), torch.arange(len(obs)), torch.arange(num_images))
    program, image, source = grid.unbind(1)  # [K * M * N] each
    centre = strokes.drawing.select(program * num_images + source)
    fit = variation.refit(
        centre, obs[image], deviations, num_steps, aligned_to=strokes.obs[source], lr=LEARNING_RATE, tick=tick
    )
    log_likelihood = variation.get_log_likelihood(fit.drawing, obs[image], floor)
    return fit, (log_likelihood - fit.distance).view(num_kept, len(obs), num_images)


def compare(tests, characters, deviations=HAND, num_steps=NUM_STEPS, tick=lambda: None):
    """Compares M test images with N characters, both Strokes.

    Returns: forward [M, N], the score of each test image under the strokes of each character; backward [M, N], the score
        of each character under the strokes of each test image, less what it takes to explain this character; nats. Also,
        of the forward direction, the variation.Fit of K * M * N drawings, and the best program of each pair, [M, N]
    """
    fit, forward = match(characters, tests.obs, deviations, num_steps, tick=tick)  # [K, M, N]
    _, backward = match(tests, characters.obs, deviations, num_steps, tick=tick)  # [K, N, M]
    _, among = match(characters, characters.obs, deviations, num_steps, tick=tick)  # [K, N, N]
    images = characters.obs.repeat(len(characters.score), 1, 1)  # [K * N, R, C]
    own = variation.get_log_likelihood(characters.drawing, images, FLOOR).view_as(characters.score)  # [K, N]
    effort = get_effort(own.amax(0), among.logsumexp(0))
    return forward.logsumexp(0), backward.logsumexp(0).t() - effort, fit, forward.argmax(0)


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
