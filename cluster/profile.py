"""A site's defaults for Slurm, in a TOML file: --profile FILE, or ~/.config/strokes/slurm.toml if it exists.

    account = "lab"
    partition = "gpu"
    gres = "gpu:a100:1"
    setup = "module load cuda"

    [evaluations]           # what differs for evaluations
    time = "4:00:00"

    [models.mws_40]         # what differs for this model's jobs
    mem = "32G"

The command line takes precedence over all of it, a model's own table over that of evaluations, and that over the rest.
"""

import argparse
import difflib
import pathlib

import util
from util import UserError

DEFAULT_PATH = pathlib.Path("~/.config/strokes/slurm.toml")
# Options of the command line, with the values they have if nothing sets them; account and qos become options of sbatch
DEFAULTS = {
    "account": None, "partition": None, "qos": None, "gres": None, "mem": "16G", "time": None, "setup": "", "cpus_per_task": None,
    "sbatch": "", "mail": None,
}  # fmt: skip


def read(path=None):
    """Reads a profile: {"": defaults, "evaluations": {...}, "models.NAME": {...}}, {} if there is none.
    Raises: UserError if it is missing, broken, or has an unknown key"""
    chosen = util.expand_user(path or DEFAULT_PATH)
    if path is None and not chosen.is_file():
        return {}
    try:
        import tomllib
    except ImportError:
        raise UserError(f"{chosen}: reading a profile needs Python 3.11 or newer") from None
    try:
        content = tomllib.loads(util.read_file(chosen).decode())
    except OSError as error:
        raise UserError(f"cannot read {chosen} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{chosen} is not TOML: {error}") from None
    models = content.pop("models", {})
    tables = {"": {name: value for name, value in content.items() if name != "evaluations"}}
    tables["evaluations"] = content.get("evaluations", {})
    if not isinstance(models, dict):
        raise UserError(f"{chosen}: models must be a table; write [models.mws_40]")
    tables.update({f"models.{name}": table for name, table in models.items()})
    return {name: _check(chosen, name, table) for name, table in tables.items()}


def _check(path, name, table):
    where = f"{path}, [{name}]" if name else str(path)
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table")
    checked = {}
    for key, value in table.items():
        known = key.replace("-", "_")
        if known not in DEFAULTS:
            names = [other.replace("_", "-") for other in DEFAULTS] + ["evaluations", "models"] * (not name)
            close = difflib.get_close_matches(key, names, 3, 0.4) or names
            raise UserError(f"{where}: unknown key {key}; did you mean {', '.join(close)}?")
        if known == "cpus_per_task" and isinstance(value, int) and value >= 1:
            checked[known] = value
        elif known != "cpus_per_task" and isinstance(value, str | int) and not isinstance(value, bool):
            checked[known] = str(value)
        else:
            kind = "a positive whole number" if known == "cpus_per_task" else "text or a whole number"
            raise UserError(f"{where}: {key} must be {kind}, not {value!r}")
    return checked


def apply(args, profile, model, kind):
    """The arguments for one task's jobs: a namespace in which what the command line left open (None) is filled in, and where
    each value came from, {name: words}"""
    tables = ["", *["evaluations"] * (kind != "train"), f"models.{model}"]
    filled, sources = argparse.Namespace(**vars(args)), {}
    for name, default in DEFAULTS.items():
        value = getattr(args, name, None)
        if value is not None:
            sources[name] = "command line"
        else:
            value = default
            for table in tables:
                if name in profile.get(table, {}):
                    value, sources[name] = profile[table][name], f"profile [{table}]" if table else "profile"
        setattr(filled, name, value)
    words = [f"--{name}={value}" for name in ("account", "qos") if (value := getattr(filled, name)) is not None]
    filled.sbatch = " ".join([*words, filled.sbatch]).strip()
    if filled.gres is None:
        filled.gres = "none" if args.cuda is False else "gpu:1"
    return filled, sources
