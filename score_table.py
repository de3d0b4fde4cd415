"""A cache of scores under a generative model that stays fixed.

Latents are discrete: as an inference network gets sharper it samples the same ones again
and again, and log p(z, x) needs to be computed only once for each. In the end the table also
gives a lower bound without variance: log p(x) >= log sum p(z, x) over the distinct latents seen.
"""

from typing import NamedTuple

import torch

import losses
from util import UserError

CAPACITY = 10_000  # latents kept per image
MAX_RECENT = 100_000  # rows that are sorted again in each step


class Rows(NamedTuple):
    """Distinct latents with their scores, sorted by key"""

    key: torch.Tensor  # [N], 64-bit hash of image and latent
    obs_id: torch.Tensor  # [N], of the image
    codes: torch.Tensor  # [N, A], packed latents
    log_joint: torch.Tensor  # [N], log p(z, x)


def get_rows(obs_id, codes, log_joint):
    """Makes Rows of rows in any order, possibly repeated"""
    return merge([Rows(losses.get_hash(codes, obs_id), obs_id, codes, log_joint)])


def merge(some_rows):
    """Merges a list of Rows; each latent of an image stays once"""
    rows = Rows(*(torch.cat(columns) for columns in zip(*some_rows, strict=True)))
    key, order = rows.key.sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return Rows(*(column[order[first]] for column in rows))


def keep_best(rows, capacity=CAPACITY):
    """Keeps, for each image, the `capacity` latents with the highest scores"""
    order = rows.log_joint.argsort(descending=True, stable=True)
    obs_id, by_image = rows.obs_id[order].sort(stable=True)
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(obs_id, obs_id)
    kept = order[by_image[rank < capacity]].sort().values
    return Rows(*(column[kept] for column in rows))


def get_enumeration_bound(rows, num_images):
    """log sum_z p(z, x) over each image's latents, in nats: [num_images], -inf for an image without latents"""
    log_joint = rows.log_joint.double()
    highest = log_joint.new_full((num_images,), -torch.inf).scatter_reduce(0, rows.obs_id, log_joint, "amax")
    shifted = (log_joint - highest[rows.obs_id]).exp()
    return highest + torch.zeros_like(highest).index_add(0, rows.obs_id, shifted).log()


def check_rows(state, num_arcs, num_images):
    """Raises: UserError unless it is as ScoreTable.state_dict returns it"""
    right = isinstance(state, dict) and state.keys() == {"settled", "recent", "num_scored"}
    right = right and isinstance(state["num_scored"], int) and state["num_scored"] >= 0
    for columns in [state["settled"], state["recent"]] if right else []:
        right = right and isinstance(columns, list) and len(columns) == 4
        right = right and all(isinstance(column, torch.Tensor) for column in columns)
        if right:
            key, obs_id, codes, log_joint = columns
            num = len(log_joint) if log_joint.dim() == 1 else -1
            right = key.shape == obs_id.shape == (num,) and codes.shape == (num, num_arcs)
            right = right and (key.dtype, obs_id.dtype, codes.dtype) == (torch.long, torch.long, torch.int16)
            right = right and bool(((obs_id >= 0) & (obs_id < num_images)).all() and log_joint.isfinite().all())
            right = right and bool((key[1:] > key[:-1]).all())
    if not right:
        raise UserError("its table of scores is not whole")


class ScoreTable:
    """The best CAPACITY latents of each image and their scores, under one generative model."""

    def __init__(self, num_arcs, device="cpu"):
        empty = torch.empty(0, dtype=torch.long, device=device)
        codes = torch.empty(0, num_arcs, dtype=torch.int16, device=device)
        self.settled = self.recent = Rows(empty, empty, codes, torch.empty(0, device=device))
        self.num_scored = 0

    def score(self, image_id, generative_model, latent, obs, alphabet=None):
        """As `losses.score`; known scores are looked up, new ones computed and remembered.

        Args: image_id [B]: the images' indices in the table; the others as for `losses.score`
        """
        num_particles, batch_size = latent.shape[:2]
        obs_id = torch.arange(batch_size, device=obs.device).repeat(num_particles)  # [P * B]
        codes = losses.pack(latent.flatten(0, 1), torch.int16)  # [P * B, A]
        rows = Rows(losses.get_hash(codes, image_id[obs_id]), image_id[obs_id], codes, obs.new_empty(len(codes)))
        known = self._find(rows, self.settled) | self._find(rows, self.recent)
        unknown = (~known).nonzero().squeeze(1)  # [N]
        if len(unknown):
            rows.log_joint[unknown] = losses.score_rows(
                generative_model, codes[unknown], obs, alphabet, obs_id[unknown]
            )
            self._add(Rows(*(column[unknown] for column in rows)))
        return rows.log_joint.view(num_particles, batch_size)

    @staticmethod
    def _find(rows, among):
        """Fills in the scores of the rows found among others. Returns: which were found, [N]"""
        if not len(among.key):
            return torch.zeros_like(rows.key, dtype=torch.bool)
        at = torch.searchsorted(among.key, rows.key).clamp(max=len(among.key) - 1)
        found = (among.obs_id[at] == rows.obs_id) & (among.codes[at] == rows.codes).all(1)
        rows.log_joint.copy_(torch.where(found, among.log_joint[at], rows.log_joint))
        return found

    def _add(self, rows):
        num_recent = len(self.recent.key)
        self.recent = merge([self.recent, rows])
        self.num_scored += len(self.recent.key) - num_recent
        if len(self.recent.key) > MAX_RECENT:
            self.settle()

    def settle(self):
        """Returns: Rows, the whole table"""
        self.settled = keep_best(merge([self.settled, self.recent]))
        self.recent = Rows(*(column[:0] for column in self.recent))
        return self.settled

    def state_dict(self):
        return {"settled": list(self.settled), "recent": list(self.recent), "num_scored": self.num_scored}

    def load_state_dict(self, state):
        self.settled, self.recent = Rows(*state["settled"]), Rows(*state["recent"])
        self.num_scored = state["num_scored"]
