"""Trains a generative model of handwritten characters and its inference network.

    python main.py --test-run                  # half a minute
    python main.py --small-dataset             # the paper's MWS model
    python main.py --small-dataset --cuda      # on a GPU

A run lives in save/<run>/. However it was stopped, rerun the same command to resume from its latest checkpoint.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import functools
import math
import signal

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

import data
import losses
import models
import rendering
import scoring
import util
from fast import kernel_check
from fast.cuda_graph import ReplayedStep, check_recordable
from runs import checkpoints, curves, locks
from runs.curves import append_statistics, check_finite
from runs.saving import SaveClock, StopSignal
from util import UserError, warn

POWERS = {math.floor(10 ** (n / 5) + 1e-9) for n in range(50)}  # 1, 2, 3, 6, 10, 15, 25, 39, 63, 100, ...

# ------------------------------------------------------------------ the state of a run


class Run:
    """A run's data and everything that a checkpoint holds, on the device. It lives in save/<path_base>, by default named by
    the arguments"""

    def __init__(self, args, dataset, device, path_base=None):
        util.set_seed(args.seed, device)
        self.args, self.device = args, device
        self.path_base = path_base or util.get_path_base(args)
        self.settings = {**util.get_settings(args), "data": data.get_fingerprint(dataset.train)}
        self.train_data, self.test_data = dataset.train.to(device), dataset.test.to(device)
        self.data_summary = dataset.summary
        self.num_alphabets = dataset.num_alphabets if args.condition_on_alphabet else 0
        self.alphabet_names = list(dataset.alphabet_names) if self.num_alphabets else []
        self.generative_model, self.inference_network = models.build(args, self.num_alphabets, device)
        self.optimizer = get_optimizer(self.generative_model, self.inference_network, args.prior_lr_factor)
        self.pretrain_optimizer = get_adam(self.inference_network.parameters(), device)
        # The objective's, such as the memory of mws
        self.state = losses.init_state(args, len(dataset.train.obs), device, self.num_alphabets)
        if own := losses.get_parameters(self.state):
            self.optimizer.add_param_group({"params": own})
        # All that is saved and restored: tensors and objects with a state_dict. Learning-rate schedulers among them are stepped
        # after each iteration of training
        self.parts = dict(
            generative_model=self.generative_model,
            inference_network=self.inference_network,
            optimizer=self.optimizer,
            pretrain_optimizer=self.pretrain_optimizer,
            **self.state,
        )
        self.callbacks = [(args.test_interval, test)] if args.test_interval else []  # (iterations between calls, function)
        self.num_called = 0  # callbacks already called at this iteration
        self.reason = ""  # why the run ends early; a callback sets it to complete the run
        self.stop = StopSignal()
        self.curves = None
        self.pretrain_iteration = self.iteration = 0
        self.clock = torch.zeros((), dtype=torch.long, device=device)  # the iteration, as a CUDA graph sees it
        self.epoch = self.order = None  # the order of the data in this epoch, which follows from the iteration
        self.statistics = {}  # see runs/curves.py
        self.pending = []  # statistics not yet moved off the device
        # Last, when all parts exist: arguments, hyperparameters, shapes and what is frozen, as the code sets them
        self.given = dict(vars(args))
        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)
        self.requires_grad = checkpoints.get_requires_grad(self.parts)
        self.shapes = {name: part.shape for name, part in self.parts.items() if torch.is_tensor(part)}
        self.model_shapes = self.get_model_shapes()

    def record(self, phase, statistics):
        """Records statistics, a dict of scalars, of this iteration, as they are now"""
        self.pending.append((phase, self.iteration, losses.get_statistics(statistics, self.device)))

    def flush_statistics(self):
        append_statistics(self.statistics, self.pending)

    def get_checkpoint(self):
        """Raises: UserError if training has diverged, since only finite numbers are saved, or a part could not be restored"""
        self.flush_statistics()
        if replaced := [name for name, part in self.state.items() if self.parts.get(name) is not part]:
            raise UserError(
                f"the part {replaced[0]} of run.state is not that of run.parts, which is saved: change state in place (copy_)"
            )
        used = dict(optimizer=self.optimizer, pretrain_optimizer=self.pretrain_optimizer)
        if replaced := [name for name, part in used.items() if self.parts.get(name, part) is not part]:
            raise UserError(f"run.{replaced[0]} is not that of run.parts, which is saved: replace both")
        if changed := [name for name, shape in self.shapes.items() if getattr(self.parts.get(name), "shape", shape) != shape]:
            raise UserError(
                f"the part {changed[0]} of the run has changed its shape, so it could not be restored: keep the shape, or make it an"
                " object with a state_dict"
            )
        check_finite(self.get_trained())
        hyperparameters, get_kind = dict(self.hyperparameters), checkpoints.get_kind
        for name, now in checkpoints.get_hyperparameters(self.parts).items():
            if get_kind(now) != get_kind(hyperparameters.get(name, now)):  # a callback has replaced the optimiser
                hyperparameters[name] = now
        requires_grad = checkpoints.get_requires_grad(self.parts)
        return dict(
            args=self.given,
            changed_args={name: getattr(self.args, name) for name in self.get_changed_args()},
            data=self.settings["data"],
            data_summary=self.data_summary,
            num_alphabets=self.num_alphabets,
            alphabet_names=self.alphabet_names,
            pretrain_iteration=self.pretrain_iteration,
            iteration=self.iteration,
            num_due=len(self.get_due()),
            num_called=self.num_called,
            reason=str(self.reason or ""),
            statistics=self.statistics,
            random_state=util.get_random_state(self.device),
            hyperparameters=hyperparameters,
            # Only where a callback has changed it
            requires_grad={k: value for k, value in requires_grad.items() if value != self.requires_grad.get(k, value)},
            **checkpoints.get_states(self.parts),
        )

    def restore(self, checkpoint):
        """Restores a checkpoint. Raises: UserError if its run had other settings or its parts do not fit"""
        differences = util.describe_differences(checkpoint["settings"], self.settings)
        if differences:
            folder, name = util.SAVE / self.path_base, self.path_base.removeprefix("test_run_")
            raise UserError(
                f"{folder} holds a run with other settings: {differences}; to resume it, use its settings and --name={name}; else"
                " choose another --name, or move that folder away"
            )
        util.warn_of_removed(checkpoint)
        for name in checkpoint.keys() - self.parts.keys() - checkpoints.TYPES.keys() - checkpoints.RESERVED:
            if checkpoint[name] is not None:
                warn(f"the checkpoint has a part {name}, which this run lacks; it is ignored")
        with checkpoints.using(checkpoint):
            checkpoints.restore_parts(self.parts, checkpoint, self.hyperparameters)
            checkpoints.set_requires_grad(self.parts, checkpoint.get("requires_grad", {}))
            vars(self.args).update(checkpoint.get("changed_args", {}))
            for name in ["statistics", "pretrain_iteration", "iteration", "num_called", "reason"]:
                setattr(self, name, checkpoint[name])
            self.clock.fill_(self.iteration)
            util.set_random_state(checkpoint["random_state"], self.device)

    def get_changed_args(self):
        """The names of settings that a callback has changed and that affect what is learned, such as num_particles"""
        return [name for name in util.get_settings(self.args) if getattr(self.args, name, None) != self.given.get(name)]

    def get_trained(self):
        """All parameters of the models and of whatever else the run's optimisers train: a list"""
        optimizers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        trained = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
        return [*self.generative_model.parameters(), *self.inference_network.parameters(), *trained]

    def get_model_shapes(self):
        models = self.generative_model, self.inference_network
        return [{name: parameter.shape for name, parameter in model.named_parameters()} for model in models]

    def get_schedulers(self):
        """The learning-rate schedulers that step without a value"""
        schedulers = filter(checkpoints.is_schedule, self.parts.values())
        return [part for part in schedulers if not isinstance(part, torch.optim.lr_scheduler.ReduceLROnPlateau)]

    def get_due(self):
        """The callbacks of this iteration that are still to be called"""
        due = [function for interval, function in self.callbacks if self.iteration > 0 and self.iteration % interval == 0]
        return due[self.num_called :]


# ------------------------------------------------------------------ optimisers


def get_optimizer(generative_model, inference_network, prior_lr_factor, lr=1e-3):
    """Adam for both models; the prior's learning rate is prior_lr_factor times that of the rest"""
    prior = list(generative_model.prior.parameters())
    others = [p for p in generative_model.parameters() if all(p is not other for other in prior)]
    others += [p for p in inference_network.parameters() if all(p is not other for other in [*prior, *others])]
    groups = [{"params": others, "lr": lr}, {"params": prior, "lr": lr * prior_lr_factor}]
    return get_adam(groups, others[0].device)


def get_adam(groups, device, lr=1e-3):
    """Adam for parameters or groups of them; on a GPU, fused and capturable by CUDA graphs"""
    on_gpu = device.type == "cuda"  # other devices lack these
    return torch.optim.Adam(groups, lr=lr, fused=on_gpu, capturable=on_gpu)


def update(optimizer, loss):
    """Takes one optimiser step on the loss. Parameters that the loss does not depend on (those of strokes that leave no ink,
    say) get zero gradients, so that all parameters have the same history; frozen ones stay as they are."""
    optimizer.zero_grad()
    loss.backward()
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    if loss.is_cuda:
        check_recordable(optimizer)
    optimizer.step()


# ------------------------------------------------------------------ a step


def get_obs_id(run):
    """Indices of the current iteration's batch: [B]. An epoch's order depends only on the seed
    and the epoch's number, so the iteration alone gives the position in the data."""
    num_data, batch_size = len(run.train_data.obs), run.args.batch_size
    epoch, batch_id = divmod(run.iteration, math.ceil(num_data / batch_size))
    if run.epoch != epoch:
        generator = torch.Generator().manual_seed(util.fold_seed(run.args.seed) + 1_000_003 * (epoch + 1))
        order = torch.randperm(num_data, generator=generator)
        if run.device.type == "cuda":  # from pinned memory, so that the CPU does not wait
            order = order.pin_memory()
        run.epoch, run.order = epoch, order.to(run.device, non_blocking=True)
    return run.order[batch_id * batch_size : (batch_id + 1) * batch_size]


def pretrain_step(run):
    """Takes a step of sleep. Returns: the statistics to record"""
    num_samples = losses.get_num_dreams(run.args.batch_size, run.args.num_particles)
    loss, statistics = losses.sleep(run.generative_model, run.inference_network, num_samples)
    statistics = losses.get_statistics(statistics, run.device)
    update(run.pretrain_optimizer, loss)
    return statistics


def train_step(run, obs_id):
    """Takes a step of the algorithm on the images obs_id [B]. Returns: the statistics to record"""
    args = run.args
    step = losses.Step(
        generative_model=run.generative_model,
        inference_network=run.inference_network,
        obs=run.train_data.obs[obs_id],
        obs_id=obs_id,
        alphabet=run.train_data.alphabet[obs_id] if run.num_alphabets else None,
        num_particles=args.num_particles,
        num_dreams=losses.get_num_dreams(args.batch_size, args.num_particles),
        iteration=run.clock,
    )
    loss, statistics = losses.get_loss(args, step, run.state)
    update(run.optimizer, loss)
    run.clock += 1
    return statistics


def step_schedules(run):
    """Moves the learning-rate schedules on by an iteration. Returns: whether they have replaced a value, which a recorded step
    would not notice. Raises: UserError if one of fixed length has ended"""
    schedulers = run.get_schedulers()
    before = [(group, dict(group)) for scheduler in schedulers for group in scheduler.optimizer.param_groups]
    try:
        for scheduler in schedulers:
            scheduler.step()
    except ValueError as error:  # OneCycleLR's
        raise UserError(f"the learning-rate schedule cannot go on: {error}; give it the full length at the start") from error
    for group, old in before:
        if torch.is_tensor(old["lr"]) and group["lr"] is not old["lr"]:  # replaced, but a recorded step reads the old one
            group["lr"] = old["lr"].fill_(group["lr"])
    pairs = [(group[key], old[key]) for group, old in before for key in old.keys() - {"params"}]
    return any(value is not was and not (isinstance(value, int | float | tuple) and value == was) for value, was in pairs)


def get_steps(run):
    """The pretraining step, called without arguments, and the training step, called with obs_id; CUDA graphs on a GPU"""
    steps = functools.partial(pretrain_step, run), functools.partial(train_step, run)
    if run.device.type != "cuda" or not run.args.compile:
        return steps
    for schedule in filter(checkpoints.is_schedule, run.parts.values()):
        for group in schedule.optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):  # a graph then reads a tensor anew in each step
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=run.device)
    return [ReplayedStep(step, run.device) for step in steps]


# ------------------------------------------------------------------ beside the steps


@torch.no_grad()
def test(run):
    """Estimates log p and KL(q || p) of the test images by importance sampling, in nats. Returns: False if a signal to stop
    arrives first"""
    args, split, log_p, kl = run.args, run.test_data, [], []
    for obs_id in torch.arange(len(split.obs), device=run.device).split(args.test_batch_size):
        if run.stop.received is not None:
            return False
        log_weight = scoring.get_log_weight(
            run.generative_model,
            run.inference_network,
            split.obs[obs_id],
            args.test_num_particles,
            split.alphabet[obs_id] if run.num_alphabets else None,
        )  # [P, B]
        log_p.append(scoring.log_mean_weight(log_weight))
        kl.append(log_p[-1] - log_weight.mean(0))
    run.record("test", {"test_log_p": torch.cat(log_p).mean(), "test_kl": torch.cat(kl).mean()})


def call_back(run):
    """Calls the first callback that is due, with the run, its models in evaluation mode, and all its statistics so far. Random
    numbers drawn in it do not affect the run. A callback interrupted by a signal may return False, to be called again when the
    run resumes. Returns: whether it has changed what a recorded step would not notice"""
    run.flush_statistics()
    before = get_step_values(run)
    modules = [*run.generative_model.modules(), *run.inference_network.modules()]
    modes = [module.training for module in modules]
    run.generative_model.eval(), run.inference_network.eval()
    random_state = util.get_random_state(run.device)
    if run.get_due()[0](run) is not False or run.stop.received is None:
        run.num_called += 1
    util.set_random_state(random_state, run.device)
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    now = get_step_values(run)
    return len(now) != len(before) or any(x is not y or p != q for (x, p), (y, q) in zip(before, now, strict=True))


def get_step_values(run):
    """What a step reads and a recorded one would not notice if it changed: hyperparameters and states of the run's optimisers,
    attributes of its models, the objective's state, the data and the arguments. Returns: a list of pairs, each an object and, of
    a tensor, where its values are, its shape and whether it is trained"""
    optimizers = [part for part in run.parts.values() if isinstance(part, torch.optim.Optimizer)]
    parts = [part for part in (run.generative_model, run.inference_network, *run.state.values()) if isinstance(part, nn.Module)]
    values = tree_leaves([
        *([optimizer.param_groups, list(optimizer.state.values())] for optimizer in optimizers),
        *(list(vars(module).values()) for part in parts for module in part.modules()),
        *(run.state, run.train_data.obs, run.train_data.alphabet, list(vars(run.args).values())),
    ])  # fmt: skip
    has_place = [torch.is_tensor(x) and x.layout == torch.strided for x in values]
    return [(x, (x.data_ptr(), x.shape, x.requires_grad) if has else None) for x, has in zip(values, has_place, strict=True)]


def is_milestone(iteration):
    """Whether a numbered checkpoint is kept: every 5000 iterations, and at POWERS"""
    return iteration % 5000 == 0 or iteration in POWERS


def save(run, *others):
    """Writes latest.pt and, before it, the same under other names. Returns: the path of latest.pt. Raises: UserError if a part
    has become something that cannot be saved and loaded; the files stay as they were"""
    checkpoint = run.get_checkpoint()
    if not checkpoints.is_plain(checkpoint):
        checkpoints.copy(checkpoint)  # raises, naming the part, if it could not be loaded
    if run.get_model_shapes() != run.model_shapes:  # a callback has changed them
        with torch.random.fork_rng(devices=[]):
            models.from_checkpoint(checkpoints.fill_in(checkpoints.copy(checkpoint)))  # raises if nobody could load it
    content, latest = util.encode(checkpoint), checkpoints.get_path(run.path_base)
    for path in [*(checkpoints.get_path(run.path_base, name) for name in others), latest]:
        util.write(path, content)
    return latest


def save_if_due(run, clock):
    """Saves latest.pt if it is due, and after each milestone, so that no numbered checkpoint is newer. A run killed in between
    rewrites the milestone when it resumes"""
    reached = run.iteration > 0 and is_milestone(run.iteration)
    if reached or (run.iteration or run.pretrain_iteration) % run.args.save_interval == 0 or clock.is_due():
        save(run, *[run.iteration] * reached)
        clock.restart()


def show(run, bar):
    """Moves the progress bar and, at the log interval, shows the newest statistics and writes the curves"""
    bar.update(run.pretrain_iteration + run.iteration - bar.n)
    if (run.iteration or run.pretrain_iteration) % run.args.log_interval == 0:
        run.flush_statistics()
        run.curves.update(run.statistics)
        bar.set_description("training" if run.iteration else "pretraining", refresh=False)
        shown = curves.get_last(run.statistics, "train" if run.iteration else "pretrain")
        shown |= curves.get_last(run.statistics, "test")
        if strange := [name for name, value in shown.items() if not math.isfinite(value)]:
            check_finite(run.get_trained())
            util.warn_once(f"{', '.join(strange)} is not a finite number, though all parameters are: see losses.csv")
        bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)


# ------------------------------------------------------------------ a run


def train(run):
    """Takes steps until the run is complete or a signal arrives. It can resume from its state between any two steps.
    Returns: the path of latest.pt"""
    args, clock = run.args, SaveClock(run.args.save_minutes)
    pretrain, step = get_steps(run)
    total, done = args.pretrain_iterations + args.num_iterations, run.pretrain_iteration + run.iteration
    with util.show_progress(total=total, initial=done, unit="it") as bar:
        while run.stop.received is None and not run.reason:
            if run.get_due():
                if call_back(run):  # a recorded CUDA graph would not notice
                    pretrain, step = get_steps(run)
                continue
            if run.pretrain_iteration < args.pretrain_iterations:
                statistics = pretrain()
                run.pretrain_iteration += 1
                run.pending.append(("pretrain", run.pretrain_iteration, statistics))
            elif run.iteration < args.num_iterations:
                pretrain = None  # releases a CUDA graph's memory
                statistics = step(get_obs_id(run))
                run.iteration += 1
                run.num_called = 0
                run.pending.append(("train", run.iteration, statistics))
                if step_schedules(run) and isinstance(step, ReplayedStep):
                    util.warn_once("a schedule changes numbers, which a CUDA graph would not notice: steps are slower")
                    step = step.step
            else:
                break
            show(run, bar)
            save_if_due(run, clock)
    path = save(run)
    run.curves.update(run.statistics)
    return path


def try_to_resume(run):
    """Before the first step, saves, loads and restores the run in memory, and rebuilds its models as evaluations and pictures
    will. Raises: UserError if any of this fails"""
    checkpoint = checkpoints.fill_in(checkpoints.copy(run.get_checkpoint()))
    models.from_checkpoint(checkpoint)
    run.restore(checkpoint)


def main(argv=None):
    args = parse_args(argv)
    device = util.get_device(args.cuda)
    print(f"{args.algorithm} on {device.type}, seed {args.seed}, torch {torch.__version__}", flush=True)
    dataset = load_data(args)
    path_base = checkpoints.find_run(args, lambda: data.get_fingerprint(dataset.train))
    with StopSignal() as stop, locks.lock_run(path_base, stop):
        run = Run(args, dataset, device, path_base)
        run.stop, checkpoint = stop, checkpoints.load_newest(checkpoints.get_path(path_base))
        if checkpoint is not None:
            run.restore(checkpoint)
        try_to_resume(run)
        run.curves = curves.Curves(util.SAVE / path_base, run.statistics, args.tensorboard)
        if checkpoint is not None:
            is_latest = checkpoint["path"] == str(checkpoints.get_path(path_base))
            if is_latest and checkpoints.is_complete(checkpoint, args.num_iterations):
                more = f" (a test run takes at most {util.get_fields()['num_iterations'].setting.limit})" * args.test_run
                why = f", stopped because {run.reason}" if run.reason else f"; more with --num-iterations{more}"
                print(f"{util.SAVE / path_base} is complete: {run.iteration} iterations{why}")
                return 0
            print(f"resuming at iteration {run.iteration} ({run.pretrain_iteration} of pretraining) of {path_base}")
        elif any(some for name in ("logp/*.pt", "*/[0-9]*.pdf") for some in (util.SAVE / path_base).glob(name)):
            warn(f"{util.SAVE / path_base} holds pictures or evaluations of another model; to keep them apart, choose a --name")
        rendering.set_compile(args.compile, device)
        programs = checkpoints.get_programs(run.state)
        memory_size = 0 if programs is None else programs.shape[1]
        build = functools.partial(models.build, args, dataset.num_alphabets, device)
        batch_size, memory = min(args.batch_size, len(dataset.train.obs)), (losses.init_memory, losses.remember)
        kernel_check.check(build, device, args.num_particles, batch_size, memory_size, *memory)
        path = train(run)
    if stop.received is not None:
        name, progress = signal.Signals(stop.received).name, f"{run.iteration} ({run.pretrain_iteration} of pretraining)"
        print(f"stopped by {name} at iteration {progress}, saved {path}; rerun the same command to resume")
        return 128 + stop.received
    print(f"trained {util.count(run.iteration, 'iteration')}{f', stopped because {run.reason}' if run.reason else ''}: {path}")
    print(f"next, to see what it learned: python diagnostics.py --checkpoint-path {path}")
    print(f"and for log p: python eval_logp.py --checkpoint-path {path} --algorithm mws")
    return 0


def load_data(args):
    """Loads the data set; --small-dataset is tested on its training images, as in the authors' code. Raises: UserError if the
    data do not fit the arguments"""
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
    parser.add_fields()
    parser.set_defaults(data_location=None)
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range or exclude each other"""
    args = get_parser().parse_args(argv)
    for name in util.RUN_DEFAULTS[True]:
        if getattr(args, name) is None:
            setattr(args, name, util.get_run_default(name, args.test_run))
    vars(args).update(util.limit(vars(args), args))
    if args.algorithm == "vimco" and args.num_particles < 2:
        raise UserError("--algorithm vimco needs --num-particles of at least 2")
    if args.q_uniform_mixture == 1:
        raise UserError("--q-uniform-mixture 1 leaves the inference network nothing to learn; it must be below 1")
    if args.initial_max_curve > 0.5 and not args.big_arcs:
        raise UserError(f"--initial-max-curve {args.initial_max_curve} is too large without --big-arcs; give at most 0.5")
    if args.small_dataset and args.dataset_size is not None:
        raise UserError("--small-dataset and --dataset-size exclude each other; give one")
    return args


if __name__ == "__main__":
    util.run_script(main)
