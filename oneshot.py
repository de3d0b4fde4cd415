"""One-shot classification of characters, with the strokes that a model has learned.

    python oneshot.py --checkpoint-path pretrained/mws_20.pt --runs all_runs.zip

Each run of Omniglot's one-shot task shows characters once, drawn by one person, and asks which of them each drawing by
another person is. All images are traced by strokes of the model's library (reading/tracing.py), and these varied until they
fit the others (reading/matching.py). Writes save/<model>/oneshot.csv and, for each run, a figure,
save/<model>/oneshot/<run>.pdf: the test images, each with its three best characters and their strokes as they were varied to
fit it. Complete runs are not repeated, so rerun the same command to resume.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import argparse
import hashlib
import io
import math

import torch
import torch.nn.functional as F

import models
import rendering
import util
from reading import matching, oneshot_runs, variation
from results import figures, report
from runs import checkpoints, locks
from util import UserError, warn

NUM_SHOWN = 3  # best characters, in figures
RESOLUTION = 56  # of figures
RESULT_KEYS = {"settings", "forward", "backward", "answers"}

# ------------------------------------------------------------------ a run


def classify(run, model, args, tick):
    """Classifies the test images of an oneshot_runs.Run. Returns: matching.Comparison"""
    obs = torch.cat([run.characters, run.tests])
    strokes = matching.find_strokes(model, run.inks, obs, args.num_traces, seed=args.seed, tick=tick)
    split = torch.arange(len(obs)).split([len(run.characters), len(run.tests)])
    characters, tests = (strokes.select(ids) for ids in split)
    return matching.compare(tests, characters, num_steps=args.num_steps, tick=tick)


def draw(run, name, result):
    """A page: each test image, and its best characters with the strokes that were varied to fit it. Returns: PDF bytes"""
    total = matching.combine(result.forward, result.backward).gather(1, result.candidates)
    order = total.topk(min(NUM_SHOWN, total.shape[1]), 1).indices  # [M, S], among the candidates
    best, test = result.candidates.gather(1, order), torch.arange(len(order)).unsqueeze(1)
    shown = result.drawing.select((test * total.shape[1] + order).flatten())
    probs = variation.get_probs(shown, RESOLUTION, RESOLUTION).unflatten(0, order.shape)
    tests = F.interpolate(run.tests.unsqueeze(1), size=RESOLUTION)[:, 0]  # [M, R, R]
    characters = F.interpolate(run.characters.unsqueeze(1), size=RESOLUTION)[:, 0]
    num_wrong = int((best[:, 0] != run.answers).sum())
    title = (
        f"{name}, {run.name}: {num_wrong} of {len(tests)} wrong\ntest image; best characters, their strokes varied to fit it"
    )
    figure = figures.matches_figure(tests, characters, best, probs, run.answers, title)
    file = io.BytesIO()
    figure.savefig(file, format="pdf", metadata={"CreationDate": None})
    return file.getvalue()


# ------------------------------------------------------------------ results


def get_settings(checkpoint, run, args):
    """Everything a result depends on, as plain values"""
    images = b"".join(str(ink.shape).encode() + ink.tobytes() for ink in run.inks)
    return {
        "model": checkpoints.get_digest(checkpoint),
        "images": f"grey {hashlib.sha1(images).hexdigest()[:12]}",  # those of older results were black and white
        "grids": 2,  # older versions fitted all characters in all pixels
        **{name: getattr(args, name) for name in ("num_traces", "num_steps", "seed")},
    }


def load_result(path, run):
    """A run's result. Raises: UserError if it cannot be read or is invalid"""
    result = util.load_checkpoint(path, keys=RESULT_KEYS)
    shape = len(run.tests), len(run.characters)
    right = isinstance(result["settings"], dict) and isinstance(result["answers"], torch.Tensor)
    for scores in (result["forward"], result["backward"]):
        right = right and isinstance(scores, torch.Tensor) and scores.layout == torch.strided and scores.shape == shape
        right = right and scores.dtype == torch.float32 and bool(scores.isfinite().all())
    if not right or not torch.equal(result["answers"], run.answers):
        raise UserError(f"{path} is not a valid result of this run")
    return result


def find_result(path, run, settings, force):
    """A complete result, or None; a damaged one counts as missing. Raises: UserError if there is one with other settings"""
    if force or not path.exists():
        return None
    try:
        result = load_result(path, run)
    except UserError as error:
        warn(f"{error}; {run.name} is classified again")
        return None
    differences = util.describe_differences(result["settings"], settings)
    if differences:
        raise UserError(f"{path} holds a result with other settings: {differences}; --force replaces it")
    return result


def get_row(name, run, result):
    """A run's numbers of wrong answers: CSV columns. By distance: the modified Hausdorff distance of the ink, without strokes"""
    points = [matching.get_points(ink) for ink in run.inks]
    characters, tests = points[: len(run.characters)], points[len(run.characters) :]
    distance = torch.tensor([[matching.get_hausdorff_distance(x, c) for c in characters] for x in tests])  # [M, N]
    scores = {
        "wrong": matching.combine(result["forward"], result["backward"]),
        "wrong forward alone": result["forward"],
        "wrong backward alone": result["backward"],
        "wrong by distance": -distance,
    }
    wrong = {key: int((value.argmax(1) != run.answers).sum()) for key, value in scores.items()}
    return {"model": name, "run": run.name, "images": len(run.tests), **wrong}


def write_table(path, rows):
    """Writes the CSV. Returns: lines of text with the errors of all images and their 95 % intervals"""
    report.write_csv(path, rows)
    total, lines = sum(row["images"] for row in rows), []
    for key in [key for key in rows[0] if key.startswith("wrong")]:
        num = sum(row[key] for row in rows)
        low, high = get_wilson_interval(num, total)
        lines.append(f"{key}: {num} of {total}, {num / total:.1%} (95 % interval {low:.1%} to {high:.1%})")
    return [*lines, str(path)]


def get_wilson_interval(num, total, z=1.96):
    """The Wilson score interval of a share, with 95 % confidence"""
    share = num / total
    middle, reach = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return tuple((middle + sign * reach) / (1 + z**2 / total) for sign in (-1, 1))


# ------------------------------------------------------------------ script


def choose_runs(args):
    """The runs that --run-ids names. Raises: UserError if there is none of that number"""
    runs = oneshot_runs.load(args.runs)
    print(f"{args.runs}: {oneshot_runs.summarise(runs)}", flush=True)
    wrong = [number for number in args.run_ids or [] if number > len(runs)]
    if wrong:
        raise UserError(f"--run-ids {wrong[0]}: {args.runs} has {len(runs)} runs, counted from 1")
    return [run for number, run in enumerate(runs, start=1) if not args.run_ids or number in args.run_ids]


def get_num_ticks(run, args):
    """The number of gradient steps that a run takes, on at most variation.AT_ONCE drawings each"""
    num_characters, num_tests, num_traces = len(run.characters), len(run.tests), args.num_traces
    num_refined = min(num_traces, matching.NUM_REFINED) * num_tests * min(num_characters, matching.NUM_CANDIDATES)
    own = num_traces * (num_characters + num_tests)
    pairs, among = num_traces * num_characters * num_tests, num_traces * num_characters**2
    own, pairs, among, refined = (math.ceil(num / variation.AT_ONCE) for num in (own, pairs, among, num_refined))
    return own * matching.NUM_TRACE_STEPS + (2 * pairs + among) * matching.NUM_COARSE_STEPS + 2 * refined * args.num_steps


def main(argv=None):
    args = get_parser().parse_args(argv)
    runs = choose_runs(args)
    path = checkpoints.find(args.checkpoint_path)
    checkpoint = checkpoints.load(path)
    if checkpoint["num_alphabets"]:
        raise UserError(f"{path} is conditional on alphabets, and those of the runs are unknown to it; give another model")
    name = checkpoints.get_run_name(path, checkpoint["args"])
    model, _ = models.from_checkpoint(checkpoint)
    util.set_seed(args.seed)
    folder, rows = util.SAVE / name / "oneshot", []
    with locks.lock(folder / ".lock", f"{name} is classifying"):
        settings = [get_settings(checkpoint, run, args) for run in runs]
        results = [
            find_result(folder / f"{run.name}.pt", run, own, args.force) for run, own in zip(runs, settings, strict=True)
        ]
        total = sum(get_num_ticks(run, args) for run, result in zip(runs, results, strict=True) if result is None)
        with util.show_progress(total=total, unit="step", disable=total == 0) as bar:
            for run, own, result in zip(runs, settings, results, strict=True):
                bar.set_description(run.name)
                path = folder / f"{run.name}.pt"
                if result is None:
                    rendering.set_compile(args.compile)
                    found = classify(run, model, args, bar.update)
                    util.write(path.with_suffix(".pdf"), draw(run, name, found))
                    result = dict(settings=own, forward=found.forward, backward=found.backward, answers=run.answers)
                    util.save_checkpoint(path, result)
                row = get_row(name, run, result)
                bar.write(f"{run.name}: {row['wrong']} of {row['images']} wrong: {path.with_suffix('.pdf')}")
                rows.append(row)
        print("\n".join(write_table(util.SAVE / name / "oneshot.csv", rows)))
    return 0


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive = parser.add, util.in_range(int, 1)
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one", required=True)
    add("--runs", "Omniglot's all_runs.zip, or the folder that it unpacks to", required=True)
    add("--run-ids", "numbers of the runs to classify (default: all)", nargs="+", type=positive)
    add("--num-traces", "traces of each image", type=positive, default=matching.NUM_TRACES)
    add("--num-steps", "last gradient steps that vary strokes to fit another image", type=positive, default=matching.NUM_STEPS)
    add("--seed", "seed of all random numbers", type=util.in_range(int, 0, 2**63 - 1), default=0)
    add("--compile", "compile the hot path (default: yes)", action=argparse.BooleanOptionalAction, default=True)
    add("--force", "repeat runs that are complete, or replace those with other settings", action="store_true")
    return parser


if __name__ == "__main__":
    util.run_script(main)
