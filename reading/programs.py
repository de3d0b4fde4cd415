"""Infers programs of images that a model was not trained on, and generates new examples of them."""

import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import images
import rendering
import scoring
from fast import gpu
from reading import search
from util import UserError, read_file, show_progress, warn

BATCH_SIZE = 50  # images read together
COMPILING_PAYS = 20_000  # latents scored at a time
LONGEST_NAME = 50  # letters of an image's name that go into those of the files written for it


class Characters(NamedTuple):
    """N characters found in image files"""

    obs: torch.Tensor  # [N, 28, 28]
    names: list  # names of the files written for each
    files: list  # names of the files they are from


class Programs(NamedTuple):
    """The best programs of N images, best first"""

    latent: torch.Tensor  # [K, N, A, 2]
    log_joint: torch.Tensor  # [K, N], log p(z, x) in nats, -inf where there are fewer
    alphabet_id: torch.Tensor | None  # [N], of a conditional model


def read_characters(paths, as_is=False):
    """Reads characters from image files, prepared (images.find_characters) or as they are. Warns about files that
    cannot be read. Raises: UserError if nothing is left"""
    found, files = [], []
    for path in paths:
        try:
            content = read_file(path)
            some = [images.read_image(path, content) >= 0.5] if as_is else images.find_characters(path, content)
        except OSError as error:
            warn(f"cannot read {path} ({error.strerror}), skipped")
            continue
        except UserError as error:
            warn(f"{error}, skipped")
            continue
        found += some
        files += [str(path)] * len(some)
    if not found:
        raise UserError("--images: there is no character to read; give images of characters, or --as-is")
    stems, names = [pathlib.Path(file).stem[:LONGEST_NAME] for file in files], []
    for i, (stem, file) in enumerate(zip(stems, files, strict=True)):
        number = files[:i].count(file) + 1
        names.append(f"{stem}-{number}" if files.count(file) > 1 else stem)
    return Characters(torch.as_tensor(np.stack(found)).float(), names, files)


@torch.no_grad()
def infer(generative_model, inference_network, obs, alphabet, num_particles):
    """Samples programs from the inference network, and scores them.

    Args: obs [B, R, C]; alphabet [B, L] one-hot or None
    Returns: latent [P, B, A, 2]; log_joint [P, B], log p(z, x) in nats
    """
    latent = inference_network.sample(obs, num_particles, alphabet)
    return latent, scoring.score(generative_model, latent, obs, alphabet)


def find_programs(
    generative_model, inference_network, obs, num_particles=1000, num_best=200, num_rounds=400, num_mutants=200, alphabet=None,
    width=0, is_stopped=lambda: False, compile=True,
):  # fmt: skip
    """Finds the best programs of images [N, R, C]: the network's proposals, improved by search. A conditional model
    that is given no alphabet [N, L] tries them all and keeps that of the best proposal.

    Args: num_rounds: of an evolutionary search's mutation; width: of beams, with which a search begins (0: without);
        is_stopped: asked now and then whether to end the search early, with the best programs so far; compile: whether a
        long search may compile the hot path first
    Returns: Programs
    """
    num_scored = len(obs) * (num_particles + num_rounds * num_mutants)
    if compile and num_scored >= COMPILING_PAYS and not gpu.is_gpu(obs.device):  # a GPU's kernels are on, or off for a reason
        rendering.set_compile(True)
    if alphabet is None and generative_model.num_alphabets:
        alphabet = guess_alphabets(generative_model, inference_network, obs, num_particles)
    effort, found = search.Effort(width, population=num_best, num_mutants=num_mutants, num_hot_rounds=num_rounds), []
    for i in show_progress(range(len(obs)), desc="searching", unit="image"):
        given = None if alphabet is None else alphabet[i : i + 1]
        latent, _ = infer(generative_model, inference_network, obs[i : i + 1], given, num_particles)  # [P, 1, A, 2]
        given = None if given is None else given[0]
        found.append(search.find(generative_model, obs[i], given, latent.squeeze(1), num_best, effort, is_stopped))
    most = max(len(log_joint) for _, log_joint in found)
    log_joint = torch.stack([F.pad(x, (0, most - len(x)), value=-math.inf) for _, x in found], 1)  # [K, N]
    latent = torch.stack([x[torch.arange(most).clamp(max=len(x) - 1)] for x, _ in found], 1)  # [K, N, A, 2]
    return Programs(latent, log_joint, None if alphabet is None else alphabet.argmax(1))


def find_different_programs(
    generative_model, inference_network, obs, num_searches, num_particles=300, num_best=20, num_rounds=150, num_mutants=50,
    alphabet=None, compile=True,
):  # fmt: skip
    """Finds different programs of each image [N, R, C]: the best of each of several small searches. Arguments as for
    `find_programs`.

    Returns: latent [S, N, A, 2]
    """
    copies = obs.repeat_interleave(num_searches, 0)  # [N * S, R, C]
    alphabet = None if alphabet is None else alphabet.repeat_interleave(num_searches, 0)
    effort = num_particles, num_best, num_rounds, num_mutants
    best = find_programs(generative_model, inference_network, copies, *effort, alphabet, compile=compile).latent[0]
    return best.unflatten(0, (len(obs), num_searches)).transpose(0, 1)


def guess_alphabets(generative_model, inference_network, obs, num_particles):
    """The alphabet under which each image's best proposal is most probable, one-hot [B, L]"""
    one_hot = torch.eye(generative_model.num_alphabets)
    num_particles = math.ceil(num_particles / len(one_hot))
    scores = [
        infer(generative_model, inference_network, obs, alphabet.expand(len(obs), -1), num_particles)[1].amax(0)
        for alphabet in one_hot
    ]
    return one_hot[torch.stack(scores).argmax(0)]
