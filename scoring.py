"""log p(z, x) of many latents, computing each distinct one once.

Objectives use `score`. `ScoreTable` remembers scores under a fixed generative model: latents are discrete, so an
inference network samples the same ones again and again as it gets sharper. In the end the table also gives a lower bound
without variance: log p(x) >= log sum p(z, x) over the distinct latents in it.
"""

import functools
import math
from typing import NamedTuple

import torch

from fast import gpu
from models import LookupInferenceNetwork, match_images, pack, unpack

ROWS_AT_ONCE = 1024  # latents scored at a time without gradients on a CPU: their images fit in the cache
CAPACITY = 10_000  # latents kept per image in a table
MAX_RECENT = 100_000  # rows of a table that are sorted anew at every step

# ------------------------------------------------------------------ scores


@torch.no_grad()
def score(generative_model, latent, obs, alphabet=None):
    """log p(z, x) without gradients; on a CPU, each distinct latent of an image is scored once.

    Args: latent [P, B, A, 2]; obs [B, R, C], or [1, R, C] for all B; alphabet [B, L] one-hot
    Returns: [P, B], nats
    Raises: ValueError if their shapes do not fit
    """
    obs = match_images(obs, latent)
    num_particles, batch_size = latent.shape[:2]
    if not can_select(latent):
        return _score_a_few_at_a_time(
            lambda part: sum(generative_model.log_prob(latent[part], obs, alphabet)), num_particles, batch_size, like=latent
        )
    codes, obs_id = pack(latent.flatten(0, 1), torch.int16), torch.arange(batch_size).repeat(num_particles)
    return score_rows(generative_model, codes, obs, alphabet, obs_id).view(num_particles, batch_size)


@torch.no_grad()
def score_rows(generative_model, codes, obs, alphabet, obs_id):
    """Like `score`, for packed latents codes [N, A], each with its own image, row obs_id [N] of obs -> [N]"""
    chosen, key = find_distinct(codes, obs_id)  # [D], [N]

    def score_some(part):
        rows = chosen[part]
        latent, images = unpack(codes[rows]).unsqueeze(0), obs_id[rows]  # [1, d, A, 2], [d]
        some_alphabet = None if alphabet is None else alphabet[images]
        return sum(generative_model.log_prob(latent, obs[images], some_alphabet))[0]  # [d]

    return _score_a_few_at_a_time(score_some, len(chosen), 1, like=codes)[key]


def _score_a_few_at_a_time(score_some, num_rows, num_latents, like):
    """Scores rows of num_latents latents each, by score_some(slice of the rows). Whenever a GPU runs out of memory, half as
    many are scored at a time from then on. like: a tensor on the device"""
    log_joint, done = [], 0
    while done < num_rows or not log_joint:
        at_once = max((ROWS_AT_ONCE if can_select(like) else gpu.kernels.scored_at_once) // num_latents, 1)
        try:
            log_joint.append(score_some(slice(done, done + at_once)))
            done += at_once
        except torch.OutOfMemoryError:
            captures = like.is_cuda and torch.cuda.is_current_stream_capturing()  # which forbids emptying the cache
            if at_once == 1 or captures:
                raise
            gpu.kernels.scored_at_once = at_once * num_latents // 2
            torch.cuda.empty_cache()
    return torch.cat(log_joint)


def can_select(latent):
    """Whether latents may be left out depending on their values. With a GPU, the CPU would have to wait to learn how many
    remain, and the step could not be recorded"""
    return not gpu.is_gpu(latent.device)


def find_distinct(codes, obs_id):
    """The distinct latents of each image: codes [N, A], obs_id [N] -> chosen [D], the first row of each; key [N]: row i equals
    row chosen[key[i]]"""
    distinct, key = get_hash(codes, obs_id).unique(return_inverse=True)
    rows = torch.arange(len(key), device=key.device)
    chosen = torch.full_like(distinct, len(rows)).scatter_reduce(0, key, rows, "amin")
    if not torch.equal(codes[chosen[key]], codes):  # a collision, vanishingly rare
        return rows, rows
    return chosen, key


def get_hash(codes, obs_id):
    """A 64-bit hash of each latent and image: codes [N, A], obs_id [N] -> [N]"""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (codes.shape[1] + 1,), generator=generator).to(codes.device)
    return (codes * factors[1:]).sum(1) + obs_id * factors[0]


# ------------------------------------------------------------------ importance weights


class Particles(NamedTuple):
    """P programs for each of B images, drawn from the inference network, and their scores"""

    latent: torch.Tensor  # [P, B, A, 2]
    log_p: torch.Tensor  # log p(z, x), [P, B]; has gradients where they cost nothing
    log_q: torch.Tensor  # log q(z|x), [P, B]; the same holds
    context: torch.Tensor  # the network's encoding of the images, with gradients: [B, H]


def propose(generative_model, inference_network, obs, num_particles, alphabet=None, obs_id=None, scorer=score):
    """Draws Particles: obs [B, R, C]; alphabet [B, L] one-hot; obs_id [B], used if q is a LookupInferenceNetwork; scorer:
    `score`, or a faster equivalent"""
    known_as = obs_id if isinstance(inference_network, LookupInferenceNetwork) else obs
    context = inference_network.get_context(known_as, alphabet)
    latent, log_q = inference_network.decoder.sample_and_log_prob(num_particles, context)
    if can_select(latent) or not needs_gradients(generative_model):
        log_p = scorer(generative_model, latent, obs, alphabet)
    else:  # all of them will be differentiated
        log_p = sum(generative_model.log_prob(latent, obs, alphabet))
    return Particles(latent, log_p, log_q, context)


def needs_gradients(model):
    """Whether gradients for the model are wanted"""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


def log_mean_weight(log_weight, dim=0):
    """log (1/P) sum_k w_k: the IWAE bound (Burda et al., 2016)"""
    return log_weight.logsumexp(dim) - math.log(log_weight.shape[dim])


@torch.no_grad()
def get_log_weight(generative_model, inference_network, obs, num_particles, alphabet=None, obs_id=None, scorer=score):
    """log w = log p(z, x) - log q(z|x) of samples from q, without gradients: [P, B]. Arguments as for `propose`."""
    particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer)
    return particles.log_p - particles.log_q


# ------------------------------------------------------------------ a table of scores


class Rows(NamedTuple):
    """Latents with their scores; after `merge`, they are distinct and sorted by key"""

    key: torch.Tensor  # [N], 64-bit hash of image and latent
    obs_id: torch.Tensor  # [N], of the image
    codes: torch.Tensor  # [N, A], packed latents
    log_joint: torch.Tensor  # [N], log p(z, x)


def merge(some_rows):
    """Merges a list of Rows, keeping each latent of an image once"""
    rows = Rows(*(torch.cat(columns) for columns in zip(*some_rows, strict=True)))
    key, order = rows.key.sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return Rows(*(column[order[first]] for column in rows))


def keep_best(rows, capacity=CAPACITY):
    """Keeps, for each image, the `capacity` latents with the highest scores"""
    order = rows.log_joint.argsort(descending=True, stable=True)
    obs_id, by_image = rows.obs_id[order].sort(stable=True)
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(obs_id, obs_id)
    kept = order[by_image[rank < capacity]].sort().values
    return Rows(*(column[kept] for column in rows))


def get_enumeration_bound(rows, num_images):
    """log sum_z p(z, x) over each image's latents, in nats: [num_images], -inf for an image without latents"""
    log_joint = rows.log_joint.double()
    highest = log_joint.new_full((num_images,), -torch.inf).scatter_reduce(0, rows.obs_id, log_joint, "amax")
    shifted = (log_joint - highest[rows.obs_id]).exp()
    return highest + torch.zeros_like(highest).index_add(0, rows.obs_id, shifted).log()


class ScoreTable:
    """The best CAPACITY latents of each image and their scores, under one generative model."""

    def __init__(self, num_arcs, device="cpu"):
        empty = torch.empty(0, dtype=torch.long, device=device)
        codes = torch.empty(0, num_arcs, dtype=torch.int16, device=device)
        self.settled = self.recent = Rows(empty, empty, codes, torch.empty(0, device=device))
        self.num_scored = 0

    def score(self, image_id, generative_model, latent, obs, alphabet=None):
        """Like `score`, but looks known scores up, and remembers new ones. image_id [B]: the images' numbers in the table"""
        obs = match_images(obs, latent)
        num_particles, batch_size = latent.shape[:2]
        obs_id = torch.arange(batch_size, device=obs.device).repeat(num_particles)  # [P * B]
        codes = pack(latent.flatten(0, 1), torch.int16)  # [P * B, A]
        dtypes = {parameter.dtype for parameter in generative_model.parameters()}  # the prior's may differ, say
        log_joint = obs.new_empty(len(codes), dtype=functools.reduce(torch.promote_types, dtypes))
        rows = Rows(get_hash(codes, image_id[obs_id]), image_id[obs_id], codes, log_joint)
        known = self._find(rows, self.settled) | self._find(rows, self.recent)
        unknown = (~known).nonzero().squeeze(1)  # [N]
        if len(unknown):
            scores = score_rows(generative_model, codes[unknown], obs, alphabet, obs_id[unknown])
            rows.log_joint[unknown] = scores.to(log_joint.dtype)
            self._add(Rows(*(column[unknown] for column in rows)))
        return rows.log_joint.view(num_particles, batch_size)

    @staticmethod
    def _find(rows, among):
        """Fills in the scores of rows found among others. Returns: which were found, [N]"""
        if not len(among.key):
            return torch.zeros_like(rows.key, dtype=torch.bool)
        at = torch.searchsorted(among.key, rows.key).clamp(max=len(among.key) - 1)
        found = (among.obs_id[at] == rows.obs_id) & (among.codes[at] == rows.codes).all(1)
        rows.log_joint.copy_(torch.where(found, among.log_joint[at], rows.log_joint))
        return found

    def _add(self, rows):
        num_recent = len(self.recent.key)
        self.recent = merge([self.recent, rows])
        self.num_scored += len(self.recent.key) - num_recent
        if len(self.recent.key) > MAX_RECENT:
            self.settle()

    def settle(self):
        """Returns: Rows, the whole table"""
        self.settled = keep_best(merge([self.settled, self.recent]))
        self.recent = Rows(*(column[:0] for column in self.recent))
        return self.settled

    def state_dict(self):
        return {"settled": list(self.settled), "recent": list(self.recent), "num_scored": self.num_scored}

    def load_state_dict(self, state):
        self.settled, self.recent = Rows(*state["settled"]), Rows(*state["recent"])
        self.num_scored = state["num_scored"]
