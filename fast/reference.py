"""A straightforward version of what the project does fast: the renderer from textbook formulas (wrong in float32 for nearly
straight arcs), every image under every map, one-hot inputs to the LSTM, and training steps that score everything with
gradients. Tests and `benchmark.py` compare with it."""

import math

import torch
import torch.nn.functional as F


def get_logits(arcs, on_offs, rendering_params, num_rows, num_cols):
    """As rendering.get_logits: arcs [B, A, 7], on_offs [B, A] -> [B, R, C]"""
    x_start, y_start, dx, dy, theta, sharpness, width = (a[..., None, None] for a in arcs.unbind(-1))  # [B, A, 1, 1] each
    x = torch.arange(num_cols).to(arcs) / (num_cols - 1)
    y = 1 - torch.arange(num_rows).to(arcs)[:, None] / (num_rows - 1)  # [R, 1]

    x_centre = x_start + dx / 2 + dy / (2 * theta.tan())
    y_centre = y_start + dy / 2 - dx / (2 * theta.tan())
    radius = torch.hypot(x_start - x_centre, y_start - y_centre)
    # In the sector: less than theta from the arc's middle, as seen from the centre.
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
    with torch.backends.cudnn.flags(enabled=False):  # it samples from at most 65 535 images
        probs = F.grid_sample(probs, grid, align_corners=True)[:, 0].clamp(eps, 1 - eps)
    obs = obs.repeat_interleave(num_maps, 0)
    log_prob = torch.distributions.Bernoulli(probs=probs, validate_args=False).log_prob(obs)
    return log_prob.sum((1, 2)).view(num_images, num_maps).logsumexp(1) - math.log(num_maps)


# ------------------------------------------------------------------ models


def log_likelihood(model, latent, obs):
    """latent [P, B, A, 2], obs [B, R, C] -> [P, B]"""
    num_particles = len(latent)
    latent = latent.flatten(0, 1)
    logits = get_logits(model.get_arcs(latent), latent[..., 1], model.get_rendering_params(), *obs.shape[1:])
    return affine_log_prob(logits, obs.repeat(num_particles, 1, 1), model.likelihood.maps).view(num_particles, -1)


def decode(decoder, context, latent=None, num_particles=1):
    """Samples from a decoder, context [B, H], or scores latent [P, B, A, 2]. Returns: the latents, and log q [P, B]"""
    num_particles = num_particles if latent is None else len(latent)
    context = context.repeat(num_particles, 1)  # [P * B, H]
    stroke = context.new_zeros(len(context), decoder.num_primitives + 2)
    state, chosen, log_q = None, [], 0
    for arc_id in range(decoder.num_arcs):
        state = decoder.lstm(torch.cat([stroke, context], 1), state)
        logits = decoder.linear(state[0]).split([decoder.num_primitives, 2], 1)
        id_dist, on_dist = (torch.distributions.Categorical(logits=x) for x in logits)
        if latent is not None:
            primitive_id, on = latent[..., arc_id, :].flatten(0, 1).unbind(-1)
        else:
            primitive_id, on = id_dist.sample(), on_dist.sample() * (arc_id > 0)
        log_q = log_q + id_dist.log_prob(primitive_id) + (on_dist.log_prob(on) if arc_id > 0 else 0)
        stroke = torch.cat([F.one_hot(primitive_id, decoder.num_primitives), F.one_hot(on, 2)], 1).to(context)
        chosen.append(torch.stack([primitive_id, on], 1))
    return torch.stack(chosen, 1).unflatten(0, (num_particles, -1)), log_q.view(num_particles, -1)


def embed(network, obs):
    """obs [B, 28, 28] -> [B, E]; for a lookup network, obs are the ids"""
    if not hasattr(network, "conv0"):
        return network.get_context(obs)
    x = obs.unsqueeze(1).to(memory_format=torch.channels_last)
    x = F.max_pool2d(network.conv0(x), 3, 2).relu()
    x = F.max_pool2d(network.conv1(x), 3, 2).relu()
    x = network.conv3(network.conv2(x).relu()).relu()
    return F.max_pool2d(x, 2, 2).flatten(1)


def log_joint(model, latent, obs):
    no_context = obs.new_zeros(len(obs), 0)
    return decode(model.prior, no_context, latent)[1] + log_likelihood(model, latent, obs)


# ------------------------------------------------------------------ objectives


def sleep(model, network, num_samples):
    with torch.no_grad():
        latent = decode(model.prior, torch.zeros(num_samples, 0, device=model.pre_theta.device))[0]
        logits = get_logits(model.get_arcs(latent[0]), latent[0, ..., 1], model.get_rendering_params(), 28, 28)
        maps = model.likelihood.maps[torch.randint(len(model.likelihood.maps), (num_samples,), device=logits.device)]
        grid = F.affine_grid(maps, (num_samples, 1, 28, 28), align_corners=True)
        obs = F.grid_sample(logits.sigmoid()[:, None], grid, align_corners=True)[:, 0].bernoulli()
    return -decode(network.decoder, embed(network, obs), latent)[1].mean()


def propose(model, network, obs, num_particles, given):
    """Draws programs of each image, or of what is given instead, from the network: log p(z, x) and log q(z|x), each [P, B]"""
    context = embed(network, obs if given is None else given)
    with torch.no_grad():
        latent = decode(network.decoder, context, num_particles=num_particles)[0]
    log_q = decode(network.decoder, context, latent)[1]
    return log_joint(model, latent, obs), log_q


def rws(model, network, obs, num_particles, given=None):
    log_p, log_q = propose(model, network, obs, num_particles, given)
    log_weight = log_p - log_q.detach()
    theta_loss = -(log_weight.logsumexp(0) - math.log(num_particles)).mean()
    return theta_loss - (log_weight.softmax(0).detach() * log_q).sum(0).mean()


def vimco(model, network, obs, num_particles, given=None):
    log_p, log_q = propose(model, network, obs, num_particles, given)
    log_weight = log_p - log_q
    bound = log_weight.logsumexp(0) - math.log(num_particles)
    advantage = []
    for k in range(num_particles):
        others = torch.cat([log_weight[:k], log_weight[k + 1 :]])
        without = torch.cat([others, others.mean(0, keepdim=True)])
        advantage.append(bound - (without.logsumexp(0) - math.log(num_particles)))
    return -bound.mean() - (torch.stack(advantage).detach() * log_q).sum(0).mean()


def mws(model, network, memory, obs, obs_id, num_particles):
    """memory [N, M, A, 2], changed in place"""
    context, memory_size = embed(network, obs), memory.shape[1]
    with torch.no_grad():
        proposal = decode(network.decoder, context, num_particles=num_particles)[0]
    latent = torch.cat([memory[obs_id].transpose(0, 1), proposal])  # [M + P, B, A, 2]
    log_p = log_joint(model, latent, obs)
    with torch.no_grad():
        same = (latent[:, None] == latent[None]).flatten(3).all(-1)  # [M + P, M + P, B]
        repeated = same.permute(2, 0, 1).tril(-1).any(-1).t()  # equal to one before it: [M + P, B]
        kept = log_p.masked_fill(repeated, -math.inf).topk(memory_size, 0).indices  # [M, B]
        memory[obs_id] = latent.gather(0, kept[..., None, None].expand(-1, -1, *latent.shape[2:])).transpose(0, 1)
        log_r = log_p.gather(0, kept).log_softmax(0)
        drawn = torch.distributions.Categorical(logits=log_r.t()).sample()[None]  # [1, B]
        log_r, drawn = log_r.gather(0, drawn), kept.gather(0, drawn)
    latent = latent.gather(0, drawn[..., None, None].expand(-1, -1, *latent.shape[2:]))
    log_q = decode(network.decoder, context, latent)[1]
    return -(log_p.gather(0, drawn) - log_r).mean() - log_q.mean()
