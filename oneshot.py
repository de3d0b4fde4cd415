"""One-shot classification of characters with the strokes that a model has learned.

    python oneshot.py --checkpoint-path pretrained/mws_10_background.pt --runs all_runs.zip

Each run of Omniglot's one-shot task shows characters once, drawn by one person, and asks which of them each drawing by another
person shows. All images are traced with strokes of the model's library (reading/tracing.py), which are then varied to fit the
other images (reading/matching.py). Writes save/<model>/oneshot.csv and, for each run, save/<model>/oneshot/<run>.pdf, with each
test image, its three best characters, and their strokes varied to fit it. Complete runs are not repeated, so rerun the same
command to resume.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import argparse
import functools
import hashlib

import torch
from scipy.stats import binomtest

import models
import rendering
import util
from reading import matching, oneshot_runs, variation
from results import drawings, figures, report
from runs import checkpoints, locks
from util import UserError

NUM_SHOWN = 3  # best characters, in figures
RESOLUTION = 56  # of figures
RESULT_KEYS = {"settings", "forward", "backward", "structure", "answers"}

# ------------------------------------------------------------------ a run


def classify(run, model, args):
    """Compares the test images of an oneshot_runs.Run with its characters. Returns: matching.Comparison"""
    obs = torch.cat([run.characters, run.tests])
    strokes = matching.find_strokes(model, run.inks, obs, args.num_traces, seed=args.seed)
    structure = compare_inks(run, matching.get_structure, matching.get_structural_distance).float()
    characters, tests = (strokes.select(ids) for ids in torch.arange(len(obs)).tensor_split([len(run.characters)]))
    return matching.compare(tests, characters, structure, matching.FINE._replace(num_steps=args.num_steps))


def compare_inks(run, describe, get_distance):
    """The distances between a function's values for the ink of each test image and of each character: [M, N]"""
    described = [describe(ink) for ink in run.inks]
    characters, tests = described[: len(run.characters)], described[len(run.characters) :]
    return torch.tensor([[get_distance(test, character) for character in characters] for test in tests])


def draw(path, run, name, result):
    """Writes a page: each test image, and its best characters with their strokes varied to fit it"""
    total = matching.combine(result.forward, result.backward, result.structure).gather(1, result.candidates)
    order = total.topk(min(NUM_SHOWN, total.shape[1]), 1).indices  # [M, S], among the candidates
    best, test = result.candidates.gather(1, order), torch.arange(len(order)).unsqueeze(1)
    probs = variation.get_probs(result.drawing.select(test, order), RESOLUTION, RESOLUTION)  # [M, S, R, R]
    tests, characters = (drawings.resize(obs, RESOLUTION) for obs in (run.tests, run.characters))
    title = f"{name}, {run.name}: {int((best[:, 0] != run.answers).sum())} of {len(tests)} wrong"
    title += "\ntest image; best characters, their strokes varied to fit it"
    figures.save_pdf(path, [figures.matches_figure(tests, characters, best, probs, run.answers, title)])


# ------------------------------------------------------------------ results


def get_settings(checkpoint, run, args):
    """Everything a result depends on, as plain values"""
    images = b"".join(str(ink.shape).encode() + ink.tobytes() for ink in run.inks)
    return {
        "model": checkpoints.get_digest(checkpoint),
        "images": hashlib.sha1(images).hexdigest()[:12],
        "method": 4,  # changes whenever the same images and settings would give other numbers
        **{name: getattr(args, name) for name in ("num_traces", "num_steps", "seed")},
    }


def get_row(name, run, result):
    """A run's numbers of wrong answers: CSV columns. By distance: the ink's modified Hausdorff distance, without strokes"""
    scores = {
        "wrong": matching.combine(result["forward"], result["backward"], result["structure"]),
        "wrong forward alone": result["forward"],
        "wrong backward alone": result["backward"],
        "wrong without structure": result["forward"] + result["backward"],
        "wrong by structure alone": -result["structure"],
        "wrong by distance": -compare_inks(run, matching.get_points, matching.get_hausdorff_distance),
    }
    wrong = {key: int((value.argmax(1) != run.answers).sum()) for key, value in scores.items()}
    return {"model": name, "run": run.name, "images": len(run.tests), **wrong}


def write_table(path, rows):
    """Writes the CSV. Returns: lines of text with the errors over all images, their 95 % intervals (as if images were
    independent) and their standard errors over runs"""
    report.write_csv(path, rows)
    total, lines = sum(row["images"] for row in rows), []
    for key in [key for key in rows[0] if key.startswith("wrong")]:
        num = sum(row[key] for row in rows)
        excess = [row[key] - row["images"] * num / total for row in rows]  # runs may differ in size
        error = report.get_standard_error(excess) * len(rows) / total
        low, high = binomtest(num, total).proportion_ci(method="wilson")
        over_runs = f"; standard error over runs {error:.1%}" * (len(rows) > 1)
        lines.append(f"{key}: {num} of {total}, {num / total:.1%} (95 % interval {low:.1%} to {high:.1%}{over_runs})")
    return [*lines, str(path)]


# ------------------------------------------------------------------ script


def choose_runs(args):
    """The runs named by --run-ids. Raises: UserError if a number is out of range"""
    runs = oneshot_runs.load(args.runs)
    print(f"{args.runs}: {oneshot_runs.summarise(runs)}", flush=True)
    if args.run_ids and max(args.run_ids) > len(runs):
        raise UserError(f"--run-ids {max(args.run_ids)}: {args.runs} has {util.count(len(runs), 'run')}, counted from 1")
    return [run for number, run in enumerate(runs, start=1) if not args.run_ids or number in args.run_ids]


def main(argv=None):
    args = get_parser().parse_args(argv)
    runs = choose_runs(args)
    checkpoint = checkpoints.load_given(args.checkpoint_path)
    if checkpoint["num_alphabets"]:
        raise UserError(
            f"{args.checkpoint_path} is conditional on alphabets, and does not know those of the runs; give another model"
        )
    name = checkpoints.get_run_name(checkpoint)
    model, _ = models.from_checkpoint(checkpoint)
    util.set_seed(args.seed)
    folder, rows = util.SAVE / name / "oneshot", []
    with locks.lock(folder / ".lock", f"{name} is classifying"):
        settings = [get_settings(checkpoint, run, args) for run in runs]
        paths = [folder / f"{run.name}.pt" for run in runs]
        load = functools.partial(util.load_checkpoint, keys=RESULT_KEYS)
        saved = zip(paths, settings, strict=True)
        results = [None if args.force else checkpoints.load_saved(path, load, own) for path, own in saved]
        with util.show_progress(total=results.count(None), unit="run", disable=None not in results) as bar:
            for run, path, own, result in zip(runs, paths, settings, results, strict=True):
                if result is None or not torch.equal(result["answers"], run.answers):  # or labels were corrected
                    rendering.set_compile(args.compile)
                    found = classify(run, model, args)
                    draw(path.with_suffix(".pdf"), run, name, found)
                    scores = dict(forward=found.forward, backward=found.backward, structure=found.structure)
                    result = dict(settings=own, **scores, answers=run.answers)
                    util.save_checkpoint(path, result)
                    bar.update()
                row = get_row(name, run, result)
                bar.write(f"{run.name}: {row['wrong']} of {row['images']} wrong: {path.with_suffix('.pdf')}")
                rows.append(row)
        print("\n".join(write_table(util.SAVE / name / "oneshot.csv", rows)))
    return 0


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive = parser.add, util.in_range(int, 1)
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one", required=True)
    add("--runs", "Omniglot's all_runs.zip, or a zip or folder of runs in its form", required=True)
    add("--run-ids", "numbers of the runs to classify (default: all)", nargs="+", type=positive)
    add("--num-traces", "traces of each image", type=positive, default=matching.NUM_TRACES)
    add("--num-steps", "gradient steps in the last fit to another image", type=positive, default=matching.FINE.num_steps)
    add("--seed", "seed of all random numbers", type=util.in_range(int, 0, 2**63 - 1), default=0)
    add("--compile", "compile the hot path (default: yes)", action=argparse.BooleanOptionalAction, default=True)
    add("--force", "repeat runs that are complete, or replace those with other settings", action="store_true")
    return parser


if __name__ == "__main__":
    util.run_script(main)
