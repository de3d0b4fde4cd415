"""The memory of Memoised Wake-Sleep on a GPU, as Triton kernels, which gpu.py launches.

What losses.remember does in some forty small operations takes two kernels here, one before and one after scoring, with a
program per image, or several to read very many strokes.
"""

import triton
import triton.language as tl

from fast.triton_math import log


@triton.jit
def _get_candidates(memory, obs_id, proposal, latent, batch_size, num_arcs, num_remembered, num_proposed, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    row = tl.load(obs_id + image)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number, arc = entry // num_arcs, entry % num_arcs
    remembered = number < num_remembered
    proposed = (number >= num_remembered) & (number < num_remembered + num_proposed)
    code = tl.load(memory + (row * num_remembered + number) * num_arcs + arc, mask=remembered, other=0).to(tl.int64)
    given = (((number - num_remembered) * batch_size + image) * num_arcs + arc) * 2
    arc_id = tl.where(remembered, code // 2, tl.load(proposal + given, mask=proposed, other=0))
    on = tl.where(remembered, code % 2, tl.load(proposal + given + 1, mask=proposed, other=0))
    place = latent + ((number * batch_size + image) * num_arcs + arc) * 2
    tl.store(place, arc_id, mask=remembered | proposed)
    tl.store(place + 1, on, mask=remembered | proposed)


@triton.jit
def _load_codes(latent, number, image, arc, batch_size, num_arcs, exists):
    place = latent + ((number * batch_size + image) * num_arcs + arc) * 2
    return 2 * tl.load(place, mask=exists, other=0) + tl.load(place + 1, mask=exists, other=0)


@triton.jit
def _keep_best(
    latent, log_joint, obs_id, uniform, memory, drawn, log_r, statistics, batch_size, num_arcs, num_remembered,
    num_proposed, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    exists = number < num_remembered + num_proposed
    precedes = number[None, :] < number[:, None]
    same = tl.full((BLOCK, BLOCK), 1, tl.int1)
    for arc in range(num_arcs):
        code = _load_codes(latent, number, image, arc, batch_size, num_arcs, exists)
        same &= code[:, None] == code[None, :]
    repeated = tl.sum((same & precedes).to(tl.int32), 1) > 0
    score = tl.load(log_joint + number * batch_size + image, mask=exists, other=float("-inf"))
    score = tl.where(repeated, float("-inf"), score)

    # each candidate's rank: how many are better. NaN is best, so that it is not lost; ties go by index
    a, b = score[:, None], score[None, :]
    tied = (a == b) | ((a != a) & (b != b))
    rank = tl.sum(((b > a) | ((b != b) & (a == a)) | (tied & precedes)).to(tl.int32), 1)
    kept = rank < num_remembered
    row = tl.load(obs_id + image)
    for arc in range(num_arcs):
        code = _load_codes(latent, number, image, arc, batch_size, num_arcs, exists)
        tl.store(memory + (row * num_remembered + rank) * num_arcs + arc, code, mask=kept & exists)

    high = tl.max(tl.where(kept, score, float("-inf")), 0)
    weight = tl.where(kept, tl.exp(score - high), 0.0)
    total = tl.sum(weight, 0)
    cumulative = tl.sum(tl.where(rank[None, :] <= rank[:, None], weight[None, :], 0.0), 1)
    passed = tl.sum((kept & (cumulative <= tl.load(uniform + image) * total)).to(tl.int32), 0)
    chosen = kept & (rank == tl.minimum(passed, num_remembered - 1))
    tl.store(log_r + image, tl.sum(tl.where(chosen, score, 0.0), 0) - high - log(total))
    number_chosen = tl.sum(tl.where(chosen, number, 0), 0)
    for entry in range(2 * num_arcs):
        value = tl.load(latent + (number_chosen * batch_size + image) * num_arcs * 2 + entry)
        tl.store(drawn + image * num_arcs * 2 + entry, value)

    proposed = exists & (number >= num_remembered)
    num_novel = tl.sum((proposed & (repeated == 0)).to(tl.int32), 0)
    best_novel = tl.max(tl.where(proposed, score, float("-inf")), 0)
    best_remembered = tl.max(tl.where(number < num_remembered, score, float("-inf")), 0)
    tl.store(statistics + image, num_novel.to(tl.float32) / num_proposed)
    tl.store(statistics + batch_size + image, (best_novel > best_remembered).to(tl.float32))
