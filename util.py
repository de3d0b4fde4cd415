"""What every script needs: one-line errors, settings, command lines, files, randomness and devices."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import inspect
import io
import os
import pathlib
import random
import re
import shlex
import signal
import sys
import time
import traceback
import types
import typing
import uuid
from collections.abc import Callable
from typing import Annotated, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

SAVE = pathlib.Path("save")

# ------------------------------------------------------------------ errors

# Wherever their output goes, scripts fail with one line that says what is wrong and what to do.


class UserError(argparse.ArgumentTypeError, ValueError):
    """A problem that the user can fix; the message says what is wrong and how to fix it, in one line. Parsers of arguments
    raise it as well."""


class Unreadable(UserError):
    """A file that cannot be read now, but may be intact"""


def run_script(main):
    """Calls main() and exits. Errors that the user can fix become one line on standard error and exit status 2; --debug shows
    their traceback."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see fast/before_torch.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = describe_error(error)
        if message is None:
            raise
        if "--debug" in sys.argv:
            error.__suppress_context__ = False
            traceback.print_exception(error)
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # the message begins on a line of its own
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def describe_error(error):
    """What is wrong and what to do, if the user can fix an error, else None"""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; use a smaller --batch-size, fewer --num-particles or another GPU"
    if isinstance(error, OSError):
        path = error.filename
        return describe_dead_link(path) or f"{error.strerror or error}{f': {path}' if path else ''}"
    if is_out_of_memory(error):
        return "out of memory; use a smaller --batch-size, --memory-size or model, or fewer --num-particles"


def describe_dead_link(path):
    """What is wrong if a path, or None, is a link to nothing; else None"""
    if path and os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist"


def is_out_of_memory(error):
    """Whether memory ran out: whatever was being read or used may be intact"""
    of_memory = "can't allocate memory|not enough memory|Storage size calculation overflowed"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(of_memory, str(error)) is not None


def get_reason(error, length=80):
    """The first line of an exception's message, cut, or its kind if it has none"""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


def count(number, noun):
    """A number of things in words, such as "1 image" or "2 images"."""
    return f"{number} {noun}{'s' * (number != 1)}"


class Stream:
    """A standard stream that may be closed, full, or no longer read by anyone: what a run computes and saves must not
    depend on it"""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            encoding = self.stream.encoding or "utf-8"  # file names may hold bytes that are not text
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            if "\n" in text:  # so that a log is always up to date
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


warn_once = functools.cache(warn)

# ------------------------------------------------------------------ settings

# A setting is declared once, annotated with a type and a Setting: as a field of Config or, if it belongs to one algorithm or
# likelihood, as a keyword argument of that. The command line, run names, checkpoints, comparisons of runs, the limits of test
# runs and the sweep follow from the declaration.

CHOICES = {}  # field of Config -> {choice: function or class, whose annotated arguments are its own settings}


class Setting(NamedTuple):
    """Describes a setting, beyond its name, type and default"""

    help: str
    low: float | None = None  # the least a number may be
    high: float | None = None  # by default, the largest 32-bit integer, or a million
    parse: Callable | None = None  # from the command line's text; raises UserError or argparse.ArgumentTypeError
    group: str = "training"  # in the help
    limit: float | None = None  # the largest value that --test-run allows
    changes_result: bool = True  # whether it affects what a run computes, and so belongs in its name
    formerly: str | None = None  # its name before it was renamed, used in older checkpoints, run names and command lines


class Field(NamedTuple):
    """A setting as it was declared"""

    name: str
    type: type
    default: object
    setting: Setting
    owners: tuple  # the (field of Config, choice) pairs that it belongs to; () for all runs

    def get_parser(self):
        """The function that parses a value; it raises ValueError or argparse.ArgumentTypeError"""
        is_number = self.type in (int, float)
        return self.setting.parse or (in_range(self.type, self.setting.low, self.setting.high) if is_number else self.type)


def in_range(number, low=None, high=None):
    """The type of an argument: an int or float between low and high (by default, zero and the largest 32-bit integer or a
    million)"""
    low, high = 0 if low is None else low, (2**31 - 1 if number is int else 1e6) if high is None else high

    def parse(text):
        value = number(text)
        if not low <= value <= high:  # nan is in no range
            raise UserError(f"{text[:40]} is out of range ({low} to {high})")
        return value

    parse.__name__ = number.__name__  # argparse says "invalid int value"
    return parse


def to_run_name(text):
    """The type of --name: the name of a folder"""
    if not isinstance(text, str) or not re.fullmatch(r"[\w][\w.=+-]{0,254}", text, re.ASCII):
        raise UserError(f"{str(text)[:40]!r} is not a valid folder name; use letters, digits, . _ = + -")
    return text


def to_location(text):
    """The type of --data-location: a name or a path"""
    if not text or "\0" in text or len(os.fsencode(text)) > 4096:
        raise UserError(f"{text[:40]!r} is neither a name nor a path")
    return text


GROUPS = ["run", "data", "model", "training", "saving and logging"]  # in the help, in this order
_run = functools.partial(Setting, group="run", changes_result=False)
_data = functools.partial(Setting, group="data")
_model = functools.partial(Setting, group="model")
_saving = functools.partial(Setting, group="saving and logging", changes_result=False)


@dataclasses.dataclass
class Config:
    """The configuration of a run. Run names list settings in the order of these fields."""

    test_run: Annotated[bool, _run("shrink everything, to try out a whole run in under two minutes")] = False
    cuda: Annotated[bool, _run("use a GPU")] = False
    name: Annotated[str | None, _run("folder in save/ (default: derived from the settings)", parse=to_run_name)] = None
    seed: Annotated[int, Setting("seed of all random numbers", 0, 2**63 - 1, group="run")] = 0
    compile: Annotated[bool | None, _run("compile the hot path; on a GPU, replay CUDA graphs (default: not in test runs)")] = (
        None
    )
    data_location: Annotated[
        str,
        _data("local, om, glyphs, .mat, .npy, .npz, .zip or folder (default: local; in a test run glyphs)", parse=to_location),
    ] = "local"
    small_dataset: Annotated[bool, _data("train on 10 images per alphabet")] = False
    dataset_size: Annotated[int | None, _data("training images, equally many per alphabet (default: all)", 1)] = None
    find_characters: Annotated[bool, _data("find the characters on the photographs and scans of a folder")] = False
    batch_size: Annotated[int, Setting("images per step", 1, 10**6, limit=10)] = 250
    condition_on_alphabet: Annotated[bool, _model("condition the prior and the inference network on the alphabet")] = False
    likelihood: Annotated[str, _model("likelihood of an image given a drawing")] = "learned-affine"
    num_arcs: Annotated[int, _model("strokes per character, including the invisible first one", 1, 1000)] = 10
    num_primitives: Annotated[int, _model("strokes in the library", 1, 16383)] = 64
    initial_max_curve: Annotated[float, _model("initial curvature of strokes; at most 0.5 without --big-arcs")] = 0.3
    big_arcs: Annotated[bool, _model("allow strokes of more than half a circle")] = False
    p_lstm_hidden_size: Annotated[int, _model("hidden units of the prior's LSTM", 1, 10**5)] = 4
    p_uniform_mixture: Annotated[float, _model("weight of a uniform distribution in the prior's choices", 0, 1)] = 0.0
    q_lstm_hidden_size: Annotated[int, _model("hidden units of the inference network's LSTM", 1, 10**5)] = 64
    q_uniform_mixture: Annotated[float, _model("weight of a uniform distribution in the network's choices", 0, 1)] = 0.0
    obs_embedding_dim: Annotated[int, _model("dimension of an image's embedding", 1, 10**5)] = 64
    algorithm: Annotated[str, Setting("objective; sleep is RWS with the sleep update of phi")] = "mws"
    num_particles: Annotated[int, Setting("proposals per image (vimco: at least 2)", 1, 10**6, limit=40)] = 10
    prior_lr_factor: Annotated[float, Setting("learning rate of the prior, relative to the others' 1e-3")] = 1.0
    pretrain_iterations: Annotated[int, Setting("sleep steps that train the inference network first", limit=20)] = 10000
    num_iterations: Annotated[int, Setting("steps of the algorithm", 1, limit=40, changes_result=False)] = 200000
    save_interval: Annotated[int, _saving("iterations between checkpoints", 1, limit=20)] = 1000
    save_minutes: Annotated[float, _saving("minutes between checkpoints, if sooner", 0.01)] = 5.0
    log_interval: Annotated[int, _saving("iterations between updates of the progress bar and losses.csv", 1, limit=5)] = 10
    tensorboard: Annotated[bool, _saving("also log for TensorBoard")] = False
    test_interval: Annotated[
        int | None,
        _saving("iterations between tests (default: never); with --small-dataset, of its training images", 1, limit=20),
    ] = None
    test_batch_size: Annotated[int, _saving("images per step of a test", 1, limit=5)] = 5
    test_num_particles: Annotated[int, _saving("samples per image in a test", 1, limit=10)] = 1000


def get_fields():
    """All settings by name: a dict of Fields, those of algorithms and likelihoods at the end"""
    fields = {field.name: make_field(field.name, field.type, field.default) for field in dataclasses.fields(Config)}
    for name, choices in CHOICES.items():
        for choice, function in choices.items():
            for own in get_own_fields(function):
                known = fields.setdefault(own.name, own)
                if known[1:4] != own[1:4]:
                    others = ", ".join(other for _, other in known.owners) or "Config"
                    raise UserError(
                        f"the setting {own.name} of {choice} has another type, default or range than that of {others}: rename"
                        " it, or declare both alike"
                    )
                if known is own or known.owners:  # not one of Config's, which all runs have
                    fields[own.name] = known._replace(owners=(*known.owners, (name, choice)))
    for name, field in fields.items():
        if field.setting.formerly in fields:
            raise UserError(
                f"the setting {name} was formerly {field.setting.formerly}, as another one is called now: rename that"
            )
    return fields


@functools.cache
def get_own_fields(function):
    """The settings that an algorithm or likelihood declares: a list of Fields, without those that a functools.partial
    fixes"""
    fields, fixed = [], get_fixed(function)
    for part in filter(None, [function, get_init_state(function)]):
        try:
            parameters = inspect.signature(part, eval_str=True).parameters
        except ValueError:  # a built-in function may have none, and declares no settings
            continue
        for name, parameter in parameters.items():
            kind = parameter.annotation
            if get_origin(kind) is Annotated and isinstance(kind.__metadata__[0], Setting) and name not in fixed:
                fields.append(make_field(name, kind, parameter.default))
    return fields


def get_init_state(objective):
    """The function that losses.keeps declared for an objective, or for the one that a functools.partial wraps; else None"""
    wrapped = getattr(objective, "func", None)
    return getattr(objective, "init_state", getattr(wrapped, "init_state", None))


def get_fixed(function):
    """The arguments, by name, that a functools.partial fixes"""
    return function.keywords if isinstance(function, functools.partial) else {}


def make_field(name, kind, default):
    """Raises: ValueError if the default is missing or not a valid value"""
    setting = kind.__metadata__[0]
    plain = kind.__origin__
    if get_origin(plain) in (types.UnionType, typing.Union):  # of float | None
        plain = next(x for x in get_args(plain) if x is not type(None))
    if setting.parse is not None:
        plain = get_origin(plain) or plain  # of tuple[float, ...]
    field = Field(name, plain, default, setting, ())
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        raise ValueError(f"the setting {name} needs a default (a tuple rather than a list)")
    if setting.parse is None and (not isinstance(plain, type) or issubclass(plain, list | tuple | dict | set)):
        raise ValueError(f"the setting {name} needs a plain type such as str, not {plain}, or a function parse=")
    if plain in (int, float) and default is not None:
        try:
            field.get_parser()(repr(default))
        except argparse.ArgumentTypeError as error:  # a UserError, or that of a researcher's own parser
            raise ValueError(f"the setting {name}: its default {error}; declare the lowest and the highest value") from None
        except ValueError:
            raise ValueError(
                f"the setting {name}: its default {default!r} is not of the type {plain.__name__}; declare that of the default"
            ) from None
    return field


def get_own_settings(args, name):
    """The values of the chosen algorithm's or likelihood's own settings, by name. Args: name: algorithm or likelihood"""
    return {own.name: getattr(args, own.name) for own in get_own_fields(CHOICES[name][getattr(args, name)])}


def make_args(saved):
    """Converts a checkpoint's arguments, a dict, to a namespace: missing settings get their defaults, within the limits of a
    test run, renamed ones keep their values, and those that no longer exist stay as they are"""
    args, added = dict(saved), {}
    for name, field in get_fields().items():
        if name not in args and field.setting.formerly in args:
            args[name] = args.pop(field.setting.formerly)
        elif name not in args:
            added[name] = field.default
    return argparse.Namespace(**args, **limit(added, argparse.Namespace(**args, **added)))


def warn_of_removed(checkpoint):
    """Warns of settings of a checkpoint that this version does not have. Args: checkpoint: from `runs.checkpoints.load`"""
    for name, value in checkpoint.get("removed", {}).items():
        warn_once(f"the checkpoint has a setting {name.replace('_', '-')} ({value}), which no longer exists and is ignored")


def get_settings(args):
    """The settings that affect what a run with these arguments, a namespace, learns: a dict of plain values"""
    settings = {}
    for name, field in get_fields().items():
        is_used = not field.owners or any(getattr(args, owner) == choice for owner, choice in field.owners)
        if field.setting.changes_result and is_used:
            value = getattr(args, name, field.default)
            settings[name] = float(value) if field.type is float and type(value) is int else value
    settings["data_location"] = get_location_name(settings["data_location"])
    return {**settings, "test_run": args.test_run}


def get_first_names(values):
    """Values of settings by the names that these had before any renaming, which names of runs keep: a dict"""
    fields = get_fields()
    return {fields[name].setting.formerly or name if name in fields else name: value for name, value in values.items()}


def describe_differences(theirs, ours):
    """Describes how two dicts of settings, the saved ones and this run's, differ; "" if they agree. The data matter, but not
    their location."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name) and name != "data_location"]
    return ", ".join(f"{name.replace('_', '-')} is {theirs.get(name)} there and {ours.get(name)} here" for name in names)


def get_path_base(args):
    """The name of a run's folder in save/. Runs that differ in any argument that affects the result never share one.

    It is what --name says, or consists of a_ if conditional, the algorithm, its number of latents per image (particles and,
    if it has a memory, those remembered), _large unless small_dataset, and _<flag>=<value>, the seed's first, for each other
    argument that is not at its default; test_run_ comes before either.

    Raises: UserError if it is not a valid folder name, which the arguments of a foreign file may imply
    """
    settings = get_first_names(get_settings(args))
    test_run = "test_run_" * bool(settings.pop("test_run"))
    if getattr(args, "name", None):
        return to_run_name(test_run + args.name)
    defaults = {name: field.default for name, field in get_fields().items()} | RUN_DEFAULTS[bool(test_run)]
    defaults = get_first_names(limit(defaults, args))
    conditional, small, seed = (settings.pop(name) for name in ("condition_on_alphabet", "small_dataset", "seed"))
    algorithm, num_particles = settings.pop("algorithm"), settings.pop("num_particles")
    total = num_particles + settings.get("memory_size", 0)
    if settings.get("memory_size") == (total + 1) // 2:  # the paper's choice
        settings.pop("memory_size")
    else:
        defaults["memory_size"] = None
    first = f"{test_run}{'a_' * bool(conditional)}{algorithm}_{total}{'' if small else '_large'}"
    changed = {name: get_text(value) for name, value in settings.items() if value != defaults[name]}
    plain = {name: text if re.fullmatch(r"[\w.=+-]*", text, re.ASCII) else make_name(text) for name, text in changed.items()}
    others = [f"_{name.replace('_', '-')}={text}" for name, text in plain.items()]
    name = "".join([first, *others])
    if len(os.fsencode(name)) > 200:  # file systems allow 255 bytes
        short = os.fsencode(name)[:180].decode(errors="ignore")
        name = f"{short}_{hashlib.sha1(os.fsencode(name)).hexdigest()[:12]}"
    seeded = f"_seed={seed}" * (seed != defaults["seed"])  # never cut off: names of other seeds differ in nothing else
    return to_run_name(first + seeded + name.removeprefix(first))


def get_text(value):
    """A setting's value as on a command line"""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Where sites keep chardata.mat; $OMNIGLOT_PATH takes precedence. To add a site, add a line.
SITES = {
    "local": pathlib.Path(__file__).resolve().parent / "datasets/omniglot/chardata.mat",
    "om": pathlib.Path("/om2/user", os.environ.get("USER", ""), "datasets/omniglot/omniglot.mat"),
}


def get_location_name(location):
    """A name for a data location that can be part of a folder's name. Named copies of chardata.mat are the same data; paths
    that lead to the same place get the same name."""
    if location in SITES:
        return "local"
    if location == "glyphs":
        return location
    path = expand_user(location).resolve()
    return make_name(path.name, path)


def make_name(text, whole=None):
    """A part of a folder's name that stands for a text: its plain characters, and a hash of the whole text"""
    stem = "".join(c if c.isascii() and c.isalnum() or c in ".-" else "-" for c in text)[:40]
    return f"{stem}-{hashlib.sha1(os.fsencode(whole or text)).hexdigest()[:8]}"


def expand_user(path):
    """A path whose ~ is replaced; unlike pathlib's, it leaves ~user as it is if there is no such user"""
    return pathlib.Path(os.path.expanduser(path))


# ------------------------------------------------------------------ command lines


class ArgumentParser(argparse.ArgumentParser):
    """Like argparse's, but errors take one line, flags cannot be abbreviated, and --help shows them in groups"""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.group = self
        self.add_argument("--debug", help="show the traceback of an error", action="store_true", default=argparse.SUPPRESS)

    def start_group(self, title):
        """Shows the arguments added from now on under this title"""
        self.group = self.add_argument_group(title)

    def add(self, flag, help, *others, **options):
        """Like add_argument, but the help shows the default. Args: others: flags that mean the same"""
        if options.get("action") not in ("store_true", argparse.BooleanOptionalAction):
            shows_default = options.get("default") not in (None, "") and "(default" not in help
            help += " (default: %(default)s)" * shows_default
        self.group.add_argument(flag, *others, help=help, **options)

    def add_fields(self):
        """Adds all settings, by group"""
        own = [field.setting.group for field in get_fields().values()]
        for group in dict.fromkeys([*GROUPS, *own]):
            self.start_group(group)
            for field in [field for field in get_fields().values() if field.setting.group == group]:
                self._add_field(field)

    def _add_field(self, field):
        flag, choices = f"--{field.name.replace('_', '-')}", CHOICES.get(field.name)
        formerly = [f"--{field.setting.formerly.replace('_', '-')}"] if field.setting.formerly else []
        owners = ", ".join(choice for _, choice in field.owners)
        help = (f"{owners}: {field.setting.help}" if owners else field.setting.help).replace("%", "%%")
        if field.type is bool:
            action = "store_true" if field.default is False else argparse.BooleanOptionalAction
            self.add(flag, f"{help} (default: yes)" if field.default else help, *formerly, action=action, default=field.default)
        else:
            self.add(flag, help, *formerly, type=field.get_parser(), choices=choices, default=field.default)

    def error(self, message):
        raise UserError(f"{message[:300]}; see --help")


def limit(values, args):
    """Values of settings, a dict, within the limits of a test run if args, a namespace, are of one. A likelihood may lower the
    limits, to stay under two minutes"""
    if not args.test_run:
        return values
    limits = {name: field.setting.limit for name, field in get_fields().items() if field.setting.limit is not None}
    limits |= getattr(CHOICES["likelihood"][args.likelihood], "test_run_limits", {})
    lowered = {
        name: most if values[name] is None else min(values[name], most) for name, most in limits.items() if name in values
    }
    return {**values, **lowered}


# Defaults that depend on --test-run. They do not depend on the number of iterations, which must not change bits
RUN_DEFAULTS = {False: {"compile": True}, True: {"compile": False, "data_location": "glyphs"}}


def get_run_default(name, test_run):
    """The value of a setting that is not given"""
    return RUN_DEFAULTS[test_run].get(name, get_fields()[name].default)


def get_flags(args):
    """The flags of main.py, a list of words, that yield these arguments, a namespace, except for --cuda"""
    flags = []
    for name, field in get_fields().items():
        default = get_run_default(name, args.test_run)
        value, flag = getattr(args, name, default), f"--{name.replace('_', '-')}"
        if value == default or (value is None and field.default is None) or name == "cuda":
            continue
        if field.type is bool:
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags.append(f"{flag}={write_value(field, value)}")
    return flags


def write_value(field, value):
    """The text of a setting's value on a command line. Raises: UserError if its own function `parse` does not read it back"""
    if value is None:
        return "none"  # as a parser that yields None would read
    text = get_text(value)
    try:
        is_read = field.setting.parse is None or field.setting.parse(text) == value
    except Exception:  # from a researcher's own function
        is_read = False
    if not is_read:
        raise UserError(f"the setting {field.name} cannot be passed on: its function parse does not read {text!r} as {value!r}")
    return text


def split_words(flag, text):
    """Splits an option's value into words as a shell would. Raises: UserError if a quote is left open"""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error}") from None


LOG_INTERVAL = 20  # seconds between lines about progress
LOG_FORMAT = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def show_progress(*args, **kwargs):
    """A tqdm bar on standard error or, if that is not a terminal, lines of a log"""
    if sys.stderr.isatty():
        return tqdm(*args, mininterval=0.2, dynamic_ncols=True, **kwargs)
    interval = dict(mininterval=LOG_INTERVAL, maxinterval=LOG_INTERVAL)
    return tqdm(*args, file=Lines(sys.stderr), bar_format=LOG_FORMAT, **interval, **kwargs)


class Lines:
    """A stream that writes each state of a tqdm bar as a line of its own, without carriage returns"""

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


# ------------------------------------------------------------------ files

FORMAT = 1  # the layout of files, which all versions 1.x read
LEFTOVER_SECONDS = 600  # after which a temporary file counts as left behind by a killed process
DIGEST = b"sha256 "  # begins the comment at the end of a file; the digest of everything before follows


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values, as `write` does; the tensors move to the CPU, so that it loads anywhere"""
    write(path, encode(checkpoint))


def encode(checkpoint):
    """The bytes of a file: torch.save's zip archive, with a digest of everything before it as its comment"""
    buffer = io.BytesIO()
    plain = tree_map_only(np.generic, np.generic.item, {"format": FORMAT, **checkpoint})
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, plain), buffer)
    content = buffer.getvalue()[:-2]  # without the length of its empty comment
    length = len(DIGEST) + 2 * hashlib.sha256().digest_size
    content += length.to_bytes(2, "little") + DIGEST
    return content + hashlib.sha256(content).hexdigest().encode()


def decode(content, device="cpu"):
    """The inverse of `encode`. Nothing in the file is executed. Raises: ValueError if the digest is missing or wrong"""
    before, mark, digest = content.rpartition(DIGEST)
    if hashlib.sha256(before + mark).hexdigest().encode() != digest:
        raise ValueError("its digest is missing or wrong")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def write(path, content):
    """Writes a file atomically: at any moment the path holds either the old file or the new one, even if several processes
    write it.

    Raises: UserError if it cannot be written; the old file stays
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """A context in which a file is written. Raises: UserError in place of an OSError"""
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        reason = describe_dead_link(error.filename) or error.strerror
        raise UserError(
            f"cannot write {path} ({reason}); what was saved before is intact: {advice} and run the same command again"
        ) from None


def remove_leftovers(path):
    """Removes the temporary files of processes that were killed while writing this file"""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process removed it
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def sync_folder(path):
    """Flushes a folder's list of names to the disk, where the file system can"""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path, device="cpu", keys=frozenset({"args", "generative_model", "iteration"})):
    """Reads a dict that save_checkpoint wrote. Nothing in the file is executed.

    Raises: UserError if the file is missing, damaged, or of another version or kind (without `keys`); Unreadable; MemoryError or
        RuntimeError if it does not fit in memory
    """
    try:
        checkpoint = decode(pathlib.Path(path).read_bytes(), device)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a broken file can make readers raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is damaged or not a checkpoint ({get_reason(error)}); if a version before 1.0 wrote it,"
            " python -m runs.convert rewrites it"
        ) from None
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program, or one of another kind")
    if checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is from another version (format {checkpoint.get('format')}, not {FORMAT})")
    return checkpoint


# ------------------------------------------------------------------ randomness


def fold_seed(seed):
    """A seed of 32 bits, all that torch's generator on a CPU takes: smaller seeds are kept, larger ones hashed"""
    return seed if seed < 2**32 else int(hashlib.sha256(str(seed).encode()).hexdigest()[:8], 16)


def set_seed(seed, device="cpu"):
    """Seeds torch and makes runs on the device reproducible bit for bit. On a GPU, torch's deterministic mode makes
    some operations wait for the CPU; it stays off, and steps use only operations that are deterministic anyway."""
    torch.manual_seed(fold_seed(seed))
    np.random.seed(fold_seed(seed))
    random.seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    # use_deterministic_algorithms also tells the compiler, whose import takes a second or two; its kernels here are
    # deterministic anyway
    torch.set_deterministic_debug_mode("warn" if torch.device(device).type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False


def get_random_state(device):
    """The states of the generators that a run on the device may use, those of NumPy and Python among them: a dict"""
    version, values, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    state = {
        "cpu": torch.get_rng_state(),
        "python": (version, torch.tensor(values), gauss),
        "numpy": (name, torch.from_numpy(key.astype(np.int64)), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    """Restores what get_random_state returned, on any device."""
    torch.set_rng_state(state["cpu"].cpu())
    if "numpy" in state:
        (version, values, gauss), (name, key, *rest) = state["python"], state["numpy"]
        random.setstate((version, tuple(values.tolist()), gauss))
        np.random.set_state((name, key.tolist(), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def get_device(cuda):
    """Raises: UserError if a GPU is requested but none is usable"""
    if not cuda:
        return torch.device("cpu")
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:
        raise UserError(f"--cuda: there is no usable GPU ({get_reason(error, 200)}); run without --cuda") from None
    return torch.device("cuda")
