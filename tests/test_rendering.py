"""Strokes to pixels, and pixels to log-probabilities: against the textbook's formulas, at limits, and compiled."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_near, needs_compiler

import models
import rendering
from fast import gpu, reference

PARAMS = torch.tensor([3.0, -3.0])
HARD_THETAS = [0, 1e-8, 1e-5, 1e-3, math.pi / 2, math.pi - 1e-6, math.pi]


def get_arcs(num, thetas=None):
    """Random arcs [num, 1, 7]; every fourth has a chord of length 0"""
    arcs = torch.empty(num, 1, 7)
    arcs[..., :2] = torch.rand(num, 1, 2)
    arcs[..., 2:4] = torch.rand(num, 1, 2) - 0.5
    arcs[::4, :, 2:4] = 0
    arcs[..., 4] = (torch.rand(num, 1) * 2 - 1) * math.pi if thetas is None else thetas[:, None]
    arcs[..., 5], arcs[..., 6] = 20, 0.01
    return arcs


def draw(arcs):
    return rendering.get_logits(arcs, torch.ones(arcs.shape[:2]), PARAMS.to(arcs), 28, 28)


def test_agrees_with_the_textbook():
    arcs = get_arcs(300).double()
    arcs = arcs[(arcs[:, 0, 4].abs() > 0.01) & (arcs[:, 0, 2:4].abs().sum(-1) > 0)].view(-1, 5, 7)
    on_offs = torch.rand(arcs.shape[:2]) < 0.7
    expected = reference.get_logits(arcs, on_offs, PARAMS.double(), 20, 28)
    logits = rendering.get_logits(arcs, on_offs, PARAMS.double(), 20, 28)
    torch.testing.assert_close(logits, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("theta", sorted({sign * t for t in HARD_THETAS for sign in (1, -1)}))
def test_float32_is_right_where_the_textbook_is_not(theta):
    arcs = get_arcs(100, torch.full((100,), theta)).requires_grad_()
    params = PARAMS.clone().requires_grad_()
    logits = rendering.get_logits(arcs, torch.ones(100, 1), params, 28, 28)
    assert (logits - draw(arcs.double())).abs().max() < 1e-3
    (logits * torch.randn_like(logits)).sum().backward()
    assert arcs.grad.isfinite().all() and params.grad.isfinite().all()


def test_gradients_are_finite_however_short_a_chord_is():
    length, angle, theta = torch.cartesian_prod(
        10.0 ** -torch.arange(46.0), torch.arange(8.0), torch.tensor(HARD_THETAS)
    ).unbind(1)
    chord = length.unsqueeze(1) * torch.stack([(angle * math.pi / 4).cos(), (angle * math.pi / 4).sin()], 1)
    arcs = torch.cat(
        [torch.full_like(chord, 0.5), chord, torch.stack([theta, *torch.tensor([[20.0], [0.01]]).expand(2, len(theta))], 1)], 1
    )
    arcs = arcs.unsqueeze(1).requires_grad_()
    logits = rendering.get_logits(arcs, torch.ones(len(arcs), 1), PARAMS, 29, 29)  # with a pixel where the arcs start
    logits.sum().backward()
    assert logits.isfinite().all() and arcs.grad.isfinite().all()


def test_straight_is_the_limit_of_curved():
    arcs = get_arcs(40).double()
    arcs[..., 4] = 0
    straight = draw(arcs)
    arcs[..., 4] = 1e-7
    torch.testing.assert_close(draw(arcs), straight, atol=1e-4, rtol=0)


def test_points_on_the_centre_and_the_ends():
    # A half circle over a chord between two pixels' centres, about a third one.
    on_grid = 8 / 27
    for theta in (math.pi / 2, -math.pi / 2, 0.8, -2.5):
        arc = torch.tensor([[[on_grid, 13 / 27, 10 / 27, 0, theta, 20, 0.01]]], requires_grad=True)
        logits = draw(arc)
        assert (logits - draw(arc.double())).abs().max() < 1e-3
        row = 27 - 13
        for col in (8, 18):  # full ink at both ends
            assert logits[0, row, col].item() == pytest.approx(math.log(1 + 1e-6), abs=1e-5)
        logits.sum().backward()
        assert arc.grad.isfinite().all()


def test_gradients_are_right():
    arcs = get_arcs(30).double()
    arcs[..., 2:4] += 0.05
    arcs = arcs.view(10, 3, 7).requires_grad_()
    on_offs = torch.rand(10, 3) < 0.7
    params = PARAMS.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, p: rendering.get_logits(a, on_offs, p, 5, 6), (arcs, params), eps=1e-7, atol=1e-4, rtol=1e-3
    )


def test_an_arc_that_is_off_leaves_no_ink():
    arcs = get_arcs(8).view(4, 2, 7)
    nothing = rendering.get_logits(arcs, torch.zeros(4, 2), PARAMS, 28, 28)
    torch.testing.assert_close(nothing, torch.full_like(nothing, math.log(1e-6)))
    on_offs = torch.tensor([[0, 1]]).expand(4, 2)
    torch.testing.assert_close(rendering.get_logits(arcs, on_offs, PARAMS, 28, 28), draw(arcs[:, 1:]))


def get_images(num):
    """logits and obs [num, 28, 28], some ink at the page's edge"""
    arcs = get_arcs(num * 4).view(num, 4, 7)
    arcs[..., 6] = 0.04
    logits = draw(arcs)
    return logits, torch.bernoulli(logits.sigmoid())


@pytest.mark.parametrize("spread", [0.03, 0.3])  # 0.3: much ink leaves the page
def test_affine_likelihood_agrees_with_the_reference(spread):
    logits, obs = get_images(8)
    maps = (torch.eye(3)[:2] + spread * torch.randn(40, 2, 3)).requires_grad_()
    logits.requires_grad_()
    values, gradients = [], []
    for module in (reference, rendering):
        value = module.affine_log_prob(logits, obs, maps)
        values.append(value.detach())
        gradients.append(torch.autograd.grad((value * torch.arange(1, 9)).sum(), [logits, maps]))
    torch.testing.assert_close(values[1], values[0], atol=1e-3, rtol=0)
    assert_near(gradients[1], gradients[0], 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(rendering.affine_log_prob(logits, obs, maps), values[0], atol=1e-3, rtol=0)


def test_one_affine_map_is_a_bernoulli():
    logits, obs = get_images(4)
    identity = torch.eye(3)[None, :2]
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(obs).sum((1, 2))
    torch.testing.assert_close(rendering.affine_log_prob(logits, obs, identity), expected, atol=1e-3, rtol=0)
    logits, obs = (x[:, :5, :7].double() for x in (logits, obs))  # pixels are scored in fours, and 35 is no multiple
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(obs).sum((1, 2))
    torch.testing.assert_close(rendering.affine_log_prob(logits, obs, identity.double()), expected, atol=1e-12, rtol=0)


def test_maps_far_off_the_page_are_finite():
    logits, obs = get_images(2)
    maps = torch.tensor([[[1.0, 0, 1e20], [0, 1, 0]], [[1, 0, -5], [0, 1, 5]]])
    log_prob = rendering.affine_log_prob(logits, obs, maps)
    torch.testing.assert_close(log_prob, obs.sum((1, 2)) * math.log(torch.finfo(torch.float32).eps), rtol=1e-3, atol=0)


def test_images_are_seen_through_maps_in_chunks(monkeypatch):
    probs, maps = torch.rand(7, 28, 28), models.LearnedAffine(7).maps.detach()
    expected = rendering.apply_maps(probs, maps)
    monkeypatch.setattr(rendering, "MOST_SAMPLED", 3)
    assert torch.equal(rendering.apply_maps(probs, maps), expected)


def test_fixed_maps():
    maps = rendering.get_fixed_maps()
    assert maps.shape == (2187, 2, 3)
    assert (maps == torch.eye(3)[:2]).all(-1).all(-1).any()
    # shift, scale and turn by the largest steps, no shear: -0.2 is a translation by +0.2
    cos, sin = math.cos(0.1 * math.pi), math.sin(0.1 * math.pi)
    expected = torch.tensor([[1.1 * cos, -1.1 * sin, -0.2], [1.1 * sin, 1.1 * cos, -0.2]])
    assert ((maps - expected).abs() < 1e-6).all(-1).all(-1).any()


def test_large_images_are_drawn_a_few_at_a_time(monkeypatch):
    """So that memory does not grow with their size"""
    arcs, on_offs, num_drawn, draw_ink = get_arcs(84).view(7, 12, 7), torch.rand(7, 12) < 0.5, [], rendering._draw_ink
    monkeypatch.setattr(rendering, "_draw_ink", lambda x, *rest: num_drawn.append(len(x)) or draw_ink(x, *rest))
    logits = rendering.get_logits(arcs, on_offs, PARAMS, 200, 200)
    assert num_drawn == [2, 2, 3]
    alone = [rendering.get_logits(arcs[[i]], on_offs[[i]], PARAMS, 200, 200) for i in range(7)]
    assert torch.equal(logits, torch.cat(alone))


@pytest.fixture
def compiled():
    before = torch.get_rng_state()
    rendering.set_compile(True)
    assert torch.equal(torch.get_rng_state(), before)
    yield
    rendering.set_compile(False)


@needs_compiler
@pytest.mark.long  # in the process of test_main.py's compiled run, whose kernels it then finds compiled
def test_compiled_is_the_same_for_all_numbers_of_images_and_arcs(compiled):
    """With gradients and without; and NaN as well"""
    counters = torch._dynamo.utils.counters["stats"]
    num_compiled = counters["unique_graphs"]
    for batch_size, num_arcs in [(1, 10), (2, 3), (15, 2), (33, 40), (250, 10)]:
        arcs = get_arcs(batch_size * num_arcs).view(batch_size, num_arcs, 7)
        on_offs = torch.rand(batch_size, num_arcs) < 0.5
        arcs, params, maps = arcs.requires_grad_(), PARAMS.clone().requires_grad_(), torch.eye(3)[:2].repeat(40, 1, 1)
        maps = (maps + 0.03 * torch.randn_like(maps)).requires_grad_()
        obs = torch.bernoulli(torch.full((batch_size, 28, 28), 0.1))
        results = []
        for enabled in (True, False):
            compiled_kernels = gpu.kernels.compiled
            if not enabled:
                gpu.kernels.compiled = {}
            logits = rendering.get_logits(arcs, on_offs, params, 28, 28)
            log_prob = rendering.affine_log_prob(logits, obs, maps)
            gradients = torch.autograd.grad(log_prob.mean(), [arcs, params, maps])
            with torch.no_grad():
                assert torch.equal(rendering.get_logits(arcs, on_offs, params, 28, 28), logits)
            gpu.kernels.compiled = compiled_kernels
            results.append([logits.detach(), log_prob.detach(), *gradients])
        assert_near(*results, 1e-4)
        assert (results[0][1] - results[1][1]).abs().max() < 1e-3
    test_nan_reaches_the_likelihood()
    assert counters["unique_graphs"] == num_compiled  # one kernel for all: compiled when enabled, not since


def test_second_derivatives_where_kernels_are_compiled(monkeypatch):
    """The kernels themselves stand in for their compiled forms"""
    model, products = models.GenerativeModel().double(), []
    latent, obs = model.sample(3)
    parameters = [model.pre_width, model.pre_rendering_params, model.likelihood.theta_affine]
    for compiled in ({}, {kernel: kernel for kernel in rendering.ANY_SIZE}):
        monkeypatch.setattr(gpu.kernels, "compiled", compiled)
        loss = model.log_likelihood(latent.unsqueeze(0), obs).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        products.append(torch.autograd.grad(sum((x**2).sum() for x in gradients), parameters))
    assert_near(*products, 1e-9)


def test_nan_reaches_the_likelihood():
    for name in ["pre_dxdy", "pre_theta", "pre_sharpness", "pre_width", "pre_rendering_params", "theta_affine"]:
        model = models.GenerativeModel()
        latent, obs = model.sample(3)
        latent[..., 1] = 1
        dict(model.named_parameters())[name].data.fill_(torch.nan)
        log_prior, log_likelihood = model.log_prob(latent.unsqueeze(0), obs)
        assert log_likelihood.isnan().all() and log_prior.isfinite().all(), name
        with torch.no_grad():
            assert model.log_prob(latent.unsqueeze(0), obs)[1].isnan().all(), name


NOEXEC = (
    "OSError: /tmp/torchinductor_me/sl/cslaldtxqqggzti6vmhx46xbfstgh4r3hl7ho2u3yaia2vcmzffl.main.so: failed to map segment"
    " from shared object.  The most common reason this may occur is if the /tmp folder is mounted with noexec"
)


@needs_compiler
def test_a_compiler_that_is_killed_leaves_no_part_of_a_library(tmp_path):
    compiler, cache = tmp_path / "compiler", tmp_path / "cache"
    compiler.write_text(
        """#!/bin/bash
for word; do [ "$before" = -o ] && output=$word; before=$word; done
[ "$output" ] || exec g++ "$@"
echo part > "$output"; kill -9 $PPID
"""
    )
    compiler.chmod(0o700)
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    code = [sys.executable, "-c", "import rendering; rendering.set_compile(True)"]
    assert subprocess.run(code, env=environment, cwd=ROOT).returncode == -signal.SIGKILL
    assert list(cache.rglob("*.tmp")) and not list(cache.rglob("*.so"))


def test_no_compiler_is_one_warning_with_its_own_reason(monkeypatch, capsys):
    for message, expected in [
        ("there is no compiler\nand much more", "there is no compiler"),
        (f"{NOEXEC}\n\nSet TORCHDYNAMO_VERBOSE=1", NOEXEC.replace("  ", " ")),
        (
            "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\n/tmp/x.cpp:2:10: fatal error: omp.h: none\n",
            "/tmp/x.cpp:2:10: fatal error: omp.h: none",
        ),
    ]:

        def refuse(*args, message=message, **options):
            raise RuntimeError(message)

        monkeypatch.setattr(rendering, "_compile_for_cpu", lambda refuse=refuse: {rendering._draw: refuse})
        rendering.set_compile(True)
        assert capsys.readouterr().err == f"warning: not compiled, training is slower: {expected}\n"
        assert not gpu.kernels.compiled
