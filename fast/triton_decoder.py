"""The decoder of models.py on a GPU, as Triton kernels: all strokes of a program in one launch.

An LSTM over ten strokes would be hundreds of launches of a microsecond or two each. Here a program takes 16 latents through all
strokes. What one stroke passes to the next (hidden states, gradients) goes through memory that only this program touches, with
a barrier in between, so that matrix products can read it in slices and registers suffice for any size.

gpu.py launches these kernels. Tests compare them with plain PyTorch, models.Decoder. The file is long because the backward pass
is written by hand, with tuned sizes of slices and warps: otherwise the decoder would take most of a step.
"""

import triton
import triton.language as tl

from fast.triton_math import log, sigmoid, tanh, unfused_product

SMALL_SLICE = tl.constexpr(16)  # elements of a matrix product's inner dimension that are loaded at a time
NUM_MULTIPROCESSORS = 128  # about as many as a large GPU has
# By the largest number of hidden units: warps of a program if there are no more programs than multiprocessors, so that each
# should end soon; warps if there are more; slice of the matrix products' inner dimension. A program waits for each slice, so
# large slices are better, as long as registers suffice
FORWARD = {16: (4, 2, 16), 64: (8, 4, 32), 128: (8, 8, 32), 256: (8, 8, 16)}  # tuned on an H200
BACKWARD = {16: (4, 4, 16), 64: (8, 4, 64), 128: (8, 8, 64), 256: (8, 8, 16)}
ELSEWHERE = {16: (4, 4, 16), 256: (8, 8, 16)}  # on GPUs of compute capabilities other than 8 and 9


def get_options(fastest, grid, num_units, num_choices):
    """The sizes and warps of a program. Args: fastest: FORWARD or BACKWARD"""
    units, choices = (max(triton.next_power_of_2(size), 16) for size in (num_units, num_choices))
    if triton.runtime.driver.active.get_current_target().arch // 10 not in (8, 9):
        fastest = ELSEWHERE
    few, many, inner = next(options for most, options in fastest.items() if units <= most)
    num_warps = many if grid[0] > NUM_MULTIPROCESSORS else few
    return dict(UNITS=units, CHOICES=choices, SLICE=inner, num_warps=num_warps, num_stages=1)


# ------------------------------------------------------------------ parts


@triton.jit
def _multiply(
    a, a_stride, b, b_inner_stride, b_col_stride, row, valid, col, num_inner, num_cols, SLICE: tl.constexpr
):  # fmt: skip
    """a [rows, num_inner] @ b [num_inner, num_cols] by pointers and strides, padded with zeros: [ROWS, COLS]"""
    product = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for start in range(0, num_inner, SLICE):
        inner = start + tl.arange(0, SLICE)
        used = inner < num_inner
        x = tl.load(a + row[:, None] * a_stride + inner[None, :], mask=valid[:, None] & used[None, :], other=0.0)
        w = b + inner[:, None] * b_inner_stride + col[None, :] * b_col_stride
        w = tl.load(w, mask=used[:, None] & (col < num_cols)[None, :], other=0.0)
        # three TF32 products are as accurate as one in float32
        product = tl.dot(x, w, product, input_precision="tf32x3")
    return product


@triton.jit
def _get_id_log_probs(hidden, row, valid, weight, bias, choice, num_units, num_choices):
    """Log-softmax of the first K logits: hidden, pointer to [rows, H] -> [ROWS, CHOICES], -inf beyond K"""
    logits = _multiply(hidden, num_units, weight, 1, num_units, row, valid, choice, num_units, num_choices, SMALL_SLICE)
    logits += tl.load(bias + choice, mask=choice < num_choices, other=0.0)[None, :]
    logits = tl.where((choice < num_choices)[None, :], logits, float("-inf"))
    logits -= tl.max(logits, 1)[:, None]
    return logits - log(tl.sum(tl.exp(logits), 1))[:, None]


@triton.jit
def _get_on_log_probs(h, weight, bias, unit, num_units, num_choices):
    """Log-softmax of the last two logits: h [ROWS, UNITS] -> off [ROWS], on [ROWS]"""
    used = unit < num_units
    w_off = tl.load(weight + num_choices * num_units + unit, mask=used, other=0.0)
    w_on = tl.load(weight + (num_choices + 1) * num_units + unit, mask=used, other=0.0)
    off = tl.sum(unfused_product(h, w_off[None, :]), 1) + tl.load(bias + num_choices)
    on = tl.sum(unfused_product(h, w_on[None, :]), 1) + tl.load(bias + num_choices + 1)
    high = tl.where(off > on, off, on)
    total = high + log(tl.exp(off - high) + tl.exp(on - high))
    return off - total, on - total


@triton.jit
def _mix(log_prob, uniform_mixture, num_choices):
    """A log-probability mixed with a uniform one, and its own share of the mixture: both [ROWS]"""
    own = (1 - uniform_mixture) * tl.exp(log_prob)
    mixed = own + uniform_mixture / num_choices
    share = own / tl.where(mixed > 0, mixed, 1.0)
    pure = uniform_mixture == 0.0
    return tl.where(pure, log_prob, log(mixed)), tl.where(pure, 1.0, share)


# ------------------------------------------------------------------ forward


@triton.jit
def _load_sum(a, a_mask, b, b_mask):
    return tl.load(a, mask=a_mask, other=0.0) + tl.load(b, mask=b_mask, other=0.0)


@triton.jit
def _get_gates(
    hidden, table, context, weight_hh, row, image, both, valid, unit, code, arc, num_units, SLICE: tl.constexpr
):  # fmt: skip
    """The inputs of the four gates, before their nonlinearities: from the image, the previous stroke and the hidden state,
    in the rows `row`: four of [ROWS, UNITS]"""
    from_image = context + image[:, None] * (4 * num_units) + unit[None, :]
    from_stroke = table + code[:, None] * (4 * num_units) + unit[None, :]
    drawn = both & (code >= 0)[:, None]
    n = num_units
    i = _load_sum(from_image, both, from_stroke, drawn)
    f = _load_sum(from_image + n, both, from_stroke + n, drawn)
    g = _load_sum(from_image + 2 * n, both, from_stroke + 2 * n, drawn)
    o = _load_sum(from_image + 3 * n, both, from_stroke + 3 * n, drawn)
    num_inner, size = tl.where(arc > 0, num_units, 0), num_units * num_units
    for start in range(0, num_inner, SLICE):
        inner = start + tl.arange(0, SLICE)
        used = inner < num_inner
        x = tl.load(hidden + row[:, None] * num_units + inner[None, :], mask=valid[:, None] & used[None, :], other=0.0)
        w = weight_hh + inner[:, None] + unit[None, :] * num_units
        mask = used[:, None] & (unit < num_units)[None, :]
        i = tl.dot(x, tl.load(w, mask=mask, other=0.0), i, input_precision="tf32x3")  # see _multiply
        f = tl.dot(x, tl.load(w + size, mask=mask, other=0.0), f, input_precision="tf32x3")
        g = tl.dot(x, tl.load(w + 2 * size, mask=mask, other=0.0), g, input_precision="tf32x3")
        o = tl.dot(x, tl.load(w + 3 * size, mask=mask, other=0.0), o, input_precision="tf32x3")
    return i, f, g, o


@triton.jit
def _sample(id_log_prob, off, uniform, choice, valid, arc, uniform_mixture, num_choices):
    """Ids and on/off by inverting the distribution functions: uniform, pointer to two numbers a row -> each [ROWS]"""
    prob = (1 - uniform_mixture) * tl.exp(id_log_prob)
    prob += tl.where(choice < num_choices, uniform_mixture / num_choices, 0.0)[None, :]
    threshold = tl.load(uniform, mask=valid, other=0.0) * tl.sum(prob, 1)
    chosen = tl.sum((tl.cumsum(prob, 1) <= threshold[:, None]).to(tl.int32), 1)
    log_off, _ = _mix(off, uniform_mixture, 2)
    pen = tl.exp(log_off) <= tl.load(uniform + 1, mask=valid, other=0.0)
    return tl.where(chosen < num_choices, chosen, num_choices - 1), tl.where(arc > 0, pen.to(tl.int32), 0)


@triton.jit
def _load_stroke(stroke, valid):
    """Ids and on/off: stroke, pointer to two integers a row -> each [ROWS]"""
    chosen = tl.load(stroke, mask=valid, other=0).to(tl.int32)
    return chosen, tl.load(stroke + 1, mask=valid, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "num_contexts"])
def _decode(
    table, context, weight_hh, weight, bias, uniform, latent, log_prob, hidden, cells, gates, log_probs, num_rows,
    num_contexts, num_arcs, num_units, num_choices, uniform_mixture,
    SAMPLE: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, CHOICES: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit, choice = tl.arange(0, UNITS), tl.arange(0, CHOICES)
    valid = row < num_rows
    both = valid[:, None] & (unit < num_units)[None, :]
    image = row % num_contexts
    cell = tl.zeros((ROWS, UNITS), tl.float32)
    code = tl.full((ROWS,), -1, tl.int32)  # from the previous stroke; the first one has none
    total = tl.zeros((ROWS,), tl.float32)
    for arc in range(num_arcs):
        now, before = arc * num_rows + row, (arc - 1) * num_rows + row
        i, f, g, o = _get_gates(
            hidden, table, context, weight_hh, before, image, both, valid, unit, code, arc, num_units, SLICE
        )
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        cell = f * cell + i * g
        h = o * tanh(cell)
        place = now[:, None] * num_units + unit[None, :]
        tl.store(hidden + place, h, mask=both)
        if SAVE:
            tl.store(cells + place, cell, mask=both)
            gate = gates + now[:, None] * 4 * num_units + unit[None, :]
            tl.store(gate, i, mask=both)
            tl.store(gate + num_units, f, mask=both)
            tl.store(gate + 2 * num_units, g, mask=both)
            tl.store(gate + 3 * num_units, o, mask=both)
        off, on = _get_on_log_probs(h, weight, bias, unit, num_units, num_choices)
        tl.debug_barrier()  # all threads can read the hidden state now
        id_log_prob = _get_id_log_probs(hidden, now, valid, weight, bias, choice, num_units, num_choices)
        if SAVE:
            kept = log_probs + now * (num_choices + 2)
            tl.store(kept[:, None] + choice[None, :], id_log_prob, mask=valid[:, None] & (choice < num_choices)[None, :])
            tl.store(kept + num_choices, off, mask=valid)
            tl.store(kept + num_choices + 1, on, mask=valid)
        stroke = latent + (row * num_arcs + arc) * 2
        if SAMPLE:
            numbers = uniform + (row * num_arcs + arc) * 2
            chosen, pen = _sample(id_log_prob, off, numbers, choice, valid, arc, uniform_mixture, num_choices)
            tl.store(stroke, chosen.to(tl.int64), mask=valid)
            tl.store(stroke + 1, pen.to(tl.int64), mask=valid)
        else:
            chosen, pen = _load_stroke(stroke, valid)
        code = 2 * chosen + pen
        log_id = tl.sum(tl.where(choice[None, :] == chosen[:, None], id_log_prob, 0.0), 1)
        log_id, _ = _mix(log_id, uniform_mixture, num_choices)
        log_on, _ = _mix(tl.where(pen == 1, on, off), uniform_mixture, 2)
        total += log_id + tl.where(arc > 0, log_on, 0.0)
    tl.store(log_prob + row, total, mask=valid)


# ------------------------------------------------------------------ backward


@triton.jit
def _differentiate_choices(log_probs, chosen, pen, factor, grad_logits, row, valid, arc, choice, num_choices, uniform_mixture):
    """Writes the gradient of a stroke's logits: the mixture's own share, times one-hot minus softmax.
    Returns: that of the logit of on, which is minus that of off, [ROWS]"""
    used = valid[:, None] & (choice < num_choices)[None, :]
    place = row * (num_choices + 2)
    id_log_prob = tl.load(log_probs + place[:, None] + choice[None, :], mask=used, other=float("-inf"))
    mine = choice[None, :] == chosen[:, None]
    _, share = _mix(tl.sum(tl.where(mine, id_log_prob, 0.0), 1), uniform_mixture, num_choices)
    grad_id = (factor * share)[:, None] * (tl.where(mine, 1.0, 0.0) - tl.exp(id_log_prob))
    off = tl.load(log_probs + place + num_choices, mask=valid, other=0.0)
    on = tl.load(log_probs + place + num_choices + 1, mask=valid, other=0.0)
    _, share = _mix(tl.where(pen == 1, on, off), uniform_mixture, 2)
    grad_on = tl.where(arc > 0, factor * share * (pen.to(tl.float32) - tl.exp(on)), 0.0)
    tl.store(grad_logits + place[:, None] + choice[None, :], grad_id, mask=used)
    tl.store(grad_logits + place + num_choices, -grad_on, mask=valid)
    tl.store(grad_logits + place + num_choices + 1, grad_on, mask=valid)
    return grad_on


@triton.jit(do_not_specialize=["num_rows"])
def _differentiate_decode(
    weight_hh, weight, latent, grad, cells, gates, log_probs, grad_gates, grad_logits, num_rows, num_arcs,
    num_units, num_choices, uniform_mixture, ROWS: tl.constexpr, UNITS: tl.constexpr, CHOICES: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit, choice = tl.arange(0, UNITS), tl.arange(0, CHOICES)
    valid = row < num_rows
    both = valid[:, None] & (unit < num_units)[None, :]
    factor = tl.load(grad + row, mask=valid, other=0.0)
    grad_h = tl.zeros((ROWS, UNITS), tl.float32)
    grad_cell = tl.zeros((ROWS, UNITS), tl.float32)
    n, c = num_units, num_choices
    used = unit < n
    by_on = tl.load(weight + (c + 1) * n + unit, mask=used, other=0.0) - tl.load(weight + c * n + unit, mask=used, other=0.0)
    for back in range(num_arcs):
        arc = num_arcs - 1 - back
        now = arc * num_rows + row
        place = now[:, None] * num_units + unit[None, :]
        cell = tl.load(cells + place, mask=both, other=0.0)
        chosen, pen = _load_stroke(latent + (row * num_arcs + arc) * 2, valid)
        grad_on = _differentiate_choices(
            log_probs, chosen, pen, factor, grad_logits, now, valid, arc, choice, num_choices, uniform_mixture
        )
        grad_h += grad_on[:, None] * by_on[None, :]
        tl.debug_barrier()  # all threads can read the logits' gradients now
        grad_h += _multiply(grad_logits, c + 2, weight, n, 1, now, valid, unit, c, n, SLICE)
        gate = now[:, None] * 4 * num_units + unit[None, :]
        i = tl.load(gates + gate, mask=both, other=0.0)
        f = tl.load(gates + gate + num_units, mask=both, other=0.0)
        g = tl.load(gates + gate + 2 * num_units, mask=both, other=0.0)
        o = tl.load(gates + gate + 3 * num_units, mask=both, other=0.0)
        before = tl.load(cells + place - num_rows * num_units, mask=both & (now >= num_rows)[:, None], other=0.0)
        tanh_cell = tanh(cell)
        grad_cell += grad_h * o * (1 - tanh_cell * tanh_cell)
        tl.store(grad_gates + gate, grad_cell * g * i * (1 - i), mask=both)
        tl.store(grad_gates + gate + num_units, grad_cell * before * f * (1 - f), mask=both)
        tl.store(grad_gates + gate + 2 * num_units, grad_cell * i * (1 - g * g), mask=both)
        tl.store(grad_gates + gate + 3 * num_units, grad_h * tanh_cell * o * (1 - o), mask=both)
        grad_cell = grad_cell * f
        tl.debug_barrier()  # and those of the gates
        grad_h = _multiply(grad_gates, 4 * n, weight_hh, n, 1, now, valid, unit, 4 * n, n, SLICE)
