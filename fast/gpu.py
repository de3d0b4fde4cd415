"""Operators that compute on a GPU, with Triton kernels, what rendering.py and models.py compute on a CPU.

`is_gpu` and `kernels` decide what is computed the GPU's way. A GPU wants few and large kernels
and no synchronisation, so nothing is looked up or left out depending on its value. All devices but
the CPU count as GPUs, so that tests can run whole steps on torch's meta device, which has no values.

The operators are registered with torch: the meta device knows the shapes of their results, and in the tests
a CPU carries out what Triton compiled for a GPU (tests/ptx.py).
"""

import contextlib
import math
import os

import torch
import torch.nn.functional as F

LOG_PAPER = math.log(1e-6)  # the logit of a pixel far from all arcs: log(1e-6)
EPS = torch.finfo(torch.float32).eps  # the least probability of a pixel's value, and the most is one minus that
NEGLIGIBLE = 2**-24  # a weight that float32 cannot add to a weight of one
MAX_DECODER_SIZE = 256  # units or primitives that a program of the decoder's kernels can hold in registers
MAX_CANDIDATES = 64  # latents per image, remembered and proposed, that a program of the memory's kernels can compare
OPERATORS = ["drawing", "scoring", "decoder", "convolution", "memory"]  # that have kernels
WITHOUT_KERNELS = "STROKES_WITHOUT_KERNELS"  # in the environment of a program that was started anew: see kernel_check.py


class Kernels:
    """Which kernels this process uses, and how: the one place that knows. rendering.set_compile turns them on and off."""

    def __init__(self):
        self.compiled = {}  # on a CPU: functions of rendering.py, each with its compiled form
        self.operators = []  # on a GPU: those of OPERATORS that use their Triton kernels, the others being plain PyTorch
        self.scored_at_once = 8192  # on a GPU: latents scored at a time; halved whenever its memory runs out

    def use(self, names):
        """Uses the Triton kernels of these OPERATORS alone"""
        self.operators = [name for name in OPERATORS if name in names and WITHOUT_KERNELS not in os.environ]

    def are_used(self, name, x):
        """Whether one of OPERATORS uses its kernels on x"""
        return name in self.operators and is_gpu(x.device) and x.dtype == torch.float32


kernels = Kernels()


def is_gpu(device):
    return torch.device(device).type != "cpu"


def on_device_of(x):
    """A context in which kernels are launched on x's device, which need not be the current one"""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ------------------------------------------------------------------ drawing


@torch.library.custom_op("strokes::draw", mutates_args=())
def _draw(
    arcs: torch.Tensor, on: torch.Tensor, rendering_params: torch.Tensor, num_rows: int, num_cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_rendering

    with on_device_of(arcs):
        return triton_rendering.draw(arcs, on, rendering_params, num_rows, num_cols, LOG_PAPER)


@_draw.register_fake
def _(arcs, on, rendering_params, num_rows, num_cols):
    logits = arcs.new_empty(len(arcs), num_rows * num_cols)
    return logits, torch.empty_like(logits, dtype=torch.int16)


@torch.library.custom_op("strokes::differentiate_draw", mutates_args=())
def _differentiate_draw(
    arcs: torch.Tensor,
    on: torch.Tensor,
    rendering_params: torch.Tensor,
    arc_id: torch.Tensor,
    grad: torch.Tensor,
    num_rows: int,
    num_cols: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_rendering

    with on_device_of(arcs):
        return triton_rendering.differentiate_draw(arcs, on, rendering_params, arc_id, grad, num_rows, num_cols, LOG_PAPER)


@_differentiate_draw.register_fake
def _(arcs, on, rendering_params, arc_id, grad, num_rows, num_cols):
    return torch.empty_like(arcs), arcs.new_empty(len(arcs), 2)


class DrawArcs(torch.autograd.Function):
    """Logits of ink: arcs [B, A, 7], on [B, A], rendering_params [2] -> [B, R * C]"""

    @staticmethod
    def forward(ctx, arcs, on, rendering_params, num_rows, num_cols):
        ctx.size = num_rows, num_cols
        given = arcs.contiguous(), on.contiguous(), rendering_params.contiguous()
        logits, arc_id = _draw(*given, num_rows, num_cols)
        ctx.save_for_backward(*given, arc_id)
        return logits

    @staticmethod
    def backward(ctx, grad):
        grad_arcs, grad_params = _differentiate_draw(*ctx.saved_tensors, grad.contiguous(), *ctx.size)
        return grad_arcs, None, grad_params.sum(0), None, None


# ------------------------------------------------------------------ the affine likelihood


@torch.library.custom_op("strokes::score_maps", mutates_args=())
def _score_maps(logits: torch.Tensor, obs: torch.Tensor, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fast import triton_rendering

    with on_device_of(logits):
        return triton_rendering.score_maps(logits, obs, maps, EPS)


@_score_maps.register_fake
def _(logits, obs, maps):
    num_images, num_rows, num_cols = logits.shape
    probs, by_map = logits.new_empty(num_images, num_rows + 4, num_cols + 4), logits.new_empty(num_images, len(maps))
    return logits.new_empty(num_images), by_map, probs


@torch.library.custom_op("strokes::differentiate_score_maps", mutates_args=())
def _differentiate_score_maps(
    obs: torch.Tensor,
    maps: torch.Tensor,
    log_prob: torch.Tensor,
    by_map: torch.Tensor,
    probs: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_rendering

    with on_device_of(obs):
        return triton_rendering.differentiate_score_maps(obs, maps, log_prob, by_map, probs, grad, EPS, NEGLIGIBLE)


@_differentiate_score_maps.register_fake
def _(obs, maps, log_prob, by_map, probs, grad):
    return torch.empty_like(obs), torch.empty_like(maps)


class ScoreMaps(torch.autograd.Function):
    """log p(x|z) under a mixture of maps: logits [N, R, C], obs [N, R, C], maps [T, 2, 3], log_weights [T] or None, if they are
    equal -> [N]"""

    @staticmethod
    def forward(ctx, logits, obs, maps, log_weights):
        obs, maps, log_num_maps = obs.contiguous(), maps.contiguous(), math.log(len(maps))
        log_prob, by_map, probs = _score_maps(logits.contiguous(), obs, maps)
        if log_weights is not None:  # for the backward pass as if the maps were equally probable, and explained images so
            by_map = by_map + (log_weights + log_num_maps)
            log_prob = by_map.logsumexp(1) - log_num_maps
        ctx.save_for_backward(obs, maps, log_prob, by_map, probs)
        return log_prob

    @staticmethod
    def backward(ctx, grad):
        obs, maps, log_prob, by_map, probs = ctx.saved_tensors
        grad_logits, grad_maps = _differentiate_score_maps(obs, maps, log_prob, by_map, probs, grad.contiguous())
        grad_weights = grad @ by_map.softmax(1) if ctx.needs_input_grad[3] else None
        return grad_logits, None, grad_maps, grad_weights


# ------------------------------------------------------------------ the first two layers of the inference network


@torch.library.custom_op("strokes::convolve", mutates_args=())
def _convolve(obs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_convolution

    with on_device_of(obs):
        return triton_convolution.convolve(obs, weight, bias)


@_convolve.register_fake
def _(obs, weight, bias):
    out = obs.new_empty(len(obs), 14, 14, len(bias))
    return out, torch.empty_like(out, dtype=torch.uint8)


@torch.library.custom_op("strokes::differentiate_convolve", mutates_args=())
def _differentiate_convolve(obs: torch.Tensor, argmax: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_convolution

    with on_device_of(obs):
        return triton_convolution.differentiate_convolve(obs, argmax, grad)


@_differentiate_convolve.register_fake
def _(obs, argmax, grad):
    return grad.new_empty(grad.shape[3], 1, 3, 3), grad.new_empty(grad.shape[3])


class Convolve(torch.autograd.Function):
    """The first convolution, pooled and rectified: obs [B, 28, 28], weight [C, 1, 3, 3], bias [C] -> [B, C, 14, 14], channels
    last"""

    @staticmethod
    def forward(ctx, obs, weight, bias):
        obs = obs.contiguous()
        out, argmax = _convolve(obs, weight.contiguous(), bias)
        ctx.save_for_backward(obs, argmax)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        return None, *_differentiate_convolve(*ctx.saved_tensors, grad.permute(0, 2, 3, 1).contiguous())


@torch.library.custom_op("strokes::pool", mutates_args=())
def _pool(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_convolution

    with on_device_of(x):
        return triton_convolution.pool(x, bias)


@_pool.register_fake
def _(x, bias):
    out = x.new_empty(len(x), 6, 6, len(bias))
    return out, torch.empty_like(out, dtype=torch.uint8)


@torch.library.custom_op("strokes::differentiate_pool", mutates_args=())
def _differentiate_pool(argmax: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_convolution

    with on_device_of(grad):
        return triton_convolution.differentiate_pool(argmax, grad)


@_differentiate_pool.register_fake
def _(argmax, grad):
    return grad.new_empty(len(grad), 14, 14, grad.shape[3]), grad.new_empty(grad.shape[3])


class Pool(torch.autograd.Function):
    """The second convolution's result, pooled, with its bias, rectified: x [B, C, 14, 14], bias [C] -> [B, C, 6, 6], channels
    last"""

    @staticmethod
    def forward(ctx, x, bias):
        out, argmax = _pool(x.permute(0, 2, 3, 1).contiguous(), bias)
        ctx.save_for_backward(argmax)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_bias = _differentiate_pool(*ctx.saved_tensors, grad.permute(0, 2, 3, 1).contiguous())
        return grad_x.permute(0, 3, 1, 2), grad_bias


# ------------------------------------------------------------------ the decoder


class Lookup(torch.autograd.Function):
    """Looks up rows of a table; the gradient is a matrix product, and so summed in a fixed order:
    table [K, D], index [...] -> [..., D]"""

    @staticmethod
    def forward(ctx, table, index):
        ctx.num_rows = len(table)
        ctx.save_for_backward(index)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return get_one_hot(index.flatten(), ctx.num_rows, grad).t() @ grad.flatten(0, -2), None


def get_one_hot(index, num_classes, like):
    """As F.one_hot, which would synchronise: index [N] -> [N, K]"""
    return (index.unsqueeze(1) == torch.arange(num_classes, device=index.device)).to(like.dtype)


def can_decode(lstm, linear):
    """Whether the kernels are for a decoder with these layers: an LSTMCell and a Linear that fit a program's registers"""
    if type(lstm) is not torch.nn.LSTMCell or type(linear) is not torch.nn.Linear:
        return False
    return max(lstm.hidden_size, linear.out_features - 2) <= MAX_DECODER_SIZE and lstm.bias and linear.bias is not None


@torch.library.custom_op("strokes::decode", mutates_args=())
def _decode(
    table: torch.Tensor,
    context: torch.Tensor,
    weight_hh: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    uniform: torch.Tensor,
    latent: torch.Tensor,
    uniform_mixture: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fast import triton_decoder

    drawn = torch.empty_like(uniform, dtype=torch.long)
    used = drawn if uniform.numel() else latent
    with on_device_of(table):
        return drawn, *triton_decoder.decode(table, context, weight_hh, weight, bias, uniform, used, uniform_mixture, save)


@_decode.register_fake
def _(table, context, weight_hh, weight, bias, uniform, latent, uniform_mixture, save):
    drawn = torch.empty_like(uniform, dtype=torch.long)
    num_rows, num_arcs = (drawn if uniform.numel() else latent).shape[:2]
    num_logits, num_units = weight.shape
    sizes = (num_units, 4 * num_units, num_logits)
    saved = [table.new_empty(num_arcs, num_rows, size) if save else table.new_empty(0) for size in sizes]
    return drawn, table.new_empty(num_rows), table.new_empty(num_arcs, num_rows, num_units), *saved


@torch.library.custom_op("strokes::differentiate_decode", mutates_args=())
def _differentiate_decode(
    weight_hh: torch.Tensor,
    weight: torch.Tensor,
    latent: torch.Tensor,
    grad: torch.Tensor,
    cells: torch.Tensor,
    gates: torch.Tensor,
    log_probs: torch.Tensor,
    uniform_mixture: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fast import triton_decoder

    with on_device_of(weight):
        return triton_decoder.differentiate_decode(weight_hh, weight, latent, grad, cells, gates, log_probs, uniform_mixture)


@_differentiate_decode.register_fake
def _(weight_hh, weight, latent, grad, cells, gates, log_probs, uniform_mixture):
    return torch.empty_like(gates), torch.empty_like(log_probs)


class Decode(torch.autograd.Function):
    """Samples latents, or scores them, by a decoder.

    Args: table [2 * K, 4 * H], context [B, 4 * H], weight_hh [4 * H, H], weight [K + 2, H], bias [K + 2]; uniform
        [P * B, A, 2], to sample, or empty; latent [P * B, A, 2], to score, or empty; uniform_mixture; with_gradients:
        whether a backward pass may follow
    Returns: the latents drawn, if any, [P * B, A, 2]; log_prob [P * B]
    """

    @staticmethod
    def forward(ctx, table, context, weight_hh, weight, bias, uniform, latent, uniform_mixture, with_gradients):
        ctx.uniform_mixture, ctx.num_contexts, ctx.num_codes = uniform_mixture, len(context), len(table)
        save = with_gradients and any(ctx.needs_input_grad)
        table, context, latent = table.contiguous(), context.contiguous(), latent.contiguous()
        drawn, log_prob, *saved = _decode(table, context, weight_hh, weight, bias, uniform, latent, uniform_mixture, save)
        ctx.mark_non_differentiable(drawn)
        if save:
            ctx.save_for_backward(weight_hh, weight, drawn if uniform.numel() else latent, *saved)
        return drawn, log_prob

    @staticmethod
    def backward(ctx, _, grad):
        weight_hh, weight, latent, hidden, cells, gates, log_probs = ctx.saved_tensors
        grad_gates, grad_logits = _differentiate_decode(
            weight_hh, weight, latent, grad.contiguous(), cells, gates, log_probs, ctx.uniform_mixture
        )  # [A, N, 4 * H], [A, N, K + 2]
        codes = 2 * latent[:, :-1, 0] + latent[:, :-1, 1]  # [N, A - 1]
        before = get_one_hot(codes.t().flatten(), ctx.num_codes, grad)  # [(A - 1) * N, 2 * K]
        after = grad_gates[1:].flatten(0, 1)  # [(A - 1) * N, 4 * H]
        grad_context = grad_gates.unflatten(1, (-1, ctx.num_contexts)).sum((0, 1))
        grad_logits = grad_logits.flatten(0, 1)
        return (
            before.t() @ after, grad_context, after.t() @ hidden[:-1].flatten(0, 1),
            grad_logits.t() @ hidden.flatten(0, 1), grad_logits.sum(0), None, None, None, None,
        )  # fmt: skip


def sample(table, context, weight_hh, weight, bias, num_particles, num_arcs, uniform_mixture):
    """Draws latents [P * B, A, 2] and their log_prob [P * B], with gradients if they are enabled; the other arguments
    as for `Decode`. Draws fewer random numbers than on a CPU, all at once."""
    uniform = torch.rand(num_particles * len(context), num_arcs, 2, device=context.device)
    none = torch.empty(0, dtype=torch.long, device=context.device)
    return Decode.apply(table, context, weight_hh, weight, bias, uniform, none, uniform_mixture, torch.is_grad_enabled())


def log_prob(table, context, weight_hh, weight, bias, latent, uniform_mixture):
    """latent [P * B, A, 2] -> [P * B], with gradients if they are enabled; the other arguments as for `Decode`"""
    none = torch.empty(0, device=context.device)
    return Decode.apply(table, context, weight_hh, weight, bias, none, latent, uniform_mixture, torch.is_grad_enabled())[1]


# ------------------------------------------------------------------ the memory of Memoised Wake-Sleep


def can_remember(memory, num_proposed):
    """Whether the kernels are on and support a memory, which they do if it is packed and small"""
    is_small = memory.dim() == 3 and memory.shape[1] + num_proposed <= MAX_CANDIDATES
    return is_small and "memory" in kernels.operators and is_gpu(memory.device)


@torch.library.custom_op("strokes::get_candidates", mutates_args=())
def get_candidates(memory: torch.Tensor, obs_id: torch.Tensor, proposal: torch.Tensor) -> torch.Tensor:
    """What images remember, and what is proposed for them: memory [N, M, A], obs_id [B], proposal [P, B, A, 2]
    -> [M + P, B, A, 2]"""
    from fast import triton_memory

    with on_device_of(memory):
        return triton_memory.get_candidates(memory.contiguous(), obs_id.contiguous(), proposal.contiguous())


@get_candidates.register_fake
def _(memory, obs_id, proposal):
    return proposal.new_empty(memory.shape[1] + len(proposal), *proposal.shape[1:])


@torch.library.custom_op("strokes::keep_best", mutates_args=("memory",))
def keep_best(
    memory: torch.Tensor, obs_id: torch.Tensor, latent: torch.Tensor, log_joint: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keeps the best distinct candidates in memory, and draws one of them.

    Args: memory [N, M, A], whose rows obs_id [B] are changed; latent [M + P, B, A, 2], log_joint [M + P, B]: the
        candidates; uniform [B], in [0, 1)
    Returns: the latent drawn, [1, B, A, 2]; log_r [B], log of its probability; statistics [2, B]: the share of
        proposals that are novel, and whether the best is
    """
    from fast import triton_memory

    given = obs_id.contiguous(), latent.contiguous(), log_joint.contiguous(), uniform.contiguous()
    with on_device_of(memory):
        return triton_memory.keep_best(memory, *given)


@keep_best.register_fake
def _(memory, obs_id, latent, log_joint, uniform):
    return torch.empty_like(latent[:1]), torch.empty_like(uniform), uniform.new_empty(2, len(uniform))
