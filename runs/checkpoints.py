"""Validates checkpoints: the one place that decides which files runs, evaluations, figures and tables may use.

A readable file may still hold the wrong things: it may be damaged, edited, or from another program. Everything
in a checkpoint is compared with what its own arguments imply: names, types, shapes, ranges, finiteness,
lengths of curves. Nothing is changed before all of it has been checked. A checkpoint that passes is valid.
"""

import argparse
import filecmp
import functools
import glob
import hashlib
import math
import pathlib

import torch

import losses
import models
import util
from runs.curves import get_phase
from util import SETTINGS, UserError, warn

OLDER = "written by an older version"  # marks arguments that lacked those added later, and evaluations
KINDS_OF_IMAGES = ["test", "training", "other"]  # of the model's data: unseen, or those it was trained on; of other data
TYPES_OF_NONE = {"dataset_size": 1, "name": ""}  # of arguments that may be None
RECORDED_BY_ALL_VERSIONS = ["theta_loss", "phi_loss", "prior_loss", "novel_proportion", "new_map"]
LARGEST = 1e6  # absolute value of a parameter; far beyond any seen in training
MAX_PARAMETERS = 2**30
RESULT_KEYS = {
    "args", "settings", "log_p", "log_p_by_image", "standard_error", "enumeration_bound", "enumeration_bound_by_image",
    "latents", "statistics", "run", "model_settings", "model_iteration",
}  # fmt: skip
RESULT_NUMBERS = ["num_particles", "num_iterations", "batch_size", "test_num_particles"]  # among the settings
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
    for candidate in candidates:
        util.check_links(candidate)
    runs = sorted(latest.parents[1].name for latest in util.SAVE.glob("*/checkpoints/latest.pt"))
    there = f"{util.SAVE}/ holds {', '.join(runs)}" if runs else f"{util.SAVE}/ holds no run: train one with python main.py"
    raise UserError(f"there is no checkpoint {path}; {there}")


def get_numbered(folder):
    """The paths of the numbered checkpoints in a folder, in order"""
    return sorted(
        (path for path in pathlib.Path(folder).glob("*.pt") if path.stem.isdecimal()), key=lambda path: int(path.stem)
    )


def get_all(path):
    """The paths of all checkpoints of a run, given that of one: numbered ones in order, then the latest and any other given"""
    folder = pathlib.Path(path).parent
    latest = [folder / "latest.pt"] if (folder / "latest.pt").exists() else []
    return list(dict.fromkeys([*get_numbered(folder), *latest, pathlib.Path(path)]))


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


def find_run(args, get_fingerprint):
    """The name of the folder in save/ in which a run with main.py's arguments, a namespace, lives: that of
    util.get_path_base or, if it holds no such run, that of a run of the same data when they were elsewhere.

    Args: get_fingerprint: a function without arguments that returns the fingerprint of the training data; it is called
        only if there is a run that differs in nothing else
    """
    name = util.get_path_base(args)
    if args.name:
        return name
    default = "glyphs" if args.test_run else SETTINGS["data_location"]
    there, elsewhere = (util.get_path_base(argparse.Namespace(**{**vars(args), "data_location": x})) for x in (default, "/x"))
    start = elsewhere.split("data-location=")[0]  # what follows it may be cut off
    others = {there, *(path.name for path in util.SAVE.glob(f"{glob.escape(start)}data-location=*"))} - {name}
    states = {other: state for other in others if (state := read_state(other))}
    ours = util.get_settings(args)
    if not any(util.describe_differences(settings, ours) == "" for settings, _ in states.values()):
        return name
    if own := read_state(name):
        states[name] = own
    ours["data"] = get_fingerprint()
    same = {some: iteration for some, (settings, iteration) in states.items() if not util.describe_differences(settings, ours)}
    return name if name in same or not same else max(same, key=same.get)


def read_state(path_base):
    """The settings and the iteration of a run's newest checkpoint that can be read, which need not be valid; None if there
    is none"""
    latest = get_path(path_base)
    for path in [latest, *get_numbered(latest.parent)[::-1]]:
        try:
            util.check_regular(path)
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            return dict(checkpoint["settings"]), int(checkpoint["iteration"])
        except Exception:  # missing, or damaged in whatever way; the run itself says so
            continue
    return None


def get_digest(checkpoint):
    """Identifies a checkpoint's generative model: a hash of its parameters, and the iteration"""
    digest = hashlib.sha1()
    for value in checkpoint["generative_model"].values():
        digest.update(value.cpu().numpy().tobytes())
    return f"{digest.hexdigest()[:12]} at iteration {checkpoint['iteration']}"


# ------------------------------------------------------------------ loading


def load(path, device="cpu", resumable=False, num_images=None):
    """Loads a checkpoint of main.py.

    Args: resumable: whether a run must be able to resume from it; if not, optimisers and statistics may be empty;
        num_images: how many a memory must hold, by the data's fingerprint
    Raises: UserError if it cannot be read or is invalid
    """
    checkpoint = util.load_checkpoint(path, device)
    if isinstance(checkpoint["args"], dict):
        later = get_later_arguments()
        older = not later.keys() <= checkpoint["args"].keys()
        checkpoint["args"] = {**later, **checkpoint["args"], **({OLDER: True} if older else {})}
    try:
        check(checkpoint, resumable)
        check_num_images(checkpoint, (num_images or {}).get(checkpoint["settings"]["data"]))
    except UserError as error:
        raise UserError(f"{path} is not a valid checkpoint: {error}") from None
    return checkpoint


def is_test_due(args, iteration, statistics):
    """Whether the test that a run makes at this iteration is still to come. Args: args, a dict; statistics, curves by name"""
    interval, tested = args["test_interval"], statistics.get("test_iteration", [0])[-1]
    return bool(interval) and iteration % interval == 0 and iteration > tested


def is_complete(checkpoint, num_iterations):
    """Whether nothing is left to do for a run of that many iterations; it may have stopped between its last step and its
    last test"""
    iteration, statistics = checkpoint["iteration"], checkpoint["statistics"]
    left = bool(statistics) and iteration == num_iterations and is_test_due(checkpoint["args"], iteration, statistics)
    return iteration >= num_iterations and not left


def load_newest(path_base, device="cpu", resumable=False, num_images=None):
    """Loads a run's latest.pt or, if that is not valid, the newest checkpoint that is, with a warning.

    Returns: the checkpoint, or None if there are none
    Raises: UserError if there are checkpoints but none is valid
    """
    latest = get_path(path_base)
    paths = [latest] * latest.exists() + get_numbered(latest.parent)[::-1]
    for path in paths:
        try:
            checkpoint = load(path, device, resumable, num_images)
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


def get_state_path(path, half=None):
    """Where an evaluation, or one half of it, is saved while it runs. Args: path: of the result"""
    return path.parent / "checkpoints" / (path.name if half is None else f"{path.stem}-{half}.pt")


def load_result(path):
    """Loads a result of eval_logp.py, see `modernise`. Raises: UserError if it cannot be read or is invalid"""
    result = util.load_checkpoint(path, keys=RESULT_KEYS)
    try:
        right = is_result(result)
    except Exception:  # whatever foreign contents make the checks raise
        right = False
    if not right:
        raise UserError(f"{path} is not a valid evaluation; eval_logp.py --force repeats it")
    return modernise(result, result["model_settings"].get("small_dataset", False))


def modernise(saved, small_dataset):
    """What any version saved of an evaluation, finished or not, with settings in this one's words; marks it as OLDER if these
    differ. Older versions did not record the kind of the images, called the training images of a small data set test images,
    and the data's test part unseen; their sleep networks trained on at most 500 samples a step.

    Args: small_dataset: whether the model was trained on one
    """
    settings = saved["settings"]
    if not isinstance(settings, dict) or "kind_of_images" in settings:
        return saved
    mode = {"test": "train" if small_dataset else "test", "unseen": "test"}.get(settings.get("mode"), settings.get("mode"))
    kind = "other" if not saved.get("is_own_data", True) else "training" if mode == "train" else "test"
    settings = {**settings, "mode": mode, "kind_of_images": kind}
    if settings.get("algorithm") == "sleep":
        num_images = min(settings["batch_size"], saved.get("args", {}).get("num_data", settings["batch_size"]))
        settings["num_dreams"] = min(500, num_images * settings["num_particles"])
    return {**saved, "settings": settings, OLDER: True}


def is_result(result):
    """Whether a dict with RESULT_KEYS is a result of eval_logp.py"""
    values, bound, latents = (result[key] for key in ("log_p_by_image", "enumeration_bound_by_image", "latents"))
    right = all(isinstance(x, torch.Tensor) and x.dtype == torch.double and x.layout == torch.strided for x in (values, bound))
    right = right and values.dim() == bound.dim() == 1 and len(values) > 0
    right = right and len(values) == len(bound) and bool(values.isfinite().all())
    right = right and isinstance(result["log_p"], float) and math.isclose(result["log_p"], values.mean(), abs_tol=1e-3)
    right = right and isinstance(result["standard_error"], float) and isinstance(result["model_iteration"], int)
    right = right and all(isinstance(result[key], dict) for key in ("args", "settings", "model_settings", "latents"))
    right = right and "num_data" in result["args"] and isinstance(result.get("is_own_data", True), bool)
    right = right and RESULT_SETTINGS <= result["settings"].keys() and isinstance(result["run"], str)
    right = right and {"num_particles", "memory_size", "algorithm"} <= result["model_settings"].keys()
    right = right and latents.keys() == {"obs_id", "codes", "log_joint"} and len({len(x) for x in latents.values()}) == 1
    if right:
        obs_id, codes, log_joint = latents["obs_id"], latents["codes"], latents["log_joint"]
        right = all(x.layout == torch.strided for x in latents.values())
        right = right and (obs_id.dtype, codes.dtype, log_joint.dtype) == (torch.int32, torch.int16, torch.float32)
        right = right and (obs_id.dim(), codes.dim(), log_joint.dim()) == (1, 2, 1)
        right = right and bool(((obs_id >= 0) & (obs_id < len(values))).all() and log_joint.isfinite().all())
    if right and len(values) > 1:
        right = math.isclose(result["standard_error"], values.std() / math.sqrt(len(values)), abs_tol=1e-3)
    right = right and isinstance(result["enumeration_bound"], float)
    right = right and math.isclose(result["enumeration_bound"], bound.mean(), abs_tol=1e-3)
    settings = result["settings"]
    right = right and all(is_integer(settings[name]) and settings[name] >= 0 for name in RESULT_NUMBERS)
    right = right and all(isinstance(settings[name], str) for name in ("mode", "algorithm", "model", "images"))
    right = right and settings.get("kind_of_images", "test") in KINDS_OF_IMAGES
    right = right and math.isfinite(result.get("search_error", 0.0)) and result.get("search_error", 0.0) >= 0
    halves = [result[key] for key in ("log_p_by_half", "bound_by_half") if key in result]  # of mws
    right = right and all(half.shape == (2, len(values)) and bool(half.isfinite().all()) for half in halves)
    right = right and all(is_integer(result["model_settings"][name]) for name in ("num_particles", "memory_size"))
    right = right and is_integer(result["args"]["num_data"]) and result["model_iteration"] >= 0
    return right and isinstance(result["model_settings"]["algorithm"], str)


# ------------------------------------------------------------------ validating


def expect(condition, what):
    if not condition:
        raise UserError(what)


def check(checkpoint, resumable=False):
    """Checks a dict with util.CHECKPOINT_KEYS. Raises: UserError, saying what is wrong, if it is not valid"""
    try:
        _check(checkpoint, resumable)
    except UserError:
        raise
    except Exception as error:  # whatever foreign contents make the checks raise
        raise UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}") from None


def _check(checkpoint, resumable):
    args = check_args(checkpoint["args"])
    for name, high in [("num_alphabets", 10**6), ("pretrain_iteration", 2**53), ("iteration", 2**53)]:
        expect(is_integer(checkpoint[name]) and 0 <= checkpoint[name] <= high, f"{name} is {show(checkpoint[name])}")
    check_settings(checkpoint["settings"], args)
    expect(isinstance(checkpoint.get("data_summary", ""), str), "its summary of the data is no text")  # older ones have none
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
    check_statistics(checkpoint, args, resumable)
    check_random_state(checkpoint["random_state"])
    pretrained = [list(built[1].parameters())]
    groups = {"optimizer": models.get_parameter_groups(*built), "pretrain_optimizer": pretrained}
    for name in groups:
        expect(isinstance(checkpoint[name], dict), f"{name} is not a dict")
        if checkpoint[name] or resumable:
            number = "pretrain_iteration" if name == "pretrain_optimizer" else "iteration"
            has_begun = checkpoint[number] > 0
            check_optimizer(checkpoint[name], name, groups[name], has_begun, is_older(checkpoint["args"]))


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def show(value):
    return repr(value)[:40]


def get_later_arguments():
    """Arguments that checkpoints of older versions may lack, with their defaults, which they then had"""
    own = {name for settings in util.HYPERPARAMETERS.values() for name in settings} - {"memory_size"}
    return {name: SETTINGS[name] for name in ["find_characters", *own]}


def is_older(args):
    """Whether arguments are those of a version whose checkpoints may lack statistics and states of parameters without
    gradients"""
    return args.get(OLDER, False)


def check_args(args):
    """Whether the command line would accept a dict of arguments. Returns: a namespace"""
    expect(isinstance(args, dict) and all(isinstance(key, str) for key in args), "its arguments are not a dict")
    for name in SETTINGS:
        expect(name in args, f"the argument {name} is missing")
    optional = {"dataset_size": None, "name": None, "test_run": False, "num_iterations": util.NUM_ITERATIONS}
    for name, default in {**SETTINGS, **optional}.items():
        check_value(name, args.get(name, default), default)
    expect(args["likelihood"] in models.LIKELIHOODS, f"the argument likelihood is {show(args['likelihood'])}")
    expect(args["algorithm"] in losses.OBJECTIVES, f"the argument algorithm is {show(args['algorithm'])}")
    args = argparse.Namespace(**args)
    util.check_arguments(args)
    return args


def check_value(name, value, default):
    wanted = type(TYPES_OF_NONE.get(name, default))
    right = type(value) is wanted or (wanted is float and type(value) is int) or (value is None and default is None)
    expect(right, f"the argument {name} is {show(value)}")
    if value is not None and name in util.TYPES:
        try:
            right = util.TYPES[name](value if wanted is str else repr(value)) == value
        except (argparse.ArgumentTypeError, ValueError):
            right = False
        expect(right, f"the argument {name} is {show(value)}")


def check_settings(settings, args):
    """The settings follow from the arguments, but for the name of the data's location, which depends on the machine"""
    expect(isinstance(settings, dict) and all(isinstance(key, str) for key in settings), "its settings are not a dict")
    expect(isinstance(settings.get("data"), str), "its settings do not name the data")
    expect(isinstance(settings.get("data_location"), str), "its settings do not name the location of the data")
    ours = {**util.get_settings(args), "data": settings["data"], "data_location": settings["data_location"]}
    differences = util.describe_differences(settings, ours)
    expect(not differences, f"its settings contradict its arguments: {differences[:200]}")


def check_tensors(tensors, template, what):
    """Checks a dict of parameters against a model: names, shapes, types, finite values"""
    expect(isinstance(tensors, dict), f"{what} is not a dict")
    different = sorted(tensors.keys() ^ template.keys(), key=str)
    expect(not different, f"{what} has different parameters: {show(different)}")
    for name, like in template.items():
        check_tensor(tensors[name], like, f"{what}.{name}")


def check_tensor(value, like, what):
    expect(isinstance(value, torch.Tensor), f"{what} is not a tensor")
    expect(value.layout == torch.strided, f"{what} is a sparse tensor")
    expect(value.shape == like.shape, f"{what} has the shape {list(value.shape)}, not {list(like.shape)}")
    expect(value.dtype == like.dtype, f"{what} is of type {value.dtype}, not {like.dtype}")
    expect(bool((value.abs() <= LARGEST).all()), f"{what} has values that are not finite, or huge")


def check_num_images(checkpoint, num_images):
    """Raises: UserError if the memory is not one of num_images images (None: unknown)"""
    memory = checkpoint["memory"]
    if memory is not None and num_images is not None:
        expect(len(memory) == num_images, f"its memory holds {len(memory)} images, the data {num_images}")


def check_memory(memory, args):
    if args.algorithm != "mws":
        expect(memory is None, "it has a memory, but its algorithm uses none")
        return
    dtype = torch.uint8 if args.num_primitives <= 128 else torch.int16
    right = isinstance(memory, torch.Tensor) and memory.layout == torch.strided
    expect(right and memory.dtype == dtype and memory.dim() == 3, "its memory is not a tensor of codes")
    num_latents = args.num_primitives**args.num_arcs * 2 ** (args.num_arcs - 1)
    shape = [min(args.memory_size, num_latents), args.num_arcs]
    expect(len(memory) > 0 and list(memory.shape[1:]) == shape, f"its memory has the shape {list(memory.shape)}")
    codes = memory.int()
    right = (codes >= 0) & (codes < 2 * args.num_primitives)
    expect(bool(right.all()) and bool((codes[..., 0] % 2 == 0).all()), "its memory holds invalid stroke codes")


def check_statistics(checkpoint, args, resumable):
    statistics = checkpoint["statistics"]
    expect(isinstance(statistics, dict) and all(isinstance(name, str) for name in statistics), "its statistics are not a dict")
    if not resumable and not any(len(values) for values in statistics.values()):
        return
    lengths = {"pretrain": checkpoint["pretrain_iteration"], "train": checkpoint["iteration"]}
    lengths["test"] = len(statistics.get("test_iteration", []))
    for name, values in statistics.items():
        right = isinstance(values, torch.Tensor) and values.layout == torch.strided
        right = right and values.dim() == 1 and values.dtype == torch.float32
        expect(right and is_curve(values, name), f"the statistics of {show(name)} are not a curve of finite numbers")
        length = lengths[get_phase(name)]
        expect(len(values) == length, f"{name} has {len(values)} values, not {length}")
    wanted = ["pretrain_loss"] * (lengths["pretrain"] > 0) + ["test_log_p", "test_kl"] * (lengths["test"] > 0)
    if lengths["train"] > 0:
        wanted += (
            ["theta_loss", "phi_loss"] if is_older(checkpoint["args"]) and args.algorithm != "mws" else get_statistics(args)
        )
    missing = [name for name in wanted if name not in statistics]
    expect(not missing, f"it has no statistics of {', '.join(missing)}")
    tested = statistics.get("test_iteration", torch.zeros(0))
    expect(bool((tested.diff() > 0).all()), "the iterations of its tests are not in order")
    expect(bool(((tested > 0) & (tested <= lengths["train"])).all()), "the iterations of its tests are not those of the run")


@functools.cache
def _get_statistics(algorithm, **hyperparameters):
    """The names of the statistics that an objective returns, found by calling it on a tiny model"""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        generative_model = models.GenerativeModel(num_primitives=2, num_arcs=2, likelihood="bernoulli")
        inference_network = models.InferenceNetwork(num_primitives=2, num_arcs=2, lstm_hidden_size=1, obs_embedding_dim=1)
        obs = torch.zeros(1, 28, 28)
        if algorithm == "mws":
            hyperparameters = dict(memory=losses.init_memory(1, 1, 2, 2), obs_id=torch.zeros(1, dtype=torch.long))
        elif algorithm == "sleep":
            hyperparameters = dict(num_dreams=1)
        objective = losses.OBJECTIVES[algorithm]
        return list(objective(generative_model, inference_network, obs=obs, num_particles=2, **hyperparameters)[1])


def get_statistics(args):
    """The names of the statistics that a run records at each iteration"""
    own = {name: getattr(args, name) for name in util.HYPERPARAMETERS.get(args.algorithm, {}) if name != "memory_size"}
    return _get_statistics(args.algorithm, **own)


def is_curve(values, name):
    """Whether a curve is finite; statistics that an older version did not record may begin late, after NaN, or not yet"""
    begins = int(values.isnan().sum())
    late = get_phase(name) == "train" and name not in RECORDED_BY_ALL_VERSIONS
    return (begins == 0 or late) and bool(values[:begins].isnan().all()) and bool(values[begins:].isfinite().all())


def check_random_state(state):
    expect(isinstance(state, dict) and "cpu" in state and state.keys() <= {"cpu", "cuda"}, "it has no random state")
    for name, value in state.items():
        right = isinstance(value, torch.Tensor) and value.dtype == torch.uint8
        expect(right, f"its random state ({name}) is not a tensor of bytes")
    expect(state["cpu"].shape == torch.get_rng_state().shape, f"its random state has the shape {list(state['cpu'].shape)}")
    expect("cuda" not in state or state["cuda"].shape == (16,), "its GPU random state has the wrong shape")
    try:
        torch.Generator().set_state(state["cpu"].cpu())
    except RuntimeError:
        raise UserError("its random state is not one of torch's") from None


def check_optimizer(state, what, groups, has_begun, may_lack=False):
    """Checks that a dict is the state of Adam for these groups of parameters, before or after its first step; may_lack:
    whether parameters may have none, as those without gradients had in an older version"""
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
    right = set(state["state"]) <= numbers if may_lack else set(state["state"]) == numbers
    expect(right, f"{what} has the state of different parameters")
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
