"""The first layer of the inference network on a GPU, as Triton kernels: convolution, pooling and relu at once.

With one input channel a convolution multiplies little and writes much: 64 channels of 30 x 30 pixels per
image, of which pooling keeps a quarter. Here only what is kept is written, with one byte each that tells
the backward pass where it came from. patches.py has the plain version.
"""

import torch
import triton
import triton.language as tl

SIZE = 28  # rows and columns of an image
POOLED = tl.constexpr(14)  # of the result
POSITIONS = 8  # of the result, handled at once: as few as leave registers for more programs side by side
POSITIONS_BACKWARD = 32
IMAGES_PER_PROGRAM = 2  # in the backward pass: few, so that there are many programs


@triton.jit
def _load_pixel(obs, image, row, col, mask, SIZE: tl.constexpr):
    """Images have a border of two zeros; row and col count from its corner"""
    inside = mask & (row >= 2) & (row < SIZE + 2) & (col >= 2) & (col < SIZE + 2)
    return tl.load(obs + (image * SIZE + row - 2) * SIZE + col - 2, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_images"])
def _convolve(
    obs, weight, bias, out, argmax, num_images, num_channels,
    SIZE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.arange(0, CHANNELS)
    valid, used = position < num_images * POOLED * POOLED, channel < num_channels
    image = (position // (POOLED * POOLED)).to(tl.int64)
    row, col = 2 * (position // POOLED % POOLED), 2 * (position % POOLED)
    b = tl.load(bias + channel, mask=used, other=0.0)
    highest = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    chosen = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for window in tl.static_range(9):
        value = tl.zeros((POSITIONS, CHANNELS), tl.float32) + b[None, :]
        for tap in tl.static_range(9):  # 25 pixels in all: the compiler loads each of them once
            x = _load_pixel(obs, image, row + (window // 3 + tap // 3), col + (window % 3 + tap % 3), valid, SIZE)
            w = tl.load(weight + channel * 9 + tap, mask=used, other=0.0)
            value += x[:, None] * w[None, :]
        better = (value > highest) | (value != value)
        highest = tl.where(better, value, highest)
        chosen = tl.where(better, window, chosen)
    place = position.to(tl.int64)[:, None] * num_channels + channel[None, :]
    both = valid[:, None] & used[None, :]
    tl.store(out + place, tl.where(highest < 0, 0.0, highest), mask=both)
    tl.store(argmax + place, chosen.to(tl.uint8), mask=both)


def convolve(obs, weight, bias):
    """obs [B, 28, 28], weight [C, 1, 3, 3], bias [C] -> [B, 14, 14, C], and which of its 3 x 3 window each is: uint8"""
    num_images, num_channels = len(obs), len(bias)
    out = obs.new_empty(num_images, POOLED.value, POOLED.value, num_channels)
    argmax = torch.empty_like(out, dtype=torch.uint8)
    if num_images:
        _convolve[triton.cdiv(num_images * POOLED.value**2, POSITIONS),](
            obs, weight, bias, out, argmax, num_images, num_channels,
            SIZE=SIZE, POSITIONS=POSITIONS, CHANNELS=triton.next_power_of_2(num_channels), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, argmax


@triton.jit(do_not_specialize=["num_images"])
def _differentiate_convolve(
    obs, out, argmax, grad, partial, num_images, num_channels, IMAGES: tl.constexpr, SIZE: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk, tap = tl.program_id(0), tl.program_id(1)  # the tenth tap is the bias
    channel = tl.arange(0, CHANNELS)
    used = channel < num_channels
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    end = tl.minimum((chunk + 1) * IMAGES, num_images) * POOLED * POOLED
    for start in range(chunk * IMAGES * POOLED * POOLED, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        both = (position < end)[:, None] & used[None, :]
        place = position.to(tl.int64)[:, None] * num_channels + channel[None, :]
        passed = tl.load(out + place, mask=both, other=0.0) > 0
        g = tl.where(passed, tl.load(grad + place, mask=both, other=0.0), 0.0)
        window = tl.load(argmax + place, mask=both, other=0).to(tl.int32)
        image = (position // (POOLED * POOLED)).to(tl.int64)[:, None]
        row = 2 * (position // POOLED % POOLED)[:, None] + window // 3 + tap // 3
        col = 2 * (position % POOLED)[:, None] + window % 3 + tap % 3
        x = _load_pixel(obs, image, row, col, both & passed, SIZE)
        total += g * tl.where(tap < 9, x, 1.0)
    tl.store(partial + (chunk * 10 + tap) * num_channels + channel, tl.sum(total, 0), mask=used)


def differentiate_convolve(obs, out, argmax, grad):
    """The gradients of weight [C, 1, 3, 3] and bias [C] for grad [B, 14, 14, C], with the results of `convolve`"""
    num_images, num_channels = len(obs), out.shape[3]
    num_chunks = triton.cdiv(num_images, IMAGES_PER_PROGRAM)
    partial = out.new_empty(num_chunks, 10, num_channels)
    if num_images:
        _differentiate_convolve[num_chunks, 10](
            obs, out, argmax, grad, partial, num_images, num_channels, IMAGES=IMAGES_PER_PROGRAM, SIZE=SIZE,
            POSITIONS=POSITIONS_BACKWARD, CHANNELS=triton.next_power_of_2(num_channels), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    total = partial.sum(0)  # [10, C]
    return total[:9].t().reshape(num_channels, 1, 3, 3), total[9].clone()
