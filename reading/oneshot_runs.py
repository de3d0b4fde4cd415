"""Runs of Omniglot's one-shot classification task: some characters of an alphabet, each drawn once by one person, and images
of the same characters by another person, whose characters are to be told.

The format is that of Omniglot's all_runs.zip, a zip or a folder with runNN/training/classNN.png, runNN/test/itemNN.png, and
runNN/class_labels.txt, whose lines name a test image and the training image of the same character.

    python -m reading.oneshot_runs images_background.zip background_runs.zip --num-runs 20

makes runs of the same kind from the official release's images, to choose settings on.
"""

import collections
import pathlib
import random
import re
import zipfile
from typing import NamedTuple

import numpy as np
import torch

import data
import util
from images import decode, fit
from util import UserError

NUM_CHARACTERS = 20
LABELS = "class_labels.txt"


class Run(NamedTuple):
    """A run of N characters and M images to classify"""

    name: str
    characters: torch.Tensor  # [N, 28, 28], the share of ink in each pixel
    tests: torch.Tensor  # [M, 28, 28], likewise
    answers: torch.Tensor  # [M], the character of each test image, from 0
    inks: list  # of the N characters and M tests as they are in the files: arrays [H, W] of bool


def load(path):
    """Loads all runs, in order of their names: a list of Run. Raises: UserError if a run is incomplete or damaged"""
    read, names = _open(path)
    names = {name for name in names if not data.is_hidden(name)}
    folders = sorted(pathlib.PurePosixPath(name).parent for name in names if pathlib.PurePosixPath(name).name == LABELS)
    if not folders:
        raise UserError(f"{path} holds no runs: give Omniglot's all_runs.zip, or the folder that it unpacks to")
    (name, number), *_ = collections.Counter(folder.name for folder in folders).most_common()
    if number > 1:
        raise UserError(f"{path} holds {number} runs called {name}; give the folder of one of them")
    return [_load_run(path, folder, read, names) for folder in folders]


def _load_run(path, folder, read, names):
    lines = [line.split() for line in read(str(folder / LABELS)).decode(errors="replace").splitlines() if line.strip()]
    if not lines or any(len(line) != 2 for line in lines):
        raise UserError(f"{path}: {folder / LABELS} does not name a test and a training image in each line")
    tests, answers = zip(*([str(folder.parent / name) for name in line] for line in lines), strict=True)
    characters = sorted(name for name in names if name.startswith(f"{folder}/training/") and name.endswith(".png"))
    for name in [*tests, *answers]:
        if name not in names:
            raise UserError(f"{path}: {name}, which {folder / LABELS} names, is missing")
    wrong = [name for name in answers if name not in characters]
    if wrong:
        raise UserError(f"{path}: {folder / LABELS}: {wrong[0]} is no training image of this run")
    inks = [1 - decode(name, read(name)) >= 0.5 for name in [*characters, *tests]]
    images = torch.from_numpy(np.stack([fit(ink.astype(np.float64)) for ink in inks])).float()
    for name, ink in zip([*characters, *tests], inks, strict=True):
        if not ink.any():
            raise UserError(f"{path}: {name} is blank")
    answers = torch.tensor([characters.index(name) for name in answers])
    return Run(folder.name, *images.tensor_split([len(characters)]), answers, inks)


def _open(path):
    """Returns: a function that reads a file by its name within the path, and the names"""
    path = util.expand_user(path)
    if path.is_dir():
        names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        return lambda name: util.read_file(path / name), names
    util.check_regular(path)
    if not path.exists():
        raise UserError(f"there is no {path}; get all_runs.zip from https://github.com/brendenlake/omniglot")
    with data.decoding(path):
        archive = zipfile.ZipFile(path)

    def read(name):
        with data.decoding(f"{path}: {name}"):
            return archive.read(name)

    return read, {name for name in archive.namelist() if not name.endswith("/")}


# ------------------------------------------------------------------ making runs


def make(path, out, num_runs, seed):
    """Writes runs of random characters and pairs of people to a zip; alphabets, in random order, take turns"""
    images = collections.defaultdict(lambda: collections.defaultdict(dict))  # alphabet -> character -> person -> bytes
    for name, read in data.list_images(pathlib.Path(path)):
        match = re.fullmatch(r"(?:.*/)?([^/]+)/character(\d+)/\d+_(\d+)\.png", name)
        if match:
            images[match[1]][int(match[2])][int(match[3])] = read
    alphabets = sorted(name for name in images if len(images[name]) >= NUM_CHARACTERS)
    if not alphabets:
        raise UserError(f"{path} has no alphabet with {NUM_CHARACTERS} characters: give Omniglot's images_background.zip")
    moments = random.Random(seed)
    moments.shuffle(alphabets)
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(num_runs):
            alphabet = images[alphabets[number % len(alphabets)]]
            characters = moments.sample(sorted(alphabet), NUM_CHARACTERS)
            people = moments.sample(sorted(set.intersection(*(set(alphabet[c]) for c in characters))), 2)
            order = random.Random(f"{seed} {number}").sample(range(NUM_CHARACTERS), NUM_CHARACTERS)
            name, lines = f"run{number + 1:02}", []
            for i, character in enumerate(characters):
                training, test = f"{name}/training/class{i + 1:02}.png", f"{name}/test/item{order[i] + 1:02}.png"
                archive.writestr(training, alphabet[character][people[0]]())
                archive.writestr(test, alphabet[character][people[1]]())
                lines.append(f"{test} {training}\n")
            archive.writestr(f"{name}/{LABELS}", "".join(sorted(lines)))
    print(f"{num_runs} runs of {len(alphabets)} alphabets: {out}")


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
