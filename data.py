"""Images of handwritten characters: where to find them, and how to read and split them.

Every source becomes binary 28 x 28 images, upright, ink 1, split into training, validation and test images, with a one-line
summary. Where known, each image comes with its alphabet and the number of its character within it.
"""

import collections
import contextlib
import functools
import hashlib
import http.client
import io
import os
import pathlib
import re
import tempfile
import typing
import zipfile

import numpy as np
import scipy.io
import torch

from images import ALPHABETS, SIDE, decode, draw_glyphs, find_characters, fit, get_suffixes, read_image, shrink
from util import SITES, UserError, count, expand_user, get_reason, is_out_of_memory, show_progress, warn, warn_once, write

SMALL_NUM_PER_ALPHABET = 10

CHARDATA_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
CHARDATA_BLOB_ID = "016a3536ffe5e1d38e42563a18d7a78bfaf643ec"  # git's name for this content
CHARDATA_SIZES = dict(train=24345, valid=1345, test=8115)  # valid is split off the end of train


class Split(typing.NamedTuple):
    """obs [N, 28, 28] in {0, 1}, float32; alphabet [N, L] one-hot, float32, or None;
    character [N], numbers from 1 within an alphabet, or None"""

    obs: torch.Tensor
    alphabet: torch.Tensor | None
    character: torch.Tensor | None

    def select(self, ids):
        """Selects images by ids [M] or a slice"""
        return Split(*(None if field is None else field[ids] for field in self))

    def to(self, device):
        return Split(*(None if field is None else field.to(device) for field in self))


def spread(num_all, num):
    """Evenly spaced indices, at most num: [n]"""
    return torch.linspace(0, num_all - 1, min(num, num_all)).round().long()


class Dataset(typing.NamedTuple):
    """Images in three parts, and what is known of them"""

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
    alphabet_names: typing.Sequence = ()  # L strings
    parts: np.ndarray | None = None  # [N], "train", "valid" or "test", where the location has them
    notes: typing.Sequence = ()  # remarks for the summary


def load(location="local", small_dataset=False, dataset_size=None, find_characters=False):
    """Loads a data set: `local`, `om`, `glyphs` or a path (docs/data.md).

    Args:
        small_dataset: 10 training images per alphabet
        dataset_size: number of training images, equally many of each alphabet
        find_characters: prepare a folder of your own images by `images.find_characters`, which may find several characters
            on each
    Raises: UserError if something is wrong with the location or the data, or there are too few images
    """
    if small_dataset and dataset_size is not None:
        raise UserError("--small-dataset and --dataset-size exclude each other; give one")
    source = _load_source(location, find_characters)
    train, valid, test = _split(source)
    for obs, part in [(source.obs, ""), (train.obs.numpy(), "training "), (test.obs.numpy(), "test ")]:
        faults = _get_faults(obs)
        if 2 * sum(faults.values()) > len(obs):
            raise UserError(
                f"{location}: of {count(len(obs), f'{part}image')}, {_list_counts(faults)}: ink must be clearly darker than"
                " paper, or lighter, and cover less of it (transparent pixels count as white paper)"
            )
    notes, num_alphabets = list(source.notes), len(source.alphabet_names)
    num_groups = max(num_alphabets, 1)
    size = SMALL_NUM_PER_ALPHABET * num_groups if small_dataset else dataset_size
    if size is not None:
        train = _take_per_alphabet(train, size, num_groups)
        notes.append(f"{size} to train on")
    if len(train.obs) == 0 or len(test.obs) == 0:
        raise UserError(f"{location} holds too few images to split into training and test images")
    groups = count(num_alphabets, "alphabet") if num_alphabets else "no alphabets"
    return Dataset(train, valid, test, num_alphabets, tuple(source.alphabet_names), summarise(source.obs, groups, notes))


def load_and_tell(location, *options):
    """Like `load`, but prints the summary"""
    dataset = load(location, *options)
    print(f"{location}: {dataset.summary}", flush=True)
    return dataset


def load_for_model(checkpoint, location=None, load=load_and_tell):
    """Loads the data set that a model was trained on, or a corresponding one from another location: of the same size if
    possible, else all of it.

    Args: checkpoint: of main.py; location: None for that of the training; load: `load_and_tell`, or a cached version
    Raises: UserError as `load` does, and if a conditional model has other alphabets
    """
    args, num_known = checkpoint["args"], checkpoint["num_alphabets"]
    location = location or args["data_location"]
    find = args["find_characters"] and may_hold_pages(location)
    try:
        dataset = load(location, args["small_dataset"], args["dataset_size"], find)
    except UserError:  # too few images, perhaps
        if location == args["data_location"]:
            raise
        dataset = load(location, False, None, find)
    if num_known not in (0, dataset.num_alphabets):
        raise UserError(f"the model knows {num_known} alphabets, {location} has {dataset.num_alphabets}; set --data-location")
    if num_known and not was_trained_on(checkpoint, dataset):
        known, names = checkpoint.get("alphabet_names", []), list(dataset.alphabet_names)
        if not known or "alphabet 1" in known + names:  # chardata.mat has none, nor have older checkpoints
            warn_once(f"without names, the alphabets of {location} are taken to be in the order of the training data's")
        elif known != names:
            raise UserError(f"the model's alphabets differ from those of {location}; set --data-location")
    return dataset


def was_trained_on(checkpoint, dataset):
    """Whether a data set's training images are those that a checkpoint's model was trained on"""
    return checkpoint["data"] == get_fingerprint(dataset.train)


def get_fingerprint(split):
    """A short hash of images and alphabets, by which a run recognises the data it started with"""
    obs = split.obs.numpy()
    digest = hashlib.sha1(np.packbits(obs.astype(bool)).tobytes())
    if (obs != obs.astype(bool)).any():  # grey
        digest.update(np.ascontiguousarray(obs).tobytes())
    if split.alphabet is not None:
        digest.update(split.alphabet.argmax(1).numpy().tobytes())
    return digest.hexdigest()[:12]


def count_common(split, other):
    """The number of images of a Split that another one has as well"""
    rows, known = ([image.tobytes() for image in some.obs.numpy()] for some in (split, other))
    return sum(map(set(known).__contains__, rows))


def warn_of_common(images, train):
    """Warns if some of a Split of test images equal training images. Returns: how many"""
    if num := count_common(images, train):
        warn_once(f"of the {len(images.obs)} test images, {num} equal training images, so not all are unseen")
    return num


def _take_per_alphabet(split, size, num_groups):
    """Selects the first images of each alphabet or, if there are no alphabets, of all images"""
    num, rest = divmod(size, num_groups)
    if rest:
        raise UserError(f"--dataset-size {size} is not a multiple of the {num_groups} alphabets")
    group_ids = torch.zeros(len(split.obs)) if split.alphabet is None else split.alphabet.argmax(1)
    ids = [(group_ids == i).nonzero().squeeze(1)[:num] for i in range(num_groups)]
    fewest = min(map(len, ids))
    if fewest < num:
        which = " of each alphabet" * (split.alphabet is not None)
        raise UserError(
            f"a data set of {size} takes {num} training images{which}, but there are only {fewest};"
            " use a smaller data set, or provide more data"
        )
    return split.select(torch.cat(ids))


# ------------------------------------------------------------------ the summary


def summarise(obs, groups, notes=()):
    """Summarises images [N, 28, 28] in a line. Args: groups: words, such as the number of alphabets; notes: further remarks"""
    words = [f"{count(len(obs), 'image')}, {groups}, mean ink {obs.mean():.2f}", *notes, _list_counts(_get_faults(obs))]
    return "; ".join(filter(None, words))


def _get_faults(obs):
    """Counts images that cannot be characters, by what is wrong with them"""
    ink = obs.mean((1, 2))
    faults = {"blank": ink == 0, "solid": ink > 0.95, "more than half ink": (ink > 0.5) & (ink <= 0.95)}
    return {name: int(found.sum()) for name, found in faults.items() if found.any()}


def _list_counts(counts):
    return ", ".join(f"{number} {name}" for name, number in counts.items())


# ------------------------------------------------------------------ locations


def _load_source(location, prepare=False):
    """Reads all images of a location. Returns: Source"""
    if prepare and not may_hold_pages(location):
        raise UserError(f"--find-characters is for a folder of your own images, not for {location}; leave it out")
    if location == "glyphs":
        return Source(*draw_glyphs(), ALPHABETS)
    path = find_site(location) if location in SITES else expand_user(location)
    if location == "local" and not path.exists():
        download(CHARDATA_URL, path, CHARDATA_BLOB_ID)
    if not path.exists():
        names = ", ".join([*SITES, "glyphs"])
        advice = "set $OMNIGLOT_PATH to where chardata.mat is" if location in SITES else f"give a path, or one of {names}"
        where = "" if str(path) == location else f" as {path}"
        raise UserError(f"--data-location {location}: no such file or folder{where}; {advice}")
    if path.suffix == ".mat" or location in SITES:
        return _load_mat(path)
    if path.suffix in (".npy", ".npz"):
        return _load_arrays(path)
    if path.is_dir() or zipfile.is_zipfile(path):
        return _load_image_files(path, prepare)
    raise UserError(f"--data-location {location} is not a .mat, .npy, .npz or .zip file or a folder of images")


def may_hold_pages(location):
    """Whether a location may hold photographs and scans, on which to find characters"""
    return location not in (*SITES, "glyphs") and expand_user(location).suffix not in (".mat", ".npy", ".npz")


def find_site(name):
    """Where chardata.mat is, or should be"""
    path = expand_user(os.environ.get("OMNIGLOT_PATH") or SITES[name])
    return path / "chardata.mat" if path.is_dir() else path


def download(url, path, blob_id):
    """Downloads a file, verifies its git blob id, and only then writes it to its path.

    Raises: UserError if that fails; there is then no file at the path
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.hub.download_url_to_file(url, f"{folder}/file")  # has a progress bar, but verifies other kinds of hashes
            content = pathlib.Path(folder, "file").read_bytes()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({getattr(error, 'reason', error)}); get the file by other means and put it at {path},"
            " or train on --data-location glyphs, which needs no download"
        ) from None
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob_id:
        raise UserError(f"{url} sent what is not the expected file (its git blob id is not {blob_id}); try again later")
    write(path, content)


# ------------------------------------------------------------------ formats


@contextlib.contextmanager
def _decoding(path):
    """Turns whatever third-party decoders raise into one line that names the file"""
    try:
        yield
    except Exception as error:
        kind = "needs more memory than there is" if is_out_of_memory(error) else "is damaged"
        raise UserError(f"{path} {kind}, or is not what its name says ({get_reason(error)})") from None


def _load_mat(path):
    """Loads a file in chardata.mat's format: images, each stored column by column, one-hot alphabets, numbers of characters"""
    with _decoding(path):
        mat = scipy.io.loadmat(path)
    parts, num_alphabets = [], len(np.atleast_2d(mat.get("target")))
    for prefix in ["", "test"]:
        arrays = [np.atleast_2d(mat.get(prefix + name)) for name in ("data", "target", "targetchar")]
        num, shapes = arrays[0].shape[1], [array.shape for array in arrays]
        right = shapes == [(SIDE * SIDE, num), (num_alphabets, num), (1, num)]
        if not right or any(array.dtype.kind not in "uifb" for array in arrays):
            raise UserError(
                f"{path} is not in chardata.mat's format: {prefix}data, {prefix}target and {prefix}targetchar have the shapes"
                f" {str(shapes)[1:-1]}; expected numbers ({SIDE * SIDE}, N), (L, N) and (1, N), with the same L in both parts"
            )
        parts.append(arrays)
    _, alphabets, characters = (np.concatenate(pair, 1) for pair in zip(*parts, strict=True))
    # Each part by itself, since they may differ in scale
    obs, notes = zip(*[_to_ink(path, arrays[0].T.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)) for arrays in parts], strict=True)
    notes = list(dict.fromkeys(sum(notes, [])))
    if ((alphabets != 0).sum(0) != 1).any() or alphabets.max() != 1:
        raise UserError(f"{path}: target or testtarget is not one-hot")
    sizes, names = [arrays[0].shape[1] for arrays in parts], [f"alphabet {i + 1}" for i in range(num_alphabets)]
    return Source(np.concatenate(obs), alphabets.argmax(0), characters[0], names, np.repeat(["train", "test"], sizes), notes)


def _load_arrays(path):
    """Loads a .npy file of images, or a .npz file of images and, optionally, `labels` [N], which become alphabets"""
    with _decoding(path):
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if path.suffix == ".npz" else {"images": loaded}
    labels = arrays.pop("labels", None)
    if len(arrays) != 1:
        there = ", ".join(arrays)[:200] or "no images"
        raise UserError(f"{path} holds {there}; give one array of images and, if there are any, `labels`")
    obs, notes = _to_ink(path, *arrays.values())
    if labels is None:
        return Source(obs, notes=notes)
    if labels.shape != (len(obs),):
        raise UserError(f"{path} has {count(len(obs), 'image')}, but labels of the shape {list(labels.shape)}")
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "backslashreplace")
    names, alphabet_ids = np.unique(labels, return_inverse=True)
    return Source(obs, alphabet_ids, alphabet_names=[str(name) for name in names], notes=notes)


def _to_ink(path, array):
    """Converts images: numbers [N, R, C], possibly with an axis of length 1, or [N, 784], from 0 to 1, to 255 or to 65535.

    Returns: ink, bool [N, 28, 28], and remarks for the summary. Paper is what most images' edges show
    Raises: UserError if it is not an array of images, or has values that cannot be ink
    """
    shape = [n for n in array.shape[1:] if n != 1]
    shape = [SIDE, SIDE] if shape == [SIDE * SIDE] else shape
    if array.dtype.kind not in "uifb" or array.size == 0 or len(shape) != 2:
        raise UserError(f"{path} has the shape {list(array.shape)}, type {array.dtype}; expected numbers [N, rows, columns]")
    array = array.reshape(-1, *shape)
    if len(array) == shape[0] != shape[1] or max(shape) > 4 * min(shape):
        found = f"{count(len(array), 'image')} of {shape[0]} x {shape[1]} pixels"
        warn(f"{path} is read as {found}; if images are numbered along its last axis, move that to the front")
    low, high, rounding = float(array.min()), float(array.max()), 1 + 1e-5  # tolerance, for rounded averages
    full = next((full for full in (1, 255, 65535) if high <= full * rounding), 0)  # the value of ink, or of white paper
    if low < 1 - rounding or high < full / 16 or not full:
        raise UserError(f"{path} has values from {low:g} to {high:g}; scale it so that paper is 0 and ink is 1, or 255")
    edges = np.concatenate([array[:, 0], array[:, -1], array[:, :, 0], array[:, :, -1]], 1)  # [N, E]
    inverted = np.mean((edges > 0.5 * full).mean(1) > 0.5) > 0.5
    if shape == [SIDE, SIDE]:
        ink = (array >= 0.5 * full) ^ inverted
    else:
        greys = (1 - abs(image.astype(np.float32) / full - inverted) for image in array)  # ink is dark
        paper = np.median(np.median(1 - abs(edges / full - inverted), 1))  # the same for all: ink may fill one's edge
        ink = np.stack([shrink((1 - grey / paper).clip(0, 1)) >= 0.5 for grey in greys])
    return ink, ["dark on light"] if inverted else []


# ------------------------------------------------------------------ image files

# Folder names that say which part images belong to
PARTS = dict(train="train", training="train", val="valid", valid="valid", validation="valid", test="test", testing="test")
OFFICIAL_ZIP = r"images_(background|evaluation)(_small\d)?\.zip"

# Files that systems, network disks and programs add
HIDDEN = re.compile(
    r"\..+|__MACOSX|lost\+found|\$RECYCLE\.BIN|System Volume Information|Thumbs\.db|desktop\.ini|@eaDir|#recycle|#snapshot"
)


class File(typing.NamedTuple):
    """A file in a folder or zip"""

    path: pathlib.PurePosixPath  # relative to the location
    read: typing.Callable  # returns its bytes

    @property
    def folders(self):
        return self.path.parts[:-1]

    @property
    def suffix(self):
        return self.path.suffix.lower()


def _load_image_files(path, prepare):
    """Loads a folder or zip of images: Omniglot's official release, or the user's own, with subfolders, if any, as alphabets"""
    files = list(list_files(path))
    images = [file for file in files if file.suffix in get_suffixes()]
    is_official = 2 * sum(map(_is_official, images)) > len(images)
    images = _arrange_official(images) if is_official else _arrange(images)
    used = {file for file, *_ in images}
    notes = _describe_skipped(path, [file for file in files if file not in used])
    if not images:
        raise UserError(f"{path} holds no images that can be read and none of Omniglot's zips")

    def read(name, read_bytes):
        name = f"{path}/{name}"
        if not prepare:
            if not is_official:
                return [read_image(name, read_bytes()) >= 0.5]
            grey = decode(name, read_bytes())
            return [fit(1 - grey if np.median(grey) > 0.5 else grey) >= 0.5]
        try:
            return find_characters(name, read_bytes())
        except UserError as error:
            warn(f"{error}, skipped")
            return []

    progress = show_progress(images, desc="reading images", unit="image", leave=False)
    found = [(ink, *labels) for file, *labels in progress for ink in read(*file)]
    if not found:
        raise UserError(f"no characters were found on the images in {path}; see the warnings")
    obs, alphabets, characters, parts = (None if x[0] is None else np.array(x) for x in zip(*found, strict=True))
    names, alphabet_ids = ([], None) if alphabets is None else np.unique(alphabets, return_inverse=True)
    return Source(obs, alphabet_ids, characters, [str(name) for name in names], parts, notes)


def _describe_skipped(path, files):
    """Warns about files that are left out. Returns: a list with a remark for the summary, if there are any"""
    if not files:
        return []
    kinds = ["outside the folders" if file.suffix in get_suffixes() else file.suffix[1:].upper() or "other" for file in files]
    counts = _list_counts(collections.Counter(sorted(kinds)))
    examples = ", ".join(str(file.path) for file in files[:5]) + ", ..." * (len(files) > 5)
    advice = "; to read HEIC, pip install pillow-heif, or convert it to JPEG or PNG" * (not {"HEIC", "HEIF"}.isdisjoint(kinds))
    warn(f"{path}: skipped {counts}: {examples}{advice}")
    return [f"skipped: {count(len(files), 'file')} ({counts})"]


def _is_official(file):
    """Whether it lies in folders of an alphabet and a character, as in the official release"""
    return len(file.folders) > 1 and re.fullmatch(r"character\d{1,6}", file.folders[-1], re.ASCII) is not None


def _arrange_official(files):
    """Returns: (file, alphabet, character, part or None) for each image in folders like those of the official release, which
    itself has no parts"""
    files = list(filter(_is_official, files))
    if any("images_background" in file.folders for file in files):  # parts of it are included a second time
        files = [file for file in files if "images_background_small" not in str(file.path)]
    parts = [next((PARTS[name.lower()] for name in file.folders[:-2] if name.lower() in PARTS), None) for file in files]
    have_parts = _have_parts(parts)
    # images_background and images_evaluation have no alphabet in common
    return [
        (file, file.folders[-2], int(file.folders[-1].removeprefix("character")), part if have_parts else None)
        for file, part in zip(files, parts, strict=True)
        if part or not have_parts
    ]


def _have_parts(parts):
    """Whether names of parts, or None, divide images into parts"""
    return "train" in parts and len(set(parts) - {None}) > 1


def _arrange(files):
    """Takes alphabets and parts from folder names. Returns: (file, alphabet or None, None, part or None) for each image, except
    those beside the folders that hold most images"""
    num_before = None
    while len(files) != num_before:
        num_before, depth = len(files), len(os.path.commonprefix([file.folders for file in files]))
        files = _enter(files, depth)

    def get_part(file):
        return PARTS.get(file.folders[depth].lower()) if len(file.folders) > depth else None

    parts = {get_part(file) for file in files}
    have_parts = _have_parts(parts)
    level = depth + have_parts  # of the alphabets' folders
    if have_parts:
        of_parts = [[file for file in files if get_part(file) == part] for part in sorted(parts - {None})]
        files = [file for some in of_parts for file in _enter(some, level)]  # one part may have alphabets, another none
    ignored = {folder for file in files for folder in file.folders[level:] if re.split(r"[\W_]", folder.lower())[0] in PARTS}
    if ignored:
        warn(f"the folders {', '.join(sorted(ignored))} do not divide the images; for that, put train/ and test/ outermost")
    have_alphabets = all(len(file.folders) > level for file in files)
    return [
        (file, file.folders[level] if have_alphabets else None, None, get_part(file) if have_parts else None) for file in files
    ]


def _enter(files, depth):
    """The files nested in more than `depth` folders, if these are most; else all"""
    inside = [file for file in files if len(file.folders) > depth]
    return inside if 2 * len(inside) > len(files) else files


def list_files(path, archive=None):
    """Yields every File in a folder or zip that is not hidden, in order of name; for one of the official release's zips, the
    files in it. Args: path: for errors, if an open archive is given"""
    in_zip = archive is not None or path.is_file()
    for file in _list_zip(path, archive or path) if in_zip else _list_folder(path):
        if any(HIDDEN.fullmatch(part) for part in file.path.parts if part != ".."):
            continue
        if re.fullmatch(OFFICIAL_ZIP, file.path.name):
            yield from list_files(f"{path}: {file.path}", io.BytesIO(file.read()))
        else:
            yield file


def _list_folder(path):
    """The files below a folder: a list of File. Links are followed, but no folder is read twice. Raises: OSError if one may
    not be read"""

    def fail(error):
        raise error

    files, known = [], {os.path.realpath(path)}
    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        # Folders before links to them, since the first name counts
        for folder in sorted(folders, key=lambda name: os.path.islink(os.path.join(parent, name))):
            real = os.path.realpath(os.path.join(parent, folder))
            if HIDDEN.fullmatch(folder) or real in known:
                folders.remove(folder)
            known.add(real)
        files += [pathlib.Path(parent, name) for name in names]
    files = [file for file in sorted(files) if file.is_file()]  # not a pipe, or a link to nothing
    unpacked = {file for file in files if re.fullmatch(OFFICIAL_ZIP, file.name) and file.with_suffix("").exists()}
    return [File(file.relative_to(path), file.read_bytes) for file in files if file not in unpacked]


def _list_zip(path, file):
    """Yields every File in a zip. Args: path: for errors; file: its path, or an open file"""
    with _decoding(path):
        archive = zipfile.ZipFile(file)

    def read(name):
        with _decoding(f"{path}: {name}"):  # encrypted, broken, or compressed by an unknown method
            return archive.read(name)

    names = [name for name in archive.namelist() if not name.endswith(("/", "\\"))]  # some Windows programs write backslashes
    inside = {pathlib.PurePosixPath(name.replace("\\", "/").lstrip("/")): name for name in names}
    for file_path in sorted(inside):
        yield File(file_path, functools.partial(read, inside[file_path]))


# ------------------------------------------------------------------ splits


def _split(source):
    """Splits a Source into its own parts or, with a fixed seed, in chardata.mat's proportions: train, valid, test (Split)"""
    if source.parts is None:
        permutation = np.random.RandomState(123).permutation(len(source.obs))
        cut = round(len(source.obs) * CHARDATA_SIZES["train"] / (CHARDATA_SIZES["train"] + CHARDATA_SIZES["test"]))
        train, valid, test = permutation[:cut], permutation[:0], permutation[cut:]
    else:
        train, valid, test = (np.flatnonzero(source.parts == part) for part in ["train", "valid", "test"])
        if len(test) == 0:
            valid, test = test, valid
    train = train[np.random.RandomState(123).permutation(len(train))]
    if len(valid) == 0:
        num_valid = round(len(train) * CHARDATA_SIZES["valid"] / CHARDATA_SIZES["train"])
        train, valid = np.split(train, [len(train) - num_valid])
    alphabet = None if source.alphabet_ids is None else torch.eye(len(source.alphabet_names))[source.alphabet_ids]
    character = None if source.characters is None else torch.from_numpy(source.characters.astype(np.int64))
    whole = Split(torch.from_numpy(np.ascontiguousarray(source.obs, dtype=np.float32)), alphabet, character)
    return [whole.select(ids) for ids in (train, valid, test)]
