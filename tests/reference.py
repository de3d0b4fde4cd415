"""The renderer and the affine likelihood as one would first write them, from the
textbook's formulas: slow, and wrong in float32 for nearly straight arcs, but plain
to read. The project's own are compared with these in float64."""

import math

import torch
import torch.nn.functional as F


def get_logits(arcs, on_offs, rendering_params, num_rows, num_cols):
    """As rendering.get_logits: arcs [B, A, 7], on_offs [B, A] -> [B, R, C]"""
    x_start, y_start, dx, dy, theta, sharpness, width = (a[..., None, None] for a in arcs.unbind(-1))
    # each [B, A, 1, 1]
    x = torch.arange(num_cols).to(arcs) / (num_cols - 1)
    y = 1 - torch.arange(num_rows).to(arcs)[:, None] / (num_rows - 1)  # [R, 1]

    x_centre = x_start + dx / 2 + dy / (2 * theta.tan())
    y_centre = y_start + dy / 2 - dx / (2 * theta.tan())
    radius = torch.hypot(x_start - x_centre, y_start - y_centre)
    # In the sector: less than theta, as seen from the centre, away from the arc's middle.
    x_middle = x_start + dx / 2 - dy / 2 * (theta / 2).tan()
    y_middle = y_start + dy / 2 + dx / 2 * (theta / 2).tan()
    angle = torch.atan2(y - y_centre, x - x_centre) - torch.atan2(y_middle - y_centre, x_middle - x_centre)
    angle = (angle + math.pi).remainder(2 * math.pi) - math.pi
    to_circle = (torch.hypot(x - x_centre, y - y_centre) - radius).abs()
    to_end = torch.minimum(torch.hypot(x - x_start, y - y_start), torch.hypot(x - x_start - dx, y - y_start - dy))
    distance = torch.where(angle.abs() <= theta.abs(), to_circle, to_end)  # [B, A, R, C]

    scale, bias = rendering_params
    ink = scale * (sharpness**2 * (width**2 - distance**2)).exp().clamp(0, 1) + bias
    ink = ink.masked_fill(on_offs[..., None, None] == 0, -math.inf).amax(1)  # [B, R, C]
    return (ink.exp() + 1e-6).log()


def affine_log_prob(logits, obs, maps):
    """As rendering.affine_log_prob: logits, obs [N, R, C], maps [T, 2, 3] -> [N]"""
    num_images, num_maps = len(logits), len(maps)
    grid = F.affine_grid(maps, (num_maps, 1, *obs.shape[1:]), align_corners=True)  # [T, R, C, 2]
    grid = grid.repeat(num_images, 1, 1, 1)  # [N * T, R, C, 2]
    probs = logits.sigmoid()[:, None].repeat_interleave(num_maps, 0)  # [N * T, 1, R, C]
    eps = torch.finfo(torch.float32).eps
    probs = F.grid_sample(probs, grid, align_corners=True)[:, 0].clamp(eps, 1 - eps)
    obs = obs.repeat_interleave(num_maps, 0)
    log_prob = torch.distributions.Bernoulli(probs=probs, validate_args=False).log_prob(obs)
    return log_prob.sum((1, 2)).view(num_images, num_maps).logsumexp(1) - math.log(num_maps)
