"""The first two layers of the inference network: on a CPU, each distinct patch of up to 128 images is convolved once.

After the first convolution and its pooling, a position depends on 5 x 5 binary pixels, and characters consist of lines: there
is about one distinct patch for every eight positions. The second convolution multiplies each patch by its nine taps once, and
each position only adds up the products in its neighbourhood. Values and gradients equal those of the plain convolutions, which
a GPU uses, since there multiplying is faster than looking things up.
"""

import torch
import torch.nn.functional as F

from fast import gpu

SIZE = 14  # rows and columns after the first pooling
IMAGE_CHUNK_SIZE = 128  # images at a time, which share patches
PATCH_CHUNK_SIZE = 4096  # patches convolved at a time


def convolve(obs, conv0, conv1):
    """Two convolutions, each pooled by max_pool2d(x, 3, 2) and then rectified: obs [B, 28, 28],
    conv0 = Conv2d(1, C, 3, padding=2), conv1 = Conv2d(C, D, 3, padding=1) -> [B, D, 6, 6]"""
    obs = obs.to(next(conv0.parameters()).dtype)
    is_ours = is_plain(conv0, padding=2) and is_plain(conv1, padding=1) and conv0.in_channels == 1
    if not is_ours or obs.shape[1:] != (28, 28):  # custom layers or images
        return F.max_pool2d(conv1(F.max_pool2d(conv0(obs.unsqueeze(1)), 3, 2).relu()), 3, 2).relu()
    if gpu.is_gpu(obs.device) or obs.requires_grad or not ((obs == 0) | (obs == 1)).all():
        return _convolve_each(obs, conv0, conv1)
    return torch.cat([_convolve_shared(chunk, conv0, conv1) for chunk in obs.split(IMAGE_CHUNK_SIZE)])


def is_plain(conv, padding):
    """Whether a layer is what Conv2d(..., 3, padding=padding) makes, and does nothing else"""
    if type(conv) is not torch.nn.Conv2d or "forward" in vars(conv) or conv.bias is None:
        return False
    has_hooks = any(getattr(conv, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
    options = conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.groups, conv.padding_mode
    return not has_hooks and options == ((3, 3), (1, 1), (1, 1), (padding, padding), 1, "zeros")


def _convolve_each(obs, conv0, conv1):
    # Pooling first gives the same values and gradients, with less work for the bias (above all its gradient) and relu.
    if gpu.kernels.are_used("convolution", obs):
        x = gpu.Convolve.apply(obs, conv0.weight, conv0.bias)  # [B, C, 14, 14]
        return gpu.Pool.apply(F.conv2d(x, conv1.weight, padding=1), conv1.bias)  # [B, D, 6, 6]
    x = F.max_pool2d(conv0(obs.unsqueeze(1)), 3, 2).relu()  # [B, C, 14, 14]
    x = F.max_pool2d(F.conv2d(x, conv1.weight, padding=1), 3, 2)  # [B, D, 6, 6]
    return (x + conv1.bias.view(-1, 1, 1)).relu()


def _convolve_shared(obs, conv0, conv1):
    codes, order = get_codes(obs).flatten().sort(stable=True)
    distinct, key, counts = codes.unique_consecutive(return_inverse=True, return_counts=True)  # N of them
    if len(distinct) > len(codes) // 2:  # noise, not characters
        return _convolve_each(obs, conv0, conv1)
    key = torch.empty_like(key).scatter_(0, order, key).view(-1, SIZE, SIZE)  # [B, 14, 14]
    x = torch.cat([_convolve_patches(chunk, conv0) for chunk in distinct.split(PATCH_CHUNK_SIZE)])  # [N, C]
    taps = conv1.weight.permute(2, 3, 1, 0).flatten(0, 1)  # [9, C, D]
    x = _SumOfProducts.apply(x, taps, key, order, counts)  # [B * 14 * 14, D]
    x = F.max_pool2d(x.view(*key.shape, x.shape[1]).permute(0, 3, 1, 2), 3, 2)  # [B, D, 6, 6]
    return (x + conv1.bias.view(-1, 1, 1)).relu()


def get_codes(obs):
    """The 5 x 5 pixels that each position depends on, one bit per pixel: [B, 28, 28] -> [B, 14, 14]"""
    ink = F.pad(obs, (2, 1, 2, 1)).int()  # [B, 31, 31]
    rows = sum(ink[:, :, i : i + 2 * SIZE - 1 : 2] << i for i in range(5))  # [B, 31, 14]
    return sum(rows[:, i : i + 2 * SIZE - 1 : 2] << 5 * i for i in range(5))


def _convolve_patches(codes, conv0):
    """The first layer: codes [N] -> [N, C]"""
    pixels = (codes.unsqueeze(1) >> torch.arange(25, dtype=codes.dtype)) & 1  # [N, 25]
    windows = pixels.view(-1, 5, 5).unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 9, 9)  # [N, 9 positions, 9 taps]
    x = F.linear(windows.to(conv0.weight.dtype), conv0.weight.flatten(1), conv0.bias)  # [N, 9, C]
    return x.max(1).values.relu()


class _SumOfProducts(torch.autograd.Function):
    """The second convolution: each position's row is the sum of nine products.

    Args: x [N, C], patches; taps [9, C, D]; key [B, 14, 14], each position's patch;
        order [B * 14 * 14], positions sorted by patch; counts [N], positions with a patch
    Returns: [B * 14 * 14, D]
    """

    @staticmethod
    def forward(ctx, x, taps, key, order, counts):
        ctx.save_for_backward(x, taps, order, counts)
        num_patches, num_channels = len(x), taps.shape[2]
        products = x.new_empty(num_patches + 1, 9 * num_channels)
        torch.mm(x, taps.transpose(0, 1).flatten(1), out=products[:-1])
        products[-1] = 0  # padding, outside the image
        patch = F.pad(key.int(), (1, 1, 1, 1), value=num_patches)  # [B, 16, 16]
        rows = 9 * _get_neighbours(patch) + torch.arange(9, dtype=torch.int)  # [B * 14 * 14, 9]
        return F.embedding_bag(rows, products.view(-1, num_channels), mode="sum")

    @staticmethod
    def backward(ctx, grad):
        """A product's gradient is summed over the positions it was added to: for each tap, the opposite neighbours of all
        positions with that patch"""
        x, taps, order, counts = ctx.saved_tensors
        nowhere = SIZE**2 - 1  # an image's last position: pooling ignores it, so its gradient is 0
        position = torch.arange(len(grad), dtype=torch.int).view(-1, SIZE, SIZE)
        position = F.pad(position, (1, 1, 1, 1), value=nowhere)  # [B, 16, 16]
        rows = _get_neighbours(position).flip(1)[order].t().flatten()  # [9 * B * 14 * 14]
        first = counts.cumsum(0) - counts + len(grad) * torch.arange(9).unsqueeze(1)  # [9, N]
        grad = F.embedding_bag(rows, grad.contiguous(), first.int().flatten(), mode="sum").unflatten(0, first.shape)
        grad_x = sum(g @ tap.t() for g, tap in zip(grad, taps, strict=True))
        return grad_x, torch.bmm(x.t().expand(9, -1, -1), grad), None, None, None


def _get_neighbours(padded):
    """The 3 x 3 values around each position: [B, 16, 16] -> [B * 14 * 14, 9]"""
    return padded.unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 9)
