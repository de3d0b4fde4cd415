"""From strokes to pixels, and from pixels to log-probabilities: the hot path.

Two functions take nearly all the time of a training step, and both live here:
`get_logits` draws arcs, `affine_log_prob` scores images under a mixture over
affine maps of the drawing. Both are plain tensor code that works in float32
and float64, with and without gradients.
"""

import math
import sys

import torch
import torch.nn.functional as F

LOG_PAPER = math.log(1e-6)  # a pixel that no arc comes near has the logit log(1e-6)
BLOCK = 16  # images that are scored side by side: a register's width of floats
MAPS_AT_ONCE = 40
NEGLIGIBLE = 1e-8  # a weight that is lost in float32 beside a weight of one

# ------------------------------------------------------------------ arcs


def _norm(x, y):
    """|(x, y)|, whose gradient at 0 is 0 and not nan."""
    squared = x * x + y * y
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def get_squared_distance(x, y, dx, dy, theta):
    """Squared distance of points to an arc, where points are given relative to
    the middle of the arc's chord. All arguments broadcast.

    The part of a circle over the chord (dx, dy), theta half its angle, signed.
    The circle's centre, which the textbook formula goes through, runs off to
    infinity as the arc gets straight; this form never needs it (the distance
    to the circle is rationalised), and the values and gradients are finite for
    any theta in [-pi, pi] and any chord, a single point included.
    """
    sin, cos = theta.sin(), theta.cos()
    chord = _norm(dx, dy)
    squared_chord = dx * dx + dy * dy
    squared = x * x + y * y
    along = (x * dx + y * dy).abs()
    across = x * dy - y * dx
    # Strictly on the arc's side: for a chord of length 0 both sides agree, and
    # only the other one is 0/0-free.
    beside = cos * (squared_chord / 2 - along) - sin * across > 0
    numerator = (squared - squared_chord / 4) * sin - cos * across
    denominator = _norm(x * sin - cos / 2 * dy, y * sin + cos / 2 * dx) + chord / 2
    beside = beside & (denominator > 0)
    to_circle = numerator / torch.where(beside, denominator, 1.0)
    to_end = squared - along + squared_chord / 4
    return torch.where(beside, to_circle * to_circle, to_end)


def get_pixel_centres(num_rows, num_cols, like):
    """x [R * C] and y [R * C] of the pixels: the unit square, y upwards."""
    options = dict(dtype=like.dtype, device=like.device)
    x = torch.arange(num_cols, **options) / max(num_cols - 1, 1)
    y = 1 - torch.arange(num_rows, **options) / max(num_rows - 1, 1)
    return x.repeat(num_rows), y.repeat_interleave(num_cols)


def _get_exponent(x, y, arcs):
    """Log of an arc's ink at points, before it is clipped: x, y broadcast against the
    seven parameters of the arcs"""
    x_start, y_start, dx, dy, theta, sharpness, width = arcs
    squared_distance = get_squared_distance(x - (x_start + dx / 2), y - (y_start + dy / 2), dx, dy, theta)
    return sharpness**2 * (width**2 - squared_distance)


def _find_strongest(arcs, on_offs, num_rows, num_cols):
    """The arc of most ink at each pixel: no gradients, the fast way.

    Args: as for `get_logits`
    Returns: exponent [B, R * C], -inf where no arc is on; arc_id [B, R * C]
    """
    x, y = get_pixel_centres(num_rows, num_cols, arcs)  # each [R * C]
    exponent = _get_exponent(x, y, arcs.unsqueeze(-1).unbind(-2))  # [B, A, R * C]
    return exponent.masked_fill(on_offs.unsqueeze(-1) == 0, -math.inf).max(1)


def get_logits(arcs, on_offs, rendering_params, num_rows, num_cols):
    """Draws arcs: the logits of a pixel being ink.

    A pixel's ink is that of one arc, so gradients go through one arc a pixel: the
    strongest is found without, and computed again with them.

    Args:
        arcs [B, A, 7]: (x_start, y_start, dx, dy, theta, sharpness, width)
        on_offs [B, A]: 0 for an arc that leaves no ink
        rendering_params [2]: scale (positive) and bias
        num_rows (R), num_cols (C): of the image; row 0 is its top
    Returns: logits [B, R, C]
    """
    with torch.no_grad():
        exponent, arc_id = _run(_find_strongest, (arcs, on_offs), (num_rows, num_cols))  # [B, R * C]
    on = exponent > -math.inf
    if torch.is_grad_enabled() and arcs.requires_grad:
        arc_id = arc_id.unsqueeze(1).expand(-1, 7, -1)
        strongest = arcs.transpose(1, 2).gather(2, arc_id)  # [B, 7, R * C]
        x, y = get_pixel_centres(num_rows, num_cols, arcs)
        exponent = _get_exponent(x, y, strongest.unbind(1))
    scale, bias = rendering_params
    ink = scale * exponent.clamp(max=0).exp() + bias
    ink = torch.where(on, ink, -math.inf)
    # log(exp(ink) + 1e-6), without overflow
    logits = torch.logaddexp(ink, torch.full_like(ink, LOG_PAPER))  # [B, R * C]
    return logits.unflatten(-1, (num_rows, num_cols))  # [B, R, C]


# ------------------------------------------------------------------ affine maps


def get_fixed_maps():
    """The 3^7 = 2187 maps of the `affine` likelihood, [2187, 2, 3]: shear, then
    rotation, scaling and translation, each of the seven numbers in its three values."""
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


def apply_maps(probs, maps):
    """Images seen through affine maps, one map an image, bilinearly, 0 outside.

    Args: probs [N, R, C]; maps [N, 2, 3]
    Returns: [N, R, C], clamped to where a logarithm is finite
    """
    grid = F.affine_grid(maps, (len(maps), 1, *probs.shape[1:]), align_corners=True)
    sampled = F.grid_sample(probs.unsqueeze(1), grid, align_corners=True).squeeze(1)
    return _clamp(sampled)


def _clamp(probs):
    eps = torch.finfo(torch.float32).eps
    return probs.clamp(eps, 1 - eps)


def _log_prob_one_map_each(probs, obs, maps):
    """log p(x | map) of N images with a map each, differentiable: [N]."""
    q = apply_maps(probs, maps)
    return torch.where(obs > 0.5, q, 1 - q).log().flatten(1).sum(1)


def get_taps(maps, num_rows, num_cols):
    """Bilinear sampling written out: which four pixels a map's pixels are made of.

    Args: maps [T, 2, 3]
    Returns: index [4, T, R * C] into the R * C pixels; weight, the same shape,
        0 where the tap lies outside of the image
    """
    grid = F.affine_grid(maps, (len(maps), 1, num_rows, num_cols), align_corners=True)
    # Positions far outside weigh nothing, wherever they are; clamped, they stay integers.
    x = ((grid[..., 0] + 1) / 2 * (num_cols - 1)).flatten(1).clamp(-2, num_cols + 1)
    y = ((grid[..., 1] + 1) / 2 * (num_rows - 1)).flatten(1).clamp(-2, num_rows + 1)  # [T, R * C]
    index, weight = [], []
    for row_offset in [0, 1]:
        for col_offset in [0, 1]:
            row, col = y.floor() + row_offset, x.floor() + col_offset
            inside = (row >= 0) & (row < num_rows) & (col >= 0) & (col < num_cols)
            weight.append((1 - (x - col).abs()) * (1 - (y - row).abs()) * inside)
            row, col = row.clamp(0, num_rows - 1), col.clamp(0, num_cols - 1)
            index.append((row * num_cols + col).long())
    return torch.stack(index), torch.stack(weight)


def _log_prob_by_map(probs, ink, index, weight):
    """log p(x | map) of every image under every map: no gradients, the fast way.

    Images lie in blocks of 16 columns, their pixels in rows, so that a bilinear tap
    is a contiguous row times a number, and a block stays in the cache for all maps.
    Four pixels' probabilities, at least eps^4, which float32 holds, share a logarithm.

    Args: probs, ink [blocks, pixels, 16]; index, weight [4, T, pixels]; the number
        of pixels is a multiple of 4
    Returns: [blocks, T, 16]
    """
    q = probs[:, index[0]] * weight[0].unsqueeze(-1)  # [blocks, T, pixels, 16]
    for tap in [1, 2, 3]:
        q = q + probs[:, index[tap]] * weight[tap].unsqueeze(-1)
    q = _clamp(q)
    q = torch.where(ink.unsqueeze(1), q, 1 - q).unflatten(2, (4, -1))  # [blocks, T, 4, pixels / 4, 16]
    return (q[:, :, 0] * q[:, :, 1] * q[:, :, 2] * q[:, :, 3]).log().sum(2)


def _score_maps(probs, obs, maps):
    """log p(x | map): probs, obs [N, R, C], maps [T, 2, 3] -> [N, T]"""
    index, weight = get_taps(maps, *obs.shape[1:])
    num_images, num_pixels = len(obs), index.shape[-1]
    rest = -num_pixels % 4  # pixels that are surely paper, and are
    index, weight = (F.pad(x, (0, rest)) for x in (index, weight))
    blocks = []
    for image in (probs, obs > 0.5):
        columns = F.pad(image.flatten(1), (0, rest, 0, -num_images % BLOCK))
        blocks.append(columns.view(-1, BLOCK, num_pixels + rest).transpose(1, 2).contiguous())
    by_map = [
        _run(_log_prob_by_map, blocks, (i, w))  # [blocks, 40, 16]
        for i, w in zip(index.split(MAPS_AT_ONCE, 1), weight.split(MAPS_AT_ONCE, 1), strict=True)
    ]
    return torch.cat(by_map, 1).transpose(1, 2).flatten(0, 1)[:num_images]  # [N, T]


def affine_log_prob(logits, obs, maps):
    """log p(x | z) under an equal mixture of affine maps of the drawing.

    Gradients go through the maps of non-negligible responsibility only; what the
    others would add is lost in float32.

    Args: logits [N, R, C]; obs [N, R, C] in {0, 1}; maps [T, 2, 3]
    Returns: [N]
    """
    probs = logits.sigmoid()
    with torch.no_grad():
        by_map = _score_maps(probs, obs, maps)  # [N, T]
        log_prob = by_map.logsumexp(1) - math.log(len(maps))  # [N]
    if not (torch.is_grad_enabled() and (probs.requires_grad or maps.requires_grad)):
        return log_prob
    responsibility = by_map.softmax(1)
    image_id, map_id = (responsibility > NEGLIGIBLE).nonzero().unbind(1)
    # index_select, not [], whose gradient is summed in an order that differs between runs
    carrying = _log_prob_one_map_each(
        probs.index_select(0, image_id), obs.index_select(0, image_id), maps.index_select(0, map_id)
    )
    carrying = responsibility[image_id, map_id] * (carrying - carrying.detach())
    return log_prob + torch.zeros_like(log_prob).index_add(0, image_id, carrying)


# ------------------------------------------------------------------ compilation

_compiled = {}  # kernel -> its compiled form


def set_compile(enabled):
    """Has the two kernels without gradients compiled, for all sizes at once, or not.
    Where that fails (there is no C++ compiler, say), one line warns of it."""
    _compiled.clear()
    if not enabled:
        return
    for kernel in [_find_strongest, _log_prob_by_map]:
        _compiled[kernel] = torch.compile(kernel, dynamic=True)
    try:
        with torch.no_grad():
            logits = get_logits(torch.rand(3, 2, 7), torch.ones(3, 2), torch.rand(2), 28, 28)
            affine_log_prob(logits, torch.zeros(3, 28, 28), torch.rand(3, 2, 3))
    except Exception as error:  # torch raises many kinds
        _compiled.clear()
        reason = str(error).strip().split("\n")[0][:100]
        print(f"warning: not compiled, training is slower: {reason}", file=sys.stderr)


def get_chunk_size(device):
    """How many latents to score at a time: in plain PyTorch on a CPU, what fits the cache"""
    return 1024 if _compiled or device.type == "cuda" else 64


def _run(kernel, batched, rest):
    """Calls a kernel, compiled or not. A batch of one is made one of two: sizes of one
    are compiled apart."""
    if kernel not in _compiled:
        return kernel(*batched, *rest)
    size = len(batched[0])
    if size == 1:
        batched = [torch.cat([x, x]) for x in batched]
    out = _compiled[kernel](*batched, *rest)
    return out if size > 1 else tuple(x[:1] for x in out) if isinstance(out, tuple) else out[:1]
