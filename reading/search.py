"""Search for programs: improves an inference network's proposals by mutation.

A network that has memorised its training images proposes poor programs for other images, but good
starting points. From these, an evolutionary search climbs log p(z, x): each round changes a stroke
or two in programs of a population, scores all mutants at once, and resamples the population from
old and new programs by their scores, at a temperature that falls to zero (simulated annealing; at
temperature 0 the best are kept). It returns the best programs seen.

    latent, log_joint = search.improve(generative_model, latent, obs)
"""

import math

import torch

import scoring
from models import pack, unpack

TEMPERATURE = 8.0  # nats, initially


@torch.no_grad()
def improve(
    generative_model, latent, obs, alphabet=None, num_best=10, num_rounds=100, num_mutants=200,
    temperature=TEMPERATURE, show_progress=iter,
):  # fmt: skip
    """Searches for the most probable programs of each image.

    Args:
        latent [P, B, A, 2]: programs to start from; obs [B, R, C]; alphabet [B, L] one-hot or None
        num_best (K): programs to return for each image, and the size of the population
        num_rounds, num_mutants: mutants of each image in a round
        temperature: of the first round's selection, in nats; it falls to 0 linearly
        show_progress: wraps the iterable of rounds, as util.show_progress does
    Returns: latent [K, B, A, 2], distinct programs, best first; log_joint [K, B], their log p(z, x) in nats, -inf
        where there are fewer than K programs
    """
    offset = generative_model.get_primitives()[:, :2]  # [N, 2]
    log_joint = scoring.score(generative_model, latent, obs, alphabet).t()  # [B, P]
    population, log_joint = select(pack(latent).transpose(0, 1), log_joint, num_best)  # [B, K, A], [B, K]
    best, best_log_joint = population, log_joint
    for round_id in show_progress(range(num_rounds)):
        mutants = mutate(population, log_joint, offset, num_mutants)  # [B, M, A]
        scores = scoring.score(generative_model, unpack(mutants).transpose(0, 1), obs, alphabet).t()  # [B, M]
        codes, scores = torch.cat([population, mutants], 1), torch.cat([log_joint, scores], 1)
        best, best_log_joint = select(torch.cat([best, codes], 1), torch.cat([best_log_joint, scores], 1), num_best)
        heat = temperature * (1 - (round_id + 1) / num_rounds)
        population, log_joint = select(codes, scores, num_best, heat)
    return unpack(best).transpose(0, 1), best_log_joint.t()


def select(codes, log_joint, num_best, temperature=0.0):
    """Selects the best distinct programs of each image or, at a temperature, samples without replacement with
    probabilities proportional to exp(log_joint / temperature).

    Args: codes [B, N, A]; log_joint [B, N]
    Returns: codes [B, K, A], log_joint [B, K], best first; where there are fewer, repeats at -inf
    """
    key = scoring.get_hash(codes.flatten(0, 1), torch.zeros_like(codes[..., 0]).flatten()).view(codes.shape[:2])
    key, order = key.sort(dim=1, stable=True)
    repeated = torch.zeros_like(key, dtype=torch.bool)
    repeated[:, 1:] = key[:, 1:] == key[:, :-1]
    codes, log_joint = (take(x, order) for x in (codes, log_joint))
    log_joint = log_joint.masked_fill(repeated, -math.inf)
    noise = -temperature * torch.empty_like(log_joint).exponential_().log() if temperature > 0 else 0
    chosen = (log_joint + noise).topk(min(num_best, codes.shape[1]), 1).indices  # [B, K]
    codes, log_joint = take(codes, chosen), take(log_joint, chosen)
    order = log_joint.argsort(dim=1, descending=True, stable=True)
    return take(codes, order), take(log_joint, order)


def take(x, index):
    """x [B, N, ...], index [B, K] -> [B, K, ...]"""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), index]


def mutate(population, log_joint, offset, num_mutants):
    """Changes programs in one or two strokes.

    Args: population [B, K, A], log_joint [B, K]; offset [N, 2], each primitive's displacement of the pen
    Returns: [B, M, A]
    """
    batch_size, _, num_arcs = population.shape
    usable = log_joint.isfinite().double() + 1e-30  # repeats do not become parents
    parent = usable.multinomial(2 * num_mutants, replacement=True).view(batch_size, 2, num_mutants)
    codes, other = (take(population, index).flatten(0, 1) for index in parent.unbind(1))  # [B * M, A]
    probability = codes.new_tensor(list(MUTATIONS.values()), dtype=torch.double)
    kind = probability.multinomial(len(codes), replacement=True)
    result = codes.clone()
    for i, change in enumerate(MUTATIONS):
        rows = (kind == i).nonzero().squeeze(1)
        result[rows] = change(codes[rows], other[rows], offset)
    result[:, 0] -= result[:, 0] % 2  # the first stroke leaves no ink
    return result.view(batch_size, num_mutants, num_arcs)


# ------------------------------------------------------------------ kinds of mutation: codes [N, A] -> [N, A]


def _draw_places(codes, num=1):
    """Distinct random positions in each program: [N, num], sorted"""
    return torch.rand(codes.shape, device=codes.device).argsort(1)[:, : min(num, codes.shape[1])].sort(1).values


def _draw_codes(shape, offset):
    return torch.randint(2 * len(offset), shape, device=offset.device)


def _put(codes, place, new):
    return codes.scatter(1, place, new)


def _replace(codes, other, offset, num=1):
    """Replaces a primitive; mostly keeps the pen up or down"""
    place = _draw_places(codes, num)
    new, old = _draw_codes(place.shape, offset), codes.gather(1, place)
    keep = torch.rand(place.shape, device=codes.device) < 0.8
    return _put(codes, place, torch.where(keep, new - new % 2 + old % 2, new))


def _replace_two(codes, other, offset):
    return _replace(codes, other, offset, num=2)


def _balance(codes, other, offset):
    """Replaces a primitive, and a second one by that which best compensates, so that the pen continues from about where
    it was"""
    places = _draw_places(codes, 2)
    first, second = places[:, :1], places[:, -1:]
    old_first, old_second = codes.gather(1, first), codes.gather(1, second)
    new = _draw_codes(first.shape, offset)
    new = new - new % 2 + old_first % 2
    wanted = offset[old_first // 2] + offset[old_second // 2] - offset[new // 2]  # [N, 1, 2]
    distance = (wanted - offset).square().sum(-1)  # [N, K]
    distance = distance * torch.empty_like(distance).exponential_()  # mostly, but not always, the nearest
    nearest = distance.argmin(1, keepdim=True)
    return _put(_put(codes, first, new), second, 2 * nearest + old_second % 2)


def _lift(codes, other, offset):
    """Lifts or lowers the pen"""
    place = _draw_places(codes)
    return _put(codes, place, codes.gather(1, place) ^ 1)


def _insert(codes, other, offset):
    """Inserts a stroke; later ones move back, and the last one is dropped"""
    place, position = _draw_places(codes), torch.arange(codes.shape[1], device=codes.device)
    moved = codes.gather(1, (position - (position > place).long()).clamp(min=0))
    return _put(moved, place, _draw_codes(place.shape, offset))


def _remove(codes, other, offset):
    """Removes a stroke; later ones move forward, and an invisible one fills the last place"""
    place, position = _draw_places(codes), torch.arange(codes.shape[1], device=codes.device)
    moved = codes.gather(1, (position + (position >= place).long()).clamp(max=codes.shape[1] - 1))
    moved[:, -1] -= moved[:, -1] % 2
    return moved


def _swap(codes, other, offset):
    """Swaps two strokes"""
    places = _draw_places(codes, 2)
    return _put(codes, places, codes.gather(1, places.flip(1)))


def _cross(codes, other, offset):
    """Joins the beginning of one program to the end of another"""
    return torch.where(torch.arange(codes.shape[1], device=codes.device) < _draw_places(codes), codes, other)


# Mutations, and how often each is tried
MUTATIONS = {
    _replace: 0.25, _replace_two: 0.1, _balance: 0.25, _lift: 0.1, _insert: 0.1, _remove: 0.1, _swap: 0.05,
    _cross: 0.05,
}  # fmt: skip
