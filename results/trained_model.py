"""A trained model with its data and its memory, for drawing pictures."""

import functools
import pathlib

import torch

import models
import scoring
import util
from runs import checkpoints
from util import UserError

NUM_PROPOSALS = 10  # programs that the inference network proposes for an image; the best is drawn
BATCH_SIZE = 50  # images whose programs are inferred together
NUM_COUNTED = 2000  # samples from the prior, to estimate how often it uses each primitive


class TrainedModel:
    """A model to draw, with its data and its memory, if any.

    Args: checkpoint: of checkpoints.load; dataset: None if unavailable; other_data: the name of the data set if the model
        was not trained on it, else ""
    """

    def __init__(self, name, checkpoint, dataset=None, other_data=""):
        self.name, self.folder, self.path = name, util.SAVE / name, pathlib.Path(checkpoint["path"])
        self.dataset, self.other_data = dataset, other_data
        self.memory = None if other_data else checkpoint["memory"]
        self.iteration, self.num_alphabets = checkpoint["iteration"], checkpoint["num_alphabets"]
        self.generative_model, self.inference_network = models.from_checkpoint(checkpoint)

    @functools.cached_property
    def is_latest(self):
        """Whether this is the newest checkpoint of the run"""
        try:
            newest = checkpoints.load_newest(self.name)
        except UserError:
            return True
        return newest is None or self.iteration >= newest["iteration"]

    def get_title(self):
        data_name = f", reading {self.other_data}, which it was not trained on" if self.other_data else ""
        return f"{self.name}, iteration {self.iteration}{data_name}"

    def get_stem(self, kind):
        """The stem of a file in the run's folder"""
        return f"{kind}/{self.iteration}" + (f"-{self.other_data}" if self.other_data else "")

    def get_images(self, obs_id):
        """Training images by index: obs [N, R, C]; their alphabets [N, L], or None for an unconditional model"""
        split = self.dataset.train
        return split.obs[obs_id], split.alphabet[obs_id] if self.num_alphabets else None

    def reconstruct(self, obs_id):
        """Programs of training images, the best in the memory or else inferred: [N, A, 2]"""
        if self.memory is not None:
            return models.unpack(self.memory[obs_id, 0])
        obs, alphabet = self.get_images(obs_id)
        best = []
        for ids in torch.arange(len(obs)).split(BATCH_SIZE):
            given = None if alphabet is None else alphabet[ids]
            latent = self.inference_network.sample(obs[ids], NUM_PROPOSALS, given)  # [P, B, A, 2]
            log_joint = scoring.score(self.generative_model, latent, obs[ids], given)
            best.append(latent[log_joint.argmax(0), torch.arange(len(ids))])
        return torch.cat(best)

    def get_alphabet_name(self, obs_id):
        """The name of a training image's alphabet; "" if there are no alphabets"""
        alphabet = self.dataset.train.alphabet
        return "" if alphabet is None else self.dataset.alphabet_names[alphabet[obs_id].argmax()]

    def get_usage(self):
        """Each primitive's share of the strokes in the memory or, if there is none, in samples from the prior: [K]"""
        if self.memory is not None:
            latent = models.unpack(self.memory.flatten(0, 1))
        else:
            with torch.random.fork_rng():
                latent = self.generative_model.sample_latent(NUM_COUNTED)
        visible = latent[..., 0][latent[..., 1] > 0]
        counts = visible.bincount(minlength=len(self.generative_model.pre_theta))
        return counts / counts.sum().clamp(min=1)
