"""Trains a generative model of handwritten characters and its inference network.

    python main.py --test-run                  # half a minute
    python main.py --small-dataset             # the paper's MWS model
    python main.py --small-dataset --cuda      # on a GPU

A run lives in save/<run>/. However it is stopped, rerun the same command to resume it from
its latest checkpoint.
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
from fast import kernel_check
from fast.cuda_graph import ReplayedStep
from runs import checkpoints, locks
from runs.curves import Curves, append_statistics, check_finite
from runs.saving import SaveClock, StopSignal
from util import SETTINGS, UserError

# ------------------------------------------------------------------ the state of a run


class Run:
    """Everything a checkpoint holds (models, optimisers, memory, statistics, progress), and the data, on the device. Lives
    in save/<path_base>, by default where the arguments say"""

    def __init__(self, args, dataset, device, path_base=None):
        util.set_seed(args.seed, device)
        self.args, self.device = args, device
        self.path_base = path_base or util.get_path_base(args)
        self.settings = {**util.get_settings(args), "data": data.get_fingerprint(dataset.train)}
        self.train_data, self.test_data = dataset.train.to(device), dataset.test.to(device)
        self.data_summary = dataset.summary
        self.num_alphabets = dataset.num_alphabets if args.condition_on_alphabet else 0
        self.generative_model, self.inference_network = models.build(args, self.num_alphabets, device)
        self.optimizer = get_optimizer(self.generative_model, self.inference_network, args.prior_lr_factor)
        self.pretrain_optimizer = get_adam(self.inference_network.parameters(), device)
        self.memory = None
        if args.algorithm == "mws":
            sizes = len(dataset.train.obs), args.memory_size, args.num_arcs, args.num_primitives
            self.memory = losses.init_memory(*sizes).to(device)
        self.pretrain_iteration = self.iteration = 0
        self.epoch = self.order = None  # of the data; they follow from the iteration
        self.statistics = {}  # name -> [iterations done], float32
        self.pending = []  # statistics not yet moved off the device

    def flush_statistics(self):
        append_statistics(self.statistics, self.pending)

    def get_checkpoint(self):
        """Raises: UserError if training has diverged: only finite numbers are saved"""
        self.flush_statistics()
        check_finite([*self.generative_model.parameters(), *self.inference_network.parameters()])
        return dict(
            args=vars(self.args),
            settings=self.settings,
            data_summary=self.data_summary,
            num_alphabets=self.num_alphabets,
            generative_model=self.generative_model.state_dict(),
            inference_network=self.inference_network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            pretrain_optimizer=self.pretrain_optimizer.state_dict(),
            memory=self.memory,
            statistics=self.statistics,
            pretrain_iteration=self.pretrain_iteration,
            iteration=self.iteration,
            random_state=util.get_random_state(self.device),
        )

    def restore(self, checkpoint):
        """Restores a checkpoint that runs/checkpoints.py has verified. Raises: UserError if its run had other settings"""
        differences = util.describe_differences(checkpoint["settings"], self.settings)
        if differences:
            folder = util.SAVE / self.path_base
            raise UserError(
                f"{folder} holds a run with other settings: {differences}; use its settings, or move that folder away"
            )
        for name in ["generative_model", "inference_network"]:
            getattr(self, name).load_state_dict(checkpoint[name])
        for name in ["optimizer", "pretrain_optimizer"]:
            load_optimizer(getattr(self, name), checkpoint[name])
        for name in ["statistics", "pretrain_iteration", "iteration"]:
            setattr(self, name, checkpoint[name])
        for name in checkpoints.get_statistics(self.args) if self.iteration else []:  # that an older version lacked
            self.statistics.setdefault(name, torch.full([self.iteration], math.nan))
        if self.memory is not None:
            self.memory.copy_(checkpoint["memory"])
        util.set_random_state(checkpoint["random_state"], self.device)


# ------------------------------------------------------------------ optimisers


def get_optimizer(generative_model, inference_network, prior_lr_factor, lr=1e-3):
    """Adam for both models; the prior's learning rate is prior_lr_factor times that of the rest"""
    others, prior = models.get_parameter_groups(generative_model, inference_network)
    groups = [{"params": others, "lr": lr}, {"params": prior, "lr": lr * prior_lr_factor}]
    return get_adam(groups, prior[0].device)


def get_adam(groups, device, lr=1e-3):
    """Adam for parameters or groups of them; on a GPU, fused and capturable by CUDA graphs"""
    on_gpu = device.type == "cuda"  # other devices lack these
    return torch.optim.Adam(groups, lr=lr, fused=on_gpu, capturable=on_gpu)


def get_initial_state(parameter):
    """Adam's state before its first step"""
    zero = torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")
    return {"step": zero, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def load_optimizer(optimizer, state):
    """Restores an optimiser's state, which may come from another device"""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        saved.update(fused=group["fused"], capturable=group["capturable"])
    optimizer.load_state_dict(state)
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if optimizer.state and parameter not in optimizer.state:  # an older version kept none without a gradient
            optimizer.state[parameter] = get_initial_state(parameter)


def update(optimizer, loss):
    """Takes one optimiser step on the loss. A parameter that the loss does not depend on (of strokes that leave no ink,
    say) stays as it is, but gets a state like all others, so that all checkpoints look alike."""
    optimizer.zero_grad()
    loss.backward()
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


# ------------------------------------------------------------------ a step


def get_obs_id(run):
    """Indices of the current iteration's batch: [B]. An epoch's order depends only on the seed
    and the epoch's number, so the iteration alone gives the position in the data."""
    num_data, batch_size = len(run.train_data.obs), run.args.batch_size
    epoch, batch_id = divmod(run.iteration, math.ceil(num_data / batch_size))
    if run.epoch != epoch:
        generator = torch.Generator().manual_seed(run.args.seed + 1_000_003 * (epoch + 1))
        order = torch.randperm(num_data, generator=generator)
        if run.device.type == "cuda":  # from pinned memory, so that the CPU does not wait
            order = order.pin_memory()
        run.epoch, run.order = epoch, order.to(run.device, non_blocking=True)
    return run.order[batch_id * batch_size : (batch_id + 1) * batch_size]


def get_loss(run, obs_id):
    """The scalar to differentiate and the statistics to record"""
    args, alphabet = run.args, run.train_data.alphabet[obs_id] if run.num_alphabets else None
    if args.algorithm == "mws":
        more = dict(memory=run.memory, obs_id=obs_id)
    elif args.algorithm == "sleep":
        more = dict(num_dreams=losses.get_num_dreams(args.batch_size, args.num_particles))
    else:
        more = {name: getattr(args, name) for name in util.HYPERPARAMETERS.get(args.algorithm, {})}
    return losses.OBJECTIVES[args.algorithm](
        run.generative_model,
        run.inference_network,
        obs=run.train_data.obs[obs_id],
        num_particles=args.num_particles,
        alphabet=alphabet,
        **more,
    )


def pretrain_step(run):
    """A step of sleep. Returns: the statistics to record"""
    num_samples = losses.get_num_dreams(run.args.batch_size, run.args.num_particles)
    loss, statistics = losses.sleep(run.generative_model, run.inference_network, num_samples)
    update(run.pretrain_optimizer, loss)
    return {"pretrain_loss": statistics["phi_loss"]}


def train_step(run, obs_id):
    """A step of the algorithm on the images obs_id [B]. Returns: the statistics to record"""
    loss, statistics = get_loss(run, obs_id)
    update(run.optimizer, loss)
    return statistics


def get_steps(run):
    """The pretraining step, called without arguments, and the training step, called with obs_id; CUDA graphs on a GPU"""
    steps = functools.partial(pretrain_step, run), functools.partial(train_step, run)
    if run.device.type == "cuda" and run.args.compile:
        return [ReplayedStep(step) for step in steps]
    return steps


# ------------------------------------------------------------------ beside the steps


@torch.no_grad()
def test(run, stop):
    """Estimates log p and KL(q || p) of the test images by importance sampling, in nats.
    It leaves training unchanged, and records nothing if a signal to stop arrives."""
    args, device, split = run.args, run.device, run.test_data
    log_p, kl = [], []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for obs_id in torch.arange(len(split.obs), device=device).split(args.test_batch_size):
            if stop.received is not None:
                return
            log_weight = scoring.get_log_weight(
                run.generative_model,
                run.inference_network,
                split.obs[obs_id],
                args.test_num_particles,
                split.alphabet[obs_id] if run.num_alphabets else None,
            )
            log_p.append(scoring.log_mean_weight(log_weight))
            kl.append(log_p[-1] - log_weight.mean(0))
    values = {"test_log_p": torch.cat(log_p).mean(), "test_kl": torch.cat(kl).mean()}
    run.pending.append({"test_iteration": run.iteration, **values})
    run.flush_statistics()


def is_milestone(iteration):
    """Every 5000, and floor(10^(n / 5)): 1, 2, 3, 6, 10, 15, 25, 39, 63, 100, ..."""
    n = round(5 * math.log10(iteration + 1))
    return iteration % 5000 == 0 or iteration in [math.floor(10 ** (k / 5) + 1e-9) for k in (n - 1, n, n + 1)]


def save(run, name="latest"):
    """Returns: the path"""
    path = checkpoints.get_path(run.path_base, name)
    util.save_checkpoint(path, run.get_checkpoint())
    return path


def save_if_due(run, clock):
    """Writes the milestone first: a run killed between the two then writes it again when it resumes"""
    if run.iteration > 0 and is_milestone(run.iteration):
        save(run, run.iteration)
    if (run.iteration or run.pretrain_iteration) % run.args.save_interval == 0 or clock.is_due():
        save(run)
        clock.restart()


def save_missing_milestone(run):
    """Writes the milestone of the iteration at which a run resumes, if an older version was killed before it could"""
    iteration = run.iteration
    if iteration > 0 and is_milestone(iteration) and not checkpoints.get_path(run.path_base, iteration).exists():
        save(run, iteration)


def is_complete(run):
    """Whether nothing is left to do; a run may have been killed between its last step and its last test or save"""
    if run.iteration != run.args.num_iterations:
        return run.iteration > run.args.num_iterations
    try:
        latest = checkpoints.load(checkpoints.get_path(run.path_base), resumable=True)
    except (UserError, OSError):
        return False
    return latest["iteration"] == run.iteration and not checkpoints.is_test_due(vars(run.args), run.iteration, run.statistics)


def show(run, bar, curves):
    """Moves the progress bar and, at the log interval, shows the newest statistics and writes the curves"""
    bar.update(run.pretrain_iteration + run.iteration - bar.n)
    if (run.iteration or run.pretrain_iteration) % run.args.log_interval == 0:
        run.flush_statistics()
        curves.update(run.statistics)
        bar.set_description("training" if run.iteration else "pretraining", refresh=False)
        hidden = {"test_iteration", "pretrain_loss"} if run.iteration else {}
        names = [name for name in run.statistics if name not in hidden]
        bar.set_postfix({name: f"{run.statistics[name][-1]:.4g}" for name in names}, refresh=False)


# ------------------------------------------------------------------ a run


def train(run, stop, curves):
    """Takes steps until the run is complete or a signal arrives. A run can resume from the
    state between any two steps."""
    args, clock = run.args, SaveClock(run.args.save_minutes)
    pretrain, step = get_steps(run)
    total, done = args.pretrain_iterations + args.num_iterations, run.pretrain_iteration + run.iteration
    with util.show_progress(total=total, initial=done, unit="it") as bar:
        while stop.received is None:
            if checkpoints.is_test_due(vars(args), run.iteration, run.statistics):
                test(run, stop)
                continue
            if run.pretrain_iteration < args.pretrain_iterations:
                run.pending.append(pretrain())
                run.pretrain_iteration += 1
            elif run.iteration < args.num_iterations:
                pretrain = None  # a CUDA graph's memory is released
                run.pending.append(step(get_obs_id(run)))
                run.iteration += 1
            else:
                break
            show(run, bar, curves)
            save_if_due(run, clock)
    path = save(run)
    curves.update(run.statistics)
    return path


def main(argv=None):
    args = parse_args(argv)
    device = util.get_device(args.cuda)
    print(f"{args.algorithm} on {device.type}, seed {args.seed}, torch {torch.__version__}", flush=True)
    dataset = load_data(args)
    check_memory(args, len(dataset.train.obs), dataset.num_alphabets if args.condition_on_alphabet else 0)
    path_base = checkpoints.find_run(args, lambda: data.get_fingerprint(dataset.train))
    with StopSignal() as stop, locks.lock_run(path_base, stop):
        run = Run(args, dataset, device, path_base)
        num_images = {run.settings["data"]: len(dataset.train.obs)}
        checkpoint = checkpoints.load_newest(path_base, resumable=True, num_images=num_images)
        if checkpoint is not None:
            run.restore(checkpoint)
            save_missing_milestone(run)
        curves = Curves(util.SAVE / path_base, run.statistics, args.tensorboard)
        if checkpoint is not None:
            if is_complete(run):
                print(f"{util.SAVE / path_base} is complete: {run.iteration} iterations; more with --num-iterations")
                return 0
            print(f"resuming at iteration {run.iteration} ({run.pretrain_iteration} of pretraining) of {path_base}")
        rendering.set_compile(args.compile, device)
        batch_size, memory_size = min(args.batch_size, len(dataset.train.obs)), run.settings["memory_size"]
        build = functools.partial(models.build, args, dataset.num_alphabets, device)
        memory = memory_size, losses.init_memory, losses.remember
        kernel_check.check(build, device, args.num_particles, batch_size, *memory)
        path = train(run, stop, curves)
    if stop.received is not None:
        name, progress = signal.Signals(stop.received).name, f"{run.iteration} ({run.pretrain_iteration} of pretraining)"
        print(f"stopped by {name} at iteration {progress}, saved {path}; rerun the same command to resume")
        return 128 + stop.received
    print(
        f"trained {run.iteration} iterations: {path}; next, to see what it learned: python diagnostics.py --checkpoint-path"
        f" {path}, and for log p: python eval_logp.py --checkpoint-path {path} --algorithm mws"
    )
    return 0


def check_memory(args, num_images, num_alphabets):
    """Says so if a run takes much memory. Raises: UserError if that is more than there is (on a CPU)"""
    contexts = num_alphabets + args.obs_embedding_dim
    sizes = [(args.p_lstm_hidden_size, num_alphabets), (args.q_lstm_hidden_size, contexts)]
    decoders = sum(4 * units * (units + args.num_primitives + 4 + context) for units, context in sizes)
    num_parameters = decoders + 128 * 9 * (args.obs_embedding_dim + 192)
    models_bytes = 16 * num_parameters  # with gradients and Adam's two moments
    # A proposal's gates and state, choices and probabilities, and codes; the memory, a copy, and an image's compared in pairs
    per_proposal = 4 * (10 * args.q_lstm_hidden_size + 4 * args.num_primitives) + 40 * args.num_arcs
    step_bytes = min(args.batch_size, num_images) * args.num_particles * per_proposal
    memory_bytes = (2 * num_images + args.memory_size) * args.memory_size * args.num_arcs * (args.algorithm == "mws")
    total, available = models_bytes + step_bytes + memory_bytes, util.get_available_memory()
    if not args.cuda and total > available:
        raise UserError(
            f"the run takes about {total / 1e9:.1f} GB of memory (models {models_bytes / 1e9:.1f}, a step {step_bytes / 1e9:.1f},"
            f" remembered programs {memory_bytes / 1e9:.1f}) and {available / 1e9:.1f} GB are available; use smaller"
            " --obs-embedding-dim, --num-particles, --batch-size or --memory-size"
        )
    if total > 1e9:
        print(f"allocating about {total / 1e9:.1f} GB of memory, for {num_parameters / 1e6:.0f} million parameters", flush=True)


def load_data(args):
    """Loads the data set; a small one is tested on its training images, as in the authors' code. Raises: UserError if it does
    not fit the arguments"""
    dataset = data.load_and_tell(args.data_location, args.small_dataset, args.dataset_size, args.find_characters)
    if args.condition_on_alphabet and dataset.num_alphabets < 2:
        raise UserError(f"--condition-on-alphabet: {args.data_location} has fewer than two alphabets")
    if args.small_dataset:
        dataset = dataset._replace(test=dataset.train)
    if args.test_run:
        dataset = dataset._replace(test=dataset.test.select(slice(20)))
    return dataset


# ------------------------------------------------------------------ arguments


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive = parser.add, util.in_range(int, 1)
    parser.start_group("run")
    add("--test-run", "shrink everything, to try out a whole run in under two minutes", action="store_true")
    add("--cuda", "use a GPU", action="store_true")
    add("--name", "name of the run's folder in save/ (default: derived from the settings)")
    add("--seed", "seed of all random numbers")
    add(
        "--compile",
        "compile the hot path, and on a GPU replay steps as CUDA graphs (default: yes, except in test runs)",
        action=argparse.BooleanOptionalAction,
    )
    parser.start_group("data")
    location = "local, om, glyphs, or a path: .mat, .npy, .npz, .zip, folder of images"
    add("--data-location", f"{location} (default: local; in a test run glyphs)", default=None)
    add("--small-dataset", "train on 10 images per alphabet", action="store_true")
    add("--dataset-size", "number of training images, the same for each alphabet (default: all)")
    found = "find the characters on photographs and scans, in a folder of your own images"
    add("--find-characters", f"{found}, and give them Omniglot's size and stroke", action="store_true")
    add_model_arguments(parser)
    parser.start_group("training")
    algorithm = f"{', '.join(losses.OBJECTIVES)} (RWS with the sleep update of phi)"
    add("--algorithm", algorithm, choices=list(losses.OBJECTIVES))
    add("--batch-size", "images per step")
    add("--num-particles", "proposals per image (vimco: at least 2)")
    for algorithm, own in util.HYPERPARAMETERS.items():
        for name, (*_, help) in own.items():
            add(f"--{name.replace('_', '-')}", f"{algorithm}: {help}")
    add("--prior-lr-factor", "learning rate of the prior, relative to the others' 1e-3")
    add("--pretrain-iterations", "sleep steps that train the inference network first")
    add("--num-iterations", "steps of the algorithm", default=util.NUM_ITERATIONS)
    parser.start_group("saving and logging")
    add("--save-interval", "iterations between checkpoints", type=positive, default=1000)
    add("--save-minutes", "minutes between checkpoints, if that is sooner", type=util.in_range(float, 0.01), default=5)
    add("--log-interval", "iterations between updates of the progress bar and losses.csv", type=positive, default=10)
    add("--tensorboard", "also log for TensorBoard", action="store_true")
    tested = "test images, with --small-dataset of its training images"
    add("--test-interval", f"iterations between estimates of log p and KL of the {tested} (default: never)", type=positive)
    add("--test-batch-size", "images per step of a test", type=positive, default=5)
    add("--test-num-particles", "samples per image in a test", type=positive, default=1000)
    return parser


def add_model_arguments(parser):
    parser.start_group("model")
    add = parser.add
    add("--likelihood", "of an image given a drawing: " + ", ".join(models.LIKELIHOODS), choices=list(models.LIKELIHOODS))
    add("--condition-on-alphabet", "condition the prior and the inference network on the alphabet", action="store_true")
    add("--num-arcs", "strokes per character, including the invisible first one")
    add("--num-primitives", "strokes in the library")
    add(
        "--initial-max-curve",
        "initial curvature of strokes, in units of a circle's half angle / pi; at most 0.5 without --big-arcs",
    )
    add("--big-arcs", "allow strokes of more than half a circle", action="store_true")
    add("--p-lstm-hidden-size", "hidden units of the prior's LSTM")
    add("--p-uniform-mixture", "weight of a uniform distribution in each of the prior's choices")
    add("--q-lstm-hidden-size", "hidden units of the inference network's LSTM")
    add("--q-uniform-mixture", "weight of a uniform distribution in each of the inference network's choices")
    add("--obs-embedding-dim", "dimension of an image's embedding")


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range or exclude each other"""
    args = get_parser().parse_args(argv)
    if args.data_location is None:
        args.data_location = "glyphs" if args.test_run else SETTINGS["data_location"]
    if args.test_run:
        for name, limit in util.get_test_run_limits(args.likelihood).items():
            value = getattr(args, name)
            setattr(args, name, limit if value is None else min(value, limit))
    if args.compile is None:  # regardless of the number of iterations, which changes no bits
        args.compile = not args.test_run
    util.check_arguments(args)
    return args


if __name__ == "__main__":
    util.run_script(main)
