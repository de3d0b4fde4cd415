"""Calls rendering.py's kernels: compiled or not, and a chunk of latents at a time.

The kernels save only their inputs for the backward pass, and both passes work on one chunk at a
time. However many latents are scored, with or without gradients, memory therefore grows by no
more than the few kilobytes of each latent's image.
"""

import torch

import gpu

compiled = {}  # kernel -> its compiled form


def get_chunk_size(device):
    """How many latents are scored at a time: on a GPU enough to need few launches; on a CPU, in plain PyTorch,
    as many as fit the cache"""
    if gpu.is_gpu(device):
        return 8192
    return 1024 if compiled else 64


def get_gradient_chunk_size(device):
    """As get_chunk_size, for backward passes, which take more memory per latent and some time per chunk"""
    return min(max(256, get_chunk_size(device)), 2500)


def split(size, *batched):
    """Cuts tensors along their first dimension: a list of tuples of chunks of at least two rows (if there are two)"""
    num_rows = len(batched[0])
    starts = range(0, max(num_rows - 1, 1), size)
    return [tuple(x[start : start + size if start != starts[-1] else num_rows] for x in batched) for start in starts]


def run_in_chunks(kernel, batched, rest, size):
    """As run, `size` rows at a time, for kernels whose arguments and results have the batch in dimension 0"""
    results = [run(kernel, 0, chunk, rest) for chunk in split(size, *batched)]
    if len(results) == 1:
        return results[0]
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def run(kernel, batch_dim, batched, rest):
    """Calls a kernel, compiled or not. Its first arguments, `batched`, have the batch (of at
    least two) in dimension batch_dim. Inputs are detached and made contiguous, since others
    would be compiled separately."""
    if kernel not in compiled:
        return kernel(*batched, *rest)
    batched, rest = ([x.detach().contiguous() for x in args] for args in (batched, rest))
    for x in batched:
        torch._dynamo.mark_dynamic(x, batch_dim)
    return compiled[kernel](*batched, *rest)
