"""Functions for Triton kernels. tl.log and tl.log2 are computed in software, with a branch for each value."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LN_2 = tl.constexpr(0.6931471805599453)
SHIFT = tl.constexpr(1.5 * 2**23)
SHIFT_BITS = tl.constexpr(0x4B400000)  # SHIFT in float32


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 * sigmoid(2 * x) - 1


@triton.jit
def log2(x):
    """By the GPU's own unit: within 2^-22 for x between 0.5 and 2, relative to the result elsewhere; -inf if x is subnormal"""
    return libdevice.fast_log2f(x)


@triton.jit
def log(x):
    return log2(x) * LN_2


@triton.jit
def floor(x):
    """The largest integer not above x, as a float and as an integer, for |x| < 2^22: a sum that is rounded down and has no bits
    for fractions. A GPU has fewer units for conversions than for sums."""
    shifted = libdevice.add_rd(x, SHIFT)
    return shifted - SHIFT, shifted.to(tl.int32, bitcast=True) - SHIFT_BITS


@triton.jit
def unfused_product(x, y):
    """x * y, for products whose sum over threads goes to all of them. Fused with the sum's first step, each thread would round
    the other's product but not its own, so that their results would differ"""
    return libdevice.mul_rn(x, y)
