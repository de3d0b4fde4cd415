"""The report of all evaluations in save/: tables, save/logp.csv and save/logp.pdf; and log p in the course of training."""

import collections
import csv
import io
import math
import re
import textwrap
from typing import NamedTuple

import numpy as np
import scipy.special
import torch

import scoring
import util
from runs import checkpoints
from util import UserError, warn

TRAINED = ["sleep", "rws", "vimco"]  # the paper's procedure, which trains a network for the evaluation
ALGORITHMS = [*TRAINED, "own", "mws"]
ESTIMATES = [*ALGORITHMS, "best", "enumeration bound"]
SEARCH_ERRORS = ["search error", "gain of two"]  # see get_search_error
# Kinds of images, those to show first at the front, and what the models know of them
KINDS = {"test": "unseen", "training": "on which the models were trained", "other": "of other data than the models'"}
EFFORT = ["num_particles", "num_iterations", "batch_size", "test_num_particles"]  # equal for all of TRAINED in a row
WORK = "{num_iterations} iterations, {num_particles} and {test_num_particles} particles"
WORK_BY_ALGORITHM = {
    "sleep": [WORK, "{num_dreams} samples a step of sleep"],
    "rws": [WORK],
    "vimco": [WORK],
    "own": ["own network {test_num_particles} particles"],
    "mws": [
        "mws {num_iterations} iterations, {test_num_particles} particles, {memory_size} programs of search {search}, effort {effort:g}"
    ],
}
PAPER_MODELS = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in (3, 5, 10, 20, 40)] + ["a_mws_40"]


# ------------------------------------------------------------------ reading


class Images(NamedTuple):
    """A set of images; different sets never share a row, a table or a figure"""

    kind: str  # one of KINDS
    fingerprint: str  # a hash, and their number in brackets


class Run(NamedTuple):
    """What is known about log p of some images under one trained model, from comparable evaluations"""

    name: str  # of its folder in save/
    settings: dict  # of its training
    iteration: int
    estimates: dict  # ESTIMATES, as far as available: (mean over images, its standard error), nats
    search_error: tuple | None  # see get_search_error
    work: str  # the evaluations' particles and iterations, in words
    images: Images
    images_in_words: str
    bound_by_image: torch.Tensor | None = None  # [N], the guaranteed bound, if there is a memoised evaluation


def load_results(paths):
    """Loads results of eval_logp.py; warns about those that are damaged, and leaves them out"""
    results = []
    for path in paths:
        try:
            results.append(checkpoints.load_result(path))
        except UserError as error:
            warn(f"{error}; left out")
    return results


def get_images(result):
    return Images(result["settings"]["kind_of_images"], result["settings"]["images"])


def get_place(images):
    """A sort key: test images first"""
    return list(KINDS).index(images.kind)


def read_runs(folder):
    """Reads the evaluations of one run: a Run for each set of images, test images first"""
    by_images = collections.defaultdict(dict)  # images -> algorithm -> result
    for result in load_results(sorted(folder.glob("logp/[!.]*.pt"))):
        by_images[get_images(result)][result["settings"]["algorithm"]] = result
    return [make_run(folder.name, images, by_images[images]) for images in sorted(by_images, key=get_place)]


def make_run(name, images, results):
    """Makes a Run of evaluations of the same images: algorithm -> result"""
    shown = choose_comparable(name, results)
    first = next(iter(shown.values()))
    bound = get_joint_bound(shown.values())
    estimates = {algorithm: (result["log_p"], result["standard_error"]) for algorithm, result in shown.items()}
    estimates["best"] = max(estimates.values())
    estimates["enumeration bound"] = bound.mean().item(), get_standard_error(bound.tolist())
    work = [
        text.format(**{"search": 1, **result["settings"]})  # the first version of the search had no number
        for algorithm, result in shown.items()
        for text in WORK_BY_ALGORITHM[algorithm]
    ]
    return Run(
        name,
        first["model_settings"],
        first["model_iteration"],
        estimates,
        get_search_error(shown.get("mws", {})),
        ", ".join(dict.fromkeys(work)),
        images,
        describe_images(first),
        bound if "mws" in shown else None,
    )


def choose_comparable(name, results):
    """Chooses the evaluations of a run and some images (algorithm -> result) that may share a row: of the same model and,
    among those of TRAINED, with the same effort. Takes the latest model, then the most iterations and particles; warns about
    the others."""

    def get_rank(result):
        settings = result["settings"]
        effort = [settings[key] for key in ("num_iterations", "test_num_particles", "num_particles")]
        return [result["model_iteration"], settings["algorithm"] in TRAINED, *effort]

    best, shown = max(results.values(), key=get_rank)["settings"], {}
    for algorithm in [algorithm for algorithm in ALGORITHMS if algorithm in results]:
        settings = results[algorithm]["settings"]
        keys = ["model", *EFFORT * (algorithm in TRAINED and best["algorithm"] in TRAINED)]
        differences = [
            f"{key.replace('_', '-')} is {settings[key]}, not {best[key]}" for key in keys if settings[key] != best[key]
        ]
        if differences:
            path = f"{settings['mode']}_{algorithm}.pt"
            warn(f"{name}: {path} is left out: its {', '.join(differences)}; eval_logp.py --force repeats it")
        else:
            shown[algorithm] = results[algorithm]
    return shown


def get_joint_bound(results):
    """The enumeration bound over the latents seen in any of a model's evaluations: [N]"""
    some_rows = []
    for result in results:
        latents, num_images = result["latents"], len(result["log_p_by_image"])
        some_rows.append(scoring.get_rows(latents["obs_id"].long(), latents["codes"], latents["log_joint"]))
    return scoring.get_enumeration_bound(scoring.keep_best(scoring.merge(some_rows)), num_images)


def get_search_error(result):
    """How much the searches of an evaluation by mws may have missed, in nats per image: the difference of its halves' mean
    bounds, and what the programs of both together gain over those of one; None for other evaluations"""
    if "search_error" not in result:
        return None
    return result["search_error"], result["enumeration_bound"] - result["bound_by_half"].mean().item()


def get_standard_error(values):
    """Standard error of the mean; NaN for a single value"""
    if len(values) < 2:
        return math.nan
    return (torch.tensor(values, dtype=torch.double).std() / math.sqrt(len(values))).item()


# ------------------------------------------------------------------ in words


def describe(path):
    """Describes a result of eval_logp.py in a sentence"""
    result = checkpoints.load_result(path)
    error = get_search_error(result)
    searched = f", search error {error[0]:.2f} (both halves together gain {error[1]:.2f} over one)" if error else ""
    return (
        f"log p(x) = {result['log_p']:.2f} nats per image (standard error over images {result['standard_error']:.2f}),"
        f" enumeration bound {result['enumeration_bound']:.2f}{searched}, {describe_images(result)},"
        f" {result['run']} at iteration {result['model_iteration']} by {result['settings']['algorithm']}"
    )


def describe_images(result):
    """The images of an evaluation, in words"""
    args, kind, number = result["args"], result["settings"]["kind_of_images"], len(result["log_p_by_image"])
    chosen = f"all {number}" if number < args["num_data"] else f"the first {number}"
    chosen = f"{number} evenly spread" if args["images"] == "spread" else chosen
    if kind == "training":
        return f"{chosen} training images"
    part = "test" if result["settings"]["mode"] == "test" else "training"
    source = args["data_location"] or "other data" if kind == "other" else "the model's data"
    return f"{chosen} images of the {part} part of {source}"


def describe_leads(models):
    """How far the best model is ahead of each other one, by the guaranteed bounds of memoised evaluations of the same images:
    lines of text. Intervals are paired over images, whose choice moves all models together, and say nothing of other seeds.
    Args: models: {name: Runs with different seeds}"""
    found = {name: [run.bound_by_image for run in runs if run.bound_by_image is not None] for name, runs in models.items()}
    bounds = {name: torch.stack(seeds).mean(0) for name, seeds in found.items() if seeds}  # [N] each
    names = sorted(bounds, key=lambda name: -bounds[name].mean())
    lines = []
    for name in names[1:]:
        lead = bounds[names[0]] - bounds[name]
        text = f"{names[0]} is {lead.mean():.1f} nats per image ahead of {name}"
        if len(lead) > 1:
            half = scipy.special.stdtrit(len(lead) - 1, 0.975) * get_standard_error(lead.tolist())
            text += f"; 95 % interval over images {lead.mean() - half:.1f} to {lead.mean() + half:.1f}"
        lines.append(f"{text}; {len(found[names[0]])} and {len(found[name])} seeds")
    return lines


# ------------------------------------------------------------------ tables


def get_name(run_name):
    """A run's name without its seed: that of the row it shares with other seeds"""
    return re.sub(r"_seed=\d+", "", run_name)


def is_test_run(name):
    return name.startswith("test_run_")


def get_order(name):
    """A sort key: numbers by value, as in rws_3, rws_10"""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def group(runs):
    """Groups runs by what a table and its rows are about: {images: {name of the model: Runs with different seeds}}. Test images
    come first, and then those of most models."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in sorted(runs, key=lambda run: get_order(get_name(run.name))):
        groups[run.images][get_name(run.name)].append(run)
    order = sorted(groups, key=lambda images: (get_place(images), -len(groups[images]), images))
    return {images: {name: choose_seeds(seeds) for name, seeds in groups[images].items()} for images in order}


def choose_seeds(runs):
    """The runs of a model that were evaluated with the same effort, as most of them were; others must not be averaged"""
    most = collections.Counter(run.work for run in runs).most_common(1)[0][0]
    for run in [run for run in runs if run.work != most]:
        warn(f"{run.name} is left out of its row: it was evaluated by {run.work}, the others by {most}")
    return [run for run in runs if run.work == most]


def get_row(name, runs):
    """CSV columns for the runs of a model, which differ only in the seed; None where there is no value"""
    iterations, settings = [run.iteration for run in runs], runs[0].settings
    row = {
        "model": name,
        "algorithm": settings["algorithm"],
        "particles": settings["num_particles"] + settings.get("memory_size", 0),
        "iteration": "-".join(map(str, sorted({min(iterations), max(iterations)}))),
        "seeds": len(runs),
        "images": runs[0].images.kind,
        "fingerprint": runs[0].images.fingerprint,
        "images in words": runs[0].images_in_words,
        "evaluated with": runs[0].work,
    }
    for estimate in ESTIMATES:
        found = [run.estimates[estimate] for run in runs if estimate in run.estimates]
        values = [value for value, _ in found]
        row[estimate] = sum(values) / len(values) if values else None
        row[f"{estimate} s.e. over seeds"] = get_standard_error(values) if len(values) > 1 else None
        row[f"{estimate} s.e. over images"] = found[0][1] if len(found) == 1 else None
    errors = [run.search_error for run in runs if run.search_error is not None]
    for i, name in enumerate(SEARCH_ERRORS):
        row[name] = sum(error[i] for error in errors) / len(errors) if errors else None
    return row


def print_table(rows):
    """Prints the rows of one set of images, below a line that says which they are, and whether the models know them"""
    first, width = rows[0], max(len(row["model"]) for row in rows)
    names = ESTIMATES + SEARCH_ERRORS * any(row["search error"] is not None for row in rows)
    print(f"{first['images in words']}, {KINDS[first['images']]} (fingerprint {first['fingerprint'].split()[0]}):")
    print(f"{'model':{width}} particles     iteration seeds" + "".join(f"{name:>18}" for name in names))
    for row in rows:
        values = "".join(f"{describe_value(row, name):>18}" for name in names)
        print(f"{row['model']:{width}} {row['particles']:9} {row['iteration']:>13} {row['seeds']:5}{values}")
    for work in dict.fromkeys(row["evaluated with"] for row in rows):
        names = [row["model"] for row in rows if row["evaluated with"] == work]
        print(f"evaluated with {work}: {'all' if len(names) == len(rows) else ', '.join(names)}")


def describe_value(row, name):
    if row[name] is None:
        return "missing"
    error = row.get(f"{name} s.e. over seeds")
    return f"{row[name]:.2f}" + ("" if error is None else f" ± {error:.2f}")


def write_csv(path, rows):
    """Writes a table: rows, dicts with the same keys"""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    util.write(path, file.getvalue().encode())


# ------------------------------------------------------------------ figures


class Line(NamedTuple):
    """log p of a model, nats per image: a number per point in each"""

    x: list
    y: np.ndarray
    low: np.ndarray  # a band over seeds
    high: np.ndarray
    dotted: np.ndarray | None = None  # another estimate


def draw_lines(path, lines, title, xlabel, ticks=None, limits=None):
    """Draws lines, {label: Line}, into a PDF. Args: title: its lines, some of which may be empty; ticks: of the x-axis; limits:
    of the y-axis"""
    from results import figures  # jobs of a sweep, which draw nothing, start sooner without matplotlib

    figure = figures.Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=2.5, lw=1.3, label=textwrap.fill(label, 60))
        axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.25)
        if line.dotted is not None:
            axes.plot(line.x, line.dotted, ":", color=drawn.get_color(), lw=1.3)
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="log p(x), nats per image", ylim=limits)
    axes.set_title("\n".join(filter(None, title)), fontsize=8)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    util.write(path, figures.to_pdf([figure]))


def get_labels(names):
    """Splits the names of models. Returns: labels, {name: the parts that others lack}; what all have in common, in words"""
    parts = {name: name.split("_") for name in names}
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    labels = {name: "_".join(part for part in own if part not in common) or name for name, own in parts.items()}
    words = [f"{part} latents per image" if part.isdigit() else part for part in next(iter(parts.values())) if part in common]
    return labels, ", ".join(words)


def write_figure(path, rows):
    """Draws the paper's figure: log p against the number of latents per image, a line per training algorithm, with standard
    errors over seeds. Those over images are in the CSV alone: the models are evaluated on the same images, whose choice moves
    all of them together."""
    rows = [row for row in rows if not is_test_run(row["model"])] or rows
    models = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row["particles"]):
        models[re.sub(rf"_{row['particles']}(?=_|$)", "", row["model"], count=1)].append(row)
    labels, common = get_labels(models)
    lines = {}
    for name, own in models.items():
        best, error = (np.array([row[key] or 0 for row in own]) for key in ("best", "best s.e. over seeds"))
        lines[labels[name]] = Line([row["particles"] for row in own], best, best - error, best + error)
    bands = "band: standard error over seeds" * any(row["best s.e. over seeds"] for row in rows)
    title = [rows[0]["images in words"], common, bands]
    ticks = sorted({row["particles"] for row in rows})
    draw_lines(path, lines, title, "latents per image (mws: proposals + memory)", ticks)


# ------------------------------------------------------------------ log p in the course of training


def get_milestones_folder(name, mode):
    """Where the evaluations of a run's milestones lie"""
    return util.SAVE / name / "logp" / f"{mode}_every_checkpoint"


def read_milestones(folders):
    """The evaluations of a run's milestones in these folders, by what they must share in a figure:
    {(images, *effort): {iteration: result}}"""
    groups = collections.defaultdict(dict)
    for result in load_results(path for folder in folders for path in folder.glob("[!.]*.pt")):
        if result["model_iteration"] > 0:  # 0, in pretraining, is on no logarithmic axis
            kind = get_images(result), *(result["settings"][name] for name in EFFORT)
            groups[kind][result["model_iteration"]] = result
    return groups


def write_milestones(name, mode):
    """Writes a CSV and a figure of log p of a run against iterations. Returns: lines of text that say what and where"""
    folder = get_milestones_folder(name, mode)
    return draw_milestones({name: read_milestones([folder])}, folder.with_suffix(".pdf"))


def compare_milestones(names):
    """Writes log p against iterations of some runs, which evaluated every checkpoint, into save/logp_by_iteration.csv and .pdf.
    Returns: lines of text. Raises: UserError if there are none"""
    runs = {name: read_milestones((util.SAVE / name / "logp").glob("*_every_checkpoint")) for name in names}
    command = "python eval_logp.py --algorithm own --every-checkpoint --checkpoint-path"
    for name in [name for name in runs if not runs[name]]:
        warn(f"{name} is left out: none of its checkpoints is evaluated; {command} {name}")
        del runs[name]
    if not runs:
        raise UserError(f"no checkpoints of these runs are evaluated yet: {command} RUN")
    return draw_milestones(runs, util.SAVE / "logp_by_iteration.pdf")


def draw_milestones(runs, path):
    """Writes a CSV, and a figure of the guaranteed bound (lines, with the range over seeds) and the estimates of log p (dotted)
    of each model. Of several sets of images takes that of most runs, test images first.

    Args: runs: {name: what read_milestones returns}; path: of the figure
    Returns: lines of text, one per model about the last iteration that all its seeds have in common
    Raises: UserError if no model has one
    """
    kinds = collections.Counter(kind for found in runs.values() for kind in found)
    kind = min(kinds, key=lambda kind: (-kinds[kind], get_place(kind[0])))
    models, rows, lines, texts = collections.defaultdict(list), [], {}, []
    for name in sorted(runs, key=get_order):
        if kind not in runs[name]:
            warn(f"{name} is left out: its checkpoints were evaluated on other images or with other numbers of particles")
            continue
        results = runs[name][kind]
        models[get_name(name)].append(results)
        rows += [get_milestone_row(name, results[i]) for i in sorted(results)]
        images = describe_images(next(iter(results.values())))
    labels, common = get_labels(models)
    for name, seeds in models.items():
        x = sorted(set.intersection(*map(set, seeds)))  # iterations that all have
        if not x:
            warn(f"{name} is left out: its seeds have no evaluated iteration in common")
            continue
        log_p, bound = (
            np.array([[seed[i][key] for i in x] for seed in seeds]) for key in ("log_p", "enumeration_bound")
        )  # [S, X]
        num_seeds = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        lines[f"{labels[name]} ({num_seeds})"] = Line(x, bound.mean(0), bound.min(0), bound.max(0), log_p.mean(0))
        ends = [describe_values(values[:, -1]) for values in (log_p, bound)]
        texts.append(f"{name}: log p {ends[0]}, enumeration bound {ends[1]}, {num_seeds}, at iteration {x[-1]}")
    if not lines:
        raise UserError("the seeds of no model have an evaluated iteration in common: evaluate them when they are trained")
    caption = "lines: enumeration bound (guaranteed), dotted: estimate; band: range over seeds"
    typical = np.quantile(np.concatenate([line.y for line in lines.values()]), 0.25)  # the first iterations are far below
    highest = max(max(line.high.max(), line.dotted.max()) for line in lines.values())
    draw_lines(path, lines, [images, common, caption], "iteration", limits=(typical - 10, highest + 3))
    write_csv(path.with_suffix(".csv"), rows)
    return [f"{images} (fingerprint {kind[0].fingerprint.split()[0]}):", *texts, f"{path.with_suffix('.csv')}, {path}"]


def describe_values(values):
    """Mean and range"""
    return f"{values.mean():.1f}" + f" ({values.min():.1f} to {values.max():.1f})" * (len(values) > 1)


def get_milestone_row(name, result):
    """CSV columns"""
    return {
        "model": name,
        "iteration": result["model_iteration"],
        "images": result["settings"]["kind_of_images"],
        "fingerprint": result["settings"]["images"],
        "number of images": len(result["log_p_by_image"]),
        "particles": result["settings"]["test_num_particles"],
        "log p": result["log_p"],
        "log p s.e. over images": result["standard_error"],
        "enumeration bound": result["enumeration_bound"],
    }


# ------------------------------------------------------------------ the report


def main(mode=None, name_missing=False):
    """Args: mode: test or train, or None for all images; name_missing: also list the paper's models that have no value for
    the images shown first"""
    kind = {"test": "test", "train": "training"}.get(mode)
    runs = [run for path in sorted(util.SAVE.glob("*/logp")) for run in read_runs(path.parent)]
    groups = group([run for run in runs if kind in (None, run.images.kind)])
    if not groups:
        print(
            f"nothing in {util.SAVE}/ has been evaluated{f' on {kind} images' if kind else ''} yet; evaluate a model with"
            " python eval_logp.py --checkpoint-path CHECKPOINT --algorithm mws"
        )
        return 0
    tables = []
    for models in groups.values():
        tables.append([get_row(name, seeds) for name, seeds in models.items()])
        print_table(tables[-1])
        print("\n".join([*describe_leads(models), ""]))
    missing = [name for name in PAPER_MODELS if name not in {row["model"] for row in tables[0]}]
    if name_missing and missing:
        print(f"models of the paper without a value: {', '.join(missing)}")
    path = util.SAVE / ("logp_train.csv" if mode == "train" else "logp.csv")
    write_csv(path, [row for table in tables for row in table])
    write_figure(path.with_suffix(".pdf"), tables[0])
    images = tables[0][0]["images in words"]
    print(f"nats per image, means over images; also in {path}; a figure of {images} is in {path.with_suffix('.pdf')}")
    return 0
