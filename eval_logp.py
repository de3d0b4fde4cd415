"""Estimates log p of images under a trained generative model, and reports all estimates.

    python eval_logp.py --checkpoint-path mws_20 --algorithm own --num-data 500    # a minute
    python eval_logp.py --checkpoint-path mws_20 --algorithm rws                    # hours: the paper's procedure
    python eval_logp.py --checkpoint-path mws_20 --algorithm own --every-checkpoint # in the course of training
    python eval_logp.py --report

The generative model stays fixed. The model's own inference network (own), or a new one that is trained for the
evaluated images (sleep, rws, vimco), proposes the particles of the importance-weighted bound
log p(x) >= E log (1/P) sum_k p(z_k, x) / q(z_k | x) (Burda et al., 2016). The sum of p(z, x) over the distinct programs
that were seen, which include the memory of MWS, is a guaranteed lower bound. Results go to
save/<path_base>/logp/<mode>_<algorithm>.pt. If stopped, rerun the same command to resume.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import argparse
import functools
import math
import signal

import torch

import data
import losses
import models
import rendering
import scoring
import util
from fast import gpu
from fast.cuda_graph import ReplayedStep
from main import get_adam, load_optimizer, update
from reading import programs
from results import report
from runs import checkpoints, kernel_check, locks
from runs.curves import append_statistics, check_finite
from runs.saving import SaveClock, StopSignal
from scoring import ScoreTable, check_rows, get_enumeration_bound
from util import UserError, warn

STATE_KEYS = {"settings", "network", "optimizer", "table", "iteration", "statistics", "log_p", "random_state"}
SETTINGS = "mode algorithm num_particles num_iterations batch_size lstm_hidden_size test_batch_size".split()
SETTINGS += ["test_num_particles", "seed"]  # what a result depends on besides the model and the images
LEARNING_RATE = 1e-3
MANY_MILESTONES = 15  # of a run
MANY_LATENTS = 300_000  # to be scored in an evaluation, for compiling to pay off

# ------------------------------------------------------------------ the state of an evaluation


class Evaluation:
    """A trained generative model, the images, and everything a checkpoint of an evaluation holds."""

    def __init__(self, args, checkpoint, images, num_alphabets, device, memory=None):
        util.set_seed(args.seed, device)
        self.args, self.device = args, device
        self.obs = images.obs.to(device)
        self.alphabet = images.alphabet.to(device) if num_alphabets else None
        self.memory = memory  # packed programs of the images, or None: [N, M, A]
        self.generative_model, self.own_network = models.from_checkpoint(checkpoint, device)
        if args.algorithm == "own":
            self.network = self.own_network
        else:
            self.network = build_network(args, checkpoint["args"], len(self.obs), num_alphabets).to(device)
        self.optimizer = get_adam(self.network.parameters(), device, LEARNING_RATE)
        self.table = ScoreTable(self.generative_model.num_arcs, device)
        self.iteration = 0
        self.statistics, self.pending = {}, []
        self.log_p = torch.empty(0, device=device)  # of the images estimated so far

    def get_checkpoint(self, settings):
        """Raises: UserError if training has diverged"""
        append_statistics(self.statistics, self.pending)
        check_finite(self.network.parameters())
        return dict(
            settings=settings,
            args=vars(self.args),
            network=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            table=self.table.state_dict(),
            iteration=self.iteration,
            statistics=self.statistics,
            log_p=self.log_p,
            random_state=util.get_random_state(self.device),
        )

    def restore(self, state):
        for name in ["network", "table"]:
            getattr(self, name).load_state_dict(state[name])
        load_optimizer(self.optimizer, state["optimizer"])
        self.iteration, self.log_p = state["iteration"], state["log_p"]
        self.statistics = {name: values.cpu() for name, values in state["statistics"].items()}
        util.set_random_state(state["random_state"], self.device)

    def get_inputs(self, obs_id):
        """For a batch of images: obs, alphabet, and the indices by which a lookup network knows them"""
        return dict(
            obs=self.obs[obs_id],
            alphabet=None if self.alphabet is None else self.alphabet[obs_id],
            obs_id=None if self.args.algorithm in ("own", "sleep") else obs_id,
        )


def build_network(args, model_args, num_images, num_alphabets):
    """Builds the inference network: an amortised one for sleep, which trains on other images, else one that knows
    the images by their index"""
    shared = dict(
        num_primitives=model_args["num_primitives"],
        num_arcs=model_args["num_arcs"],
        lstm_hidden_size=args.lstm_hidden_size,
        num_alphabets=num_alphabets,
    )
    if args.algorithm == "sleep":
        return models.InferenceNetwork(obs_embedding_dim=model_args["obs_embedding_dim"], **shared)
    return models.LookupInferenceNetwork(num_images, **shared)


def build_models(args, checkpoint, num_images, device):
    """A generative model and the network to evaluate it with, as an evaluation's but with other parameters"""
    model_args, num_alphabets = checkpoint["args"], checkpoint["num_alphabets"]
    generative_model, network = models.build(argparse.Namespace(**model_args), num_alphabets, device)
    network.requires_grad_(False)
    if args.algorithm != "own":
        network = build_network(args, model_args, num_images, num_alphabets).to(device)
    return generative_model.requires_grad_(False), network


# ------------------------------------------------------------------ steps


def get_obs_id(evaluation):
    """Indices of the current iteration's batch: [B]"""
    num_images = len(evaluation.obs)
    batch_size = min(evaluation.args.batch_size, num_images)
    start = evaluation.iteration * batch_size
    return torch.arange(start, start + batch_size, device=evaluation.device) % num_images


def train_step(evaluation, obs_id):
    """A step of the inference network on the images obs_id [B]; for sleep, on as many samples of the model as there
    are particles. Returns: the statistics to record, nats per image"""
    args, networks = evaluation.args, (evaluation.generative_model, evaluation.network)
    if args.algorithm == "sleep":
        loss, statistics = losses.sleep(*networks, losses.get_num_dreams(len(obs_id), args.num_particles))
    else:
        objective = losses.OBJECTIVES[args.algorithm]
        # A GPU scores faster than it looks up scores, and can then replay the step.
        scorer = losses.score if gpu.is_gpu(evaluation.device) else functools.partial(evaluation.table.score, obs_id)
        inputs = evaluation.get_inputs(obs_id)
        loss, statistics = objective(*networks, num_particles=args.num_particles, scorer=scorer, **inputs)
    update(evaluation.optimizer, loss)
    return statistics


def get_step(evaluation):
    """The step, called with obs_id; on a GPU replayed as a CUDA graph"""
    step = functools.partial(train_step, evaluation)
    return ReplayedStep(step) if evaluation.device.type == "cuda" and evaluation.args.compile else step


@torch.no_grad()
def estimate_step(evaluation):
    """Estimates the bound for the next batch of images"""
    args, done = evaluation.args, len(evaluation.log_p)
    last = min(done + args.test_batch_size, len(evaluation.obs))
    obs_id = torch.arange(done, last, device=evaluation.device)
    log_weight = scoring.get_log_weight(
        evaluation.generative_model,
        evaluation.network,
        num_particles=args.test_num_particles,
        scorer=functools.partial(evaluation.table.score, obs_id),
        **evaluation.get_inputs(obs_id),
    )  # [P, B]
    evaluation.log_p = torch.cat([evaluation.log_p, scoring.log_mean_weight(log_weight)])


@torch.no_grad()
def enumerate_more(evaluation, stop):
    """Lets programs that the network need not propose join the guaranteed bound: those of the memory and, with --search,
    those that the search finds, unless a signal arrives. Returns: whether it is done"""
    model, network = evaluation.generative_model, evaluation.network
    if isinstance(network, models.LookupInferenceNetwork):  # which reads no images, and whose programs have been seen already
        network = evaluation.own_network
    for ids in torch.arange(len(evaluation.obs), device=evaluation.device).split(programs.BATCH_SIZE):
        obs, alphabet = evaluation.obs[ids], None if evaluation.alphabet is None else evaluation.alphabet[ids]
        found = []
        if evaluation.memory is not None:
            found.append(models.unpack(evaluation.memory[ids]).transpose(0, 1))  # [M, B, A, 2]
        if evaluation.args.search:
            best = programs.find_programs(model, network, obs, alphabet=alphabet, is_stopped=lambda: stop.received is not None)
            if stop.received is not None:
                return False
            found.append(best.latent)  # [K, B, A, 2]
        for latent in found:
            evaluation.table.score(ids, model, latent, obs, alphabet)
    return True


def run(evaluation, settings, path, stop):
    """Trains the network, then estimates log p, until done or until a signal arrives. Returns: whether it is done"""
    args, num_images, step = evaluation.args, len(evaluation.obs), get_step(evaluation)
    clock = SaveClock(args.save_minutes)
    total = args.num_iterations + math.ceil(num_images / args.test_batch_size)
    with util.show_progress(total=total, unit="it") as bar:
        while stop.received is None:
            if evaluation.iteration < args.num_iterations:
                evaluation.pending.append(step(get_obs_id(evaluation)))
                evaluation.iteration += 1
            elif len(evaluation.log_p) < num_images:
                estimate_step(evaluation)
            else:
                if args.search:  # which takes minutes, and begins anew if it is stopped
                    util.save_checkpoint(path, evaluation.get_checkpoint(settings))
                return True
            done = evaluation.iteration + math.ceil(len(evaluation.log_p) / args.test_batch_size)
            if done % args.save_interval == 0 or clock.is_due():
                util.save_checkpoint(path, evaluation.get_checkpoint(settings))
                clock.restart()
            show(evaluation, bar, done)
    util.save_checkpoint(path, evaluation.get_checkpoint(settings))
    return False


def show(evaluation, bar, done):
    bar.update(done - bar.n)
    if done % 10 == 0 and evaluation.pending:
        bar.set_description("training" if len(evaluation.log_p) == 0 else "estimating", refresh=False)
        loss = evaluation.pending[-1]["phi_loss"].item()
        bar.set_postfix({"phi_loss": f"{loss:.4g}", "latents scored": evaluation.table.num_scored}, refresh=False)


# ------------------------------------------------------------------ an evaluation


def evaluate(args):
    """Evaluates a checkpoint. Returns: the exit status"""
    checkpoint_path = checkpoints.find(args.checkpoint_path)
    checkpoint = checkpoints.load(checkpoint_path, util.get_device(args.cuda))
    name = checkpoints.get_run_name(checkpoint_path, checkpoint["args"])
    path = util.SAVE / name / "logp" / f"{args.mode}_{args.algorithm}.pt"
    with StopSignal() as stop:
        status = evaluate_checkpoint(args, checkpoint, name, path, stop)
    if status == 0:
        print("next, for a table: python eval_logp.py --report")
    return status


def evaluate_every_checkpoint(args):
    """Evaluates all checkpoints of a run's training; those that are damaged are left out, with a warning. Writes a CSV and a
    figure. Returns: the exit status. Raises: UserError if there are none"""
    given, name = checkpoints.find(args.checkpoint_path), None
    device, load_data = util.get_device(args.cuda), functools.cache(data.load_and_tell)
    with StopSignal() as stop:
        for path in checkpoints.get_all(given):
            try:
                checkpoint = checkpoints.load(path, device)
            except UserError as error:
                util.warn(f"{error}; left out")
                continue
            if checkpoint["iteration"] == 0:  # of pretraining
                continue
            name = name or checkpoints.get_run_name(path, checkpoint["args"])
            result_path = report.get_milestones_folder(name, args.mode) / f"{checkpoint['iteration']}.pt"
            status = evaluate_checkpoint(args, checkpoint, name, result_path, stop, load_data)
            if status != 0:
                return status
    if name is None:
        raise UserError(f"{given.parent} holds no valid checkpoint of a run that is past its pretraining")
    print("\n".join(report.write_milestones(name, args.mode)))
    return 0


def evaluate_checkpoint(args, checkpoint, name, path, stop, load_data=data.load_and_tell):
    """Runs one evaluation, from where it was stopped, and writes its result. Returns: the exit status"""
    device = util.get_device(args.cuda)
    images, memory, is_own = load_images(args, checkpoint, load_data)
    settings = get_settings(args, checkpoint, images)
    state_path = path.parent / "checkpoints" / path.name
    what = f"{name} is being evaluated by {args.algorithm}"
    with locks.lock(path.parent / f".{path.stem}.lock", what, stop):
        if not args.force and is_complete(path, settings):
            print(f"{path} is complete: {report.describe(path)}; --force repeats it")
            return 0
        evaluation = Evaluation(args, checkpoint, images, checkpoint["num_alphabets"], device, memory)
        if state_path.exists() and load_state(state_path, evaluation, settings, args.force):
            print(f"resuming at iteration {evaluation.iteration} of the evaluation of {name}")
        rendering.set_compile(args.compile, device)
        build = functools.partial(build_models, args, checkpoint, len(evaluation.obs), device)
        kernel_check.check(build, device, args.num_particles, min(args.batch_size, len(evaluation.obs)))
        if not run(evaluation, settings, state_path, stop) or not enumerate_more(evaluation, stop):
            print(
                f"stopped by {signal.Signals(stop.received).name} at iteration {evaluation.iteration},"
                f" saved {state_path}; rerun the same command to resume"
            )
            return 128 + stop.received
        util.save_checkpoint(path, get_result(evaluation, settings, name, checkpoint, is_own))
        state_path.unlink(missing_ok=True)
    print(f"{report.describe(path)}: {path}")
    return 0


def load_images(args, checkpoint, load_data=data.load_and_tell):
    """Loads the images to evaluate, and what the model remembers of them.

    Args: load_data: data.load_and_tell, or a cached version of it
    Returns: data.Split; the memory's rows of these images, [N, M, A], or None if they are not its training images;
        whether they are from the data that the model was trained on
    Raises: UserError if they do not fit the model
    """
    dataset = data.load_for_model(checkpoint, args.data_location, load_data)
    if args.mode == "unseen" and checkpoint["args"]["small_dataset"]:  # whose test images are its training images
        split = data.load_for_model(checkpoint, args.data_location, load_data, whole=True).test
    else:
        split = getattr(dataset, "test" if args.mode == "unseen" else args.mode)
    num_data = min(args.num_data, len(split.obs))
    ids = torch.arange(num_data)
    if args.images == "spread":
        ids = torch.linspace(0, len(split.obs) - 1, num_data).round().long()
    memory, images = checkpoint["memory"], split.select(ids)
    fingerprint = data.get_fingerprint(dataset.train)
    is_own = checkpoint["settings"]["data"] == fingerprint
    known = is_own and data.get_fingerprint(split) == fingerprint
    if known:
        checkpoints.check_num_images(checkpoint, len(split.obs))
    return images, memory[ids.to(memory.device)] if memory is not None and known else None, is_own


def get_settings(args, checkpoint, images):
    """Everything the result depends on, as plain values"""
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "model": checkpoints.get_digest(checkpoint),
        "images": f"{data.get_fingerprint(images)} ({len(images.obs)})",
        **({"search": True} if args.search else {}),
    }


def is_complete(path, settings):
    """Whether this evaluation has been completed; a damaged result does not count. Raises: UserError if a different
    evaluation is in its place"""
    if not path.exists():
        return False
    try:
        result = checkpoints.load_result(path)
    except UserError as error:
        warn(f"{error}; it is evaluated again")
        return False
    check_settings(path, result, settings)
    return True


def check_settings(path, saved, settings):
    """Raises: UserError if what is saved is a different evaluation; the message names the differences"""
    theirs, ours = ({"search": False, **some} for some in (saved["settings"], settings))
    differences = util.describe_differences(theirs, ours)
    if differences:
        raise UserError(f"{path} holds a different evaluation: {differences}; --force replaces it")


def load_state(path, evaluation, settings, force):
    """Restores the evaluation from the file. A damaged file is ignored, and with --force one of a different
    evaluation. Returns: whether it was restored"""
    try:
        state = util.load_checkpoint(path, evaluation.device, STATE_KEYS)
        check_state(state, evaluation, settings)
    except UserError as error:
        warn(f"{error}; the evaluation starts over")
        return False
    if force and state["settings"] != settings:
        return False
    check_settings(path, state, settings)
    evaluation.restore(state)
    return True


def check_state(state, evaluation, settings):
    """Raises: UserError if a checkpoint is invalid; those of different evaluations are recognised by their settings"""
    expect, num_images = checkpoints.expect, len(evaluation.obs)
    expect(isinstance(state["settings"], dict), "its settings are not a dict")
    if state["settings"] != settings:
        return
    try:
        checkpoints.check_tensors(state["network"], evaluation.network.state_dict(), "network")
        right = checkpoints.is_integer(state["iteration"]) and 0 <= state["iteration"] < 2**53
        expect(right, f"iteration is {checkpoints.show(state['iteration'])}")
        groups = [list(evaluation.network.parameters())]
        checkpoints.check_optimizer(state["optimizer"], "optimizer", groups, state["iteration"] > 0)
        checkpoints.check_random_state(state["random_state"])
        log_p, statistics = state["log_p"], state["statistics"]
        right = isinstance(log_p, torch.Tensor) and log_p.dim() == 1 and len(log_p) <= num_images
        expect(right and bool(log_p.isfinite().all()), "log_p is not a list of numbers")
        expect(isinstance(statistics, dict), "its statistics are not a dict")
        for name, values in statistics.items():
            right = isinstance(values, torch.Tensor) and values.shape == (state["iteration"],)
            expect(right and bool(values.isfinite().all()), f"its statistics of {name} are not a curve of finite numbers")
        check_rows(state["table"], evaluation.generative_model.num_arcs, num_images)
    except Exception as error:  # of ours, or whatever foreign contents make the checks raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"the evaluation's checkpoint is invalid: {reason}") from None


def get_result(evaluation, settings, name, checkpoint, is_own):
    """The result that results/report.py reads, see checkpoints.RESULT_KEYS; is_own: of load_images"""
    log_p, state = evaluation.log_p.double().cpu(), evaluation.get_checkpoint(settings)
    rows = evaluation.table.settle()
    bound = get_enumeration_bound(rows, len(log_p)).cpu()  # [N]
    return dict(
        settings=settings,
        args=vars(evaluation.args),
        log_p=log_p.mean().item(),
        log_p_by_image=log_p,
        standard_error=log_p.std().item() / math.sqrt(len(log_p)) if len(log_p) > 1 else math.nan,
        enumeration_bound=bound.mean().item(),
        enumeration_bound_by_image=bound,
        latents=dict(obs_id=rows.obs_id.int().cpu(), codes=rows.codes.cpu(), log_joint=rows.log_joint.cpu()),
        num_scored=evaluation.table.num_scored,
        statistics=state["statistics"],
        run=name,
        model_settings=checkpoint["settings"],
        model_iteration=checkpoint["iteration"],
        is_own_data=is_own,
    )


# ------------------------------------------------------------------ script


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report.main(args.mode, args.all)
    return evaluate_every_checkpoint(args) if args.every_checkpoint else evaluate(args)


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive = parser.add, util.in_range(int, 1)
    parser.start_group("report")
    add("--report", "print a table of all evaluations, write save/logp.csv and save/logp.pdf", action="store_true")
    add("--all", "also list the paper's models that have not been evaluated", action="store_true")
    parser.start_group("evaluation")
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one")
    algorithm = "algorithm that trains a new inference network, or own: the model's own network, not trained any further"
    add("--algorithm", algorithm, choices=[*report.ALGORITHMS, "own"], default="sleep")
    mode = "which images: test (with --small-dataset the training images), train, or unseen (always the data's test part)"
    add("--mode", mode, choices=["test", "train", "unseen"], default="test")
    add("--images", "the first --num-data images, or evenly spread ones", choices=["first", "spread"], default="first")
    add("--every-checkpoint", "evaluate each of a run's milestones; writes a CSV and a figure (own)", action="store_true")
    add("--search", "let programs found by search join the guaranteed bound", action="store_true")
    add("--data-location", "as for main.py (default: where the model was trained)", default=None)
    add("--num-data", "number of images", type=positive, default=50)
    add("--num-particles", "particles per image in training", type=positive, default=100)
    add("--num-iterations", "iterations of training", type=util.in_range(int, 0), default=20000)
    add("--batch-size", "images per step of training", type=positive, default=50)
    add("--lstm-hidden-size", "hidden units of the new network's LSTM", type=positive, default=128)
    add("--test-batch-size", "images per step of the estimate (default: 1, own: 10)", type=positive, default=None)
    particles = "particles per image in the estimate (default: 5000, own: 1000)"
    add("--test-num-particles", particles, type=positive, default=None)
    add("--seed", "seed of all random numbers", type=util.in_range(int, 0, 2**63 - 1), default=0)
    add("--force", "repeat an evaluation that is complete, or replace one with other settings", action="store_true")
    parser.start_group("running")
    add("--cuda", "use a GPU", action="store_true")
    add("--save-interval", "iterations between checkpoints of the evaluation", type=positive, default=500)
    add("--save-minutes", "minutes between checkpoints, if that is sooner", type=util.in_range(float, 0.01), default=5)
    add(
        "--compile",
        "compile the renderer and the likelihood (default: if many latents are scored)",
        action=argparse.BooleanOptionalAction,
    )
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range or something is missing"""
    args = get_parser().parse_args(argv)
    if not args.report and args.checkpoint_path is None:
        raise UserError("give --checkpoint-path, the model to evaluate, or --report")
    own = args.algorithm == "own"
    if args.every_checkpoint and not own:
        raise UserError("--every-checkpoint is for --algorithm own; the others would take hours per checkpoint")
    if own:
        args.num_iterations = 0
    if args.test_batch_size is None:
        args.test_batch_size = 10 if own else 1
    if args.test_num_particles is None:
        args.test_num_particles = 1000 if own else 5000
    if args.algorithm == "vimco" and args.num_particles < 2:
        raise UserError("--algorithm vimco needs --num-particles of at least 2")
    if args.compile is None:
        trained = args.num_iterations * min(args.batch_size, args.num_data) * args.num_particles
        estimated = args.num_data * args.test_num_particles * (MANY_MILESTONES if args.every_checkpoint else 1)
        args.compile = trained + estimated >= MANY_LATENTS
    return args


if __name__ == "__main__":
    util.run_script(main)
