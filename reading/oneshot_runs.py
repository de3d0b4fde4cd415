"""Runs of Omniglot's one-shot classification task: some characters of an alphabet, each drawn once by one person, and images
of the same characters by another person, whose characters are to be identified.

The format is that of Omniglot's all_runs.zip, a zip or a folder with runNN/training/classNN.png, runNN/test/itemNN.png, and
runNN/class_labels.txt, whose lines name a test image and the training image of the same character. Images of one's own may
have other names and formats, and show scanned or photographed paper.

    python -m reading.oneshot_runs images_background.zip background_runs.zip --num-runs 20

makes runs of the same kind from the official release's images, to choose settings on.
"""

import codecs
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
from images import decode, get_ink, get_suffixes, shrink
from util import UserError, warn

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
    labels = sorted(pathlib.PurePosixPath(name) for name in names if pathlib.PurePosixPath(name).name.lower() == LABELS)
    folders = [file.parent for file in labels]
    if not labels:
        raise UserError(f"{path} holds no runs: give Omniglot's all_runs.zip, or the folder that it unpacks to")
    (name, number), *_ = collections.Counter(folder.name for folder in folders).most_common()
    if number > 1:
        raise UserError(f"{path} holds {number} runs called {name}; give the folder of one of them")
    return [_load_run(path, file, read, names) for file in labels]


def summarise(runs):
    """Sums up a list of Run in one line"""
    obs = torch.cat([torch.cat([run.characters, run.tests]) for run in runs])
    return data.summarise(obs.numpy() >= 0.5, f"{len(runs)} run{'s' * (len(runs) != 1)}")


def _load_run(path, labels, read, names):
    folder = labels.parent
    known = {name.lower(): name for name in names if name.startswith(f"{folder}/") and _is_picture(name)}
    known |= {name.rsplit(".", 1)[0]: known[name] for name in known}  # labels may leave out the suffix
    try:
        pairs = _read_labels(read(str(labels)), str(folder).lower(), known)
    except UserError as error:
        raise UserError(f"{path}: {labels} {error}") from None
    characters = sorted({name for name in known.values() if _is_training(name)})
    tests, answers = list(pairs), list(pairs.values())
    others = sorted(set(known.values()) - {*characters, *tests})
    if others:
        warn(f"{path}: {labels} does not name {', '.join(others[:3])}{', ...' * (len(others) > 3)}; left out")
    inks = [get_ink(decode(name, read(name))) >= 0.5 for name in [*characters, *tests]]
    images = torch.from_numpy(np.stack([shrink(ink.astype(np.float64)) for ink in inks])).float()
    for name, ink in zip([*characters, *tests], inks, strict=True):
        if not ink.any():
            raise UserError(f"{path}: {name} is blank")
        if ink.mean() > 0.5:
            raise UserError(f"{path}: {name} is more than half ink")
    answers = torch.tensor([characters.index(name) for name in answers])
    return Run(folder.name, *images.tensor_split([len(characters)]), answers, inks)


def _is_picture(name):
    return pathlib.PurePosixPath(name).suffix.lower() in get_suffixes()


def _is_training(name):
    return pathlib.PurePosixPath(name).parent.name.lower() in ("training", "train")


def _read_labels(content, folder, known):
    """Reads the lines of class_labels.txt, as Omniglot's or as people write them: with names relative to whatever folder, in
    either order, with spaces, commas or tabs, in any of Windows' encodings, below a heading.

    Args: known: lower-case name -> name of each picture of the run. Returns: test image -> training image
    Raises: UserError
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    lines = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pairs = {}
    for number, line in enumerate(lines):
        split = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"[\s,;]+", line)]
        found = [[_find(name, folder, known) for name in names] for names in split]
        pair = next(filter(all, found), None)
        if pair is None and number == 0 and len(lines) > 1 and "." not in line:
            continue  # a heading
        if pair is None and len(split) == 1:
            missing = split[0][found[0].index(None)]
            raise UserError(f"names {missing}, which is missing")
        if pair is None:
            raise UserError(f"does not name a test and a training image in each line, as in {line[:80]!r}")
        test, answer = sorted(pair, key=_is_training)
        if not _is_training(answer):
            raise UserError(f"names {answer}, which is no training image of this run")
        if _is_training(test):
            raise UserError(f"names two training images, {test} and {answer}, in a line")
        if pairs.setdefault(test, answer) != answer:
            raise UserError(f"names {test} twice, with different answers")
    if not pairs:
        raise UserError("does not name a test and a training image in each line")
    return pairs


def _find(name, folder, known):
    """The picture that a label means, or None"""
    parts = [part for part in re.split(r"[\\/]+", name.strip("\"' ").lower()) if part not in ("", ".")]
    own = folder.rsplit("/", 1)[-1]
    if own in parts[:-1]:  # relative to a folder above
        parts = parts[parts.index(own) + 1 :]
    tail = "/".join(parts)
    places = [f"{folder}/{place}{tail}" for place in ("", "test/", "training/", "train/")]
    return next((known[place] for place in places if place in known), None)


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
    names = data.get_names(archive)

    def read(name):
        with data.decoding(f"{path}: {name}"):
            return archive.read(names[name])

    return read, set(names)


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
