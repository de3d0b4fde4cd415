"""The report of all evaluations in save/: a table, save/logp.csv and save/logp.pdf."""

import collections
import csv
import io
import math
import re
import textwrap
from typing import NamedTuple

import scipy.special
import torch

import scoring
import util
from runs import checkpoints
from util import UserError, warn

TRAINED = ["sleep", "rws", "vimco"]  # the paper's, which train a network for the evaluation
ALGORITHMS = [*TRAINED, "own", "mws"]
ESTIMATES = [*ALGORITHMS, "best", "enumeration bound"]
SEARCH_ERRORS = ["search error", "gain of two"]  # see get_search_error
# Names of the runs of section 4.2
PAPER_MODELS = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in (3, 5, 10, 20, 40)]
PAPER_MODELS += ["a_mws_40"]

SAME = ["model"]  # among a run's evaluations of the same images in a row; those of TRAINED also agree in the effort:
EFFORT = ["num_particles", "num_iterations", "batch_size", "test_num_particles"]


# ------------------------------------------------------------------ reading


class Images(NamedTuple):
    """A set of images; what is of different ones is never in the same row, table or figure"""

    kind: str  # one of checkpoints.KINDS_OF_IMAGES
    fingerprint: str  # and their number in brackets


class Run(NamedTuple):
    """What is known about log p of some images under one trained model, from comparable evaluations"""

    name: str  # name of its folder in save/
    settings: dict  # of its training
    iteration: int
    estimates: dict  # for each available one of ESTIMATES: (mean over images, its standard error), nats
    search_error: tuple | None  # of the evaluation by mws, see get_search_error
    work: str  # the evaluations' particles and iterations, in words
    images: Images
    images_in_words: str
    bound_by_image: torch.Tensor | None = None  # [N], guaranteed, of the evaluation by mws


def describe(path):
    """Describes a result of eval_logp.py in a sentence"""
    result = checkpoints.load_result(path)
    error, search_error = get_search_error(result), ""
    if error is not None:
        search_error = f", search error {error[0]:.2f} (both halves together gain {error[1]:.2f} over one)"
    return (
        f"log p(x) = {result['log_p']:.2f} nats per image (standard error over images {result['standard_error']:.2f}),"
        f" enumeration bound {result['enumeration_bound']:.2f}{search_error}, {describe_images(result)},"
        f" {result['run']} at iteration {result['model_iteration']} by {result['settings']['algorithm']}"
    )


def get_search_error(result):
    """How much the searches of an evaluation by mws may have missed, in nats per image: the difference of its halves' mean
    bounds, and what the programs of both together gain over those of one; None for other evaluations"""
    if "search_error" not in result:
        return None
    return result["search_error"], result["enumeration_bound"] - result["bound_by_half"].mean().item()


def read_runs(folder):
    """Reads the evaluations of one run. Returns: a Run for each set of images, the one to show first at the front; warns about
    each evaluation that is damaged or left out"""
    by_images = collections.defaultdict(dict)  # images -> algorithm -> (path, result)
    for path in [*sorted(folder.glob("logp/[!.]*.pt")), *sorted(folder.glob("logp/older/[!.]*.pt"))]:
        try:
            result = checkpoints.load_result(path)
        except UserError as error:
            warn(str(error))
            continue
        warn_of_older(path, result)
        known = by_images[get_images(result)].setdefault(result["settings"]["algorithm"], (path, result))
        if known[0] != path:
            warn(f"{path} is left out: {known[0]} holds an evaluation of the same images")
    runs = [make_run(folder, some) for some in by_images.values()]
    return sorted(runs, key=lambda run: get_rank(run.images))


def warn_of_older(path, result):
    """Warns if the name of an older version's file is not what this one would call it"""
    kind, name = result["settings"]["kind_of_images"], path.stem.split("_")[0]
    if checkpoints.OLDER in result and path.parent.name != "older" and name == "test" != result["settings"]["mode"]:
        number = len(result["log_p_by_image"])
        warn(f"{path}, by an older version, holds an evaluation of {number} training images; it is shown under {kind}")


def make_run(folder, evaluations):
    """Makes a Run of a run's evaluations of the same images: algorithm -> (path, result)"""
    results = {algorithm: result for algorithm, (_, result) in evaluations.items()}
    shown = choose_comparable(results)
    newest = next(iter(shown.values()))
    for algorithm in results.keys() - shown.keys():
        differences = describe_differences(results[algorithm]["settings"], newest["settings"])
        path = evaluations[algorithm][0].relative_to(folder / "logp")
        warn(f"{folder.name}: {path} is left out: its {differences}; eval_logp.py --force repeats it")
    estimates = {name: (shown[name]["log_p"], shown[name]["standard_error"]) for name in ALGORITHMS if name in shown}
    estimates["best"] = max(estimates.values())
    bound = get_joint_bound(shown.values())
    estimates["enumeration bound"] = bound.mean().item(), get_standard_error(bound.tolist())
    return Run(
        folder.name,
        newest["model_settings"],
        newest["model_iteration"],
        estimates,
        get_search_error(shown.get("mws", {})),
        describe_work(shown),
        get_images(newest),
        describe_images(newest),
        bound if "mws" in shown else None,
    )


def get_images(result):
    return Images(result["settings"]["kind_of_images"], result["settings"]["images"])


def get_rank(images):
    """A sort key: test images first"""
    return checkpoints.KINDS_OF_IMAGES.index(images.kind), images.fingerprint


def describe_images(result):
    """The images of an evaluation, in words"""
    args, kind, number = result["args"], result["settings"]["kind_of_images"], len(result["log_p_by_image"])
    chosen = f"all {number}" if number < args["num_data"] else f"the first {number}"
    chosen = f"{number} evenly spread" if args.get("images") == "spread" else chosen
    if kind == "training":
        return f"{chosen} training images"
    part = "test" if result["settings"]["mode"] == "test" else "training"
    whose = args.get("data_location") or "other data" if kind == "other" else "the model's data"
    return f"{chosen} images of the {part} part of {whose}"


def describe_work(results):
    """The evaluations' particles and iterations, in words. Args: results: algorithm -> result"""
    work, trained = [], [result["settings"] for algorithm, result in results.items() if algorithm in TRAINED]
    if trained:
        of_training = "{num_iterations} iterations, {num_particles} and {test_num_particles} particles"
        work.append(of_training.format(**trained[0]))
    if "sleep" in results:
        work.append("{num_dreams} samples a step of sleep".format(**results["sleep"]["settings"]))
    if "own" in results:
        work.append("own network {test_num_particles} particles".format(**results["own"]["settings"]))
    if "mws" in results:
        work.append("mws {num_iterations} iterations, {test_num_particles} particles".format(**results["mws"]["settings"]))
    return ", ".join(work)


def choose_comparable(results):
    """Chooses the evaluations of a run and some images (algorithm -> result) that may share a row: of the same model and,
    among those of TRAINED, with the same effort. Of several such groups, takes that of the latest model, then of the most
    iterations and particles."""
    groups = collections.defaultdict(dict)
    for algorithm in TRAINED:
        if algorithm in results:
            settings = results[algorithm]["settings"]
            groups[str([settings[name] for name in SAME + EFFORT])][algorithm] = results[algorithm]
    for algorithm in [name for name in results if name not in TRAINED]:
        same = [group for group in groups.values() if is_same(results[algorithm], next(iter(group.values())), SAME)]
        for group in same or [groups[algorithm]]:
            group[algorithm] = results[algorithm]

    def get_rank(group):
        result = next(iter(group.values()))
        work = [result["settings"][name] for name in ("num_iterations", "test_num_particles", "num_particles")]
        return [result["model_iteration"], *work, len(group)]

    return max(groups.values(), key=get_rank)


def is_same(one, other, names):
    return all(one["settings"][name] == other["settings"][name] for name in names)


def describe_differences(settings, shown):
    """Describes in words how an omitted evaluation differs from those shown"""
    trained = settings["algorithm"] in TRAINED and shown["algorithm"] in TRAINED
    return ", ".join(
        f"{name.replace('_', '-')} is {settings[name]}, not {shown[name]}"
        for name in SAME + EFFORT * trained
        if settings[name] != shown[name]
    )


def get_joint_bound(results):
    """The enumeration bound over the latents seen in any of a model's evaluations: [N]"""
    some_rows = []
    for result in results:
        latents = result["latents"]
        some_rows.append(scoring.get_rows(latents["obs_id"].long(), latents["codes"], latents["log_joint"]))
        num_images = len(result["log_p_by_image"])
    return scoring.get_enumeration_bound(scoring.keep_best(scoring.merge(some_rows)), num_images)


def get_standard_error(values):
    """Standard error of the mean; NaN for a single value"""
    if len(values) < 2:
        return math.nan
    return (torch.tensor(values, dtype=torch.double).std() / math.sqrt(len(values))).item()


# ------------------------------------------------------------------ rows


def get_name(run_name):
    """A run's name without its seed: that of the row it shares with other seeds"""
    return re.sub(r"_seed=\d+", "", run_name)


def describe_model(settings, name):
    """A model in words, for legends: the algorithm, whether it is conditional, and the settings in its run's name that are
    not the number of latents"""
    words = settings["algorithm"].upper() if settings["algorithm"] != "sleep" else "sleep"
    words += ", conditional on the alphabet" if settings.get("condition_on_alphabet") else ""
    more = [part.replace("=", " ").replace("-", " ") for part in get_name(name).split("_") if "=" in part]
    return ", ".join([words, *["all characters"] * ("_large" in name and "dataset-size" not in name), *more])


def get_num_latents(run):
    """Latents per image; for mws, proposals plus memory"""
    return run.settings["num_particles"] + run.settings["memory_size"]


def get_rows(runs):
    """One dict of CSV columns per model and set of images, over its seeds: sets to be shown first at the front, test images
    and then those of most models; in each the paper's order of models"""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.images, get_name(run.name)].append(run)
    for key, group in list(groups.items()):  # seeds evaluated with different effort must not be averaged
        some = collections.Counter(run.work for run in group).most_common(1)[0][0]
        for run in [run for run in group if run.work != some]:
            warn(f"{run.name} is left out of its row: it was evaluated by {run.work}, the others by {some}")
        groups[key] = [run for run in group if run.work == some]
    num_models = collections.Counter(images for images, name in groups if not is_test_run(name))

    def get_place(key):
        kind, *rest = get_rank(key[0])
        return kind, -num_models[key[0]], *rest, get_order(key[1])

    return [get_row(name, groups[images, name]) for images, name in sorted(groups, key=get_place)]


def is_test_run(name):
    return name.startswith("test_run_")


def get_order(name):
    """A sort key: the paper's models first; numbers by value, as in rws_3, rws_10"""
    place = PAPER_MODELS.index(name) if name in PAPER_MODELS else len(PAPER_MODELS)
    return place, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def get_row(name, runs):
    """CSV columns for the runs of a model, which differ only in the seed; None where there is no value"""
    iterations = sorted({run.iteration for run in runs})
    row = {
        "model": name,
        "algorithm": runs[0].settings["algorithm"],
        "particles": get_num_latents(runs[0]),
        "iteration": "-".join(map(str, iterations[:1] + iterations[1:][-1:])),
        "seeds": len(runs),
        "images": runs[0].images.kind,
        "fingerprint": runs[0].images.fingerprint,
        "images in words": runs[0].images_in_words,
        "evaluated with": runs[0].work,
        "in words": describe_model(runs[0].settings, name),
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


# ------------------------------------------------------------------ showing


def print_table(rows):
    """Prints the rows of some images"""
    print(describe_table(rows))
    width, names = max(len(row["model"]) for row in rows), ESTIMATES
    names = [*names, *SEARCH_ERRORS] if any(row["search error"] is not None for row in rows) else names
    print(f"{'model':{width}} particles     iteration seeds" + "".join(f"{name:>18}" for name in names))
    for row in rows:
        values = "".join(f"{format_value(row, name):>18}" for name in names)
        print(f"{row['model']:{width}} {row['particles']:9} {row['iteration']:>13} {row['seeds']:5}{values}")
    for work in dict.fromkeys(row["evaluated with"] for row in rows):
        names = [row["model"] for row in rows if row["evaluated with"] == work]
        print(f"evaluated with {work}: {'all' if len(names) == len(rows) else ', '.join(names)}")


def describe_table(rows):
    """A line that says which images the rows are of, and whether the models know them"""
    known = {"test": "unseen", "training": "on which the models were trained", "other": "of other data than the models'"}
    kind, fingerprint = rows[0]["images"], rows[0]["fingerprint"].split()[0]
    return f"{rows[0]['images in words']}, {known[kind]} (fingerprint {fingerprint}):"


def describe_leads(runs):
    """How far the best model is ahead of each other one, by the guaranteed bounds of memoised evaluations of the same images:
    lines of text. Intervals are paired over images, whose choice moves all models together, and say nothing of other seeds."""
    by_model = collections.defaultdict(list)
    for run in runs:
        if run.bound_by_image is not None:
            by_model[get_name(run.name)].append(run.bound_by_image)
    bounds = {name: torch.stack(some).mean(0) for name, some in by_model.items()}  # [N], means over seeds
    names = sorted(bounds, key=lambda name: -bounds[name].mean())
    lines = []
    for name in names[1:]:
        lead = bounds[names[0]] - bounds[name]
        text = f"{names[0]} is {lead.mean():.1f} nats per image ahead of {name}"
        if len(lead) > 1:
            half = scipy.special.stdtrit(len(lead) - 1, 0.975) * get_standard_error(lead.tolist())
            text += f"; 95 % interval over images {lead.mean() - half:.1f} to {lead.mean() + half:.1f}"
        seeds = [len(by_model[some]) for some in (names[0], name)]
        lines.append(f"{text}; {seeds[0]} and {seeds[1]} seeds")
    return lines


def format_value(row, name):
    if row[name] is None:
        return "missing"
    error = row.get(f"{name} s.e. over seeds")
    return f"{row[name]:.2f}" + ("" if error is None else f" ± {error:.2f}")


def write_csv(path, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    util.write(path, file.getvalue().encode())


def write_figure(path, rows):
    """Draws the paper's figure: log p against the number of latents per image, a line per training algorithm; test runs
    get their own panel. Error bars show standard errors over seeds. Those over images are in the CSV alone: the models are
    evaluated on the same images, whose choice moves all of them together."""
    panels = [[row for row in rows if is_test_run(row["model"]) == kind] for kind in (False, True)]
    panels = [(title, panel) for title, panel in zip(["", "test runs"], panels, strict=True) if panel]
    figure = get_figure(6 * len(panels), 4.4)
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        common = draw_panel(axes, panel)
        axes.set_title(", ".join(filter(None, [title, common])), fontsize=8)
    bars = "; bars: standard error over seeds" * any(row["best s.e. over seeds"] for row in rows)
    figure.supxlabel(rows[0]["images in words"] + bars, fontsize=7)
    save_figure(path, figure)


def draw_panel(axes, rows):
    """Returns: what all models have in common, in words"""
    lines = collections.defaultdict(list)
    for row in rows:
        lines[re.sub(rf"_{row['particles']}(?=_|$)", "", row["model"], count=1)].append(row)
    words, common = set_apart({name: line[0]["in words"].split(", ") for name, line in lines.items()})
    for i, (name, line) in enumerate(lines.items()):
        label = "\n".join(textwrap.wrap(words[name], 60))
        line = sorted(line, key=lambda row: row["particles"])
        errors = [row["best s.e. over seeds"] or 0 for row in line]
        # lines are offset slightly, so that their error bars do not overlap
        x, y = [row["particles"] * 1.02 ** (i - len(lines) / 2) for row in line], [row["best"] for row in line]
        axes.errorbar(x, y, errors, marker="o", capsize=3, lw=1.2, elinewidth=0.8, label=label)
    ticks = sorted({row["particles"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("latents per image (mws: proposals + memory)")
    axes.set_ylabel("log p(x), nats per image")
    axes.legend(title="trained by", fontsize=7, title_fontsize=7)
    axes.grid(alpha=0.3)
    return common


def get_figure(width, height):
    """An empty one, of that size in inches"""
    import matplotlib.figure  # jobs of a sweep, which draw nothing, start sooner without it

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(path, figure):
    file = io.BytesIO()
    figure.savefig(file, format="pdf", metadata={"CreationDate": None})
    util.write(path, file.getvalue())


# ------------------------------------------------------------------ log p in the course of training


def get_milestones_folder(name, mode):
    """Where the evaluations of a run's milestones lie"""
    return util.SAVE / name / "logp" / f"{mode}_every_checkpoint"


def read_milestones(*folders):
    """The evaluations of a run's milestones in these folders. Returns: for each set of images, number of particles and model's
    training: a list, in order of iterations; warns about those that are damaged"""
    groups = collections.defaultdict(list)
    for path in [path for folder in folders for path in folder.glob("[!.]*.pt")]:
        try:
            result = checkpoints.load_result(path)
        except UserError as error:
            warn(f"{error}; left out")
            continue
        if result["model_iteration"] > 0:  # 0, in pretraining, is on no logarithmic axis
            groups[get_kind(result)].append(result)
    return {kind: sorted(results, key=lambda result: result["model_iteration"]) for kind, results in groups.items()}


def get_kind(result):
    """What evaluations in one figure have in common"""
    return get_images(result), *(result["settings"][name] for name in EFFORT)


def get_milestone_row(name, result):
    """CSV columns"""
    bound = result["enumeration_bound_by_image"]
    return {
        "model": name,
        "iteration": result["model_iteration"],
        "images": result["settings"]["kind_of_images"],
        "fingerprint": result["settings"]["images"],
        "number of images": len(bound),
        "particles": result["settings"]["test_num_particles"],
        "log p": result["log_p"],
        "log p s.e. over images": result["standard_error"],
        "enumeration bound": result["enumeration_bound"],
    }


def write_milestones(name, mode):
    """Writes a CSV and a figure of log p against iterations. Returns: lines of text that say what and where"""
    folder = get_milestones_folder(name, mode)
    groups = read_milestones(folder).values()
    results = max(groups, key=lambda results: results[-1]["model_iteration"])
    num_others = sum(map(len, groups)) - len(results)
    if num_others:
        warn(f"{name}: {num_others} evaluations of other images or particles are left out; --force repeats them")
    path = folder.with_suffix(".csv")
    write_csv(path, [get_milestone_row(name, result) for result in results])
    lines = draw_milestones({name: results}, path.with_suffix(".pdf"))
    return [*lines, f"{path}, {path.with_suffix('.pdf')}"]


def compare_milestones(names):
    """Writes log p against iterations of some runs, which evaluated every checkpoint on the same images, into
    save/logp_by_iteration.csv and .pdf, a line per model with the range over its seeds; of several sets of images takes that
    of most runs, test images first. Returns: lines of text. Raises: UserError if there are none"""
    runs = {}
    for name in names:
        folder = util.SAVE / name / "logp"
        found = read_milestones(*folder.glob("*_every_checkpoint"), *folder.glob("older/*_every_checkpoint"))
        if found:
            runs[name] = found
        else:
            command = f"python eval_logp.py --algorithm own --every-checkpoint --checkpoint-path {name}"
            warn(f"{name} is left out: none of its checkpoints is evaluated; {command}")
    if not runs:
        raise UserError("no checkpoints of these runs are evaluated yet: eval_logp.py --algorithm own --every-checkpoint")
    kinds = collections.Counter(kind for found in runs.values() for kind in found)
    kind = min(kinds, key=lambda kind: (-kinds[kind], get_rank(kind[0])))
    chosen = {name: found[kind] for name, found in runs.items() if kind in found}
    for name in [name for name in runs if name not in chosen]:
        warn(f"{name} is left out: its checkpoints were evaluated on other images or with other numbers of particles")
    path = util.SAVE / "logp_by_iteration.pdf"
    lines = draw_milestones(chosen, path)
    rows = [get_milestone_row(name, result) for name, results in chosen.items() for result in results]
    write_csv(path.with_suffix(".csv"), rows)
    return [*lines, f"{path.with_suffix('.csv')}, {path}"]


def draw_milestones(runs, path):
    """Draws the guaranteed bound (lines) and the estimates of log p (dotted) of runs, name -> results, against iterations.
    Returns: a line of text per model, about the last iteration that all its seeds have in common. Raises: UserError if no
    model has one"""
    groups, lines = collections.defaultdict(list), []
    for name, results in runs.items():
        groups[get_name(name)].append({result["model_iteration"]: result for result in results})
    common = {name: sorted(set.intersection(*map(set, some))) for name, some in groups.items()}
    for name in [name for name, iterations in common.items() if not iterations]:
        warn(f"{name} is left out: its seeds have no evaluated iteration in common")
        del groups[name]
    if not groups:
        raise UserError("the seeds of no model have an evaluated iteration in common: evaluate them when they are trained")
    figure = get_figure(6.4, 4.4)
    axes = figure.subplots()
    settings = {name: next(iter(some[0].values()))["model_settings"] for name, some in groups.items()}
    words = describe_apart(settings)
    for name in sorted(groups, key=get_order):
        num_seeds, x = len(groups[name]), common[name]
        seeds = f"{num_seeds} seeds" if num_seeds > 1 else "1 seed"
        label = "\n".join(textwrap.wrap(words[name] + (f" ({seeds})" if num_seeds > 1 else ""), 60))
        bound, log_p = draw_model(axes, groups[name], x, label)
        lines.append(f"{words[name]}: log p {log_p}, enumeration bound {bound}, {seeds}, at iteration {x[-1]}")
    result = next(iter(next(iter(runs.values()))))
    axes.set_title(
        f"{describe_images(result)}\nlines: enumeration bound (guaranteed), dotted: estimate; band: range over seeds",
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("log p(x), nats per image")
    results = [result for some in groups.values() for by_iteration in some for result in by_iteration.values()]
    bounds, best = ([result[key] for result in results] for key in ("enumeration_bound", "log_p"))
    middle = sorted(bounds)[len(bounds) // 4]
    axes.set_ylim(middle - 10, max(bounds + best) + 3)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    save_figure(path, figure)
    return [f"{describe_images(result)} (fingerprint {result['settings']['images'].split()[0]}):", *lines]


def draw_model(axes, seeds, x, label):
    """Draws a model's bound and estimate at iterations x. Args: seeds: for each seed, iteration -> result
    Returns: what they are at the last iteration, means with ranges over the seeds, in words"""
    ends = []
    for key, style in [("enumeration_bound", "-"), ("log_p", ":")]:
        values = [[by_iteration[i][key] for by_iteration in seeds] for i in x]
        middle, low, high = [sum(v) / len(v) for v in values], list(map(min, values)), list(map(max, values))
        color = axes.lines[-1].get_color() if style == ":" else None
        marker = "." if len(x) == 1 else None  # a line through it would not show
        own_label = label if style == "-" else None
        (line,) = axes.plot(x, middle, style, marker=marker, color=color, lw=1.3, label=own_label)
        if style == "-":
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.25, lw=0)
        ends.append(f"{middle[-1]:.1f}" + (f" ({low[-1]:.1f} to {high[-1]:.1f})" if len(seeds) > 1 else ""))
    return ends


def describe_apart(settings):
    """Models in words, name -> text; what all have in common is left out. Args: settings: name -> those of its training"""
    parts = {}
    for name, own in settings.items():
        latents = own["num_particles"] + own["memory_size"]
        parts[name] = [*describe_model(own, name).split(", "), f"{latents} latents"]
    return set_apart(parts)[0]


def set_apart(parts):
    """Describes several things, name -> words, by what they do not have in common. Returns: name -> text; text of what
    they have"""
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    apart = {name: ", ".join([part for part in some if part not in common] or some[:1]) for name, some in parts.items()}
    return apart, ", ".join(part for part in next(iter(parts.values())) if part in common)


# ------------------------------------------------------------------ the report


def main(mode=None, name_missing=False):
    """Args: mode: test or train, or None for all images; name_missing: also list the paper's models that have no value for
    the images shown first"""
    util.check_links(util.SAVE)
    runs = [run for path in sorted(util.SAVE.glob("*/logp")) for run in read_runs(path.parent)]
    wanted = {"test": ["test"], "train": ["training"], None: checkpoints.KINDS_OF_IMAGES}[mode]
    rows = get_rows([run for run in runs if run.images.kind in wanted])
    if not rows:
        print(
            f"nothing in {util.SAVE}/ has been evaluated{f' on {wanted[0]} images' if mode else ''} yet; evaluate a model with"
            " python eval_logp.py --checkpoint-path CHECKPOINT --algorithm mws"
        )
        return 0
    tables = collections.defaultdict(list)
    for row in rows:
        tables[row["images"], row["fingerprint"]].append(row)
    for images, table in tables.items():
        print_table(table)
        print("\n".join([*describe_leads([run for run in runs if run.images == images]), ""]))
    first = next(iter(tables.values()))
    missing = [name for name in PAPER_MODELS if name not in {row["model"] for row in first}]
    if name_missing and missing:
        print(f"models of the paper without a value: {', '.join(missing)}")
    suffix = f"_{mode}" if mode == "train" else ""
    paths = util.SAVE / f"logp{suffix}.csv", util.SAVE / f"logp{suffix}.pdf"
    write_csv(paths[0], rows)
    write_figure(paths[1], first)
    print(f"nats per image, means over images; also in {paths[0]}; a figure of {first[0]['images in words']} is in {paths[1]}")
    return 0
