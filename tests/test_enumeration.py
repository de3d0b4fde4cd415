"""Objectives on a model so small that all its latents can be listed: log p(x), the
posterior and every expected gradient are known exactly."""

import itertools
import math

import pytest
import torch

import losses
import models
import scoring

NUM_IMAGES, NUM_COPIES, NUM_BATCHES = 3, 200, 12
K, A = 2, 2  # K^A * 2^(A - 1) = 8 latents


def get_latents(num_primitives=K):
    """Every latent: [2 * K^2, A, 2]"""
    arcs = itertools.product(range(num_primitives), range(num_primitives), [0, 1])
    return torch.tensor([[[first, 0], [second, on]] for first, second, on in arcs])


def get_tiny(likelihood="bernoulli", lookup=True, **options):
    """A model of faint, blurred strokes, so that no latent has all of the posterior"""
    torch.manual_seed(3)
    model = models.GenerativeModel(K, num_arcs=A, likelihood=likelihood, **options)
    with torch.no_grad():
        model.pre_sharpness.fill_(6.0)
        model.pre_rendering_params.copy_(torch.tensor([1.0, -3.0]))
    if lookup:
        network = models.LookupInferenceNetwork(NUM_IMAGES, K, lstm_hidden_size=8, num_arcs=A)
    else:
        network = models.InferenceNetwork(K, lstm_hidden_size=8, num_arcs=A, obs_embedding_dim=4)
    _, obs = model.sample(NUM_IMAGES)
    return model, network, obs


def get_exact(model, network, obs, given):
    """log p(z, x) and log q(z|x) of every latent and image, with gradients: [8, B] each"""
    latent = get_latents().unsqueeze(1).expand(-1, len(obs), -1, -1)
    return sum(model.log_prob(latent, obs)), network.log_prob(latent, given)


def get_copies(obs, num=NUM_COPIES):
    """Each image many times in a batch: its loss is a mean over as many draws"""
    return obs.repeat(num, 1, 1), torch.arange(len(obs)).repeat(num)


def assert_expected_gradient(parameters, exact, get_loss, power=0.2):
    """The mean gradient of get_loss over batches is the exact one, within four
    standard errors, and the errors are small enough for that to say something."""
    gradients = [torch.autograd.grad(get_loss(), parameters.values(), allow_unused=True) for _ in range(NUM_BATCHES)]
    for i, name in enumerate(parameters):
        want = torch.zeros(()) if exact[i] is None else exact[i]
        if gradients[0][i] is None:
            assert want.abs().max() == 0, name
            continue
        sampled = torch.stack([g[i] for g in gradients])
        error = (sampled.mean(0) - want).norm()
        standard_error = (sampled.var(0) / NUM_BATCHES).sum().sqrt()
        assert error < 4 * standard_error + 1e-5 * want.norm(), (name, error, standard_error)
        assert standard_error < power * max(want.norm(), 0.05), (name, standard_error, want.norm())


def get_parameters(*modules):
    return {name: p for module in modules for name, p in module.named_parameters()}


def exact_bound(log_p, log_q, num_particles):
    """E[log mean w] over all tuples of particles, differentiable in p and q (through
    the weights and the sampling alike), and the RWS phi objective. Each a scalar, batch mean."""
    bound = phi = 0
    for ids in itertools.product(range(len(log_p)), repeat=num_particles):
        log_w = (log_p - log_q)[list(ids)]
        probability = log_q[list(ids)].sum(0).exp()
        bound = bound + probability * scoring.log_mean_weight(log_w)
        phi = phi + probability.detach() * (log_w.softmax(0).detach() * log_q[list(ids)]).sum(0)
    return bound.mean(), phi.mean()


def test_bound_rises_to_log_p():
    model, network, obs = get_tiny("learned-affine")
    with torch.no_grad():
        log_p, log_q = get_exact(model, network, obs, torch.arange(NUM_IMAGES))
        log_px = log_p.logsumexp(0).mean()
        bounds = [exact_bound(log_p, log_q, n)[0] for n in (1, 2, 3)]
        assert bounds == sorted(bounds) and bounds[-1] < log_px
        log_weight = scoring.get_log_weight(model, network, obs, 4000, obs_id=torch.arange(NUM_IMAGES))  # [4000, 3]
        assert abs(scoring.log_mean_weight(log_weight).mean() - log_px) < 0.05
        assert log_px - bounds[0] > 0.1  # there was something to gain


def test_rws_gradient():
    num_particles = 2
    model, network, obs = get_tiny()
    log_p, log_q = get_exact(model, network, obs, torch.arange(NUM_IMAGES))
    theta = exact_bound(log_p, log_q.detach(), num_particles)[0]
    phi = exact_bound(log_p.detach(), log_q, num_particles)[1]
    parameters = get_parameters(model, network)
    exact = torch.autograd.grad(-theta - phi, parameters.values(), allow_unused=True)
    images, ids = get_copies(obs)
    assert_expected_gradient(parameters, exact, lambda: losses.rws(model, network, images, num_particles, obs_id=ids)[0])


def test_vimco_gradient():
    num_particles = 3
    model, network, obs = get_tiny()
    log_p, log_q = get_exact(model, network, obs, torch.arange(NUM_IMAGES))
    parameters = get_parameters(model, network)
    exact = torch.autograd.grad(-exact_bound(log_p, log_q, num_particles)[0], parameters.values(), allow_unused=True)
    images, ids = get_copies(obs)
    assert_expected_gradient(
        parameters, exact, lambda: losses.vimco(model, network, images, num_particles, obs_id=ids)[0], power=0.5
    )


def exact_tvo(log_p, log_q, beta):
    """The left Riemann sum of E[log w] under p^beta q^(1 - beta) over all latents, differentiable: [8, B] each -> scalar"""
    total = 0
    for left, right in itertools.pairwise(beta):
        path = (left * log_p + (1 - left) * log_q).softmax(0)
        total = total + (right - left) * (path * (log_p - log_q)).sum(0)
    return total.mean()


def test_tvo_value_and_gradient():
    model, network, obs = get_tiny()
    ids = torch.arange(NUM_IMAGES)
    log_p, log_q = get_exact(model, network, obs, ids)
    beta = [0, *torch.logspace(-1, 0, 4).tolist()]
    parameters, exact = get_parameters(model, network), exact_tvo(log_p, log_q, beta)
    gradients = torch.autograd.grad(-exact, parameters.values(), allow_unused=True, retain_graph=True)

    def get_loss(num_particles=4000):
        return losses.tvo(model, network, obs, num_particles, obs_id=ids, num_partitions=4, log_beta_min=-1.0)[0]

    assert_expected_gradient(parameters, gradients, get_loss, power=0.5)
    values = torch.stack([get_loss().detach() for _ in range(NUM_BATCHES)])
    assert abs(values.mean() + exact) < 4 * values.std() / NUM_BATCHES**0.5 + 1e-3
    # Between the evidence lower bound, which is the case of one partition, and log p(x), which finer ones approach.
    log_px = log_p.logsumexp(0).mean()
    elbo, fine = exact_tvo(log_p, log_q, [0, 1]), exact_tvo(log_p, log_q, torch.linspace(0, 1, 2000).tolist())
    assert elbo < exact < log_px and log_px - 0.05 < fine < log_px
    scores = [x.detach()[torch.tensor([0, 3, 3, 5])] for x in (log_p, log_q)]
    one_partition = losses.tvo.__wrapped__(*scores, num_partitions=1)[1]["theta_loss"]
    torch.testing.assert_close(one_partition, -(scores[0] - scores[1]).mean())


def test_effective_sample_size():
    weight = torch.tensor([[1.0, 1], [0, 1], [0, 2]])
    assert losses.get_effective_sample_size(weight.log()) == pytest.approx((1 + 16 / 6) / 2)
    model, network, obs = get_tiny()
    for objective in (losses.rws, losses.vimco, losses.tvo):
        _, statistics = objective(model, network, obs, 5, obs_id=torch.arange(NUM_IMAGES))
        assert 1 <= statistics["effective_sample_size"] <= 5


def test_sleep_gradient():
    # Strokes so black and sharp that a latent has one image: then p(x|z) is a sum of one term.
    model, network, _ = get_tiny(lookup=False)
    with torch.no_grad():
        model.pre_sharpness.fill_(1e3)
        model.pre_width.fill_(5.0)
        model.pre_rendering_params.copy_(torch.tensor([40.0, -20.0]))
    latent = get_latents()
    images = model.get_logits(latent).sigmoid().round()
    log_q = network.log_prob(latent.unsqueeze(0), images)[0]
    prior = model.log_prior(latent.unsqueeze(0))[0].exp().detach()
    parameters = get_parameters(network)
    exact = torch.autograd.grad(-(prior * log_q).sum(), parameters.values())
    assert_expected_gradient(parameters, exact, lambda: losses.sleep(model, network, 200)[0])


def test_sleep_wake_theta_is_half_of_rws():
    model, network, obs = get_tiny()
    gradients, theta_losses = [], []
    for objective in (losses.rws, losses.wake_theta):
        torch.manual_seed(1)
        loss, statistics = objective(model, network, obs, 4, obs_id=torch.arange(NUM_IMAGES))
        gradients.append(torch.autograd.grad(loss, model.parameters()))
        theta_losses.append(statistics["theta_loss"])
    assert theta_losses[0] == theta_losses[1] == loss.detach()
    for rws, wake_theta in zip(*gradients, strict=True):
        torch.testing.assert_close(rws, wake_theta)


def test_mws_with_all_latents_is_exact():
    model, network, obs = get_tiny("learned-affine", lookup=False, likelihood_settings={"num_maps": 10})
    images = get_copies(obs, 50)[0]
    memory = losses.init_memory(len(images), 10, A, K)
    every = {tuple(z.tolist()) for z in losses.pack(get_latents(), torch.uint8)}
    assert memory.shape[1] == len(every) == 8
    log_p, log_q = get_exact(model, network, obs, obs)
    posterior = log_p.softmax(0).detach()
    parameters = get_parameters(model, network)
    exact = torch.autograd.grad(
        -log_p.logsumexp(0).mean() - (posterior * log_q).sum(0).mean(), parameters.values(), allow_unused=True
    )

    def get_loss():
        loss, statistics = losses.mws(model, network, memory, images, torch.arange(len(images)), num_particles=3)
        assert abs(statistics["theta_loss"] + log_p.logsumexp(0).mean()) < 1e-3
        assert statistics["novel_proportion"] == statistics["new_map"] == 0
        return loss

    assert_expected_gradient(parameters, exact, get_loss)
    for image_memory in memory:
        assert {tuple(z.tolist()) for z in image_memory} == every


def test_memory_keeps_the_best_distinct_latents():
    model, network, obs = get_tiny()
    memory_size, proposal = 3, get_latents()[torch.tensor([5, 5, 1, 7, 1, 0])].unsqueeze(1).repeat(1, NUM_IMAGES, 1, 1)
    memory = losses.init_memory(NUM_IMAGES, memory_size, A, K)
    before = memory.clone()
    kept, log_joint, statistics = losses.update_memory(model, memory, obs, torch.arange(NUM_IMAGES), proposal)
    log_p = get_exact(model, network, obs, torch.arange(NUM_IMAGES))[0]
    codes = [tuple(z.tolist()) for z in losses.pack(get_latents(), torch.uint8)]
    num_novel = num_new_map = 0
    for b in range(NUM_IMAGES):
        score = dict(zip(codes, log_p[:, b].tolist(), strict=True))
        remembered, proposed = (
            {tuple(z.tolist()) for z in group} for group in (before[b], losses.pack(proposal[:, b], torch.uint8))
        )
        best = sorted(score[z] for z in remembered | proposed)[::-1][:memory_size]
        assert len({tuple(z.tolist()) for z in memory[b]}) == memory_size
        assert [score[tuple(z.tolist())] for z in memory[b]] == pytest.approx(best, abs=1e-4)
        assert log_joint[:, b].tolist() == pytest.approx(best, abs=1e-4)
        novel = proposed - remembered
        num_novel += len(novel)
        num_new_map += max([score[z] for z in novel], default=-math.inf) > max(score[z] for z in remembered)
    assert statistics["novel_proportion"].item() == pytest.approx(num_novel / proposal[..., 0, 0].numel())
    assert statistics["new_map"].item() == pytest.approx(num_new_map / NUM_IMAGES)


def test_memory_keeps_latents_that_score_the_same():
    # Two equal primitives and a prior without preferences: each score occurs at least twice.
    model, _, _ = get_tiny()
    with torch.no_grad():
        for name in ("pre_dxdy", "pre_theta", "pre_width"):
            getattr(model, name)[1] = getattr(model, name)[0]
        for parameter in model.prior.parameters():
            parameter.zero_()
        model.pre_rendering_params.copy_(torch.tensor([3.0, -3.0]))
    inked, blank = get_latents()[[1, 3, 5, 7]], get_latents()[[0, 2]]
    obs = model.get_logits(inked[:1]).sigmoid().round().repeat(NUM_IMAGES, 1, 1)
    memory = losses.pack(torch.cat([inked[:2], blank]), torch.uint8).repeat(NUM_IMAGES, 1, 1)
    proposal = inked[2:].unsqueeze(1).repeat(2, NUM_IMAGES, 1, 1)  # each twice
    _, log_joint, statistics = losses.update_memory(model, memory, obs, torch.arange(NUM_IMAGES), proposal)
    assert log_joint.std(0).max() < 1e-4
    assert statistics["novel_proportion"] == 0.5 and statistics["new_map"] == 0
    for image_memory in memory:
        assert {tuple(z.tolist()) for z in image_memory} == {tuple(z.tolist()) for z in losses.pack(inked, torch.uint8)}


@pytest.mark.parametrize(
    ("num_primitives", "num_arcs", "memory_size"), [(64, 10, 10), (2, 2, 5), (3, 2, 7), (300, 3, 4), (2, 1, 10)]
)
def test_initial_memory(num_primitives, num_arcs, memory_size):
    memory = losses.init_memory(50, memory_size, num_arcs, num_primitives)
    size = min(memory_size, num_primitives**num_arcs * 2 ** (num_arcs - 1))
    assert memory.shape == (50, size, num_arcs)
    assert memory.element_size() == (1 if num_primitives <= 128 else 2)
    assert all(len({tuple(z.tolist()) for z in image_memory}) == size for image_memory in memory)
    latent = losses.unpack(memory)
    assert (losses.pack(latent, memory.dtype) == memory).all()
    assert 0 <= latent[..., 0].min() and latent[..., 0].max() < num_primitives
    assert (latent[..., 0, 1] == 0).all()
    if num_arcs > 2:
        assert abs(latent[..., 1:, 1].float().mean() - 0.5) < 0.1
        assert abs(latent[..., 0].float().mean() - (num_primitives - 1) / 2) < 0.1 * num_primitives
