"""p(x|z) given a drawing: the distribution of an image's pixels given the logits of its ink."""

import torch
import torch.nn.functional as F

import rendering


class Bernoulli:
    """Independent pixels"""

    def log_prob(self, logits, obs):
        """logits, obs [N, R, C] -> [N], nats"""
        return -F.binary_cross_entropy_with_logits(logits, obs, reduction="none").flatten(1).sum(1)

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        return _sample_pixels(logits.sigmoid())


class AffineMixture:
    """Independent pixels of the drawing seen through one of T equally probable affine maps

    Args: maps [T, 2, 3]
    """

    def __init__(self, maps):
        self.maps = maps

    def log_prob(self, logits, obs):
        """logits, obs [N, R, C] -> [N], nats"""
        return rendering.affine_log_prob(logits, obs, self.maps)

    def map_log_posterior(self, logits, obs):
        """log p(map | x, z): logits, obs [N, R, C] -> [N, T], nats"""
        return rendering.affine_log_prob_by_map(logits, obs, self.maps).log_softmax(1)

    def sample(self, logits):
        """logits [N, R, C] -> obs [N, R, C]"""
        map_id = torch.randint(len(self.maps), (len(logits),), device=logits.device)
        return _sample_pixels(rendering.apply_maps(logits.sigmoid(), self.maps[map_id]))


def _sample_pixels(probs):
    # A model that has diverged shows in its scores; sampling NaN would be a device-side error.
    return torch.bernoulli(probs.nan_to_num())
