"""The generative model of characters and the networks that infer programs.

A latent is a program of A strokes, an integer tensor [..., A, 2]: each stroke's primitive (0 to K - 1) and whether the pen
is down (1) or up (0). The pen is always up in the first stroke, which takes it from the centre to the first point.

Shapes: B images, P particles, A arcs, K primitives, R x C pixels, L alphabets, T affine maps; H numbers in a decoder's
context, E in an image's embedding; N, S: any number.
Source: Hewitt, Le and Tenenbaum (2020), section 4.2.
"""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import rendering
import util
from fast import gpu, patches
from util import UserError

# ------------------------------------------------------------------ latents as codes


def look_up(table, index):
    """table [K, D], index [...] -> [..., D]"""
    return gpu.Lookup.apply(table, index) if gpu.is_gpu(table.device) else F.embedding(index, table)


def pack(latent, dtype=torch.long):
    """[..., A, 2] -> [..., A], one code per stroke: 2 * id + on/off"""
    return (2 * latent[..., 0] + latent[..., 1]).to(dtype)


def unpack(codes):
    """[..., A] -> [..., A, 2]"""
    codes = codes.long()
    return torch.stack([codes // 2, codes % 2], -1)


def match_images(obs, latent):
    """Expands images, or anything with a row per image, to match latents [P, B, A, 2]: a single row is repeated, without
    copying. Raises: ValueError if there are neither 1 nor B rows"""
    if latent.dim() != 4 or latent.shape[-1] != 2 or len(obs) not in (1, latent.shape[1]):
        raise ValueError(f"latents have the shape {list(latent.shape)}; expected [particles, {len(obs)} images, arcs, 2]")
    return obs.expand(latent.shape[1], *obs.shape[1:])


# ------------------------------------------------------------------ decoder


class Decoder(nn.Module):
    """Autoregressive distribution over latents: an LSTM over strokes.

    Used for the prior (context: the alphabet, if any) and the inference networks (context: alphabet and image). A step's
    input is the previous stroke's one-hot id and on/off (zeros in the first step), followed by the context.

    To change all of them, change this class. For a cell other than an LSTM, override `_step`, which reads the weights of `lstm`
    without calling it. To change the prior alone, make `GenerativeModel.prior` any nn.Module with `sample(num_particles,
    context)` and `log_prob(latent, context)` as below. Its `get_next_log_probs` and `complete` are used as well, if it has them
    (in a subclass of this one, they must be changed along with the other two): the first tells the search which strokes to try.

    On a GPU, the kernels of fast/triton_decoder.py compute the same steps, except for a subclass with its own `_get_inputs`,
    `_step` or `_get_log_probs`, or another cell (see `has_kernels`). If you edit these here, make `has_kernels` return False;
    in case you forget, fast/kernel_check.py compares both before a run.
    """

    def __init__(self, num_primitives, num_arcs, lstm_hidden_size, context_size, uniform_mixture):
        super().__init__()
        self.num_primitives, self.num_arcs = num_primitives, num_arcs
        self.context_size, self.uniform_mixture = context_size, uniform_mixture
        self.lstm = nn.LSTMCell(num_primitives + 2 + context_size, lstm_hidden_size)
        self.linear = nn.Linear(lstm_hidden_size, num_primitives + 2)

    # -------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2]"""
        return self.sample_and_log_prob(num_particles, context)[0]

    def sample_and_log_prob(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2], log_prob [P, B]. log_prob has gradients only if a GPU's
        kernels compute it, since there all particles are differentiated anyway."""
        shape = (num_particles, len(context))
        if self._uses_kernels(context):
            inputs = *self._get_inputs(context), *self._get_weights()
            latent, log_prob = gpu.sample(*inputs, num_particles, self.num_arcs, self.uniform_mixture)
        else:
            with torch.no_grad():
                table, context_input = self._get_inputs(context)
                latent, log_prob = self._draw(table, context_input.repeat(num_particles, 1))
        return latent.unflatten(0, shape), log_prob.view(shape)

    @torch.no_grad()
    def complete(self, beginning, context, temperature=1.0):
        """Continues programs from their first k strokes: beginning [N, k, 2], context [N, H] -> [N, A, 2]. Strokes are more
        typical at temperatures below 1, and more varied above. Raises: ValueError if k > A or the temperature is not positive"""
        if not temperature > 0:
            raise ValueError(f"the temperature is {temperature}; it must be above 0")
        if beginning.shape[1] > self.num_arcs:
            raise ValueError(f"{beginning.shape[1]} strokes are given, but programs have {self.num_arcs}")
        return self._draw(*self._get_inputs(context), beginning.unbind(1), temperature)[0]

    def _draw(self, table, context_input, given=(), temperature=1.0):
        """Draws strokes one after the other; the first few may be given.

        Args: table, context_input [N, 4 * hidden]: see _get_inputs; given: strokes, [N, 2] each
        Returns: latent [N, A, 2]; log_prob [N], of all strokes, at the temperature
        """
        x, state, latent, log_prob = context_input, None, [], 0
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            id_log_prob, on_log_prob = self._get_log_probs(state[0])  # [N, K], [N, 2]
            if temperature != 1:
                id_log_prob, on_log_prob = ((y / temperature).log_softmax(1) for y in (id_log_prob, on_log_prob))
            primitive_id = sample_categorical(id_log_prob)  # [N, 1]
            on = torch.zeros_like(primitive_id) if arc_id == 0 else sample_categorical(on_log_prob)
            stroke = given[arc_id] if arc_id < len(given) else torch.cat([primitive_id, on], 1)
            log_prob = log_prob + id_log_prob.gather(1, stroke[:, :1])
            log_prob = log_prob + on_log_prob.gather(1, stroke[:, 1:]) if arc_id > 0 else log_prob
            latent.append(stroke)
            x = context_input + F.embedding(pack(stroke), table)
        return torch.stack(latent, 1), log_prob.squeeze(1)

    # -------------------------------------------------------------- densities

    def log_prob(self, latent, context):
        """latent [P, B, A, 2], context [B, H] or [1, H] -> [P, B], nats"""
        context = match_images(context, latent)
        table, context_input = self._get_inputs(context)
        if self._uses_kernels(context):
            inputs = table, context_input, *self._get_weights()
            return gpu.log_prob(*inputs, latent.flatten(0, 1), self.uniform_mixture).view(latent.shape[:2])
        codes = pack(latent.flatten(0, 1))  # [P * B, A]
        hidden = self._read(codes[:, :-1], table, context_input.repeat(len(latent), 1))
        id_log_prob, on_log_prob = self._get_log_probs(torch.stack(hidden, 1))  # [P * B, A, K or 2]
        id_log_prob = id_log_prob.gather(2, codes.unsqueeze(2) // 2).sum((1, 2))
        on_log_prob = on_log_prob[:, 1:].gather(2, codes[:, 1:].unsqueeze(2) % 2).sum((1, 2))
        return (id_log_prob + on_log_prob).view(latent.shape[:2])

    def get_next_log_probs(self, beginning, context):
        """The distribution of the stroke that follows the first k (k < A): beginning [N, k, 2], context [N, H] ->
        log-probabilities of its primitive [N, K] and of the pen being up or down [N, 2]"""
        hidden = self._read(pack(beginning), *self._get_inputs(context))
        id_log_prob, on_log_prob = self._get_log_probs(hidden[-1])
        return id_log_prob, forbid_ink(on_log_prob) if beginning.shape[1] == 0 else on_log_prob

    def _read(self, codes, table, context_input):
        """The hidden states before each of the first k + 1 strokes, given the codes of k: [N, k] -> k + 1 of [N, hidden]"""
        state = self._step(context_input, None)
        hidden = [state[0]]
        for code in codes.unbind(1):
            state = self._step(context_input + look_up(table, code), state)
            hidden.append(state[0])
        return hidden

    # -------------------------------------------------------------- a step

    def _get_inputs(self, context):
        """Inputs are one-hot, so a stroke's contribution to the gates is a row of a table, with a row per id and on/off; that
        of the context is the same for all steps and particles: [2 * K, 4 * hidden] and [B, 4 * hidden]"""
        weight = self.lstm.weight_ih.split([self.num_primitives, 2, self.context_size], 1)
        table = weight[0].t().unsqueeze(1) + weight[1].t()  # [K, 2, 4 * hidden]
        return table.flatten(0, 1), F.linear(context, weight[2], self.lstm.bias_ih + self.lstm.bias_hh)

    def _step(self, x, state):
        """One step of the LSTM, given its gates' input x [N, 4 * hidden]: hidden and cell state, each [N, hidden]. Raises:
        TypeError if `lstm` is another cell"""
        if type(self.lstm).forward is not nn.LSTMCell.forward:
            raise TypeError(f"a Decoder computes an LSTM; for another cell ({type(self.lstm).__name__}), override its _step")
        if state is None:
            i, _, g, o = x.chunk(4, 1)
            cell = i.sigmoid() * g.tanh()
        else:
            i, f, g, o = torch.addmm(x, state[0], self.lstm.weight_hh.t()).chunk(4, 1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    def _get_log_probs(self, hidden):
        """[..., hidden] -> ids [..., K] and on/off [..., 2]"""
        logits = self.linear(hidden).split([self.num_primitives, 2], -1)
        return [_mix_with_uniform(x.log_softmax(-1), self.uniform_mixture) for x in logits]

    # -------------------------------------------------------------- kernels

    @property
    def has_kernels(self):
        """Whether the kernels compute the same as this decoder"""
        steps = ["_get_inputs", "_step", "_get_log_probs"]
        is_ours = all(getattr(type(self), name) is getattr(Decoder, name) for name in steps)
        return is_ours and gpu.can_decode(getattr(self, "lstm", None), getattr(self, "linear", None))

    def _uses_kernels(self, context):
        return gpu.kernels.are_used("decoder", context) and self.has_kernels

    def _get_weights(self):
        return self.lstm.weight_hh, self.linear.weight, self.linear.bias


def forbid_ink(on_log_prob):
    """The pen of the first stroke is up: on_log_prob [N, 2] -> log-probabilities of up and down [N, 2]"""
    return on_log_prob.new_tensor([0.0, -math.inf]).expand_as(on_log_prob)


def _mix_with_uniform(log_probs, weight):
    if weight == 0:
        return log_probs
    log_uniform = torch.full_like(log_probs, math.log(weight / log_probs.shape[-1]))
    return log_uniform if weight == 1 else torch.logaddexp(log_probs + math.log1p(-weight), log_uniform)


def sample_categorical(log_probs):
    """One sample per row, by inverting the distribution function, without synchronising: log_probs [N, K] -> [N, 1]"""
    cumulative = log_probs.exp().cumsum(1)
    threshold = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(1, keepdim=True).clamp(max=log_probs.shape[1] - 1)


# ------------------------------------------------------------------ likelihoods


class Likelihood(nn.Module):
    """p(x|z), given the drawing of z.

    To add one, write a class and enter it in LIKELIHOODS. It needs `log_prob` and `sample`, as in `Bernoulli`. Its parameters
    are learned; its settings are keyword arguments of its constructor. If it sees drawings through affine maps, derive it from
    `AffineMixture`, and let `log_prob` take `map_id`, as there, by which a search tries a few maps at a time.
    """

    maps = None  # [T, 2, 3], affine maps, if it sees drawings through one of them

    def sample_maps(self, num):
        """Draws maps: [num, 2, 3], or None if it has none"""
        return None


class Bernoulli(Likelihood):
    """Independent pixels. A grey image, whose pixels are probabilities of ink, gets the expected score of a binary one"""

    def log_prob(self, logits, obs):
        """logits [N, R, C], obs [N, R, C] in [0, 1] -> [N], nats"""
        _check_values(obs, lambda x: (x >= 0) & (x <= 1), "outside [0, 1]")
        obs = obs.to(logits.dtype)
        return -F.binary_cross_entropy_with_logits(logits, obs, reduction="none").flatten(1).sum(1)

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        return _sample_pixels(logits.sigmoid())


class AffineMixture(Likelihood):
    """Independent pixels, given the drawing seen through one of T affine maps. These are equally probable unless a subclass
    overrides `get_log_weights`.

    Args: theta_affine [T, 2, 3]: a parameter, or a tensor that stays fixed
    """

    def __init__(self, theta_affine):
        super().__init__()
        if isinstance(theta_affine, nn.Parameter):
            self.theta_affine = theta_affine
        else:
            self.register_buffer("theta_affine", theta_affine, persistent=False)

    @property
    def maps(self):
        return self.theta_affine

    def get_log_weights(self):
        """log p(map), [T], in nats; None stands for equal weights"""
        return None

    def log_prob(self, logits, obs, map_id=None):
        """logits [N, R, C], obs [N, R, C] in {0, 1}, for which there are no gradients -> [N], nats; if map_id [t] is given, from
        the terms of these maps alone: a lower bound, in t / T of the time"""
        _check_binary(obs)
        maps, log_weights = self.maps, self.get_log_weights()
        if map_id is None:
            return rendering.affine_log_prob(logits, obs, maps, log_weights)
        if log_weights is not None:
            return rendering.affine_log_prob(logits, obs, maps[map_id], log_weights[map_id])
        return rendering.affine_log_prob(logits, obs, maps[map_id]) + math.log(len(map_id) / len(maps))

    def map_log_posterior(self, logits, obs):
        """log p(map | x, z): logits [N, R, C], obs [N, R, C] in {0, 1} -> [N, T], nats"""
        _check_binary(obs)
        by_map, log_weights = rendering.affine_log_prob_by_map(logits, obs, self.maps), self.get_log_weights()
        return (by_map if log_weights is None else by_map + log_weights).log_softmax(1)

    def sample_maps(self, num):
        log_weights = self.get_log_weights()
        if log_weights is None:
            return self.maps[torch.randint(len(self.maps), (num,), device=self.maps.device)]
        return self.maps[sample_categorical(log_weights.expand(num, -1)).squeeze(1)]

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        return _sample_pixels(rendering.apply_maps(logits.sigmoid(), self.sample_maps(len(logits))))


def _check_binary(obs):
    _check_values(obs, lambda x: (x == 0) | (x == 1), "other than 0 and 1")


def _check_values(obs, is_right, what):
    """Raises: ValueError if images have other values. Not checked on a GPU, where a step would have to wait for the result"""
    obs = obs[:1] if obs.stride(0) == 0 else obs  # many views of one image
    if not gpu.is_gpu(obs.device) and not is_right(obs).all():
        raise ValueError(f"images have values {what}; binarise them")


def _sample_pixels(probs):
    # Scores show that a model has diverged; sampling from NaN would be a device-side error.
    return torch.bernoulli(probs.nan_to_num())


class LearnedAffine(AffineMixture):
    """Learned maps, initialised near the identity"""

    def __init__(self, num_maps=40):
        super().__init__(nn.Parameter(torch.eye(3)[:2] + 0.03 * torch.randn(num_maps, 2, 3)))


class FixedAffine(AffineMixture):
    """2187 maps: all combinations of three values each of seven numbers (rendering.get_fixed_maps)"""

    test_run_limits = dict(batch_size=2, num_particles=10, memory_size=10)  # with so many maps, a step takes long

    def __init__(self):
        super().__init__(rendering.get_fixed_maps())


class Translation(AffineMixture):
    """All shifts by up to max_shift pixels of 28"""

    def __init__(self, max_shift=3):
        super().__init__(rendering.get_shifts(max_shift))


# The choices of main.py's --likelihood
LIKELIHOODS = {"learned-affine": LearnedAffine, "affine": FixedAffine, "translation": Translation, "bernoulli": Bernoulli}
util.CHOICES["likelihood"] = LIKELIHOODS


# ------------------------------------------------------------------ generative model


class GenerativeModel(nn.Module):
    """p(z) p(x|z): a prior over programs, a library of strokes, a renderer, a likelihood.

    Args: as on main.py's command line, without the p_; num_rows (R), num_cols (C): of images; num_alphabets (L): 0 if
        unconditional; likelihood_settings: keyword arguments of the likelihood's class
    Raises: ValueError if initial_max_curve > 1/2 without big_arcs, or the likelihood is unknown
    """

    def __init__(
        self, num_primitives=64, initial_max_curve=0.3, big_arcs=False, lstm_hidden_size=4, num_rows=28,
        num_cols=28, num_arcs=10, likelihood="learned-affine", uniform_mixture=0.0, num_alphabets=0,
        likelihood_settings=None,
    ):  # fmt: skip
        super().__init__()
        if initial_max_curve > 0.5 and not big_arcs:
            raise ValueError(f"initial_max_curve is {initial_max_curve}; without big arcs it is at most 0.5")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; it is one of {', '.join(LIKELIHOODS)}")
        self.num_rows, self.num_cols, self.num_arcs, self.num_primitives = num_rows, num_cols, num_arcs, num_primitives
        self.big_arcs, self.num_alphabets = big_arcs, num_alphabets
        self.prior = Decoder(num_primitives, num_arcs, lstm_hidden_size, num_alphabets, uniform_mixture)

        curve = 1 + (2 * torch.rand(num_primitives) - 1) * initial_max_curve
        pre_theta = curve if big_arcs else torch.logit(0.01 + 0.98 * (curve - 0.5)) / 10
        self.pre_dxdy = nn.Parameter((2 * torch.rand(num_primitives, 2) - 1) * 0.4)
        self.pre_theta = nn.Parameter(pre_theta)
        self.pre_sharpness = nn.Parameter(torch.full((num_primitives,), 20.0))
        self.pre_width = nn.Parameter(torch.full((num_primitives,), -2.0))
        self.pre_rendering_params = nn.Parameter(torch.tensor([3.0, -3.0]))
        self.likelihood = LIKELIHOODS[likelihood](**(likelihood_settings or {}))
        if taken := sorted(super().state_dict().keys() & self.likelihood.state_dict().keys()):
            raise UserError(f"the likelihood {likelihood} has a parameter {taken[0]}, as the model has: rename it")
        self.register_state_dict_post_hook(_shorten_names)
        self.register_load_state_dict_pre_hook(_lengthen_names)

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """As in torch, but with the names of state_dict"""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield _shorten(name, f"{prefix}." if prefix else ""), parameter

    def get_primitives(self):
        """[K, 5]: dx, dy (of the unit square), theta (half the angle that the arc spans, radians), sharpness, width"""
        dxdy = 0.66 * self.pre_dxdy.tanh()
        if self.big_arcs:
            theta = (math.pi * self.pre_theta).remainder(2 * math.pi) - math.pi
        else:
            theta = 0.99 * math.pi * ((10 * self.pre_theta).sigmoid() - 0.5)
        width = 0.1 * self.pre_width.sigmoid()
        return torch.cat([dxdy, torch.stack([theta, self.pre_sharpness, width], 1)], 1)

    def get_rendering_params(self):
        """[2]: scale and bias of the ink's logit"""
        scale, bias = self.pre_rendering_params
        return torch.stack([F.softplus(scale), bias])

    def get_arcs(self, latent):
        """latent [..., A, 2] -> arcs [..., A, 7]; each starts where the previous one ended"""
        primitives = look_up(self.get_primitives(), latent[..., 0])  # [..., A, 5]
        end = 0.5 + primitives[..., :2].cumsum(-2)
        start = F.pad(end[..., :-1, :], (0, 0, 1, 0), value=0.5)
        return torch.cat([start, primitives], -1)

    def get_logits(self, latent, num_rows=None, num_cols=None):
        """latent [..., A, 2] -> logits of ink [..., R, C], at the model's resolution or a given one"""
        flat = latent.reshape(-1, *latent.shape[-2:])  # [N, A, 2]
        num_rows, num_cols = num_rows or self.num_rows, num_cols or self.num_cols
        arcs, params = self.get_arcs(flat), self.get_rendering_params()
        logits = rendering.get_logits(arcs, flat[..., 1], params, num_rows, num_cols)  # [N, R, C]
        return logits.view(*latent.shape[:-2], num_rows, num_cols)

    def log_prior(self, latent, alphabet=None):
        """log p(z): latent [P, B, A, 2], alphabet [B, L] one-hot -> [P, B], nats"""
        return self.prior.log_prob(latent, self._get_context(latent.shape[1], alphabet))

    def log_likelihood(self, latent, obs):
        """log p(x|z): latent [P, B, A, 2], obs [B, R, C], or [1, R, C] for all B -> [P, B], nats
        Raises: ValueError if their shapes do not fit, or the likelihood does not support such images"""
        obs = match_images(obs, latent)
        if obs.shape[1:] != (self.num_rows, self.num_cols):
            raise ValueError(f"images have the shape {list(obs.shape)}; the model draws {self.num_rows} x {self.num_cols}")
        logits = self.get_logits(latent.flatten(0, 1))  # [P * B, R, C]
        images = obs.expand(len(latent), *obs.shape).flatten(0, 1)  # [P * B, R, C]
        return self.likelihood.log_prob(logits, images).view(latent.shape[:2])

    @torch.no_grad()
    def get_map_log_posterior(self, latent, obs):
        """log p(map | x, z), in nats, without gradients: latent [N, A, 2], obs [N, R, C] in {0, 1} -> [N, T]"""
        return self.likelihood.map_log_posterior(self.get_logits(latent), obs)

    def log_prob(self, latent, obs, alphabet=None):
        """log p(z) and log p(x|z), in nats.

        Args: latent [P, B, A, 2]; obs [B, R, C] or [1, R, C]; alphabet [B, L] one-hot (conditional models only)
        Returns: log_prior [P, B], log_likelihood [P, B]
        Raises: ValueError as log_likelihood does, or if a conditional model gets no alphabet or an unconditional one gets any
        """
        return self.log_prior(latent, alphabet), self.log_likelihood(latent, obs)

    @torch.no_grad()
    def sample(self, num_samples, alphabet=None):
        """Draws characters: latent [S, A, 2] and obs [S, R, C]. A conditional model draws alphabets uniformly unless
        alphabet [S, L] is given."""
        latent = self.sample_latent(num_samples, alphabet)  # [S, A, 2]
        return latent, self.likelihood.sample(self.get_logits(latent))

    @torch.no_grad()
    def sample_latent(self, num_samples, alphabet=None):
        """Draws programs only, as for `sample`: [S, A, 2]"""
        if alphabet is None and self.num_alphabets:
            alphabet = self.sample_alphabet(num_samples)
        return self.prior.sample(1, self._get_context(num_samples, alphabet))[0]

    def get_next_log_probs(self, beginning, alphabet=None):
        """The prior's Decoder.get_next_log_probs: alphabet [N, L] one-hot. Uniform if the prior has no such method, so that a
        search tries all strokes alike."""
        if hasattr(self.prior, "get_next_log_probs"):
            return self.prior.get_next_log_probs(beginning, self._get_context(len(beginning), alphabet))
        id_log_prob = self.pre_theta.new_full((len(beginning), self.num_primitives), -math.log(self.num_primitives))
        on_log_prob = self.pre_theta.new_full((len(beginning), 2), -math.log(2))
        return id_log_prob, forbid_ink(on_log_prob) if beginning.shape[1] == 0 else on_log_prob

    def complete(self, beginning, temperature=1.0, alphabet=None):
        """The prior's Decoder.complete: beginning [N, k, 2], alphabet [N, L] one-hot -> [N, A, 2]"""
        return self.prior.complete(beginning, self._get_context(len(beginning), alphabet), temperature)

    def sample_alphabet(self, num_samples):
        """Samples alphabets uniformly, one-hot: [S, L]"""
        alphabet_id = torch.randint(self.num_alphabets, (num_samples,), device=self.pre_theta.device)
        return F.one_hot(alphabet_id, self.num_alphabets).to(self.pre_theta.dtype)

    def _get_context(self, batch_size, alphabet):
        return _prepend_alphabet(self.pre_theta.new_empty(batch_size, 0), alphabet, self.num_alphabets)


# Checkpoints hold the likelihood's parameters without a prefix: theta_affine, not likelihood.theta_affine.


def _shorten(name, prefix):
    return prefix + name.removeprefix(prefix).removeprefix("likelihood.")


def _shorten_names(model, state, prefix, _):
    for name in [name for name in state if name.startswith(f"{prefix}likelihood.")]:
        state[_shorten(name, prefix)] = state.pop(name)


def _lengthen_names(model, state, prefix, *_):
    for name in model.likelihood.state_dict():
        if prefix + name in state:
            state[f"{prefix}likelihood.{name}"] = state.pop(prefix + name)


def _prepend_alphabet(context, alphabet, num_alphabets):
    """Prepends the alphabet to the rest of a decoder's context: [B, L + ...]"""
    if alphabet is None and num_alphabets == 0:
        return context
    if alphabet is None or num_alphabets == 0 or alphabet.shape != (len(context), num_alphabets):
        got = "none" if alphabet is None else list(alphabet.shape)
        raise ValueError(f"alphabets of the shape {[len(context), num_alphabets]} are needed, but got {got}")
    return torch.cat([alphabet.to(context), context], -1)


# ------------------------------------------------------------------ inference networks


class _Network(nn.Module):
    """q(z|x): an autoregressive decoder of programs, given the images' embeddings by `embed`. Methods take obs [B, R, C], or
    whatever `embed` takes, and alphabet [B, L] one-hot, if it is conditional. Objectives encode images once, by `get_context`,
    and use `decoder`: to change q, change these."""

    def get_context(self, obs, alphabet=None):
        """The decoder's context for each image: [B, L + E]"""
        return _prepend_alphabet(self.embed(obs), alphabet, self.num_alphabets)

    @torch.no_grad()
    def sample(self, obs, num_particles, alphabet=None):
        """latent [P, B, A, 2]"""
        return self.decoder.sample(num_particles, self.get_context(obs, alphabet))

    def log_prob(self, latent, obs, alphabet=None):
        """log q(z|x), in nats: latent [P, B, A, 2] -> [P, B]"""
        return self.decoder.log_prob(latent, self.get_context(obs, alphabet))


class InferenceNetwork(_Network):
    """Encodes images of 28 x 28 pixels by convolutions. Raises: ValueError if built for others"""

    def __init__(
        self, num_primitives=64, lstm_hidden_size=64, num_rows=28, num_cols=28, num_arcs=10,
        obs_embedding_dim=64, uniform_mixture=0.0, num_alphabets=0,
    ):  # fmt: skip
        super().__init__()
        if (num_rows, num_cols) != (28, 28):
            raise ValueError(f"images are {num_rows} x {num_cols}; the inference network reads 28 x 28")
        self.num_alphabets = num_alphabets
        self.conv0 = nn.Conv2d(1, 64, 3, padding=2)
        self.conv1 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv2 = nn.Conv2d(128, 128, 3)
        self.conv3 = nn.Conv2d(128, obs_embedding_dim, 3)
        context_size = num_alphabets + obs_embedding_dim
        self.decoder = Decoder(num_primitives, num_arcs, lstm_hidden_size, context_size, uniform_mixture)

    def embed(self, obs):
        """obs [B, 28, 28] -> [B, E]"""
        x = patches.convolve(obs, self.conv0, self.conv1)  # [B, 128, 6, 6]
        x = self.conv3(self.conv2(x).relu()).relu()  # [B, E, 2, 2]
        return F.max_pool2d(x, 2, 2).flatten(1)  # [B, E]


class LookupInferenceNetwork(_Network):
    """A separate distribution for each of N images, for evaluation: takes obs_id [B], integers below N, in place of obs"""

    def __init__(self, num_data, num_primitives=64, lstm_hidden_size=128, num_arcs=10, uniform_mixture=0.0, num_alphabets=0):
        super().__init__()
        self.num_data, self.num_alphabets = num_data, num_alphabets
        self.decoder = Decoder(num_primitives, num_arcs, lstm_hidden_size, num_alphabets + num_data, uniform_mixture)

    def embed(self, obs_id):
        """obs_id [B] -> one-hot [B, N]"""
        return F.one_hot(obs_id.long(), self.num_data).to(next(self.decoder.parameters()).dtype)


# ------------------------------------------------------------------ from arguments


def build(args, num_alphabets, device="cpu"):
    """Builds the models of a run, initialised from torch's global random state.

    Args: args: a namespace with main.py's model arguments; num_alphabets: of the
        data, used if args.condition_on_alphabet
    Returns: GenerativeModel, InferenceNetwork, on the device
    """
    num_alphabets = num_alphabets if args.condition_on_alphabet else 0
    generative_model = GenerativeModel(
        num_primitives=args.num_primitives,
        num_arcs=args.num_arcs,
        num_alphabets=num_alphabets,
        initial_max_curve=args.initial_max_curve,
        big_arcs=args.big_arcs,
        lstm_hidden_size=args.p_lstm_hidden_size,
        likelihood=args.likelihood,
        likelihood_settings=util.get_own_settings(args, "likelihood"),
        uniform_mixture=args.p_uniform_mixture,
    )
    inference_network = build_inference_network(args, num_alphabets)
    return generative_model.to(device), inference_network.to(device)


def build_inference_network(args, num_alphabets, **others):
    """Builds an InferenceNetwork. Args: num_alphabets: 0 if unconditional; others: arguments in place of those of a run"""
    of_run = dict(
        num_primitives=args.num_primitives,
        num_arcs=args.num_arcs,
        num_alphabets=num_alphabets,
        lstm_hidden_size=args.q_lstm_hidden_size,
        obs_embedding_dim=args.obs_embedding_dim,
        uniform_mixture=args.q_uniform_mixture,
    )
    return InferenceNetwork(**{**of_run, **others})


def from_checkpoint(checkpoint, device="cpu"):
    """Builds the models of a checkpoint of main.py, a dict from `runs.checkpoints.load`.

    Returns: GenerativeModel, InferenceNetwork, on the device, in evaluation mode, their parameters fixed (requires_grad is
        False)
    Raises: UserError if its contents are inconsistent
    """
    util.warn_of_removed(checkpoint)
    args, num_alphabets = argparse.Namespace(**checkpoint["args"]), checkpoint["num_alphabets"]
    saved = checkpoint["generative_model"], checkpoint["inference_network"]
    try:
        for model, state in zip(_build_without_values(args, num_alphabets, saved), saved, strict=False):
            # Compares sizes before anything is allocated; a parametrisation may keep more elsewhere than on this device
            missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
            if missing:
                raise KeyError(f"missing {missing[0]}")
        models = build(args, num_alphabets, device)
        for model, state in zip(models, saved, strict=True):
            dtypes = {value.dtype for value in state.values() if torch.is_tensor(value) and value.is_floating_point()}
            if len(dtypes) == 1:
                model.to(*dtypes)
            else:  # mixed precision
                for name, value in [*model.named_parameters(), *model.named_buffers()]:
                    value.data = value.data.to(state.get(name, value).dtype)
            model.load_state_dict(state)
            model.eval().requires_grad_(False)
    except Exception as error:  # a foreign file's contents, or a custom model, may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{checkpoint.get('path', 'the checkpoint')} does not make this program's models ({reason})") from error
    return models


def _build_without_values(args, num_alphabets, saved):
    """Like `build`, on the meta device; () if a model cannot be built there, as with NumPy, or if no size is large for the saved
    states"""
    fields = [field.name for field in util.get_fields().values() if field.type is int and field.setting.group == "model"]
    largest = max([num_alphabets, *(getattr(args, name) or 0 for name in fields)])
    if largest**2 <= sum(value.numel() for state in saved for value in state.values() if torch.is_tensor(value)):
        return ()
    try:
        with torch.device("meta"):
            return build(args, num_alphabets, "meta")
    except Exception:  # `build` raises it again if it has nothing to do with the device
        return ()
