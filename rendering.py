"""From strokes to pixels, and from pixels to log-probabilities: the hot path.

Two functions take nearly all the time of a training step, and both live here:
`get_logits` draws arcs, `affine_log_prob` scores images under a mixture over
affine maps of the drawing. Both are plain tensor code that works in float32
and float64, with and without gradients.
"""
import math

import torch
import torch.nn.functional as F

LOG_PAPER = math.log(1e-6)  # a pixel that no arc comes near has the logit log(1e-6)
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


def get_logits(arcs, on_offs, rendering_params, num_rows, num_cols):
    """Draws arcs: the logits of a pixel being ink.

    Args:
        arcs [B, A, 7]: (x_start, y_start, dx, dy, theta, sharpness, width)
        on_offs [B, A]: 0 for an arc that leaves no ink
        rendering_params [2]: scale (positive) and bias
        num_rows (R), num_cols (C): of the image; row 0 is its top
    Returns: logits [B, R, C]
    """
    x_start, y_start, dx, dy, theta, sharpness, width = arcs.unsqueeze(-1).unbind(-2)
    # each [B, A, 1]
    x, y = get_pixel_centres(num_rows, num_cols, arcs)  # each [R * C]
    squared_distance = get_squared_distance(
        x - (x_start + dx / 2), y - (y_start + dy / 2), dx, dy, theta
    )  # [B, A, R * C]
    exponent = sharpness**2 * (width**2 - squared_distance)
    # The scale is positive, so the arc of most ink is the one of the largest
    # exponent: one exp a pixel, not one an arc.
    on = on_offs.unsqueeze(-1) != 0  # [B, A, 1]
    exponent = exponent.masked_fill(~on, -math.inf).amax(1)  # [B, R * C]
    scale, bias = rendering_params
    ink = scale * exponent.clamp(max=0).exp() + bias
    ink = torch.where(on.any(1), ink, -math.inf)  # [B, R * C]
    # log(exp(ink) + 1e-6), without overflow
    logits = torch.logaddexp(ink, torch.full_like(ink, LOG_PAPER))
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
    Returns: index [T, 4, R * C] into the R * C pixels; weight, the same shape,
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
    return torch.stack(index, 1), torch.stack(weight, 1)


def _log_prob_by_map(probs, obs, index, weight):
    """log p(x | map) of every image under every map: no gradients, the fast way.

    Pixels are rows and images are columns, so that a bilinear tap is a contiguous
    row times a number, and four pixels' probabilities (at least eps^4, which
    float32 holds) share a logarithm.

    Args: probs [R * C, N]; obs [R * C, N]; index, weight [T, 4, R * C]
    Returns: [N, T]
    """
    ink, by_map = obs > 0.5, []
    for i, w in zip(index, weight.unsqueeze(-1)):
        q = probs[i[0]] * w[0]
        for tap in [1, 2, 3]:
            q = torch.addcmul(q, probs[i[tap]], w[tap])
        q = _clamp(q)
        q = torch.where(ink, q, 1 - q)  # [R * C, N]
        q = F.pad(q, (0, 0, 0, -len(q) % 4), value=1.0).view(4, -1, q.shape[1])
        by_map.append((q[0] * q[1] * q[2] * q[3]).log().sum(0))
    return torch.stack(by_map, -1)


def affine_log_prob(logits, obs, maps):
    """log p(x | z) under an equal mixture of affine maps of the drawing.

    Gradients go through the maps of non-negligible responsibility only; what the
    others would add is lost in float32.

    Args: logits [N, R, C]; obs [N, R, C] in {0, 1}; maps [T, 2, 3]
    Returns: [N]
    """
    probs = logits.sigmoid()
    with torch.no_grad():
        index, weight = get_taps(maps, *obs.shape[1:])
        columns = [image.flatten(1).t().contiguous() for image in (probs, obs)]  # [R * C, N]
        by_map = _log_prob_by_map(*columns, index, weight)  # [N, T]
        log_prob = by_map.logsumexp(1) - math.log(len(maps))  # [N]
    if not (torch.is_grad_enabled() and (probs.requires_grad or maps.requires_grad)):
        return log_prob
    responsibility = by_map.softmax(1)
    image_id, map_id = (responsibility > NEGLIGIBLE).nonzero().unbind(1)
    carrying = _log_prob_one_map_each(probs[image_id], obs[image_id], maps[map_id])
    carrying = responsibility[image_id, map_id] * (carrying - carrying.detach())
    return log_prob + torch.zeros_like(log_prob).index_add(0, image_id, carrying)
