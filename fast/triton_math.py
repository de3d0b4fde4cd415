"""Functions for Triton kernels that Triton itself computes in software, with a branch for each value, or lacks."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 * sigmoid(2 * x) - 1


HAS_UNIT = tl.constexpr(isinstance(sigmoid, triton.JITFunction))  # Triton's interpreter lacks a GPU's units


@triton.jit
def log2(x):
    """By the GPU's own unit: within 2^-22 for x between 0.5 and 2, relative to the result elsewhere; zero for subnormal x"""
    if HAS_UNIT:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def log(x):
    return log2(x) * LN_2
