"""Checkpoints: where they are, what is in them, and how a run's parts are saved and restored.

A checkpoint is a dict of main.py's arguments, the data's fingerprint, the position in training, statistics, random states and
the state of each part of the run, under the part's name. Its digest is checked (util.load_checkpoint), but its contents are
trusted. Whatever does not fit is found on use: by load_state_dict, or by comparing settings.
"""

import argparse
import collections
import contextlib
import filecmp
import glob
import hashlib
import itertools
import os
import pathlib
import pickle

import torch
from torch.utils._pytree import tree_leaves

import losses  # it and models declare settings
import util
from util import UserError, warn

RESULT_KEYS = {
    "args", "settings", "log_p", "log_p_by_image", "standard_error", "enumeration_bound", "enumeration_bound_by_image",
    "latents", "statistics", "run", "model_settings", "model_iteration",
}  # fmt: skip
# Besides those of TYPES, names that parts of a run cannot have
RESERVED = {"format", "path", "settings", "removed", "debug", "alphabet_names", "requires_grad", "changed_args"}
TYPES = dict(
    args=dict, data=str, data_summary=str, num_alphabets=int, generative_model=dict, inference_network=dict,
    pretrain_iteration=int, iteration=int, num_due=int, num_called=int, reason=str, statistics=dict, random_state=dict,
    hyperparameters=dict,
)  # fmt: skip
RATES = ["lr", "initial_lr"]  # what schedules change
PROGRESS = {  # what changes in a schedule's state as it steps
    "last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i", "_step_count", "_last_lr", "_is_initial",
    "_get_lr_called_within_step",
}  # fmt: skip
OF_DEVICES = {"fused", "capturable", "foreach", "differentiable"}  # optimiser options that depend on the device alone

# ------------------------------------------------------------------ finding


def get_path(path_base, iteration="latest"):
    """Where a run's checkpoint is in save/"""
    return util.SAVE / path_base / "checkpoints" / f"{iteration}.pt"


def find(path):
    """Finds the checkpoint that a user refers to: a file, the latest one of a run (given by its folder or its name), or a
    pretrained model (given as pretrained/<name>, from any working directory).

    Raises: UserError if there is none; the message lists the existing runs
    """
    pretrained = pathlib.Path(__file__).resolve().parents[1] / "pretrained" / f"{pathlib.Path(path).stem}.pt"
    newest = [found for latest in get_latest(path) for found in get_all(latest)[-1:]]
    candidates = [pathlib.Path(path), pathlib.Path(f"{path}.pt"), *newest]
    candidates += [pretrained] * (pathlib.Path(path).parent == pathlib.Path("pretrained"))
    if found := next(filter(os.path.isfile, candidates), None):
        return found
    runs = sorted({found.parents[1].name for found in util.SAVE.glob("*/checkpoints/*.pt")})
    there = f"{util.SAVE}/ holds {', '.join(runs)}" if runs else f"{util.SAVE}/ holds no run: train one with python main.py"
    there += f"; pretrained/{pretrained.stem} is a pretrained model" * pretrained.is_file()
    raise UserError(f"there is no checkpoint {path}; {there}")


def get_latest(path):
    """Where the latest checkpoint of a run is, if a user gives the run's folder or its name"""
    return pathlib.Path(path, "checkpoints/latest.pt"), get_path(path)


def get_numbered(folder, suffix="pt"):
    """The paths of the numbered checkpoints in a folder, or of other files, in order"""
    paths = [path for path in pathlib.Path(folder).glob(f"*.{suffix}") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem))


def get_all(path):
    """The paths of all checkpoints of a run, given one of them: numbered ones in order, then the latest and the given one"""
    path = pathlib.Path(path)
    paths = dict.fromkeys([*get_numbered(path.parent), path.with_name("latest.pt"), path])
    return list(filter(pathlib.Path.exists, paths))


def is_of_run(checkpoint, settings):
    """Whether a checkpoint, one beside another, is of the same run, whose settings are given; if not, warns"""
    differences = util.describe_differences(checkpoint["settings"], settings)
    if differences:
        warn(f"{checkpoint['path']} is left out: it is of another run: {differences}")
    return not differences


def get_run_name(checkpoint):
    """The name of a checkpoint's run, given what `load` returns: that of its folder in save/ or, for a checkpoint from elsewhere,
    the one implied by its arguments, with "-from-<folder>" appended if save/ holds another run of that name"""
    given = pathlib.Path(checkpoint["path"]).absolute().parent
    for folder in (given, given.resolve()):  # a run's folder may be a link, or reached by one
        if folder.name == "checkpoints" and folder.parent.parent.resolve() == util.SAVE.resolve():
            return folder.parent.name
    name = util.get_path_base(argparse.Namespace(**checkpoint["args"]))
    ours = list((util.SAVE / name / "checkpoints").glob("*.pt"))
    if not ours or any(filecmp.cmp(checkpoint["path"], path, shallow=False) for path in ours):  # none there, or a copy
        return name
    while folder.name in ("checkpoints", "save", name):
        folder = folder.parent
    return f"{name}-from-{folder.name or 'elsewhere'}"


def find_run(args, get_fingerprint):
    """The name of the folder in save/ of a run with main.py's arguments, a namespace: that of util.get_path_base or, if it does
    not exist, of a run with the same data from another location.

    Args: get_fingerprint: a function without arguments that returns the fingerprint of the training data
    """
    name = util.get_path_base(args)
    if args.name or get_path(name).exists():
        return name
    default = util.get_run_default("data_location", args.test_run)
    there, elsewhere = (util.get_path_base(argparse.Namespace(**{**vars(args), "data_location": x})) for x in (default, "/x"))
    start = elsewhere.split("data-location=")[0]  # what follows it may be cut off
    ours, iterations = util.get_settings(args), {}
    for folder in [util.SAVE / there, *util.SAVE.glob(f"{glob.escape(start)}data-location=*")]:
        checkpoint = None
        with contextlib.suppress(UserError):  # the run itself will report damage
            checkpoint = load_newest(get_path(folder.name), warn=lambda _: None)
        if checkpoint is not None:
            settings = {**checkpoint["settings"], **checkpoint["removed"]}
            is_same = not util.describe_differences(settings, {**ours, "data": settings["data"]})
            if is_same and settings["data"] == get_fingerprint():
                iterations[folder.name] = checkpoint["iteration"]
    return max(iterations, key=iterations.get, default=name)


def get_digest(checkpoint):
    """Identifies a checkpoint's model: a hash of the generative model's parameters, and the iteration; in pretraining, which
    changes the inference network alone, of the network's as well"""
    digest, names = hashlib.sha1(), ["generative_model"] + ["inference_network"] * (checkpoint["iteration"] == 0)
    for value in tree_leaves([checkpoint[name] for name in names]):
        is_tensor = torch.is_tensor(value)  # get_extra_state may return anything
        content = value.cpu().contiguous().flatten().view(torch.uint8).numpy() if is_tensor else repr(value).encode()
        digest.update(content)
    return f"{digest.hexdigest()[:12]} at iteration {checkpoint['iteration']}"


# ------------------------------------------------------------------ loading


def load(path, device="cpu"):
    """Loads a checkpoint of main.py, see `fill_in`; its path is in it. Raises: UserError if it cannot be read or used"""
    checkpoint = util.load_checkpoint(path, device)
    try:
        return {**fill_in(checkpoint), "path": str(path)}
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a foreign file's arguments may be anything
        reason = f"its arguments are not main.py's ({type(error).__name__}: {error})"
    raise UserError(f"{path} is not a checkpoint of main.py: {reason}")


def fill_in(checkpoint):
    """A checkpoint as other modules expect it: with all arguments (those that did not exist when it was saved get their
    defaults), the settings that they imply, and a memory, possibly None. Raises: UserError, or whatever else a foreign file's
    contents raise, if these make that impossible"""
    for name, kind in TYPES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"its {name} is missing, or is not what this program writes")
    are_tables = all(map(is_table, checkpoint["statistics"].values()))
    if not are_tables or min(checkpoint["iteration"], checkpoint["pretrain_iteration"]) < 0:
        raise UserError("its statistics or its iteration are not what this program writes")
    args = util.make_args(checkpoint["args"])
    util.get_path_base(args)  # raises
    known = util.get_fields().keys() | RESERVED
    removed = {name: value for name, value in vars(args).items() if name not in known}
    settings = {**util.get_settings(args), "data": checkpoint["data"]}
    return {"memory": None, **checkpoint, "args": vars(args), "settings": settings, "removed": removed}


def get_programs(parts):
    """The programs that a run, given its parts or a checkpoint, remembers of its training images, packed: [N, M, A]; None if it
    has no memory, or one of another kind"""
    memory = parts.get("memory")
    if not torch.is_tensor(memory) or memory.is_floating_point():
        return None
    if memory.dim() == 4 and memory.shape[3] == 2:
        return losses.pack(memory, torch.int16)
    return memory if memory.dim() == 3 else None


def is_table(value):
    """Whether it is a table of statistics, see runs/curves.py"""
    columns = list(value.values()) if isinstance(value, dict) else []
    are_columns = all(torch.is_tensor(x) and x.dim() == 1 and len(x) == len(columns[0]) for x in columns)
    return are_columns and bool(columns) and "iteration" in value


def load_given(path, device="cpu", parts=("generative_model",)):
    """Loads the checkpoint that a user refers to, see `find`; of a run, the newest intact one. Args: parts: those to compute with.
    Raises: UserError if there is none, or as `check_numbers` does"""
    found = find(path)
    is_run = found.parent in [latest.parent for latest in get_latest(path)]
    checkpoint = load_newest(found, warn, device) if is_run else load(found, device)
    check_numbers(checkpoint, parts)
    return checkpoint


def check_numbers(checkpoint, parts):
    """Raises: UserError if one of these parts of a checkpoint holds NaN. (Masks of attention may hold infinity.)"""
    for part in parts:
        if any(value.isnan().any() for value in checkpoint[part].values() if torch.is_tensor(value)):
            what = f"the {part.replace('_', ' ')} has values that are not numbers, so it cannot be used"
            raise UserError(f"{checkpoint['path']}: {what}")


def load_newest(latest, warn=warn, device="cpu"):
    """Loads a run's latest.pt or, if that is missing or damaged, the newest intact checkpoint beside it, with a warning.

    Args: latest: its path; warn: called with each warning
    Returns: the checkpoint, or None if there are none
    Raises: UserError if there are checkpoints but all are damaged; util.Unreadable
    """
    paths, damages = get_all(latest)[::-1], []
    for path in paths:
        try:
            checkpoint = load(path, device)
        except util.Unreadable:  # it would be replaced
            raise
        except UserError as error:
            damages.append(str(error))
            continue
        for message in damages:
            warn(message)
        if path != paths[0]:
            warn(f"using {path}, the newest intact checkpoint")
        return checkpoint
    if damages:
        advice = f"move {latest.parents[1]} away to start over"
        raise UserError(f"no checkpoint in {latest.parent} is intact: {damages[0]}; {advice}")
    return None


def is_complete(checkpoint, num_iterations):
    """Whether a run of that many iterations has nothing left to do: it may have stopped early, with a reason; after its last
    step, a test may still be due"""
    return bool(checkpoint["reason"]) or (checkpoint["iteration"] >= num_iterations and not checkpoint["num_due"])


def get_result_path(name, settings):
    """Where the result of an evaluation is. Args: name: of the run; settings: of the evaluation, or its arguments"""
    return util.SAVE / name / "logp" / f"{settings['mode']}_{settings['algorithm']}.pt"


def get_state_path(path, half=None):
    """Where an evaluation, or one half of it, is saved while it runs. Args: path: of the result"""
    return path.parent / "checkpoints" / (path.name if half is None else f"{path.stem}-{half}.pt")


def get_name_aside(path):
    """A name beside a file's, at which there is none"""
    names = (path.with_name(f"{path.name}.old{number}") for number in itertools.chain([""], itertools.count(2)))
    return next(name for name in names if not name.exists())


def load_saved(path, load, settings, force=False):
    """Loads what is saved of an evaluation, by load(path). A damaged file is set aside. Returns: None if there is none or, with
    force, a different evaluation. Raises: UserError if a different evaluation is in its place; util.Unreadable"""
    if not path.exists():
        return None
    try:
        saved = load(path)
    except util.Unreadable:
        raise
    except UserError as error:
        aside = path.rename(get_name_aside(path))
        warn(f"{error}; it is evaluated again, and the file is now {aside.name}")
        return None
    differences = util.describe_differences(saved["settings"], settings)
    if differences and not force:
        raise UserError(f"{path} holds a different evaluation: {differences}; --force replaces it")
    return None if differences else saved


@contextlib.contextmanager
def using(checkpoint):
    """A context in which a checkpoint's contents are used. Raises: UserError, naming the file, in place of any other error"""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # a foreign file's contents, or custom parts, may raise anything
        if util.is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        path = checkpoint.get("path", "a checkpoint")
        raise UserError(f"{path} cannot be used here: {what} (--debug shows where)") from error


# ------------------------------------------------------------------ the parts of a run


def is_plain(value):
    """Whether it consists of tensors, plain values and plain containers alone, which can certainly be saved and loaded"""
    if isinstance(value, dict):
        return type(value) in (dict, collections.OrderedDict) and all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return type(value) in (torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None))


def copy(checkpoint):
    """A checkpoint, saved and loaded in memory. Raises: UserError, naming the part, if one cannot be saved or loaded"""
    copied = {}
    for name, value in checkpoint.items():
        try:
            copied |= util.decode(util.encode({name: value}))
        except Exception as error:
            if util.is_out_of_memory(error):
                raise
            is_strange = isinstance(error, pickle.UnpicklingError)
            reason = "it holds more than tensors and plain values" if is_strange else util.get_reason(error, 150)
            strange = [key for key in value if not is_plain(value[key])] if name == "args" else []
            what = f"setting {strange[0].replace('_', '-')}" if strange else f"part {name}"
            raise UserError(
                f"the {what} of the run cannot be saved and loaded: {reason}; older checkpoints are intact"
            ) from error
    return copied


def get_states(parts):
    """The states of parts, to save. Raises: UserError if a part's name is taken or it cannot be saved"""
    for name, part in parts.items():
        if name in (RESERVED | TYPES.keys()) - {"generative_model", "inference_network"}:
            raise UserError(f"a part of a run cannot be called {name}: the name is taken; rename it")
        if not torch.is_tensor(part) and not hasattr(part, "state_dict"):
            raise UserError(f"the part {name} of a run is neither a tensor nor has a state_dict, so it cannot be saved")
    return {name: part.detach() if torch.is_tensor(part) else part.state_dict() for name, part in parts.items()}


def get_hyperparameters(parts):
    """The hyperparameters of the optimisers among parts, by name: a list of dicts, one for each group of parameters"""
    optimizers = {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
    return {name: describe_groups(type(part).__name__, part.param_groups) for name, part in optimizers.items()}


def describe_groups(kind, groups):
    """The hyperparameters of an optimiser's groups, as its param_groups or its state_dict holds them: a list of dicts. Args: kind:
    name of its class"""
    return [
        {"optimiser": kind, **{key: _to_plain(x) for key, x in group.items() if key not in {"params", *OF_DEVICES}}}
        for group in groups
    ]


def _get_parameters(parts):
    """The tensors among parts (except results of computations), and the parameters of modules among them: {<part> or
    <part>.<name>: tensor}"""
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    within = {f"{name}.{key}": parameter for name, part in modules.items() for key, parameter in part.named_parameters()}
    return {**{name: part for name, part in parts.items() if torch.is_tensor(part) and part.is_leaf}, **within}


def get_requires_grad(parts):
    """Whether each parameter among parts is trained, rather than frozen: a dict of bools by name"""
    return {name: parameter.requires_grad for name, parameter in _get_parameters(parts).items()}


def set_requires_grad(parts, values):
    """Sets what `get_requires_grad` returns, for those among its names that parts have"""
    parameters = _get_parameters(parts)
    for name in parameters.keys() & values.keys():
        parameters[name].requires_grad_(values[name])


def restore_parts(parts, checkpoint, hyperparameters):
    """Restores parts from a checkpoint, which may come from another device. Those that it lacks, and optimisers and schedules of
    another kind, stay as they are, with a warning.

    Args: hyperparameters: from `get_hyperparameters`, as the code sets them; where the checkpoint was made with others, the
        code's stay, with a warning
    Raises: ValueError, or whatever else load_state_dict raises, if a state does not fit its part
    """
    made_with = {name: checkpoint["hyperparameters"].get(name, ours) for name, ours in hyperparameters.items()}
    afresh = find_unusable(parts, checkpoint, hyperparameters, made_with)
    for reason in afresh.values():
        warn(f"{reason}; it is initialised afresh")
    for name, part in [(name, part) for name, part in parts.items() if name not in afresh]:
        saved = checkpoint[name]
        if torch.is_tensor(part):
            if (part.shape, part.dtype) != (saved.shape, saved.dtype):
                kinds = [f"{list(some.shape)} ({some.dtype})" for some in (saved, part)]
                raise ValueError(f"its {name} has the shape {kinds[0]}, but this run's has {kinds[1]}")
            part.data.copy_(saved)
        elif name in hyperparameters:
            rate = choose_rate(part, parts, checkpoint, afresh)
            restore_optimizer(name.replace("_", " "), part, saved, hyperparameters[name], made_with[name], rate)
        else:
            if is_schedule(part):
                warn_of_schedule(name, _to_plain(part.state_dict()), _to_plain(saved))
            part.load_state_dict(saved)


def is_schedule(part):
    return isinstance(part, torch.optim.lr_scheduler.LRScheduler)


def find_unusable(parts, checkpoint, ours, theirs):
    """Parts that a checkpoint has no usable state for, and why: {name: reason}. Args: ours, theirs: hyperparameters"""
    reasons = {}
    for name, part in sorted(parts.items(), key=lambda item: is_schedule(item[1])):  # schedules after their optimisers
        words = name.replace("_", " ")
        if name not in checkpoint:
            reasons[name] = f"the checkpoint has no {words}"
        elif name in ours and get_kind(ours[name]) != get_kind(theirs[name]):
            reasons[name] = f"{words}: a different kind of optimiser, or number of groups, than in the checkpoint"
        elif name in ours and get_sizes(part.state_dict()) != get_sizes(checkpoint[name]):
            reasons[name] = f"{words}: its groups have other numbers of parameters than in the checkpoint"
        elif is_schedule(part) and get_entries(part.state_dict()) != get_entries(checkpoint[name]):
            reasons[name] = f"{words}: a different kind of schedule than in the checkpoint"
        elif is_schedule(part) and any(part.optimizer is parts[other] for other in reasons):
            reasons[name] = f"{words}: its optimiser starts afresh"
    return reasons


def get_kind(hyperparameters):
    """What must agree for optimisers to use each other's state"""
    return [
        (group["optimiser"], group.get("amsgrad", False), "centered" in group and (group["centered"], group["momentum"] > 0))
        for group in hyperparameters
    ]


def get_entries(state):
    """The names in a schedule's state, and in those of the schedules that it combines"""
    return state.keys(), [get_entries(some) for some in state.get("_schedulers", [])]


def get_sizes(state):
    """The number of parameters in each group of an optimiser's state"""
    return [len(group["params"]) for group in state["param_groups"]]


def warn_of_schedule(name, ours, theirs):
    """Warns of what the code has changed in a schedule, which continues as it was saved"""
    for key in [key for key in ours if ours[key] != theirs[key]]:
        warn(f"{name}: {key} is {theirs[key]} in the checkpoint and {ours[key]} in the code; the schedule goes on as saved")


def choose_rate(optimizer, parts, checkpoint, afresh):
    """How an optimiser's learning rate goes on: "saved", as its schedule left it; "new" or "gone", the code's, since its schedule
    begins afresh or no longer exists; None if it has had no schedule. Args: afresh: names of parts without a state"""
    schedules = [name for name, part in parts.items() if is_schedule(part) and part.optimizer is optimizer]
    if schedules:
        return "new" if any(name in afresh for name in schedules) else "saved"
    unused = [state for name, state in checkpoint.items() if name not in parts and isinstance(state, dict)]
    return "gone" if any("last_epoch" in state for state in unused) else None


def restore_optimizer(name, optimizer, state, ours, theirs, rate):
    """Restores an optimiser's state. Hyperparameters that changed in the code keep the code's values, with a warning; others
    are restored, since a callback may have changed them.

    Args: ours, theirs: hyperparameters, from `get_hyperparameters`, as set by the code and by the code that saved them
        rate: from `choose_rate`
    """
    groups, warnings = [], []
    held = [{key: value for key, value in group.items() if torch.is_tensor(value)} for group in optimizer.param_groups]
    for group, saved, our, their in zip(optimizer.param_groups, state["param_groups"], ours, theirs, strict=True):
        saved = {key: value.item() if torch.is_tensor(value) else value for key, value in saved.items()}
        if rate in ("new", "gone"):
            saved.pop("initial_lr", None)
        if rate == "gone":
            their = {**their, "lr": saved["lr"]}
        changed = [key for key in our if our[key] != their.get(key, our[key]) and (key not in RATES or rate in (None, "gone"))]
        for key in changed:
            was = float(f"{their[key]:.6g}") if key in RATES else their[key]
            warnings.append(f"{key} changed from {was} to {our[key]}; using that of the code")
        kept = [*changed, *OF_DEVICES, *(RATES if rate in ("new", "gone") else [])]
        groups.append({**group, **saved, **{key: group[key] for key in kept if key in group}})
    for warning in dict.fromkeys(warnings):
        warn(f"{name}: {warning}")
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, tensors in zip(optimizer.param_groups, held, strict=True):
        for key, tensor in tensors.items():  # which a callback may hold, or a CUDA graph
            tensor.data.copy_(torch.as_tensor(group[key]))
            group[key] = tensor


def _to_plain(value):
    """Numbers in place of tensors, and lists in place of tuples; of a schedule's state, only what the code sets"""
    if isinstance(value, dict):
        return {key: _to_plain(x) for key, x in value.items() if key not in PROGRESS}
    return value.item() if torch.is_tensor(value) else list(map(_to_plain, value)) if isinstance(value, list | tuple) else value
