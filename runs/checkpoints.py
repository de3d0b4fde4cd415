"""Validates checkpoints: the one place that decides which files runs, evaluations, figures and tables may use.

A readable file may still hold the wrong things: it may be damaged, edited, or from another program. Everything
in a checkpoint is compared with what its own arguments imply: names, types, shapes, ranges, finiteness,
lengths of curves. Nothing is changed before all of it has been checked. A checkpoint that passes is valid.
"""

import argparse
import filecmp
import math
import pathlib

import torch

import losses  # noqa: F401  declares the algorithms' settings
import models
import util
from runs.curves import get_phase
from util import SETTINGS, UserError, warn

LARGEST = 1e6  # absolute value of a parameter; far beyond any seen in training
MAX_PARAMETERS = 2**30
RESULT_KEYS = {
    "args", "settings", "log_p", "log_p_by_image", "standard_error", "enumeration_bound", "enumeration_bound_by_image",
    "latents", "statistics", "run", "model_settings", "model_iteration",
}  # fmt: skip
RESULT_SETTINGS = {
    "mode", "algorithm", "num_particles", "num_iterations", "batch_size", "test_num_particles", "model", "images",
}  # fmt: skip

# ------------------------------------------------------------------ finding


def get_path(path_base, iteration="latest"):
    """Where a run's checkpoint lies in save/"""
    return util.SAVE / path_base / "checkpoints" / f"{iteration}.pt"


def find(path):
    """Finds the checkpoint that a user refers to: a file, the latest one of a run (given by its folder or its name), or a
    pretrained model (given as pretrained/<name>, from any working directory).

    Raises: UserError if there is none; the message lists the existing runs
    """
    pretrained = pathlib.Path(__file__).resolve().parents[1] / "pretrained" / f"{pathlib.Path(path).stem}.pt"
    candidates = [pathlib.Path(path), pathlib.Path(path, "checkpoints/latest.pt"), get_path(path)]
    candidates += [pretrained] * (pathlib.Path(path).parent == pathlib.Path("pretrained"))
    if found := next(filter(pathlib.Path.is_file, candidates), None):
        return found
    runs = sorted(latest.parents[1].name for latest in util.SAVE.glob("*/checkpoints/latest.pt"))
    there = f"{util.SAVE}/ holds {', '.join(runs)}" if runs else f"{util.SAVE}/ holds no run: train one with python main.py"
    raise UserError(f"there is no checkpoint {path}; {there}")


def get_milestones(latest):
    """The paths of the numbered checkpoints beside a run's latest one, in order, and of the latest itself"""
    numbered = [path for path in pathlib.Path(latest).parent.glob("*.pt") if path.stem.isdecimal()]
    return [*sorted(numbered, key=lambda path: int(path.stem)), *([latest] if pathlib.Path(latest).stem == "latest" else [])]


def get_run_name(checkpoint_path, run_args):
    """The name of a checkpoint's run: that of its folder in save/. For a checkpoint from elsewhere, the one that its
    arguments (a dict) imply; where save/ holds another run of that name, with "-from-<folder>", to keep them apart"""
    folder = pathlib.Path(checkpoint_path).resolve().parent
    if folder.name == "checkpoints" and folder.parents[1] == util.SAVE.resolve():
        return folder.parent.name
    name = util.get_path_base(argparse.Namespace(**run_args))
    ours = list((util.SAVE / name / "checkpoints").glob("*.pt"))
    if not ours or any(filecmp.cmp(checkpoint_path, path, shallow=False) for path in ours):  # none, or a copy of one
        return name
    while folder.name in ("checkpoints", "save", name):
        folder = folder.parent
    return f"{name}-from-{folder.name or 'elsewhere'}"


# ------------------------------------------------------------------ loading


def load(path, device="cpu", resumable=False):
    """Loads a checkpoint of main.py. Args: resumable: whether a run must be able to resume from it; if not, optimisers
    and statistics may be empty. Raises: UserError if it cannot be read or is invalid"""
    checkpoint = util.load_checkpoint(path, device)
    if isinstance(checkpoint["args"], dict):
        checkpoint["args"] = {**get_later_arguments(), **checkpoint["args"]}
    try:
        check(checkpoint, resumable)
    except UserError as error:
        raise UserError(f"{path} is not a valid checkpoint: {error}") from None
    return checkpoint


def load_newest(path_base, device="cpu", resumable=False):
    """Loads a run's latest.pt or, if that is not valid, the newest checkpoint that is, with a warning.

    Returns: the checkpoint, or None if there are none
    Raises: UserError if there are checkpoints but none is valid
    """
    latest = get_path(path_base)
    numbered = [path for path in latest.parent.glob("*.pt") if path.stem.isdecimal()]
    numbered.sort(key=lambda path: int(path.stem), reverse=True)
    paths = [latest] * latest.exists() + numbered
    for path in paths:
        try:
            checkpoint = load(path, device, resumable)
        except UserError as error:
            warn(str(error))
            continue
        if path != paths[0]:
            warn(f"resuming from {path}, the newest intact checkpoint")
        return checkpoint
    if paths:
        raise UserError(
            f"no checkpoint in {latest.parent} is valid; move the folder {util.SAVE / path_base} away to start over"
        )
    return None


def load_result(path):
    """Loads a result of eval_logp.py. Raises: UserError if it cannot be read or is invalid"""
    result = util.load_checkpoint(path, keys=RESULT_KEYS)
    values, bound, latents = (result[key] for key in ("log_p_by_image", "enumeration_bound_by_image", "latents"))
    right = all(isinstance(x, torch.Tensor) and x.dim() == 1 and len(x) > 0 for x in (values, bound))
    right = right and len(values) == len(bound) and bool(values.isfinite().all())
    right = right and isinstance(result["log_p"], float) and math.isclose(result["log_p"], values.mean(), abs_tol=1e-3)
    right = right and isinstance(result["standard_error"], float) and isinstance(result["model_iteration"], int)
    right = right and all(isinstance(result[key], dict) for key in ("args", "settings", "model_settings", "latents"))
    right = right and "num_data" in result["args"]
    right = right and RESULT_SETTINGS <= result["settings"].keys() and isinstance(result["run"], str)
    right = right and {"num_particles", "memory_size", "algorithm"} <= result["model_settings"].keys()
    right = right and latents.keys() == {"obs_id", "codes", "log_joint"} and len({len(x) for x in latents.values()}) == 1
    if not right:
        raise UserError(f"{path} is not a valid evaluation; eval_logp.py --force repeats it")
    return result


# ------------------------------------------------------------------ validating


def expect(condition, what):
    if not condition:
        raise UserError(what)


def check(checkpoint, resumable=False):
    """Checks a dict with util.CHECKPOINT_KEYS. Raises: UserError, saying what is wrong, if it is not valid"""
    check_args(checkpoint["args"])
    for name, high in [("num_alphabets", 10**6), ("pretrain_iteration", 2**53), ("iteration", 2**53)]:
        expect(is_integer(checkpoint[name]) and 0 <= checkpoint[name] <= high, f"{name} is {show(checkpoint[name])}")
    settings = checkpoint["settings"]
    expect(isinstance(settings, dict) and all(isinstance(key, str) for key in settings), "its settings are not a dict")
    expect(isinstance(settings.get("data"), str), "its settings do not name the data")
    args = argparse.Namespace(**checkpoint["args"])
    conditional = bool(checkpoint["num_alphabets"])
    expect(conditional == args.condition_on_alphabet, f"num_alphabets is {checkpoint['num_alphabets']}")
    inputs = args.num_primitives + checkpoint["num_alphabets"] + args.obs_embedding_dim
    units = args.p_lstm_hidden_size + args.q_lstm_hidden_size
    expect(5 * units * (units + inputs) < MAX_PARAMETERS, "its arguments imply an impossibly large model")
    try:
        with torch.random.fork_rng(devices=[]):
            built = models.build(args, checkpoint["num_alphabets"])
    except Exception as error:  # mutually exclusive arguments
        raise UserError(f"its arguments do not make a model ({str(error).splitlines()[0][:80]})") from None
    for name, model in zip(["generative_model", "inference_network"], built, strict=True):
        check_tensors(checkpoint[name], model.state_dict(), name)
    check_memory(checkpoint["memory"], args)
    check_statistics(checkpoint, resumable)
    check_random_state(checkpoint["random_state"])
    pretrained = [list(built[1].parameters())]
    groups = {"optimizer": models.get_parameter_groups(*built), "pretrain_optimizer": pretrained}
    for name in groups:
        expect(isinstance(checkpoint[name], dict), f"{name} is not a dict")
        if checkpoint[name] or resumable:
            number = "pretrain_iteration" if name == "pretrain_optimizer" else "iteration"
            check_optimizer(checkpoint[name], name, groups[name], checkpoint[number] > 0)


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def show(value):
    return repr(value)[:40]


def get_later_arguments():
    """Arguments that checkpoints of older versions may lack, with their defaults, which they then had"""
    own = {name for settings in util.HYPERPARAMETERS.values() for name in settings} - {"memory_size"}
    return {name: SETTINGS[name] for name in ["find_characters", *own]}


def check_args(args):
    ranges = {name: limits for own in util.HYPERPARAMETERS.values() for name, (_, *limits, _) in own.items()}
    expect(isinstance(args, dict) and all(isinstance(key, str) for key in args), "its arguments are not a dict")
    for name, default in SETTINGS.items():
        expect(name in args, f"the argument {name} is missing")
        value = args[name]
        if name in ranges:
            low, high = ranges[name]
            right = type(value) is type(default) and low <= value <= high
        elif name == "dataset_size":
            right = value is None or (is_integer(value) and value > 0)
        elif type(default) is int:
            right = is_integer(value) and 0 <= value < 2**63
        elif type(default) is float:
            right = type(value) in (int, float) and math.isfinite(value) and value >= 0
        else:
            right = type(value) is type(default)
        expect(right, f"the argument {name} is {show(value)}")
    sizes = "num_arcs num_primitives p_lstm_hidden_size q_lstm_hidden_size obs_embedding_dim batch_size num_particles"
    for name in sizes.split():
        expect(0 < args[name] < 2**31, f"the argument {name} is {show(args[name])}")


def check_tensors(tensors, template, what):
    """Checks a dict of parameters against a model: names, shapes, types, finite values"""
    expect(isinstance(tensors, dict), f"{what} is not a dict")
    expect(tensors.keys() == template.keys(), f"{what} has different parameters: {show(sorted(tensors.keys() ^ template.keys(), key=str))}")
    for name, like in template.items():
        check_tensor(tensors[name], like, f"{what}.{name}")


def check_tensor(value, like, what):
    expect(isinstance(value, torch.Tensor), f"{what} is not a tensor")
    expect(value.shape == like.shape, f"{what} has the shape {list(value.shape)}, not {list(like.shape)}")
    expect(value.dtype == like.dtype, f"{what} is of type {value.dtype}, not {like.dtype}")
    expect(bool((value.abs() <= LARGEST).all()), f"{what} has values that are not finite, or huge")


def check_memory(memory, args):
    if args.algorithm != "mws":
        expect(memory is None, "it has a memory, but its algorithm uses none")
        return
    dtype = torch.uint8 if args.num_primitives <= 128 else torch.int16
    expect(isinstance(memory, torch.Tensor) and memory.dtype == dtype and memory.dim() == 3, "its memory is not a tensor of codes")
    num_latents = args.num_primitives**args.num_arcs * 2 ** (args.num_arcs - 1)
    shape = [min(args.memory_size, num_latents), args.num_arcs]
    expect(len(memory) > 0 and list(memory.shape[1:]) == shape, f"its memory has the shape {list(memory.shape)}")
    codes = memory.int()
    right = (codes >= 0) & (codes < 2 * args.num_primitives)
    expect(bool(right.all()) and bool((codes[..., 0] % 2 == 0).all()), "its memory holds invalid stroke codes")


def check_statistics(checkpoint, resumable):
    statistics, lengths = checkpoint["statistics"], {}
    expect(isinstance(statistics, dict) and all(isinstance(name, str) for name in statistics), "its statistics are not a dict")
    lengths = {"pretrain": checkpoint["pretrain_iteration"], "train": checkpoint["iteration"]}
    for name, values in statistics.items():
        right = isinstance(values, torch.Tensor) and values.dim() == 1 and values.dtype == torch.float32
        expect(right and is_curve(values, name), f"the statistics of {show(name)} are not a curve of finite numbers")
        length = lengths.get(get_phase(name), len(values))
        expect(len(values) in (0, length) if not resumable else len(values) == length,
               f"{name} has {len(values)} values after {length} iterations")  # fmt: skip
    tests = {len(values) for name, values in statistics.items() if name.startswith("test_")}
    expect(len(tests) <= 1, "the curves of its tests are of different lengths")
    if resumable:
        for name, number in [("pretrain_loss", "pretrain_iteration"), ("theta_loss", "iteration")]:
            expect(name in statistics or checkpoint[number] == 0, f"it has no statistics of {name}")


def is_curve(values, name):
    """Whether a curve is finite; statistics that an older version did not record may begin late, after NaN"""
    missing = values.isnan()
    if not missing.any():
        return bool(values.isfinite().all())
    begins = int(missing.sum())
    late = get_phase(name) == "train" and name not in ("theta_loss", "phi_loss")
    return late and begins < len(values) and bool(missing[:begins].all()) and bool(values[begins:].isfinite().all())


def check_random_state(state):
    expect(isinstance(state, dict) and "cpu" in state and state.keys() <= {"cpu", "cuda"}, "it has no random state")
    for name, value in state.items():
        expect(isinstance(value, torch.Tensor) and value.dtype == torch.uint8, f"its random state ({name}) is not a tensor of bytes")
    expect(state["cpu"].shape == torch.get_rng_state().shape, f"its random state has the shape {list(state['cpu'].shape)}")
    expect("cuda" not in state or state["cuda"].shape == (16,), "its GPU random state has the wrong shape")
    try:
        torch.Generator().set_state(state["cpu"].cpu())
    except RuntimeError:
        raise UserError("its random state is not one of torch's") from None


def check_optimizer(state, what, groups, has_begun):
    """Checks that a dict is the state of Adam for these groups of parameters, before or after its first step"""
    expect(isinstance(state, dict), f"{what} is not a dict")
    expect(state.keys() == {"state", "param_groups"}, f"{what} is not Adam's")
    expect(isinstance(state["state"], dict) and isinstance(state["param_groups"], list), f"{what} is not Adam's")
    expect(len(state["param_groups"]) == len(groups), f"{what} has {len(state['param_groups'])} groups of parameters")
    wanted = torch.optim.Adam([torch.zeros(1)]).state_dict()["param_groups"][0].keys() - {"decoupled_weight_decay"}
    first = 0
    for group, parameters in zip(state["param_groups"], groups, strict=True):
        expect(isinstance(group, dict) and wanted <= group.keys(), f"{what} has a group that is not Adam's")
        numbers = str(list(range(first, first + len(parameters))))  # as text, in which True is not 1
        expect(str(group["params"]) == numbers, f"{what} has different parameters")
        expect(isinstance(group["lr"], float) and 0 <= group["lr"] <= LARGEST, f"{what} has an invalid learning rate")
        rates = [group["weight_decay"], group["eps"], group["betas"]]
        expect(str(rates) in ("[0, 1e-08, (0.9, 0.999)]", "[0, 1e-08, [0.9, 0.999]]"), f"{what} is not Adam's")
        first += len(parameters)
    every = [parameter for parameters in groups for parameter in parameters]
    numbers = set(range(len(every) if has_begun else 0))
    expect(set(state["state"]) == numbers, f"{what} has the state of different parameters")
    for number, values in state["state"].items():
        expect(isinstance(values, dict) and values.keys() == {"step", "exp_avg", "exp_avg_sq"}, f"{what} is not Adam's")
        step = values["step"]
        right = isinstance(step, torch.Tensor) and step.shape == () and step.dtype == torch.float32
        right = right and 0 <= step.item() < 2**53
        expect(right and step.item() == int(step.item()), f"{what} has an invalid step count")
        for name in ["exp_avg", "exp_avg_sq"]:
            like = every[number]
            value = values[name]
            right = isinstance(value, torch.Tensor) and value.shape == like.shape and value.dtype == like.dtype
            right = right and bool((value.abs() <= LARGEST**2).all())
            expect(right, f"{what} has a moment of the wrong shape, not finite, or huge")
        expect(bool((values["exp_avg_sq"] >= 0).all()), f"{what} has a negative second moment")
