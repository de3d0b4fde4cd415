"""The four objectives: sleep, RWS, VIMCO and Memoised Wake-Sleep.

Each function returns a scalar to call `.backward()` on, averaged over the batch,
and a dict of statistics (detached scalars, in nats unless stated otherwise).

Particles are first scored without gradients. What remains is the gradient of a
weighted sum of log p and log q in which few weights matter: one latent per image
for MWS, the particles of non-negligible weight for RWS and VIMCO. Only these are
scored again, with gradients. (On a GPU selecting takes longer than computing, so
RWS and VIMCO differentiate all particles there.)
"""

import math
from typing import NamedTuple

import torch

import gpu
from gpu import NEGLIGIBLE
from models import pack, sample_categorical, unpack

MEMORY_AT_ONCE = 2**26  # bytes, for comparing latents
ROWS_AT_ONCE = 1024  # latents scored without gradients on a CPU: their images stay in the cache
_scored_at_once = 8192  # the same on a GPU; fewer once its memory has run out

# ------------------------------------------------------------------ scores


@torch.no_grad()
def score(generative_model, latent, obs, alphabet=None):
    """log p(z, x) without gradients; on a CPU, each distinct latent of an image is scored once.

    Args: latent [P, B, A, 2]; obs [B, R, C]; alphabet [B, L] one-hot
    Returns: [P, B]
    """
    num_particles, batch_size = latent.shape[:2]
    if not _can_select(latent):
        return _score_particles(generative_model, latent, obs, alphabet)
    codes, obs_id = pack(latent.flatten(0, 1), torch.int16), torch.arange(batch_size).repeat(num_particles)
    return score_rows(generative_model, codes, obs, alphabet, obs_id).view(num_particles, batch_size)


def _score_particles(generative_model, latent, obs, alphabet):
    """As `score`, a few particles at a time: half as many from then on whenever memory runs out"""
    global _scored_at_once
    log_joint, done = [], 0
    while done < len(latent):
        num_particles = max(_scored_at_once // len(obs), 1)
        try:
            log_joint.append(sum(generative_model.log_prob(latent[done : done + num_particles], obs, alphabet)))
            done += num_particles
        except torch.OutOfMemoryError:
            if num_particles == 1:
                raise
            _scored_at_once = num_particles * len(obs) // 2
            torch.cuda.empty_cache()
    return torch.cat(log_joint)


@torch.no_grad()
def score_rows(generative_model, codes, obs, alphabet, obs_id):
    """As `score`, for packed latents codes [N, A], each with its own image, row obs_id [N] of obs -> [N]"""
    chosen, key = find_distinct(codes, obs_id)  # [D], [N]
    log_joint = []
    for rows in chosen.split(ROWS_AT_ONCE if _can_select(codes) else _scored_at_once):
        latent, images = unpack(codes[rows]).unsqueeze(0), obs_id[rows]  # [1, d, A, 2], [d]
        some_alphabet = None if alphabet is None else alphabet[images]
        log_joint.append(sum(generative_model.log_prob(latent, obs[images], some_alphabet))[0])  # [d]
    return torch.cat(log_joint)[key]


def _can_select(latent):
    """Whether latents may be left out depending on their values. On a GPU the CPU would have to wait to learn how
    many remain, and the step could not be recorded; computing all of them is faster."""
    return not gpu.is_gpu(latent.device)


def find_distinct(codes, obs_id):
    """Finds distinct latents of each image: codes [N, A], obs_id [N] -> chosen [D], a row for each; key [N]: row i
    equals row chosen[key[i]]"""
    distinct, key = get_hash(codes, obs_id).unique(return_inverse=True)
    rows = torch.arange(len(key), device=key.device)
    chosen = torch.empty_like(distinct).scatter_(0, key, rows)
    if not torch.equal(codes[chosen[key]], codes):  # a collision, vanishingly rare
        return rows, rows
    return chosen, key


def get_hash(codes, obs_id):
    """A 64-bit hash of each latent and image: codes [N, A], obs_id [N] -> [N]. Two different
    ones collide with a probability below 1e-17."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (codes.shape[1] + 1,), generator=generator).to(codes.device)
    return (codes * factors[1:]).sum(1) + obs_id * factors[0]


# ------------------------------------------------------------------ sleep


def sleep(generative_model, inference_network, num_samples=500, alphabet=None):
    """Sleep: -log q(z|x) of characters sampled from the generative model; trains q only.

    Args: alphabet [S, L] one-hot; for a conditional model, if None, drawn uniformly
    Returns: loss; statistics {phi_loss}
    """
    if alphabet is None and generative_model.num_alphabets:
        alphabet = generative_model.sample_alphabet(num_samples)
    latent, obs = generative_model.sample(num_samples, alphabet)
    loss = -inference_network.log_prob(latent.unsqueeze(0), obs, alphabet).mean()
    return loss, {"phi_loss": loss.detach()}


def get_num_dreams(batch_size, num_particles):
    """The number of dreams in a step of sleep, given the batch size and number of particles of the algorithm"""
    return min(500, batch_size * num_particles)


# ------------------------------------------------------------------ importance-weighted


class Particles(NamedTuple):
    """P programs for each of B images, drawn from the inference network, and their scores, without gradients"""

    latent: torch.Tensor  # [P, B, A, 2]
    log_p: torch.Tensor  # log p(z, x): [P, B]
    log_q: torch.Tensor  # log q(z|x): [P, B]
    context: torch.Tensor  # the network's encoding of the images, with gradients: [B, H]


def propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer):
    """Draws Particles. Arguments as for `rws`."""
    context = inference_network.get_context(obs if obs_id is None else obs_id, alphabet)
    with torch.no_grad():
        latent, log_q = inference_network.decoder.sample_and_log_prob(num_particles, context)
        return Particles(latent, scorer(generative_model, latent, obs, alphabet), log_q, context)


def rws(generative_model, inference_network, obs, num_particles=10, alphabet=None, obs_id=None, scorer=score):
    """Reweighted Wake-Sleep: wake-theta and wake-phi updates (Bornschein and Bengio, 2015).

    Args: obs [B, R, C]; alphabet [B, L] one-hot; obs_id [B] if q is a LookupInferenceNetwork;
        scorer: `score`, or a faster equivalent
    Returns: loss; statistics {theta_loss, phi_loss}
    """
    particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer)
    loss, grad_log_p, grad_log_q, statistics = rws_objective(particles.log_p, particles.log_q)
    zero = differentiate(generative_model, inference_network, particles, obs, alphabet, grad_log_p, grad_log_q)
    return loss + zero, statistics


def rws_objective(log_p, log_q):
    """log_p, log_q [P, B] -> loss, its gradients for log_p and log_q (each [P, B]), statistics"""
    theta_loss, grad_log_p, _, statistics = wake_theta_objective(log_p, log_q)
    phi_loss = (grad_log_p * log_q).sum()  # the gradient is -normalised weight / B for both
    return theta_loss + phi_loss, grad_log_p, grad_log_p, {**statistics, "phi_loss": phi_loss}


def wake_theta_objective(log_p, log_q):
    """As `rws_objective`, for the wake-theta half alone"""
    log_weight = log_p - log_q
    loss = -log_mean_weight(log_weight).mean()
    grad_log_p = -log_weight.softmax(0) / log_weight.shape[1]
    return loss, grad_log_p, torch.zeros_like(grad_log_p), {"theta_loss": loss}


def vimco(generative_model, inference_network, obs, num_particles=10, alphabet=None, obs_id=None, scorer=score):
    """VIMCO (Mnih and Rezende, 2016): the IWAE bound, its score-function gradient
    with a leave-one-out baseline. Arguments and results as for `rws`.

    Raises: ValueError if there are fewer than two particles
    """
    particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer)
    loss, grad_log_p, grad_log_q, statistics = vimco_objective(particles.log_p, particles.log_q)
    zero = differentiate(generative_model, inference_network, particles, obs, alphabet, grad_log_p, grad_log_q)
    return loss + zero, statistics


def vimco_objective(log_p, log_q):
    """As `rws_objective`, for VIMCO. Raises: ValueError if P < 2"""
    num_particles, batch_size = log_p.shape
    if num_particles < 2:
        raise ValueError("VIMCO needs at least two particles")
    log_weight = log_p - log_q
    bound = log_mean_weight(log_weight)  # [B]
    mean_of_others = (log_weight.sum(0) - log_weight) / (num_particles - 1)  # [P, B]
    itself = torch.eye(num_particles, dtype=torch.bool, device=log_p.device).unsqueeze(-1)
    bound_without = log_mean_weight(torch.where(itself, mean_of_others, log_weight), dim=1)  # [P, B]
    advantage = bound - bound_without
    theta_loss = -bound.mean()
    loss = theta_loss - (advantage * log_q).sum(0).mean()
    weight = log_weight.softmax(0)
    statistics = {"theta_loss": theta_loss, "phi_loss": theta_loss}
    return loss, -weight / batch_size, (weight - advantage) / batch_size, statistics


def wake_sleep(generative_model, inference_network, obs, num_particles=10, alphabet=None, num_dreams=500):
    """RWS with the sleep update of phi, on num_dreams samples of the model. Other arguments and results as for `rws`."""
    theta_loss, theta_statistics = wake_theta(generative_model, inference_network, obs, num_particles, alphabet)
    phi_loss, phi_statistics = sleep(generative_model, inference_network, num_dreams)
    return theta_loss + phi_loss, {**theta_statistics, **phi_statistics}


def wake_theta(generative_model, inference_network, obs, num_particles=10, alphabet=None, obs_id=None):
    """The theta half of RWS. Arguments as for `rws`; statistics {theta_loss}."""
    particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, score)
    loss, grad_log_p, grad_log_q, statistics = wake_theta_objective(particles.log_p, particles.log_q)
    zero = differentiate(generative_model, inference_network, particles, obs, alphabet, grad_log_p, grad_log_q)
    return loss + zero, statistics


def log_mean_weight(log_weight, dim=0):
    """log (1/P) sum_k w_k: the IWAE bound"""
    return log_weight.logsumexp(dim) - math.log(log_weight.shape[dim])


@torch.no_grad()
def get_log_weight(generative_model, inference_network, obs, num_particles, alphabet=None, obs_id=None, scorer=score):
    """log w = log p(z, x) - log q(z|x) of samples from q, without gradients: [P, B].
    Arguments as for `rws`."""
    particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer)
    return particles.log_p - particles.log_q


# ------------------------------------------------------------------ gradients of scores


def differentiate(generative_model, inference_network, particles, obs, alphabet, grad_log_p, grad_log_q):
    """A scalar that is zero and whose gradient is that of
    sum(grad_log_p * log p(z, x) + grad_log_q * log q(z|x)), with the factors [P, B] held constant.
    """
    latent, context = particles.latent, particles.context
    num_particles, batch_size = latent.shape[:2]
    if _can_select(latent):
        obs_id = torch.arange(batch_size).repeat(num_particles)  # [P * B]
        # The factors are weights divided by the batch size.
        latent, obs_id, grad_log_p, grad_log_q = _select_heavy(
            latent, obs_id, grad_log_p, grad_log_q, NEGLIGIBLE / batch_size
        )  # [1, N, A, 2], [N], [1, N], [1, N]
        obs, context = obs[obs_id], context.index_select(0, obs_id)  # [N, R, C], [N, H]
        alphabet = None if alphabet is None else alphabet[obs_id]  # [N, L]
    log_q = inference_network.decoder.log_prob(latent, context)  # [1, N], or [P, B] again
    zero = (grad_log_q * (log_q - log_q.detach())).sum()
    if any(parameter.requires_grad for parameter in generative_model.parameters()):
        log_p = sum(generative_model.log_prob(latent, obs, alphabet))
        zero = zero + (grad_log_p * (log_p - log_p.detach())).sum()
    return zero


def _select_heavy(latent, obs_id, grad_log_p, grad_log_q, threshold):
    """The latents that carry weight; equal ones of the same image are merged: latent [P, B, A, 2], obs_id [P * B],
    grad_log_p, grad_log_q [P, B] -> [1, N, A, 2], [N], [1, N], [1, N]"""
    latent = latent.flatten(0, 1)
    chosen, key = find_distinct(pack(latent, torch.int16), obs_id)
    grad_log_p, grad_log_q = (
        grad.new_zeros(len(chosen)).index_add(0, key, grad.flatten()) for grad in (grad_log_p, grad_log_q)
    )
    # NaN counts as heavy, so that it reaches the loss.
    light = (grad_log_p.abs() <= threshold) & (grad_log_q.abs() <= threshold)
    heavy = (~light).nonzero().squeeze(1)  # [N]
    chosen = chosen[heavy]
    return latent[chosen].unsqueeze(0), obs_id[chosen], *(grad[None, heavy] for grad in (grad_log_p, grad_log_q))


# ------------------------------------------------------------------ memoised wake-sleep


def mws(generative_model, inference_network, memory, obs, obs_id, num_particles=10, alphabet=None):
    """Memoised Wake-Sleep: updates the memory in place and trains on a sample from it.

    Args:
        memory [N, M, A]: packed latents (see `init_memory`), or plain ones [N, M, A, 2];
            rows obs_id are changed
        obs [B, R, C]; obs_id [B]: distinct rows of the memory; alphabet [B, L] one-hot
    Returns: loss; statistics {theta_loss, phi_loss, prior_loss, novel_proportion and
        new_map (shares, 0 to 1)}
    """
    context = inference_network.get_context(obs, alphabet)  # [B, H]
    with torch.no_grad():
        proposal = inference_network.decoder.sample(num_particles, context)  # [P, B, A, 2]
        kept, log_joint, statistics = update_memory(
            generative_model, memory, obs, obs_id, proposal, alphabet
        )  # [M, B, A, 2], [M, B]
        log_memory = log_joint.log_softmax(0)  # log r
        drawn = sample_categorical(log_memory.t()).t()  # [1, B]
        log_r = log_memory.gather(0, drawn).squeeze(0)  # [B]
        latent = kept[drawn[0], torch.arange(len(obs), device=obs.device)].unsqueeze(0)  # [1, B, A, 2]
    log_prior, log_likelihood = (x.squeeze(0) for x in generative_model.log_prob(latent, obs, alphabet))
    theta_loss = -(log_prior + log_likelihood - log_r).mean()
    phi_loss = -inference_network.decoder.log_prob(latent, context).mean()
    losses = {"theta_loss": theta_loss, "phi_loss": phi_loss, "prior_loss": -log_prior.mean()}
    return theta_loss + phi_loss, {**{k: v.detach() for k, v in losses.items()}, **statistics}


@torch.no_grad()
def update_memory(generative_model, memory, obs, obs_id, proposal, alphabet=None):
    """Keeps, for each image, the M best distinct latents among its memory and the proposals.

    Args: proposal [P, B, A, 2]; the others as for `mws`. Distinct means
        different programs, even if they draw the same image.
    Returns: kept [M, B, A, 2], best first; log_joint [M, B], their log p(z, x);
        statistics {novel_proportion, new_map}
    """
    memory_size = memory.shape[1]
    packed = memory.dim() == 3
    remembered = memory[obs_id] if packed else pack(memory[obs_id], memory.dtype)  # [B, M, A]
    candidate = torch.cat([remembered, pack(proposal, memory.dtype).transpose(0, 1)], 1)  # [B, M + P, A]
    latent = unpack(candidate).transpose(0, 1)  # [M + P, B, A, 2]
    log_joint = score(generative_model, latent, obs, alphabet).t()  # [B, M + P]
    repeated = find_repeated(candidate)  # [B, M + P]
    distinct = log_joint.masked_fill(repeated, -math.inf)
    best_remembered, best_novel = (x.max(1).values for x in distinct.split([memory_size, len(proposal)], 1))
    kept_log_joint, kept_id = distinct.topk(memory_size, 1)  # [B, M]
    kept = candidate.gather(1, kept_id.unsqueeze(-1).expand(-1, -1, candidate.shape[2]))  # [B, M, A]
    memory[obs_id] = kept if packed else unpack(kept).to(memory.dtype)
    statistics = {
        "novel_proportion": (~repeated[:, memory_size:]).float().mean(),
        "new_map": (best_novel > best_remembered).float().mean(),
    }
    return unpack(kept).transpose(0, 1), kept_log_joint.t(), statistics


def init_memory(num_data, memory_size=10, num_arcs=10, num_primitives=64):
    """A memory of distinct random latents for each image: ids uniform, on/off fair,
    the first arc off. If there are fewer than memory_size latents, it holds all of them.

    Returns: [N, M, A], each arc as 2 * id + on/off in one byte (two if K > 128)
    """
    dtype = torch.uint8 if num_primitives <= 128 else torch.int16
    num_latents = num_primitives**num_arcs * 2 ** (num_arcs - 1)
    if num_latents <= 2 * memory_size:
        # So few that random draws would keep colliding: choose from the list of all.
        codes = [torch.arange(0, 2 * num_primitives, 2)] + [torch.arange(2 * num_primitives)] * (num_arcs - 1)
        every = torch.cartesian_prod(*codes).view(-1, num_arcs).to(dtype)
        chosen = torch.rand(num_data, num_latents).argsort(1)[:, :memory_size]
        return every[chosen]
    memory = _random_codes((num_data, memory_size, num_arcs), num_primitives, dtype)
    while True:
        parts = memory.split(max(MEMORY_AT_ONCE // (memory_size**2 * num_arcs), 1))
        repeated = torch.cat([find_repeated(part) for part in parts])  # [N, M]
        if not repeated.any():
            return memory
        memory[repeated] = _random_codes((int(repeated.sum()), num_arcs), num_primitives, dtype)


def find_repeated(codes):
    """Which latents of an image equal an earlier one: [N, M, A] -> [N, M]"""
    return (codes.unsqueeze(1) == codes.unsqueeze(2)).all(-1).tril(-1).any(-1)


def _random_codes(shape, num_primitives, dtype):
    codes = torch.randint(2 * num_primitives, shape, dtype=dtype)
    codes[..., 0] -= codes[..., 0] % 2
    return codes


# The choices of main.py's --algorithm
OBJECTIVES = {"mws": mws, "rws": rws, "vimco": vimco, "sleep": wake_sleep}
