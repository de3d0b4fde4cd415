"""Rewrites files of versions before 1.0, which nothing else can read: checkpoints of runs and results of evaluations.

    python -m runs.convert pretrained/mws_20.pt save/*/checkpoints/*.pt save/*/logp/*.pt save/*/logp/*/*.pt

Each file is replaced atomically; files of this version stay as they are. Runs resume from rewritten checkpoints with the same
bits; unfinished evaluations start over.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import contextlib
import pathlib
import zipfile

import torch

import util
from runs import checkpoints
from util import UserError

RUN = {"args", "settings", "generative_model", "statistics", "optimizer"}
RESULT = {"settings", "enumeration_bound", "model_settings"}


def convert(path):
    """Returns: what became of a file, in words. Raises: UserError if it cannot be read"""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    with contextlib.suppress(UserError):
        util.load_checkpoint(path, keys=set())
        return "is of this version already"
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch does not compare checksums
            raise ValueError
        old = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a broken file can make readers raise anything
        raise UserError(f"{path} is damaged or not a checkpoint") from None
    if isinstance(old, dict) and RUN <= old.keys():
        util.save_checkpoint(path, convert_run(old))
    elif isinstance(old, dict) and RESULT <= old.keys():
        result = convert_result(old)
        util.save_checkpoint(path, result)
        if (renamed := rename(path, result["settings"])) != path:
            return f"is rewritten as {renamed}"
    else:
        return "is neither a checkpoint of a run nor a result of an evaluation, and stays as it is"
    return "is rewritten"


def rename(path, settings):
    """Renames a result whose name says test or unseen for the images that it is of. A file that has the name already stays, and
    this one is kept beside it. Returns: its path"""
    is_milestone = path.parent.name.endswith("_every_checkpoint")
    if (path.parent if is_milestone else path).name.partition("_")[0] not in ("test", "unseen"):
        return path
    new = path.with_name(f"{settings['mode']}_{settings['algorithm']}.pt")
    if is_milestone:
        new = path.parent.with_name(f"{settings['mode']}_every_checkpoint") / path.name
        new.parent.mkdir(exist_ok=True)
    if new.exists() and path in (new, *new.parent.glob(f"{new.name}.old*")):
        return path
    return path.rename(checkpoints.get_name_aside(new) if new.exists() else new)


def convert_run(old):
    """Statistics become tables by phase; optimisers that have taken no steps, as in pretrained models, are left out"""
    new = {name: value for name, value in old.items() if name not in ("settings", "statistics", "memory")}
    new["args"] = {name: value for name, value in vars(util.make_args(old["args"])).items() if not name.startswith("written")}
    optimizers = ["optimizer", "pretrain_optimizer"]
    for name in optimizers:
        if not old[name]:
            del new[name]
        elif old[name]["state"]:
            add_missing_states(old, name)
    made = {name: checkpoints.describe_groups("Adam", old[name]["param_groups"]) for name in optimizers if name in new}
    if old["memory"] is not None:
        new["memory"] = old["memory"]
    tested = old["statistics"].get("test_iteration", torch.zeros(0))
    interval, iteration = old["args"].get("test_interval"), old["iteration"]
    due = bool(interval) and iteration > 0 and iteration % interval == 0
    done = due and bool((tested == iteration).any())
    return dict(
        new,
        data=old["settings"]["data"],
        data_summary=old.get("data_summary", ""),
        num_due=int(due and not done),
        num_called=int(done),
        reason="",
        statistics=convert_statistics(old["statistics"]),
        hyperparameters=made,
    )


def add_missing_states(old, name):
    """The first versions kept no state for parameters that never had a gradient"""
    model, network = old["generative_model"], list(old["inference_network"].values())
    prior = [value for key, value in model.items() if key.startswith("prior.")]
    others = [value for key, value in model.items() if not key.startswith("prior.")]
    parameters = network if name == "pretrain_optimizer" else [*others, *network, *prior]
    for number, value in enumerate(parameters):
        zeros = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        old[name]["state"].setdefault(number, zeros)


def convert_statistics(old):
    new = {}
    for name, values in old.items():
        phase = name.split("_")[0] if name.split("_")[0] in ("pretrain", "test") else "train"
        if len(values) and name != "test_iteration":
            iteration = old["test_iteration"].int() if phase == "test" else torch.arange(1, len(values) + 1, dtype=torch.int32)
            table = new.setdefault(phase, {"iteration": iteration})
            table["phi_loss" if name == "pretrain_loss" else name] = values
    return new


def convert_result(old):
    """Older versions did not record the kind of images, calling a small data set's training images `test` and the data's test
    part `unseen`; they trained sleep networks on at most 500 samples a step"""
    settings = dict(old["settings"])
    if "kind_of_images" not in settings:
        small = old["model_settings"].get("small_dataset", False)
        mode = {"test": "train" if small else "test", "unseen": "test"}.get(settings["mode"], settings["mode"])
        settings["mode"] = mode
        settings["kind_of_images"] = "other" if not old.get("is_own_data", True) else "training" if mode == "train" else "test"
        if settings["algorithm"] == "sleep":
            num_images = min(settings["batch_size"], old["args"].get("num_data", settings["batch_size"]))
            settings["num_dreams"] = min(500, num_images * settings["num_particles"])
    if not settings.get("search", True):
        del settings["search"]
    return {**old, "settings": settings, "args": {"images": "first", "data_location": None, **old["args"]}}


def main():
    """Returns: 1 if a file could not be read, else 0"""
    parser = util.ArgumentParser(description=__doc__)
    parser.add("files", "files to rewrite", nargs="+", type=pathlib.Path)
    status = 0
    for path in sorted(parser.parse_args().files):  # those called test make room for those called unseen
        try:
            with checkpoints.using({"path": path}):
                print(f"{path} {convert(path)}", flush=True)
        except (UserError, OSError) as error:
            util.warn(str(error))
            status = 1
    return status


if __name__ == "__main__":
    util.run_script(main)
