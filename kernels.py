"""How rendering.py's kernels are called: compiled or as they are, and a chunk of latents at a time.

The kernels save nothing but their inputs for the backward pass, and forwards and backwards
what they need beside it is that of one chunk: however many latents are scored, with
gradients or without, memory grows only by the few kilobytes of each one's image.
"""

import torch

import gpu

compiled = {}  # kernel -> its compiled form


def get_chunk_size(device):
    """How many latents are scored at a time: on a GPU so many that they are few launches, on a CPU in plain
    PyTorch what fits the cache"""
    if gpu.is_gpu(device):
        return 8192
    return 1024 if compiled else 64


def get_gradient_chunk_size(device):
    """As get_chunk_size, for a backward pass that takes more memory, and some time for each chunk"""
    return min(max(256, get_chunk_size(device)), 2500)


def split(size, *batched):
    """Tensors, cut along their first dimension: tuples of chunks, each of two rows at least if there are two"""
    num_rows = len(batched[0])
    starts = range(0, max(num_rows - 1, 1), size)
    return [tuple(x[start : start + size if start != starts[-1] else num_rows] for x in batched) for start in starts]


def run_in_chunks(kernel, batched, rest, size):
    """As run, for kernels whose arguments and results have the batch in dimension 0, so many rows of it at a time"""
    results = [run(kernel, 0, chunk, rest) for chunk in split(size, *batched)]
    if len(results) == 1:
        return results[0]
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def run(kernel, batch_dim, batched, rest):
    """Calls a kernel, compiled or not; the first of its arguments, `batched`, have the
    batch, of two at least, in their dimension batch_dim. What would be compiled apart is
    made the same: inputs that require gradients, or that are not contiguous."""
    if kernel not in compiled:
        return kernel(*batched, *rest)
    batched, rest = ([x.detach().contiguous() for x in args] for args in (batched, rest))
    for x in batched:
        torch._dynamo.mark_dynamic(x, batch_dim)
    return compiled[kernel](*batched, *rest)
