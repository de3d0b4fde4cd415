"""The generative model of characters and the networks that infer programs.

A latent is a program of A strokes, an integer tensor [..., A, 2]: the stroke's
primitive (0 to K - 1) and whether the pen is down (1) or up (0). The first
stroke is always up: it carries the pen from the centre to the first point.

Shapes: B images, P particles, A arcs, K primitives, R x C pixels, L alphabets.
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

NUM_LEARNED_MAPS = 40
MAX_SHIFT = 3  # pixels, of the translation likelihood

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
    """Images, or what is known of them, for latents [P, B, A, 2]: [B, ...] as they are, [1, ...] repeated, without copying.
    Raises: ValueError if they are as many as neither"""
    if latent.dim() != 4 or latent.shape[-1] != 2:
        raise ValueError(f"latents have the shape {list(latent.shape)}; expected [particles, images, arcs, 2]")
    if len(obs) not in (1, latent.shape[1]):
        raise ValueError(f"there are {len(obs)} images, but latents, of the shape {list(latent.shape)}, of {latent.shape[1]}")
    return obs.expand(latent.shape[1], *obs.shape[1:])


# ------------------------------------------------------------------ decoder


class Decoder(nn.Module):
    """Autoregressive distribution over latents: an LSTM over strokes.

    Used for the prior (context: the alphabet, if any) and the inference networks
    (context: alphabet and image). Each step's input is the one-hot id and on/off of
    the previous stroke (zeros in the first step), followed by the context.
    """

    def __init__(self, num_primitives, num_arcs, lstm_hidden_size, context_size, uniform_mixture):
        super().__init__()
        self.num_primitives, self.num_arcs = num_primitives, num_arcs
        self.context_size, self.uniform_mixture = context_size, uniform_mixture
        self.lstm = nn.LSTMCell(num_primitives + 2 + context_size, lstm_hidden_size)
        self.linear = nn.Linear(lstm_hidden_size, num_primitives + 2)

    @torch.no_grad()
    def sample(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2]"""
        return self.sample_and_log_prob(num_particles, context)[0]

    def sample_and_log_prob(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2], log_prob [P, B]. Gradients of log_prob come on a GPU alone, where
        nothing is left out, and so what sampling computes can serve them."""
        if gpu.uses_kernels(context, "decoder") and gpu.can_decode(self):
            inputs, shape = (*self._get_inputs(context), *self._get_weights()), (num_particles, len(context))
            latent, log_prob = gpu.sample(*inputs, num_particles, self.num_arcs, self.uniform_mixture)
            return latent.unflatten(0, shape), log_prob.view(shape)
        return self._sample_and_log_prob(num_particles, context)

    @torch.no_grad()
    def _sample_and_log_prob(self, num_particles, context):
        table, context_input = self._get_inputs(context)
        shape = (num_particles, len(context))
        context_input = context_input.repeat(num_particles, 1)  # [P * B, 4 * hidden]
        x, state, latent, log_prob = context_input, None, [], 0
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            id_log_prob, on_log_prob = self._get_log_probs(state[0])  # [P * B, K], [P * B, 2]
            primitive_id = sample_categorical(id_log_prob)  # [P * B, 1]
            log_prob = log_prob + id_log_prob.gather(1, primitive_id)
            if arc_id == 0:
                on = torch.zeros_like(primitive_id)
            else:
                on = sample_categorical(on_log_prob)
                log_prob = log_prob + on_log_prob.gather(1, on)
            latent.append(torch.cat([primitive_id, on], 1))
            x = context_input + F.embedding(2 * primitive_id + on, table).squeeze(1)
        return torch.stack(latent, 1).unflatten(0, shape), log_prob.view(shape)

    @torch.no_grad()
    def resample(self, latent, context, chosen, temperature):
        """Resamples the primitives of chosen strokes, each given the strokes before it, at a temperature.

        Args: latent [N, A, 2]; context [N, H]; chosen [N, A], bool
        Returns: [N, A, 2]
        """
        table, context_input = self._get_inputs(context)
        x, state, latent = context_input, None, latent.clone()
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            log_prob = (self._get_log_probs(state[0])[0] / temperature).log_softmax(1)
            new = sample_categorical(log_prob).squeeze(1)
            latent[:, arc_id, 0] = torch.where(chosen[:, arc_id], new, latent[:, arc_id, 0])
            x = context_input + look_up(table, pack(latent[:, arc_id]))
        return latent

    @torch.no_grad()
    def get_next_log_probs(self, beginning, context):
        """The distribution of the stroke that follows the first k (k < A): beginning [N, k, 2], context [N, H] ->
        log-probabilities of its primitive [N, K] and of the pen being up or down [N, 2]"""
        table, x = self._get_inputs(context)
        state, context_input = self._step(x, None), x
        for code in pack(beginning).unbind(1):
            state = self._step(context_input + look_up(table, code), state)
        id_log_prob, on_log_prob = self._get_log_probs(state[0])
        if beginning.shape[1] == 0:  # the first stroke leaves no ink
            on_log_prob = torch.tensor([0.0, -math.inf]).to(on_log_prob).expand_as(on_log_prob)
        return id_log_prob, on_log_prob

    def log_prob(self, latent, context):
        """latent [P, B, A, 2], context [B, H] or [1, H] -> [P, B]"""
        context = match_images(context, latent)
        table, context_input = self._get_inputs(context)
        if gpu.uses_kernels(context, "decoder") and gpu.can_decode(self):
            inputs = table, context_input, *self._get_weights()
            return gpu.log_prob(*inputs, latent.flatten(0, 1), self.uniform_mixture).view(latent.shape[:2])
        codes = pack(latent.flatten(0, 1))  # [P * B, A]
        context_input = context_input.repeat(len(latent), 1)  # [P * B, 4 * hidden]
        x, state, hidden = context_input, None, []
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            hidden.append(state[0])
            x = context_input + look_up(table, codes[:, arc_id])
        id_log_prob, on_log_prob = self._get_log_probs(torch.stack(hidden, 1))  # [P * B, A, K or 2]
        id_log_prob = id_log_prob.gather(2, codes.unsqueeze(2) // 2).sum((1, 2))
        on_log_prob = on_log_prob[:, 1:].gather(2, codes[:, 1:].unsqueeze(2) % 2).sum((1, 2))
        return (id_log_prob + on_log_prob).view(latent.shape[:2])

    def _get_inputs(self, context):
        """The LSTM's inputs are one-hot, so a stroke's contribution to the gates is a row of a
        table with a row per id and on/off; the context's contribution is the same for all
        steps and particles: [2 * K, 4 * hidden] and [B, 4 * hidden]."""
        weight = self.lstm.weight_ih.split([self.num_primitives, 2, self.context_size], 1)
        table = weight[0].t().unsqueeze(1) + weight[1].t()  # [K, 2, 4 * hidden]
        return table.flatten(0, 1), F.linear(context, weight[2], self.lstm.bias_ih + self.lstm.bias_hh)

    def _get_weights(self):
        return self.lstm.weight_hh, self.linear.weight, self.linear.bias

    def _step(self, x, state):
        """One step of the LSTM, given its gates' input x [N, 4 * hidden]: hidden and cell state, each [N, hidden]"""
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


def _mix_with_uniform(log_probs, weight):
    if weight == 0:
        return log_probs
    log_uniform = torch.full_like(log_probs, math.log(weight / log_probs.shape[-1]))
    return log_uniform if weight == 1 else torch.logaddexp(log_probs + math.log1p(-weight), log_uniform)


def sample_categorical(log_probs):
    """Draws one sample per row by inverting the distribution function: one random number per
    sample, and on a GPU no synchronisation. log_probs [N, K] -> [N, 1]"""
    cumulative = log_probs.exp().cumsum(1)
    threshold = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(1, keepdim=True).clamp(max=log_probs.shape[1] - 1)


# ------------------------------------------------------------------ likelihoods

# p(x|z) given a drawing. A likelihood is a class: `init` gives the tensors it needs by name, which live in the generative
# model (parameters are learned, others stay as they are), `log_prob` and `sample` use them, and `maps` are the T affine
# maps through one of which it sees drawings, [T, 2, 3], for pictures to show, or None.


class Bernoulli:
    """Independent pixels; of a grey image, as the mean over images whose pixels are 1 with that probability"""

    maps = None

    @staticmethod
    def init():
        return {}

    def log_prob(self, logits, obs):
        """logits, obs [N, R, C] in [0, 1] -> [N], nats"""
        _check_values(obs, lambda x: (x >= 0) & (x <= 1), "outside [0, 1]")
        return -F.binary_cross_entropy_with_logits(logits, obs, reduction="none").flatten(1).sum(1)

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        return _sample_pixels(logits.sigmoid())


class AffineMixture:
    """Independent pixels of the drawing seen through one of T equally probable affine maps

    Args: theta_affine [T, 2, 3]
    """

    def __init__(self, theta_affine):
        self.maps = theta_affine

    def log_prob(self, logits, obs):
        """logits, obs [N, R, C] in {0, 1} -> [N], nats"""
        _check_values(obs, lambda x: (x == 0) | (x == 1), "other than 0 and 1, which this likelihood is not for")
        return rendering.affine_log_prob(logits, obs, self.maps)

    def restrict(self, map_id):
        """The part of the mixture that some maps have: map_id [t] -> a likelihood whose log_prob is a lower bound of this one's
        in a fraction t / T of the time"""
        return PartOfMixture(self.maps[map_id], len(self.maps))

    def map_log_posterior(self, logits, obs):
        """log p(map | x, z): logits, obs [N, R, C] in {0, 1} -> [N, T], nats"""
        _check_values(obs, lambda x: (x == 0) | (x == 1), "other than 0 and 1, which this likelihood is not for")
        return rendering.affine_log_prob_by_map(logits, obs, self.maps).log_softmax(1)

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        map_id = torch.randint(len(self.maps), (len(logits),), device=logits.device)
        return _sample_pixels(rendering.apply_maps(logits.sigmoid(), self.maps[map_id]))


class PartOfMixture(AffineMixture):
    """Some of the terms of a mixture over T maps

    Args: theta_affine [t, 2, 3]; num_maps (T)
    """

    def __init__(self, theta_affine, num_maps):
        super().__init__(theta_affine)
        self.log_share = math.log(len(theta_affine) / num_maps)

    def log_prob(self, logits, obs):
        return super().log_prob(logits, obs) + self.log_share


def _check_values(obs, is_right, what):
    """Raises: ValueError unless all values of images are right; on a GPU, whose steps wait for no value, they are not checked"""
    obs = obs[:1] if obs.stride(0) == 0 else obs  # of many views of one image
    if not gpu.is_gpu(obs.device) and not is_right(obs).all():
        raise ValueError(f"images have values {what}; binarise them")


def _sample_pixels(probs):
    # A model that has diverged shows in its scores; sampling NaN would be a device-side error.
    return torch.bernoulli(probs.nan_to_num())


class LearnedAffine(AffineMixture):
    """Learned maps, which begin near the identity"""

    @staticmethod
    def init():
        return {"theta_affine": nn.Parameter(torch.eye(3)[:2] + 0.03 * torch.randn(NUM_LEARNED_MAPS, 2, 3))}


class FixedAffine(AffineMixture):
    """2187 maps: all combinations of three shears, rotations, scales and translations each"""

    test_run_limits = dict(batch_size=2, num_particles=10, memory_size=10)  # with so many maps, a step takes long

    @staticmethod
    def init():
        return {"theta_affine": rendering.get_fixed_maps()}


class Translation(AffineMixture):
    """All shifts by up to three pixels"""

    @staticmethod
    def init():
        return {"theta_affine": rendering.get_shifts(MAX_SHIFT)}


# The choices of main.py's --likelihood
LIKELIHOODS = {"learned-affine": LearnedAffine, "affine": FixedAffine, "translation": Translation, "bernoulli": Bernoulli}
util.CHOICES["likelihood"] = LIKELIHOODS

# ------------------------------------------------------------------ generative model


class GenerativeModel(nn.Module):
    """p(z) p(x|z): a prior over programs, a library of strokes, a renderer, a likelihood.

    Args: as on main.py's command line; num_alphabets (L): 0 if unconditional
    Raises: ValueError if initial_max_curve > 1/2 (without big_arcs), if the likelihood is unknown
    """

    def __init__(
        self, num_primitives=64, initial_max_curve=0.3, big_arcs=False, lstm_hidden_size=4, num_rows=28,
        num_cols=28, num_arcs=10, likelihood="learned-affine", uniform_mixture=0.0, num_alphabets=0,
    ):  # fmt: skip
        super().__init__()
        if initial_max_curve > 0.5 and not big_arcs:
            raise ValueError(f"initial_max_curve is {initial_max_curve}; without big arcs it is at most 0.5")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; it is one of {', '.join(LIKELIHOODS)}")
        self.num_rows, self.num_cols, self.num_arcs = num_rows, num_cols, num_arcs
        self.big_arcs, self.num_alphabets = big_arcs, num_alphabets
        self.prior = Decoder(num_primitives, num_arcs, lstm_hidden_size, num_alphabets, uniform_mixture)

        curve = 1 + (2 * torch.rand(num_primitives) - 1) * initial_max_curve
        pre_theta = curve if big_arcs else torch.logit(0.01 + 0.98 * (curve - 0.5)) / 10
        self.pre_dxdy = nn.Parameter((2 * torch.rand(num_primitives, 2) - 1) * 0.4)
        self.pre_theta = nn.Parameter(pre_theta)
        self.pre_sharpness = nn.Parameter(torch.full((num_primitives,), 20.0))
        self.pre_width = nn.Parameter(torch.full((num_primitives,), -2.0))
        self.pre_rendering_params = nn.Parameter(torch.tensor([3.0, -3.0]))
        self.likelihood_class = LIKELIHOODS[likelihood]
        tensors = self.likelihood_class.init()
        self.likelihood_names = list(tensors)
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    @property
    def likelihood(self):
        """The distribution of an image given the logits of its drawing, one of LIKELIHOODS"""
        return self.likelihood_class(**{name: getattr(self, name) for name in self.likelihood_names})

    def get_primitives(self):
        """[K, 5]: dx, dy (of the unit square), theta (radians), sharpness, width"""
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
        logits = rendering.get_logits(
            self.get_arcs(flat), flat[..., 1], self.get_rendering_params(), num_rows, num_cols
        )  # [N, R, C]
        return logits.view(*latent.shape[:-2], num_rows, num_cols)

    @torch.no_grad()
    def get_next_logits(self, beginning, primitive_id):
        """Logits of drawings that continue by one stroke, pen down: beginning [N, k, 2], 0 < k < A; primitive_id [N, J], of
        the J strokes that continue each -> [N, J, R, C]"""
        primitives = self.get_primitives()  # [K, 5]
        end = 0.5 + look_up(primitives, beginning[..., 0])[..., :2].sum(1, keepdim=True)  # [N, 1, 2]
        more = torch.cat([end.expand(*primitive_id.shape, 2), look_up(primitives, primitive_id)], 2)  # [N, J, 7]
        return rendering.get_logits_with_one_more(
            self.get_arcs(beginning), beginning[..., 1], more, self.get_rendering_params(), self.num_rows, self.num_cols
        )

    def log_prior(self, latent, alphabet=None):
        """log p(z): latent [P, B, A, 2], alphabet [B, L] one-hot -> [P, B]"""
        return self.prior.log_prob(latent, self._get_context(latent.shape[1], alphabet))

    def log_likelihood(self, latent, obs):
        """log p(x|z): latent [P, B, A, 2], obs [B, R, C], or [1, R, C] for all B -> [P, B]

        Raises: ValueError if their shapes do not fit, or the likelihood is not for such images
        """
        obs = match_images(obs, latent)
        if obs.shape[1:] != (self.num_rows, self.num_cols):
            raise ValueError(f"images have the shape {list(obs.shape)}; the model draws {self.num_rows} x {self.num_cols}")
        logits = self.get_logits(latent.flatten(0, 1))  # [P * B, R, C]
        images = obs.expand(len(latent), *obs.shape).flatten(0, 1)  # [P * B, R, C]
        return self.likelihood.log_prob(logits, images).view(latent.shape[:2])

    @torch.no_grad()
    def get_map_log_posterior(self, latent, obs):
        """log p(map | x, z), which is proportional to p(x | z, map): latent [N, A, 2], obs [N, R, C] -> [N, T]"""
        return self.likelihood.map_log_posterior(self.get_logits(latent), obs)

    def log_prob(self, latent, obs, alphabet=None):
        """log p(z) and log p(x|z), in nats.

        Args: latent [P, B, A, 2]; obs [B, R, C] or [1, R, C]; alphabet [B, L] one-hot (conditional models only)
        Returns: log_prior [P, B], log_likelihood [P, B]
        Raises: ValueError if a conditional model gets no alphabet, or an unconditional one does; and as log_likelihood does
        """
        return self.log_prior(latent, alphabet), self.log_likelihood(latent, obs)

    @torch.no_grad()
    def sample(self, num_samples, alphabet=None):
        """Draws characters: latent [S, A, 2] and obs [S, R, C]. A conditional model
        samples alphabets uniformly unless alphabet [S, L] is given, one row per sample."""
        latent = self.sample_latent(num_samples, alphabet)  # [S, A, 2]
        return latent, self.likelihood.sample(self.get_logits(latent))

    @torch.no_grad()
    def sample_latent(self, num_samples, alphabet=None):
        """As `sample`, but only the programs: [S, A, 2]"""
        if alphabet is None and self.num_alphabets:
            alphabet = self.sample_alphabet(num_samples)
        return self.prior.sample(1, self._get_context(num_samples, alphabet))[0]

    def get_next_log_probs(self, beginning, alphabet=None):
        """The prior of the stroke that follows the first k: beginning [N, k, 2], k < A; alphabet [N, L] one-hot ->
        log-probabilities of its primitive [N, K], and of the pen being up or down [N, 2]"""
        return self.prior.get_next_log_probs(beginning, self._get_context(len(beginning), alphabet))

    def resample(self, latent, chosen, temperature, alphabet=None):
        """Resamples the primitives of chosen strokes from the prior at a temperature: latent [N, A, 2], chosen [N, A]
        bool, alphabet [N, L] one-hot -> [N, A, 2]"""
        return self.prior.resample(latent, self._get_context(len(latent), alphabet), chosen, temperature)

    def sample_alphabet(self, num_samples):
        """Samples alphabets uniformly, one-hot: [S, L]"""
        device = self.pre_theta.device
        alphabet_id = torch.randint(self.num_alphabets, (num_samples,), device=device)
        return F.one_hot(alphabet_id, self.num_alphabets).to(self.pre_theta.dtype)

    def _get_context(self, batch_size, alphabet):
        return _prepend_alphabet(self.pre_theta.new_empty(batch_size, 0), alphabet, self.num_alphabets)


def _prepend_alphabet(context, alphabet, num_alphabets):
    """Puts the alphabet in front of the rest of a decoder's context: [B, L + ...]"""
    if (alphabet is not None) != (num_alphabets > 0):
        raise ValueError(
            "a conditional model needs alphabets" if num_alphabets else "the model is not conditional, but got alphabets"
        )
    if alphabet is None:
        return context
    if alphabet.shape != (len(context), num_alphabets):
        raise ValueError(f"alphabet has the shape {list(alphabet.shape)}, not {[len(context), num_alphabets]}")
    return torch.cat([alphabet.to(context), context], -1)


# ------------------------------------------------------------------ inference networks


class InferenceNetwork(nn.Module):
    """q(z|x): a convolutional network encodes the image, an autoregressive decoder gives the program.

    Raises: ValueError if images are not 28 x 28, the size that the convolutions are made for
    """

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

    def get_context(self, obs, alphabet=None):
        """The decoder's context for each image: [B, L + E]"""
        return _prepend_alphabet(self.embed(obs), alphabet, self.num_alphabets)

    def sample(self, obs, num_particles, alphabet=None):
        """obs [B, R, C], alphabet [B, L] one-hot -> latent [P, B, A, 2]"""
        with torch.no_grad():
            return self.decoder.sample(num_particles, self.get_context(obs, alphabet))

    def log_prob(self, latent, obs, alphabet=None):
        """log q(z|x), in nats: latent [P, B, A, 2], obs [B, R, C] -> [P, B]"""
        return self.decoder.log_prob(latent, self.get_context(obs, alphabet))


class LookupInferenceNetwork(nn.Module):
    """q(z|i): a separate distribution over programs for each of N images. Takes obs_id [B]
    (integers below N) where InferenceNetwork takes obs. Used for evaluation only."""

    def __init__(self, num_data, num_primitives=64, lstm_hidden_size=128, num_arcs=10, uniform_mixture=0.0, num_alphabets=0):
        super().__init__()
        self.num_data, self.num_alphabets = num_data, num_alphabets
        self.decoder = Decoder(num_primitives, num_arcs, lstm_hidden_size, num_alphabets + num_data, uniform_mixture)

    def get_context(self, obs_id, alphabet=None):
        """The decoder's context for each image: [B, L + N]"""
        one_hot = F.one_hot(obs_id, self.num_data).to(self.decoder.linear.weight.dtype)
        return _prepend_alphabet(one_hot, alphabet, self.num_alphabets)

    def sample(self, obs_id, num_particles, alphabet=None):
        """obs_id [B], alphabet [B, L] one-hot -> latent [P, B, A, 2]"""
        return self.decoder.sample(num_particles, self.get_context(obs_id, alphabet))

    def log_prob(self, latent, obs_id, alphabet=None):
        """log q(z|i), in nats: latent [P, B, A, 2], obs_id [B] -> [P, B]"""
        return self.decoder.log_prob(latent, self.get_context(obs_id, alphabet))


# ------------------------------------------------------------------ from arguments


def get_parameter_groups(generative_model, inference_network):
    """The two groups of parameters that an optimiser distinguishes: everything else, and the prior's"""
    prior = list(generative_model.prior.parameters())
    others = [p for name, p in generative_model.named_parameters() if not name.startswith("prior.")]
    return [[*others, *inference_network.parameters()], prior]


def build(args, num_alphabets, device="cpu"):
    """Builds the models of a run, initialised from torch's global random state.

    Args: args: a namespace with main.py's model arguments; num_alphabets: of the
        data, used if args.condition_on_alphabet
    Returns: GenerativeModel, InferenceNetwork, on the device
    """
    num_alphabets = num_alphabets if args.condition_on_alphabet else 0
    shared = dict(num_primitives=args.num_primitives, num_arcs=args.num_arcs, num_alphabets=num_alphabets)
    generative_model = GenerativeModel(
        initial_max_curve=args.initial_max_curve,
        big_arcs=args.big_arcs,
        lstm_hidden_size=args.p_lstm_hidden_size,
        likelihood=args.likelihood,
        uniform_mixture=args.p_uniform_mixture,
        **shared,
    )
    inference_network = InferenceNetwork(
        lstm_hidden_size=args.q_lstm_hidden_size,
        obs_embedding_dim=args.obs_embedding_dim,
        uniform_mixture=args.q_uniform_mixture,
        **shared,
    )
    return generative_model.to(device), inference_network.to(device)


def from_checkpoint(checkpoint, device="cpu"):
    """Builds the models of a checkpoint of main.py, a dict from `util.load_checkpoint`.

    Returns: GenerativeModel, InferenceNetwork, on the device, their parameters fixed (requires_grad is False), so that
        nothing computed with them needs `detach`
    Raises: UserError if its contents are inconsistent
    """
    try:
        built = build(argparse.Namespace(**checkpoint["args"]), checkpoint["num_alphabets"], device)
        for name, model in zip(["generative_model", "inference_network"], built, strict=True):
            model.load_state_dict(checkpoint[name])
            model.requires_grad_(False)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is not of this program's models ({error})") from None
    return built
