"""Estimates log p of images under a trained generative model, and reports all estimates.

    python eval_logp.py --checkpoint-path mws_20 --algorithm mws                    # the one to report: 15 to 30 minutes
    python eval_logp.py --checkpoint-path mws_20 --algorithm own                    # a minute
    python eval_logp.py --checkpoint-path mws_20 --algorithm rws                    # hours (minutes with --cuda): the paper's procedure
    python eval_logp.py --checkpoint-path mws_20 --algorithm own --every-checkpoint # in the course of training
    python eval_logp.py --report

The images are the first 50 of the data's own test part, on which models are not trained, or with --mode train, training images
of the model. The generative model stays fixed. The particles of the importance-weighted bound
log p(x) >= E log (1/P) sum_k p(z_k, x) / q(z_k | x) (Burda et al., 2016) are proposed by the model's own inference network
(own), by a new one trained for the evaluation (sleep, rws, vimco), or by two trained on programs found by search (mws). The sum
of p(z, x) over the distinct programs seen, including the memory of MWS, is a guaranteed lower bound of p(x). Results go to
save/<run>/logp/<mode>_<algorithm>.pt. If stopped, rerun the same command to resume.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import argparse
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import signal
import threading

import torch
from torch.utils._pytree import tree_map_only

import data
import losses
import models
import rendering
import scoring
import util
from fast import kernel_check
from fast.cuda_graph import ReplayedStep
from main import get_adam, update
from reading import search
from results import report
from runs import checkpoints, locks
from runs.curves import append_statistics, check_finite
from runs.saving import SaveClock, StopSignal
from scoring import ScoreTable, get_enumeration_bound
from util import UserError, warn, warn_once

STATE_KEYS = {"settings", "network", "table", "iteration", "log_p"}
ALGORITHMS = report.ALGORITHMS
SIZES = {  # name: help, the paper's default, and defaults of other algorithms
    "num_particles": ("particles per image in training; mws: proposals, and programs drawn from the memory", 100, {"mws": 10}),
    "num_iterations": ("iterations of training", 20000, {"mws": 1000, "own": 0}),
    "batch_size": ("images per step of training", 50, {}),
    "lstm_hidden_size": ("hidden units of the new network's LSTM", 128, {}),
    "test_batch_size": ("images per step of the estimate", 1, {"own": 10}),
    "test_num_particles": ("particles per image in the estimate", 5000, {"own": 1000}),
}
DEPENDS_ON = ["mode", "algorithm", *SIZES, "seed"]  # what a result depends on besides the model and the images
# Settings that change nothing keep their defaults, so that they do not make a different evaluation
UNUSED = {"own": ["num_particles", "num_iterations", "batch_size", "lstm_hidden_size"], "mws": ["test_batch_size"]}
# Memoised evaluation
LEARNING_RATES = 5e-3, 1e-4  # first and last
PROPOSAL_INTERVAL = 100  # on a GPU, iterations between proposals that join the guaranteed bound
MANY_MILESTONES = 15  # enough for compiling to pay off (a run of 200 000 iterations has 64)
MANY_LATENTS = 300_000  # scored by an evaluation, for compiling to pay off
LATENTS_PER_SEARCH = 320_000  # scored by a search of effort 1: 90 000 programs, 230 000 strokes that continue some

# ------------------------------------------------------------------ the state of an evaluation


class Evaluation:
    """A trained generative model, the images, and everything that an evaluation's checkpoint holds."""

    def __init__(self, args, checkpoint, images, device, memory=None):
        util.set_seed(args.seed if args.half is None else 2 * args.seed + args.half, device)
        self.args, self.device = args, device
        self.obs = images.obs.to(device)
        self.alphabet = images.alphabet.to(device) if checkpoint["num_alphabets"] else None
        self.memory = memory  # packed programs remembered for the images, or None: [N, M, A]
        self.generative_model, self.own_network = models.from_checkpoint(checkpoint, device)
        if args.algorithm == "own":
            self.network = self.own_network
        else:
            self.network = build_network(args, checkpoint, len(self.obs)).to(device)
        self.optimizer = get_adam(self.network.parameters(), device)
        # The objective's own settings are those of the model, or their defaults
        self.objective_args = argparse.Namespace(**{**checkpoint["args"], "algorithm": args.algorithm})
        self.state = {}
        if args.algorithm in ("rws", "vimco"):
            self.state = losses.init_state(self.objective_args, len(self.obs), device, checkpoint["num_alphabets"])
        if own := losses.get_parameters(self.state):
            self.optimizer.add_param_group({"params": own})
        self.table = ScoreTable(self.generative_model.num_arcs, device)
        self.parts = dict(network=self.network, optimizer=self.optimizer, table=self.table)
        self.parts |= {f"state_{name}": part for name, part in self.state.items()}
        if args.algorithm == "mws":  # the best programs found so far, packed: [N, M, A]
            shape = len(self.obs), args.memory_size, self.generative_model.num_arcs
            self.programs = self.parts["programs"] = torch.zeros(shape, dtype=torch.int16, device=device)
        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)
        self.num_searched = 0  # images searched so far
        self.iteration = 0
        self.clock = torch.zeros((), dtype=torch.long, device=device)  # the iteration, as a CUDA graph sees it
        self.statistics, self.pending = {}, []
        self.log_p = torch.empty(0, device=device)  # estimates made so far

    def get_checkpoint(self, settings):
        """Raises: UserError if training has diverged"""
        append_statistics(self.statistics, self.pending)
        check_finite([parameter for group in self.optimizer.param_groups for parameter in group["params"]])
        return dict(
            settings=settings,
            args=vars(self.args),
            num_searched=self.num_searched,
            iteration=self.iteration,
            statistics=self.statistics,
            log_p=self.log_p,
            random_state=util.get_random_state(self.device),
            hyperparameters=self.hyperparameters,
            **checkpoints.get_states(self.parts),
        )

    def restore(self, state):
        with checkpoints.using(state):
            checkpoints.restore_parts(self.parts, state, self.hyperparameters)
            for name in ["num_searched", "iteration", "log_p"]:
                setattr(self, name, state[name])
            self.statistics = tree_map_only(torch.Tensor, torch.Tensor.cpu, state["statistics"])
            self.clock.fill_(self.iteration)
            util.set_random_state(state["random_state"], self.device)

    def get_inputs(self, obs_id):
        """What objectives and estimates take of images obs_id [B]"""
        return dict(obs=self.obs[obs_id], alphabet=self.get_alphabet(obs_id), obs_id=obs_id)

    def get_alphabet(self, obs_id):
        """The alphabets of images obs_id [B], one-hot [B, L], or None if the model is not conditional"""
        return None if self.alphabet is None else self.alphabet[obs_id]

    def score(self, obs_id, latent):
        """log p(z, x), looked up in the table or added to it: images obs_id [B], latent [P, B, A, 2] -> [P, B], nats"""
        return self.table.score(obs_id, self.generative_model, latent, self.obs[obs_id], self.get_alphabet(obs_id))


def build_network(args, checkpoint, num_images):
    """Builds the inference network: an amortised one for sleep, which trains on other images, else one that knows
    the images by their index"""
    of_run = argparse.Namespace(**checkpoint["args"])
    own = dict(lstm_hidden_size=args.lstm_hidden_size, num_alphabets=checkpoint["num_alphabets"])
    if args.algorithm == "sleep":
        return models.build_inference_network(of_run, uniform_mixture=0.0, **own)
    return models.LookupInferenceNetwork(num_images, of_run.num_primitives, num_arcs=of_run.num_arcs, **own)


def build_models(args, checkpoint, num_images, device):
    """A generative model and a network to evaluate it with, like an evaluation's but with other parameters"""
    generative_model, own = models.build(argparse.Namespace(**checkpoint["args"]), checkpoint["num_alphabets"], device)
    is_own = args.algorithm == "own"
    network = own.requires_grad_(False) if is_own else build_network(args, checkpoint, num_images).to(device)
    return generative_model.requires_grad_(False), network


# ------------------------------------------------------------------ steps


def get_num_samples(args):
    """The number of samples of the model in a step of sleep: 5000 by default"""
    return args.batch_size * args.num_particles


def get_obs_id(evaluation):
    """Indices of the current iteration's batch: [B]"""
    num_images = len(evaluation.obs)
    batch_size = min(evaluation.args.batch_size, num_images)
    start = evaluation.iteration * batch_size
    return torch.arange(start, start + batch_size, device=evaluation.device) % num_images


def train_step(evaluation, obs_id):
    """Trains the inference network by a step on images obs_id [B]; for sleep, on as many samples of the model as a batch has
    particles. Returns: the statistics to record, nats per image"""
    args, networks = evaluation.args, (evaluation.generative_model, evaluation.network)
    if args.algorithm == "mws":
        return memoised_step(evaluation, obs_id)
    if args.algorithm == "sleep":
        loss, statistics = losses.sleep_in_parts(*networks, get_num_samples(args))
    else:
        scorer = functools.partial(evaluation.table.score, obs_id) if looks_scores_up(evaluation) else losses.score
        step = losses.Step(
            *networks,
            **evaluation.get_inputs(obs_id),
            num_particles=args.num_particles,
            num_dreams=losses.get_num_dreams(len(obs_id), args.num_particles),
            iteration=evaluation.clock,
        )
        loss, statistics = losses.get_loss(evaluation.objective_args, step, evaluation.state, scorer=scorer)
    update(evaluation.optimizer, loss)
    evaluation.clock += 1
    return statistics


def looks_scores_up(evaluation):
    """Whether steps look scores up in the table; a GPU scores faster than it looks up, and can then replay steps"""
    return evaluation.device.type == "cpu"


@torch.no_grad()
def add_proposals(evaluation):
    """Adds proposals for a batch of images to the guaranteed bound on a GPU, where replayed steps do not; on a CPU, those of
    every step join it"""
    obs_id = get_obs_id(evaluation)
    evaluation.score(obs_id, evaluation.network.sample(obs_id, evaluation.args.num_particles, evaluation.get_alphabet(obs_id)))


@torch.no_grad()
def estimate_step(evaluation):
    """Estimates log p of the next batch of images"""
    args, done = evaluation.args, len(evaluation.log_p)
    evaluation.network.eval()
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
def enumerate_memory(evaluation):
    """Adds the programs that the model remembers of its training images to the guaranteed bound"""
    if evaluation.memory is not None:
        obs_id = torch.arange(len(evaluation.obs), device=evaluation.device)
        evaluation.score(obs_id, models.unpack(evaluation.memory).transpose(0, 1))  # of latents [M, N, A, 2]


def run(evaluation, settings, path, stop):
    """Searches, trains the network and estimates log p, until done or a signal arrives. Returns: whether it is done"""
    args, num_images, clock = evaluation.args, len(evaluation.obs), SaveClock(evaluation.args.save_minutes)
    save, num_steps = functools.partial(util.save_checkpoint, path), itertools.count(1)  # steps of all kinds
    train = functools.partial(train_step, evaluation)
    if evaluation.device.type == "cuda" and args.compile and args.algorithm != "mws":  # whose steps look scores up
        train = ReplayedStep(train, evaluation.device)
    adds_proposals = not looks_scores_up(evaluation) and args.algorithm in ("rws", "vimco")

    def train_and_count():
        statistics = train(get_obs_id(evaluation))
        evaluation.iteration += 1
        evaluation.pending.append(("train", evaluation.iteration, statistics))
        if adds_proposals and evaluation.iteration % PROPOSAL_INTERVAL == 0:
            add_proposals(evaluation)
        return statistics

    def repeat(step, count, total, **shown):
        """Repeats a step until count() reaches the total, saving now and then"""
        if stop.received is not None or count() >= total:
            return
        in_background = multiprocessing.parent_process() is not None  # where the other half shows how far both are
        with util.show_progress(total=total, initial=count(), disable=in_background, **shown) as bar:
            while stop.received is None and count() < total:
                statistics = step()
                if next(num_steps) % args.save_interval == 0 or clock.is_due():
                    save(evaluation.get_checkpoint(settings))
                    clock.restart()
                if statistics is not None and count() % 10 == 0:
                    values = {name: f"{value.item():.4g}" for name, value in statistics.items()}
                    bar.set_postfix({**values, "latents scored": evaluation.table.num_scored}, refresh=False)
                bar.update(count() - bar.n)

    if args.algorithm == "mws":
        search_next = functools.partial(search_step, evaluation, stop)
        repeat(search_next, lambda: evaluation.num_searched, num_images, desc="searching", unit="image")
    repeat(train_and_count, lambda: evaluation.iteration, args.num_iterations, desc="training", unit="it")
    if args.algorithm != "mws":  # whose halves make their estimates together
        estimate_next = functools.partial(estimate_step, evaluation)
        repeat(estimate_next, lambda: len(evaluation.log_p), num_images, desc="estimating", unit="image")
    if stop.received is not None or args.half is not None:  # a half waits for the other one
        save(evaluation.get_checkpoint(settings))
    return stop.received is None


# ------------------------------------------------------------------ memoised evaluation

# A search finds the best programs of each image. These are the memory with which a lookup network is trained as by MWS, while
# the model stays fixed; the network's proposals may enter the memory. All this is done twice, by two halves without a random
# number in common: what only one of them finds indicates how much both may have missed.


@torch.no_grad()
def search_step(evaluation, stop):
    """Finds programs of the next image. If a signal arrives, it changes nothing"""
    state, args, model = util.get_random_state(evaluation.device), evaluation.args, evaluation.generative_model
    obs_id = torch.tensor([evaluation.num_searched], device=evaluation.device)
    obs, alphabet = evaluation.obs[obs_id], evaluation.get_alphabet(obs_id)
    proposals = [evaluation.own_network.sample(obs, search.NUM_PROPOSALS, alphabet).squeeze(1)]  # [P, A, 2]
    if evaluation.memory is not None:
        proposals.append(models.unpack(evaluation.memory[obs_id]).squeeze(0))
    effort, proposals = search.Effort().scale(args.effort), torch.cat(proposals)
    given = None if alphabet is None else alphabet[0]
    latent, _ = search.find(model, obs[0], given, proposals, args.memory_size, effort, lambda: stop.received is not None)
    if stop.received is not None:
        util.set_random_state(state, evaluation.device)
        return
    evaluation.score(obs_id, latent.unsqueeze(1))
    # If too few are found, the last repeats
    rank = torch.arange(args.memory_size, device=evaluation.device).clamp(max=len(latent) - 1)
    evaluation.programs[obs_id] = models.pack(latent[rank], evaluation.programs.dtype)
    evaluation.num_searched += 1


def memoised_step(evaluation, obs_id):
    """Updates the memory of images obs_id [B] with the network's proposals, then trains the network by a step on programs drawn
    from the memory in proportion to p(z, x). Returns: the statistics to record, nats per image"""
    args, alphabet = evaluation.args, evaluation.get_alphabet(obs_id)
    proposal = evaluation.network.sample(obs_id, args.num_particles, alphabet)  # [P, B, A, 2]
    scorer = functools.partial(evaluation.table.score, obs_id)
    memory = evaluation.generative_model, evaluation.programs, evaluation.obs[obs_id], obs_id, proposal, alphabet, scorer
    latent, log_joint, _ = losses.update_memory(*memory)  # [M, B, A, 2], [M, B]
    drawn = log_joint.t().softmax(1).multinomial(args.num_particles, replacement=True).t()  # [P, B]
    latent = latent[drawn, torch.arange(len(obs_id), device=evaluation.device)]  # [P, B, A, 2]
    loss = -evaluation.network.log_prob(latent, obs_id, alphabet).mean()
    first, last = LEARNING_RATES
    for group in evaluation.optimizer.param_groups:
        group["lr"] = first * (last / first) ** (evaluation.iteration / args.num_iterations)
    update(evaluation.optimizer, loss)
    return {"phi_loss": loss.detach()}


@torch.no_grad()
def estimate_together(halves, stop):
    """Importance sampling with both halves' networks: each on its own samples, and their mixture on all samples, whose scores
    are added to the first half's table.

    Returns: log p by the mixture [N], and by each half [2, N]; or None if a signal arrives
    """
    log_p, by_half = [], []
    num_particles = math.ceil(halves[0].args.test_num_particles / len(halves))
    for half in halves:
        half.network.eval()
    images = torch.arange(len(halves[0].obs), device=halves[0].device).split(1)
    for obs_id in util.show_progress(images, desc="estimating", unit="image"):
        if stop.received is not None:
            return None
        alphabet = halves[0].get_alphabet(obs_id)
        latent = [half.network.sample(obs_id, num_particles, alphabet) for half in halves]  # each [P, 1, A, 2]
        log_q = torch.stack([half.network.log_prob(torch.cat(latent), obs_id, alphabet) for half in halves])  # [2, 2P, 1]
        log_joint = halves[0].score(obs_id, torch.cat(latent))  # [2P, 1]
        own = (log_joint - log_q).unflatten(1, (len(halves), -1))  # [2, 2, P, 1]
        by_half.append(torch.stack([scoring.log_mean_weight(own[i, i]) for i in range(len(halves))]))
        log_p.append(scoring.log_mean_weight(log_joint - scoring.log_mean_weight(log_q)))
    return torch.cat(log_p), torch.cat(by_half, 1)


def run_in_background(num_threads, *what):
    """Runs a half in a process of its own, which ends with this one; other arguments as for `run_one`. Returns: the process"""
    context, content = multiprocessing.get_context("spawn"), io.BytesIO()
    torch.save(what, content)  # tensors themselves would take shared memory, of which containers have little
    theirs, ours = context.Pipe(duplex=False)

    def send():
        with ours, contextlib.suppress(OSError):  # if the process has died already
            ours.send_bytes(content.getbuffer())

    process = context.Process(target=_run_half, args=(num_threads, theirs), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C reaches it only through this process
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    threading.Thread(target=send, daemon=True).start()  # it takes seconds to be ready for it
    return process


def _run_half(num_threads, arguments):
    def follow():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    def run_half():
        with StopSignal() as stop:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                what = torch.load(io.BytesIO(arguments.recv_bytes()), weights_only=False)
            except (EOFError, OSError):  # the other half's process has been killed
                return 1
            return 0 if run_one(*what, stop) else 128 + stop.received

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(num_threads)
    util.run_script(run_half)


# ------------------------------------------------------------------ an evaluation


def evaluate(args):
    """Evaluates a checkpoint. Returns: the exit status"""
    checkpoint = checkpoints.load_given(args.checkpoint_path, util.get_device(args.cuda), get_parts(args.algorithm))
    name = checkpoints.get_run_name(checkpoint)
    path = checkpoints.get_result_path(name, vars(args))
    with StopSignal() as stop:
        status = evaluate_checkpoint(args, checkpoint, name, path, stop)
    if status == 0:
        print("next, for a table: python eval_logp.py --report")
    return status


def get_parts(algorithm):
    """The parts of a checkpoint that an algorithm computes with"""
    return ["generative_model"] + ["inference_network"] * (algorithm in ("own", "mws"))


def evaluate_every_checkpoint(args):
    """Evaluates all checkpoints of a run's training, the latest first, since it knows where the data are now, and writes a CSV
    and a figure. Damaged ones are left out, with a warning. Returns: the exit status. Raises: UserError if there are none"""
    given, name, settings = checkpoints.find(args.checkpoint_path), None, None
    device, load_data = util.get_device(args.cuda), functools.cache(data.load_and_tell)
    with StopSignal() as stop:
        for path in checkpoints.get_all(given)[::-1]:
            try:
                checkpoint = checkpoints.load(path, device)
                checkpoints.check_numbers(checkpoint, get_parts(args.algorithm))
            except UserError as error:
                warn(f"{error}; left out")
                continue
            settings = settings or checkpoint["settings"]
            if checkpoint["iteration"] == 0 or not checkpoints.is_of_run(checkpoint, settings):  # 0: still in pretraining
                continue
            name = name or checkpoints.get_run_name(checkpoint)
            args.data_location = args.data_location or checkpoint["args"]["data_location"]  # for older ones as well
            result_path = report.get_milestones_folder(name, args.mode) / f"{checkpoint['iteration']}.pt"
            status = evaluate_checkpoint(args, checkpoint, name, result_path, stop, load_data)
            if status != 0:
                return status
    if name is None:
        raise UserError(f"{given.parent} holds no valid checkpoint of a run that is past its pretraining")
    path = report.get_milestones_folder(name, args.mode).with_suffix(".pdf")
    print("\n".join(report.draw_milestones({name: report.read_milestones(name, args.mode)}, path)))
    return 0


def evaluate_checkpoint(args, checkpoint, name, path, stop, load_data=data.load_and_tell):
    """Runs or resumes one evaluation, and writes its result. Returns: the exit status"""
    images, memory, kind, num_seen = load_images(args, checkpoint, load_data)
    with checkpoints.using(checkpoint):
        settings = get_settings(args, checkpoint, images, kind)
    with locks.lock(path.parent / f".{path.stem}.lock", f"{name} is being evaluated by {args.algorithm}", stop):
        if not args.force and checkpoints.load_saved(path, report.load_result, settings):
            print(f"{path} is complete: {report.describe(path)}; --force repeats it")
            return 0
        what = checkpoint, images, memory, settings, path, stop
        parts = run_halves(args, *what) if args.algorithm == "mws" else [run_one(args, *what)]
        result = None if None in parts else get_result(parts, settings, name, checkpoint, stop)
        if result is None:
            print(f"stopped by {signal.Signals(stop.received).name}, saved; rerun the same command to resume")
            return 128 + stop.received
        util.save_checkpoint(path, {**result, "num_seen": num_seen})
        for part in parts:
            checkpoints.get_state_path(path, part.args.half).unlink(missing_ok=True)
    print(f"{report.describe(path)}: {path}")
    return 0


def run_one(args, checkpoint, images, memory, settings, path, stop):
    """Runs or resumes an evaluation, or a half of one. Args: images, memory: from load_images; path: of the result.
    Returns: the Evaluation, or None if a signal stopped it"""
    device, state_path = util.get_device(args.cuda), checkpoints.get_state_path(path, args.half)
    held = contextlib.nullcontext()  # only a half needs a lock: a killed evaluation may have left one running
    if args.half is not None:
        held = locks.lock(path.with_name(f".{state_path.stem}.lock"), f"half {args.half} of {path} is being evaluated", stop)
    with held:
        evaluation = Evaluation(args, checkpoint, images, device, memory)
        load = functools.partial(util.load_checkpoint, device=device, keys=STATE_KEYS)
        if state := checkpoints.load_saved(state_path, load, settings, args.force):
            evaluation.restore(state)
            if args.half is None or evaluation.iteration < args.num_iterations:  # not a half that is done
                print(f"resuming at iteration {evaluation.iteration} of {state_path}")
        rendering.set_compile(args.compile, device)
        check_kernels(args, checkpoint, len(evaluation.obs), device)
        if not run(evaluation, settings, state_path, stop):
            return None
        enumerate_memory(evaluation)
    return evaluation


def check_kernels(args, checkpoint, num_images, device):
    """Tries a GPU's kernels with all networks that the evaluation uses: searches begin with proposals of the model's own"""
    memory = (args.memory_size, losses.init_memory, losses.remember) if args.algorithm == "mws" else ()
    for algorithm in [args.algorithm, *["own"] * (args.algorithm == "mws")]:
        like_args = argparse.Namespace(**{**vars(args), "algorithm": algorithm})
        build = functools.partial(build_models, like_args, checkpoint, num_images, device)
        kernel_check.check(build, device, args.num_particles, min(args.batch_size, num_images), *memory)


def run_halves(args, *what):
    """Runs the halves of a memoised evaluation, side by side on a CPU with two or more threads; arguments as for `run_one`.
    Returns: the Evaluations, with None for one that a signal stopped"""
    first, second = (argparse.Namespace(**{**vars(args), "half": half}) for half in (1, 2))
    threads, stop = torch.get_num_threads(), what[-1]
    process = None
    if threads > 1 and not args.cuda:
        process = run_in_background(threads // 2, second, *what[:-1])
        torch.set_num_threads(threads - threads // 2)
    halves = [run_one(first, *what)]
    if process is not None and process.is_alive() and stop.received is None:
        print("the first half is done; waiting for the second", flush=True)
    while process is not None and process.is_alive():
        process.join(0.2)
        if stop.received is not None:
            process.terminate()
            process.join()
    torch.set_num_threads(threads)
    if stop.received is None:  # reads the second half's result or, if its process failed, continues it
        halves.append(run_one(second, *what))
    return [*halves, None][:2]


def load_images(args, checkpoint, load_data=data.load_and_tell):
    """Loads the images to evaluate, and what the model remembers of them.

    Args: load_data: data.load_and_tell, or a cached version
    Returns: data.Split; the memory's rows for these images, [N, M, A], or None if they are not training images of MWS; the
        images' kind: test, training or other; how many test images equal training images
    Raises: UserError if they do not fit the model
    """
    dataset = data.load_for_model(checkpoint, args.data_location, load_data)
    split = getattr(dataset, args.mode)
    num_all = len(split.obs)
    spread = args.images == "spread"
    ids = data.spread(num_all, args.num_data) if spread else torch.arange(min(args.num_data, num_all))
    memory, images = checkpoints.get_programs(checkpoint), split.select(ids)
    kind = "training" if args.mode == "train" else "test"
    if not data.was_trained_on(checkpoint, dataset):
        kind = "other"
        if args.data_location in (None, checkpoint["args"]["data_location"]):
            warn_once("the data have changed since training: the model may have been trained on some of the images to evaluate")
    num_seen = data.warn_of_common(images, dataset.train) if kind == "test" else 0
    return images, memory[ids.to(memory.device)] if memory is not None and kind == "training" else None, kind, num_seen


def get_choices(args):
    """What a result depends on besides the model and the images, as plain values"""
    choices = {name: getattr(args, name) for name in DEPENDS_ON}
    if args.algorithm == "mws":
        choices |= {"memory_size": args.memory_size, "effort": args.effort, "search": search.VERSION}
    return choices | ({"num_dreams": get_num_samples(args)} if args.algorithm == "sleep" else {})


def get_settings(args, checkpoint, images, kind):
    """Everything that the result depends on, as plain values. Args: kind: from load_images"""
    fingerprint = f"{data.get_fingerprint(images)} ({len(images.obs)})"
    model = checkpoints.get_digest(checkpoint)
    return {**get_choices(args), "model": model, "images": fingerprint, "kind_of_images": kind}


def get_result(parts, settings, name, checkpoint, stop):
    """The result that results/report.py reads (see checkpoints.RESULT_KEYS), or None if a signal arrives. Args: parts: an
    Evaluation, or its halves"""
    of_halves, evaluation = {}, parts[0]
    if len(parts) > 1:
        num_images = len(evaluation.obs)
        bounds = [get_enumeration_bound(part.table.settle(), num_images).cpu() for part in parts]
        of_halves["bound_by_half"] = torch.stack(bounds)
        estimates = estimate_together(parts, stop)
        if estimates is None:
            return None
        evaluation.log_p, log_p_by_half = estimates
        of_halves["log_p_by_half"] = log_p_by_half.double().cpu()
        of_halves["search_error"] = of_halves["bound_by_half"].mean(1).diff().abs().item()
    log_p = evaluation.log_p.double().cpu()
    if log_p.isnan().any():
        raise UserError(
            f"{name}: log p of {util.count(int(log_p.isnan().sum()), 'image')} is not a number, so no result is saved"
        )
    rows = scoring.keep_best(scoring.merge([part.table.settle() for part in parts]))
    bound = get_enumeration_bound(rows, len(log_p)).cpu()  # [N]
    return dict(
        settings=settings,
        args=vars(evaluation.args),
        **of_halves,
        log_p=log_p.mean().item(),
        log_p_by_image=log_p,
        standard_error=report.get_standard_error(log_p.tolist()),
        enumeration_bound=bound.mean().item(),
        enumeration_bound_by_image=bound,
        latents=dict(obs_id=rows.obs_id.int().cpu(), codes=rows.codes.cpu(), log_joint=rows.log_joint.cpu()),
        num_scored=sum(part.table.num_scored for part in parts),
        statistics=evaluation.get_checkpoint(settings)["statistics"],
        run=name,
        model_settings=checkpoint["settings"],
        model_iteration=checkpoint["iteration"],
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
    tables = "print a table for each set of images; write save/logp.csv and .pdf (logp_train with --mode train)"
    add("--report", tables, action="store_true")
    add("--all", "also list the paper's models that have not been evaluated", action="store_true")
    parser.start_group("evaluation")
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one")
    algorithm = "mws: memoised evaluation; sleep, rws, vimco: the paper's, by a new network; own: by the model's own"
    add("--algorithm", algorithm, choices=ALGORITHMS, default="sleep")
    mode = "which images: test, the data's own test part, or train, the model's training images (default: test; report: both)"
    add("--mode", mode, choices=["test", "train"], default=None)
    add("--images", "the first --num-data images, or evenly spread ones", choices=["first", "spread"], default="first")
    add("--every-checkpoint", "own: evaluate each of a run's milestones; writes a CSV and a figure", action="store_true")
    add("--data-location", "as for main.py (default: where the model was trained)", type=util.to_location, default=None)
    add("--num-data", "number of images", type=positive, default=50)
    for name, (help, default, others) in SIZES.items():
        defaults = ", ".join([str(default), *(f"{algorithm}: {value}" for algorithm, value in others.items())])
        low = 0 if name == "num_iterations" else 1
        add(f"--{name.replace('_', '-')}", f"{help} (default: {defaults})", type=util.in_range(int, low))
    add("--memory-size", "mws: programs remembered per image", type=positive, default=search.NUM_BEST)
    effort = "mws: length of the search; 1: 10 to 25 seconds on one core per image and half, and 35 MB of memory, with 40 maps"
    add("--effort", effort, type=util.in_range(float, 0.01, 1000), default=1.0)
    add("--seed", "seed of all random numbers", type=util.in_range(int, 0, 2**63 - 1), default=0)
    add("--force", "repeat an evaluation that is complete, or replace one with other settings", action="store_true")
    parser.start_group("running")
    add("--cuda", "use a GPU", action="store_true")
    add("--save-interval", "iterations between checkpoints of the evaluation", type=positive, default=500)
    add("--save-minutes", "minutes between checkpoints, if sooner", type=util.in_range(float, 0.01), default=5)
    add(
        "--compile",
        "compile the renderer and the likelihood (default: if many latents are scored)",
        action=argparse.BooleanOptionalAction,
    )
    parser.set_defaults(half=None)
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range or something is missing"""
    args = get_parser().parse_args(argv)
    if not args.report and args.checkpoint_path is None:
        raise UserError("give --checkpoint-path, the model to evaluate, or --report")
    if args.mode is None and not args.report:
        args.mode = "test"
    if args.every_checkpoint and args.algorithm != "own":
        raise UserError("--every-checkpoint is for --algorithm own; the others would take hours")
    for name, (_, default, others) in SIZES.items():
        if getattr(args, name) is None or name in UNUSED.get(args.algorithm, []):
            setattr(args, name, others.get(args.algorithm, default))
    if args.algorithm == "vimco" and args.num_particles < 2:
        raise UserError("--algorithm vimco needs --num-particles of at least 2")
    if args.compile is None:
        trained = args.num_iterations * min(args.batch_size, args.num_data) * args.num_particles
        estimated = args.num_data * args.test_num_particles * (MANY_MILESTONES if args.every_checkpoint else 1)
        searched = args.num_data * args.effort * LATENTS_PER_SEARCH if args.algorithm == "mws" else 0
        args.compile = trained + estimated + searched >= MANY_LATENTS
    return args


if __name__ == "__main__":
    util.run_script(main)
