"""Strokes that vary: how another hand, or the same one at another time, would draw a program.

A program is the centre of a distribution over drawings. A drawing is determined by v: the displacement d and half angle theta
of each stroke, the starting point s, the pen (the factors exp(b) by which all strokes are sharper and wider), and an affine map
W that warps the picture before it is seen through the program's own map M:

    v = (d_1, ..., d_A, theta_1, ..., theta_A, s, b, W) = mu + sigma * e,   e ~ N(0, I)     sigma: Deviations
    x_i | v ~ Bernoulli(clamp(q_i(v), f, 1 - f))                                            q(v) = apply_maps(draw(v), M W)

At the centre mu, d and theta are those of the program's primitives, s is the middle of the page, b is 0, and W is the
identity. `f` limits the influence of single pixels. A pixel that is partly ink counts in proportion: log p(x_i | v) is
x_i log q_i + (1 - x_i) log(1 - q_i). The score of a drawing for an image x is

    log p(x | v) - |e|^2 / 2        (nats; log p(x, v) up to the constants of the normal densities)

and `refit` maximises it with Adam, through the renderer. Strokes begin blurred, so that those beside the ink get gradients
towards it, and become sharp as the fit proceeds; W may begin as the map that gives the drawing the place and size of the
image's ink.

Source: programs as distributions over drawings, as in Lake, Salakhutdinov and Tenenbaum (2015), whose strokes are splines.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rendering

FLOOR = 0.01  # f
FARTHEST = 4.0  # largest deviations with which a fit may begin
LEARNING_RATE = 0.1  # of Adam on e; it falls to about a tenth
AT_ONCE = 800  # drawings fitted at a time
ARCS_PER_SIZE = 8  # drawings are padded to multiples of it, so that rounding depends little on what is fitted beside them


class Drawing(NamedTuple):
    """Drawings of A strokes, in coordinates of the unit square (y upwards), with any leading dimensions, such as [K, N]"""

    displacement: torch.Tensor  # [..., A, 2]
    theta: torch.Tensor  # [..., A], half the angle that a stroke spans, in radians
    start: torch.Tensor  # [..., 2], of the first stroke
    map: torch.Tensor  # [..., 2, 3], takes points of the picture to points of the drawing, in affine_grid's coordinates
    on: torch.Tensor  # [..., A], bool: which strokes leave ink
    sharpness: torch.Tensor  # [..., A]
    width: torch.Tensor  # [..., A]
    params: torch.Tensor  # [2], scale and bias of the ink's logit

    def select(self, *ids):
        """Selects drawings by ids for each dimension in order, as one indexes a tensor"""
        return change(self, lambda x: x[ids])


class Variation(NamedTuple):
    """e, the deviations of drawings from their centres, in units of sigma"""

    displacement: torch.Tensor  # [..., A, 2]
    theta: torch.Tensor  # [..., A]
    start: torch.Tensor  # [..., 2]
    pen: torch.Tensor  # [..., 2]
    warp: torch.Tensor  # [..., 2, 3]

    def get_distance(self):
        """|e|^2 / 2: [...], nats"""
        num_dims = self.theta.dim() - 1
        return sum(x.square().flatten(num_dims).sum(num_dims) for x in self) / 2


def change(strokes, function):
    """Applies a function to each field of a Drawing or Variation that has a value per drawing"""
    return strokes._replace(**{name: function(x) for name, x in strokes._asdict().items() if name != "params"})


def resize(strokes, num):
    """Cuts a Drawing or Variation to its first strokes, or appends strokes that draw nothing"""
    names = [name for name in ("displacement", "theta", "on", "sharpness", "width") if hasattr(strokes, name)]
    more, num_dims = num - strokes.theta.shape[-1], strokes.theta.dim()
    resized = {name: F.pad(x, (0, 0) * (x.dim() - num_dims) + (0, more)) for name in names for x in [getattr(strokes, name)]}
    return strokes._replace(**resized)


class Deviations(NamedTuple):
    """sigma, standard deviations"""

    displacement: float  # of the unit square
    theta: float  # radians
    start: float  # of the unit square
    pen: float  # of the log factors of sharpness and width
    scale: float  # of W's entries on the diagonal
    shear: float  # and beside it
    shift: float  # and its translation, in affine_grid's coordinates: 2 is the page's side


OWN = Deviations(0.1, 0.5, 0.1, 0.5, 0.1, 0.1, 0.1)  # from a program to the image that it was found for
HAND = Deviations(0.04, 0.3, 0.06, 0.2, 0.15, 0.1, 0.15)  # from one hand to another: what a fit may use up
# for new examples: a little less than two drawings of a character differ
SAMPLED = Deviations(0.02, 0.15, 0.02, 0.0, 0.1, 0.06, 0.06)


# ------------------------------------------------------------------ drawings


@torch.no_grad()
def get_drawing(generative_model, latent, obs=None):
    """The drawings of programs without any variation, seen through the most probable map given the image or, without an image,
    through none: latent [N, A, 2], obs [N, R, C] -> Drawing, in float32 whatever the model's precision"""
    dx, dy, theta, sharpness, width = generative_model.get_primitives().float()[latent[..., 0]].unbind(-1)  # [N, A] each
    maps = generative_model.likelihood.maps
    if maps is None or obs is None:
        seen = torch.eye(3)[:2].repeat(len(latent), 1, 1)
    else:
        seen = maps[generative_model.get_map_log_posterior(latent, obs).argmax(1)].float()
    start = torch.full((len(latent), 2), 0.5)
    params = generative_model.get_rendering_params().float()
    return Drawing(torch.stack([dx, dy], -1), theta, start, seen, latent[..., 1] > 0, sharpness, width, params)


def get_arcs(drawing):
    """Drawing -> arcs [..., A, 7], as rendering.get_logits takes them"""
    end = drawing.start.unsqueeze(-2) + drawing.displacement.cumsum(-2)  # [..., A, 2]
    start = torch.cat([drawing.start.unsqueeze(-2), end[..., :-1, :]], -2)
    rest = [drawing.theta, drawing.sharpness, drawing.width]
    return torch.cat([start, drawing.displacement, torch.stack(rest, -1)], -1)


def get_probs(drawing, num_rows=28, num_cols=28):
    """The probability of ink, seen through the map: Drawing -> [..., R, C]"""
    arcs, on, maps = get_arcs(drawing).flatten(0, -3), drawing.on.flatten(0, -2), drawing.map.flatten(0, -3)
    logits = rendering.get_logits(arcs, on, drawing.params, num_rows, num_cols)
    return rendering.apply_maps(logits.sigmoid(), maps).view(*drawing.on.shape[:-1], num_rows, num_cols)


def get_log_likelihood(drawing, obs, floor=FLOOR):
    """log p(x | v): Drawing, obs [..., R, C] in [0, 1] -> [...], nats"""
    probs = get_probs(drawing, *obs.shape[-2:]).clamp(floor, 1 - floor)
    return (obs * probs.log() + (1 - obs) * (-probs).log1p()).flatten(-2).sum(-1)


# ------------------------------------------------------------------ variation


def get_warp_deviations(deviations):
    """[2, 3]"""
    scale, shear, shift = deviations[4:]
    return torch.tensor([[scale, shear, shift], [shear, scale, shift]])


def vary(centre, variation, deviations):
    """The drawings mu + sigma * e: Drawing, Variation, Deviations -> Drawing"""
    warp = torch.eye(3)[:2].to(centre.map) + get_warp_deviations(deviations).to(centre.map) * variation.warp  # [..., 2, 3]
    outer, shift = centre.map[..., :2], centre.map[..., 2:]
    sharper, wider = (deviations.pen * variation.pen).exp().unsqueeze(-2).unbind(-1)  # [..., 1] each
    return centre._replace(
        displacement=centre.displacement + deviations.displacement * variation.displacement,
        theta=centre.theta + deviations.theta * variation.theta,
        start=centre.start + deviations.start * variation.start,
        map=torch.cat([outer @ warp[..., :2], outer @ warp[..., 2:] + shift], -1),
        sharpness=centre.sharpness * sharper,
        width=centre.width * wider,
    )


def get_none(centre):
    """The Variation that leaves a Drawing unchanged"""
    like = Variation(centre.displacement, centre.theta, centre.start, centre.start, centre.map)
    return change(like, torch.zeros_like)


def sample(centre):
    """Draws as other hands would: Drawing -> Drawing"""
    return vary(centre, change(get_none(centre), torch.randn_like), SAMPLED)


def score(centre, variation, obs, deviations):
    """log p(x | v) - |e|^2 / 2: Drawing, Variation, obs [..., R, C], Deviations -> [...], nats"""
    return get_log_likelihood(vary(centre, variation, deviations), obs) - variation.get_distance()


# ------------------------------------------------------------------ fitting


class Schedule(NamedTuple):
    """The schedule of a fit"""

    num_steps: int
    blur: float  # factor on the strokes' sharpness at first
    last_blur: float  # and in the end
    when: float  # share of the steps after which last_blur is reached


def refit(centre, obs, deviations, schedule, start=None, aligned_to=None, tick=lambda: None):
    """Fits drawings to images.

    Args:
        centre: Drawing, mu; obs [..., R, C] in [0, 1], for each drawing; deviations: Deviations; schedule: Schedule
        start: initial Variation e; if None, 0
        aligned_to [..., R, C]: images that the centres fit; W then begins as the map from the place and size of their ink
            to those of obs. If None, W begins as the identity
        tick: called after each step of each AT_ONCE drawings
    Returns: Drawing; the Variation e that makes it from the centre, with a score at least that of the start (ignoring
        aligned_to); |e|^2 / 2, [...], nats
    """
    shape, start = centre.on.shape[:-1], start or get_none(centre)
    flat, e = (change(x, lambda x: x.flatten(0, len(shape) - 1)) for x in (centre, start))
    obs, aligned = obs.flatten(0, -3), e
    if aligned_to is not None:
        warp = _align(aligned_to.flatten(0, -3), obs) / get_warp_deviations(deviations)
        aligned = e._replace(warp=warp.clamp(-FARTHEST, FARTHEST))
    num_arcs = flat.on.shape[1]
    length, parts = (flat.on * torch.arange(1, num_arcs + 1)).amax(1), []  # [N]
    order = length.argsort(stable=True)
    for ids in order.split(AT_ONCE):  # groups drawings of similar length, to pad little
        num = math.ceil(max(int(length[ids].max()), 1) / ARCS_PER_SIZE) * ARCS_PER_SIZE
        some = [resize(change(x, lambda x, ids=ids: x[ids]), num) for x in (flat, e, aligned)]
        part = _refit(*some, obs[ids], deviations, schedule, tick)
        parts.append([*resize(part, num_arcs), part.get_distance()])
    *e, distance = (torch.cat(some)[order.argsort()].unflatten(0, shape) for some in zip(*parts, strict=True))
    return vary(centre, Variation(*e), deviations), Variation(*e), distance


def _refit(centre, start, aligned, obs, deviations, schedule, tick):
    """The Variation that `refit` finds, of N drawings"""
    variation = change(aligned, lambda x: x.clone().requires_grad_())
    optimizer = torch.optim.Adam(variation, lr=LEARNING_RATE)
    with torch.enable_grad():
        for step in range(schedule.num_steps):
            share = min(step / max(schedule.when * schedule.num_steps, 1), 1.0)  # `when` may be 0
            sharp = schedule.blur + (schedule.last_blur - schedule.blur) * share
            blurred = centre._replace(sharpness=centre.sharpness * sharp)
            loss = -score(blurred, variation, obs, deviations).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step + 1) / schedule.num_steps) + 0.01
            tick()
    with torch.no_grad():
        better = score(centre, variation, obs, deviations) >= score(centre, start, obs, deviations)  # [N]
    both = zip(variation, start, strict=True)
    return Variation(*(torch.where(better.view(-1, *[1] * (x.dim() - 1)), x.detach(), y) for x, y in both))


def _align(source, target):
    """The map, minus the identity, from the place and extent of the target's ink to those of the source's, along both axes:
    images [N, R, C] -> [N, 2, 3]"""
    means, deviations = zip(_get_moments(source), _get_moments(target), strict=True)
    factor = (deviations[0] / deviations[1]).clamp(0.5, 2)  # [N, 2]
    return torch.cat([torch.diag_embed(factor - 1), (means[0] - factor * means[1]).unsqueeze(2)], 2)


def _get_moments(obs):
    """Mean and standard deviation of the ink's (x, y), in affine_grid's coordinates: [N, R, C] -> [N, 2], [N, 2]"""
    weight, moments = obs / obs.sum((1, 2), keepdim=True).clamp(min=1), []
    for along in (weight.sum(1), weight.sum(2)):  # x, y
        at = torch.linspace(-1, 1, along.shape[1])
        mean = (along * at).sum(1, keepdim=True)
        moments.append((mean.squeeze(1), (along * (at - mean) ** 2).sum(1)))
    mean, square = (torch.stack(some, 1) for some in zip(*moments, strict=True))
    return mean, square.clamp(min=0.01).sqrt()  # a straight stroke has no extent along one axis
