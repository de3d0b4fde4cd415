"""Drawing and scoring on a GPU: the hot path of rendering.py as Triton kernels, which gpu.py launches.

Tests compare them with plain PyTorch, in rendering.py. Gradients are written out, which makes this file long, because they take
half of a step's time.

Results do not depend on the order in which threads finish: sums are taken within a program, or in integers. NaN propagates
through comparisons, so that diverged parameters show in the loss.
"""

import triton
import triton.language as tl

from fast import gpu
from fast.triton_math import LN_2, floor, log, log2, sigmoid

ARC_SIZE = tl.constexpr(7)  # x_start, y_start, dx, dy, theta, sharpness, width

# ------------------------------------------------------------------ drawing


@triton.jit
def _get_pixel_centre(pixel, num_rows, num_cols):
    x = (pixel % num_cols).to(tl.float32) / max(num_cols - 1, 1)
    y = 1 - (pixel // num_cols).to(tl.float32) / max(num_rows - 1, 1)
    return x, y


@triton.jit
def _load_arc(arc):
    """The constants that the distance to an arc needs, as in rendering.get_arc_constants"""
    dx, dy, theta = tl.load(arc + 2), tl.load(arc + 3), tl.load(arc + 4)
    squared_chord = dx * dx + dy * dy
    return (
        tl.load(arc) + dx / 2, tl.load(arc + 1) + dy / 2, dx, dy, tl.sin(theta), tl.cos(theta),
        tl.sqrt(squared_chord), squared_chord, tl.load(arc + 5), tl.load(arc + 6),
    )  # fmt: skip


@triton.jit
def _get_distance(x, y, dx, dy, sin, cos, chord, squared_chord):
    """Squared distance of points (x, y), relative to the middle of the chord, to an arc: to the circle or, where `away` from
    the arc's side, to the nearer end. Also what the gradient needs: away, to_circle, norm, denominator"""
    squared = x * x + y * y
    along = tl.abs(x * dx + y * dy)
    across = x * dy - y * dx
    u, v = x * sin - cos / 2 * dy, y * sin + cos / 2 * dx
    norm = tl.sqrt(u * u + v * v)
    denominator = norm + chord / 2
    away = (cos * (squared_chord / 2 - along) - sin * across <= 0) | (denominator <= 1e-18)  # rendering.SHORTEST
    denominator = tl.where(away, 1.0, denominator)
    to_circle = ((squared - squared_chord / 4) * sin - cos * across) / denominator
    distance2 = tl.where(away, squared - along + squared_chord / 4, to_circle * to_circle)
    return distance2, away, to_circle, norm, denominator


@triton.jit
def _logaddexp(a, b):
    high = tl.where(a > b, a, b)
    # |a - b| is NaN where a is; where a is -inf, exp(-inf) is 0
    return high + log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _draw(arcs, on, rendering_params, logits, arc_id, num_arcs, num_rows, num_cols, log_paper, BLOCK: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_pixels = num_rows * num_cols
    px, py = _get_pixel_centre(pixel, num_rows, num_cols)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    strongest = tl.zeros((BLOCK,), tl.int32)
    for arc in range(num_arcs):
        if tl.load(on + latent * num_arcs + arc) != 0:
            x_middle, y_middle, dx, dy, sin, cos, chord, squared_chord, sharpness, width = _load_arc(
                arcs + (latent * num_arcs + arc) * ARC_SIZE
            )
            x, y = px - x_middle, py - y_middle
            distance2, _, _, _, _ = _get_distance(x, y, dx, dy, sin, cos, chord, squared_chord)
            exponent = sharpness * sharpness * (width * width - distance2)
            better = (exponent > highest) | (exponent != exponent)
            highest = tl.where(better, exponent, highest)
            strongest = tl.where(better, arc, strongest)
    scale, bias = tl.load(rendering_params), tl.load(rendering_params + 1)
    ink = scale * tl.exp(tl.where(highest > 0, 0.0, highest)) + bias
    ink = tl.where(highest == float("-inf"), highest, ink)
    where = latent * num_pixels + pixel
    tl.store(logits + where, _logaddexp(ink, log_paper), mask=pixel < num_pixels)
    tl.store(arc_id + where, strongest.to(tl.int16), mask=pixel < num_pixels)


@triton.jit
def _sum(values, mask):
    return tl.sum(tl.where(mask, values, 0.0), 0)


@triton.jit
def _differentiate_distance(
    grad_distance2, mine, x, y, dx, dy, sin, cos, chord, squared_chord, away, to_circle, norm, denominator
):
    """Gradients by the arc's (x_start, y_start, dx, dy, theta), summed over the points that are `mine`"""
    squared = x * x + y * y
    dot = x * dx + y * dy
    sign = tl.where(dot > 0, 1.0, tl.where(dot < 0, -1.0, 0.0))
    across = x * dy - y * dx
    u, v = x * sin - cos / 2 * dy, y * sin + cos / 2 * dx
    # on the arc's side: gradients of the numerator, the denominator and the norm's (u, v)
    gn = tl.where(away, 0.0, grad_distance2 * 2 * to_circle / denominator)
    gd = tl.where(away, 0.0, -grad_distance2 * 2 * to_circle * to_circle / denominator)
    inverse = tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
    gu, gv = gd * u * inverse, gd * v * inverse
    # elsewhere: gradient of the squared distance to the nearer end
    ge = tl.where(away, grad_distance2, 0.0)
    gx = gn * (2 * x * sin - cos * dy) + gu * sin + ge * (2 * x - sign * dx)
    gy = gn * (2 * y * sin + cos * dx) + gv * sin + ge * (2 * y - sign * dy)
    sum_x, sum_y = _sum(gx, mine), _sum(gy, mine)
    grad_sin = _sum(gn * (squared - squared_chord / 4) + gu * x + gv * y, mine)
    grad_cos = _sum(-gn * across - gu * dy / 2 + gv * dx / 2, mine)
    # gradients of the chord's length, through the denominator, and of its square
    by_length = tl.where(chord > 0, _sum(gd / 2, mine) / tl.where(chord > 0, chord, 1.0), 0.0)
    by_chord = by_length + 2 * _sum(ge / 4 - gn * sin / 4, mine)
    by_dx = _sum(gn * cos * y + gv * cos / 2 - ge * sign * x, mine)
    by_dy = _sum(-gn * cos * x - gu * cos / 2 - ge * sign * y, mine)
    grad_dx, grad_dy = by_dx + by_chord * dx - sum_x / 2, by_dy + by_chord * dy - sum_y / 2
    return -sum_x, -sum_y, grad_dx, grad_dy, grad_sin * cos - grad_cos * sin


@triton.jit
def _differentiate_draw(
    arcs, on, rendering_params, arc_id, grad, grad_arcs, grad_params, num_arcs, num_rows, num_cols, log_paper,
    BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    chunk, num_chunks = tl.program_id(1), tl.num_programs(1)
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    num_pixels = num_rows * num_cols
    px, py = _get_pixel_centre(pixel, num_rows, num_cols)
    strongest = tl.load(arc_id + latent * num_pixels + pixel, mask=pixel < num_pixels, other=-1).to(tl.int32)
    grad_logit = tl.load(grad + latent * num_pixels + pixel, mask=pixel < num_pixels, other=0.0)
    scale, bias = tl.load(rendering_params), tl.load(rendering_params + 1)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    matters = tl.sum((grad_logit != 0).to(tl.int32), 0) > 0  # NaN does
    for arc in range(num_arcs):
        place = grad_arcs + ((latent * num_chunks + chunk) * num_arcs + arc) * ARC_SIZE
        if matters & (tl.load(on + latent * num_arcs + arc) != 0):
            mine = strongest == arc
            x_middle, y_middle, dx, dy, sin, cos, chord, squared_chord, sharpness, width = _load_arc(
                arcs + (latent * num_arcs + arc) * ARC_SIZE
            )
            x, y = px - x_middle, py - y_middle
            distance2, away, to_circle, norm, denominator = _get_distance(x, y, dx, dy, sin, cos, chord, squared_chord)
            exponent = sharpness * sharpness * (width * width - distance2)
            clipped = tl.exp(tl.where(exponent > 0, 0.0, exponent))
            ink = scale * clipped + bias
            grad_ink = tl.where(mine, grad_logit / (1 + tl.exp(log_paper - ink)), 0.0)
            grad_scale += grad_ink * clipped
            grad_bias += grad_ink
            grad_exponent = tl.where(exponent > 0, 0.0, grad_ink * scale * clipped)
            grad_distance2 = -sharpness * sharpness * grad_exponent
            grad_x, grad_y, grad_dx, grad_dy, grad_theta = _differentiate_distance(
                grad_distance2, mine, x, y, dx, dy, sin, cos, chord, squared_chord, away, to_circle, norm, denominator
            )
            tl.store(place, grad_x)
            tl.store(place + 1, grad_y)
            tl.store(place + 2, grad_dx)
            tl.store(place + 3, grad_dy)
            tl.store(place + 4, grad_theta)
            tl.store(place + 5, _sum(grad_exponent * (width * width - distance2), mine) * 2 * sharpness)
            tl.store(place + 6, _sum(grad_exponent, mine) * sharpness * sharpness * 2 * width)
        else:
            number = tl.arange(0, 8)
            tl.store(place + number, tl.zeros((8,), tl.float32), mask=number < ARC_SIZE)
    place = grad_params + (latent * num_chunks + chunk) * 2
    tl.store(place, tl.sum(grad_scale, 0))
    tl.store(place + 1, tl.sum(grad_bias, 0))


# ------------------------------------------------------------------ the affine likelihood

BORDER = tl.constexpr(gpu.BORDER)


@triton.jit
def _load_map(maps, number, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Six numbers that take a grid point to its place in pixels: x by the first three, y by the others"""
    m = maps + number * 6
    a, b, c, d, e, f = tl.load(m), tl.load(m + 1), tl.load(m + 2), tl.load(m + 3), tl.load(m + 4), tl.load(m + 5)
    COL: tl.constexpr = 0.5 * (COLS - 1)
    ROW: tl.constexpr = 0.5 * (ROWS - 1)
    return a * COL, b * COL, (c + 1) * COL, d * ROW, e * ROW, (f + 1) * ROW


@triton.jit
def _get_grid_point(pixel, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A pixel's position in affine_grid's coordinates, from -1 to 1: x, y"""
    x = 2 * (pixel % COLS).to(tl.float32) / max(COLS - 1, 1) - 1
    y = 2 * (pixel // COLS).to(tl.float32) / max(ROWS - 1, 1) - 1
    return x, y


@triton.jit
def _get_position(a, b, c, x, y, SIZE: tl.constexpr):
    """Where a map takes points, in pixels: the preceding pixel, from -BORDER to SIZE, and the fraction to the next one. NaN and
    positions beyond the border are moved to its edge, where all is paper too"""
    position = a * x + (b * y + c)
    position = tl.where(position > -BORDER, position, -BORDER)  # NaN becomes a number: one cannot load from it
    position = tl.minimum(position, SIZE)
    before, pixel = floor(position)
    return pixel, position - before


@triton.jit
def _load_taps(at, STRIDE: tl.constexpr):
    return tl.load(at), tl.load(at + 1), tl.load(at + STRIDE), tl.load(at + STRIDE + 1)


@triton.jit
def _mix_taps(p, q, fraction):
    return p + fraction * (q - p)


@triton.jit
def _get_inner_pixel(entry, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The pixel at an entry of an image with a border, and whether it is one"""
    STRIDE: tl.constexpr = COLS + 2 * BORDER
    row, col = entry // STRIDE - BORDER, entry % STRIDE - BORDER
    return row * COLS + col, (row >= 0) & (row < ROWS) & (col >= 0) & (col < COLS)


@triton.jit
def _pad_probs(logits, probs, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """The probabilities of ink, with a border of paper"""
    SIZE: tl.constexpr = (ROWS + 2 * BORDER) * (COLS + 2 * BORDER)
    latent = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel, inside = _get_inner_pixel(entry, ROWS, COLS)
    logit = tl.load(logits + latent * (ROWS * COLS) + pixel, mask=inside, other=float("-inf"))
    tl.store(probs + latent * SIZE + entry, sigmoid(logit), mask=entry < SIZE)


@triton.jit
def _mix_maps(by_map, log_prob, num_maps, BLOCK: tl.constexpr):
    """The logarithm of the mean over maps"""
    latent = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_maps, BLOCK):
        score = tl.load(by_map + latent * num_maps + first + number, mask=first + number < num_maps, other=float("-inf"))
        highest = tl.where(score > highest, score, highest)
    high = tl.max(highest, 0)
    for first in range(0, num_maps, BLOCK):
        score = tl.load(by_map + latent * num_maps + first + number, mask=first + number < num_maps, other=float("-inf"))
        total += tl.exp(score - high)  # NaN stays
    tl.store(log_prob + latent, high + log(tl.sum(total, 0) / num_maps))


# If obs were known to be aligned, it would be loaded four pixels at a time: some threads would then be idle here,
# and below they would have to exchange pixels for each map.
@triton.jit(do_not_specialize_on_alignment=["obs"])
def _score_maps(
    probs, obs, maps, by_map, num_maps, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr, MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * MAPS
    STRIDE: tl.constexpr = COLS + 2 * BORDER
    image = probs + latent * ((ROWS + 2 * BORDER) * STRIDE) + (BORDER * STRIDE + BORDER)
    pixel = tl.arange(0, BLOCK)
    inside = pixel < ROWS * COLS
    x, y = _get_grid_point(pixel, ROWS, COLS)
    paper = 1 - tl.load(obs + latent * (ROWS * COLS) + pixel, mask=inside, other=0.0)
    for i in range(MAPS):
        number = first + i
        exists = number < num_maps
        m0, m1, m2, m3, m4, m5 = _load_map(maps, tl.where(exists, number, 0), ROWS, COLS)
        col, fx = _get_position(m0, m1, m2, x, y, COLS)
        row, fy = _get_position(m3, m4, m5, x, y, ROWS)
        p00, p01, p10, p11 = _load_taps(image + (row * STRIDE + col), STRIDE)
        q = _mix_taps(_mix_taps(p00, p01, fx), _mix_taps(p10, p11, fx), fy)
        seen = tl.clamp(tl.abs(q - paper), eps, 1 - eps, propagate_nan=tl.PropagateNan.ALL)
        total = tl.sum(tl.where(inside, log2(seen), 0.0), 0) * LN_2
        total += (m0 + m1 + m2 + m3 + m4 + m5) * 0  # NaN and infinite maps have diverged
        tl.store(by_map + latent * num_maps + number, total, mask=exists)


@triton.jit(do_not_specialize_on_alignment=["obs"])
def _differentiate_score_maps(
    obs, maps, log_prob, by_map, probs, grad, fixed, grad_maps, num_maps, eps, resolution, negligible,
    ROWS: tl.constexpr, COLS: tl.constexpr, MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * MAPS
    STRIDE: tl.constexpr = COLS + 2 * BORDER
    corner = latent * ((ROWS + 2 * BORDER) * STRIDE) + (BORDER * STRIDE + BORDER)
    factor, log_total = tl.load(grad + latent), tl.load(log_prob + latent) + log(1.0 * num_maps)
    pixel = tl.arange(0, BLOCK)
    inside = pixel < ROWS * COLS
    for i in range(MAPS):
        number = first + i
        exists = number < num_maps
        place = grad_maps + (latent * num_maps + number) * 6
        # the share of the map in the mixture
        share = tl.exp(tl.load(by_map + latent * num_maps + number, mask=exists, other=float("-inf")) - log_total)
        if (share > negligible) & (factor != 0):
            m0, m1, m2, m3, m4, m5 = _load_map(maps, number, ROWS, COLS)
            x, y = _get_grid_point(pixel, ROWS, COLS)
            col, fx = _get_position(m0, m1, m2, x, y, COLS)
            row, fy = _get_position(m3, m4, m5, x, y, ROWS)
            at = row * STRIDE + col
            p00, p01, p10, p11 = _load_taps(probs + corner + at, STRIDE)
            q = _mix_taps(_mix_taps(p00, p01, fx), _mix_taps(p10, p11, fx), fy)
            signed = q - (1 - tl.load(obs + latent * (ROWS * COLS) + pixel, mask=inside, other=0.0))
            seen = tl.abs(signed)
            counts = inside & (seen >= eps) & (seen <= 1 - eps)
            slope = tl.where(counts, 1 / tl.where(counts, signed, 1.0), 0.0)  # gradient of log p with respect to q
            slope *= share
            upper, lower = slope * resolution * (1 - fy), slope * resolution * fy
            sums = fixed + corner + at
            tl.atomic_add(sums, (upper * (1 - fx)).to(tl.int64), mask=counts, sem="relaxed")
            tl.atomic_add(sums + 1, (upper * fx).to(tl.int64), mask=counts, sem="relaxed")
            tl.atomic_add(sums + STRIDE, (lower * (1 - fx)).to(tl.int64), mask=counts, sem="relaxed")
            tl.atomic_add(sums + STRIDE + 1, (lower * fx).to(tl.int64), mask=counts, sem="relaxed")
            # where all taps are paper, these are 0
            by_x = slope * factor * (0.5 * (COLS - 1)) * _mix_taps(p01 - p00, p11 - p10, fy)
            by_y = slope * factor * (0.5 * (ROWS - 1)) * _mix_taps(p10 - p00, p11 - p01, fx)
            tl.store(place, tl.sum(by_x * x, 0))
            tl.store(place + 1, tl.sum(by_x * y, 0))
            tl.store(place + 2, tl.sum(by_x, 0))
            tl.store(place + 3, tl.sum(by_y * x, 0))
            tl.store(place + 4, tl.sum(by_y * y, 0))
            tl.store(place + 5, tl.sum(by_y, 0))
        else:
            entry = tl.arange(0, 8)
            tl.store(place + entry, tl.zeros((8,), tl.float32), mask=entry < tl.where(exists, 6, 0))


@triton.jit
def _differentiate_probs(
    probs, grad, fixed, grad_logits, resolution, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    """From the sums of _differentiate_score_maps to the gradient of logits"""
    SIZE: tl.constexpr = (ROWS + 2 * BORDER) * (COLS + 2 * BORDER)
    latent = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel, inside = _get_inner_pixel(entry, ROWS, COLS)
    factor = tl.load(grad + latent)
    given = tl.where(inside, factor, 0.0) != 0
    total = tl.load(fixed + latent * SIZE + entry, mask=given, other=0).to(tl.float32)
    prob = tl.load(probs + latent * SIZE + entry, mask=given, other=0.0)
    value = total * (factor / resolution) * prob * (1 - prob)
    tl.store(grad_logits + latent * (ROWS * COLS) + pixel, value, mask=inside)
