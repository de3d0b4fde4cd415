"""The report of all evaluations in save/: a table, save/logp.csv and save/logp.pdf."""

import collections
import csv
import io
import math
import re
import textwrap
from typing import NamedTuple

import matplotlib.figure
import torch

import scoring
import util
from runs import checkpoints
from util import UserError, warn

ALGORITHMS = ["sleep", "rws", "vimco"]  # that train an evaluation's network
ESTIMATES = [*ALGORITHMS, "best", "enumeration bound"]
# Names of the runs of section 4.2
PAPER_MODELS = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in (3, 5, 10, 20, 40)]
PAPER_MODELS += ["a_mws_40_large"]

COMPARED = ["mode", "model", "images", "num_particles", "num_iterations", "batch_size", "test_num_particles"]

WINDOW = 100  # iterations averaged for each point

# ------------------------------------------------------------------ reading


class Run(NamedTuple):
    """What is known about log p under one trained model, from comparable evaluations"""

    name: str  # name of its folder in save/
    settings: dict  # of its training
    iteration: int
    estimates: dict  # for each available one of ESTIMATES: (mean over images, its standard error), nats
    work: str  # the evaluations' images, particles and iterations, in words
    seen: bool  # whether the model was trained on these images


def describe(path):
    """Describes a result of eval_logp.py in a sentence"""
    result = checkpoints.load_result(path)
    return (
        f"log p(x) = {result['log_p']:.2f} nats per image (standard error over {len(result['log_p_by_image'])} images"
        f" {result['standard_error']:.2f}), enumeration bound {result['enumeration_bound']:.2f},"
        f" {result['run']} at iteration {result['model_iteration']} by {result['settings']['algorithm']}"
    )


def read_run(folder, mode):
    """Reads the evaluations of one run, or returns None; warns about each that is damaged or left out"""
    results = {}
    for algorithm in ALGORITHMS:
        path = folder / "logp" / f"{mode}_{algorithm}.pt"
        try:
            if path.exists():
                results[algorithm] = checkpoints.load_result(path)
        except UserError as error:
            warn(str(error))
    if not results:
        return None
    shown = choose_comparable(results)
    for algorithm in results.keys() - shown.keys():
        differences = describe_differences(results[algorithm]["settings"], next(iter(shown.values()))["settings"])
        warn(f"{folder.name}: {mode}_{algorithm}.pt is left out: its {differences}; eval_logp.py --force repeats it")
    results, newest = shown, next(iter(shown.values()))
    estimates = {algorithm: (result["log_p"], result["standard_error"]) for algorithm, result in results.items()}
    estimates["best"] = max(estimates.values())
    bound = get_joint_bound(results.values())
    estimates["enumeration bound"] = bound.mean().item(), get_standard_error(bound.tolist())
    settings = newest["settings"]
    work = f"{len(newest['log_p_by_image'])} images, {settings['num_iterations']} iterations, {settings['num_particles']} and"
    work += f" {settings['test_num_particles']} particles"
    seen = mode == "train" or bool(newest["model_settings"].get("small_dataset"))
    return Run(folder.name, newest["model_settings"], newest["model_iteration"], estimates, work, seen)


def choose_comparable(results):
    """Chooses the evaluations of a run (algorithm -> result) that may share a row: of the same model, images and
    settings. Of several such groups, takes that of the latest model, then of the most images, particles and iterations.
    """
    groups = collections.defaultdict(dict)
    for algorithm, result in results.items():
        groups[str([result["settings"][name] for name in COMPARED])][algorithm] = result

    def get_rank(group):
        result = next(iter(group.values()))
        settings = result["settings"]
        work = [settings[name] for name in ("test_num_particles", "num_particles", "num_iterations")]
        return [result["model_iteration"], len(result["log_p_by_image"]), *work, len(group)]

    return max(groups.values(), key=get_rank)


def describe_differences(settings, shown):
    """Describes in words how an omitted evaluation differs from those shown"""
    names = [name for name in COMPARED if settings[name] != shown[name]]
    return ", ".join(f"{name.replace('_', '-')} is {settings[name]}, not {shown[name]}" for name in names)


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


def get_num_latents(run):
    """Latents per image; for mws, proposals plus memory"""
    return run.settings["num_particles"] + run.settings["memory_size"]


def get_rows(runs):
    """One dict of CSV columns per model, over its seeds, in the paper's order"""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[get_name(run.name)].append(run)
    for name, group in list(groups.items()):  # seeds evaluated with different effort must not be averaged
        some = collections.Counter(run.work for run in group).most_common(1)[0][0]
        for run in [run for run in group if run.work != some]:
            warn(f"{run.name} is left out of its row: it was evaluated by {run.work}, the others by {some}")
        groups[name] = [run for run in group if run.work == some]
    names = sorted(groups, key=get_order)
    return [get_row(name, groups[name]) for name in names]


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
        "images": "training" if runs[0].seen else "unseen",
        "evaluated with": runs[0].work,
    }
    for estimate in ESTIMATES:
        found = [run.estimates[estimate] for run in runs if estimate in run.estimates]
        values = [value for value, _ in found]
        row[estimate] = sum(values) / len(values) if values else None
        row[f"{estimate} s.e. over seeds"] = get_standard_error(values) if len(values) > 1 else None
        row[f"{estimate} s.e. over images"] = found[0][1] if len(found) == 1 else None
    return row


# ------------------------------------------------------------------ showing


def print_table(rows):
    width = max(len(row["model"]) for row in rows)
    print(f"{'model':{width}} particles     iteration seeds   images" + "".join(f"{name:>18}" for name in ESTIMATES))
    for row in rows:
        values = "".join(f"{format_value(row, name):>18}" for name in ESTIMATES)
        print(f"{row['model']:{width}} {row['particles']:9} {row['iteration']:>13} {row['seeds']:5} {row['images']:>8}{values}")
    for work in dict.fromkeys(row["evaluated with"] for row in rows):
        names = [row["model"] for row in rows if row["evaluated with"] == work]
        print(f"evaluated with {work}: {'all' if len(names) == len(rows) else ', '.join(names)}")
    if any(row["images"] == "training" for row in rows):
        print("training: the model was trained on these images, as with --small-dataset, where the test set is the training set")


def format_value(row, name):
    if row[name] is None:
        return "missing"
    error = row[f"{name} s.e. over seeds"]
    return f"{row[name]:.2f}" + ("" if error is None else f" ± {error:.2f}")


def write_csv(path, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    util.write(path, file.getvalue().encode())


def write_figure(path, rows):
    """Draws the paper's figure: log p against the number of latents per image, a line per training algorithm; test runs
    get their own panel. Error bars show standard errors over seeds or, for a single seed, over images."""
    is_test_run = [row["model"].startswith("test_run_") for row in rows]
    panels = [[row for row, other in zip(rows, is_test_run, strict=True) if other == kind] for kind in (False, True)]
    panels = [(title, panel) for title, panel in zip(["", "test runs"], panels, strict=True) if panel]
    figure = matplotlib.figure.Figure(figsize=(6 * len(panels), 4.4), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, panel)
        axes.set_title(title, fontsize=9)
    figure.supxlabel("bars: standard error over seeds or, of a single seed, over images", fontsize=7)
    save_figure(path, figure)


def draw_panel(axes, rows):
    lines = collections.defaultdict(list)
    for row in rows:
        lines[re.sub(rf"_{row['particles']}(?=_|$)", "", row["model"], count=1)].append(row)
    for i, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: row["particles"])
        errors = [row["best s.e. over seeds"] or row["best s.e. over images"] or 0 for row in line]
        # lines are offset slightly, so that their error bars do not overlap
        x, y = [row["particles"] * 1.02 ** (i - len(lines) / 2) for row in line], [row["best"] for row in line]
        label = "\n".join(textwrap.wrap(label, 60))
        axes.errorbar(x, y, errors, marker="o", capsize=3, lw=1.2, elinewidth=0.8, label=label)
    ticks = sorted({row["particles"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("latents per image (mws: proposals + memory)")
    axes.set_ylabel("log p(x), nats per image")
    axes.legend(title="trained by", fontsize=6, title_fontsize=7)
    axes.grid(alpha=0.3)


def save_figure(path, figure):
    file = io.BytesIO()
    figure.savefig(file, format="pdf", metadata={"CreationDate": None})
    util.write(path, file.getvalue())


# ------------------------------------------------------------------ learning curves of a sweep


def get_curves(models):
    """Theta losses of runs, by model: name -> a tensor [iterations] per seed"""
    curves = collections.defaultdict(list)
    for model in models:
        try:
            checkpoint = checkpoints.load(checkpoints.get_path(model))
        except UserError as error:
            warn(f"{error}; left out of the figure")
            continue
        theta_loss = checkpoint["statistics"].get("theta_loss", [])
        if len(theta_loss) >= WINDOW:
            curves[get_name(model)].append(theta_loss)
    return curves


def draw_comparison(models):
    """Writes save/theta_loss.pdf. Returns: its path, and a line of text per model: mean and range over seeds of the last
    WINDOW iterations. Raises: UserError if no run has that many"""
    curves = get_curves(models)
    if not curves:
        raise UserError(f"none of these runs has {WINDOW} iterations yet")
    figure, lines = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained"), []
    axes = figure.subplots()
    for name, some in curves.items():
        length = min(map(len, some)) // WINDOW
        means = [[part.mean().item() for part in theta_loss[: length * WINDOW].split(WINDOW)] for theta_loss in some]
        x = [WINDOW * (i + 1) for i in range(length)]
        low, middle, high = zip(*((min(v), sum(v) / len(v), max(v)) for v in zip(*means, strict=True)), strict=True)
        (line,) = axes.plot(x, middle, label=f"{name} ({len(some)} seeds)" if len(some) > 1 else name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.25, lw=0)
        lines.append(f"{name}: theta loss {middle[-1]:.1f} ({low[-1]:.1f} to {high[-1]:.1f}, {len(some)} seeds) at {x[-1]}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("theta loss, nats per image")
    axes.set_title(f"means over {WINDOW} iterations; line: mean over seeds, band: their range", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    path = util.SAVE / "theta_loss.pdf"
    save_figure(path, figure)
    return path, lines


# ------------------------------------------------------------------ the report


def main(mode, name_missing=False):
    """Args: mode: test or train; name_missing: also list the paper's models that have no value"""
    runs = [read_run(path.parent, mode) for path in sorted(util.SAVE.glob("*/logp"))]
    rows = get_rows([run for run in runs if run is not None])
    if not rows:
        print(
            f"nothing in {util.SAVE}/ has been evaluated on {mode} images yet; evaluate a model with"
            " python eval_logp.py --checkpoint-path CHECKPOINT --algorithm rws"
        )
        return 0
    print_table(rows)
    missing = [name for name in PAPER_MODELS if name not in {row["model"] for row in rows}]
    if name_missing and missing:
        print(f"models of the paper without a value: {', '.join(missing)}")
    suffix = "" if mode == "test" else f"_{mode}"
    paths = util.SAVE / f"logp{suffix}.csv", util.SAVE / f"logp{suffix}.pdf"
    write_csv(paths[0], rows)
    write_figure(paths[1], rows)
    print(f"nats per image, means over {mode} images; also in {paths[0]}, and a figure in {paths[1]}")
    return 0
