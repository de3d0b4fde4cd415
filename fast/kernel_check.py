"""Tries a GPU's kernels before a run relies on them.

The kernels of a run are compiled in parallel. Then each operator is run on new models, at the run's sizes, forward and
backward, and some rows are compared with plain PyTorch. An operator that fails or differs is turned off, with a warning. After
an error that leaves the GPU unusable for this process, the program is restarted, once, without kernels.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import sys

import torch

from fast import gpu
from fast.gpu import kernels
from util import get_reason, warn

NUM_COMPARED = 64  # rows
MOST_ROWS = 2**16  # most latents to try kernels on; a run may have more, and scores a few at a time
TOLERANCE = 1e-2  # relative to the norm: far above rounding, and far below the effect of a fault


def check(build, device, num_particles, batch_size, memory_size=0, init_memory=None, remember=None):
    """Tries the kernels that are turned on, for num_particles proposals and memory_size (M) remembered programs for each of
    batch_size (B) images. Leaves torch's random state as it is.

    Args: build: a function without arguments that returns a new generative model and inference network of the run's sizes.
        The run's own would not do: if the outcome depended on its progress, it might resume with other kernels, and so with
        other bits; init_memory, remember: those of losses.py, for a run with a memory
    """
    names = kernels.operators
    if not names:
        return
    # Without TF32: with convolutions rounded to ten bits, other pixels could win in pooling
    in_float32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad(), in_float32:
        torch.manual_seed(0)
        generative_model, inference_network = build()
        with torch.no_grad():  # where equal strokes meet, as in a new model, rounding decides which of them gets the gradient
            generative_model.pre_sharpness += torch.randn_like(generative_model.pre_sharpness)
            generative_model.pre_width += 0.3 * torch.randn_like(generative_model.pre_width)
        num_latents = min(num_particles + memory_size, max(MOST_ROWS // batch_size, 1))
        checks = get_checks(generative_model, inference_network, num_latents, batch_size, device)
        if 0 < memory_size <= gpu.MAX_CANDIDATES - num_particles:  # larger ones have no kernels
            sizes = generative_model.num_arcs, generative_model.num_primitives
            memory, proposal = (init_memory(batch_size, num, *sizes) for num in (memory_size, num_particles))
            checks["memory"] = [get_memory_check(memory, proposal, remember, device)]
        if device.type == "cuda" and importlib.util.find_spec("triton"):
            compile_side_by_side([function for name in names for function in checks.get(name, [])], device)
        faults = {name: find_fault(name, checks.get(name, []), device) for name in names}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the run needs less, and other runs may share the GPU
    for fault in dict.fromkeys(filter(None, faults.values())):
        broken = ", ".join(name for name in names if faults[name] == fault)
        warn(f"the kernels of {broken} do not work here ({fault}); plain PyTorch takes their place, which is slower")
    kernels.use([name for name in names if faults[name] is None])


def compile_side_by_side(functions, device):
    """Compiles the kernels that functions would launch, in threads, without launching them. What fails here fails again in
    find_fault, which reports it"""
    from triton.runtime.jit import JITFunction

    def compile_kernel(*args, **options):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            launch(*args, **{**options, "warmup": True})

    launch, num_threads = JITFunction.run, len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(num_threads) as threads:
        JITFunction.run = lambda *args, **options: threads.submit(compile_kernel, *args, **options)
        try:
            for function in functions:
                with contextlib.suppress(Exception):
                    function()
        finally:
            JITFunction.run = launch


def find_fault(name, functions, device):
    """Compares what functions compute by one operator's kernels and by plain PyTorch. Returns: what is wrong, in words, or
    None"""
    try:
        for function in functions:
            kernels.use([name])
            got = function()
            synchronize(device)
            kernels.use([])
            for ours, plain in zip(got, function(), strict=True):
                difference = (ours - plain).norm() / plain.norm().clamp(min=1e-12)
                if not difference <= TOLERANCE:
                    return f"the result differs by {difference.item():.1%}"
    except Exception as error:  # from Triton, from CUDA, or from this program
        reason = get_reason(error, 100)
        try:
            synchronize(device)
        except RuntimeError:
            start_anew(reason)
        return reason


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_anew(reason):
    """Replaces this process by the same program without kernels; checkpoints stay in place"""
    warn(f"a kernel left the GPU unusable ({reason}); restarting without kernels, which is slower")
    os.environ[gpu.WITHOUT_KERNELS] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


# ------------------------------------------------------------------ what is compared


def get_checks(generative_model, inference_network, num_particles, batch_size, device):
    """For each operator, functions without arguments that compute values and gradients with it; by plain PyTorch, only those of
    the first NUM_COMPARED rows"""
    num_rows, num_arcs = num_particles * batch_size, generative_model.num_arcs
    ids = torch.randint(generative_model.num_primitives, (num_particles, batch_size, num_arcs), device=device)
    latent = torch.stack([ids, torch.randint(2, ids.shape, device=device)], -1)  # [P, B, A, 2]
    latent[..., 0, 1] = 0
    size = generative_model.num_rows, generative_model.num_cols
    obs = (torch.rand(batch_size, *size, device=device) < 0.1).float()
    logits = torch.randn(num_rows, *size, device=device).to(generative_model.pre_theta.dtype) * 3
    likelihood = generative_model.likelihood

    def draw():
        return compare(generative_model.get_logits(choose(latent.flatten(0, 1))), generative_model.parameters())

    def score():
        drawn, seen = (choose(x) for x in (logits, obs.repeat(num_particles, 1, 1)))
        drawn.requires_grad_()
        value, gradient, *others = compare(likelihood.log_prob(drawn, seen), [drawn, *likelihood.parameters()])
        return [value, gradient[:NUM_COMPARED], *others]  # the kernels' gradient has all rows

    def embed():
        layers = inference_network.conv0, inference_network.conv1
        embedding = inference_network.embed(choose(obs))
        return compare(embedding, [parameter for layer in layers for parameter in layer.parameters()])

    decoders = [x for x in (generative_model.prior, inference_network.decoder) if getattr(x, "has_kernels", False)]
    decoders = [x for x in decoders if x.linear.weight.dtype == torch.float32]  # others run without kernels
    return {
        "decoder": [function for decoder in decoders for function in get_decoder_checks(decoder, latent)],
        "drawing": [draw],
        "scoring": [score] if likelihood.maps is not None else [],
        "convolution": [embed] if hasattr(inference_network, "conv0") else [],
    }


def get_decoder_checks(decoder, latent):
    """Scores and samples, each with gradients and without: four kernels"""
    context, parameters = torch.randn(latent.shape[1], decoder.context_size, device=latent.device), list(decoder.parameters())
    drawn = {}

    def score(with_gradients):
        used = latent if kernels.operators else latent[:1, :NUM_COMPARED]
        with torch.set_grad_enabled(with_gradients):  # for particles after the first, the kernels are only tried
            return compare(decoder.log_prob(used, choose(context))[0], parameters)

    def sample(with_gradients):
        with torch.set_grad_enabled(with_gradients):
            if kernels.operators:
                some, log_prob = decoder.sample_and_log_prob(len(latent), context)
                drawn[with_gradients] = some[:1, :NUM_COMPARED]
                return compare(log_prob[0], parameters)
            ids, on = drawn[with_gradients][0].unbind(-1)  # plain PyTorch would draw others, so it scores these
            if not (((0 <= ids) & (ids < decoder.num_primitives)).all() and ((0 <= on) & (on < 2)).all()):
                raise ValueError("the samples are not programs")  # must not be looked up on a GPU
            return compare(decoder.log_prob(drawn[with_gradients], context[:NUM_COMPARED])[0], parameters)

    return [functools.partial(function, with_gradients) for function in (score, sample) for with_gradients in (True, False)]


def get_memory_check(memory, proposal, remember, device):
    """A function that remembers proposals, half of which are already remembered: memory [B, M, A] and proposal [B, P, A], both
    packed; remember: losses.remember"""
    batch_size, memory_size, _ = memory.shape
    num_known = min(proposal.shape[1] // 2, memory_size)
    proposal[:, :num_known] = memory[:, :num_known]
    latent = torch.stack([proposal // 2, proposal % 2], -1).long().transpose(0, 1).contiguous().to(device)  # [P, B, A, 2]
    log_joint = torch.randn(memory_size + len(latent), batch_size, device=device)
    obs_id = torch.arange(batch_size, device=device)

    def remember_them():
        torch.manual_seed(0)
        kept = memory.to(device, copy=True)
        drawn, log_r, statistics = remember(kept, obs_id, latent, lambda _: log_joint)
        return [x.float() for x in (drawn, log_r, kept, *statistics.values())]

    return remember_them


def choose(rows):
    """All rows for kernels, only the compared ones for plain PyTorch"""
    return rows[:] if kernels.operators else rows[:NUM_COMPARED]


def compare(value, inputs):
    """The first NUM_COMPARED rows of a value and, if it has any, the gradients of a fixed sum of these rows for inputs"""
    value = value[:NUM_COMPARED]
    factor = torch.linspace(-1, 2, value.numel(), device=value.device).view_as(value)
    needed = [x for x in inputs if x.requires_grad and value.requires_grad]
    gradients = torch.autograd.grad((value * factor).sum(), needed, allow_unused=True) if needed else []
    return [value.detach(), *(x for x in gradients if x is not None)]
