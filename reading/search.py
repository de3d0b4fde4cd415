"""Searches for programs of an image: grown stroke by stroke along its ink, then improved by mutation.

Posteriors over programs have many modes, tens of nats apart: the same ink can be traced in another order, with other
primitives or through another affine map. docs/evaluation.md ("Memoised evaluation") lists the steps. Two things are not obvious:
a beam keeps programs by the score that their own best next stroke would lead to, since moving the pen to the right place pays
off only then; and it charges less than the model's 14 nats for a pixel of ink not drawn yet, or it would prefer programs that
cover much ink with few strokes to those that draw it well.

    latent, log_joint = search.find(generative_model, obs)
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rendering
import scoring
from models import pack, unpack
from util import show_progress

VERSION = 9  # to be raised when searches find other programs: reports do not average evaluations by different versions


class Effort(NamedTuple):
    """How long a search takes. The default takes about ten seconds an image on one core."""

    width: int = 60  # of the narrowest beams
    num_maps: int = 40  # with a first beam each
    population: int = 400
    num_mutants: int = 800  # per round
    num_hot_rounds: int = 40  # of the first evolutionary search
    num_cold_rounds: int = 20  # of the second

    def scale(self, factor):
        """Makes searches longer by a factor, with wider beams and more rounds; a factor below 1 also means fewer maps and smaller
        populations"""
        shorter = min(factor, 1)
        factors = Effort(factor / shorter**0.5, shorter**0.5, shorter, shorter, factor, factor)
        return Effort(*(math.ceil(factor * num) for factor, num in zip(factors, self, strict=True)))


class Stage(NamedTuple):
    """A stage of beam searches, each under one map"""

    widening: int  # factor on the width of the narrowest beams
    share_of_maps: float  # that it takes: those that led to the best programs so far
    floor: float  # logit of paper: ink not drawn yet costs -floor nats a pixel
    share_alike: float  # fraction of a beam in which programs may be alike


QUICK = Effort(15, 20, 100, 100, 60, 20)  # takes seconds an image when compiled
NUM_BEST = 200  # programs that a search keeps
NUM_PROPOSALS = 500  # programs from a model's own network, with which evaluations begin a search
FLOOR = -2.0  # logit of paper in most beam searches
# Programs that count as alike may draw different ink: wide beams have room for both, narrow ones have not
STAGES = (
    Stage(4, 1.0, FLOOR, 0.0),
    Stage(8, 0.4, FLOOR, 0.0),
    Stage(20, 0.075, FLOOR, 0.5),
    Stage(20, 0.075, -1.5, 0.5),
    Stage(20, 0.075, -1.0, 0.0),
)
BEAM_TEMPERATURE = 1.0  # nats
NUM_SCORED, ON_SHARE = 1.5, 0.6  # strokes scored for each that goes on, and the share of these that leave ink
CELL, BUCKET = 0.5 / 28, 0.5  # a beam search's resolution of places (of the page) and log likelihoods (nats)
PATCHES_AT_ONCE = 512  # cut out of drawings: what fits in the cache
HOT, COLD = 12.0, 3.0  # nats: temperatures at which evolutionary searches begin
NUM_MAPS = 8  # used by an evolutionary search
ROUNDS_PER_CHECK = 20  # after which maps are chosen anew and the population is scored under all of them


@torch.no_grad()
def find(generative_model, obs, alphabet=None, proposals=None, num_best=NUM_BEST, effort=None, is_stopped=lambda: False):
    """Searches for the most probable programs of an image.

    Args:
        obs [R, C] in {0, 1}; alphabet [L] one-hot or None
        proposals [P, A, 2]: programs to begin with, beside those of beam searches; by default, samples from the prior
        effort: Effort; is_stopped: called now and then; if it returns True, the search ends with the best programs so far
    Returns: latent [K, A, 2], at most num_best distinct programs, best first; log_joint [K], their log p(z, x) in nats
    """
    effort, image = effort or Effort(), Image(generative_model, obs, alphabet)
    if proposals is None:
        alphabets = None if alphabet is None else alphabet.expand(effort.population, -1)
        proposals = generative_model.sample_latent(effort.population, alphabets)
    codes, num_kept = explore(image, pack(proposals), effort, is_stopped), max(num_best, NUM_BEST)
    codes = anneal(image, codes, effort, effort.num_hot_rounds, HOT, num_kept, is_stopped)
    if not is_stopped():
        codes = regrow(image, codes, effort.width)
        codes = anneal(image, codes, effort, effort.num_cold_rounds, COLD, num_kept, is_stopped)
    codes, log_joint = select(codes, image.score(codes), num_best)
    return unpack(codes), log_joint


@torch.no_grad()
def read(generative_model, inference_network, obs, num_proposals=1000):
    """Searches for the most probable program of each image, beginning with proposals of the inference network. A conditional
    model takes the alphabet of the most probable proposal.

    Args: obs [N, R, C] in {0, 1}
    Yields: for each image, latent [A, 2]; log_joint, nats; alphabet, [L] one-hot, or None if the model is not conditional
    """
    for x in show_progress(obs, desc="searching", unit="image"):
        is_conditional = generative_model.num_alphabets > 0
        alphabet = guess_alphabet(generative_model, inference_network, x, num_proposals) if is_conditional else None
        given = alphabet[None] if is_conditional else None
        proposals = inference_network.sample(x[None], num_proposals, given).squeeze(1)  # [P, A, 2]
        latent, log_joint = find(generative_model, x, alphabet, proposals, 1, QUICK)
        yield latent.squeeze(0), log_joint.item(), alphabet


def guess_alphabet(generative_model, inference_network, obs, num_proposals):
    """The alphabet of the network's most probable proposal under any: obs [R, C] -> one-hot [L]"""
    alphabet = torch.eye(generative_model.num_alphabets)
    obs, num_each = obs.expand(len(alphabet), -1, -1), math.ceil(num_proposals / len(alphabet))
    proposals = inference_network.sample(obs, num_each, alphabet)  # [P, L, A, 2]
    return alphabet[scoring.score(generative_model, proposals, obs, alphabet).amax(0).argmax()]


# ------------------------------------------------------------------ the image


class Image:
    """The image whose programs are sought, and their scores in nats.

    Args: obs [R, C]; alphabet [L] one-hot or None
    """

    def __init__(self, generative_model, obs, alphabet=None):
        self.model, self.obs = generative_model, obs
        self.alphabet = None if alphabet is None else alphabet.unsqueeze(0)  # [1, L]
        self.primitives = generative_model.get_primitives()  # [K, 5]
        self.library = get_library(self.primitives)
        self.strokes = draw_strokes(generative_model)  # [K, h, w]

    def score(self, codes, map_id=None):
        """log p(z, x) or, given some maps [t], a lower bound: codes [N, A] -> [N]"""
        scores = []
        for latent in unpack(codes).split(scoring.ROWS_AT_ONCE):
            log_prior = self.model.log_prior(latent.unsqueeze(1), self.alphabet).squeeze(1)
            scores.append(log_prior + self.get_log_likelihood(self.model.get_logits(latent), map_id))
        return torch.cat(scores)

    def choose_maps(self, codes, num_maps):
        """The maps that fit some of the programs codes [N, A] best: [num_maps], or None for all maps"""
        maps = self.model.likelihood.maps
        if maps is None or len(maps) <= num_maps:
            return None
        latent = unpack(codes)
        log_posterior = self.model.get_map_log_posterior(latent, self.obs.expand(len(latent), -1, -1))  # [N, T]
        return log_posterior.amax(0).topk(num_maps).indices

    def get_next_log_probs(self, beginning):
        """log p of the next stroke's primitive, and of its ink: beginning [N, k] -> [N, K], [N, 2]"""
        alphabet = None if self.alphabet is None else self.alphabet.expand(len(beginning), -1)
        return self.model.get_next_log_probs(unpack(beginning), alphabet)

    def get_log_likelihood(self, logits, map_id):
        """log p(x | z) or, given some maps [t], a lower bound: logits [N, R, C] -> [N]"""
        some = () if map_id is None else (map_id,)
        return self.model.likelihood.log_prob(logits, self.obs.expand(len(logits), -1, -1), *some)


def draw_strokes(model):
    """Logits of each stroke of the library, drawn from the middle of a page that just holds the longest: [K, 2n + 1, 2m + 1]"""
    primitives, rows, cols = model.get_primitives(), model.num_rows, model.num_cols
    x, y = rendering.get_pixel_centres(2 * rows - 1, 2 * cols - 1, primitives)  # of a page twice as large
    arcs = F.pad(primitives, (2, 0))  # [K, 7], from (0, 0)
    logits = rendering.get_arc_logits(arcs, 2 * x - 1, 2 * y - 1, model.get_rendering_params())
    logits = logits.unflatten(1, (2 * rows - 1, 2 * cols - 1))
    row, col = (logits > FLOOR).any(0).nonzero().unbind(1)
    # At least 3 x 3, since affine_grid warns of single pixels
    n, m = (max([min(1, middle), *(x - middle).abs().tolist()]) for x, middle in ((row, rows - 1), (col, cols - 1)))
    return logits[:, rows - 1 - n : rows + n, cols - 1 - m : cols + m]


# ------------------------------------------------------------------ beam search


def explore(image, codes, effort, is_stopped):
    """Beam searches from nothing: one under each map, or each of those that fit some of the programs codes [N, A] best, then
    wider and wider ones under the maps that led to the best programs. Returns: the old and the new programs, [M, A]"""
    maps, grown = image.model.likelihood.maps, [codes]
    chosen = image.choose_maps(codes, effort.num_maps)
    if chosen is None and maps is not None:
        chosen = torch.arange(len(maps), device=codes.device)
    groups = [None] if chosen is None else chosen.split(1)
    best = torch.full((len(groups),), -math.inf, device=codes.device)
    for widening, share_of_maps, floor, share_alike in STAGES:
        for i in best.topk(math.ceil(len(groups) * share_of_maps)).indices.tolist():
            if is_stopped():
                return torch.cat(grown)
            beam_search = BeamSearch(image, groups[i], floor, share_alike)
            programs = beam_search.grow(codes[:1, :0], effort.width * widening)
            log_joint, index = image.score(programs, groups[i]).topk(min(NUM_BEST, len(programs)))
            best[i] = torch.maximum(best[i], log_joint[0])
            grown.append(programs[index])
    return torch.cat(grown)


class Beam(NamedTuple):
    """The first k strokes of N programs, and what each of K next ones would add"""

    codes: torch.Tensor  # [N, k]
    log_prior: torch.Tensor  # [N]
    log_likelihood: torch.Tensor  # [N]
    logits: torch.Tensor  # [N, R, C]
    place: torch.Tensor  # [N, 2], of the pen
    next_log_prior: torch.Tensor  # [N, 2, K], of each stroke without and with ink
    gain: torch.Tensor  # [N, 2, K], about how much each would raise the log likelihood

    def take(self, index):
        return Beam(*(x[index] for x in self))


class BeamSearch:
    """A stochastic beam search for programs of an image, under some maps [t] (None: under all, if there are any).

    Each step samples some of the strokes that could follow the beam's programs, and keeps those of the longer programs whose
    own best next stroke would lead to the highest score. In all but a share of the beam, of programs that end at about the
    same place with about the same log likelihood, only the best is kept. A pixel of ink that is not drawn costs about -floor
    nats.
    """

    def __init__(self, image, map_id, floor, share_alike):
        self.image, self.map_id, self.floor, self.share_alike = image, map_id, floor, share_alike
        ink = image.obs.to(image.strokes.dtype)
        self.seen = torch.stack([ink, 1 - ink])  # [2, R, C]
        maps = image.model.likelihood.maps
        if maps is not None:  # back to where the drawing has them
            maps = maps if map_id is None else maps[map_id]
            index, weight = rendering.get_taps(maps, *ink.shape)  # [4, t, R * C]
            taps = weight / len(maps) * self.seen.flatten(1)[:, None, None]  # [2, 4, t, R * C]
            self.seen = torch.zeros_like(self.seen).flatten(1).index_add(1, index.flatten(), taps.flatten(1)).view_as(self.seen)
        strokes, paper = image.strokes.clamp(min=self.floor), image.strokes.new_tensor(self.floor)
        gains = [F.logsigmoid(sign * strokes) - F.logsigmoid(sign * paper) for sign in (1, -1)]  # per pixel of ink, of paper
        self.pixel_gains = torch.stack(gains, 1).flatten(1).t().contiguous()  # [2 * h * w, K]
        self.most_paper = (-paper).sigmoid()
        self.least_paper = (-strokes.max().clamp(min=self.floor + 1)).sigmoid()  # less than the most, also if strokes are faint

    def grow(self, beginning, width):
        """Continues programs to their end: beginning [N, k] -> [at most width, A]"""
        beam = self.begin(beginning)
        for length in range(beginning.shape[1], self.image.model.num_arcs):
            is_last = length == self.image.model.num_arcs - 1
            num = math.ceil(NUM_SCORED * width)
            num_on = round(ON_SHARE * num) if length > 0 else 0  # the first stroke leaves no ink
            parts = [self.extend(beam, on, n, is_last) for on, n in enumerate([num - num_on, num_on]) if n > 0]
            codes, log_prior, log_likelihood, logits = (torch.cat(x) for x in zip(*parts, strict=True))
            if is_last:
                return codes[sample(log_prior + log_likelihood, None, width, self.share_alike)]
            beam = self.look_ahead(codes, log_prior, log_likelihood, logits)
            promise = (beam.next_log_prior + beam.gain).flatten(1).amax(1)
            score = log_prior + log_likelihood + promise
            beam = beam.take(sample(score, get_likeness(beam.place, log_likelihood), width, self.share_alike))

    def begin(self, beginning):
        """beginning [N, k] -> Beam"""
        log_prior = self.seen.new_zeros(len(beginning))
        for length, code in enumerate(beginning.unsqueeze(2).unbind(1)):  # [N, 1]
            id_log_prob, on_log_prob = self.image.get_next_log_probs(beginning[:, :length])
            log_prior = log_prior + (id_log_prob.gather(1, code // 2) + on_log_prob.gather(1, code % 2)).squeeze(1)
        codes = F.pad(beginning, (0, self.image.model.num_arcs - beginning.shape[1]))  # 0 leaves no ink
        logits = self.image.model.get_logits(unpack(codes))
        return self.look_ahead(beginning, log_prior, self.get_log_likelihood(logits), logits)

    def extend(self, beam, on, num, is_last):
        """Samples up to num strokes, with ink or without, to follow programs of a beam. Returns: what look_ahead takes"""
        log_prior = (beam.log_prior.unsqueeze(1) + beam.next_log_prior[:, on]).flatten()  # [N * K]
        log_likelihood = (beam.log_likelihood.unsqueeze(1) + beam.gain[:, on]).flatten()
        offset = self.image.library.offset
        likeness = None if is_last else get_likeness((beam.place.unsqueeze(1) + offset).flatten(0, 1), log_likelihood)
        chosen = sample(log_prior + log_likelihood, likeness, num, self.share_alike)
        parent, primitive_id = chosen // len(offset), chosen % len(offset)
        codes = torch.cat([beam.codes[parent], (2 * primitive_id + on).unsqueeze(1)], 1)  # [n, k + 1]
        if not on:
            return codes, log_prior[chosen], beam.log_likelihood[parent], beam.logits[parent]
        arcs = torch.cat([beam.place[parent], self.image.primitives[primitive_id]], 1).unsqueeze(1)  # [n, 1, 7]
        params = self.image.model.get_rendering_params()
        drawn = rendering.get_logits(arcs, torch.ones_like(arcs[..., 0]), params, *self.image.obs.shape)
        logits = torch.maximum(beam.logits[parent], drawn)  # a pixel takes its ink from the strongest arc alone
        return codes, log_prior[chosen], self.get_log_likelihood(logits), logits

    def look_ahead(self, codes, log_prior, log_likelihood, logits):
        """Completes a Beam: codes [N, k], log_prior and log_likelihood [N], logits [N, R, C]"""
        place = 0.5 + self.image.library.offset[codes // 2].sum(1)  # [N, 2]
        id_log_prob, on_log_prob = self.image.get_next_log_probs(codes)
        next_log_prior = on_log_prob.unsqueeze(2) + id_log_prob.unsqueeze(1)  # [N, 2, K]
        gain = F.pad(self.get_gain(logits, place).unsqueeze(1), (0, 0, 1, 0))  # [N, 2, K]
        return Beam(codes, log_prior, log_likelihood, logits, place, next_log_prior, gain)

    def get_gain(self, logits, place):
        """About how much each stroke, from places [N, 2], would raise the log likelihood of drawings [N, R, C]: as if pixels
        were independent, each counting less the darker it is already. Returns: [N, K]"""
        (rows, cols), (height, width) = self.image.obs.shape, self.image.strokes.shape[1:]
        size = place.new_tensor([(width - 1) / max(cols - 1, 1), (height - 1) / max(rows - 1, 1)])  # of the part around a pen
        middle = place * place.new_tensor([2, -2]) + place.new_tensor([-1, 1])  # [N, 2], in affine_grid's coordinates
        theta = torch.cat([size.diag().expand(len(place), 2, 2), middle.unsqueeze(2)], 2)  # [N, 2, 3]
        gains = []
        for some, some_theta in zip(logits.split(PATCHES_AT_ONCE), theta.split(PATCHES_AT_ONCE), strict=True):
            paper = (-some.clamp(min=self.floor)).sigmoid()  # [n, R, C]
            left = (paper - self.least_paper) / (self.most_paper - self.least_paper)  # 1 where nothing is drawn
            grid = F.affine_grid(some_theta, (len(some), 2, height, width), align_corners=True)
            around = F.grid_sample(self.seen * left.unsqueeze(1), grid, align_corners=True)  # [n, 2, h, w]
            gains.append(around.flatten(1) @ self.pixel_gains)
        return torch.cat(gains)

    def get_log_likelihood(self, logits):
        """With the search's floor and maps, in nats: logits [N, R, C] -> [N]"""
        some = logits.split(scoring.ROWS_AT_ONCE)
        return torch.cat([self.image.get_log_likelihood(x.clamp(min=self.floor), self.map_id) for x in some])


def get_likeness(place, log_likelihood):
    """What tells programs apart in a beam: where the pen is [N, 2], and how well they explain the image [N]. Returns: [N, 3],
    integers that are equal for similar programs, on a grid that lies elsewhere each time"""
    position = torch.cat([place / CELL, log_likelihood.unsqueeze(1) / BUCKET], 1)
    return (position + torch.rand_like(position[0])).floor().long()


def sample(scores, likeness, num, share_alike):
    """Samples up to num programs in proportion to exp(scores [N] / BEAM_TEMPERATURE), without replacement. Unless likeness is
    None, those beyond the first share_alike * num have rows of likeness [N, 3] that no better one has. Returns: indices"""
    best = add_gumbel_noise(scores, BEAM_TEMPERATURE).topk(min(3 * num, len(scores))).indices
    if likeness is None:
        return best[:num]
    first = torch.arange(min(round(share_alike * num), len(best)), device=best.device)
    return best[torch.cat([first, find_first(likeness[best])]).unique()[:num]]


def regrow(image, codes, width):
    """Continues beginnings of every length of programs codes [N, A], best first. Returns: the old and the new programs"""
    map_id, grown = image.choose_maps(codes, 1), []
    for length in range(1, image.model.num_arcs - 1):
        beginning = codes[:, :length]
        grown.append(BeamSearch(image, map_id, FLOOR, 0.0).grow(beginning[find_first(beginning)[:width]], width))
    return torch.cat([codes, *grown])


# ------------------------------------------------------------------ evolutionary search


def anneal(image, codes, effort, num_rounds, temperature, num_kept, is_stopped):
    """Improves programs codes [N, A]: each round mutates a population, and selects the next one from old and new programs at a
    temperature in nats that falls to 0. Returns: the best programs seen, [at most num_kept, A], best first"""
    population, log_joint = select(codes, image.score(codes), effort.population)
    best, best_log_joint = population[:num_kept], log_joint[:num_kept]
    for round_id in range(num_rounds):
        if round_id % ROUNDS_PER_CHECK == 0:
            if is_stopped():
                break
            map_id, log_joint = image.choose_maps(population, NUM_MAPS), image.score(population)
        mutants = mutate(population, image.library, effort.num_mutants)  # [M, A]
        scores = image.score(mutants, map_id)
        best, best_log_joint = select(torch.cat([best, mutants]), torch.cat([best_log_joint, scores]), num_kept)
        heat = temperature * (1 - (round_id + 1) / num_rounds)
        codes, scores = torch.cat([population, mutants]), torch.cat([log_joint, scores])
        population, log_joint = select(codes, scores, effort.population, heat)
    return best


def select(codes, log_joint, num, temperature=0.0):
    """Selects the best distinct programs or, at a temperature, samples without replacement with probabilities proportional to
    exp(log_joint / temperature): codes [N, A], log_joint [N] -> [at most num, A], [at most num], best first"""
    first = find_first(codes)
    codes, log_joint = codes[first], log_joint[first]
    noisy = add_gumbel_noise(log_joint, temperature)
    chosen = noisy.topk(min(num, len(noisy))).indices
    chosen = chosen[log_joint[chosen].argsort(descending=True, stable=True)]
    return codes[chosen], log_joint[chosen]


def add_gumbel_noise(scores, temperature):
    """The highest k of the result are a sample without replacement, with probabilities proportional to
    exp(scores / temperature) (Kool et al., 2019)"""
    return scores - temperature * torch.empty_like(scores).exponential_().log() if temperature > 0 else scores


def find_first(codes):
    """Indices of the rows of codes [N, k] that equal no earlier row, in order"""
    return scoring.find_distinct(codes, obs_id=0)[0].sort().values


# ------------------------------------------------------------------ mutations


class Library(NamedTuple):
    """What mutations know about the primitives"""

    offset: torch.Tensor  # [K, 2], by which each moves the pen
    distance: torch.Tensor  # [K, K], squared, of their ends and middles; infinite to itself


def get_library(primitives):
    """primitives [K, 5] -> Library"""
    dx, dy, theta = primitives[:, :3].unbind(1)
    bulge = (theta / 2).tan() / 2  # height of the arc over its chord, in lengths of the chord
    shape = torch.stack([dx, dy, dx / 2 - bulge * dy, dy / 2 + bulge * dx], 1)  # end and middle
    distance = torch.cdist(shape, shape).square() + 1e-4
    return Library(primitives[:, :2], distance.fill_diagonal_(math.inf))


def mutate(population, library, num_mutants):
    """Changes a stroke or two of programs: population [N, A] -> [num_mutants, A]"""
    parents = torch.randint(len(population), (2, num_mutants), device=population.device)
    codes, other = population[parents]  # each [M, A]
    probability = library.offset.new_tensor(list(MUTATIONS.values()))
    kind = probability.multinomial(num_mutants, replacement=True)
    result = codes.clone()
    for i, change in enumerate(MUTATIONS):
        rows = (kind == i).nonzero().squeeze(1)
        result[rows] = change(codes[rows], other[rows], library)
    result[:, 0] -= result[:, 0] % 2  # the first stroke leaves no ink
    return result


# Kinds of mutation: codes [N, A], other [N, A], library -> [N, A]


def _replace(codes, other, library, num=1):
    """Replaces primitives; mostly keeps the pen up or down"""
    place = _draw_places(codes, num)
    new, old = _draw_codes(place, library), codes.gather(1, place)
    keep = torch.rand(place.shape, device=codes.device) < 0.8
    return codes.scatter(1, place, torch.where(keep, new - new % 2 + old % 2, new))


def _alter(codes, other, library, num=1):
    """Replaces primitives by similar ones"""
    place = _draw_places(codes, num)
    old = codes.gather(1, place)
    return codes.scatter(1, place, 2 * _find_near(library.distance[old // 2] ** 1.5) + old % 2)


def _balance(codes, other, library):
    """Replaces a primitive and, to compensate, a second one, so that the pen continues from about the same place"""
    places = _draw_places(codes, 2)
    first, second = places[:, :1], places[:, -1:]
    old_first, old_second = codes.gather(1, first), codes.gather(1, second)
    new = _draw_codes(first, library)
    offset = library.offset[torch.cat([old_first, old_second, new], 1) // 2]  # [N, 3, 2]
    compensating = _find_offset(offset[:, :1] + offset[:, 1:2] - offset[:, 2:], library)
    codes = codes.scatter(1, first, new - new % 2 + old_first % 2)
    return codes.scatter(1, second, 2 * compensating + old_second % 2)


def _lift(codes, other, library):
    """Lifts or lowers the pen"""
    place = _draw_places(codes)
    return codes.scatter(1, place, codes.gather(1, place) ^ 1)


def _insert(codes, other, library):
    place = _draw_places(codes)
    return _make_room(codes, place).scatter(1, place, _draw_codes(place, library))


def _remove(codes, other, library):
    return _close_gap(codes, _draw_places(codes))


def _split(codes, other, library):
    """Replaces one stroke by two that lead to about the same point"""
    place, following = _draw_neighbours(codes)
    old, first = codes.gather(1, place), _draw_codes(place, library) // 2
    second = _find_offset(library.offset[old // 2] - library.offset[first], library)
    codes = _make_room(codes, place).scatter(1, place, 2 * first + old % 2)
    return codes.scatter(1, following, 2 * second + old % 2)


def _merge(codes, other, library):
    """Replaces two strokes by one that leads to about the same point"""
    place, following = _draw_neighbours(codes)
    first, second = codes.gather(1, place), codes.gather(1, following)
    new = _find_offset(library.offset[first // 2] + library.offset[second // 2], library)
    return _close_gap(codes, place).scatter(1, place, 2 * new + second % 2)


def _swap(codes, other, library):
    """Swaps two strokes"""
    places = _draw_places(codes, 2)
    return codes.scatter(1, places, codes.gather(1, places.flip(1)))


def _cross(codes, other, library):
    """Joins the beginning of one program to the end of another where both are at about the same place, and fills the rest with
    invisible strokes"""
    num_arcs = codes.shape[1]
    place, other_place = (F.pad(library.offset[some // 2].cumsum(1), (0, 0, 1, 0)) for some in (codes, other))  # [N, A + 1, 2]
    distance = torch.cdist(place, other_place).square() + 1e-4  # [N, A + 1, A + 1], after i and j strokes
    fits = torch.ones(distance.shape[1:], dtype=torch.bool, device=codes.device).triu()  # i <= j, so that the end has room
    fits[0] = fits[:, -1] = False  # one program would be the whole result
    chosen = _find_near(distance.masked_fill(~fits, math.inf).flatten(1)).unsqueeze(1)  # [N, 1]
    i, j, position = chosen // (num_arcs + 1), chosen % (num_arcs + 1), torch.arange(num_arcs, device=codes.device)
    moved = position - i + j  # [N, A], where the end is in the other program
    end = other.gather(1, moved.clamp(0, num_arcs - 1))
    return torch.where(position < i, codes, torch.where(moved < num_arcs, end, end - end % 2))


# Mutations, and how often each is tried
MUTATIONS = {
    _replace: 0.13, partial(_replace, num=2): 0.06, _alter: 0.14, partial(_alter, num=2): 0.05, _balance: 0.17, _lift: 0.07,
    _insert: 0.07, _remove: 0.07, _split: 0.05, _merge: 0.04, _swap: 0.04, _cross: 0.11,
}  # fmt: skip

# Building blocks of mutations


def _draw_places(codes, num=1):
    """Distinct random positions in each program: [N, num], sorted"""
    return torch.rand(codes.shape, device=codes.device).argsort(1)[:, : min(num, codes.shape[1])].sort(1).values


def _draw_neighbours(codes):
    """A random position in each program and the next one: [N, 1], [N, 1]"""
    last = codes.shape[1] - 1
    place = torch.randint(max(last, 1), (len(codes), 1), device=codes.device)
    return place, (place + 1).clamp(max=last)


def _draw_codes(place, library):
    return torch.randint(2 * len(library.offset), place.shape, device=place.device)


def _find_near(distance):
    """Usually, but not always, the nearest: squared distances [..., K] -> [...]"""
    return (distance * torch.empty_like(distance).exponential_()).argmin(-1)


def _find_offset(wanted, library):
    """A primitive that moves the pen by about as much: wanted [..., 2] -> [...]"""
    return _find_near((wanted.unsqueeze(-2) - library.offset).square().sum(-1) + 1e-6)


def _make_room(codes, place):
    """Moves strokes after a place back, and drops the last one"""
    position = torch.arange(codes.shape[1], device=codes.device)
    return codes.gather(1, (position - (position > place).long()).clamp(min=0))


def _close_gap(codes, place):
    """Drops the stroke at a place, moves later ones forward, and fills the last place with an invisible one"""
    position = torch.arange(codes.shape[1], device=codes.device)
    moved = codes.gather(1, (position + (position >= place).long()).clamp(max=codes.shape[1] - 1))
    moved[:, -1] -= moved[:, -1] % 2
    return moved
