"""What rendering.py, models.py and losses.py compute on a CPU, computed by Triton kernels on a GPU.

`is_gpu` and `kernels` decide what is computed the GPU's way. A GPU needs few, large kernels and no synchronisation, so nothing
is looked up or left out depending on its value. All devices but the CPU count as GPUs: tests run whole steps on the meta
device, which has no values and launches nothing, and a CPU executes compiled kernels (tests/ptx.py).

The module is large because each of five operations needs its kernels' sizes, results and gradients.
"""

import importlib
import math
import os

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOG_PAPER = math.log(1e-6)  # the logit of a pixel far from all arcs
EPS = torch.finfo(torch.float32).eps  # the lowest probability of a pixel's value; the highest is one minus that
NEGLIGIBLE = 2**-24  # too small for float32 to add to a weight of one
MAX_DECODER_SIZE = 256  # most units or primitives that a program of the decoder's kernels can hold in registers
MAX_CANDIDATES = 64  # most latents per image, remembered and proposed, that a program of the memory's kernels can compare
BLOCK_PIXELS = 1024  # pixels that a program draws or scores: a whole 28 x 28 image fits
OPERATORS = ["drawing", "scoring", "decoder", "convolution", "memory"]  # those with kernels
WITHOUT_KERNELS = "STROKES_WITHOUT_KERNELS"  # in the environment of a restarted program: see kernel_check.py


class Kernels:
    """The one place that knows which kernels this process uses, and how. rendering.set_compile turns them on and off."""

    def __init__(self):
        self.compiled = {}  # on a CPU: functions of rendering.py, each with its compiled form
        self.operators = []  # on a GPU: those of OPERATORS that use their Triton kernels, the others being plain PyTorch
        self.scored_at_once = 8192  # on a GPU: latents scored at a time; halved whenever it runs out of memory

    def use(self, names):
        """Uses the Triton kernels of these OPERATORS only"""
        self.operators = [name for name in OPERATORS if name in names and WITHOUT_KERNELS not in os.environ]

    def are_used(self, name, x):
        """Whether one of OPERATORS uses its kernels on x"""
        return name in self.operators and is_gpu(x.device) and x.dtype == torch.float32


kernels = Kernels()


def is_gpu(device):
    return torch.device(device).type != "cpu"


def launch(kernel, grid, *args, get_options=None, **options):
    """Launches a kernel ("rendering._draw" of triton_rendering.py), which writes its results into some of its arguments, on
    the first one's device. Args: get_options: a function from the module to more options"""
    if args[0].is_meta or 0 in grid:
        return
    module, name = kernel.split(".")
    module = importlib.import_module(f".triton_{module}", __package__)  # only if Triton is installed
    options.update(get_options(module) if get_options else {})
    with torch.cuda.device_of(args[0]):
        getattr(module, name)[grid](*args, **options, enable_fp_fusion=True)


def divide_up(size, block):
    """The number of blocks that hold size elements"""
    return -(-size // block)


def next_power_of_2(size):
    return 1 << (size - 1).bit_length()


# ------------------------------------------------------------------ drawing


class DrawArcs(torch.autograd.Function):
    """Logits of ink: arcs [B, A, 7], on [B, A], rendering_params [2] -> [B, R * C]"""

    @staticmethod
    def forward(ctx, arcs, on, rendering_params, num_rows, num_cols):
        given, num_pixels = (arcs.contiguous(), on.contiguous(), rendering_params.contiguous()), num_rows * num_cols
        logits = arcs.new_empty(len(arcs), num_pixels)
        arc_id = torch.empty_like(logits, dtype=torch.int16)  # the arc that each pixel's ink belongs to
        ctx.sizes = arcs.shape[1], num_rows, num_cols, LOG_PAPER
        ctx.grid = len(arcs), divide_up(num_pixels, BLOCK_PIXELS)
        launch("rendering._draw", ctx.grid, *given, logits, arc_id, *ctx.sizes, BLOCK=BLOCK_PIXELS, num_warps=4)
        ctx.save_for_backward(*given, arc_id)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        arcs = ctx.saved_tensors[0]
        grad_arcs, grad_params = arcs.new_empty(*ctx.grid, *arcs.shape[1:]), arcs.new_empty(*ctx.grid, 2)
        args = *ctx.saved_tensors, grad.contiguous(), grad_arcs, grad_params, *ctx.sizes
        launch("rendering._differentiate_draw", ctx.grid, *args, BLOCK=BLOCK_PIXELS, num_warps=8)
        return sum_chunks(grad_arcs), None, sum_chunks(grad_params).sum(0), None, None


def sum_chunks(x):
    """The sum over an image's chunks: [N, chunks, ...] -> [N, ...]"""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1)


# ------------------------------------------------------------------ the affine likelihood

MAPS_PER_PROGRAM = 10
MAPS_PER_GRADIENT = 2  # few, since most maps have no weight and their programs end at once
MIXED_AT_ONCE = 1024  # maps
BORDER = 2  # pixels of paper around an image
FIXED_POINT = 2.0**28  # gradients are added up as integers of this resolution: see ScoreMaps.backward


class ScoreMaps(torch.autograd.Function):
    """log p(x|z) under a mixture of maps, of images of up to BLOCK_PIXELS: logits [N, R, C], obs [N, R, C], maps [T, 2, 3],
    log_weights [T] or None, if they are equal -> [N]"""

    @staticmethod
    def forward(ctx, logits, obs, maps, log_weights):
        logits, obs, maps, num_maps = logits.contiguous(), obs.contiguous(), maps.contiguous(), len(maps)
        (num_images, num_rows, num_cols), log_num_maps = obs.shape, math.log(num_maps)
        probs = logits.new_empty(num_images, num_rows + 2 * BORDER, num_cols + 2 * BORDER)  # ink's, with a border of zeros
        by_map, log_prob = logits.new_empty(num_images, num_maps), logits.new_empty(num_images)  # log p(x | z, map), log p(x|z)
        ctx.sizes = dict(ROWS=num_rows, COLS=num_cols, BLOCK=BLOCK_PIXELS)
        grid = num_images, divide_up(probs.shape[1] * probs.shape[2], BLOCK_PIXELS)
        launch("rendering._pad_probs", grid, logits, probs, **ctx.sizes, num_warps=4)
        grid, sizes = (num_images, divide_up(num_maps, MAPS_PER_PROGRAM)), dict(MAPS=MAPS_PER_PROGRAM, **ctx.sizes)
        launch("rendering._score_maps", grid, probs, obs, maps, by_map, num_maps, EPS, **sizes, num_warps=2)
        if log_weights is None:
            at_once = min(next_power_of_2(num_maps), MIXED_AT_ONCE)
            launch("rendering._mix_maps", (num_images,), by_map, log_prob, num_maps, BLOCK=at_once, num_warps=1)
        else:  # as if maps were equally probable, but explained images better or worse by that much
            by_map = by_map + (log_weights + log_num_maps)
            log_prob = by_map.logsumexp(1) - log_num_maps
        ctx.save_for_backward(obs, maps, log_prob, by_map, probs)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Many pixels add to one, in integers, so that the order does not matter. The shares of maps sum to one, so a sum is
        below 2^33 for images up to 28 x 28 (|1 / signed| is at most 2^23), less than 2^63 / FIXED_POINT = 2^35, and has a
        resolution of 2^-28."""
        obs, maps, log_prob, by_map, probs = ctx.saved_tensors
        num_images, num_maps, sizes = len(obs), len(maps), ctx.sizes
        fixed, grad_logits, grad = torch.zeros_like(probs, dtype=torch.int64), torch.empty_like(obs), grad.contiguous()
        grad_maps = maps.new_empty(num_images, num_maps, 6)
        launch(
            "rendering._differentiate_score_maps", (num_images, divide_up(num_maps, MAPS_PER_GRADIENT)),
            obs, maps, log_prob, by_map, probs, grad, fixed, grad_maps, num_maps, EPS, FIXED_POINT, NEGLIGIBLE,
            MAPS=MAPS_PER_GRADIENT, **sizes, num_warps=4,
        )  # fmt: skip
        grid = num_images, divide_up(probs.shape[1] * probs.shape[2], BLOCK_PIXELS)
        launch("rendering._differentiate_probs", grid, probs, grad, fixed, grad_logits, FIXED_POINT, **sizes, num_warps=4)
        grad_weights = grad @ by_map.softmax(1) if ctx.needs_input_grad[3] else None
        return grad_logits, None, grad_maps.sum(0).view_as(maps), grad_weights


# ------------------------------------------------------------------ the first two layers of the inference network

FIRST, SECOND = 14, 6  # rows and columns after the first layer, and after the second
# Positions that a program handles at once, and its warps: tuned on an H200
CONVOLVE = dict(POSITIONS=4, num_warps=1)
DIFFERENTIATE_CONVOLVE = dict(POSITIONS=8, num_warps=2)
POOL = dict(POSITIONS=4, num_warps=4)
DIFFERENTIATE_POOL = dict(POSITIONS=16, num_warps=4)


class Convolve(torch.autograd.Function):
    """The first layer, pooled and rectified: obs [B, 28, 28], weight [C, 1, 3, 3], bias [C] -> [B, C, 14, 14], channels last"""

    @staticmethod
    def forward(ctx, obs, weight, bias):
        obs, weight, num_channels = obs.contiguous(), weight.contiguous(), len(bias)
        out = obs.new_empty(len(obs), FIRST, FIRST, num_channels)
        argmax = torch.empty_like(out, dtype=torch.uint8)  # where in its 3 x 3 window each comes from
        ctx.sizes = dict(SIZE=obs.shape[1], CHANNELS=next_power_of_2(num_channels))
        grid = (divide_up(len(obs) * FIRST**2, CONVOLVE["POSITIONS"]),)
        launch("convolution._convolve", grid, obs, weight, bias, out, argmax, len(obs), num_channels, **ctx.sizes, **CONVOLVE)
        ctx.save_for_backward(obs, argmax)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (obs, argmax), grad = ctx.saved_tensors, grad.permute(0, 2, 3, 1).contiguous()
        partial = grad.new_empty(len(obs), 10, grad.shape[3])  # nine for the weight, one for the bias
        args = obs, argmax, grad, partial, grad.shape[3]
        launch("convolution._differentiate_convolve", (len(obs), 3), *args, **ctx.sizes, **DIFFERENTIATE_CONVOLVE)
        total = partial.sum(0)  # [10, C]
        return None, total[:9].t().reshape(-1, 1, 3, 3), total[9].clone()


class Pool(torch.autograd.Function):
    """Pools the second convolution, adds its bias and rectifies: x [B, C, 14, 14], bias [C] -> [B, C, 6, 6], channels last"""

    @staticmethod
    def forward(ctx, x, bias):
        x, num_channels = x.permute(0, 2, 3, 1).contiguous(), len(bias)
        out = x.new_empty(len(x), SECOND, SECOND, num_channels)
        argmax = torch.empty_like(out, dtype=torch.uint8)
        ctx.channels = dict(CHANNELS=next_power_of_2(num_channels))
        grid = (divide_up(len(x) * SECOND**2, POOL["POSITIONS"]),)
        launch("convolution._pool", grid, x, bias, out, argmax, len(x), num_channels, **ctx.channels, **POOL)
        ctx.save_for_backward(argmax)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, num_channels = grad.permute(0, 2, 3, 1).contiguous(), grad.shape[1]
        grad_x, partial = grad.new_empty(len(grad), FIRST, FIRST, num_channels), grad.new_empty(len(grad), num_channels)
        args = *ctx.saved_tensors, grad, grad_x, partial, num_channels
        launch("convolution._differentiate_pool", (len(grad),), *args, **ctx.channels, **DIFFERENTIATE_POOL)
        return grad_x.permute(0, 3, 1, 2), partial.sum(0)


# ------------------------------------------------------------------ the decoder

ROWS_PER_PROGRAM = 16  # latents side by side: the fewest that tl.dot accepts


class Lookup(torch.autograd.Function):
    """Looks up rows of a table; the gradient is a matrix product, and so is summed in a fixed order: table [K, D],
    index [...] -> [..., D]"""

    @staticmethod
    def forward(ctx, table, index):
        ctx.num_rows = len(table)
        ctx.save_for_backward(index)
        return F.embedding(index, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index = ctx.saved_tensors[0]
        return get_one_hot(index.flatten(), ctx.num_rows, grad).t() @ grad.flatten(0, -2), None


def get_one_hot(index, num_classes, like):
    """Like F.one_hot, but without synchronising: index [N] -> [N, K]"""
    return (index.unsqueeze(1) == torch.arange(num_classes, device=index.device)).to(like.dtype)


def can_decode(lstm, linear):
    """Whether the kernels support a decoder with these layers: an LSTMCell and a Linear that fit in a program's registers"""
    if type(lstm) is not torch.nn.LSTMCell or type(linear) is not torch.nn.Linear:
        return False
    return max(lstm.hidden_size, linear.out_features - 2) <= MAX_DECODER_SIZE and lstm.bias and linear.bias is not None


class Decode(torch.autograd.Function):
    """Samples latents, or scores them, by a decoder.

    Args: table [2 * K, 4 * H], context [B, 4 * H]: the LSTM's inputs for a stroke's code 2 * id + on, and for an image;
        weight_hh [4 * H, H], weight [K + 2, H], bias [K + 2]; given [P * B, A, 2]: numbers in [0, 1) to sample with, or
        latents, integers, to score; uniform_mixture; with_gradients: whether a backward pass may follow
    Returns: the latents, [P * B, A, 2]; log_prob [P * B]
    """

    @staticmethod
    def forward(ctx, table, context, weight_hh, weight, bias, given, uniform_mixture, with_gradients):
        ctx.uniform_mixture, ctx.num_contexts, ctx.num_codes = float(uniform_mixture), len(context), len(table)
        is_sampling, save = given.is_floating_point(), with_gradients and any(ctx.needs_input_grad)
        latent = torch.empty_like(given, dtype=torch.long) if is_sampling else given.contiguous()
        (num_rows, num_arcs), num_units, num_choices = latent.shape[:2], weight.shape[1], weight.shape[0] - 2
        log_prob, hidden = table.new_empty(num_rows), table.new_empty(num_arcs, num_rows, num_units)
        sizes = num_units, 4 * num_units, num_choices + 2  # cells, gates, and log-probabilities of ids and of off and on
        saved = [table.new_empty(num_arcs, num_rows, size) if save else table.new_empty(0) for size in sizes]
        ctx.grid = (divide_up(num_rows, ROWS_PER_PROGRAM),)
        launch(
            "decoder._decode", ctx.grid, table.contiguous(), context.contiguous(), weight_hh, weight, bias, given, latent,
            log_prob, hidden, *saved, num_rows, len(context), num_arcs, num_units, num_choices, ctx.uniform_mixture,
            SAMPLE=is_sampling, SAVE=save, ROWS=ROWS_PER_PROGRAM,
            get_options=lambda module: module.get_options(module.FORWARD, ctx.grid, num_units, num_choices),
        )  # fmt: skip
        if save:
            ctx.save_for_backward(weight_hh, weight, latent, hidden, *saved)
        return latent, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad):
        weight_hh, weight, latent, hidden, cells, gates, log_probs = ctx.saved_tensors
        (num_rows, num_arcs), num_units, num_choices = latent.shape[:2], weight.shape[1], weight.shape[0] - 2
        grad_gates, grad_logits = torch.empty_like(gates), torch.empty_like(log_probs)  # [A, N, 4 * H], [A, N, K + 2]
        launch(
            "decoder._differentiate_decode", ctx.grid, weight_hh, weight, latent, grad.contiguous(), cells, gates, log_probs,
            grad_gates, grad_logits, num_rows, num_arcs, num_units, num_choices, ctx.uniform_mixture, ROWS=ROWS_PER_PROGRAM,
            get_options=lambda module: module.get_options(module.BACKWARD, ctx.grid, num_units, num_choices),
        )  # fmt: skip
        codes = 2 * latent[:, :-1, 0] + latent[:, :-1, 1]  # [N, A - 1]
        before = get_one_hot(codes.t().flatten(), ctx.num_codes, grad)  # [(A - 1) * N, 2 * K]
        after = grad_gates[1:].flatten(0, 1)  # [(A - 1) * N, 4 * H]
        grad_context = grad_gates.unflatten(1, (-1, ctx.num_contexts)).sum((0, 1))
        grad_logits = grad_logits.flatten(0, 1)
        return (
            before.t() @ after, grad_context, after.t() @ hidden[:-1].flatten(0, 1),
            grad_logits.t() @ hidden.flatten(0, 1), grad_logits.sum(0), None, None, None,
        )  # fmt: skip


def sample(table, context, weight_hh, weight, bias, num_particles, num_arcs, uniform_mixture):
    """Draws latents [P * B, A, 2] and their log_prob [P * B], with gradients if they are enabled; the other arguments
    as for `Decode`. Draws its random numbers at once, and so others than on a CPU."""
    uniform = torch.rand(num_particles * len(context), num_arcs, 2, device=context.device)
    return Decode.apply(table, context, weight_hh, weight, bias, uniform, uniform_mixture, torch.is_grad_enabled())


def log_prob(table, context, weight_hh, weight, bias, latent, uniform_mixture):
    """latent [P * B, A, 2] -> [P * B], with gradients if they are enabled; the other arguments as for `Decode`"""
    return Decode.apply(table, context, weight_hh, weight, bias, latent, uniform_mixture, torch.is_grad_enabled())[1]


# ------------------------------------------------------------------ the memory of Memoised Wake-Sleep

MOST_STROKES = 1024  # that a program of _get_candidates handles


def can_remember(memory, num_proposed):
    """Whether the kernels are on and support a memory, that is, if it is packed and small"""
    is_small = memory.dim() == 3 and memory.shape[1] + num_proposed <= MAX_CANDIDATES
    return is_small and "memory" in kernels.operators and is_gpu(memory.device)


def get_candidates(memory, obs_id, proposal):
    """As losses.get_candidates: memory [N, M, A], obs_id [B], proposal [P, B, A, 2] -> [M + P, B, A, 2]"""
    memory, obs_id, proposal, num_remembered = memory.contiguous(), obs_id.contiguous(), proposal.contiguous(), memory.shape[1]
    num_proposed, batch_size, num_arcs, _ = proposal.shape
    latent = proposal.new_empty(num_remembered + num_proposed, batch_size, num_arcs, 2)
    num_strokes = len(latent) * num_arcs
    block = min(next_power_of_2(num_strokes), MOST_STROKES)
    sizes = batch_size, num_arcs, num_remembered, num_proposed
    grid = batch_size, divide_up(num_strokes, block)
    launch("memory._get_candidates", grid, memory, obs_id, proposal, latent, *sizes, BLOCK=block, num_warps=4)
    return latent


def remember(memory, obs_id, latent, log_joint, uniform):
    """Keeps the best distinct candidates in memory, and draws one of them.

    Args: memory [N, M, A], contiguous, whose rows obs_id [B] are changed; latent [M + P, B, A, 2], log_joint [M + P, B]: the
        candidates; uniform [B], in [0, 1)
    Returns: the latent drawn, [1, B, A, 2]; log_r [B], log of its probability; statistics [2, B]: the share of
        proposals that are novel, and whether the best candidate is one of them
    """
    num_candidates, batch_size, num_arcs, _ = latent.shape
    drawn, log_r, statistics = torch.empty_like(latent[:1]), torch.empty_like(uniform), uniform.new_empty(2, batch_size)
    sizes = batch_size, num_arcs, memory.shape[1], num_candidates - memory.shape[1]
    launch(
        "memory._keep_best", (batch_size,), latent.contiguous(), log_joint.contiguous(), obs_id.contiguous(), uniform.contiguous(),
        memory, drawn, log_r, statistics, *sizes, BLOCK=next_power_of_2(num_candidates), num_warps=4,
    )  # fmt: skip
    return drawn, log_r, statistics
