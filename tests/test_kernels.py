"""The Triton kernels against plain PyTorch: on a GPU where there is one; else they are compiled for one of --capability,
and ptx.py carries out the result."""

import contextlib
import copy
import itertools
import os
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton runs these tests on a CPU")

import ptx  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from conftest import assert_near  # noqa: E402

import losses  # noqa: E402
import models  # noqa: E402
import rendering  # noqa: E402
from fast import gpu, kernel_check, triton_decoder  # noqa: E402
from fast.triton_math import unfused_product  # noqa: E402

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cpu = pytest.mark.skipif(device.type != "cpu", reason="on a GPU, compute-sanitizer finds it")
if device.type == "cpu" and ptx.VERSION < (3, 3):
    pytest.skip("compiling for a GPU that is not there needs Triton 3.3", allow_module_level=True)


pytestmark = pytest.mark.filterwarnings("error::UserWarning:triton")  # of defaults that are about to change


@pytest.fixture(autouse=True)
def driver(monkeypatch, pytestconfig):
    if device.type == "cpu":
        capability = pytestconfig.getoption("--capability")
        ptx.use(monkeypatch, capability, max_stack=32 if capability == 90 else 512)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is allocated with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use_kernels(monkeypatch):
    """Switches between a GPU's way of computing, on whatever device, and the plain one"""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def switch(enabled):
        monkeypatch.setattr(gpu, "is_gpu", lambda device: enabled or torch.device(device).type != "cpu")
        monkeypatch.setattr(gpu.kernels, "operators", gpu.OPERATORS if enabled else [])

    return switch


def check_gradients(function, inputs, use_kernels, tolerance=1e-4):
    """The value of a function without arguments and its gradients for inputs, by the kernels and plain, to a tolerance of the
    norm. Returns: the plain value"""
    results = []
    for enabled in (False, True):
        use_kernels(enabled)
        value = function()
        cotangent = torch.linspace(-1, 2, value.numel(), device=value.device).view_as(value)
        grads = torch.autograd.grad((value * cotangent).sum(), inputs)
        results.append([value.detach(), *grads])
    assert all(x.isfinite().all() for x in results[0])
    assert_near(results[1], results[0], tolerance)
    return results[0][0]


def make_tiny_model():
    return models.GenerativeModel(16, num_arcs=2, likelihood_settings={"num_maps": 3}).to(device)


def make_arcs(num, num_arcs):
    """Arcs of all kinds: [N, A, 7]"""
    arcs = torch.rand(num, num_arcs, 7)
    arcs[..., 2:4] = arcs[..., 2:4] * 1.4 - 0.7
    arcs[..., 4] = (arcs[..., 4] * 2 - 1) * torch.pi
    arcs[0, :, 4] *= 1e-5  # nearly straight
    arcs[1, 0, 2:4] = 0  # a point
    arcs[..., 5] = 15 + 10 * arcs[..., 5]
    arcs[..., 6] *= 0.1
    return arcs.to(device)


# ------------------------------------------------------------------ what ptx.py finds


@triton.jit
def _double(x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, 2 * tl.load(x + place, mask=place < size), mask=place < size)


@triton.jit
def _reverse(x, between, out, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(between + place, tl.load(x + place))
    if WAITS:
        tl.debug_barrier()
    tl.store(out + place, tl.load(between + BLOCK - 1 - place))


@triton.jit
def _meet(out):
    tl.store(out + tl.program_id(0) // 2, tl.program_id(0))


@triton.jit
def _sum_products(x, y, out, SIZE: tl.constexpr, FUSED: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(x + place), tl.load(y + place)
    product = a * b if FUSED else unfused_product(a, b)
    tl.store(out + place, 0 * a + tl.sum(product, 1)[:, None])


@on_cpu
@pytest.mark.parametrize("size, right", [(5, True), (6, False)])
def test_addresses_outside_of_the_arguments_are_found(size, right):
    x, out = torch.arange(5.0), torch.empty(5)
    assert out.isnan().all()
    with contextlib.nullcontext() if right else pytest.raises(IndexError, match="addresses lie in none"):
        _double[2,](x, out, size, BLOCK=4, enable_fp_fusion=True)
    assert right == torch.equal(out, 2 * x)


@on_cpu
@pytest.mark.parametrize("waits", [True, False])
def test_a_barrier_that_is_missing_is_found(waits):
    x, out = torch.arange(128.0), torch.empty(128)
    with contextlib.nullcontext() if waits else pytest.raises(AssertionError, match="a warp reads what another one writes"):
        _reverse[1,](x, torch.empty(128), out, BLOCK=128, WAITS=waits, enable_fp_fusion=True)
    assert waits == torch.equal(out, x.flip(0))


@on_cpu
def test_programs_that_write_to_one_place_are_found():
    _meet[1,](torch.empty(1), enable_fp_fusion=True)
    with pytest.raises(AssertionError, match="threads write different numbers"):
        _meet[2,](torch.empty(1), enable_fp_fusion=True)


@on_cpu
@pytest.mark.parametrize("fused", [True, False])
def test_threads_agree_on_a_sum_of_products_that_is_not_fused(fused):
    x, y, out = (torch.rand(257)[1:].view(16, 16) for _ in range(3))  # not aligned: a thread has one product of a row
    _sum_products[1,](x, y, out, SIZE=16, FUSED=fused, enable_fp_fusion=True)
    torch.testing.assert_close(out, (x * y).sum(1, keepdim=True).expand(16, 16))
    assert (out != out[:, :1]).any() == fused


# ------------------------------------------------------------------ operators


@pytest.mark.parametrize("size", [(28, 28), (17, 23), (40, 40)])
def test_drawing(use_kernels, size):
    arcs = make_arcs(6, 4).requires_grad_()
    on = torch.rand(6, 4, device=device) < 0.7
    on[2] = False
    params = torch.tensor([3.0, -3.0], device=device, requires_grad=True)
    logits = check_gradients(lambda: rendering.get_logits(arcs, on, params, *size), [arcs, params], use_kernels)
    assert (logits[2] == rendering.LOG_PAPER).all() and logits.max() > -1


def test_more_strokes_than_a_byte_can_count(use_kernels):
    arcs = make_arcs(2, 300)[:1]
    arcs[..., :2], arcs[..., 2:5] = torch.rand(1, 300, 2, device=device), 0.02
    params, on = torch.tensor([3.0, -3.0], device=device), torch.zeros(1, 300, device=device)
    on[:, [2, 43, 258, 299]] = 1  # 258 = 2 and 299 = 43, modulo 256
    arcs.requires_grad_()
    check_gradients(lambda: rendering.get_logits(arcs, on, params, 28, 28), [arcs], use_kernels)
    gradient = torch.autograd.grad(rendering.get_logits(arcs, on, params, 28, 28).sum(), arcs)[0]
    assert (gradient.abs().sum(2) > 0).nonzero()[:, 1].tolist() == [2, 43, 258, 299]


@pytest.mark.parametrize("spread, size", [(0.03, (28, 28)), (0.5, (28, 28)), (0.1, (17, 70))])
def test_affine_likelihood(use_kernels, spread, size):
    """Maps near the identity, and maps that leave the page or shrink it to a point"""
    maps = torch.eye(3)[:2] + spread * torch.randn(7, 2, 3)
    maps = maps.to(device).requires_grad_()
    arcs, on = make_arcs(5, 4), torch.ones(5, 4, device=device)
    logits = rendering.get_logits(arcs, on, torch.tensor([3.0, -3.0], device=device), *size).requires_grad_()
    obs = (torch.rand(5, *size, device=device) < logits.sigmoid()).float()
    check_gradients(lambda: rendering.affine_log_prob(logits, obs, maps), [logits, maps], use_kernels)
    weights = torch.linspace(-2, 1, 7, device=device, requires_grad=True)

    def score():
        return rendering.affine_log_prob(logits, obs, maps, weights.log_softmax(0))

    check_gradients(score, [logits, maps, weights], use_kernels)


def test_a_gradient_does_not_depend_on_the_order_of_its_sum(use_kernels):
    use_kernels(True)
    logits, obs = torch.randn(3, 28, 28, device=device), torch.zeros(3, 28, 28, device=device)
    maps = (torch.eye(3)[:2] + 0.2 * torch.randn(4, 2, 3)).to(device)
    results = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        rendering.affine_log_prob(leaf, obs, maps).sum().backward()
        results.append(leaf.grad)
    assert all(torch.equal(result, results[0]) for result in results)


def test_all_fixed_maps(use_kernels):
    logits, obs = torch.randn(2, 28, 28, device=device) * 4, torch.rand(2, 28, 28, device=device).round()
    maps, results = rendering.get_fixed_maps()[::100].contiguous().to(device), []
    for enabled in (False, True):
        use_kernels(enabled)
        results.append(rendering.affine_log_prob(logits, obs, maps))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-5)


def test_first_layers(use_kernels):
    network = models.InferenceNetwork().to(device)
    obs = models.GenerativeModel().sample(3)[1].to(device)
    parameters = [*network.conv0.parameters(), *network.conv1.parameters()]
    check_gradients(lambda: network.embed(obs), parameters, use_kernels)


DECODERS = dict(prior=(64, 4, 0, 0.0), network=(64, 64, 20, 0.0), mixed=(5, 6, 3, 0.2), lookup=(64, 128, 6, 0.0))


def make_decoder(name, num_arcs=5):
    num_primitives, hidden_size, context_size, uniform_mixture = DECODERS[name]
    decoder = models.Decoder(num_primitives, num_arcs, hidden_size, context_size, uniform_mixture).to(device)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter *= 3  # so that choices are far from uniform
    latent = torch.randint(num_primitives, (3, 7, num_arcs, 2), device=device)
    latent[..., 1] %= 2
    latent[..., 0, 1] = 0
    return decoder, latent, torch.randn(7, context_size, device=device)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_log_prob(use_kernels, name):
    decoder, latent, context = make_decoder(name)
    inputs = [*decoder.parameters(), *[context.requires_grad_()] * (context.numel() > 0)]
    check_gradients(lambda: decoder.log_prob(latent, context), inputs, use_kernels)


@pytest.mark.parametrize(
    "name, num_multiprocessors",
    [*itertools.product(DECODERS, [triton_decoder.NUM_MULTIPROCESSORS]), ("prior", 0), ("network", 0)],
)
def test_decoder_samples(use_kernels, name, num_multiprocessors, monkeypatch):
    """The same programs from the same random numbers, their log-probabilities and the gradients of these, by the kernels
    for few latents and for many"""
    decoder, _, context = make_decoder(name)
    monkeypatch.setattr(triton_decoder, "NUM_MULTIPROCESSORS", num_multiprocessors)
    uniform = torch.rand(4 * 7, 5, 2, device=device)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: uniform)
    numbers = iter([(arc, i) for arc in range(5) for i in (0, 1) if (arc, i) != (0, 1)])

    def rand_like(x):
        arc, i = next(numbers)
        return uniform[:, arc, i : i + 1]

    monkeypatch.setattr(torch, "rand_like", rand_like)
    results = []
    for enabled in (False, True):
        use_kernels(enabled)
        latent, log_prob = decoder.sample_and_log_prob(4, context)
        assert log_prob.requires_grad == enabled
        scored = log_prob if enabled else decoder.log_prob(latent, context)
        with torch.no_grad():  # by kernels of their own
            torch.testing.assert_close(decoder.log_prob(latent, context), scored, atol=1e-4, rtol=1e-5)
            if enabled:
                assert torch.equal(decoder.sample(4, context), latent)
        factor = torch.linspace(-1, 2, 7, device=device)
        gradients = torch.autograd.grad((scored * factor).sum(), list(decoder.parameters()))
        results.append([latent, log_prob.detach(), *gradients])
    assert torch.equal(results[0][0], results[1][0]) and len(results[0][0].unique(dim=0)) > 1
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-5)
    assert_near(results[1][2:], results[0][2:], 1e-4)


@pytest.mark.parametrize(
    "num_remembered, num_proposed, dtype", [(10, 10, torch.uint8), (3, 2, torch.int16), (1, 1, torch.uint8)]
)
def test_the_memory(use_kernels, num_remembered, num_proposed, dtype):
    """The same is kept, and drawn from it, and other images' memories stay; of few programs, so that many are repeated"""
    num_images, obs_id = 6, torch.tensor([4, 0, 3], device=device)
    before = losses.init_memory(num_images, num_remembered, 3, 4).to(device, dtype)
    proposal = models.unpack(torch.randint(2, (num_proposed, 3, 3), device=device))  # [P, B, A, 2]
    proposal[0] = models.unpack(before[obs_id, -1])
    log_joint = 2 * torch.randn(num_remembered + num_proposed, 3, device=device)
    log_joint[0, 1] = -torch.inf
    drawn = set()
    for seed in range(20):
        results = []
        for enabled in (False, True):
            use_kernels(enabled)
            torch.manual_seed(seed)
            memory = before.clone()
            latent, log_r, statistics = losses.remember(memory, obs_id, proposal, lambda _: log_joint)
            results.append([latent, memory, log_r, *statistics.values()])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)
        drawn.add(tuple(latent.flatten().tolist()))
    assert len(drawn) > 3 or num_remembered == 1


def test_candidates_of_many_strokes(use_kernels):
    """More than a program takes"""
    use_kernels(True)
    memory, obs_id = losses.init_memory(3, 4, 150, 4).to(device), torch.tensor([2, 0], device=device)
    proposal = models.unpack(torch.randint(8, (4, 2, 150), device=device))  # [P, B, A, 2]
    remembered = models.unpack(memory[obs_id]).transpose(0, 1)
    assert torch.equal(gpu.get_candidates(memory, obs_id, proposal), torch.cat([remembered, proposal]))


def test_nan_is_remembered(use_kernels):
    """So that a model that has diverged shows in the loss"""
    use_kernels(True)
    memory, obs_id = losses.init_memory(1, 2, 3, 4).to(device), torch.zeros(1, dtype=torch.long, device=device)
    proposal, log_joint = models.unpack(memory.transpose(0, 1) ^ 1), torch.tensor([[1.0], [2], [torch.nan], [0]], device=device)
    _, log_r, _ = losses.remember(memory, obs_id, proposal, lambda _: log_joint)
    assert log_r.isnan().all() and torch.equal(models.unpack(memory[:, 0]), proposal[0])


@pytest.mark.parametrize("name, num_alphabets", [("rws", 0), ("mws", 3)])
def test_an_objective(use_kernels, name, num_alphabets):
    """Loss and all gradients of an objective, given the same programs"""
    model = models.GenerativeModel(16, num_alphabets=num_alphabets, num_arcs=3, likelihood_settings={"num_maps": 4})
    with torch.no_grad():  # strokes that differ: equal ones tie where they meet
        model.pre_sharpness += torch.randn(16)
        model.pre_width += 0.3 * torch.randn(16)
    network = models.InferenceNetwork(16, 16, num_alphabets=num_alphabets, num_arcs=3).to(device)
    model, results = model.to(device), []
    alphabet = model.sample_alphabet(2) if num_alphabets else None
    latent, obs = model.sample(2, alphabet)
    memory = losses.init_memory(2, 2, 3, 16).to(device)
    memory[:, :1] = losses.pack(latent.unsqueeze(1), torch.uint8)
    proposal = network.sample(obs, 2, alphabet)

    def sample(num_particles, context):
        return proposal, networks[1].decoder.log_prob(proposal, context).detach()

    for enabled in (False, True):
        use_kernels(enabled)
        networks = copy.deepcopy((model, network))
        networks[1].decoder.sample_and_log_prob = sample
        torch.manual_seed(0)
        if name == "mws":
            obs_id = torch.arange(2, device=device)
            loss, statistics = losses.mws(*networks, memory.clone(), obs, obs_id, 2, alphabet)
        else:
            loss, statistics = getattr(losses, name)(*networks, obs, 2, alphabet)
        loss.backward()
        grads = [p.grad for net in networks for p in net.parameters()]
        results.append([loss.detach(), *statistics.values(), *grads])
    assert_near(results[1], results[0], 1e-3, floor=1e-6)


def test_nan_reaches_the_scores(use_kernels):
    use_kernels(True)
    for name in ["pre_dxdy", "pre_theta", "pre_sharpness", "pre_width", "pre_rendering_params", "theta_affine"]:
        model = models.GenerativeModel(num_arcs=3, likelihood_settings={"num_maps": 4}).to(device)
        latent, obs = model.sample(1)
        latent[..., 1] = 1
        dict(model.named_parameters())[name].data.fill_(torch.nan)
        assert sum(model.log_prob(latent[None], obs)).isnan().all(), name


# ------------------------------------------------------------------ kernels that do not work

# kernel -> the operator that it is part of, and the place of a result among its arguments
KERNELS = {
    "rendering._draw": ("drawing", 3), "rendering._score_maps": ("scoring", 3), "decoder._decode": ("decoder", 7),
    "convolution._convolve": ("convolution", 3), "convolution._differentiate_pool": ("convolution", 2),
    "memory._keep_best": ("memory", 5),
}  # fmt: skip


FAULTS = {"raises": "ptxas is missing", "is wrong": "differs by", "draws no programs": "not programs"}


@pytest.mark.parametrize(
    "kernel, fault",
    [
        *((kernel, "is wrong") for kernel in KERNELS),
        ("memory._keep_best", "raises"),
        ("convolution._differentiate_pool", "raises"),  # in a backward pass
        ("decoder._decode", "draws no programs"),
    ],
)
def test_a_kernel_that_does_not_work_is_turned_off_alone(use_kernels, kernel, fault, monkeypatch, capsys):
    """And a step then gives plain PyTorch's loss and gradients"""
    (name, place), works = KERNELS[kernel], gpu.launch

    def broken(launched, grid, *args, **options):
        if launched == kernel and fault == "raises":
            raise RuntimeError("ptxas is missing\nand more")
        works(launched, grid, *args, **options)
        if launched == kernel and fault == "is wrong":
            args[place].copy_(args[place] * 1.5 + 1)
        if launched == kernel and fault == "draws no programs" and options["SAMPLE"]:
            args[6].fill_(1000)

    model, network = make_tiny_model(), models.InferenceNetwork(16, 16, num_arcs=2).to(device)
    network.conv0, network.conv1 = torch.nn.Conv2d(1, 16, 3, padding=2), torch.nn.Conv2d(16, 128, 3, padding=1)
    network.to(device)
    latent, obs = model.sample(2)
    use_kernels(True)
    monkeypatch.setattr(gpu, "launch", broken)
    before = torch.get_rng_state()
    kernel_check.check(lambda: (model, network), device, 1, 2, 2, losses.init_memory, losses.remember)
    assert torch.equal(torch.get_rng_state(), before)
    assert gpu.kernels.operators == [other for other in gpu.OPERATORS if other != name]
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and FAULTS[fault] in line
    results, parameters = [], [*model.parameters(), *network.parameters()]
    for enabled in (True, False):
        if not enabled:
            use_kernels(False)
        loss = -sum(model.log_prob(latent[None], obs)).mean() - network.log_prob(latent[None], obs).mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    assert_near(*results, 1e-3, floor=1e-6)


def test_what_breaks_all_kernels_is_said_once(use_kernels, monkeypatch, capsys):
    use_kernels(True)
    monkeypatch.setattr(kernel_check, "find_fault", lambda *_: "there is no C compiler")
    model, network = make_tiny_model(), models.InferenceNetwork(16, 16, num_arcs=2).to(device)
    kernel_check.check(lambda: (model, network), device, 1, 2, 2, losses.init_memory, losses.remember)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in gpu.OPERATORS) and "no C compiler" in line and gpu.kernels.operators == []


def test_kernels_that_work_stay_on(use_kernels, monkeypatch, capsys):
    model, network = make_tiny_model(), models.LookupInferenceNetwork(3, 16, 16, num_arcs=2).to(device)
    use_kernels(True)
    kernel_check.check(lambda: (model, network), device, 2, 3, 2, losses.init_memory, losses.remember)
    monkeypatch.setattr(kernel_check, "MOST_ROWS", 6)
    # more than fits, which a run that scores a few at a time can have
    kernel_check.check(lambda: (model, network), device, 10**7, 3, 2, losses.init_memory, losses.remember)
    model.double(), network.double()  # which has no kernels
    kernel_check.check(lambda: (model, network), device, 2, 3, 2, losses.init_memory, losses.remember)
    assert gpu.kernels.operators == gpu.OPERATORS and capsys.readouterr().err == ""


def test_strokes_of_a_new_model_may_tie(use_kernels, capsys):
    """Where equal strokes meet, rounding decides which of them has the gradient"""
    use_kernels(True)
    gpu.kernels.use(["drawing"])
    network = models.LookupInferenceNetwork(4).to(device)
    kernel_check.check(lambda: (models.GenerativeModel().to(device), network), device, 2, 4)
    assert gpu.kernels.operators == ["drawing"] and capsys.readouterr().err == ""


def test_an_unusable_gpu_starts_the_program_anew(monkeypatch, capsys):
    """A stand-in for an illegal access, after which every call to CUDA fails"""

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(os, "environ", {})  # kernel_check leaves a mark there, for the new program
    monkeypatch.setattr(kernel_check, "synchronize", fail)
    started = []
    monkeypatch.setattr(kernel_check.os, "execv", lambda *command: started.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        kernel_check.find_fault("drawing", [fail], device)
    assert started == [(sys.executable, sys.orig_argv)] and "illegal memory access" in capsys.readouterr().err
    assert gpu.WITHOUT_KERNELS in os.environ
    gpu.kernels.use(gpu.OPERATORS)
    assert gpu.kernels.operators == []  # in the new program
