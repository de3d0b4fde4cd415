"""Runs of Omniglot's one-shot classification task: some characters of an alphabet, each drawn once by one person, and drawings
of the same characters by another person to identify.

The format is that of Omniglot's all_runs.zip: a zip or folder with runNN/training/classNN.png, runNN/test/itemNN.png and
runNN/class_labels.txt, each of whose lines names a test image and the training image of the same character. Your own images may
have other names and formats, and show scanned or photographed paper.

    python -m reading.oneshot_runs images_background.zip background_runs.zip --num-runs 20

makes runs of the same kind from the official release's images, to choose settings on, or to test on.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import collections
import random
import re
import zipfile
from typing import NamedTuple

import numpy as np
import torch

import data
import util
from images import decode, get_ink, get_suffixes, shrink
from util import UserError, warn

NUM_CHARACTERS = 20
LABELS = "class_labels.txt"


class Run(NamedTuple):
    """A run of N characters and M images to classify"""

    name: str
    characters: torch.Tensor  # [N, 28, 28], the share of ink in each pixel
    tests: torch.Tensor  # [M, 28, 28], the same
    answers: torch.Tensor  # [M], the character of each test image, from 0
    inks: list  # of the N characters and M tests at full size: arrays [H, W] of bool


def load(path):
    """Loads all runs, in order of name: a list of Run. Raises: UserError if a run is incomplete or damaged"""
    source = util.expand_user(path)
    if not source.exists():
        raise UserError(f"there is no {path}; get all_runs.zip from https://github.com/brendenlake/omniglot")
    files = {file.path: file for file in data.list_files(source)}
    labels = sorted(name for name in files if name.name.lower() == LABELS)
    if not labels:
        raise UserError(f"{path} holds no runs: give Omniglot's all_runs.zip, or the folder that it unpacks to")
    runs = [_load_run(path, name, files) for name in labels]
    (name, number), *_ = collections.Counter(run.name for run in runs).most_common()
    if number > 1:
        raise UserError(f"{path} holds {number} runs called {name}; give the folder of one of them")
    return runs


def summarise(runs):
    """Summarises a list of Run in one line"""
    obs = torch.cat([torch.cat([run.characters, run.tests]) for run in runs])
    return data.summarise(obs.numpy() >= 0.5, util.count(len(runs), "run"))


def _load_run(path, labels, files):
    folder = labels.parent
    pictures = [name for name, file in files.items() if folder in name.parents and file.suffix in get_suffixes()]
    pairs = _read_labels(f"{path}: {labels}", files[labels].read(), pictures)
    characters, tests = sorted(filter(_is_training, pictures)), list(pairs)
    others = sorted(map(str, {*pictures} - {*characters, *tests}))
    if others:
        warn(f"{path}: {labels} does not name {', '.join(others[:3])}{', ...' * (len(others) > 3)}; left out")
    inks = []
    for name in [*characters, *tests]:
        inks.append(get_ink(decode(f"{path}: {name}", files[name].read())) >= 0.5)
        if not 0 < inks[-1].mean() <= 0.5:
            raise UserError(
                f"{path}: {name} is {'more than half ink' if inks[-1].any() else 'blank, or its light is too uneven'}"
            )
    images = torch.from_numpy(np.stack([shrink(ink.astype(np.float64)) for ink in inks])).float()
    answers = torch.tensor([characters.index(name) for name in pairs.values()])
    return Run(folder.name or util.expand_user(path).resolve().stem, *images.tensor_split([len(characters)]), answers, inks)


def _is_training(name):
    return name.parent.name.lower() in ("training", "train")


def _read_labels(source, content, pictures):
    """The pairs named by lines, in either order: test image -> training image. Raises: UserError if a line is wrong"""
    pairs = {}
    for line in filter(None, map(str.strip, content.decode("utf-8-sig", errors="replace").splitlines())):
        names = re.split(r"\s*[,\t]\s*" if re.search(r"[,\t]", line) else r"\s+", line)
        pair = [_find(name, pictures) for name in names]
        if None in pair or sorted(map(_is_training, pair)) != [False, True]:
            raise UserError(f"{source}: a line does not name a test and a training image that exist: {line[:80]!r}")
        test, training = sorted(pair, key=_is_training)
        if pairs.setdefault(test, training) != training:
            raise UserError(f"{source}: {test} is named twice, with different answers")
    if not pairs:
        raise UserError(f"{source}: no line names a test and a training image")
    return pairs


def _find(name, pictures):
    """The picture meant by a name relative to any folder, or None if there is not exactly one"""
    parts = re.split(r"[\\/]+", name.lower())
    tails = ["/" + "/".join(parts[i:]) for i in range(len(parts))]
    found = ([picture for picture in pictures if f"/{picture}".lower().endswith(tail)] for tail in tails)
    return next((some[0] for some in found if len(some) == 1), None)


# ------------------------------------------------------------------ making runs


def make(path, out, num_runs, seed):
    """Writes runs of random characters and pairs of people to a zip; alphabets take turns in random order"""
    images = collections.defaultdict(lambda: collections.defaultdict(dict))  # alphabet -> character -> person -> bytes
    for file in data.list_files(util.expand_user(path)):
        match = re.fullmatch(r"(?:.*/)?([^/]+)/character(\d+)/\d+_(\d+)\.png", str(file.path))
        if match:
            images[match[1]][int(match[2])][int(match[3])] = file.read
    alphabets = sorted(
        name
        for name, characters in images.items()
        if len(characters) >= NUM_CHARACTERS and len(set.intersection(*map(set, characters.values()))) >= 2
    )
    if not alphabets:
        wanted = f"{NUM_CHARACTERS} characters, all by the same two people"
        raise UserError(f"{path} has no alphabet with {wanted}: give Omniglot's images_background.zip")
    rng = random.Random(seed)
    rng.shuffle(alphabets)
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(num_runs):
            alphabet = images[alphabets[number % len(alphabets)]]
            characters = rng.sample(sorted(alphabet), NUM_CHARACTERS)
            people = rng.sample(sorted(set.intersection(*(set(alphabet[c]) for c in characters))), 2)
            order = random.Random(f"{seed} {number}").sample(range(NUM_CHARACTERS), NUM_CHARACTERS)
            name, lines = f"run{number + 1:02}", []
            for i, character in enumerate(characters):
                training, test = f"{name}/training/class{i + 1:02}.png", f"{name}/test/item{order[i] + 1:02}.png"
                archive.writestr(training, alphabet[character][people[0]]())
                archive.writestr(test, alphabet[character][people[1]]())
                lines.append(f"{test} {training}\n")
            archive.writestr(f"{name}/{LABELS}", "".join(sorted(lines)))
    print(f"{util.count(num_runs, 'run')} of {util.count(len(alphabets), 'alphabet')}: {out}")


def main(argv=None):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="images_background.zip, or the folder that it unpacks to")
    parser.add_argument("out", help="the zip to write")
    parser.add("--num-runs", "number of runs", type=util.in_range(int, 1, 99), default=20)
    parser.add("--seed", "seed of characters and people", type=util.in_range(int, 0), default=0)
    args = parser.parse_args(argv)
    make(args.images, args.out, args.num_runs, args.seed)


if __name__ == "__main__":
    util.run_script(main)
