"""The autoregressive distribution over programs shared by the prior and the inference networks.

Shapes: B images, P particles, A arcs, K primitives; latents are [..., A, 2], see models.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpu

# ------------------------------------------------------------------ latents as codes


def look_up(table, index):
    """table [K, D], index [...] -> [..., D]"""
    return gpu.Lookup.apply(table, index) if gpu.is_gpu(table.device) else F.embedding(index, table)


def pack(latent, dtype=torch.long):
    """[..., A, 2] -> [..., A], one code per stroke: 2 * id + on/off"""
    return (2 * latent[..., 0] + latent[..., 1]).to(dtype)


def unpack(codes):
    """[..., A] -> [..., A, 2]"""
    codes = codes.long()
    return torch.stack([codes // 2, codes % 2], -1)


# ------------------------------------------------------------------ decoder


class Decoder(nn.Module):
    """Autoregressive distribution over latents: an LSTM over strokes.

    Used for the prior (context: the alphabet, if any) and the inference networks
    (context: alphabet and image). Each step's input is the one-hot id and on/off of
    the previous stroke (zeros in the first step), followed by the context.
    """

    def __init__(self, num_primitives, num_arcs, lstm_hidden_size, context_size, uniform_mixture):
        super().__init__()
        self.num_primitives, self.num_arcs = num_primitives, num_arcs
        self.context_size, self.uniform_mixture = context_size, uniform_mixture
        self.lstm = nn.LSTMCell(num_primitives + 2 + context_size, lstm_hidden_size)
        self.linear = nn.Linear(lstm_hidden_size, num_primitives + 2)

    def sample(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2]"""
        return self.sample_and_log_prob(num_particles, context)[0]

    @torch.no_grad()
    def sample_and_log_prob(self, num_particles, context):
        """context [B, H] -> latent [P, B, A, 2], log_prob [P, B], without gradients"""
        table, context_input = self._get_inputs(context)
        shape = (num_particles, len(context))
        if gpu.uses_kernels(context) and gpu.can_decode(self):
            codes, log_prob = gpu.sample(
                table, context_input, *self._get_weights(), num_particles, self.num_arcs, self.uniform_mixture
            )  # [P * B, A], [P * B]
            return unpack(codes).unflatten(0, shape), log_prob.view(shape)
        context_input = context_input.repeat(num_particles, 1)  # [P * B, 4 * hidden]
        x, state, latent, log_prob = context_input, None, [], 0
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            id_log_prob, on_log_prob = self._get_log_probs(state[0])  # [P * B, K], [P * B, 2]
            primitive_id = sample_categorical(id_log_prob)  # [P * B, 1]
            log_prob = log_prob + id_log_prob.gather(1, primitive_id)
            if arc_id == 0:
                on = torch.zeros_like(primitive_id)
            else:
                on = sample_categorical(on_log_prob)
                log_prob = log_prob + on_log_prob.gather(1, on)
            latent.append(torch.cat([primitive_id, on], 1))
            x = context_input + F.embedding(2 * primitive_id + on, table).squeeze(1)
        return torch.stack(latent, 1).unflatten(0, shape), log_prob.view(shape)

    @torch.no_grad()
    def resample(self, latent, context, chosen, temperature):
        """Resamples the primitives of chosen strokes, each given the strokes before it, at a temperature.

        Args: latent [N, A, 2]; context [N, H]; chosen [N, A], bool
        Returns: [N, A, 2]
        """
        table, context_input = self._get_inputs(context)
        x, state, latent = context_input, None, latent.clone()
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            log_prob = (self._get_log_probs(state[0])[0] / temperature).log_softmax(1)
            new = sample_categorical(log_prob).squeeze(1)
            latent[:, arc_id, 0] = torch.where(chosen[:, arc_id], new, latent[:, arc_id, 0])
            x = context_input + look_up(table, pack(latent[:, arc_id]))
        return latent

    def log_prob(self, latent, context):
        """latent [P, B, A, 2], context [B, H] -> [P, B]"""
        table, context_input = self._get_inputs(context)
        codes = pack(latent.flatten(0, 1))  # [P * B, A]
        if gpu.uses_kernels(context) and gpu.can_decode(self):
            log_prob = gpu.ScoreCodes.apply(
                table, context_input, *self._get_weights(), codes.short(), self.uniform_mixture, torch.is_grad_enabled()
            )  # [P * B]
            return log_prob.view(latent.shape[:2])
        context_input = context_input.repeat(len(latent), 1)  # [P * B, 4 * hidden]
        x, state, hidden = context_input, None, []
        for arc_id in range(self.num_arcs):
            state = self._step(x, state)
            hidden.append(state[0])
            x = context_input + look_up(table, codes[:, arc_id])
        id_log_prob, on_log_prob = self._get_log_probs(torch.stack(hidden, 1))  # [P * B, A, K or 2]
        id_log_prob = id_log_prob.gather(2, codes.unsqueeze(2) // 2).sum((1, 2))
        on_log_prob = on_log_prob[:, 1:].gather(2, codes[:, 1:].unsqueeze(2) % 2).sum((1, 2))
        return (id_log_prob + on_log_prob).view(latent.shape[:2])

    def _get_inputs(self, context):
        """The LSTM's inputs are one-hot, so a stroke's contribution to the gates is a row of a
        table with a row per id and on/off; the context's contribution is the same for all
        steps and particles: [2 * K, 4 * hidden] and [B, 4 * hidden]."""
        weight = self.lstm.weight_ih.split([self.num_primitives, 2, self.context_size], 1)
        table = weight[0].t().unsqueeze(1) + weight[1].t()  # [K, 2, 4 * hidden]
        return table.flatten(0, 1), F.linear(context, weight[2], self.lstm.bias_ih + self.lstm.bias_hh)

    def _get_weights(self):
        return self.lstm.weight_hh, self.linear.weight, self.linear.bias

    def _step(self, x, state):
        """One step of the LSTM, given its gates' input x [N, 4 * hidden]: hidden and cell state, each [N, hidden]"""
        if state is None:
            i, _, g, o = x.chunk(4, 1)
            cell = i.sigmoid() * g.tanh()
        else:
            i, f, g, o = torch.addmm(x, state[0], self.lstm.weight_hh.t()).chunk(4, 1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    def _get_log_probs(self, hidden):
        """[..., hidden] -> ids [..., K] and on/off [..., 2]"""
        logits = self.linear(hidden).split([self.num_primitives, 2], -1)
        return [_mix_with_uniform(x.log_softmax(-1), self.uniform_mixture) for x in logits]


def _mix_with_uniform(log_probs, weight):
    if weight == 0:
        return log_probs
    log_uniform = torch.full_like(log_probs, math.log(weight / log_probs.shape[-1]))
    return log_uniform if weight == 1 else torch.logaddexp(log_probs + math.log1p(-weight), log_uniform)


def sample_categorical(log_probs):
    """Draws one sample per row by inverting the distribution function: one random number per
    sample, and on a GPU no synchronisation. log_probs [N, K] -> [N, 1]"""
    cumulative = log_probs.exp().cumsum(1)
    threshold = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(1, keepdim=True).clamp(max=log_probs.shape[1] - 1)
