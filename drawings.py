"""Drawings of programs: canonical, or as the model sees them, through an affine map.

Drawings are probabilities of ink, [..., R, R], from 0 (white) to 1 (black); NaN leaves a place empty.
Under an affine likelihood an image is a drawing seen through one of T maps, so a program matches its
image only through the most probable map.
"""

import math

import torch
import torch.nn.functional as F

import rendering

PIXELS_AT_ONCE = 64 * 28 * 28
FAINT = 0.05  # probability of ink that is invisible


def get_maps(generative_model, latent, obs):
    """The most probable map of each program and image.

    Args: latent [N, A, 2]; obs [N, R, C]
    Returns: map_id [N]; maps [N, 2, 3], or None and None if the likelihood has no maps
    """
    if not generative_model.has_maps():
        return None, None
    map_id = generative_model.get_map_log_posterior(latent, obs).argmax(1)
    return map_id, generative_model.theta_affine[map_id].detach()


def draw_maps(generative_model, num):
    """Samples maps from the model: [N, 2, 3], or None if the likelihood has none"""
    if not generative_model.has_maps():
        return None
    return generative_model.theta_affine[torch.randint(len(generative_model.theta_affine), (num,))].detach()


@torch.no_grad()
def draw(generative_model, latent, resolution, maps=None):
    """latent [..., A, 2] -> probabilities of ink [..., R, R] at a resolution, canonical, or through maps [..., 2, 3]"""
    flat = latent.flatten(0, -3)  # [N, A, 2]
    at_once = max(PIXELS_AT_ONCE // resolution**2, 1)
    probs = torch.cat(
        [generative_model.get_logits(chunk, resolution, resolution).sigmoid() for chunk in flat.split(at_once)]
    )
    if maps is not None:
        probs = rendering.apply_maps(probs, maps.flatten(0, -3))
    return probs.cpu().view(*latent.shape[:-2], resolution, resolution)


def get_stages(latent):
    """A latent after each of its strokes: [N, A, 2] -> [N, A, A, 2]; the s-th ends with stroke s"""
    num_arcs = latent.shape[1]
    stages = latent.unsqueeze(1).repeat(1, num_arcs, 1, 1)
    stages[..., 1] *= torch.ones(num_arcs, num_arcs, dtype=torch.long, device=latent.device).tril()
    return stages


def draw_stages(generative_model, latent, resolution, maps=None):
    """Draws a latent after each of its visible strokes: [N, A, 2] -> [N, A - 1, R, R], NaN where there are no more"""
    num_arcs = latent.shape[1]
    maps = None if maps is None else maps.unsqueeze(1).expand(-1, num_arcs, -1, -1)
    probs = draw(generative_model, get_stages(latent), resolution, maps)  # [N, A, R, R]
    visible = latent[..., 1].cpu() > 0  # [N, A]
    order = get_visible_order(latent)
    probs = probs.gather(1, order[..., None, None].expand_as(probs))
    num_visible = visible.sum(1, keepdim=True)
    probs[torch.arange(num_arcs) >= num_visible] = math.nan
    return probs[:, : max(num_arcs - 1, 1)]


def get_visible_order(latent):
    """Indices of the strokes, the visible ones first: latent [N, A, 2] -> [N, A]"""
    return (latent[..., 1].cpu() == 0).long().argsort(dim=1, stable=True)


def is_off_page(generative_model, latent, maps=None):
    """Which of a latent's visible strokes leave no ink on the page: [N, A, 2] -> [N, A]"""
    num_arcs = latent.shape[1]
    alone = latent.unsqueeze(1).repeat(1, num_arcs, 1, 1)  # [N, A, A, 2]: the s-th shows stroke s alone
    alone[..., 1] *= torch.eye(num_arcs, dtype=torch.long, device=latent.device)
    maps = None if maps is None else maps.unsqueeze(1).expand(-1, num_arcs, -1, -1)
    probs = draw(generative_model, alone, 28, maps)
    return (probs.flatten(2).amax(2) < FAINT) & (latent[..., 1].cpu() > 0)


@torch.no_grad()
def get_pen_path(generative_model, latent, resolution, maps=None):
    """Start and end of each stroke, in pixels (column, row), through the maps: [N, A, 2] -> [N, A, 2, 2]"""
    arcs = generative_model.get_arcs(latent).cpu()  # [N, A, 7]
    points = torch.stack([arcs[..., :2], arcs[..., :2] + arcs[..., 2:4]], 2)  # [N, A, 2, 2]
    points = torch.stack([2 * points[..., 0] - 1, 1 - 2 * points[..., 1]], -1)  # in affine_grid's coordinates
    if maps is not None:
        maps = maps.cpu().double()
        inverse = torch.linalg.pinv(maps[:, :, :2])  # [N, 2, 2]
        moved = points.double() - maps[:, None, None, :, 2]
        points = torch.einsum("nij,napj->napi", inverse, moved)
    return (points + 1) / 2 * (resolution - 1)


def resize(obs, resolution):
    """Scales images [N, R, C] to another resolution, without smoothing"""
    return F.interpolate(obs.unsqueeze(1).cpu(), size=(resolution, resolution), mode="nearest")[:, 0]


@torch.no_grad()
def draw_arcs(generative_model, arcs, on, resolution):
    """arcs [N, A, 7], on [N, A] -> probabilities of ink [N, R, R] at a resolution"""
    params = generative_model.get_rendering_params()
    return rendering.get_logits(arcs, on, params, resolution, resolution).sigmoid().cpu()


# ------------------------------------------------------------------ primitives


def get_points(primitives, num=33):
    """Points along primitives [K, 5] from where they start: x and y, each [K, num]"""
    dx, dy, theta = (x.unsqueeze(1) for x in primitives.double()[:, :3].unbind(1))
    # A point a fraction t along the arc: the chord to it is at the angle t * theta from the tangent at the start.
    t = torch.linspace(0, 1, num, dtype=torch.double, device=dx.device)
    chord = torch.where(theta.abs() < 1e-6, t, (t * theta).sin() / theta.sin())
    turn = (1 - t) * theta
    return chord * (dx * turn.cos() - dy * turn.sin()), chord * (dx * turn.sin() + dy * turn.cos())


def get_reach(primitives):
    """How far the ink of primitives [K, 5] extends beyond the centre line of their strokes: [K]"""
    sharpness, width = primitives.double()[:, 3:].unbind(1)
    return (width**2 + 3 / sharpness**2).sqrt()


def get_extent(primitives):
    """How far the ink of primitives [K, 5] extends from their starting points, along either axis"""
    x, y = get_points(primitives)
    return (torch.stack([x.abs(), y.abs()]).amax((0, 2)) + get_reach(primitives)).max().item()


def draw_primitives(generative_model, resolution):
    """Draws every primitive in the middle of a tile, all on one scale, on which the largest fills its tile.

    Returns: probabilities of ink [K, R, R]; where each starts, in pixels (column, row) [K, 2]; a tile's side, in
        units of a character's
    """
    primitives = generative_model.get_primitives().detach()  # [K, 5]
    x, y = get_points(primitives)
    middle = torch.stack([(p.amax(1) + p.amin(1)) / 2 for p in (x, y)], 1)  # [K, 2]
    size = torch.stack([p.amax(1) - p.amin(1) for p in (x, y)], 1).amax(1)
    zoom = 0.8 / size.max().item()
    start = 0.5 - middle * zoom  # [K, 2]
    scaled = primitives * primitives.new_tensor([zoom, zoom, 1, 1 / zoom, zoom])  # keeps the shape of the ink
    arcs = torch.cat([start.to(scaled.dtype), scaled], 1).unsqueeze(1)  # [K, 1, 7]
    on = torch.ones(len(arcs), 1, dtype=torch.long, device=arcs.device)
    pixel = torch.stack([start[:, 0], 1 - start[:, 1]], 1) * (resolution - 1)
    return draw_arcs(generative_model, arcs, on, resolution), pixel.cpu(), 1 / zoom
