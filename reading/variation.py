"""Strokes that vary: how another hand, or the same one another time, would draw a program.

The strokes of a program are fixed, but no two drawings of a character are the same. Here a program is only the centre of a
distribution over drawings. A drawing is determined by v: the displacement d and half angle theta of each stroke, where the
first one begins, s, the pen, that is the factors exp(b) by which all strokes are sharper and wider, and an affine map W by
which the picture is warped before it is seen through the program's own map M:

    v = (d_1, ..., d_A, theta_1, ..., theta_A, s, b, W) = mu + sigma * e,   e ~ N(0, I)     sigma: Deviations
    x_i | v ~ Bernoulli(clamp(q_i(v), f, 1 - f))                                            q(v) = apply_maps(draw(v), M W)

at the centre mu, d and theta are those of the program's primitives, s is the middle of the page, b is 0, and W is the
identity. `f` keeps single pixels from deciding. A pixel that is partly ink counts as ink in proportion, log p(x_i | v) being
x_i log q_i + (1 - x_i) log(1 - q_i). The score of a drawing for an image x is

    log p(x | v) - |e|^2 / 2        (nats; log p(x, v) but for the constants of the normal densities)

and `refit` maximises it with Adam, through the renderer. Strokes begin blurred (their sharpness is scaled down), so that
those beside the ink feel where it is, and become sharp as the fit proceeds; W may begin where it gives the drawing the
place and the size of the image's ink.

Source: programs as distributions over drawings, as in Lake, Salakhutdinov and Tenenbaum (2015); there, strokes are splines.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rendering

FLOOR = 0.01  # f
FARTHEST = 4.0  # deviations at which a fit may begin
AT_ONCE = 800  # drawings fitted at a time
ARCS_PER_SIZE = 8  # their number of strokes is a multiple of it, since each other number would be compiled separately


class Drawing(NamedTuple):
    """N drawings of A strokes, in coordinates of the unit square (y upwards)"""

    displacement: torch.Tensor  # [N, A, 2]
    theta: torch.Tensor  # [N, A], half the angle that a stroke spans, in radians
    start: torch.Tensor  # [N, 2], of the first stroke
    map: torch.Tensor  # [N, 2, 3], takes points of the picture to points of the drawing, in affine_grid's coordinates
    on: torch.Tensor  # [N, A], bool: which strokes leave ink
    sharpness: torch.Tensor  # [N, A]
    width: torch.Tensor  # [N, A]
    params: torch.Tensor  # [2], scale and bias of the ink's logit

    def select(self, ids):
        """Selects drawings by ids [M] or a slice"""
        return Drawing(*(field[ids] for field in self[:-1]), self.params)


def concatenate(drawings):
    """Joins Drawings into one, in order"""
    return Drawing(*(torch.cat(fields) for fields in zip(*(d[:-1] for d in drawings), strict=True)), drawings[0].params)


class Deviations(NamedTuple):
    """sigma, standard deviations"""

    displacement: float  # of the unit square
    theta: float  # radians
    start: float  # of the unit square
    pen: float  # of the logarithms of the factors of sharpness and width
    scale: float  # W's entries on the diagonal
    shear: float  # and beside it
    shift: float  # and its translation, in affine_grid's coordinates: 2 is the page's side


OWN = Deviations(0.1, 0.5, 0.1, 0.5, 0.1, 0.1, 0.1)  # from the program to the image that it was found for
HAND = Deviations(0.04, 0.3, 0.06, 0.2, 0.15, 0.1, 0.15)  # from one hand to another: what a fit may use up
# for new examples: a little less than pairs of drawings of a character differ
SAMPLED = Deviations(0.02, 0.15, 0.02, 0.0, 0.1, 0.06, 0.06)


class Variation(NamedTuple):
    """e, what a drawing deviates from its centre, in units of sigma"""

    displacement: torch.Tensor  # [N, A, 2]
    theta: torch.Tensor  # [N, A]
    start: torch.Tensor  # [N, 2]
    pen: torch.Tensor  # [N, 2]
    warp: torch.Tensor  # [N, 2, 3]

    def get_distance(self):
        """|e|^2 / 2: [N], nats"""
        return sum(x.square().flatten(1).sum(1) for x in self) / 2


# ------------------------------------------------------------------ drawings


@torch.no_grad()
def get_drawing(generative_model, latent, obs=None):
    """The drawing that programs stand for, without any variation, seen through the map that is most probable given the
    image or, without an image, as it is: latent [N, A, 2], obs [N, R, C] -> Drawing"""
    dx, dy, theta, sharpness, width = generative_model.get_primitives()[latent[..., 0]].unbind(-1)  # [N, A] each
    maps = generative_model.likelihood.maps
    if maps is None or obs is None:
        seen = torch.eye(3)[:2].repeat(len(latent), 1, 1)
    else:
        seen = maps[generative_model.likelihood.map_log_posterior(generative_model.get_logits(latent), obs).argmax(1)].detach()
    start = torch.full((len(latent), 2), 0.5)
    params = generative_model.get_rendering_params()
    return Drawing(torch.stack([dx, dy], -1), theta, start, seen, latent[..., 1] > 0, sharpness, width, params)


def get_arcs(drawing):
    """Drawing -> arcs [N, A, 7], as rendering.get_logits takes them"""
    end = drawing.start.unsqueeze(1) + drawing.displacement.cumsum(1)  # [N, A, 2]
    start = torch.cat([drawing.start.unsqueeze(1), end[:, :-1]], 1)
    rest = [drawing.theta, drawing.sharpness, drawing.width]
    return torch.cat([start, drawing.displacement, torch.stack(rest, -1)], -1)


def get_probs(drawing, num_rows=28, num_cols=28):
    """The probability of ink, seen through the map: Drawing -> [N, R, C]"""
    logits = rendering.get_logits(get_arcs(drawing), drawing.on, drawing.params, num_rows, num_cols)
    return rendering.apply_maps(logits.sigmoid(), drawing.map)


def get_log_likelihood(drawing, obs, floor=FLOOR):
    """log p(x | v): Drawing, obs [N, R, C] in [0, 1] -> [N], nats"""
    probs = get_probs(drawing, *obs.shape[1:]).clamp(floor, 1 - floor)
    return (obs * probs.log() + (1 - obs) * (-probs).log1p()).flatten(1).sum(1)


# ------------------------------------------------------------------ variation


def get_warp_deviations(deviations):
    """[2, 3]"""
    scale, shear, shift = deviations[4:]
    return torch.tensor([[scale, shear, shift], [shear, scale, shift]])


def vary(centre, variation, deviations):
    """The drawings mu + sigma * e: Drawing, Variation, Deviations -> Drawing"""
    warp = torch.eye(3)[:2].to(centre.map) + get_warp_deviations(deviations).to(centre.map) * variation.warp  # [N, 2, 3]
    outer, shift = centre.map[:, :, :2], centre.map[:, :, 2:]
    sharper, wider = (deviations.pen * variation.pen).exp().unsqueeze(1).unbind(2)  # [N, 1] each
    return centre._replace(
        displacement=centre.displacement + deviations.displacement * variation.displacement,
        theta=centre.theta + deviations.theta * variation.theta,
        start=centre.start + deviations.start * variation.start,
        map=torch.cat([outer @ warp[:, :, :2], outer @ warp[:, :, 2:] + shift], 2),
        sharpness=centre.sharpness * sharper,
        width=centre.width * wider,
    )


def get_shapes(centre):
    """The shapes of a Variation of a Drawing"""
    return Variation(centre.displacement.shape, centre.theta.shape, centre.start.shape, centre.start.shape, centre.map.shape)


def get_none(centre):
    """The Variation that leaves a Drawing as it is"""
    return Variation(*map(torch.zeros, get_shapes(centre)))


def sample(centre, deviations=SAMPLED):
    """Draws how other hands would: Drawing -> Drawing"""
    return vary(centre, Variation(*map(torch.randn, get_shapes(centre))), deviations)


def score(centre, variation, obs, deviations, floor=FLOOR):
    """log p(x | v) - |e|^2 / 2: Drawing, Variation, obs [N, R, C], Deviations -> [N], nats"""
    return get_log_likelihood(vary(centre, variation, deviations), obs, floor) - variation.get_distance()


# ------------------------------------------------------------------ fitting


class Fit(NamedTuple):
    """Drawings fitted to images; `log_likelihood - distance` is their score"""

    drawing: Drawing
    variation: Variation
    log_likelihood: torch.Tensor  # log p(x | v), [N], nats
    distance: torch.Tensor  # |e|^2 / 2, [N], nats


def refit(
    centre, obs, deviations, num_steps=50, start=None, aligned_to=None, blur=(0.25, 1.0), sharp_after=0.6, lr=0.15,
    floor=FLOOR, tick=lambda: None,
):  # fmt: skip
    """Fits drawings to images.

    Args:
        centre: Drawing, mu; obs [N, R, C] in [0, 1]
        deviations: Deviations; num_steps: of Adam, on e, with a learning rate that falls from lr to nearly 0
        start: Variation that e begins as; if None, 0
        aligned_to [N, R, C]: images that the centres fit; W then begins where it takes the place and size of
            their ink to that of obs. If None, W begins as the identity
        blur: factors of the sharpness, at first and from the share sharp_after of the steps on
        tick: called after each step of each AT_ONCE drawings
    Returns: Fit, whose score is at least that of the start (without regard to aligned_to)
    """
    start, num_arcs = start or get_none(centre), centre.on.shape[1]
    aligned = start
    if aligned_to is not None:
        warp = _align(aligned_to, obs) / get_warp_deviations(deviations)
        aligned = start._replace(warp=warp.clamp(-FARTHEST, FARTHEST))
    length = (centre.on * torch.arange(1, num_arcs + 1)).amax(1)  # [N]
    order, parts = length.argsort(stable=True), []
    for ids in order.split(AT_ONCE):  # those with few strokes together, so that few draw nothing
        num = math.ceil(max(int(length[ids].max()), 1) / ARCS_PER_SIZE) * ARCS_PER_SIZE
        some = [resize(Variation(*(x[ids] for x in e)), num) for e in (start, aligned)]
        fit = _refit(
            resize(centre.select(ids), num), obs[ids], deviations, num_steps, *some, blur, sharp_after, lr, floor, tick
        )
        parts.append(fit._replace(drawing=resize(fit.drawing, num_arcs), variation=resize(fit.variation, num_arcs)))
    drawings, variations, log_likelihood, distance = zip(*parts, strict=True)
    back = order.argsort()
    variation = Variation(*(torch.cat(fields)[back] for fields in zip(*variations, strict=True)))
    return Fit(concatenate(drawings).select(back), variation, torch.cat(log_likelihood)[back], torch.cat(distance)[back])


def resize(strokes, num):
    """Cuts a Drawing or Variation to its first strokes, or adds some that draw nothing"""
    names = [name for name in ("displacement", "theta", "on", "sharpness", "width") if hasattr(strokes, name)]
    change = num - strokes.theta.shape[1]
    resized = {name: F.pad(x, (0, 0) * (x.dim() - 2) + (0, change)) for name in names for x in [getattr(strokes, name)]}
    return strokes._replace(**resized)


def _refit(centre, obs, deviations, num_steps, start, aligned, blur, sharp_after, lr, floor, tick):
    variation = Variation(*(x.clone().requires_grad_() for x in aligned))
    optimizer, (first, last) = torch.optim.Adam(variation, lr=lr), blur
    with torch.enable_grad():
        for step in range(num_steps):
            sharp = first + (last - first) * min(step / max(sharp_after * num_steps, 1), 1.0)
            blurred = centre._replace(sharpness=centre.sharpness * sharp)
            loss = -score(blurred, variation, obs, deviations, floor).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = lr * (1 - (step + 1) / num_steps) + 0.01
            tick()
    with torch.no_grad():
        scores = torch.stack([score(centre, e, obs, deviations, floor) for e in (variation, start)])
        better = scores[0] >= scores[1]  # [N]
        variation = Variation(
            *(torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(variation, start, strict=True))
        )
        drawing = vary(centre, variation, deviations)
        return Fit(drawing, variation, get_log_likelihood(drawing, obs, floor), variation.get_distance())


def _align(source, target):
    """The map, less the identity, from the place and extent of the target's ink to those of the source's, along both axes:
    images [N, R, C] -> [N, 2, 3]"""
    means, deviations = zip(_get_moments(source), _get_moments(target), strict=True)
    factor = (deviations[0] / deviations[1]).clamp(0.5, 2)  # [N, 2]
    return torch.cat([torch.diag_embed(factor - 1), (means[0] - factor * means[1]).unsqueeze(2)], 2)


def _get_moments(obs):
    """Mean and standard deviation of the ink's (x, y), in affine_grid's coordinates: [N, R, C] -> [N, 2], [N, 2]"""
    x, y = torch.linspace(-1, 1, obs.shape[2]), torch.linspace(-1, 1, obs.shape[1])
    weight = obs / obs.sum((1, 2), keepdim=True).clamp(min=1)
    by_axis = [(weight.sum(1), x), (weight.sum(2), y)]
    mean = torch.stack([(w * at).sum(1) for w, at in by_axis], 1)
    square = torch.stack([(w * (at - m.unsqueeze(1)) ** 2).sum(1) for (w, at), m in zip(by_axis, mean.t(), strict=True)], 1)
    return mean, square.clamp(min=0.01).sqrt()  # a straight stroke has no extent along one axis
