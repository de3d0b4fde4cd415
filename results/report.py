"""Reports on all evaluations in save/: tables, save/logp.csv and save/logp.pdf; and log p in the course of training."""

import collections
import contextlib
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
SEARCH_ERRORS = ["search error", "gain of two"]  # see get_search_error
# Kinds of images, in the order of their tables, and how the models relate to them
KINDS = {"test": "unseen", "training": "on which the models were trained", "other": "not the data of the models' training"}
# What an evaluation's numbers depend on besides the model, the images and the seed; only equal ones are averaged
WORK = ["num_iterations", "num_particles", "batch_size", "lstm_hidden_size", "test_num_particles"]
WORK_BY_ALGORITHM = {
    **dict.fromkeys(TRAINED, WORK),
    "sleep": [*WORK, "num_dreams"],
    "own": ["test_num_particles"],
    "mws": [*WORK, "memory_size", "effort", "search"],
}
ALGORITHMS = list(WORK_BY_ALGORITHM)
ESTIMATES = [*ALGORITHMS, "best", "enumeration bound"]
TOLERANCE = 1.0  # nats per image: an estimate further below the guaranteed bound is not worth reporting
NUM_LATENTS = [3, 5, 10, 20, 40]  # per image; for mws, memory plus proposals
PAPER_MODELS = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in NUM_LATENTS] + ["a_mws_40"]


# ------------------------------------------------------------------ reading


class Images(NamedTuple):
    """A set of images; different sets never share a row, a table or a figure"""

    kind: str  # one of KINDS
    fingerprint: str  # a hash, with the number of images in brackets


class Run(NamedTuple):
    """The evaluations of one trained model on some images"""

    name: str  # of its folder in save/
    images: Images
    results: dict  # algorithm: result of eval_logp.py

    @property
    def first(self):
        """A result, for what all have in common"""
        return next(iter(self.results.values()))

    @property
    def work(self):
        """algorithm: what describe_work says"""
        return {algorithm: describe_work(result["settings"]) for algorithm, result in self.results.items()}


def load_result(path):
    """Loads a result of eval_logp.py. Raises: UserError if it is damaged, or a row of a table cannot be made of it"""
    result = util.load_checkpoint(path, keys=checkpoints.RESULT_KEYS)
    with checkpoints.using({"path": path}):
        name, algorithm = result["run"], result["settings"]["algorithm"]
        run = Run(name, get_images(result), choose_comparable(name, {algorithm: result}))
        get_place(run.images), get_row(run.name, [run]), int(result["model_iteration"])
        if torch.stack([result["log_p_by_image"], result["enumeration_bound_by_image"]]).isnan().any():
            raise UserError(f"{path}: log p is not a number")
    return result


def load_results(name, paths, get_file_name):
    """Loads results of a run's evaluations: a list. Leaves out, with a warning, those that are damaged, those of another model
    (the run was trained anew, or they were copied into its folder), and those that get_file_name(result) names otherwise"""
    results, latest = [], None
    with contextlib.suppress(UserError):  # results may have come without checkpoints
        latest = checkpoints.load(checkpoints.get_path(name)) if paths else None
    for path in paths:
        try:
            result = load_result(path)
        except UserError as error:
            warn(f"{error}; left out")
            continue
        with checkpoints.using({"path": path}):
            difference = latest and describe_difference(name, result, latest)
        if difference:
            advice = "delete it, or replace it by eval_logp.py --force"
            warn(f"{path} is left out: it is of a different model from this run's current one ({difference}); {advice}")
        elif path.name != get_file_name(result):
            warn(f"{path} is left out: a result by this name would be {get_file_name(result)}")
        else:
            results.append(result)
    return results


def describe_difference(name, result, latest):
    """Why the evaluated model cannot be an earlier or the present state of a run, given its latest checkpoint; "" if it can"""
    if differences := compare_settings(result["model_settings"], latest["settings"]):
        return differences
    iteration = result["model_iteration"]
    if iteration > latest["iteration"]:
        return f"iteration {iteration} of {latest['iteration']}"
    try:
        then = latest if iteration == latest["iteration"] else checkpoints.load(checkpoints.get_path(name, iteration))
    except UserError:  # one that is not kept, or damaged, says nothing
        return ""
    digests = result["settings"]["model"], checkpoints.get_digest(then)
    return f"model is {digests[0]} there and {digests[1]} here" if digests[0] != digests[1] else ""


def compare_settings(theirs, ours):
    """How the settings of two trainings differ, in words, among those that both have: settings come and go"""
    theirs, ours = map(util.get_first_names, (theirs, ours))
    shared = [name for name in ours if name in theirs]
    return util.describe_differences({name: theirs[name] for name in shared}, {name: ours[name] for name in shared})


def get_images(result):
    return Images(result["settings"]["kind_of_images"], result["settings"]["images"])


def get_place(images):
    """A sort key: test images first"""
    return list(KINDS).index(images.kind)


def read_runs(folder):
    """Reads the evaluations of one run: a Run for each set of images, test images first"""

    def get_file_name(result):
        return checkpoints.get_result_path(folder.name, result["settings"]).name

    by_images = collections.defaultdict(dict)  # images -> algorithm -> result
    for result in load_results(folder.name, sorted(folder.glob("logp/[!.]*.pt")), get_file_name):
        by_images[get_images(result)][result["settings"]["algorithm"]] = result
    return [
        Run(folder.name, images, choose_comparable(folder.name, by_images[images]))
        for images in sorted(by_images, key=get_place)
    ]


def choose_comparable(name, results):
    """Chooses those evaluations of a run on some images (algorithm -> result) that may share a row: of the same model and, for
    TRAINED, with the same effort. Takes the latest model, then the most iterations and particles; warns about the others."""

    def get_rank(result):
        settings = result["settings"]
        effort = [settings[key] for key in ("num_iterations", "test_num_particles", "num_particles")]
        return [result["model_iteration"], settings["algorithm"] in TRAINED, *effort]

    best, shown = max(results.values(), key=get_rank)["settings"], {}
    for algorithm in [algorithm for algorithm in ALGORITHMS if algorithm in results]:
        settings = results[algorithm]["settings"]
        keys = ["model", *WORK * (algorithm in TRAINED and best["algorithm"] in TRAINED)]
        differences = [
            f"{key.replace('_', '-')} is {settings[key]}, not {best[key]}" for key in keys if settings[key] != best[key]
        ]
        if differences:
            path = checkpoints.get_result_path(name, settings)
            warn(f"{name}: {path.name} is left out: its {', '.join(differences)}; eval_logp.py --force repeats it")
        else:
            shown[algorithm] = results[algorithm]
    return shown


def get_joint_bound(results):
    """The enumeration bound over all latents seen in a model's evaluations: [N]"""
    some_rows = []
    for result in results:
        latents, num_images = result["latents"], len(result["log_p_by_image"])
        obs_id, codes = latents["obs_id"].long(), latents["codes"]
        some_rows.append(scoring.Rows(scoring.get_hash(codes, obs_id), obs_id, codes, latents["log_joint"]))
    return scoring.get_enumeration_bound(scoring.keep_best(scoring.merge(some_rows)), num_images)


def get_search_error(result):
    """How much the searches of an evaluation by mws may have missed, in nats per image: the difference between its halves' mean
    bounds, and the gain of all programs over those of one half; None for other evaluations"""
    if "search_error" not in result:
        return None
    return result["search_error"], result["enumeration_bound"] - result["bound_by_half"].mean().item()


def get_standard_error(values):
    """Standard error of the mean; NaN for a single value"""
    if len(values) < 2:
        return math.nan
    return (torch.tensor(values, dtype=torch.double).std() / math.sqrt(len(values))).item()


def get_half_width(values):
    """Half the width of the mean's 95 % interval, by Student's t: [N] -> scalar"""
    return scipy.special.stdtrit(len(values) - 1, 0.975) * get_standard_error(values.tolist())


# ------------------------------------------------------------------ in words


def describe(path):
    """Describes a result of eval_logp.py in a sentence"""
    result = load_result(path)
    error, spread, bound = get_search_error(result), result["standard_error"], result["enumeration_bound"]
    over_images = "" if math.isnan(spread) else f" (standard error over images {spread:.2f})"  # of a single image
    searched = f", search error {error[0]:.2f} (both halves together gain {error[1]:.2f} over one)" if error else ""
    is_short = error and bound - result["log_p"] > TOLERANCE
    advice = " (report this: the networks of the estimate propose too few of the programs found)" if is_short else ""
    return (
        f"log p(x) = {result['log_p']:.2f} nats per image{over_images},"
        f" enumeration bound {bound:.2f}{advice}{searched}, {describe_images(result)},"
        f" {result['run']} at iteration {result['model_iteration']} by {result['settings']['algorithm']}"
    )


def describe_work(settings):
    """An evaluation's algorithm and everything that WORK_BY_ALGORITHM names, in words"""
    names = WORK_BY_ALGORITHM[settings["algorithm"]]
    settings = {"search": 1, **settings}  # the first version of the search had no number
    return f"{settings['algorithm']}: " + ", ".join(f"{name.replace('_', '-')} {settings[name]}" for name in names)


def describe_images(result):
    """The images of an evaluation, in words"""
    args, kind, number = result["args"], result["settings"]["kind_of_images"], len(result["log_p_by_image"])
    chosen = "" if args["images"] == "spread" else "all " if number < args["num_data"] else "the first "
    chosen += util.count(number, "evenly spread " * (not chosen) + "training " * (kind == "training") + "image")
    if kind == "training":
        return chosen
    part = "test" if result["settings"]["mode"] == "test" else "training"
    source = args["data_location"] or "other data" if kind == "other" else "the model's data"
    return f"{chosen} of the {part} part of {source}"


def describe_leads(models):
    """How far the best model is ahead of each other one with as many latents, trained equally long on the same images, and
    conditional or not alike, by the guaranteed bounds of memoised evaluations with equal settings: lines of text. Intervals are
    paired over images, whose choice moves all models together, and say nothing about other seeds. Args: models: {name: Runs
    with different seeds}, of the same images"""
    searched, lines = collections.defaultdict(dict), []  # what must be equal -> {name: bounds [S, N]}
    for name, runs in models.items():
        for run in [run for run in runs if "mws" in run.results]:
            result, settings = run.results["mws"], run.first["model_settings"]
            training = result["model_iteration"], settings.get("data"), settings.get("condition_on_alphabet")
            key = get_num_latents(run), *training, run.work["mws"]
            searched[key].setdefault(name, []).append(result["enumeration_bound_by_image"])
    iterations = {key[1] for key in searched}
    for key, found in searched.items():
        bounds = {name: torch.stack(seeds).mean(0) for name, seeds in found.items()}  # [N] each
        best, *others = sorted(bounds, key=lambda name: -bounds[name].mean())
        for name in others:
            lead = bounds[best] - bounds[name]
            text = f"{best} is {lead.mean():.1f} nats per image ahead of {name}"
            if len(lead) > 1:
                half = get_half_width(lead)
                text += f"; 95 % interval over images {lead.mean() - half:.1f} to {lead.mean() + half:.1f}"
            when = f" at iteration {key[1]}" * (len(iterations) > 1)
            lines.append(f"{text}; seeds: {len(found[best])} and {len(found[name])}{when}")
    return lines


# ------------------------------------------------------------------ tables


def is_test_run(name):
    return name.startswith("test_run_")


def get_order(name):
    """A sort key: numbers by value, as in rws_3, rws_10"""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def group(runs):
    """Groups runs by table and row: {images: {name of the model: Runs with different seeds}}. Test images come first, then
    those of most models."""
    groups, digests = collections.defaultdict(lambda: collections.defaultdict(list)), collections.defaultdict(set)
    runs = sorted(runs, key=lambda run: (run.name != run.first.get("run", run.name), get_order(run.name)))  # originals first
    for run in runs:
        digests[run.name] |= {(str(run.first["model_settings"]), run.first["settings"]["model"])}
    copies = find_copies(digests)
    runs = [run for run in runs if run.name not in copies]
    names = name_rows({run.name: run.first["model_settings"] for run in runs})
    for run in sorted(runs, key=lambda run: get_order(names[run.name])):
        groups[run.images][names[run.name]].append(run)
    order = sorted(groups, key=lambda images: (get_place(images), -len(groups[images]), images))
    return {images: {name: choose_seeds(seeds) for name, seeds in groups[images].items()} for images in order}


def name_rows(settings):
    """The names of rows: {run's name: settings of its training} -> {run's name: name of its row}. Runs whose names differ only
    in the seed, or in the path of the same data, share a row if their other settings agree as well; else a run has one by its
    own name. If data were replaced between seeds, the row of the later ones also names the data"""
    rows, firsts = {}, {}  # firsts: what seeds share -> the first run's row and settings
    for name in sorted(settings, key=get_order):
        model, seedless = {**settings[name], "seed": None}, re.sub(r"_seed=\d+", "", name)
        row = f"{seedless}_data={model.get('data')}" if seedless in rows.values() else seedless
        row, first = firsts.setdefault((re.sub("_data-location=[^_]*", "", seedless), model.get("data")), (row, model))
        rows[name] = name if compare_settings(model, first) else row
    return rows


def find_copies(models):
    """The names of runs that are copies of others, with a warning. Args: models: {name: what identifies each model that was
    evaluated of it}"""
    owners, copies = {}, set()
    for name, digests in models.items():
        originals = {owners.setdefault(digest, name) for digest in digests} - {name}
        if originals:
            warn(f"{name} is left out: it is a copy of {min(originals)}, not another seed")
            copies.add(name)
    return copies


def choose_seeds(runs):
    """The runs of a model, without copies of one or others of the same seed (with the data elsewhere, say), and without
    evaluations made differently from those of most seeds"""
    copies, by_seed = find_copies({run.name: {run.first["settings"]["model"]} for run in runs}), {}
    for run in [run for run in runs if run.name not in copies and run.first["model_settings"].get("seed") is not None]:
        if (first := by_seed.setdefault(run.first["model_settings"]["seed"], run.name)) != run.name:
            warn(f"{run.name} is left out: it has the same seed as {first}")
            copies.add(run.name)
    runs = [run._replace(results=dict(run.results)) for run in runs if run.name not in copies]
    for algorithm in ALGORITHMS:
        evaluated = [run for run in runs if algorithm in run.results]
        most = collections.Counter(run.work[algorithm] for run in evaluated).most_common(1)
        for run in [run for run in evaluated if run.work[algorithm] != most[0][0]]:
            warn(f"{run.name}: its evaluation by {run.work[algorithm]} is left out of the row, which is by {most[0][0]}")
            del run.results[algorithm]
    iterations = {run.first["model_iteration"] for run in runs if run.results}
    if len(iterations) > 1:
        warn(f"the row of {runs[0].name} averages seeds at different iterations: {', '.join(map(str, sorted(iterations)))}")
    return [run for run in runs if run.results]


def get_num_latents(run):
    """The number of latents per image in training: proposals and remembered ones"""
    settings = util.get_first_names(run.first["model_settings"])
    return settings["num_particles"] + settings.get("memory_size", 0)


def get_row(name, runs):
    """CSV columns for the runs of a model, which differ only in the seed; None where there is no value"""
    iterations, first = [run.first["model_iteration"] for run in runs], runs[0].first
    row = {
        "model": name,
        "algorithm": first["model_settings"]["algorithm"],
        "particles": get_num_latents(runs[0]),
        "iteration": "-".join(map(str, sorted({min(iterations), max(iterations)}))),
        "seeds": len(runs),
        "images": runs[0].images.kind,
        "fingerprint": runs[0].images.fingerprint,
        "images in words": describe_images(first),
        "equal to training images": max(result.get("num_seen", 0) for run in runs for result in run.results.values()),
        "evaluated by": "; ".join(dict.fromkeys(work for run in runs for work in run.work.values())),
    }
    estimates = {}  # means over images and their standard errors, of each run
    for algorithm in ALGORITHMS:
        found = [run.results[algorithm] for run in runs if algorithm in run.results]
        estimates[algorithm] = [(result["log_p"], result["standard_error"]) for result in found]
    by_all = [algorithm for algorithm in ALGORITHMS if len(estimates[algorithm]) == len(runs)]  # averages are of the same work
    bounds = [get_joint_bound([run.results[algorithm] for algorithm in by_all]) for run in runs if by_all]
    row["best by"] = "; ".join(runs[0].work[algorithm] for algorithm in by_all)
    estimates["best"] = list(map(max, zip(*(estimates[algorithm] for algorithm in by_all), strict=True)))
    estimates["enumeration bound"] = [(bound.mean().item(), get_standard_error(bound.tolist())) for bound in bounds]
    for estimate, found in estimates.items():
        values = [value for value, _ in found]
        row[estimate] = sum(values) / len(values) if values else None
        row[f"{estimate} seeds"] = len(values)
        row[f"{estimate} s.e. over seeds"] = get_standard_error(values) if len(values) > 1 else None
        row[f"{estimate} s.e. over images"] = found[0][1] if len(found) == 1 else None
    errors = [error for run in runs if (error := get_search_error(run.results.get("mws", {})))]
    for i, name in enumerate(SEARCH_ERRORS):
        row[name] = sum(error[i] for error in errors) / len(errors) if errors else None
        row[f"{name} seeds"] = len(errors)
    return row


def print_table(rows):
    """Prints the rows of one set of images, below a line that says which they are and whether models trained on them"""
    first, width = rows[0], max(len(row["model"]) for row in rows)
    names = ESTIMATES + SEARCH_ERRORS * any(row["search error"] is not None for row in rows)
    print(f"{first['images in words']}, {KINDS[first['images']]} (fingerprint {first['fingerprint'].split()[0]}):")
    print(f"{'model':{width}} particles     iteration seeds" + "".join(f" {name:>17}" for name in names))
    for row in rows:
        values = "".join(f" {describe_value(row, name):>17}" for name in names)
        print(f"{row['model']:{width}} {row['particles']:9} {row['iteration']:>13} {row['seeds']:5}{values}")
    for work in dict.fromkeys(work for row in rows for work in row["evaluated by"].split("; ")):
        names = [row["model"] for row in rows if work in row["evaluated by"].split("; ")]
        print(f"evaluated by {work}" + f" ({', '.join(names)})" * (len(names) < len(rows)))
    if seen := max(row["equal to training images"] for row in rows):
        print(f"not all are unseen: {seen} equal training images")


def describe_value(row, name):
    if row[name] is None:
        return "missing"
    error, num_seeds = row.get(f"{name} s.e. over seeds"), row[f"{name} seeds"]
    fewer = f" ({num_seeds})" * (num_seeds < row["seeds"])
    return f"{row[name]:.2f}" + ("" if error is None else f" ± {error:.2f}") + fewer


def write_csv(path, rows):
    """Writes a table: rows, dicts with the same keys"""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    util.write(path, file.getvalue().encode(errors="surrogateescape"))


# ------------------------------------------------------------------ figures


class Line(NamedTuple):
    """log p of a model in nats per image: each field has a number per point"""

    x: list
    y: np.ndarray
    low: np.ndarray  # a band over seeds
    high: np.ndarray
    dotted: np.ndarray | None = None  # another estimate


def draw_lines(path, lines, title, xlabel, ticks=None, limits=None):
    """Draws lines, {label: Line}, into a PDF. Args: title: its lines, some possibly empty; ticks: of the x-axis; limits: of the
    y-axis"""
    import matplotlib  # here, since a sweep's jobs, which draw nothing, start sooner without it

    from results import figures

    figure = figures.make_figure(6.4, 4.1, "\n".join(filter(None, title)))
    axes = figure.subplots()
    if len(lines) > 10:  # the colours that matplotlib starts with
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for label, line in lines.items():
        (drawn,) = axes.plot(
            line.x, line.y, marker="o", markersize=2.5, lw=1.3, label=figures.literal(textwrap.fill(label, 60))
        )
        axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.25)
        if line.dotted is not None:
            axes.plot(line.x, line.dotted, ".:", markersize=2.5, color=drawn.get_color(), lw=1.3)
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="log p(x), nats per image", ylim=limits)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figures.save_pdf(path, [figure])


def get_labels(names):
    """Splits the names of models. Returns: labels, {name: parts that others lack}; what all have in common, in words"""
    parts = {name: name.replace("test_run_", "test run_").split("_") for name in names}
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    labels = {name: "_".join(part for part in own if part not in common) for name, own in parts.items()}
    labels = {name: label.replace("test run_", "test_run_") or name for name, label in labels.items()}
    if len(set(labels.values())) < len(labels):  # names may have the same parts in another order
        labels = {name: name for name in names}
    words = [f"{part} latents per image" if part.isdigit() else part for part in next(iter(parts.values())) if part in common]
    return labels, ", ".join(words)


def write_figure(path, rows):
    """Draws the paper's figure: log p against the number of latents per image, a line per training algorithm, with standard
    errors over seeds. log p is, at each point, the best estimate or, if that is higher, the guaranteed bound. Standard errors
    over images are only in the CSV, since the choice of images moves all models together."""
    rows = [row for row in rows if not is_test_run(row["model"])] or rows
    most = collections.Counter(row["best by"] for row in rows).most_common(1)[0][0]
    others = [row["model"] for row in rows if row["best by"] != most]
    if others:
        warn(f"the figure is of the models evaluated by {most}, and leaves out {', '.join(others)}")
    rows = [row for row in rows if row["best by"] == most]
    models = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row["particles"]):
        models[re.sub(rf"_{row['particles']}(?=_|$)", "", row["model"], count=1)].append(row)
    labels, common = get_labels(models)
    lines = {}
    for name, own in models.items():
        highest = [max("best", "enumeration bound", key=row.get) for row in own]
        values = np.array([row[key] for key, row in zip(highest, own, strict=True)])
        error = np.array([row[f"{key} s.e. over seeds"] or 0 for key, row in zip(highest, own, strict=True)])
        lines[labels[name]] = Line([row["particles"] for row in own], values, values - error, values + error)
    caption = "best estimate, or the guaranteed bound if that is higher"
    caption += "; band: standard error over seeds" * any(row["best s.e. over seeds"] for row in rows)
    iterations = sorted({int(num) for row in rows for num in row["iteration"].split("-")})
    caption += f"; trained for {iterations[0]} to {iterations[-1]} iterations" * (len(iterations) > 1)
    title = [rows[0]["images in words"], common, caption]
    ticks = sorted({row["particles"] for row in rows})
    draw_lines(path, lines, title, "latents per image (mws: proposals + memory)", ticks)


# ------------------------------------------------------------------ log p in the course of training


def get_milestones_folder(name, mode):
    """Where the evaluations of a run's milestones are"""
    return util.SAVE / name / "logp" / f"{mode}_every_checkpoint"


def read_milestones(name, modes="*"):
    """The evaluations of a run's milestones, grouped by what must agree within a figure:
    {(images, what describe_work says): {iteration: result}}. Args: modes: test, train or, for both, *"""
    groups = collections.defaultdict(dict)
    paths = sorted((util.SAVE / name / "logp").glob(f"{modes}_every_checkpoint/[!.]*.pt"))
    for result in load_results(name, paths, lambda result: f"{result['model_iteration']}.pt"):
        groups[get_images(result), describe_work(result["settings"])][result["model_iteration"]] = result
    return groups


def compare_milestones(names):
    """Writes log p against iterations of runs with every checkpoint evaluated to save/logp_by_iteration.csv and .pdf. Returns:
    lines of text. Raises: UserError if there are none"""
    runs = {name: read_milestones(name) for name in names}
    command = "python eval_logp.py --algorithm own --every-checkpoint --checkpoint-path"
    for name in [name for name in runs if not runs[name]]:
        warn(f"{name} is left out: none of its checkpoints is evaluated; {command} {name}")
        del runs[name]
    if not runs:
        raise UserError(f"no checkpoints of these runs are evaluated yet: {command} RUN")
    return draw_milestones(runs, util.SAVE / "logp_by_iteration.pdf")


def draw_milestones(runs, path):
    """Writes a CSV, and a figure with each model's guaranteed bound (lines, with the range over seeds) and estimates of log p
    (dotted). Of several sets of images, takes that of most runs, test images first.

    Args: runs: {name: what read_milestones returns}; path: of the figure
    Returns: lines of text, one per model, about the last iteration that all its seeds have in common
    Raises: UserError if no model has one
    """
    kinds = collections.Counter(kind for found in runs.values() for kind in found)
    if not kinds:
        raise UserError("no evaluations are left to draw; see the warnings")
    kind = min(kinds, key=lambda kind: (-kinds[kind], get_place(kind[0])))
    models, rows, lines, texts = collections.defaultdict(list), [], {}, []
    first = {name: next(iter(found[kind].values())) for name, found in runs.items() if kind in found}
    row_names = name_rows({name: result["model_settings"] for name, result in first.items()})
    if len(first) == 1:  # with its seed
        row_names = {name: name for name in first}
    for name in sorted(runs, key=get_order):
        if kind not in runs[name]:
            warn(f"{name} is left out: its checkpoints were evaluated on other images or with other numbers of particles")
    # Different settings may lead to the same model at first: RWS and VIMCO take the same first step
    digests = {
        name: {(str(result["model_settings"]), result["settings"]["model"]) for result in runs[name][kind].values()}
        for name in sorted(first, key=get_order)
    }
    copies = find_copies(digests)
    for name in [name for name in digests if name not in copies]:
        results = runs[name][kind]
        models[row_names[name]].append(results)
        rows += [get_milestone_row(name, results[i]) for i in sorted(results)]
        images = describe_images(first[name])
    labels, common = get_labels(models)
    for name, seeds in models.items():
        x = sorted(set.intersection(*map(set, seeds)))  # iterations common to all seeds
        if not x:
            warn(f"{name} is left out: its seeds have no evaluated iteration in common")
            continue
        log_p, bound = (
            np.array([[seed[i][key] for i in x] for seed in seeds]) for key in ("log_p", "enumeration_bound")
        )  # [S, X]
        num_seeds = util.count(len(seeds), "seed")
        lines[f"{labels[name]} ({num_seeds})"] = Line(x, bound.mean(0), bound.min(0), bound.max(0), log_p.mean(0))
        ends = [describe_values(values[:, -1]) for values in (log_p, bound)]
        texts.append(f"{name}: log p {ends[0]}, enumeration bound {ends[1]}, {num_seeds}, at iteration {x[-1]}")
    if not lines:
        raise UserError("the seeds of no model have an evaluated iteration in common: evaluate them when they are trained")
    caption = "lines: enumeration bound (guaranteed), dotted: estimate"
    caption += "; band: range over seeds" * any(len(seeds) > 1 for seeds in models.values())
    draw_lines(path, lines, [images, common, caption], "iteration", limits=choose_limits(lines.values()))
    write_csv(path.with_suffix(".csv"), rows)
    return [f"{images} (fingerprint {kind[0].fingerprint.split()[0]}):", *texts, f"{path.with_suffix('.csv')}, {path}"]


def choose_limits(lines):
    """The range of the y-axis for Lines, whose first points may be far below, or infinite; None if no value is finite"""
    bounds, ends = np.concatenate([line.y for line in lines]), np.array([line.y[-1] for line in lines])
    highest = np.concatenate([values for line in lines for values in (line.high, line.dotted)])
    bounds, ends, highest = (values[np.isfinite(values)] for values in (bounds, ends, highest))
    return (min([np.quantile(bounds, 0.25), *ends]) - 10, highest.max() + 3) if len(bounds) else None


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
    """Args: mode: test or train, or None for all images; name_missing: also list the paper's models without a value for the
    images shown first"""
    kind = {"test": "test", "train": "training"}.get(mode)
    runs = [run for path in sorted(util.SAVE.glob("[!.]*/logp")) for run in read_runs(path.parent)]
    groups = group([run for run in runs if kind in (None, run.images.kind)])
    if not groups:
        print(
            f"nothing in {util.SAVE}/ has been evaluated{f' on {kind} images' if kind else ''} yet; evaluate a model with"
            " python eval_logp.py --checkpoint-path CHECKPOINT --algorithm mws"
        )
        return 0
    tables = []
    with checkpoints.using({"path": util.SAVE}):  # evaluations that are right one by one may not fit together
        for models in groups.values():
            tables.append([get_row(name, seeds) for name, seeds in models.items()])
            print_table(tables[-1])
            print("\n".join([*describe_leads(models), ""]))
    missing = [name for name in PAPER_MODELS if name not in {row["model"] for row in tables[0]}]
    if name_missing and missing:
        print(f"models of the paper without a value: {', '.join(missing)}")
    path = util.SAVE / ("logp_train.csv" if mode == "train" else "logp.csv")
    write_csv(path, [row for table in tables for row in table])
    drawn, figure = [row for row in tables[0] if row["best"] is not None], ""  # other rows have no estimate for all seeds
    if drawn:
        write_figure(path.with_suffix(".pdf"), drawn)
        figure = f"; a figure of {drawn[0]['images in words']} is in {path.with_suffix('.pdf')}"
    print(f"nats per image, means over images; also in {path}{figure}")
    return 0
