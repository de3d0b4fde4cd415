"""Images of handwritten characters: where to find them, how to read and split them.

Every source becomes binary 28 x 28 images, upright, ink 1, in three parts. Where they
are known, each character comes with its alphabet and its number within it.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import time
import typing
import urllib.error
import urllib.request
import zipfile

import numpy as np
import scipy.io
import torch

from images import ALPHABETS, draw_glyphs, find_characters, fit, read_image, read_official
from util import UserError, expand_user, make_folder, show_progress, warn

NUM_ROWS = NUM_COLS = 28
SMALL_NUM_PER_ALPHABET = 10

CHARDATA_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
CHARDATA_BLOB_ID = "016a3536ffe5e1d38e42563a18d7a78bfaf643ec"
CHARDATA_SIZES = dict(train=24345, valid=1345, test=8115)  # valid is split off the end of train

# Where sites keep chardata.mat; $OMNIGLOT_PATH takes precedence. To add a site, add a line.
SITES = {
    "local": pathlib.Path(__file__).resolve().parent / "datasets/omniglot/chardata.mat",
    "om": pathlib.Path("/om2/user", os.environ.get("USER", ""), "datasets/omniglot/omniglot.mat"),
}


class Split(typing.NamedTuple):
    """obs [N, 28, 28] in {0, 1}, float32; alphabet [N, L] one-hot, float32, or None;
    character [N], numbers from 1 within an alphabet, or None"""

    obs: torch.Tensor
    alphabet: torch.Tensor | None
    character: torch.Tensor | None

    def select(self, ids):
        """Selects characters by ids [M] or a slice"""
        return Split(*(None if field is None else field[ids] for field in self))

    def to(self, device):
        return Split(*(None if field is None else field.to(device) for field in self))


class Dataset(typing.NamedTuple):
    train: Split
    valid: Split
    test: Split
    num_alphabets: int  # L; 0 if the source has none
    alphabet_names: tuple = ()  # L strings


class SizeError(UserError):
    """Data of another size than asked for"""


def load(location="local", small_dataset=False, dataset_size=None, find_characters=False):
    """Loads a data set: `local`, `om`, `glyphs` or a path (docs/data.md).

    Args:
        small_dataset: 10 training images per alphabet
        dataset_size: number of training images, the same for each alphabet
        find_characters: prepare a folder of one's own images as `images.find_characters` does, which may find several
            characters on each
    Raises: SizeError if the data has no such part; UserError if anything else is wrong with the location or the data
    """
    train, test, alphabet_names = _load_parts(location, find_characters)
    num_alphabets = len(alphabet_names)
    permutation = np.random.RandomState(123).permutation(len(train.obs))
    num_valid = round(len(train.obs) * CHARDATA_SIZES["valid"] / CHARDATA_SIZES["train"])
    train, valid = (train.select(torch.from_numpy(ids)) for ids in np.split(permutation, [len(permutation) - num_valid]))
    if small_dataset and dataset_size is not None:
        raise UserError("--small-dataset and --dataset-size exclude each other; give one")
    if small_dataset:
        train = _take_per_alphabet(train, SMALL_NUM_PER_ALPHABET, num_alphabets, "--small-dataset")
    elif dataset_size is not None:
        if dataset_size % max(num_alphabets, 1):
            raise SizeError(f"--dataset-size {dataset_size} is not a multiple of the {num_alphabets} alphabets")
        num_per_alphabet = dataset_size // max(num_alphabets, 1)
        train = _take_per_alphabet(train, num_per_alphabet, num_alphabets, f"--dataset-size {dataset_size}")
    if len(train.obs) == 0 or len(test.obs) == 0:
        raise UserError(f"{location} holds too few images to split into training and test images")
    return Dataset(train, valid, test, num_alphabets, tuple(alphabet_names))


def load_for_model(checkpoint, location=None, load=load):
    """Loads the data set that a model was trained on, or a corresponding one from another location: of the same size if
    that can be, else all of it.

    Args: checkpoint: of main.py; location: None for that of the training; load: `load`, or a cached version of it
    Raises: UserError as `load` does, and if a conditional model has a different number of alphabets
    """
    args, num_known = checkpoint["args"], checkpoint["num_alphabets"]
    location = location or args["data_location"]
    find = args["find_characters"] and may_hold_pages(location)
    try:
        dataset = load(location, args["small_dataset"], args["dataset_size"], find)
    except SizeError:
        if location == args["data_location"]:
            raise
        dataset = load(location, False, None, find)
    if num_known not in (0, dataset.num_alphabets):
        raise UserError(f"the model knows {num_known} alphabets, {location} has {dataset.num_alphabets}; set --data-location")
    return dataset


def get_fingerprint(split):
    """A short hash of images and alphabets, which tells whether a run resumes with the data it started with."""
    digest = hashlib.sha1(np.packbits(split.obs.bool().numpy()).tobytes())
    if split.alphabet is not None:
        digest.update(split.alphabet.argmax(1).numpy().tobytes())
    return digest.hexdigest()[:12]


def _take_per_alphabet(split, num, num_alphabets, flag):
    """Selects the first images of each alphabet (of all images, if there are no alphabets)."""
    ids = [torch.arange(len(split.obs))]
    if num_alphabets:
        ids = [split.alphabet[:, i].nonzero().squeeze(1) for i in range(num_alphabets)]
    fewest = min(len(i) for i in ids)
    if fewest < num:
        raise SizeError(
            f"{flag} takes {num} training images of each alphabet, but one has only {fewest}; use fewer or more data"
        )
    return split.select(torch.cat([i[:num] for i in ids]))


# ------------------------------------------------------------------ locations


def _load_parts(location, prepare=False):
    """train, test (Split), names of the alphabets"""
    if prepare and not may_hold_pages(location):
        raise UserError(f"--find-characters is for a folder of your own images, not for {location}; leave it out")
    if location == "glyphs":
        return _split(*draw_glyphs(), list(ALPHABETS))
    if location in SITES:
        return _load_mat(_find_site(location))
    path = expand_user(location)
    if not path.exists():
        names = ", ".join([*SITES, "glyphs"])
        raise UserError(f"--data-location {location}: no such file, folder or name ({names})")
    if path.suffix == ".mat":
        return _load_mat(path)
    if path.suffix in (".npy", ".npz"):
        return _split(_load_array(path), None, None, [])
    if path.is_dir() or zipfile.is_zipfile(path):
        return _split(*_load_image_files(path, prepare))
    raise UserError(f"--data-location {location} is not a .mat, .npy, .npz or .zip file or a folder of images")


def may_hold_pages(location):
    """Whether a location may hold photographs and scans, on which to find characters. Raises: UserError if it begins with
    the home of an unknown user"""
    return location not in (*SITES, "glyphs") and expand_user(location).suffix not in (".mat", ".npy", ".npz")


def find_site(name):
    """Where chardata.mat is, or would be"""
    path = expand_user(os.environ.get("OMNIGLOT_PATH") or SITES[name])
    return path / "chardata.mat" if path.is_dir() else path


def _find_site(name):
    path = find_site(name)
    if not path.exists():
        if name != "local":
            raise UserError(f"--data-location {name}: there is no {path}; set $OMNIGLOT_PATH to where the file is")
        download(CHARDATA_URL, path, CHARDATA_BLOB_ID)
    return path


def download(url, path, blob_id, timeout=30, num_tries=3):
    """Downloads a file, verifies its git blob id, and only then moves it to its path.

    Args: timeout: seconds without receiving a byte; num_tries: number of attempts
    Raises: UserError if all attempts fail; there is then no file at path
    """
    path = pathlib.Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for attempt in range(num_tries):
            try:
                _fetch(url, temporary, timeout)
                break
            except (OSError, EOFError, urllib.error.URLError) as error:
                permanent = isinstance(error, urllib.error.HTTPError) and error.code < 500
                no_room = isinstance(error, OSError) and error.errno == 28
                if attempt == num_tries - 1 or permanent or no_room:
                    reason = getattr(error, "reason", None) or error
                    raise UserError(
                        f"cannot download {url} ({reason}); get the file by other means and put it at {path},"
                        " or train on --data-location glyphs, which needs no download"
                    ) from None
                time.sleep(attempt + 1)
        content = temporary.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
            raise UserError(f"what {url} sent is not the expected file (its git blob id is not {blob_id}); try again later")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch(url, path, timeout):
    with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        with show_progress(total=total or None, unit="B", unit_scale=True, desc="downloading chardata.mat") as bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            if bar.n < total:
                raise EOFError(f"the connection broke off after {bar.n} of {total} bytes")


# ------------------------------------------------------------------ formats


@contextlib.contextmanager
def decoding(path):
    """The boundary to third-party decoders: whatever they raise becomes one line that names the file"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        raise UserError(f"{path} is damaged, or not what its name says ({reason})") from None


def _load_mat(path):
    try:
        with decoding(path):
            mat = scipy.io.loadmat(path)
    except UserError as error:
        fetched = path.resolve() == SITES["local"].resolve()
        raise UserError(f"{error}" + "; delete it to have it downloaded again" * fetched) from None
    keys = ["data", "target", "targetchar", "testdata", "testtarget", "testtargetchar"]
    missing = [key for key in keys if key not in mat]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it is not in chardata.mat's format")
    train, test = (_read_mat_part(path, mat, prefix) for prefix in ["", "test"])
    if train.alphabet.shape[1] != test.alphabet.shape[1]:
        raise UserError(f"{path}: target and testtarget have different numbers of alphabets")
    return train, test, [f"alphabet {i + 1}" for i in range(train.alphabet.shape[1])]  # Omniglot's own numbers


def _read_mat_part(path, mat, prefix):
    obs, alphabet, character = (mat[prefix + key] for key in ["data", "target", "targetchar"])
    for name, array in [("data", obs), ("target", alphabet), ("targetchar", character)]:
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: {prefix}{name} is a {type(array).__name__}, not a plain matrix")
        if array.ndim != 2 or array.dtype.kind not in "uifb" or array.shape[1] != obs.shape[1]:
            raise UserError(
                f"{path}: {prefix}{name} has the shape {list(array.shape)}, type {array.dtype}; {prefix}data has {list(obs.shape)}"
            )
    if obs.shape[0] != NUM_ROWS * NUM_COLS or character.shape[0] != 1 or obs.shape[1] == 0:
        raise UserError(
            f"{path}: {prefix}data has the shape {list(obs.shape)}, {prefix}targetchar {list(character.shape)}; expected [784, N] and [1, N]"
        )
    if ((alphabet != 0).sum(0) != 1).any() or alphabet.max() != 1:
        raise UserError(f"{path}: {prefix}target is not one-hot")
    images = obs.T.reshape(-1, NUM_COLS, NUM_ROWS).transpose(0, 2, 1)  # stored column by column
    return _make_split(_binarise(path, images), alphabet.argmax(0), character[0], len(alphabet))


def _load_array(path):
    with decoding(path):
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array as archive:
                if len(archive.files) != 1 and "images" not in archive.files:
                    raise UserError(f"{path} holds {', '.join(archive.files)[:200]}; one array is needed, or one named images")
                array = archive["images" if "images" in archive.files else archive.files[0]]
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path} holds no array; expected numbers [N, rows, columns]")
    if array.ndim != 3 or array.dtype.kind not in "uifb" or 0 in array.shape:
        raise UserError(f"{path} has the shape {list(array.shape)}, type {array.dtype}; expected numbers [N, rows, columns]")
    _check_range(path, array)
    return _binarise(path, np.stack([fit(image) for image in array.astype(np.float32)]))


def _check_range(path, images):
    rounding = 1e-5  # images that were scaled down elsewhere may be that far outside
    if not (np.isfinite(images).all() and images.min() >= -rounding and images.max() <= 1 + rounding):
        raise UserError(f"{path} has values outside [0, 1]; scale it so that paper is 0 and ink is 1")


def _binarise(path, images):
    _check_range(path, images)
    return images >= 0.5


def _load_image_files(path, prepare):
    """Loads a folder or zip of images: the official release of Omniglot, or the user's own,
    whose subfolders, if any, are alphabets. Returns: obs, alphabet ids or None, characters or None, alphabets' names"""
    files = list(list_images(path))
    if not files:
        raise UserError(f"{path} holds no images (.png, .jpg) and none of Omniglot's zips")
    folders = [name.split("/")[:-1] for name, _ in files]
    official = [bool(f) and re.fullmatch(r"character\d{1,6}", f[-1], re.ASCII) is not None and len(f) > 1 for f in folders]
    if all(official):
        # images_background and images_evaluation have no alphabet in common
        alphabets, characters = [f[-2] for f in folders], [int(f[-1][len("character") :]) for f in folders]
        read = read_official
    else:
        depth = len(os.path.commonprefix(folders))  # if all images are in subfolders, these are alphabets
        alphabets = [f[depth] for f in folders] if min(len(f) for f in folders) > depth else None
        characters, read = None, read_image
    files = show_progress(files, desc="reading images", unit="", leave=False)
    found = [_find_or_warn(name, content()) if prepare else [read(name, content()) >= 0.5] for name, content in files]
    source = np.repeat(np.arange(len(found)), [len(some) for some in found])  # the file of each character
    if len(source) == 0:
        raise UserError(f"no characters were found on the images in {path}; train without --find-characters")
    names = []
    if alphabets is not None:
        names, alphabets = np.unique(np.array(alphabets)[source], return_inverse=True)
    obs = np.stack([character for some in found for character in some])
    return obs, alphabets, characters and np.array(characters)[source], [str(name) for name in names]


def _find_or_warn(name, content):
    """The characters on an image file; none, with a warning, if it cannot be decoded"""
    try:
        return find_characters(name, content)
    except UserError as error:
        warn(f"{error}, skipped")
        return []


def list_images(path):
    """(name relative to path, function that reads its bytes) of every image, in order
    of name; includes those inside the official release's zips."""
    if path.is_file():
        yield from _list_zip(path)
        return
    for file in sorted(_walk(path)):
        name = file.relative_to(path).as_posix()
        if is_hidden(name):
            continue
        if file.suffix.lower() in (".png", ".jpg", ".jpeg"):
            yield name, file.read_bytes
        elif re.fullmatch(r"images_(background|evaluation)\.zip", file.name) and not file.with_suffix("").exists():
            yield from _list_zip(file)


def is_hidden(name):
    """Whether a file, named relative to a folder or in a zip, is one that systems put beside the user's own"""
    return any(part.startswith((".", "__MACOSX")) for part in pathlib.PurePosixPath(name).parts if part != "..")


def _walk(path):
    """Yields every regular file below a folder. Raises: UserError if a folder cannot be read"""

    def refuse(error):
        raise UserError(f"cannot read {error.filename} ({error.strerror}); make it readable, or move it elsewhere")

    for parent, _, names in os.walk(path, onerror=refuse, followlinks=True):
        for name in names:
            file = pathlib.Path(parent, name)
            if file.is_file():
                yield file
            elif not file.is_symlink():
                raise UserError(f"{file} is not a file but a pipe or a device; move it elsewhere")


def _list_zip(path):
    with decoding(path):
        archive = zipfile.ZipFile(path)

    def read(name):
        with decoding(f"{path}: {name}"):  # encrypted, broken, or compressed by an unknown method
            return archive.read(name)

    for name in sorted(archive.namelist()):
        if name.lower().endswith((".png", ".jpg", ".jpeg")) and not is_hidden(name):
            yield name, functools.partial(read, name)


# ------------------------------------------------------------------ splits


def _split(obs, alphabet_ids, characters, alphabet_names):
    """Splits into training and test parts with a fixed seed, in chardata.mat's proportions."""
    num_train, num_test = CHARDATA_SIZES["train"], CHARDATA_SIZES["test"]
    permutation = np.random.RandomState(123).permutation(len(obs))
    cut = round(len(obs) * num_train / (num_train + num_test))
    train, test = (
        _make_split(obs[ids], *(None if a is None else a[ids] for a in (alphabet_ids, characters)), len(alphabet_names))
        for ids in np.split(permutation, [cut])
    )
    return train, test, alphabet_names


def _make_split(obs, alphabet_ids, characters, num_alphabets):
    alphabet = None
    if alphabet_ids is not None:
        alphabet = torch.eye(num_alphabets)[torch.from_numpy(alphabet_ids.astype(np.int64))]
    character = None if characters is None else torch.from_numpy(characters.astype(np.int64))
    return Split(torch.from_numpy(np.ascontiguousarray(obs, dtype=np.float32)), alphabet, character)
