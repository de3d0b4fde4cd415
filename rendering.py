"""From strokes to pixels, and from pixels to log-probabilities: the hot path.

`get_logits` draws arcs, and `affine_log_prob` scores images under a mixture over affine maps of the drawing. Both work in
float32 and float64, with and without gradients; on a GPU they are Triton kernels (fast/gpu.py).
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from fast import gpu
from fast.gpu import LOG_PAPER, kernels
from util import warn

BLOCK = 16  # images scored side by side: as many floats as fit in a register
MAPS_AT_ONCE = 40
SHORTEST = 1e-18  # chords below it are points: the square of such a number, in a gradient, would be 0 in float32
MOST_SAMPLED = 2**15  # images seen through maps at a time: cuDNN takes at most 65 535

# ------------------------------------------------------------------ how kernels are called

# Kernels save only their inputs for the backward pass, and both passes work on one chunk at a time, so that memory grows by
# only the few kilobytes of each latent's image.


def _get_chunk_size(device):
    """How many latents are scored at a time: on a GPU, many, for few launches; on a CPU, what fits in the cache"""
    if gpu.is_gpu(device):
        return 8192
    return 1024 if kernels.compiled else 64


def _get_gradient_chunk_size(device):
    """As _get_chunk_size, for backward passes, which take more memory per latent: on a CPU, no buffer exceeds the 32 MB up to
    which malloc reuses freed memory"""
    return 2500 if gpu.is_gpu(device) else 256


def _split(size, *batched):
    """Cuts tensors along their first dimension: a list of tuples of chunks of at least two rows (if there are two)"""
    num_rows = len(batched[0])
    starts = range(0, max(num_rows - 1, 1), size)
    return [tuple(x[start : start + size if start != starts[-1] else num_rows] for x in batched) for start in starts]


def _run_in_chunks(kernel, batched, rest, size):
    """Like _run, `size` rows at a time: the batch, even of one, is dimension 0 of all results"""
    if kernels.compiled and len(batched[0]) == 1:  # would be compiled separately
        return tree_map(lambda x: x[:1], _run_in_chunks(kernel, [torch.cat([x, x]) for x in batched], rest, size))
    results = [_run(kernel, *chunk, *rest) for chunk in _split(size, *batched)]
    return results[0] if len(results) == 1 else tree_map(lambda *parts: torch.cat(parts), *results)


def _run(kernel, *args):
    """Calls a kernel, compiled or, for second derivatives, as it is. Inputs are detached and made contiguous, since others would
    be compiled separately."""
    if kernel not in kernels.compiled or torch.is_grad_enabled():
        return kernel(*args)
    args = [x.detach().contiguous() for x in args]
    for x, dims in zip(args, ANY_SIZE[kernel], strict=False):
        torch._dynamo.mark_dynamic(x, [dim for dim in dims if x.shape[dim] > 1])
    return kernels.compiled[kernel](*args)


# ------------------------------------------------------------------ arcs


def _norm(x, y):
    """|(x, y)|, with gradient 0 instead of NaN at 0."""
    squared = x * x + y * y
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def get_arc_constants(arcs):
    """The arc's constants for `get_exponent`, computed once per arc rather than per pixel: arcs [..., 7] -> [..., 10]"""
    x_start, y_start, dx, dy, theta, sharpness, width = arcs.unbind(-1)
    middle = x_start + dx / 2, y_start + dy / 2
    chord = _norm(dx, dy), dx * dx + dy * dy  # its length, and the square of that
    return torch.stack([*middle, dx, dy, theta.sin(), theta.cos(), *chord, sharpness**2, width**2], -1)


def get_squared_distance(x, y, dx, dy, sin, cos, chord, squared_chord):
    """Squared distance to an arc from points given relative to the middle of its chord. All arguments broadcast.

    The arc is the part of a circle over the chord (dx, dy); sin and cos are those of theta, half its signed angle. The
    textbook formula uses the circle's centre, which goes to infinity as the arc straightens. Here the distance to the circle is
    rationalised: values and gradients are finite for any theta in [-pi, pi] and any chord, even of length zero.
    """
    squared = x * x + y * y
    along = (x * dx + y * dy).abs()
    across = x * dy - y * dx
    # Strictly on the arc's side: for a chord of length 0 both sides agree, and only the other one is free of 0/0. NaN counts
    # as on the arc's side, and so propagates.
    away = cos * (squared_chord / 2 - along) - sin * across <= 0
    numerator = (squared - squared_chord / 4) * sin - cos * across
    denominator = _norm(x * sin - cos / 2 * dy, y * sin + cos / 2 * dx) + chord / 2
    away = away | (denominator <= SHORTEST)
    to_circle = numerator / torch.where(away, 1.0, denominator)
    to_end = squared - along + squared_chord / 4
    return torch.where(away, to_end, to_circle * to_circle)


def get_exponent(x, y, constants):
    """Log of an arc's ink at points, before clipping: x, y broadcast against the ten constants"""
    x_middle, y_middle, *shape, squared_sharpness, squared_width = constants
    return squared_sharpness * (squared_width - get_squared_distance(x - x_middle, y - y_middle, *shape))


def get_pixel_centres(num_rows, num_cols, like):
    """x [R * C] and y [R * C] of the pixels in the unit square, y upwards."""
    options = dict(dtype=like.dtype, device=like.device)
    x = torch.arange(num_cols, **options) / max(num_cols - 1, 1)
    y = 1 - torch.arange(num_rows, **options) / max(num_rows - 1, 1)
    return x.repeat(num_rows), y.repeat_interleave(num_cols)


def _draw(constants, on, x, y, rendering_params):
    """Logits of ink [B, R * C], and the arc that each pixel's ink belongs to [B, R * C] (one that is off if none is on).

    Args: constants [B, A, 10]; on [B, A], bool; x, y [R * C]; rendering_params [2]
    """
    exponent = get_exponent(x, y, constants.unsqueeze(-1).unbind(-2))  # [B, A, R * C]
    exponent, arc_id = exponent.masked_fill(~on.unsqueeze(-1), -math.inf).max(1)
    return _get_ink_logits(exponent, rendering_params), arc_id


def _draw_ink(constants, on, x, y, rendering_params):
    """Like _draw without arc_id, but faster: [B, R * C]"""
    exponent = get_exponent(x, y, constants.unsqueeze(-1).unbind(-2))  # [B, A, R * C]
    return _get_ink_logits(exponent.masked_fill(~on.unsqueeze(-1), -math.inf).amax(1), rendering_params)


def _get_ink_logits(exponent, rendering_params):
    """exponent: of the strongest arc, -inf if none is on"""
    scale, bias = rendering_params
    ink = torch.where(exponent != -math.inf, scale * exponent.clamp(max=0).exp() + bias, -math.inf)
    # log(exp(ink) + 1e-6), without overflow
    return torch.logaddexp(ink, torch.full_like(ink, LOG_PAPER))


def _differentiate_draw(strongest, on, grad, rendering_params, x, y):
    """The gradients of strongest [B, 10, R * C], the constants of the arc that each pixel belongs to, and of
    rendering_params [B, 2]; on [B, R * C]; grad [B, R * C], of the logits"""

    def draw(strongest, rendering_params):
        exponent = get_exponent(x, y, strongest.unbind(1)).masked_fill(~on, -math.inf)
        return _get_ink_logits(exponent, rendering_params.split(1, 1))

    return torch.func.vjp(draw, strongest, rendering_params)[1](grad)


class _DrawArcs(torch.autograd.Function):
    """Logits of ink: constants [B, A, 10], on [B, A], x, y [R * C], rendering_params [2] -> [B, R * C]"""

    @staticmethod
    def forward(ctx, constants, on, x, y, rendering_params):
        size = _get_chunk_size(constants.device)
        if not kernels.compiled:  # the ink of every arc exists at once: no more of it than of ten arcs on 28 x 28 pixels
            size = min(size, size * 10 * 28 * 28 // (constants.shape[1] * len(x)) + 1)
        args = (constants, on), (x, y, rendering_params), size
        if not any(ctx.needs_input_grad):
            return _run_in_chunks(_draw_ink, *args)
        logits, arc_id = _run_in_chunks(_draw, *args)  # [B, R * C]
        ctx.save_for_backward(constants, on, x, y, rendering_params, arc_id)
        return logits

    @staticmethod
    def backward(ctx, grad):
        constants, on, x, y, rendering_params, arc_id = ctx.saved_tensors
        chunks = _split(_get_gradient_chunk_size(grad.device), constants, on, arc_id, grad)
        gradients = [_differentiate_arcs(*chunk, x, y, rendering_params) for chunk in chunks]
        grad_constants, grad_params = zip(*gradients, strict=True)
        return torch.cat(grad_constants), None, None, None, torch.stack(grad_params).sum(0)


def _differentiate_arcs(constants, on, arc_id, grad, x, y, rendering_params):
    """The backward pass of _DrawArcs: the gradients of constants and of rendering_params"""
    is_of_arc = grad.new_zeros(*grad.shape, constants.shape[1]).scatter_(2, arc_id.unsqueeze(2), 1.0)  # [B, R * C, A]
    on = on.gather(1, arc_id)  # [B, R * C]
    arc_id = arc_id.unsqueeze(1).expand(-1, constants.shape[2], -1)  # [B, 10, R * C]
    strongest = constants.transpose(1, 2).gather(2, arc_id)  # [B, 10, R * C]
    batched = strongest, on, grad, rendering_params.expand(len(on), -1)
    grad_strongest, grad_params = _run_in_chunks(_differentiate_draw, batched, (x, y), max(len(on), 1))  # at once
    grad_constants = torch.bmm(grad_strongest, is_of_arc)  # [B, 10, A], summed in a fixed order
    return grad_constants.transpose(1, 2), grad_params.sum(0)


def get_logits(arcs, on_offs, rendering_params, num_rows, num_cols):
    """Draws arcs: the logit of each pixel being ink.

    Each pixel takes its ink from the strongest arc alone, so gradients flow through one arc per pixel.

    Args:
        arcs [B, A, 7]: x_start, y_start, dx, dy (of the unit square, y upwards), theta (half the angle that the arc spans, in
            radians, positive if the arc is to the left of its chord), sharpness, width
        on_offs [B, A]: 0 for an arc that leaves no ink
        rendering_params [2]: scale (positive) and bias
        num_rows (R), num_cols (C): of the image; row 0 is its top
    Returns: logits [B, R, C]
    """
    if kernels.are_used("drawing", arcs):
        logits = gpu.DrawArcs.apply(arcs, on_offs != 0, rendering_params, num_rows, num_cols)  # [B, R * C]
    else:
        x, y = get_pixel_centres(num_rows, num_cols, arcs)  # each [R * C]
        logits = _DrawArcs.apply(get_arc_constants(arcs), on_offs != 0, x, y, rendering_params)  # [B, R * C]
    return logits.unflatten(-1, (num_rows, num_cols))  # [B, R, C]


@torch.no_grad()
def get_arc_logits(arcs, x, y, rendering_params):
    """The logits of ink at points x, y [R * C], for each arc by itself: arcs [K, 7] -> [K, R * C]"""
    exponent = get_exponent(x, y, get_arc_constants(arcs).unsqueeze(-1).unbind(1))  # [K, R * C]
    return _get_ink_logits(exponent, rendering_params)


# ------------------------------------------------------------------ affine maps


def get_fixed_maps():
    """Shears, then rotations, scalings and translations, with three values for each of seven numbers: [2187, 2, 3]"""
    angle, scale, shift = [-0.1 * math.pi, 0.0, 0.1 * math.pi], [0.9, 1.0, 1.1], [-0.2, 0.0, 0.2]
    tx, ty, sx, sy, rotation, shear_x, shear_y = torch.cartesian_prod(
        *[torch.tensor(values) for values in [shift, shift, scale, scale, angle, angle, angle]]
    ).unbind(1)
    zero, one = torch.zeros_like(tx), torch.ones_like(tx)

    def matrix(*entries):
        return torch.stack([*entries, zero, zero, one], -1).view(-1, 3, 3)

    product = (
        matrix(one, zero, -tx, zero, one, -ty)
        @ matrix(sx, zero, zero, zero, sy, zero)
        @ matrix(rotation.cos(), -rotation.sin(), zero, rotation.sin(), rotation.cos(), zero)
        @ matrix(one, shear_x.tan(), zero, shear_y.tan(), one, zero)
    )
    return product[:, :2].contiguous()


def get_shifts(most):
    """Maps of all shifts by up to `most` pixels (of 28) in each direction: [(2 * most + 1)^2, 2, 3]"""
    pixel = 2 / 27  # in affine_grid's coordinates, from corner to corner
    shift = torch.arange(-most, most + 1) * pixel
    shifts = torch.cartesian_prod(shift, shift).unsqueeze(2)  # [T, 2, 1]
    return torch.cat([torch.eye(2).expand(len(shifts), 2, 2), shifts], 2)


def apply_maps(probs, maps):
    """Images seen through affine maps, one per image, with bilinear sampling and zeros outside: probs [N, R, C],
    maps [N, 2, 3] -> [N, R, C], clamped so that logarithms are finite"""
    seen = []
    for some, some_maps in zip(probs.unsqueeze(1).split(MOST_SAMPLED), maps.split(MOST_SAMPLED), strict=True):
        grid = F.affine_grid(some_maps, some.shape, align_corners=True)
        seen.append(F.grid_sample(some, grid, align_corners=True))
    return _clamp(torch.cat(seen).squeeze(1))


def _clamp(probs):
    return probs.clamp(gpu.EPS, 1 - gpu.EPS)


def get_taps(maps, num_rows, num_cols):
    """Bilinear sampling written out: the four pixels that contribute to each of a map's pixels.

    Args: maps [T, 2, 3]
    Returns: index [4, T, R * C] into the R * C pixels; weight, of the same shape, 0 outside the image
    """
    grid = F.affine_grid(maps, (len(maps), 1, num_rows, num_cols), align_corners=True)
    # Positions far outside have no weight anyway; clamping keeps them valid integers.
    x = ((grid[..., 0] + 1) / 2 * (num_cols - 1)).flatten(1).clamp(-2, num_cols + 1)
    y = ((grid[..., 1] + 1) / 2 * (num_rows - 1)).flatten(1).clamp(-2, num_rows + 1)  # [T, R * C]
    index, weight = [], []
    for row_offset in [0, 1]:
        for col_offset in [0, 1]:
            row, col = y.floor() + row_offset, x.floor() + col_offset
            inside = (row >= 0) & (row < num_rows) & (col >= 0) & (col < num_cols)
            weight.append((1 - (x - col).abs()) * (1 - (y - row).abs()) * inside)
            row, col = row.clamp(0, num_rows - 1), col.clamp(0, num_cols - 1)
            index.append((row * num_cols + col).nan_to_num().long())  # NaN remains in the weight
    return torch.stack(index), torch.stack(weight)


def _log_prob_by_map(probs, paper, index, weight):
    """log p(x | map) of every image under every map.

    Images are the columns of blocks of 16, pixels the rows: a bilinear tap is a contiguous row times a number, and a block
    stays in the cache for all maps. Four pixels share a logarithm: float32 can hold the product of their probabilities.

    Args: probs, paper (1 - obs) [blocks, pixels, 16]; index, weight [4, T, 4, pixels / 4]
    Returns: [blocks, T, 16]
    """
    product = 1.0
    paper = paper.unflatten(1, (4, 1, -1))  # [blocks, 4, 1, pixels / 4, 16]
    for quarter in range(4):
        q = _sample_taps(lambda i: probs[:, i], index[:, :, quarter], weight[:, :, quarter])  # noqa: B023
        product = product * _clamp((q - paper[:, quarter]).abs())  # [blocks, T, pixels / 4, 16]
    return product.log().sum(2)


def _sample_taps(rows, index, weight):
    """sum_tap rows(index_tap) * weight_tap"""
    sampled = rows(index[0]) * weight[0].unsqueeze(-1)
    for tap in [1, 2, 3]:
        sampled = sampled + rows(index[tap]) * weight[tap].unsqueeze(-1)
    return sampled


def _differentiate_by_map(probs, paper, grad, index, weight):
    """The backward pass of _log_prob_by_map.

    Args: probs, paper [pixels, N]; grad [T, N], of log p(x | map); index, weight [4, T, pixels]
    Returns: the gradients of the sampled probabilities [T, pixels, N] and of weight
    """
    q = _sample_taps(lambda i: probs[i], index, weight)  # [T, pixels, N]
    signed = q - paper  # its absolute value is the probability of the observed pixel
    inside = signed.abs() == _clamp(signed.abs())
    grad_q = torch.where(inside, grad.unsqueeze(1) / torch.where(inside, signed, 1.0), 0.0)
    grad_weight = [(grad_q * probs[index[tap]]).sum(-1) for tap in range(4)]
    return grad_q, torch.stack(grad_weight)


class _ScoreMaps(torch.autograd.Function):
    """log p(x | map): probs, paper [N, pixels], index, weight [4, T, pixels] -> [N, T]"""

    @staticmethod
    def forward(ctx, probs, paper, index, weight):
        ctx.save_for_backward(probs, paper, index, weight)
        num_images, num_pixels = probs.shape
        rest = -num_pixels % 4  # padding: pixels of paper, observed as paper, each with probability 1 - EPS
        blocks = [_make_blocks(probs, rest, 0.0), _make_blocks(paper, rest, 1.0)]
        size = _get_chunk_size(probs.device) // BLOCK
        quarters = [F.pad(x, (0, rest)).unflatten(2, (4, -1)).split(MAPS_AT_ONCE, 1) for x in (index, weight)]
        by_map = [_run_in_chunks(_log_prob_by_map, blocks, taps, size) for taps in zip(*quarters, strict=True)]
        return torch.cat(by_map, 1).transpose(1, 2).flatten(0, 1)[:num_images] - rest * math.log1p(-gpu.EPS)  # [N, T]

    @staticmethod
    def backward(ctx, grad):
        probs, paper, index, weight = ctx.saved_tensors
        chunks = _split(_get_gradient_chunk_size(probs.device), probs, paper, grad)
        taps = [(i, w, *_sort_taps(i)) for i, w in zip(*[x.split(MAPS_AT_ONCE, 1) for x in (index, weight)], strict=True)]
        grad_probs, grad_weight = zip(*[_differentiate_maps(*chunk, taps) for chunk in chunks], strict=True)
        return torch.cat(grad_probs), None, None, torch.stack(grad_weight).sum(0)


def _differentiate_maps(probs, paper, grad, taps):
    """The backward pass of _ScoreMaps.

    Args: probs, paper [N, pixels]; grad [N, T]; taps: for each MAPS_AT_ONCE of the maps, index and weight [4, T, pixels] and
        what _sort_taps returns
    Returns: the gradients of probs and of weight
    """
    probs, paper = probs.t(), paper.t()  # [pixels, N]
    grad_probs, grad_weight = torch.zeros_like(probs), []
    for some, (index, weight, *order) in zip(grad.t().split(MAPS_AT_ONCE), taps, strict=True):
        grad_q, grad_w = _run(_differentiate_by_map, probs, paper, some, index, weight)
        grad_weight.append(grad_w)
        grad_probs += _sum_over_taps(grad_q, weight, *order)
    return grad_probs.t(), torch.cat(grad_weight, 1)


def _make_blocks(images, rest, value):
    """[N, pixels] -> [blocks, pixels + rest, 16], at least two blocks, padded with a value"""
    num_blocks = max(math.ceil(len(images) / BLOCK), 2)
    padding = (0, rest, 0, num_blocks * BLOCK - len(images))
    images = F.pad(images, padding, value=value) if any(padding) else images
    return images.unflatten(0, (num_blocks, BLOCK)).transpose(1, 2).contiguous()


def _sort_taps(index):
    """Taps [4, T, pixels], ordered by the pixel that they sample: their numbers, and the first one's place for each pixel"""
    target, order = index.flatten().sort(stable=True)
    return order, torch.searchsorted(target, torch.arange(index.shape[2], device=index.device))


def _sum_over_taps(grad_q, weight, order, first):
    """The gradient of the pixels sampled from, added up in a fixed order: grad_q [T, pixels, N] -> [pixels, N]"""
    source = order % weight[0].numel()
    return F.embedding_bag(source, grad_q.flatten(0, 1), first, mode="sum", per_sample_weights=weight.flatten()[order])


def affine_log_prob(logits, obs, maps, log_weights=None):
    """log p(x | z) under a mixture of affine maps of the drawing.

    Args: logits [N, R, C]; obs [N, R, C] in {0, 1}; maps [T, 2, 3]; log_weights [T], log p(map), by default equal
    Returns: [N], nats
    Raises: ValueError if the shapes of logits and obs differ
    """
    if kernels.are_used("scoring", logits) and math.prod(obs.shape[1:]) <= gpu.BLOCK_PIXELS:
        _check_shapes(logits, obs)
        return gpu.ScoreMaps.apply(logits, obs.to(logits.dtype), maps, log_weights)
    by_map = affine_log_prob_by_map(logits, obs, maps)
    if log_weights is not None:
        return (by_map + log_weights).logsumexp(1)
    return by_map.logsumexp(1) - math.log(len(maps))


def _check_shapes(logits, obs):
    if logits.shape != obs.shape:
        raise ValueError(f"drawings have the shape {list(logits.shape)}, images {list(obs.shape)}")


def affine_log_prob_by_map(logits, obs, maps):
    """log p(x | z, map) for each map, [N, T]; arguments as for `affine_log_prob`"""
    _check_shapes(logits, obs)
    if kernels.compiled and len(logits) == 1:
        return affine_log_prob_by_map(*(torch.cat([x, x]) for x in (logits, obs)), maps)[:1]
    index, weight = get_taps(maps, *obs.shape[1:])
    probs, paper = logits.sigmoid().flatten(1), 1 - obs.flatten(1).to(logits.dtype)  # [N, R * C]
    return _ScoreMaps.apply(probs, paper, index, weight)


# ------------------------------------------------------------------ compilation


def set_compile(enabled, device="cpu"):
    """Turns compilation of the kernels on or off: on a CPU with torch.compile; on a GPU with Triton, whose kernels
    fast/kernel_check.py tries. If compilation fails (without a C++ compiler, say), warns in one line."""
    on_gpu = gpu.is_gpu(device)
    kernels.use(gpu.OPERATORS if enabled and on_gpu else [])
    kernels.compiled = {}
    if not enabled or on_gpu:
        return
    try:
        kernels.compiled = _compile_for_cpu()
        _write_libraries_at_once()
        with torch.inference_mode(False), torch.enable_grad():  # even within a notebook's torch.no_grad()
            _try_kernels()
    except Exception as error:  # torch raises many types
        kernels.compiled = {}
        lines = str(error).strip().splitlines() or [type(error).__name__]
        told = [line for line in lines if not line.endswith(" raised:")] or lines
        reason = next((line for line in told if " error: " in line), told[0])  # the compiler's own words, if any
        warn(f"not compiled, training is slower: {reason[:400]}")


def _try_kernels():
    """Draws and scores something, with gradients and without"""
    # Arbitrary numbers, but not random ones: the run's random state has already been restored.
    numbers = torch.linspace(0.1, 0.9, MAPS_AT_ONCE * 6)
    arcs, maps = numbers[:210].clone().view(3, 10, 7), numbers.view(MAPS_AT_ONCE, 2, 3)
    arcs.requires_grad_()
    logits = get_logits(arcs, torch.ones_like(arcs[..., 0]).long(), maps[0, 0, :2], 28, 28)
    affine_log_prob(logits, torch.zeros_like(logits), maps).sum().backward()
    get_logits(arcs.detach(), torch.ones_like(arcs[..., 0]).long(), maps[0, 0, :2], 28, 28)


# The dimensions of their first arguments for whose sizes, except 1, kernels are not compiled again: images and arcs. (Not maps:
# a kernel for any number of them is slower.)
ANY_SIZE = {
    _draw: [(0, 1)] * 2,
    _draw_ink: [(0, 1)] * 2,
    _differentiate_draw: [(0,)] * 4,
    _log_prob_by_map: [(0,)] * 2,
    _differentiate_by_map: [(1,)] * 3,
}


@functools.cache  # so that turning kernels off and on does not recompile them
def _compile_for_cpu():
    """The compiled form of each kernel"""
    # Force full fusion: inductor otherwise materialises whatever is read more than a few times.
    options = dict.fromkeys(["realize_reads_threshold", "realize_acc_reads_threshold", "realize_opcount_threshold"], 10000)
    forms = {kernel: torch.compile(kernel, options=options) for kernel in ANY_SIZE}
    return {**forms, _differentiate_draw: torch.compile(_differentiate_draw)}  # fully fused, it would take minutes to compile


@functools.cache
def _write_libraries_at_once():
    """Lets inductor's compiler write elsewhere first: if it is killed, part of a library would be used from then on"""
    from torch._inductor.cpp_builder import CppBuilder

    build = CppBuilder.build

    def build_aside(self):
        target = self.get_target_file_path()
        part = f"{target}.{os.getpid()}.tmp"
        command = self.get_command_line().replace(target, part)
        self.get_command_line = lambda: command
        result = build(self)
        if os.path.exists(part):  # unless the command names its target otherwise
            os.replace(part, target)
        return result

    CppBuilder.build = build_aside
