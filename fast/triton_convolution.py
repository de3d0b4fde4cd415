"""The first two layers of the inference network on a GPU, as Triton kernels: the first layer's convolution, pooling and relu at
once, and the second layer's pooling, bias and relu. The second convolution is PyTorch's.

With one input channel, a convolution multiplies little and writes much: 64 channels of 30 x 30 pixels per image, of which
pooling keeps a quarter. Here only what is kept is written, with one byte each that tells the backward pass where it came from.
patches.py has the plain version; gpu.py launches these kernels.
"""

import triton
import triton.language as tl

from fast import gpu

FIRST, SECOND = tl.constexpr(gpu.FIRST), tl.constexpr(gpu.SECOND)
RECTIFIED = tl.constexpr(255)  # instead of a position in a window: relu gave zero, so there is no gradient

# ------------------------------------------------------------------ the first layer


@triton.jit
def _load_pixel(obs, image, row, col, mask, SIZE: tl.constexpr):
    """Images have a border of two zeros; row and col count from its corner"""
    inside = mask & (row >= 2) & (row < SIZE + 2) & (col >= 2) & (col < SIZE + 2)
    return tl.load(obs + image * SIZE * SIZE + ((row - 2) * SIZE + col - 2), mask=inside, other=0.0)


@triton.jit
def _keep_highest(highest, chosen, value, window):
    """The first of the highest values of a window; NaN counts as higher than all"""
    better = (value > highest) | (value != value)
    return tl.where(better, value, highest), tl.where(better, window, chosen)


@triton.jit
def _store_rectified(highest, chosen, out, argmax, place, mask):
    tl.store(out + place, tl.where(highest < 0, 0.0, highest), mask=mask)
    tl.store(argmax + place, tl.where(highest > 0, chosen, RECTIFIED).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["num_images"])
def _convolve(
    obs, weight, bias, out, argmax, num_images, num_channels,
    SIZE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, CHANNELS)
    valid, used = position < num_images * FIRST * FIRST, channel < num_channels
    image = (position // (FIRST * FIRST)).to(tl.int64)
    row, col = 2 * (position // FIRST % FIRST), 2 * (position % FIRST)
    b = tl.load(bias + channel, mask=used, other=0.0)
    highest = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    chosen = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for window in tl.static_range(9):
        value = tl.zeros((POSITIONS, CHANNELS), tl.float32) + b[None, :]
        for tap in tl.static_range(9):  # 25 pixels in all, each of which the compiler loads once
            x = _load_pixel(obs, image, row + (window // 3 + tap // 3), col + (window % 3 + tap % 3), valid, SIZE)
            w = tl.load(weight + channel * 9 + tap, mask=used, other=0.0)
            value += x[:, None] * w[None, :]
        highest, chosen = _keep_highest(highest, chosen, value, window)
    place = position.to(tl.int64)[:, None] * num_channels + channel[None, :]
    _store_rectified(highest, chosen, out, argmax, place, valid[:, None] & used[None, :])


@triton.jit
def _differentiate_convolve(
    obs, argmax, grad, partial, num_channels, SIZE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    image, tap_row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    used = channel < num_channels
    left = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    middle = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    right = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    bias = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, FIRST * FIRST, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        valid = position < FIRST * FIRST
        place = (image * FIRST * FIRST + position)[:, None] * num_channels + channel[None, :]
        chosen = tl.load(argmax + place, mask=valid[:, None] & used[None, :], other=RECTIFIED).to(tl.int32)
        passed = tl.load(grad + place, mask=chosen != RECTIFIED, other=0.0)
        row, col = 2 * (position // FIRST) + tap_row, 2 * (position % FIRST)
        for window in tl.static_range(9):  # this many sums cost less than looking up each number's own pixels
            g = tl.where(chosen == window, passed, 0.0)
            left += g * _load_pixel(obs, image, row + window // 3, col + window % 3, valid, SIZE)[:, None]
            middle += g * _load_pixel(obs, image, row + window // 3, col + window % 3 + 1, valid, SIZE)[:, None]
            right += g * _load_pixel(obs, image, row + window // 3, col + window % 3 + 2, valid, SIZE)[:, None]
        bias += passed
    total = partial + (image * 10 + 3 * tap_row) * num_channels + channel
    tl.store(total, tl.sum(left, 0), mask=used)
    tl.store(total + num_channels, tl.sum(middle, 0), mask=used)
    tl.store(total + 2 * num_channels, tl.sum(right, 0), mask=used)
    if tap_row == 2:
        tl.store(total + 3 * num_channels, tl.sum(bias, 0), mask=used)


# ------------------------------------------------------------------ the second layer


@triton.jit(do_not_specialize=["num_images"])
def _pool(x, bias, out, argmax, num_images, num_channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, CHANNELS)
    used = channel < num_channels
    both = (position < num_images * SECOND * SECOND)[:, None] & used[None, :]
    corner = (position // (SECOND * SECOND)).to(tl.int64) * FIRST + 2 * (position // SECOND % SECOND)
    corner = corner * FIRST + 2 * (position % SECOND)
    first = x + corner[:, None] * num_channels + channel[None, :]
    highest = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    chosen = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for window in tl.static_range(9):
        value = tl.load(first + (window // 3 * FIRST + window % 3) * num_channels, mask=both, other=0.0)
        highest, chosen = _keep_highest(highest, chosen, value, window)
    highest += tl.load(bias + channel, mask=used, other=0.0)[None, :]
    place = position.to(tl.int64)[:, None] * num_channels + channel[None, :]
    _store_rectified(highest, chosen, out, argmax, place, both)


@triton.jit
def _load_passed(argmax, grad, image, row, col, back_row, back_col, num_channels, channel, mask):
    """The gradient that reaches a position from the back_row-th and back_col-th of the windows that may hold it"""
    window_row, window_col = row // 2 - back_row, col // 2 - back_col
    in_row, in_col = row - 2 * window_row, col - 2 * window_col
    holds = (window_row >= 0) & (window_row < SECOND) & (in_row < 3) & (window_col >= 0) & (window_col < SECOND) & (in_col < 3)
    place = ((image * SECOND + window_row) * SECOND + window_col)[:, None] * num_channels + channel[None, :]
    chosen = tl.load(argmax + place, mask=holds[:, None] & mask, other=RECTIFIED).to(tl.int32)
    return tl.load(grad + place, mask=chosen == (3 * in_row + in_col)[:, None], other=0.0)


@triton.jit
def _differentiate_pool(argmax, grad, grad_x, partial, num_channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    used = channel < num_channels
    bias = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, FIRST * FIRST, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        row, col = position // FIRST, position % FIRST
        mask = (position < FIRST * FIRST)[:, None] & used[None, :]
        g = _load_passed(argmax, grad, image, row, col, 0, 0, num_channels, channel, mask)
        g += _load_passed(argmax, grad, image, row, col, 0, 1, num_channels, channel, mask)
        g += _load_passed(argmax, grad, image, row, col, 1, 0, num_channels, channel, mask)
        g += _load_passed(argmax, grad, image, row, col, 1, 1, num_channels, channel, mask)
        tl.store(grad_x + (image * FIRST * FIRST + position)[:, None] * num_channels + channel[None, :], g, mask=mask)
        bias += g
    tl.store(partial + image * num_channels + channel, tl.sum(bias, 0), mask=used)
