"""The objectives: sleep, RWS, VIMCO, TVO and Memoised Wake-Sleep with its memory.

Each takes the models and a batch, and returns a scalar to call `.backward()` on, averaged over the batch, and a dict of
statistics (detached scalars, in nats unless stated otherwise), all of which are recorded.

RWS, VIMCO and TVO are written as in their papers, as losses of two matrices [P, B], log p(z, x) and log q(z|x) of the particles;
`particle_objective` does the rest. docs/changing.md shows how to add an objective.
"""

import functools
import inspect
import math
import numbers
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

import util
from fast import gpu
from models import pack, sample_categorical, unpack
from scoring import can_select, find_distinct, log_mean_weight, needs_gradients, propose, score
from util import Setting

MEMORY_AT_ONCE = 2**26  # bytes, for comparing latents

# ------------------------------------------------------------------ sleep


def sleep(generative_model, inference_network, num_samples=500, alphabet=None):
    """Sleep: -log q(z|x) of characters sampled from the generative model; trains q only.

    Args: alphabet [S, L] one-hot; if None, drawn uniformly for a conditional model
    Returns: loss; statistics {phi_loss}
    """
    if alphabet is None and generative_model.num_alphabets:
        alphabet = generative_model.sample_alphabet(num_samples)
    latent, obs = generative_model.sample(num_samples, alphabet)
    loss = -inference_network.log_prob(latent.unsqueeze(0), obs, alphabet).mean()
    return loss, {"phi_loss": loss.detach()}


def sleep_in_parts(generative_model, inference_network, num_samples, at_once=500):
    """Like `sleep`, at_once samples at a time, so that memory does not grow with their number"""
    parameters = [parameter for parameter in inference_network.parameters() if parameter.requires_grad]
    gradients, loss = [torch.zeros_like(parameter) for parameter in parameters], 0
    for start in range(0, num_samples, at_once):
        num = min(at_once, num_samples - start)
        part = sleep(generative_model, inference_network, num)[0] * (num / num_samples)
        loss = loss + part.detach()
        for total, gradient in zip(gradients, torch.autograd.grad(part, parameters, materialize_grads=True), strict=True):
            total += gradient
    zero = sum((total * (p - p.detach())).sum() for total, p in zip(gradients, parameters, strict=True))
    return loss + zero, {"phi_loss": loss}


def get_num_dreams(batch_size, num_particles):
    """The number of samples of the model in a training step of sleep"""
    return min(500, batch_size * num_particles)


# ------------------------------------------------------------------ objectives of particles


def particle_objective(function):
    """Makes an objective of the models from a loss of the particles' scores.

    Args: function(log_p, log_q, ...) -> loss, statistics: of log p(z, x) and log q(z|x), each [P, B], with gradients, and any
        fields of Step or parts of the state that it names, whose parameters the loss may also depend on directly
    Returns: a function of the models, obs [B, R, C], num_particles, alphabet [B, L] one-hot, obs_id [B] if q is a
        LookupInferenceNetwork, and scorer (`score`, or a faster equivalent) -> loss, statistics
    """
    own = list(inspect.signature(function).parameters)[2:]

    @functools.wraps(function)
    def objective(
        generative_model, inference_network, obs, num_particles=10, alphabet=None, obs_id=None, scorer=score, **others
    ):
        particles = propose(generative_model, inference_network, obs, num_particles, alphabet, obs_id, scorer)
        scores = [x.detach().requires_grad_() for x in (particles.log_p, particles.log_q)]
        available = dict(
            generative_model=generative_model, inference_network=inference_network, obs=obs, num_particles=num_particles,
            alphabet=alphabet, obs_id=obs_id, **others,
        )  # fmt: skip
        loss, statistics = function(*scores, **{name: available[name] for name in own if name in available})
        has_others = depends_on_others(loss, scores)
        gradients = torch.autograd.grad(loss, scores, retain_graph=has_others, materialize_grads=True)  # each [P, B]
        zero = differentiate(generative_model, inference_network, particles, obs, alphabet, *gradients)
        return (loss if has_others else loss.detach()) + zero, tree_map_only(torch.Tensor, torch.Tensor.detach, statistics)

    return objective


def depends_on_others(loss, leaves):
    """Whether a loss has gradients for more than these leaves of its graph. If not, a second backward pass would be wasted"""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and all(variable is not leaf for leaf in leaves):
            return True
        nodes += [other for other, _ in node.next_functions]
    return False


@particle_objective
def rws(log_p, log_q):
    """Reweighted Wake-Sleep: wake-theta and wake-phi updates (Bornschein and Bengio, 2015).
    Statistics: theta_loss, phi_loss, effective_sample_size."""
    log_weight = log_p - log_q.detach()  # [P, B]
    theta_loss = -log_mean_weight(log_weight).mean()
    phi_loss = -(log_weight.detach().softmax(0) * log_q).sum(0).mean()
    size = get_effective_sample_size(log_weight)
    return theta_loss + phi_loss, {"theta_loss": theta_loss, "phi_loss": phi_loss, "effective_sample_size": size}


@particle_objective
def wake_theta(log_p, log_q):
    """The wake-theta half of RWS. Statistics: theta_loss, effective_sample_size."""
    log_weight = log_p - log_q.detach()  # [P, B]
    theta_loss = -log_mean_weight(log_weight).mean()
    return theta_loss, {"theta_loss": theta_loss, "effective_sample_size": get_effective_sample_size(log_weight)}


@particle_objective
def vimco(log_p, log_q):
    """VIMCO: the importance-weighted bound and its score-function gradient with a leave-one-out baseline (Mnih and
    Rezende, 2016). Statistics: theta_loss, phi_loss (the same), effective_sample_size.

    Raises: ValueError if there are fewer than two particles
    """
    if len(log_p) < 2:
        raise ValueError("VIMCO needs at least two particles")
    log_weight = log_p - log_q  # [P, B]
    bound = log_mean_weight(log_weight)  # [B]
    mean_of_others = (log_weight.sum(0) - log_weight) / (len(log_weight) - 1)  # [P, B]
    itself = torch.eye(len(log_weight), dtype=torch.bool, device=log_p.device).unsqueeze(-1)
    bound_without = log_mean_weight(torch.where(itself, mean_of_others, log_weight), dim=1)  # [P, B]
    advantage = (bound - bound_without).detach()
    loss = -(bound + (advantage * log_q).sum(0)).mean()
    theta_loss, size = -bound.mean(), get_effective_sample_size(log_weight)
    return loss, {"theta_loss": theta_loss, "phi_loss": theta_loss, "effective_sample_size": size}


@particle_objective
def tvo(
    log_p,
    log_q,
    num_partitions: Annotated[int, Setting("partitions of the path from q to p", 1, 1000)] = 5,
    log_beta_min: Annotated[float, Setting("log10 of the first partition's end", -10, 0)] = -1.09,
):
    """The thermodynamic variational objective (Masrani, Le and Wood, 2019): log p(x) is the integral over beta in [0, 1]
    of E[log w] under p^beta q^(1 - beta), bounded from below by its left Riemann sum; gradients by the covariance
    estimator (their equation 10). Statistics: theta_loss, phi_loss (the same), effective_sample_size.

    Args: num_partitions: of [0, 1]; log_beta_min: log10 of the first one's end; further ends are log-uniform
    """
    log_weight = log_p - log_q  # [P, B]
    between = torch.logspace(log_beta_min, 0, num_partitions, dtype=log_p.dtype, device=log_p.device)[:-1]
    beta = torch.cat([between.new_zeros(1), between, between.new_ones(1)])  # [partitions + 1]
    weight = (beta[:-1, None, None] * log_weight).softmax(1).detach()  # [partitions, P, B], self-normalised
    expectation = (weight * log_weight).sum(1, keepdim=True)  # [partitions, 1, B]
    log_path = log_q + beta[:-1, None, None] * log_weight  # log p^beta q^(1 - beta), unnormalised
    covariance = (weight * (log_weight - expectation).detach() * log_path).sum(1, keepdim=True)
    widths = beta.diff()[:, None, None]
    theta_loss, size = -(widths * expectation).sum(0).mean(), get_effective_sample_size(log_weight)
    loss = theta_loss - (widths * (covariance - covariance.detach())).sum(0).mean()
    return loss, {"theta_loss": theta_loss, "phi_loss": theta_loss, "effective_sample_size": size}


def get_effective_sample_size(log_weight):
    """1 / sum_k w_k^2 of the normalised weights w_k, mean over images: [P, B] -> scalar between 1 and P"""
    return (1 / log_weight.softmax(0).square().sum(0)).mean()


def wake_sleep(generative_model, inference_network, obs, num_particles=10, alphabet=None, num_dreams=500):
    """RWS with the sleep update of phi, on num_dreams samples of the model"""
    theta_loss, theta_statistics = wake_theta(generative_model, inference_network, obs, num_particles, alphabet)
    phi_loss, phi_statistics = sleep(generative_model, inference_network, num_dreams)
    return theta_loss + phi_loss, {**theta_statistics, **phi_statistics}


# ------------------------------------------------------------------ gradients of scores


def differentiate(generative_model, inference_network, particles, obs, alphabet, grad_log_p, grad_log_q):
    """A scalar that is zero and whose gradient is that of sum(grad_log_p * log p(z, x) + grad_log_q * log q(z|x)), with the
    factors [P, B] held constant.

    Few particles matter, often one per image: on a CPU, only these are scored again, with gradients. On a GPU selecting takes
    longer than computing: `propose` has scored all with gradients, and the backward pass skips those whose factor is zero.
    """
    latent, log_p, log_q, context = particles
    num_particles, batch_size = latent.shape[:2]
    negligible = torch.finfo(grad_log_p.dtype).eps / 2  # too small to change a sum of weights, which is one
    threshold = negligible / batch_size  # factors are weights divided by the batch size; so do not scale a loss by 1e-6 or less
    if can_select(latent):
        obs_id = torch.arange(batch_size).repeat(num_particles)  # [P * B]
        # [1, N, A, 2], [N], [1, N], [1, N]
        latent, obs_id, grad_log_p, grad_log_q = _select_heavy(latent, obs_id, grad_log_p, grad_log_q, threshold)
        log_p, log_q = log_p.detach(), log_q.detach()  # of all particles; the selected ones are scored again
        obs, context = obs[obs_id], context.index_select(0, obs_id)  # [N, R, C], [N, H]
        alphabet = None if alphabet is None else alphabet[obs_id]  # [N, L]
    else:
        grad_log_p = grad_log_p.masked_fill(grad_log_p.abs() <= threshold, 0)  # NaN stays
    log_q = log_q if log_q.requires_grad else inference_network.decoder.log_prob(latent, context)  # [1, N] or [P, B]
    zero = (grad_log_q * (log_q - log_q.detach())).sum()
    if needs_gradients(generative_model):
        log_p = log_p if log_p.requires_grad else sum(generative_model.log_prob(latent, obs, alphabet))
        zero = zero + (grad_log_p * (log_p - log_p.detach())).sum()
    return zero


def _select_heavy(latent, obs_id, grad_log_p, grad_log_q, threshold):
    """The latents that carry weight; equal ones of the same image are merged: latent [P, B, A, 2], obs_id [P * B],
    grad_log_p, grad_log_q [P, B] -> [1, N, A, 2], [N], [1, N], [1, N]"""
    latent = latent.flatten(0, 1)
    chosen, key = find_distinct(pack(latent, torch.int16), obs_id)
    grads = grad_log_p.flatten(), grad_log_q.flatten()
    grad_log_p, grad_log_q = (grad.new_zeros(len(chosen)).index_add(0, key, grad) for grad in grads)
    # NaN counts as heavy, so that it reaches the loss.
    light = (grad_log_p.abs() <= threshold) & (grad_log_q.abs() <= threshold)
    heavy = (~light).nonzero().squeeze(1)  # [N]
    chosen = chosen[heavy]
    return latent[chosen].unsqueeze(0), obs_id[chosen], *(grad[None, heavy] for grad in (grad_log_p, grad_log_q))


# ------------------------------------------------------------------ memoised wake-sleep


def keeps(init_state):
    """Declares the state of an objective: parts that a run keeps for it, saves, restores and passes to it by name.

    Args: init_state(num_data, num_arcs, num_primitives, num_alphabets, own settings ..., whichever it names) -> {name: tensor
        or object with a state_dict}; num_alphabets: 0 if the model is unconditional
    """

    def declare(objective):
        objective.init_state = init_state
        return objective

    return declare


MEMORY_SIZE = Setting("latents remembered per image", 1, 10**5, limit=40)  # for any objective with a memory


def _init_run_memory(num_data, num_arcs, num_primitives, memory_size: Annotated[int, MEMORY_SIZE] = 10):
    return {"memory": init_memory(num_data, memory_size, num_arcs, num_primitives)}


@keeps(_init_run_memory)
def mws(generative_model, inference_network, memory, obs, obs_id, num_particles=10, alphabet=None):
    """Memoised Wake-Sleep: updates the memory in place and trains on a sample from it.

    Args: memory: packed latents [N, M, A] (see `init_memory`) or plain ones [N, M, A, 2]; obs [B, R, C]; obs_id [B]: distinct
        rows of the memory; alphabet [B, L] one-hot
    Returns: loss; statistics {theta_loss, phi_loss, prior_loss, novel_proportion and new_map (shares, 0 to 1)}
    """
    context = inference_network.get_context(obs, alphabet)  # [B, H]
    with torch.no_grad():
        proposal = inference_network.decoder.sample(num_particles, context)  # [P, B, A, 2]
    get_scores = functools.partial(score, generative_model, obs=obs, alphabet=alphabet)
    latent, log_r, statistics = remember(memory, obs_id, proposal, get_scores)  # [1, B, A, 2], [B]
    log_prior, log_likelihood = (x.squeeze(0) for x in generative_model.log_prob(latent, obs, alphabet))
    theta_loss = -(log_prior + log_likelihood - log_r).mean()
    phi_loss = -inference_network.decoder.log_prob(latent, context).mean()
    losses = {"theta_loss": theta_loss, "phi_loss": phi_loss, "prior_loss": -log_prior.mean()}
    return theta_loss + phi_loss, {**{k: v.detach() for k, v in losses.items()}, **statistics}


@torch.no_grad()
def remember(memory, obs_id, proposal, get_scores):
    """Keeps the M best distinct latents of each image's memory and the proposals, and draws one in proportion to p(z, x).

    Args: memory, obs_id: as for `mws`; proposal [P, B, A, 2]; get_scores: a function from latents [M + P, B, A, 2] to their
        log p(z, x), [M + P, B]
    Returns: latent [1, B, A, 2]; log_r [B], log of its probability; statistics {novel_proportion, new_map}
    """
    candidate = get_candidates(memory, obs_id, proposal)  # [M + P, B, A, 2]
    log_joint = get_scores(candidate)  # [M + P, B]
    if gpu.can_remember(memory, len(proposal)) and log_joint.dtype == torch.float32:
        uniform = torch.rand(len(obs_id), device=memory.device)
        latent, log_r, statistics = gpu.remember(memory, obs_id, candidate, log_joint, uniform)
        return latent, log_r, dict(zip(["novel_proportion", "new_map"], statistics.mean(1), strict=True))
    kept, log_joint, statistics = keep_best(memory, obs_id, candidate, log_joint)  # [M, B, A, 2], [M, B]
    log_memory = log_joint.log_softmax(0)  # log r
    drawn = sample_categorical(log_memory.t()).t()  # [1, B]
    log_r = log_memory.gather(0, drawn).squeeze(0)  # [B]
    return kept[drawn[0], torch.arange(len(obs_id), device=obs_id.device)].unsqueeze(0), log_r, statistics


@torch.no_grad()
def update_memory(generative_model, memory, obs, obs_id, proposal, alphabet=None, scorer=score):
    """Like `remember`, but returns all that is kept: latents [M, B, A, 2], best first; their log p(z, x) [M, B]; statistics"""
    candidate = get_candidates(memory, obs_id, proposal)  # [M + P, B, A, 2]
    return keep_best(memory, obs_id, candidate, scorer(generative_model, candidate, obs, alphabet))


def get_candidates(memory, obs_id, proposal):
    """The latents remembered and proposed for each image: [M + P, B, A, 2]"""
    if gpu.can_remember(memory, len(proposal)):
        return gpu.get_candidates(memory, obs_id, proposal)
    remembered = memory[obs_id] if memory.dim() == 4 else unpack(memory[obs_id])  # [B, M, A, 2]
    return torch.cat([remembered.transpose(0, 1).long(), proposal])


def keep_best(memory, obs_id, candidate, log_joint):
    """Updates the memory, given the candidates and their log_joint [M + P, B]. Latents that differ are distinct
    even if they draw the same image. Returns: as `update_memory`"""
    memory_size = memory.shape[1]
    dtype = memory.dtype if memory.dim() == 3 else torch.long
    codes, log_joint = pack(candidate, dtype).transpose(0, 1), log_joint.t()  # [B, M + P, A], [B, M + P]
    repeated = find_repeated(codes)  # [B, M + P]
    distinct = log_joint.masked_fill(repeated, -math.inf)
    best_remembered, best_novel = (x.max(1).values for x in distinct.tensor_split([memory_size], 1))
    kept_log_joint, kept_id = distinct.topk(memory_size, 1)  # [B, M]
    kept = codes.gather(1, kept_id.unsqueeze(-1).expand(-1, -1, codes.shape[2]))  # [B, M, A]
    memory[obs_id] = kept if memory.dim() == 3 else unpack(kept).to(memory.dtype)
    novel_proportion, new_map = (~repeated[:, memory_size:]).float().mean(), (best_novel > best_remembered).float().mean()
    return unpack(kept).transpose(0, 1), kept_log_joint.t(), {"novel_proportion": novel_proportion, "new_map": new_map}


def init_memory(num_data, memory_size=10, num_arcs=10, num_primitives=64):
    """A memory of distinct random latents for each image: ids uniform, on/off fair, the first arc off. If there are fewer than
    memory_size latents, it holds all of them. Returns: [N, M, A], each arc as 2 * id + on/off in one byte (two if K > 128)"""
    dtype = torch.uint8 if num_primitives <= 128 else torch.int16
    num_latents = num_primitives**num_arcs * 2 ** (num_arcs - 1)
    if num_latents <= 2 * memory_size:
        # so few that random draws would keep colliding: choose among all of them
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


# ------------------------------------------------------------------ what a run does with an objective


class Step(NamedTuple):
    """What an objective can take of a training step, by name; it also gets its state, by the names declared with `keeps`"""

    generative_model: torch.nn.Module
    inference_network: torch.nn.Module
    obs: torch.Tensor  # [B, R, C]
    obs_id: torch.Tensor  # indices of the images among the training data: [B]
    alphabet: torch.Tensor | None  # one-hot, if the model is conditional: [B, L]
    num_particles: int  # P
    num_dreams: int  # samples of the model for an update by sleep
    iteration: torch.Tensor  # number done before; a scalar on the device, so that a CUDA graph reads it anew in each step


def init_state(args, num_data, device, num_alphabets=0):
    """The initial state of the objective that a run's arguments choose: {name: part}, on the device. Raises: UserError if a
    part's name is taken"""
    objective = OBJECTIVES[args.algorithm]
    init = util.get_init_state(objective)
    if init is None:
        return {}
    available = {**vars(args), "num_data": num_data, "num_alphabets": num_alphabets, **util.get_fixed(objective)}
    parts = init(**{name: available[name] for name in inspect.signature(init).parameters if name in available})
    for name, part in parts.items():
        if name in {*Step._fields, *util.get_own_settings(args, "algorithm"), "scorer", "optimizer", "pretrain_optimizer"}:
            raise util.UserError(f"{args.algorithm}: its state cannot hold a part called {name}: the name is taken; rename it")
        if torch.is_tensor(part) and part.requires_grad:
            part.data = part.data.to(device)  # in place, so that an optimiser among the parts still has it
    return {name: part.to(device) if hasattr(part, "to") else part for name, part in parts.items()}


def get_parameters(state):
    """The trainable parameters of a state that no optimiser in it trains: a list"""
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    trained = {id(x) for optimizer in optimizers for group in optimizer.param_groups for x in group["params"]}
    parts = [part.parameters() if isinstance(part, torch.nn.Module) else [part] for part in state.values()]
    return [x for part in parts for x in part if torch.is_tensor(x) and x.requires_grad and id(x) not in trained]


def get_loss(args, step, state, **others):
    """The scalar to differentiate and the statistics to record, by the objective that a run's arguments choose.
    Args: step: a Step; state: from `init_state`; others: passed on by name, if the objective takes them"""
    objective = OBJECTIVES[args.algorithm]
    available = {**util.get_own_settings(args, "algorithm"), **step._asdict(), **state, **others}
    fixed = util.get_fixed(objective)
    names = [name for name in _get_names(objective, available) if name in available and name not in fixed]
    loss, statistics = objective(**{name: available[name] for name in names})
    return loss, get_statistics(statistics, step.iteration.device)


def get_statistics(statistics, device):
    """Statistics of an objective or a callback as they are recorded: copies of scalars, on the device, as float32, so that none
    of them changes later. Raises: UserError if one is not a scalar"""
    scalars = []
    for name, value in statistics.items():
        is_scalar = isinstance(value, torch.Tensor | numbers.Real | np.ndarray) and np.ndim(value) == 0
        if not isinstance(name, str) or name == "iteration" or not is_scalar:
            raise util.UserError(f"the statistic {name!r} must be a scalar, and cannot be called iteration")
        if torch.is_tensor(value):
            scalars.append(value.detach().to(device, torch.float32))
        else:  # without a copy to the device, which a CUDA graph could not record
            rounded = torch.tensor(float(value), dtype=torch.float32).item()  # to infinity if it is too large
            scalars.append(torch.full((), rounded, dtype=torch.float32, device=device))
    return dict(zip(statistics, torch.stack(scalars), strict=True)) if scalars else {}


def _get_names(objective, available):
    """The names of an objective's arguments; those available if it takes any. A decorator that passes on whatever it is given
    also takes what the decorated function does, unless that needs something else, as the functions of `particle_objective` do"""
    own, decorated = (inspect.signature(objective, follow_wrapped=follows).parameters for follows in (False, True))
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        return list(own)
    needed = {name for name, parameter in decorated.items() if parameter.default is parameter.empty}  # the name of ** included
    return [*own, *decorated] if needed <= available.keys() else list(available)


OBJECTIVES = {"mws": mws, "rws": rws, "vimco": vimco, "tvo": tvo, "sleep": wake_sleep}  # the choices of --algorithm
util.CHOICES["algorithm"] = OBJECTIVES
