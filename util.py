"""What every script needs: errors of one line, command lines, names of runs, files, randomness and devices."""

import argparse
import contextlib
import difflib
import errno
import hashlib
import inspect
import io
import itertools
import os
import pathlib
import re
import shlex
import signal
import sys
import time
import zipfile

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

SAVE = pathlib.Path("save")

# ------------------------------------------------------------------ errors

# Scripts fail with one line that says what is wrong and what to do, wherever their output goes.


class UserError(ValueError):
    """A problem that the user can fix; the message says in one line what it is and how."""


def run_script(main):
    """Calls main() and exits. Errors that the user can fix become one line on standard error
    and exit status 2."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see fast/before_torch.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError:
        message = "out of GPU memory; use a smaller --batch-size, fewer --num-particles or another GPU"
    except MemoryError:
        message = OUT_OF_MEMORY
    except RuntimeError as error:
        if not re.search("can't allocate memory|not enough memory|Storage size calculation overflowed", str(error)):
            raise
        message = OUT_OF_MEMORY
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # the message begins on a line of its own
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


OUT_OF_MEMORY = "out of memory: use fewer or smaller --batch-size, --num-particles, --memory-size or sizes of the model"


class Stream:
    """A standard stream that may be closed, full, or no longer read by anyone: what a run computes and saves must not
    depend on it"""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            encoding = self.stream.encoding or "utf-8"  # names of files may hold bytes that are no text
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            if "\n" in text:  # a log shows what happened when it happened
                self.stream.flush()
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self):
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def warn(message):
    """Prints a warning, as one line, to standard error"""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


# ------------------------------------------------------------------ command lines


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but errors take one line, flags cannot be abbreviated, and --help shows them in groups"""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.group = self

    def start_group(self, title):
        """Shows the arguments added from now on under this title"""
        self.group = self.add_argument_group(title)

    def add(self, flag, help, **options):
        """As add_argument, but defaults and types come from SETTINGS and TYPES, and defaults are shown in the help"""
        name = flag.strip("-").replace("-", "_")
        if options.get("action") not in ("store_true", argparse.BooleanOptionalAction):
            options.setdefault("default", SETTINGS.get(name))
            if "choices" not in options and name in TYPES:
                options.setdefault("type", TYPES[name])
            help += "" if options["default"] in (None, "") else " (default: %(default)s)"
        self.group.add_argument(flag, help=help, **options)

    def error(self, message):
        words = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        close = [difflib.get_close_matches(word, self._option_string_actions, 1) for word in words]
        suggestion = f", did you mean {close[0][0]}?" if message.startswith("unrecognized") and any(close[:1]) else ""
        message = message if len(message) <= 250 else f"{message[:120]} ... {message[-120:]}"
        raise UserError(f"{message}{suggestion or '; see --help'}")


def in_range(number, low, high=None):
    """The type of an argument: an int or float between low and high (by default the largest 32-bit integer, or a million)"""
    high = (2**31 - 1 if number is int else 1e6) if high is None else high

    def parse(text):
        value = number(text)
        if not low <= value <= high:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range ({low} to {high})")
        return value

    parse.__name__ = number.__name__  # argparse says "invalid int value"
    parse.range = low, high
    return parse


def to_run_name(text):
    """The type of --name: the name of a folder"""
    if not re.fullmatch(r"[\w][\w.=+-]{0,99}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no name for a folder: use up to 100 letters, digits, . _ = + -")
    return text


def to_location(text):
    """The type of --data-location: a name or a path"""
    if not text or "\0" in text or len(os.fsencode(text)) > 4096:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither a name nor a path")
    return text


LOG_INTERVAL = 20  # seconds between lines about progress
LOG_FORMAT = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def show_progress(*args, **kwargs):
    """A tqdm bar on standard error; where that is no terminal, lines of a log"""
    if sys.stderr.isatty():
        return tqdm(*args, mininterval=0.2, dynamic_ncols=True, **kwargs)
    interval = dict(mininterval=LOG_INTERVAL, maxinterval=LOG_INTERVAL)
    return tqdm(*args, file=Lines(sys.stderr), bar_format=LOG_FORMAT, **interval, **kwargs)


class Lines:
    """A stream on which each state of a tqdm bar becomes a line of its own, without carriage returns"""

    def __init__(self, stream):
        self.stream, self.last = stream, ""

    def write(self, text):
        line = text.strip()
        if line != self.last and re.search(r"\w", line):
            self.stream.write(f"{line}\n")
            self.stream.flush()
            self.last = line

    def flush(self):
        pass


# ------------------------------------------------------------------ run folders

# Every argument that changes what a run learns, with its default. The command line takes
# its defaults from here; a run's folder is named after the arguments that differ from them.
SETTINGS = dict(
    seed=0,
    data_location="local",
    small_dataset=False,
    dataset_size=None,
    find_characters=False,
    batch_size=250,
    condition_on_alphabet=False,
    likelihood="learned-affine",
    num_arcs=10,
    num_primitives=64,
    initial_max_curve=0.3,
    big_arcs=False,
    p_lstm_hidden_size=4,
    p_uniform_mixture=0.0,
    q_lstm_hidden_size=64,
    q_uniform_mixture=0.0,
    obs_embedding_dim=64,
    algorithm="mws",
    num_particles=10,
    prior_lr_factor=1.0,
    pretrain_iterations=10000,
)
NUM_ITERATIONS = 200000  # by default; not a setting, since a run can be continued for longer
_size, _share = in_range(int, 1, 10**5), in_range(float, 0, 1)
# What they may be: for the command line, and for the arguments in a checkpoint
TYPES = dict(
    seed=in_range(int, 0, 2**63 - 1),
    data_location=to_location,
    dataset_size=in_range(int, 1),
    batch_size=in_range(int, 1, 10**6),
    num_arcs=in_range(int, 1, 1000),
    num_primitives=in_range(int, 1, 16383),
    initial_max_curve=in_range(float, 0),
    p_lstm_hidden_size=_size,
    p_uniform_mixture=_share,
    q_lstm_hidden_size=_size,
    q_uniform_mixture=_share,
    obs_embedding_dim=_size,
    num_particles=in_range(int, 1, 10**6),
    prior_lr_factor=in_range(float, 0),
    pretrain_iterations=in_range(int, 0),
    num_iterations=in_range(int, 1),
    name=to_run_name,
)
HYPERPARAMETERS = {}  # algorithm -> {name: (default, lowest, highest, help)}, from add_hyperparameters


def add_hyperparameters(algorithm, function, **limits):
    """Declares an algorithm's own settings, which from here reach the command line, the run's name and its checkpoints.

    Args: function: has them as keyword arguments, with their defaults; limits: name=(lowest, highest, help)
    """
    parameters = inspect.signature(function).parameters
    own = {name: (parameters[name].default, *rest) for name, rest in limits.items()}
    HYPERPARAMETERS[algorithm] = own
    TYPES.update({name: in_range(type(default), low, high) for name, (default, low, high, _) in own.items()})
    SETTINGS.update({name: default for name, (default, *_) in own.items()})


def check_arguments(args):
    """What the values of main.py's arguments, a namespace, must be together. Raises: UserError"""
    if args.algorithm == "vimco" and args.num_particles < 2:
        raise UserError("--algorithm vimco needs --num-particles of at least 2")
    if args.q_uniform_mixture == 1:
        raise UserError("--q-uniform-mixture 1 leaves the inference network nothing to learn; give less")
    if args.initial_max_curve > 0.5 and not args.big_arcs:
        raise UserError(f"--initial-max-curve {args.initial_max_curve} is too large without --big-arcs; give at most 0.5")
    if args.small_dataset and args.dataset_size is not None:
        raise UserError("--small-dataset and --dataset-size exclude each other; give one")


def get_test_run_limits(likelihood):
    """The upper limits that --test-run puts on its arguments. `affine`, with its 2187 maps, gets fewer latents to stay
    under two minutes."""
    limits = dict(pretrain_iterations=20, num_iterations=40, save_interval=20, log_interval=5)
    limits.update(test_interval=20, test_batch_size=5, test_num_particles=10)
    size = dict(batch_size=2, num_particles=10, memory_size=10) if likelihood == "affine" else {}
    return {**limits, "batch_size": 10, "num_particles": 40, "memory_size": 40, **size}


def get_settings(args):
    """The arguments that change what a run learns, as a dict of plain values."""
    settings = {name: getattr(args, name, default) for name, default in SETTINGS.items()}
    settings.update({name: float(settings[name]) for name, default in SETTINGS.items() if type(default) is float})
    for algorithm, own in HYPERPARAMETERS.items():
        for name in own if algorithm != settings["algorithm"] else []:
            settings.pop(name)
    settings.setdefault("memory_size", 0)
    settings["data_location"] = get_location_name(settings["data_location"])
    settings["test_run"] = getattr(args, "test_run", False)
    return settings


def get_path_base(args):
    """The name of a run's folder in save/. Runs that differ in any argument that changes
    the result never share one.

    a_ if conditional, the algorithm, its number of latents per image (for mws
    particles + memory), _large unless small_dataset; then _<flag>=<value> for each
    other argument that is not at its default; or what --name says.
    """
    settings, defaults = get_settings(args), dict(SETTINGS)
    test_run = settings.pop("test_run")
    if getattr(args, "name", None):
        return "test_run_" * test_run + args.name
    if test_run:
        limits = get_test_run_limits(settings["likelihood"])
        defaults.update({name: min(limits[name], defaults[name]) for name in limits.keys() & defaults})
        defaults["data_location"] = "glyphs"
    conditional, small = settings.pop("condition_on_alphabet"), settings.pop("small_dataset")
    algorithm, num_particles = settings.pop("algorithm"), settings.pop("num_particles")
    memory_size = settings.pop("memory_size")
    defaults.pop("memory_size", None)
    total = num_particles + memory_size
    if algorithm == "mws" and memory_size != (total + 1) // 2:
        settings["memory_size"], defaults["memory_size"] = memory_size, None
    parts = [f"{'a_' if conditional else ''}{algorithm}_{total}{'' if small else '_large'}"]
    parts += [f"{name.replace('_', '-')}={value}" for name, value in settings.items() if value != defaults[name]]
    name = ("test_run_" if test_run else "") + "_".join(parts)
    if len(os.fsencode(name)) > 200:  # file systems allow 255 bytes
        short = os.fsencode(name)[:180].decode(errors="ignore")
        name = f"{short}_{hashlib.sha1(os.fsencode(name)).hexdigest()[:12]}"
    return name


def split_words(flag, text):
    """Splits an option's value into words as a shell would. Raises: UserError if a quote is left open"""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error}") from None


def get_location_name(location):
    """A name for a data location that can be part of a folder's name. The named copies of
    chardata.mat are the same data; paths that lead to the same place get the same name."""
    if location in ("local", "om"):
        return "local"
    if location == "glyphs":
        return location
    path = expand_user(location).resolve()
    stem = "".join(c if c.isalnum() or c in ".-" else "-" for c in path.name)[:40]
    return f"{stem}-{hashlib.sha1(os.fsencode(path)).hexdigest()[:8]}"


def expand_user(path):
    """Raises: UserError if it begins with the home of an unknown user"""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user") from None


# ------------------------------------------------------------------ files

CHECKPOINT_KEYS = {
    "args", "settings", "num_alphabets", "generative_model", "inference_network", "optimizer",
    "pretrain_optimizer", "memory", "statistics", "pretrain_iteration", "iteration", "random_state",
}  # fmt: skip


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values, as `write` does; the tensors move to the CPU, so that it loads anywhere"""
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, checkpoint), buffer)
    write(path, buffer.getbuffer())


def write(path, content):
    """Writes a file atomically: at any moment the path holds either the old file or the new one, also if several processes
    write it.

    Raises: UserError if it cannot be written; the old file stays
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{NODE}.{os.getpid()}.{next(NUMBERS)}.tmp")
    try:
        make_folder(path.parent)
        remove_leftovers(path.parent)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        sync(folder)
        os.close(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and run" if full else "fix that and run"
        raise UserError(
            f"cannot write {path} ({error.strerror}); what was saved before is intact: {advice} the same command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


NODE, NUMBERS = os.uname().nodename.split(".")[0][:32], itertools.count()  # they tell temporary files apart
LEFTOVER_SECONDS = 24 * 3600  # after which a temporary file of another machine was left by a crash


def remove_leftovers(folder):
    """Removes the temporary files in a folder whose processes were killed"""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\..*\.([^.]*)\.(\d+)\.\d+\.tmp", path.name)
        with contextlib.suppress(OSError):
            ended = match is not None and match[1] == NODE and not is_alive(int(match[2]))
            if ended or time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def is_alive(pid):
    """Whether this machine has such a process"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


def sync(descriptor):
    """Flushes a file or a folder to the disk, where the file system can"""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def make_folder(path):
    """Creates a folder and those above it, unless they exist. Raises: OSError; UserError if one is a link to nowhere"""
    check_links(path)
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def check_links(path):
    """Raises: UserError if a file or folder, or one above it, is a link to something that does not exist"""
    for part in [*reversed(pathlib.Path(path).parents), pathlib.Path(path)]:
        if part.is_symlink() and not part.exists():
            target = os.readlink(part)
            raise UserError(f"{part} is a link to {target}, which does not exist; create that, or remove the link")


def check_regular(path):
    """Raises: UserError if the path is that of a folder, a pipe or a device, whose reading could wait for ever"""
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
        raise UserError(f"{path} is not a file but a folder, a pipe or a device")


def read_file(path):
    """The bytes of a file. Raises: OSError; UserError if it is not a regular file"""
    check_regular(path)
    return pathlib.Path(path).read_bytes()


def load_checkpoint(path, device="cpu", keys=CHECKPOINT_KEYS):
    """Reads a dict that save_checkpoint wrote. Nothing in the file is executed.

    Raises: UserError if the file is missing, damaged, not a checkpoint (its keys
        must include `keys`), or holds anything but tensors and plain values
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged ({damaged} in it fails its checksum)")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as error:  # a broken file can make the readers raise anything
        reason = str(error).strip().split("\n")[0][:80] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program")
    return checkpoint


def describe_differences(theirs, ours):
    """Describes in words how two dicts of settings differ, those saved and those of this run; "" if they agree. A
    setting that did not exist when they were saved had its default; where the data are does not matter, only what they are."""
    theirs = {**{name: default for name, default in SETTINGS.items() if name in ours}, **theirs}
    names = [name for name, value in ours.items() if theirs.get(name) != value and name != "data_location"]
    return ", ".join(f"{name.replace('_', '-')} is {theirs.get(name)} there and {ours[name]} here" for name in names)


# ------------------------------------------------------------------ randomness


def set_seed(seed, device="cpu"):
    """Seeds torch and makes runs on the device reproducible bit for bit. On a GPU, torch's deterministic mode makes
    some operations wait for the CPU; it stays off, and steps use only operations that are deterministic anyway."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(torch.device(device).type == "cpu", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def get_random_state(device):
    """The states of the generators that a run on the device uses: a dict of byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    """Restores what get_random_state returned, on whatever device."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def get_available_memory():
    """Bytes that processes can still take: of the machine's memory or, if that is less, of what the container or the job
    around this process may have"""
    try:
        (available,) = re.findall(r"^MemAvailable: *(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.M)
        machine = 1024 * int(available)
    except (OSError, ValueError):  # not on Linux
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *get_memory_of_groups()])


def get_memory_of_groups(table="/proc/self/cgroup", mount="/sys/fs/cgroup"):
    """Bytes that this process's control groups, of either version, and those around them may still take; what they cache of
    files does not count, since it makes room"""
    try:
        lines = [line.split(":", 2) for line in pathlib.Path(table).read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, group in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, parts = pathlib.Path(mount, "memory" if controllers else ""), group.strip("/").split("/")
        names = ["memory.limit_in_bytes", "memory.usage_in_bytes"] if controllers else ["memory.max", "memory.current"]
        for depth in range(len(parts) + 1):  # in a container, its own group may be mounted as the root
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                folder = root.joinpath(*parts[:depth])
                limit, usage = (int((folder / name).read_text()) for name in names)
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                prefix = "total_" if "total_inactive_file" in cached else ""
                usage -= sum(int(cached.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                found.append(max(limit - usage, 0))
    return found


def get_cores():
    """The numbers of the cores that this process may use"""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def get_device(cuda):
    """Raises: UserError if a GPU is requested and none is usable"""
    if not cuda:
        return torch.device("cpu")
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--cuda: there is no usable GPU ({reason}); run without --cuda") from None
    return torch.device("cuda")
