"""Infers programs of images that a model was not trained on, and generates new examples of them."""

import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch

import images
import rendering
import scoring
from fast import gpu
from reading import search
from util import UserError, read_file, show_progress, warn

BATCH_SIZE = 50  # images searched together
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
    is_stopped=lambda: False, compile=True,
):  # fmt: skip
    """Finds the best programs of images [N, R, C]: the network's proposals, improved by search. A conditional model
    that is given no alphabet [N, L] tries them all and keeps that of the best proposal.

    Args: is_stopped: asked before each round whether to end the search early, with the best programs so far; compile:
        whether a long search may compile the hot path first
    Returns: Programs
    """
    num_scored = len(obs) * (num_particles + num_rounds * num_mutants)
    if compile and num_scored >= COMPILING_PAYS and not gpu.is_gpu(obs.device):  # a GPU's kernels are on, or off for a reason
        rendering.set_compile(True)
    networks, parts = (generative_model, inference_network), []
    num_batches = math.ceil(len(obs) / BATCH_SIZE)
    with show_progress(total=num_batches * max(num_rounds, 1), desc="searching", unit="round") as bar:
        for ids in torch.arange(len(obs)).split(BATCH_SIZE):
            given = None if alphabet is None else alphabet[ids]
            if given is None and generative_model.num_alphabets:
                given = guess_alphabets(*networks, obs[ids], num_particles)
            latent, _ = infer(*networks, obs[ids], given, num_particles)

            def count(rounds):
                for round_id in rounds:
                    if is_stopped():
                        return
                    yield round_id
                    bar.update()

            best = search.improve(
                generative_model, latent, obs[ids], given, num_best, num_rounds, num_mutants, show_progress=count
            )
            parts.append((*best, None if given is None else given.argmax(1)))
    latent, log_joint, alphabet_id = zip(*parts, strict=True)
    return Programs(torch.cat(latent, 1), torch.cat(log_joint, 1), None if alphabet_id[0] is None else torch.cat(alphabet_id))


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
