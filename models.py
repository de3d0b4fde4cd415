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

import likelihoods
import patches
import rendering
from decoder import Decoder, look_up, pack, sample_categorical, unpack  # noqa: F401
from util import UserError

LIKELIHOODS = ["learned-affine", "affine", "bernoulli"]
NUM_LEARNED_MAPS = 40

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
        self.big_arcs, self.likelihood, self.num_alphabets = big_arcs, likelihood, num_alphabets
        self.prior = Decoder(num_primitives, num_arcs, lstm_hidden_size, num_alphabets, uniform_mixture)

        curve = 1 + (2 * torch.rand(num_primitives) - 1) * initial_max_curve
        pre_theta = curve if big_arcs else torch.logit(0.01 + 0.98 * (curve - 0.5)) / 10
        self.pre_dxdy = nn.Parameter((2 * torch.rand(num_primitives, 2) - 1) * 0.4)
        self.pre_theta = nn.Parameter(pre_theta)
        self.pre_sharpness = nn.Parameter(torch.full((num_primitives,), 20.0))
        self.pre_width = nn.Parameter(torch.full((num_primitives,), -2.0))
        self.pre_rendering_params = nn.Parameter(torch.tensor([3.0, -3.0]))
        if likelihood == "learned-affine":
            identity = torch.eye(3)[:2]
            self.theta_affine = nn.Parameter(identity + 0.03 * torch.randn(NUM_LEARNED_MAPS, 2, 3))
        elif likelihood == "affine":
            self.register_buffer("theta_affine", rendering.get_fixed_maps(), persistent=False)

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

    def log_prior(self, latent, alphabet=None):
        """log p(z): latent [P, B, A, 2], alphabet [B, L] one-hot -> [P, B]"""
        return self.prior.log_prob(latent, self._get_context(latent.shape[1], alphabet))

    def log_likelihood(self, latent, obs):
        """log p(x|z): latent [P, B, A, 2], obs [B, R, C] -> [P, B]"""
        num_particles, batch_size = latent.shape[:2]
        obs_id = torch.arange(batch_size, device=obs.device).repeat(num_particles)
        logits = self.get_logits(latent.flatten(0, 1))  # [P * B, R, C]
        return self.get_likelihood().log_prob(logits, obs.index_select(0, obs_id)).view(num_particles, batch_size)

    def get_likelihood(self):
        """The distribution of an image given the logits of its drawing: Bernoulli or AffineMixture"""
        return likelihoods.AffineMixture(self.theta_affine) if self.has_maps() else likelihoods.Bernoulli()

    def has_maps(self):
        """Whether images are drawings seen through one of T affine maps, `theta_affine` [T, 2, 3]"""
        return self.likelihood != "bernoulli"

    @torch.no_grad()
    def get_map_log_posterior(self, latent, obs):
        """log p(map | x, z), which is proportional to p(x | z, map): latent [N, A, 2], obs [N, R, C] -> [N, T]"""
        return self.get_likelihood().map_log_posterior(self.get_logits(latent), obs)

    def log_prob(self, latent, obs, alphabet=None):
        """log p(z) and log p(x|z), in nats.

        Args: latent [P, B, A, 2]; obs [B, R, C]; alphabet [B, L] one-hot (conditional models only)
        Returns: log_prior [P, B], log_likelihood [P, B]
        Raises: ValueError if a conditional model gets no alphabet, or an unconditional one does
        """
        return self.log_prior(latent, alphabet), self.log_likelihood(latent, obs)

    @torch.no_grad()
    def sample(self, num_samples, alphabet=None):
        """Draws characters: latent [S, A, 2] and obs [S, R, C]. A conditional model
        samples alphabets uniformly unless alphabet [S, L] is given, one row per sample."""
        latent = self.sample_latent(num_samples, alphabet)  # [S, A, 2]
        return latent, self.get_likelihood().sample(self.get_logits(latent))

    @torch.no_grad()
    def sample_latent(self, num_samples, alphabet=None):
        """As `sample`, but only the programs: [S, A, 2]"""
        if alphabet is None and self.num_alphabets:
            alphabet = self.sample_alphabet(num_samples)
        return self.prior.sample(1, self._get_context(num_samples, alphabet))[0]

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
            "a conditional model needs alphabets"
            if num_alphabets
            else "the model is not conditional, but got alphabets"
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

    def __init__(
        self, num_data, num_primitives=64, lstm_hidden_size=128, num_arcs=10, uniform_mixture=0.0, num_alphabets=0
    ):
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

    Returns: GenerativeModel, InferenceNetwork, on the device
    Raises: UserError if its contents are inconsistent
    """
    try:
        built = build(argparse.Namespace(**checkpoint["args"]), checkpoint["num_alphabets"], device)
        for name, model in zip(["generative_model", "inference_network"], built, strict=True):
            model.load_state_dict(checkpoint[name])
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is not of this program's models ({error})") from None
    return built
