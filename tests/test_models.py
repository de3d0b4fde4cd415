"""Models: their draws follow their densities, fast and straightforward computations agree, and what does not fit is refused."""

import functools
import math
from typing import Annotated

import pytest
import test_enumeration
import torch
import torch.nn.functional as F
from conftest import assert_near
from scipy import stats

import losses
import main
import models
import rendering
import scoring
import util
from fast import gpu, reference

K, A = 3, 2


def assert_frequencies(drawn, log_prob):
    """Chi-squared: the ids drawn [S] follow the probabilities exp(log_prob) [Z]."""
    counts = torch.bincount(drawn, minlength=len(log_prob)).double()
    expected = log_prob.double().exp() * len(drawn)
    assert abs(expected.sum() / len(drawn) - 1) < 1e-5
    assert stats.chisquare(counts, expected / expected.sum() * len(drawn)).pvalue > 1e-4  # there are some twenty of these


get_latents = functools.partial(test_enumeration.get_latents, K)


def get_ids(latent):
    """The places of latents among those of get_latents"""
    assert (latent[..., 0, 1] == 0).all()
    return latent[..., 0, 0] * 2 * K + latent[..., 1, 0] * 2 + latent[..., 1, 1]


def sharpen(decoder):
    """Makes a freshly initialised decoder's choices uneven"""
    with torch.no_grad():
        decoder.linear.weight.mul_(4)


@pytest.mark.parametrize("num_alphabets, uniform_mixture", [(0, 0.3), (4, 0)])
def test_prior_draws_follow_its_density(num_alphabets, uniform_mixture):
    model = models.GenerativeModel(
        K, num_arcs=A, likelihood="bernoulli", uniform_mixture=uniform_mixture, num_alphabets=num_alphabets
    )
    sharpen(model.prior)
    alphabet = torch.eye(4)[[2]] if num_alphabets else None
    drawn, _ = model.sample(50000, alphabet.expand(50000, -1) if num_alphabets else None)
    log_prior = model.log_prior(get_latents().unsqueeze(1), alphabet)[:, 0]
    assert_frequencies(get_ids(drawn), log_prior.detach())


@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("num_alphabets", [0, 4])
def test_inference_draws_follow_their_density(lookup, num_alphabets):
    options = dict(num_primitives=K, num_arcs=A, uniform_mixture=0.1, num_alphabets=num_alphabets)
    if lookup:
        network, given = models.LookupInferenceNetwork(5, **options), torch.tensor([3, 0])
    else:
        network, given = models.InferenceNetwork(**options), torch.bernoulli(torch.full((2, 28, 28), 0.3))
    sharpen(network.decoder)
    alphabet = torch.eye(4)[[1, 3]] if num_alphabets else None
    drawn = network.sample(given, 50000, alphabet)
    assert drawn.shape == (50000, 2, A, 2)
    log_q = network.log_prob(get_latents().unsqueeze(1).expand(-1, 2, -1, -1), given, alphabet)
    latent, log_prob = network.decoder.sample_and_log_prob(7, network.get_context(given, alphabet))
    torch.testing.assert_close(log_prob, network.log_prob(latent, given, alphabet))
    for b in range(2):
        assert_frequencies(get_ids(drawn)[:, b], log_q[:, b].detach())


def test_an_unconditioned_draw_takes_alphabets_uniformly():
    model = models.GenerativeModel(K, num_arcs=A, likelihood="bernoulli", num_alphabets=4)
    drawn = model.sample_alphabet(8000)
    assert_frequencies(drawn.argmax(1), torch.full((4,), math.log(1 / 4)))
    assert model.sample(3)[0].shape == (3, A, 2)


@pytest.mark.parametrize("likelihood", models.LIKELIHOODS)
def test_pixels_follow_their_density(likelihood):
    model = models.GenerativeModel(1, num_arcs=A, likelihood=likelihood)  # one primitive: few drawings
    with torch.no_grad():
        model.prior.linear.bias[-1] = 20  # always with ink
        model.pre_rendering_params.copy_(torch.tensor([4.0, -2.0]))
        model.pre_dxdy.copy_(torch.tensor([[0.1, 0.3]]))
        model.pre_width.fill_(1.0)
        if likelihood == "learned-affine":
            model.likelihood.theta_affine.add_(0.1 * torch.randn(40, 2, 3))
    num_samples = 20000
    latent, obs = model.sample(num_samples)
    probs = model.get_logits(latent[:1]).sigmoid()
    if likelihood != "bernoulli":
        by_map = rendering.apply_maps(probs.expand(len(model.likelihood.theta_affine), -1, -1), model.likelihood.theta_affine)
        probs = by_map.mean(0, keepdim=True)
    variance = probs * (1 - probs) / num_samples
    z = (obs.mean(0) - probs[0]) / variance[0].clamp(min=1e-7).sqrt()
    assert z.abs().max() < 5  # 784 pixels: 5 sigma happens once in 2000 runs
    if likelihood == "learned-affine":
        # One map for all pixels of an image: neighbours covary as the maps make them.
        a, b = by_map[:, 1:], by_map[:, :-1]
        expected = (a * b).mean(0) - a.mean(0) * b.mean(0)
        x, y = obs[:, 1:], obs[:, :-1]
        covariance = (x * y).mean(0) - x.mean(0) * y.mean(0)
        assert (covariance - expected).abs().max() < 5 * 0.5 / num_samples**0.5
        assert expected.abs().max() > 0.02


def test_likelihood_is_a_distribution_over_images():
    # Of 2 x 3 pixels all 64 images can be listed.
    model = models.GenerativeModel(K, num_arcs=A, num_rows=2, num_cols=3, likelihood="learned-affine")
    latent = get_latents()[[1, 8, 17]].unsqueeze(0)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1])] * 6).view(-1, 2, 3)
    total = sum(model.log_likelihood(latent, image.expand(3, 2, 3)).exp() for image in images)
    torch.testing.assert_close(total, torch.ones(1, 3))


def test_translation_shifts_whole_pixels():
    """The mixture over shifts, written as rolls of the drawing"""
    model = models.GenerativeModel(likelihood="translation")
    assert not any(name == "theta_affine" for name, _ in model.named_parameters())
    latent, obs = model.sample(5)
    probs = F.pad(model.get_logits(latent).sigmoid(), (3, 3, 3, 3))  # [5, 34, 34]
    eps = torch.finfo(torch.float32).eps
    by_shift = [probs[:, r : r + 28, c : c + 28].clamp(eps, 1 - eps) for r in range(7) for c in range(7)]
    scores = [torch.where(obs == 1, q.log(), (1 - q).log()).sum((1, 2)) for q in by_shift]
    expected = torch.stack(scores).logsumexp(0) - math.log(49)
    torch.testing.assert_close(model.log_likelihood(latent.unsqueeze(0), obs)[0], expected, atol=2e-3, rtol=0)


def get_images(name):
    """Ordinary and unusual images, in float64: [B, 28, 28]"""
    noise = torch.rand(130, 28, 28, dtype=torch.double)  # more than are convolved at a time
    return {
        "noise": (noise > 0.5).double(),
        "dots": (noise > 0.97).double(),
        "blank": torch.zeros_like(noise[:2]),
        "full": torch.ones_like(noise[:1]),
        "lines": models.GenerativeModel().sample(7)[1].double(),
        "grey": noise[:3],
    }[name]


@pytest.mark.parametrize("name", ["noise", "dots", "blank", "full", "lines", "grey"])
def test_embeddings_and_gradients_are_those_of_the_convolutions(name):
    network, obs, results = models.InferenceNetwork().double(), get_images(name), []
    grad = torch.randn(len(obs), 64, dtype=torch.double)
    parameters = [parameter for name, parameter in network.named_parameters() if name.startswith("conv")]
    for embed in (network.embed, lambda obs: reference.embed(network, obs)):
        embedding = embed(obs)
        results.append([embedding.detach(), *torch.autograd.grad(embedding, parameters, grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


class Halved(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def hook(layer):
    layer.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Conv2d(1, 64, 5, padding=3),
        lambda: Halved(1, 64, 3, padding=2),
        lambda: hook(torch.nn.Conv2d(1, 64, 3, padding=2)),
    ],
)
def test_other_first_layers_are_computed_as_they_are(make):
    network, obs = models.InferenceNetwork(), get_images("lines").float()
    network.conv0 = make()
    x = F.max_pool2d(network.conv0(obs.unsqueeze(1)), 3, 2).relu()
    x = F.max_pool2d(network.conv1(x), 3, 2).relu()
    want = F.max_pool2d(network.conv3(network.conv2(x).relu()).relu(), 2, 2).flatten(1)
    torch.testing.assert_close(network.embed(obs), want, atol=1e-5, rtol=0)


def test_fast_and_straightforward_agree():
    model, network = models.GenerativeModel(), models.InferenceNetwork()
    latent, obs = model.sample(5)
    latent = torch.cat([latent.unsqueeze(0), network.sample(obs, 3)])
    torch.testing.assert_close(network.embed(obs), reference.embed(network, obs), atol=1e-5, rtol=0)
    log_q = reference.decode(network.decoder, reference.embed(network, obs), latent)[1]
    torch.testing.assert_close(network.log_prob(latent, obs), log_q, atol=1e-4, rtol=0)
    log_joint = reference.log_joint(model, latent, obs)
    torch.testing.assert_close(sum(model.log_prob(latent, obs)), log_joint, atol=1e-3, rtol=0)
    torch.testing.assert_close(losses.score(model, latent.repeat(2, 1, 1, 1), obs), log_joint.repeat(2, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("objective, has_gradients", [("rws", False), ("rws", True), ("vimco", False)])
def test_gradients_of_the_particles_that_matter_are_those_of_all(objective, has_gradients, monkeypatch):
    """Even if a decoder of one's own scores its samples with gradients"""
    model, network = models.GenerativeModel(num_arcs=4), models.InferenceNetwork(num_arcs=4)
    with torch.no_grad():  # equal strokes tie where one ends and the next starts
        model.pre_width.add_(0.3 * torch.randn(64))
    _, obs = model.sample(6)
    latent, decode = network.sample(obs, 5), reference.decode
    parameters = [*model.parameters(), *network.parameters()]
    log_q = network.log_prob(latent, obs)
    network.decoder.sample_and_log_prob = lambda *_: (latent, log_q if has_gradients else log_q.detach())
    loss, _ = getattr(losses, objective)(model, network, obs, 5)
    gradients = torch.autograd.grad(loss, parameters)
    # The textbook's formulas need float64. A call with options is the one that samples.
    monkeypatch.setattr(reference, "decode", lambda *args, **options: (latent, None) if options else decode(*args))
    want = getattr(reference, objective)(model.double(), network.double(), obs.double(), 5)
    assert abs(loss - want) < 1e-3
    assert_near(gradients, torch.autograd.grad(want, parameters), 2e-4)


def test_a_loss_of_scores_may_depend_on_parameters_directly():
    @losses.particle_objective
    def penalised(log_p, log_q, generative_model):
        return -log_p.mean() + 3 * (generative_model.pre_dxdy**2).sum(), {}

    (model, network), gradients = (models.GenerativeModel(num_arcs=4), models.InferenceNetwork(num_arcs=4)), []
    _, obs = model.sample(6)
    for objective in (penalised, losses.particle_objective(lambda log_p, log_q: (-log_p.mean(), {}))):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(objective(model, network, obs, 5)[0], model.pre_dxdy)[0])
    torch.testing.assert_close(gradients[0], gradients[1] + 6 * model.pre_dxdy.detach())


def test_a_loss_of_weight_zero():
    """As when it is phased in: no particle then needs gradients"""
    objective = losses.particle_objective(lambda log_p, log_q: (0 * (log_p + log_q).mean(), {}))
    model, network = models.GenerativeModel(num_arcs=4), models.InferenceNetwork(num_arcs=4)
    loss, _ = objective(model, network, model.sample(6)[1], 5)
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in [*model.parameters(), *network.parameters()] if x.grad is not None)


@pytest.mark.parametrize("likelihood", ["learned-affine", "bernoulli"])
def test_chunks_change_nothing(likelihood, monkeypatch):
    model = models.GenerativeModel(likelihood=likelihood, num_arcs=4)
    latent, obs = model.sample(10)
    latent = latent.unsqueeze(0).repeat(7, 1, 1, 1)

    def score():
        log_likelihood = model.log_likelihood(latent, obs)
        parameters = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in model.prior.parameters())]
        return log_likelihood.detach(), torch.autograd.grad(log_likelihood.mean(), parameters)

    monkeypatch.setattr(rendering, "_get_chunk_size", lambda device: 1024)
    expected, expected_gradients = score()
    monkeypatch.setattr(rendering, "_get_chunk_size", lambda device: 2 * rendering.BLOCK)
    monkeypatch.setattr(rendering, "_get_gradient_chunk_size", lambda device: 23)  # the last one would be of one alone
    log_likelihood, gradients = score()
    torch.testing.assert_close(log_likelihood, expected, atol=1e-4, rtol=0)
    assert_near(gradients, expected_gradients, 1e-4)


def test_when_memory_runs_out_fewer_are_scored_at_a_time(monkeypatch):
    """There is no GPU to fill here: a stand-in refuses more than 12 latents."""
    model = models.GenerativeModel(num_arcs=4)
    latent, obs = model.sample(6)
    latent = latent.unsqueeze(0).repeat(5, 1, 1, 1)
    expected, original = losses.score(model, latent, obs), model.log_prob
    room = 12

    def refuse(latent, obs, alphabet):
        if latent.shape[0] * latent.shape[1] > room:
            raise torch.OutOfMemoryError("a stand-in")
        return original(latent, obs, alphabet)

    monkeypatch.setattr(model, "log_prob", refuse)
    monkeypatch.setattr(scoring, "can_select", lambda latent: False)
    monkeypatch.setattr(gpu.kernels, "scored_at_once", 20)
    torch.testing.assert_close(losses.score(model, latent, obs), expected, atol=1e-4, rtol=0)
    assert gpu.kernels.scored_at_once < 20
    room = 5
    monkeypatch.setattr(gpu.kernels, "scored_at_once", 20)
    rows, obs_id = losses.pack(latent.flatten(0, 1)), torch.arange(6).repeat(5)
    twelve = torch.cat([rows, rows.roll(1, 0)])  # distinct ones
    log_joint = scoring.score_rows(model, twelve, obs, None, obs_id.repeat(2))
    torch.testing.assert_close(log_joint[:30].view(5, 6), expected, atol=1e-4, rtol=0)
    assert gpu.kernels.scored_at_once < 20
    with pytest.raises(torch.OutOfMemoryError):
        losses.score(model, latent, obs)


def test_initial_values():
    model = models.GenerativeModel(2000, initial_max_curve=0.3)
    dx, dy, theta, sharpness, width = model.get_primitives().unbind(1)
    # theta is 0.99 pi (0.01 + 0.98 (t - 1/2) - 1/2), t uniform on [0.7, 1.3]
    assert theta.min() > 0.99 * math.pi * (0.01 + 0.98 * 0.2 - 0.5) - 1e-4
    assert theta.max() < 0.99 * math.pi * (0.01 + 0.98 * 0.8 - 0.5) + 1e-4
    assert abs(theta.mean()) < 0.03
    assert max(dx.abs().max(), dy.abs().max()) <= 0.66 * math.tanh(0.4)
    assert (sharpness == 20).all()
    torch.testing.assert_close(width, torch.full((2000,), 0.1 / (1 + math.exp(2))))
    big = models.GenerativeModel(2000, initial_max_curve=0.8, big_arcs=True).get_primitives()[:, 2]
    assert -0.8 * math.pi - 1e-4 < big.min() < -0.75 * math.pi and 0.75 * math.pi < big.max() < 0.8 * math.pi + 1e-4
    scale, bias = model.get_rendering_params()
    assert scale.item() == pytest.approx(math.log1p(math.exp(3))) and bias == -3


def test_an_image_is_drawn_where_its_strokes_are():
    model = models.GenerativeModel(2, num_arcs=2)
    with torch.no_grad():  # up and left with the pen off, then right
        model.pre_dxdy.copy_(torch.tensor([[-0.3, 0.3], [0.6, 0.0]]))
        model.pre_theta.zero_()
    ink = model.get_logits(torch.tensor([[0, 0], [1, 1]])).sigmoid() > 0.5
    rows, cols = ink.nonzero().unbind(1)
    x, y = 0.5 - 0.66 * math.tanh(0.3), 0.5 + 0.66 * math.tanh(0.3)
    assert abs(rows.float().mean() - (1 - y) * 27) < 0.7  # y is upwards, rows are downwards
    assert abs(cols.min() - x * 27) < 1.5
    assert abs(cols.max() - (x + 0.66 * math.tanh(0.6)) * 27) < 1.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.GenerativeModel(initial_max_curve=0.6),
        lambda: models.GenerativeModel(likelihood="gaussian"),
        lambda: models.InferenceNetwork(num_rows=32),
        lambda: models.GenerativeModel().log_prior(torch.zeros(1, 2, 10, 2).long(), torch.eye(2)),
        lambda: models.GenerativeModel(num_alphabets=2).log_prior(torch.zeros(1, 2, 10, 2).long()),
        lambda: models.GenerativeModel(num_alphabets=2).log_prior(torch.zeros(1, 2, 10, 2).long(), torch.eye(3)),
    ],
)
def test_settings_and_alphabets_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned-affine", "translation"])
def test_shapes_and_values_that_do_not_fit_are_refused(likelihood):
    model, network = models.GenerativeModel(likelihood=likelihood), models.InferenceNetwork()
    latent, obs = model.sample_latent(8).unsqueeze(0), (torch.rand(8, 28, 28) < 0.1).float()
    right = model.log_likelihood(latent, obs[:1].repeat(8, 1, 1))
    torch.testing.assert_close(model.log_likelihood(latent, obs[:1]), right)  # one image of eight programs
    torch.testing.assert_close(model.log_prob(latent, obs[:1])[1], right)
    torch.testing.assert_close(scoring.score(model, latent, obs[:1]), model.log_prior(latent) + right)
    torch.testing.assert_close(
        network.log_prob(latent, obs[:1]), network.log_prob(latent, obs[:1].repeat(8, 1, 1)), atol=1e-4, rtol=0
    )
    many, few = model.sample_latent(5).view(5, 1, 10, 2), latent[:, :2]
    for wrong in [(latent, obs[:3]), (many, obs), (few, obs), (latent, obs[:, :14]), (latent, obs[0]), (latent[0], obs)]:
        for score in (model.log_likelihood, model.log_prob, functools.partial(scoring.score, model)):
            with pytest.raises(ValueError):
                score(*wrong)
    for wrong in [(latent, obs[:3]), (many, obs), (few, obs)]:
        with pytest.raises(ValueError):
            network.log_prob(*wrong)
    for values in (obs * 255, obs - 0.5, obs * math.nan):
        with pytest.raises(ValueError, match="values"):
            model.log_likelihood(latent, values)
    grey = obs * 0.7
    if likelihood == "bernoulli":
        ink, paper = (model.log_likelihood(latent, x) for x in (obs, torch.zeros_like(obs)))
        torch.testing.assert_close(model.log_likelihood(latent, grey), 0.7 * ink + 0.3 * paper, atol=1e-2, rtol=0)
    else:
        for score in (model.log_likelihood, lambda z, x: model.get_map_log_posterior(z[0], x)):
            with pytest.raises(ValueError, match="other than 0 and 1"):
                score(latent, grey)


# ------------------------------------------------------------------ what researchers change


class GRUDecoder(models.Decoder):
    """A decoder whose step is another one"""

    def __init__(self, num_primitives, num_arcs, hidden_size, context_size, uniform_mixture):
        super().__init__(num_primitives, num_arcs, hidden_size, context_size, uniform_mixture)
        del self.lstm
        self.gru = torch.nn.GRUCell(num_primitives + 2 + context_size, hidden_size)

    def _get_inputs(self, context):
        weight = self.gru.weight_ih.split([self.num_primitives, 2, self.context_size], 1)
        table = weight[0].t().unsqueeze(1) + weight[1].t()
        return table.flatten(0, 1), F.linear(context, weight[2], self.gru.bias_ih)

    def _step(self, x, state):
        hidden = x.new_zeros(len(x), self.gru.hidden_size) if state is None else state[0]
        r, z, n = zip(x.chunk(3, 1), F.linear(hidden, self.gru.weight_hh, self.gru.bias_hh).chunk(3, 1), strict=True)
        z = sum(z).sigmoid()
        return ((1 - z) * (n[0] + sum(r).sigmoid() * n[1]).tanh() + z * hidden,)


class Independent(torch.nn.Module):
    """A prior with a density and samples, and nothing else"""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([[0.0, -math.inf], [1.0, 0.5]]))  # [A, 2]

    def sample(self, num_particles, context):
        on = torch.distributions.Categorical(logits=self.logits).sample((num_particles, len(context)))
        return torch.stack([torch.randint(K, on.shape), on], -1)

    def log_prob(self, latent, context):
        on = torch.distributions.Categorical(logits=self.logits).log_prob(latent[..., 1])
        return on.sum(-1) - A * math.log(K)


def test_a_gru_is_what_pytorch_says():
    decoder = GRUDecoder(K, A, 5, 4, 0.1)
    latent, context = get_latents().unsqueeze(1), torch.randn(1, 4)
    hidden, log_prob, stroke = None, 0, torch.zeros(len(latent), K + 2)
    for arc_id, (ids, on) in enumerate(z.unbind(1) for z in latent[:, 0].unbind(1)):
        hidden = decoder.gru(torch.cat([stroke, context.expand(len(latent), -1)], 1), hidden)
        id_log_prob, on_log_prob = decoder._get_log_probs(hidden)
        log_prob = log_prob + id_log_prob.gather(1, ids[:, None]) + on_log_prob.gather(1, on[:, None]) * (arc_id > 0)
        stroke = torch.cat([F.one_hot(ids, K), F.one_hot(on, 2)], 1).float()
    torch.testing.assert_close(decoder.log_prob(latent, context), log_prob)
    assert_frequencies(get_ids(decoder.sample(50000, context)[:, 0]), log_prob[:, 0].detach())


def test_kernels_are_used_for_the_decoder_that_they_compute(monkeypatch):
    """And for no other, whoever changed it: on the meta device, with an operator that would be called"""
    calls = []
    monkeypatch.setattr(gpu, "log_prob", lambda *args: calls.append("log_prob") or torch.empty(6, device="meta"))
    monkeypatch.setattr(gpu.kernels, "operators", ["decoder"])
    latent, context = torch.zeros(2, 3, A, 2, dtype=torch.long, device="meta"), torch.zeros(3, 4, device="meta")
    models.Decoder(K, A, 5, 4, 0.0).to("meta").log_prob(latent, context)
    assert calls == ["log_prob"]
    for change in ["_step", "_get_inputs", "_get_log_probs", "lstm", "linear", "class"]:
        decoder = GRUDecoder(K, A, 5, 4, 0.0) if change == "class" else models.Decoder(K, A, 5, 4, 0.0)
        if change == "lstm":
            decoder.lstm = type("Other", (torch.nn.LSTMCell,), {})(K + 6, 5)
        elif change == "linear":
            decoder.linear = torch.nn.Sequential(decoder.linear)
        elif change != "class":
            method = getattr(models.Decoder, change)
            decoder.__class__ = type("Other", (models.Decoder,), {change: lambda *args, method=method: method(*args)})
        assert decoder.to("meta").log_prob(latent, context).shape == (2, 3) and calls == ["log_prob"], change


def test_another_prior_needs_samples_and_a_density():
    model = models.GenerativeModel(K, num_arcs=A)
    model.prior = Independent()
    latent, obs = model.sample_latent(50000), model.sample(4)[1]
    log_prior, _ = model.log_prob(get_latents().unsqueeze(1), obs[:1])
    assert_frequencies(get_ids(latent), log_prior[:, 0].detach())
    network = models.InferenceNetwork(K, num_arcs=A)
    memory = losses.init_memory(4, 3, A, K)
    loss, _ = losses.mws(model, network, memory, obs, torch.arange(4), 3)
    loss.backward()
    assert model.prior.logits.grad[1].abs().min() > 0
    for length in (0, 1):  # the search knows no better than that all strokes are equally likely
        id_log_prob, on_log_prob = model.get_next_log_probs(latent[:5, :length])
        torch.testing.assert_close(id_log_prob, torch.full((5, K), -math.log(K)))
        torch.testing.assert_close(on_log_prob[0].exp(), torch.tensor([1.0, 0.0] if length == 0 else [0.5, 0.5]))


class MixtureWeights(models.LearnedAffine):
    """Learned maps with learned weights"""

    def __init__(self, num_maps: Annotated[int, util.Setting("maps", 1, 100)] = 40):
        super().__init__(num_maps)
        self.weight_logits = torch.nn.Parameter(torch.linspace(-2, 2, num_maps))

    def get_log_weights(self):
        return self.weight_logits.log_softmax(0)


def test_learned_mixture_weights(monkeypatch):
    """One class and an entry: its density sums to one, is learned, drawn from, found and restricted to some maps"""
    monkeypatch.setitem(models.LIKELIHOODS, "weights", MixtureWeights)
    model = models.GenerativeModel(
        K, num_arcs=A, num_rows=2, num_cols=3, likelihood="weights", likelihood_settings={"num_maps": 7}
    )
    with torch.no_grad():
        model.likelihood.theta_affine.add_(0.5 * torch.randn(7, 2, 3))
    latent = get_latents()[[1, 8, 17]].unsqueeze(0)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1])] * 6).view(-1, 2, 3)
    total = sum(model.log_likelihood(latent, image.expand(3, 2, 3)).exp() for image in images)
    torch.testing.assert_close(total, torch.ones(1, 3))
    obs = images[[5, 9, 33]]
    weights, logits = model.likelihood.weight_logits.softmax(0), model.get_logits(latent[0])
    by_map = rendering.affine_log_prob_by_map(logits, obs, model.likelihood.maps).exp()  # [3, 7]
    torch.testing.assert_close(model.log_likelihood(latent, obs)[0].exp(), by_map @ weights)
    torch.testing.assert_close(
        model.get_map_log_posterior(latent[0], obs).exp(), by_map * weights / (by_map @ weights)[:, None]
    )
    map_id = torch.tensor([2, 5])
    torch.testing.assert_close(model.likelihood.log_prob(logits, obs, map_id).exp(), by_map[:, map_id] @ weights[map_id])
    drawn = (model.likelihood.sample_maps(20000)[:, None] == model.likelihood.maps).flatten(2).all(2).long().argmax(1)
    assert_frequencies(drawn, weights.detach().log())
    model.log_likelihood(latent, obs).sum().backward()
    share = (by_map * weights / (by_map @ weights)[:, None]).sum(0)
    torch.testing.assert_close(model.likelihood.weight_logits.grad, share - 3 * weights)
    assert {"theta_affine", "weight_logits"} <= model.state_dict().keys() & dict(model.named_parameters()).keys()
    again, _ = models.build(main.parse_args("--likelihood weights --num-maps 7 --num-primitives 3 --num-arcs 2".split()), 0)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.likelihood.maps, model.likelihood.maps)


@pytest.mark.parametrize("temperature", [1, 0.5])
def test_programs_are_completed(temperature):
    """From none of their strokes, or the first, by the prior's density to the power of 1 / temperature"""
    model = models.GenerativeModel(K, num_arcs=A, num_alphabets=2)
    sharpen(model.prior)
    alphabet = torch.eye(2)[[1]].expand(50000, 2)
    log_prior = model.log_prior(get_latents().unsqueeze(1), alphabet[:1])[:, 0].detach()
    by_first = torch.stack([log_prior[i * 2 * K : (i + 1) * 2 * K] for i in range(K)])  # [K, 2 * K]
    beginning = torch.tensor([[[1, 0]]]).expand(50000, 1, 2)
    completed = model.complete(beginning, temperature, alphabet)
    assert torch.equal(completed[:, :1], beginning)
    with pytest.raises(ValueError, match="3 strokes"):
        model.complete(beginning[:, [0, 0, 0]], temperature, alphabet)
    with pytest.raises(ValueError, match="above 0"):
        model.complete(beginning, 0, alphabet)
    # of two independent numbers, the temperature applies to each
    ids, on = (by_first[1].view(K, 2).logsumexp(dim) for dim in (1, 0))
    second = (ids / temperature).log_softmax(0)[:, None] + (on / temperature).log_softmax(0)
    assert_frequencies(completed[:, 1, 0] * 2 + completed[:, 1, 1], second.flatten())
    if temperature == 1:
        assert_frequencies(get_ids(model.complete(beginning[:, :0], 1.0, alphabet)), log_prior)
        torch.manual_seed(5)
        drawn = model.sample_latent(50000, alphabet)
        torch.manual_seed(5)
        assert torch.equal(model.complete(beginning[:, :0], 1.0, alphabet), drawn)


@pytest.mark.parametrize("objective", ["rws", "vimco", "mws"])
def test_float64(objective):
    """Of images in float32, as they are loaded"""
    model, network, results = models.GenerativeModel(num_arcs=4), models.InferenceNetwork(num_arcs=4), []
    with torch.no_grad():  # equal strokes tie where one ends and the next starts
        model.pre_width.add_(0.3 * torch.randn(64))
    obs = model.sample(4)[1]
    memory, proposal = losses.init_memory(4, 1, 4), network.sample(obs, 3)  # of one, there is no choice
    for dtype in (torch.float32, torch.float64):
        model.to(dtype), network.to(dtype)
        log_q = network.log_prob(proposal, obs).detach()
        network.decoder.sample_and_log_prob = lambda *_, given=(proposal, log_q): given
        torch.manual_seed(0)
        if objective == "mws":
            loss, _ = losses.mws(model, network, memory.clone(), obs, torch.arange(4), 3)
        else:
            loss, _ = getattr(losses, objective)(model, network, obs, 3)
        gradients = torch.autograd.grad(loss, [*model.likelihood.parameters(), *network.conv3.parameters()])
        results.append([loss.detach(), *gradients])
        assert all(x.dtype == dtype for x in results[-1])
        table = scoring.ScoreTable(4)
        for _ in range(2):
            torch.testing.assert_close(table.score(torch.arange(4), model, proposal, obs), scoring.score(model, proposal, obs))
    assert_near(*results, 1e-3)
