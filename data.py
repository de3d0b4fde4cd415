"""Images of handwritten characters: where to find them, how to read and split them.

Every source becomes binary 28 x 28 images, upright, ink 1, split into training, validation and test images, and summed up in
one line. Where they are known, each character comes with its alphabet and its number within it.
"""

import collections
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import pathlib
import re
import typing
import zipfile

import numpy as np
import scipy.io
import torch

from images import ALPHABETS, HEIC_ADVICE, draw_glyphs, find_characters, get_suffixes, read_image, read_official, shrink
from util import UserError, expand_user, make_folder, show_progress, warn

NUM_ROWS = NUM_COLS = 28
SMALL_NUM_PER_ALPHABET = 10

CHARDATA_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
CHARDATA_BLOB_ID = "016a3536ffe5e1d38e42563a18d7a78bfaf643ec"  # by which git names this content
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
    summary: str = ""  # one line about what was read


class Source(typing.NamedTuple):
    """All images of a location, before they are split"""

    obs: np.ndarray  # [N, 28, 28], bool, ink True
    alphabet_ids: np.ndarray | None = None  # [N]
    characters: np.ndarray | None = None  # [N], from 1 within an alphabet
    alphabet_names: list = []  # L strings
    parts: np.ndarray | None = None  # [N], "train", "valid" or "test", where the location has them
    notes: tuple = ()  # remarks for the summary


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
    source = _load_source(location, find_characters)
    _check_ink(location, source.obs)
    train, valid, test = _split(source)
    alphabet_names = source.alphabet_names
    num_alphabets = len(alphabet_names)
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
    notes = [*source.notes, f"{len(train.obs)} to train on"] if small_dataset or dataset_size else source.notes
    groups = _count(num_alphabets, "alphabet") if num_alphabets else "no alphabets"
    summary = summarise(source.obs, groups, notes)
    return Dataset(train, valid, test, num_alphabets, tuple(alphabet_names), summary)


def load_and_tell(location, *options):
    """As `load`, and prints the summary"""
    dataset = load(location, *options)
    print(f"{location}: {dataset.summary}", flush=True)
    return dataset


def load_for_model(checkpoint, location=None, load=load_and_tell):
    """Loads the data set that a model was trained on, or a corresponding one from another location: one of the same size if
    possible, else all of it.

    Args: checkpoint: of main.py; location: None for that of the training; load: `load_and_tell`, or a cached version of it
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
    """A short hash of images and alphabets, by which a run recognises the data it started with"""
    obs = split.obs.numpy()
    digest = hashlib.sha1(np.packbits(obs.astype(bool)).tobytes())
    if (obs != obs.astype(bool)).any():  # grey
        digest.update(np.ascontiguousarray(obs).tobytes())
    if split.alphabet is not None:
        digest.update(split.alphabet.argmax(1).numpy().tobytes())
    return digest.hexdigest()[:12]


def _take_per_alphabet(split, num, num_alphabets, flag):
    """Selects the first images of each alphabet or, if there are no alphabets, of all images"""
    ids = [torch.arange(len(split.obs))]
    if num_alphabets:
        ids = [split.alphabet[:, i].nonzero().squeeze(1) for i in range(num_alphabets)]
    fewest = min(len(i) for i in ids)
    if fewest < num:
        raise SizeError(
            f"{flag} takes {num} training images of each alphabet, but one has only {fewest}; use fewer or more data"
        )
    return split.select(torch.cat([i[:num] for i in ids]))


# ------------------------------------------------------------------ the summary


def summarise(obs, groups, notes=()):
    """Sums up images [N, 28, 28] in one line. Args: groups: words, such as the number of alphabets; notes: further remarks"""
    return "; ".join([f"{_count(len(obs), 'image')}, {groups}, mean ink {obs.mean():.2f}", *notes, *_describe_faults(obs)])


def _count(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def _get_faults(obs):
    """How many images cannot be characters, by what is wrong with them"""
    ink = obs.reshape(len(obs), -1).mean(1)
    solid = int((ink > 0.95).sum())
    return {"blank": int((ink == 0).sum()), "solid": solid, "more than half ink": int((ink > 0.5).sum()) - solid}


def _describe_faults(obs):
    faults = ", ".join(f"{number} {fault}" for fault, number in _get_faults(obs).items() if number)
    return [faults] if faults else []


def _check_ink(location, obs):
    """Raises: UserError if most images show no character"""
    if 2 * sum(_get_faults(obs).values()) > len(obs):
        raise UserError(
            f"{location}: of {_count(len(obs), 'image')}, {_describe_faults(obs)[0]}: ink must be clearly darker than paper, or"
            " lighter, and cover less of it (transparent pixels count as white paper)"
        )


def _describe_skipped(path, skipped):
    """Warns, by name, of files that were left out. Args: skipped: (name, kind) of each
    Returns: a list with a remark for the summary, if there are any"""
    if not skipped:
        return []
    names = collections.defaultdict(list)
    for kind, name in sorted((kind, name) for name, kind in skipped):
        names[kind].append(name)
    counts = {kind: f"{len(group)} {kind}" for kind, group in names.items()}
    details = []
    for kind, group in names.items():
        examples = ", ".join(group[:3]) + ", ..." * (len(group) > 3)
        details.append(f"{counts[kind]} ({examples}{f': {HEIC_ADVICE}' * (kind == 'HEIC')})")
    warn(f"{path}: skipped {', '.join(details)}")
    return [f"skipped: {_count(len(skipped), 'file')} ({', '.join(counts.values())})"]


# ------------------------------------------------------------------ locations


def _load_source(location, prepare=False):
    """Reads all images of a location. Returns: Source"""
    if prepare and not may_hold_pages(location):
        raise UserError(f"--find-characters is for a folder of your own images, not for {location}; leave it out")
    if location == "glyphs":
        return Source(*draw_glyphs(), list(ALPHABETS))
    if location in SITES:
        return _load_mat(_find_site(location))
    path = expand_user(location)
    if not path.exists():
        names = ", ".join([*SITES, "glyphs"])
        raise UserError(f"--data-location {location}: no such file, folder or name ({names})")
    if path.suffix == ".mat":
        return _load_mat(path)
    if path.suffix == ".npz":
        return _load_npz(path)
    if array_files := _list_array_files(path):
        return _load_array_files(path, array_files)
    if path.is_dir() or zipfile.is_zipfile(path):
        return _load_image_files(path, prepare)
    raise UserError(f"--data-location {location} is not a .mat, .npy, .npz, idx or .zip file or a folder of images")


def may_hold_pages(location):
    """Whether a location may hold photographs and scans, on which to find characters. Raises: UserError if it begins with
    the home of an unknown user"""
    return location not in (*SITES, "glyphs") and expand_user(location).suffix not in (".mat", ".npy", ".npz", ".gz")


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


def download(url, path, blob_id):
    """Downloads a file, verifies its git blob id, and only then moves it to its path.

    Raises: UserError if that fails; there is then no file at path
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.hub.download_url_to_file(url, temporary)  # with a progress bar; its own verification takes other hashes
        content = temporary.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
            raise UserError(f"what {url} sent is not the expected file (its git blob id is not {blob_id}); try again later")
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({getattr(error, 'reason', error)}); get the file by other means and put it at {path},"
            " or train on --data-location glyphs, which needs no download"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


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
    with decoding(path):
        mat = scipy.io.loadmat(path)
    keys = ["data", "target", "targetchar", "testdata", "testtarget", "testtargetchar"]
    missing = [key for key in keys if key not in mat]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it is not in chardata.mat's format")
    parts = [_read_mat_part(path, mat, prefix) for prefix in ["", "test"]]
    if len(parts[0][1]) != len(parts[1][1]):
        raise UserError(f"{path}: target and testtarget have different numbers of alphabets")
    images, alphabets, characters = (np.concatenate([part[i] for part in parts], axis) for i, axis in enumerate([0, 1, 0]))
    obs, notes = _to_ink(path, images)
    names = [f"alphabet {i + 1}" for i in range(len(alphabets))]  # Omniglot's own numbers
    sizes = [len(images) for images, *_ in parts]
    return Source(obs, alphabets.argmax(0), characters, names, np.repeat(["train", "test"], sizes), notes)


def _read_mat_part(path, mat, prefix):
    obs, alphabet, character = (mat[prefix + key] for key in ["data", "target", "targetchar"])
    num_rows = {"data": NUM_ROWS * NUM_COLS, "target": "L", "targetchar": 1}
    for (name, rows), array in zip(num_rows.items(), (obs, alphabet, character), strict=True):
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: {prefix}{name} is a {type(array).__name__}, not a plain matrix")
        right = array.ndim == 2 and array.dtype.kind in "uifb" and array.shape[0] > 0 and array.shape[1] == obs.shape[1] > 0
        if not right or rows not in ("L", array.shape[0]):
            shape = f"the shape {list(array.shape)}, type {array.dtype}"
            raise UserError(f"{path}: {prefix}{name} has {shape}; expected numbers [{rows}, N], with the N of {prefix}data")
    if ((alphabet != 0).sum(0) != 1).any() or alphabet.max() != 1:
        raise UserError(f"{path}: {prefix}target is not one-hot")
    images = obs.T.reshape(-1, NUM_COLS, NUM_ROWS).transpose(0, 2, 1)  # stored column by column
    return images, alphabet, character[0]


# Words in the names of arrays and folders that stand for parts, and those that stand for labels
PARTS = {
    "train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test",
    "testing": "test", "t10k": "test",
}  # fmt: skip
LABELS = {"y", "label", "labels", "target", "targets", "alphabet", "alphabets"}
IDX = re.compile(r"idx[13](-ubyte)?(\.gz)?$")


def _list_array_files(path):
    """The files of arrays that a location consists of: a .npy file, an idx file (MNIST's format) and that of its labels, or
    those in a folder of such files"""
    if path.is_file():
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        return [path] if path.suffix == ".npy" else [path, labels][: 1 + labels.exists()] if IDX.search(path.name) else []
    names = sorted(name for name in os.listdir(path) if not is_hidden(name))
    files = [path / name for name in names if name.endswith(".npy") or IDX.search(name)]
    return files if 2 * len(files) > len(names) else []


def _load_array_files(path, files):
    """Loads arrays, one per file. Where their names speak of neither parts nor labels, each file is an alphabet of its own."""
    if len(files) == 1:
        return _load_arrays(path, {"images": functools.partial(_read_array, files[0])})
    files = {file.name.removesuffix(".gz").removesuffix(".npy"): file for file in reversed(files)}
    readers = {name: functools.partial(_read_array, file) for name, file in sorted(files.items())}
    if any(_get_role(name) != (None, "images") for name in files):
        return _load_arrays(path, readers)
    obs, notes = zip(*(_to_ink(files[name], read()) for name, read in readers.items()), strict=True)
    alphabet_ids = np.repeat(np.arange(len(obs)), [len(images) for images in obs])
    return Source(np.concatenate(obs), alphabet_ids, None, list(readers), None, notes[0])


def _load_npz(path):
    with decoding(path), np.load(path, allow_pickle=False) as archive:
        names = ["images"] if "images" in archive.files and len(archive.files) > 1 else archive.files
        names = names + [name for name in archive.files if name not in names and _get_role(name) == (None, "labels")]
        return _load_arrays(path, {name: functools.partial(archive.__getitem__, name) for name in names})


def _get_role(name):
    """What an array's name says about it: its part (None: the whole), and whether it holds images or labels"""
    words = re.split(r"[\W_]+", name.lower())
    part = next((PARTS[word] for word in words if word in PARTS), None)
    return part, "labels" if LABELS.intersection(words) else "images"


def _load_arrays(path, readers):
    """Makes a Source of arrays of images, one or one per part, and perhaps of their labels, which become alphabets.

    Args: readers: name -> a function that returns the array
    """
    names = collections.defaultdict(list)
    for name in readers:
        names[_get_role(name)].append(name)
    parts = [part for part in [None, "train", "valid", "test"] if (part, "images") in names]
    if not parts or None in parts[1:] or max(map(len, names.values())) > 1 or (None in parts and len(parts) > 1):
        listed = ", ".join(readers)[:200]
        raise UserError(f"{path} holds {listed}; give one array of images, or one named images, or one per part (x_train)")
    obs, notes = zip(*(_to_ink(path, readers[names[part, "images"][0]]()) for part in parts), strict=True)
    sizes = [len(images) for images in obs]
    labels = [name for part in parts for name in names.get((part, "labels"), [])]
    alphabet_ids, alphabet_names = None, []
    if len(labels) == len(parts):
        each = [_to_labels(path, readers[name](), size) for name, size in zip(labels, sizes, strict=True)]
        alphabet_names, alphabet_ids = np.unique(np.concatenate(each), return_inverse=True)
    own = _complete(np.repeat([str(part) for part in parts], sizes)) if len(parts) > 1 else None
    return Source(np.concatenate(obs), alphabet_ids, None, [str(name) for name in alphabet_names], own, notes[0])


def _complete(parts):
    """Without test images, those of validation take their place"""
    return parts if "test" in parts else np.where(parts == "valid", "test", parts)


def _read_array(path):
    """Reads a .npy or an idx file"""
    with decoding(path):
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        types = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
        shape = np.frombuffer(content, ">i4", content[3], offset=4)
        array = np.frombuffer(content, types[content[2]], offset=4 + 4 * len(shape)).reshape(shape)
        # EMNIST's images, but not MNIST's, are stored column by column
        return array.swapaxes(1, 2) if "emnist" in path.name.lower() and array.ndim == 3 else array


def _to_ink(path, array):
    """Images as numbers [N, R, C], [N, R, C, 1], [N, 1, R, C] or, square ones, [N, R * C], from 0 to 1, to 255 or to 65535.

    Returns: ink, bool [N, 28, 28], and remarks for the summary. Paper is what most images' edges show.
    Raises: UserError if it is not an array of images, or has values that cannot be ink
    """
    right = isinstance(array, np.ndarray) and array.dtype.kind in "uifb" and 0 not in array.shape
    if right and array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
        array = array.squeeze(1 if array.shape[1] == 1 else 3)
    if right and array.ndim == 2 and math.isqrt(array.shape[1]) ** 2 == array.shape[1]:
        array = array.reshape(len(array), math.isqrt(array.shape[1]), -1)
    if not right or array.ndim != 3:
        shape = f"the shape {list(array.shape)}, type {array.dtype}" if isinstance(array, np.ndarray) else "something else"
        raise UserError(f"{path} has {shape}; expected numbers [N, rows, columns]")
    largest = _get_largest(path, array)
    edges = np.concatenate([array[:, 0], array[:, -1], array[:, :, 0], array[:, :, -1]], 1) > 0.5 * largest
    inverted = np.mean(edges.mean(1) > 0.5) > 0.5
    if array.shape[1:] == (NUM_ROWS, NUM_COLS):
        ink = (array >= 0.5 * largest) ^ inverted
    else:
        ink = np.stack([shrink(abs(image.astype(np.float32) / largest - inverted)) >= 0.5 for image in array])
    return ink, ["dark on light"] if inverted else []


def _get_largest(path, array):
    """The value of full ink, or of white paper: 1, 255 or 65535"""
    low, high, rounding = float(array.min()), float(array.max()), 1e-5  # which averages may be outside
    if low >= -rounding and high <= 65535 + rounding and not 1 + rounding < high < 64 and not 255 + rounding < high < 4096:
        return 1 if high <= 1 + rounding else 255 if high < 4096 else 65535
    raise UserError(f"{path} has values outside [0, 1], {low:g} to {high:g}; scale it so that paper is 0 and ink is 1, or 255")


def _to_labels(path, array, size):
    """Labels [N], [N, 1] or one-hot [N, L] -> [N]"""
    array = array.argmax(1) if array.ndim == 2 and array.shape[1] > 1 else array.reshape(-1)
    if array.shape != (size,) or array.dtype.kind not in "uifbUS":
        raise UserError(f"{path} has {_count(size, 'image')}, but labels of the shape {list(array.shape)}, type {array.dtype}")
    whole = array.dtype.kind == "f" and (array == np.round(array)).all()
    return array.astype(int) if whole else np.char.decode(array, errors="replace") if array.dtype.kind == "S" else array


class ImageFile(typing.NamedTuple):
    name: str  # relative to the location, with slashes
    read: typing.Callable  # returns its bytes

    @property
    def folders(self):
        return self.name.split("/")[:-1]


def _load_image_files(path, prepare):
    """Loads a folder or zip of images: Omniglot's official release, or the user's own, whose subfolders, if any, are
    alphabets"""
    skipped = []
    files = list(list_images(path, skipped))
    if not files:
        about = "".join(f" ({note})" for note in _describe_skipped(path, skipped))
        raise UserError(f"{path} holds no images that can be read{about} and none of Omniglot's zips")
    if 2 * sum(map(_is_official, files)) > len(files):
        files = _keep(files, _is_official, "beside Omniglot's", skipped)
        if any("images_background" in file.folders for file in files):  # parts of it are there a second time
            files = _keep(files, lambda file: not re.search("images_background_small", file.name), "copies", skipped)
        # images_background and images_evaluation have no alphabet in common
        alphabets, characters = zip(*(file.folders[-2:] for file in files), strict=True)
        characters = [int(folder.removeprefix("character")) for folder in characters]
        parts, decode = None, read_official
    else:
        files, alphabets, parts = _arrange(files, skipped)
        characters, decode = None, read_image
    notes = _describe_skipped(path, skipped)
    files = show_progress(files, desc="reading images", unit="", leave=False)
    found = [_find_or_warn(name, read()) if prepare else [decode(name, read()) >= 0.5] for name, read in files]
    file_ids = np.repeat(np.arange(len(found)), [len(page) for page in found])  # the file of each character
    if len(file_ids) == 0:
        raise UserError(f"no characters were found on the images in {path}: see the warnings")
    names = []
    if alphabets is not None:
        names, alphabets = np.unique(np.array(alphabets)[file_ids], return_inverse=True)
    obs = np.stack([character for page in found for character in page])
    characters, parts = (None if values is None else np.array(values)[file_ids] for values in (characters, parts))
    return Source(obs, alphabets, characters, [str(name) for name in names], parts, notes)


def _is_official(file):
    """Whether it lies in folders of an alphabet and a character, as in the official release"""
    return re.search(r"(^|/)[^/]+/character\d{1,6}/[^/]+$", file.name, re.ASCII) is not None


def _keep(files, is_kept, reason, skipped):
    """The files to keep; appends the others to the list `skipped`, for that reason"""
    skipped += [(file.name, reason) for file in files if not is_kept(file)]
    return [file for file in files if is_kept(file)]


def _arrange(files, skipped):
    """Takes alphabets and parts from the names of folders. If most files are in folders, those beside them are left out.

    Returns: files, their alphabets or None, and their parts ("train", "valid", "test") or None
    """

    def get_part(file):
        return PARTS.get(file.folders[level].lower())

    files, level = _leave_out(files, 0, skipped)
    if min(len(file.folders) for file in files) <= level:
        return files, None, None
    parts = [part for file in files if (part := get_part(file))]
    if not {"train", "test"} <= set(_complete(np.array(parts))) or 2 * len(parts) <= len(files):
        return files, [file.folders[level] for file in files], None
    files = _keep(files, get_part, "beside the parts", skipped)
    files, below = _leave_out(files, level + 1, skipped)
    parts = _complete(np.array([get_part(file) for file in files]))
    have_alphabets = min(len(file.folders) for file in files) > below
    return files, [file.folders[below] for file in files] if have_alphabets else None, parts


def _leave_out(files, level, skipped):
    """Leaves out files beside the folders that hold most of them. Args: level: of the folders; 0: at which they first differ
    Returns: the files that remain, and the level"""
    while True:
        depth = level or len(os.path.commonprefix([file.folders for file in files]))
        num_inside = sum(len(file.folders) > depth for file in files)
        if num_inside == len(files) or 2 * num_inside <= len(files):
            return files, depth
        files = _keep(files, lambda file, depth=depth: len(file.folders) > depth, "beside the folders", skipped)


def _find_or_warn(name, content):
    """The characters on an image file; none, with a warning, if it cannot be decoded"""
    try:
        return find_characters(name, content)
    except UserError as error:
        warn(f"{error}, skipped")
        return []


def list_images(path, skipped=None):
    """Yields every image in a folder or zip, an ImageFile, in order of name; includes those inside the official release's zips.
    Appends (name, kind) of other files to the list `skipped`"""
    skipped = [] if skipped is None else skipped
    if path.is_file():
        yield from _list_zip(path, path, skipped)
        return
    for file in sorted(_walk(path, skipped)):
        name = file.relative_to(path).as_posix()
        if re.fullmatch(OFFICIAL_ZIP, file.name):
            if not file.with_suffix("").exists():
                yield from _list_zip(file, file, skipped)
        elif _is_image(name, skipped):
            yield ImageFile(name, file.read_bytes)


OFFICIAL_ZIP = r"images_(background|evaluation)(_small\d)?\.zip"


def _is_image(name, skipped):
    suffix = pathlib.PurePosixPath(name).suffix.lower()
    if suffix in get_suffixes():
        return True
    skipped.append((name, "HEIC" if suffix in (".heic", ".heif", ".hif") else suffix[1:].upper() or "other"))
    return False


# What systems, network disks and programs put beside the user's own files: hidden files and these
HIDDEN = re.compile(
    r"\..+|__MACOSX.*|lost\+found|\$RECYCLE\.BIN|RECYCLER|System Volume Information|FOUND\.\d{3}|Thumbs\.db|ehthumbs.*\.db"
    r"|desktop\.ini|@eaDir|@tmp|@Recycle|@Recently-Snapshot|#recycle|#snapshot|~snapshot|Network Trash Folder|Temporary Items",
    re.IGNORECASE,
)


def is_hidden(name):
    """Whether a file, named relative to a folder or in a zip, is one that systems put beside the user's own"""
    return any(HIDDEN.fullmatch(part) for part in pathlib.PurePosixPath(name).parts if part != "..")


def _walk(path, skipped):
    """Yields every regular file below a folder that is not hidden. Folders to which several links lead are visited once, by
    their own name if possible; those that may not be read are skipped."""

    def skip(error):
        skipped.append((os.path.relpath(error.filename, path), "unreadable folder"))

    visited, links = set(), [str(path)]
    while links:
        for parent, folders, names in os.walk(links.pop(0), onerror=skip):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links += [linked for name in folders if os.path.islink(linked := os.path.join(parent, name))]
            for file in (pathlib.Path(parent, name) for name in names if not is_hidden(name)):
                if file.is_file():
                    yield file
                elif not file.is_symlink():
                    raise UserError(f"{file} is not a file but a pipe or a device; move it elsewhere")


def get_names(archive):
    """The files in a zip: name -> the name in the zip, which has backslashes if some Windows programs made it"""
    names = {name.replace("\\", "/").lstrip("/"): name for name in archive.namelist()}
    return {name: stored for name, stored in names.items() if not name.endswith("/")}


def _list_zip(path, file, skipped):
    """The images of a zip, and those of the official release's zips in it. Args: file: its path, or an open file"""
    with decoding(path):
        archive = zipfile.ZipFile(file)

    def read(name):
        with decoding(f"{path}: {name}"):  # encrypted, broken, or compressed by an unknown method
            return archive.read(name)

    for name, stored in sorted(get_names(archive).items()):
        if is_hidden(name):
            continue
        if re.fullmatch(OFFICIAL_ZIP, name.split("/")[-1]):
            yield from _list_zip(f"{path}: {name}", io.BytesIO(read(stored)), skipped)
        elif _is_image(name, skipped):
            yield ImageFile(name, functools.partial(read, stored))


# ------------------------------------------------------------------ splits


def _split(source):
    """Splits a Source into its own parts or, with a fixed seed, in chardata.mat's proportions: train, valid, test (Split)"""
    if source.parts is None:
        permutation = np.random.RandomState(123).permutation(len(source.obs))
        cut = round(len(source.obs) * CHARDATA_SIZES["train"] / (CHARDATA_SIZES["train"] + CHARDATA_SIZES["test"]))
        train, valid, test = permutation[:cut], permutation[:0], permutation[cut:]
    else:
        train, valid, test = (np.flatnonzero(source.parts == part) for part in ["train", "valid", "test"])
    train = train[np.random.RandomState(123).permutation(len(train))]
    if len(valid) == 0:
        num_valid = round(len(train) * CHARDATA_SIZES["valid"] / CHARDATA_SIZES["train"])
        train, valid = np.split(train, [len(train) - num_valid])
    return [_make_split(source, ids) for ids in (train, valid, test)]


def _make_split(source, ids):
    alphabet = character = None
    if source.alphabet_ids is not None:
        alphabet_ids = torch.from_numpy(source.alphabet_ids[ids].astype(np.int64))
        alphabet = torch.eye(len(source.alphabet_names))[alphabet_ids]
    if source.characters is not None:
        character = torch.from_numpy(source.characters[ids].astype(np.int64))
    return Split(torch.from_numpy(np.ascontiguousarray(source.obs[ids], dtype=np.float32)), alphabet, character)
