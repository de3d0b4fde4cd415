"""Characters of the user's own: found in image files, and traced with strokes of a model's library, refitted to the ink.

found = characters.find(["page.jpg"])
reading = characters.read(model, found)
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np
import torch

import images
from reading import matching, tracing, variation
from util import UserError, warn

LONGEST_NAME = 50  # letters of an image's name to use in the names of files written for it
FINE = 4 * images.SIDE  # pixels, the side of the ink that is traced
# Only the arcs and the pen vary: traces already lie on the ink, and need no map
DEVIATIONS = variation.OWN._replace(scale=0.0, shear=0.0, shift=0.0)


@dataclasses.dataclass
class Characters:
    """N characters found in image files"""

    inks: list  # N arrays of bool, of any size, to be traced
    files: list  # N names, of the file that each is from

    def __len__(self):
        return len(self.inks)

    @functools.cached_property
    def obs(self):
        """The same, scaled down: [N, 28, 28] in [0, 1]"""
        obs = np.array([images.shrink(ink.astype(np.float32)) for ink in self.inks])
        return torch.from_numpy(obs.reshape(-1, images.SIDE, images.SIDE)).float()  # N may be 0

    @functools.cached_property
    def names(self):
        """Names for each character's files: the stems of `files`, numbered where one holds several characters, and distinct, so
        that none overwrites another, nor another's program"""
        names = []
        for i, file in enumerate(self.files):
            number = f"-{self.files[:i].count(file) + 1}" if self.files.count(file) > 1 else ""
            name = (pathlib.Path(file).stem.strip(".")[:LONGEST_NAME] or "image") + number
            written = {stem.casefold() for other in names for stem in (other, f"{other}-program")}  # some disks ignore case
            while {name.casefold(), f"{name}-program".casefold()} & written:
                name += "-again"
            names.append(name)
        return names


class Reading(NamedTuple):
    """The strokes of N characters, in order. Characters with fewer than A end with strokes of no length that leave no ink"""

    latent: torch.Tensor  # [N, A, 2], each stroke's nearest primitive in the library, and whether the pen is down
    drawing: variation.Drawing
    log_likelihood: torch.Tensor  # [N], log p(x | strokes) in nats, with each pixel's probability clamped to [0.01, 0.99]
    deviation: torch.Tensor  # [N, A], how much each stroke deviates from its primitive, in nats
    num_strokes: torch.Tensor  # [N], the pen down or up


# ------------------------------------------------------------------ finding


def find(paths, as_is=False):
    """Finds characters in image files (images.find_characters), or takes each file as one. Warns about files that cannot be
    read. Raises: UserError if nothing is left"""
    inks, files = [], []
    for path in map(str, paths):
        try:
            found = take(path, pathlib.Path(path).read_bytes(), as_is)
            inks += found.inks
            files += found.files
        except OSError as error:
            warn(f"cannot read {path} ({error.strerror}); skipped")
        except UserError as error:
            warn(f"{error}; skipped")
    if not files:
        raise UserError("there is no character to read; give images of characters" + ", or --as-is" * (not as_is))
    return Characters(inks, files)


def take(name, content, as_is=False):
    """The characters in the bytes of one file. Raises: UserError if it is not an image"""
    if not as_is:
        inks = images.find_characters(name, content, FINE)
    else:
        inks = [images.get_ink(images.decode(name, content)) >= 0.5]
        if not inks[0].any():
            raise UserError(f"{name} is blank, or its light is too uneven for --as-is")
    return from_inks(inks, name)


def from_inks(inks, name):
    """Characters from arrays [H, W] of bool, one each, in Omniglot's size and stroke width; blank ones are left out"""
    inks = [ink for ink in inks if ink.any()]
    return Characters(inks, [name] * len(inks))


# ------------------------------------------------------------------ reading


def read(generative_model, characters, tick=lambda: None):
    """Traces Characters with the model's strokes, and refits these to the ink. Returns: Reading. `tick` is called after each of
    matching.TRACING.num_steps steps of each variation.AT_ONCE characters"""
    how = dict(num_traces=1, deviations=DEVIATIONS, corners=True)
    strokes = matching.find_strokes(generative_model, characters.inks, characters.obs, **how, tick=tick)
    drawing = strokes.drawing.select(0)  # the only trace
    used = drawing.on | drawing.displacement.any(2)  # [N, A]
    arcs = torch.cat([drawing.displacement, drawing.theta.unsqueeze(2)], 2).flatten(0, 1)  # [N * A, 3]
    library = generative_model.get_primitives()[:, :3].detach()
    primitive, deviation = tracing.find_nearest(arcs.double().numpy(), library.double().numpy())
    primitive, deviation = (torch.from_numpy(x).view(used.shape) for x in (primitive, deviation))
    latent = torch.stack([primitive, drawing.on.long()], 2)
    log_likelihood = variation.get_log_likelihood(drawing, characters.obs)
    return Reading(latent, drawing, log_likelihood, (deviation * used).float(), used.sum(1))
