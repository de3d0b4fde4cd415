"""Measures how fast a step is, compared with a straightforward implementation.

    python benchmark.py                     # about ten minutes on two CPU cores
    python benchmark.py --quick             # a fifth of the batch, one run of each
    python benchmark.py --cuda              # on a GPU; also counts a step's kernels and launches

Both run alternately in one process on the same characters, and medians are compared. The reference is fast/reference.py, which
scores everything with gradients. The last column compares with PyTorch's convolutions alone, forward and backward.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import functools
import re
import statistics
import time

import torch

import data
import losses
import models
import rendering
import util
from fast import gpu, kernel_check, reference
from fast.cuda_graph import NUM_WARM_UPS, ReplayedStep
from main import get_adam, get_optimizer, update
from scoring import ScoreTable

ALGORITHMS = ["mws", "rws", "vimco", "pretrain", "eval rws", "eval vimco", "eval sharp"]
SHARPNESS = 1000  # in "eval sharp", the network's logits are this many times larger, as after long training

# ------------------------------------------------------------------ steps


class Steps:
    """The steps of one algorithm on built-in characters, with freshly initialised networks: `step` is the project's,
    `reference` the straightforward one; each includes the optimiser's step. `convolve` runs the convolutions.

    Args: as on the command line; num_particles: None for the algorithm's own"""

    def __init__(self, algorithm, batch_size, num_particles, device):
        util.set_seed(0, device)
        self.algorithm, self.device, self.is_evaluation = algorithm, device, algorithm.startswith("eval")
        self.obs = data.load("glyphs").train.obs[: 50 if self.is_evaluation else batch_size].to(device)
        self.model, self.network = self.build()
        self.model.requires_grad_(not self.is_evaluation)
        self.obs_id = torch.arange(len(self.obs), device=device)
        self.given = self.obs_id if self.is_evaluation else None  # what the lookup network takes in place of images
        self.memory = losses.init_memory(len(self.obs)).to(device)
        self.plain_memory = losses.unpack(self.memory)
        if self.is_evaluation:
            self.num_particles = num_particles or max(batch_size * 100 // 250, 2)
            self.optimizer = get_adam(self.network.parameters(), device)
            self.table = ScoreTable(self.model.num_arcs, device)
        else:
            self.num_particles = num_particles or 10
            self.optimizer = get_optimizer(self.model, self.network, 1)
        if algorithm == "eval sharp":
            with torch.no_grad():
                for parameter in self.network.decoder.linear.parameters():
                    parameter *= SHARPNESS
        if device.type == "cuda":
            memory_size = self.memory.shape[1] if algorithm == "mws" else 0
            sizes = self.num_particles, len(self.obs), memory_size
            kernel_check.check(self.build, device, *sizes, losses.init_memory, losses.remember)
            self.step = ReplayedStep(self.step)

    def build(self):
        """A new generative model and inference network"""
        network = models.LookupInferenceNetwork(len(self.obs)) if self.is_evaluation else models.InferenceNetwork()
        return models.GenerativeModel().to(self.device), network.to(self.device)

    def step(self):
        networks = self.model, self.network
        if self.algorithm == "mws":
            loss, _ = losses.mws(*networks, self.memory, self.obs, self.obs_id, self.num_particles)
        elif self.algorithm == "pretrain":
            loss, _ = losses.sleep(*networks, 2 * len(self.obs))
        else:
            objective = losses.vimco if self.algorithm.endswith("vimco") else losses.rws
            looks_up = self.is_evaluation and not gpu.is_gpu(self.device)
            scorer = functools.partial(self.table.score, self.obs_id) if looks_up else losses.score
            loss, _ = objective(*networks, self.obs, self.num_particles, obs_id=self.given, scorer=scorer)
        update(self.optimizer, loss)
        return {"loss": loss.detach()}

    def reference(self):
        networks = self.model, self.network
        if self.algorithm == "mws":
            loss = reference.mws(*networks, self.plain_memory, self.obs, self.obs_id, self.num_particles)
        elif self.algorithm == "pretrain":
            loss = reference.sleep(*networks, 2 * len(self.obs))
        else:
            objective = reference.vimco if self.algorithm.endswith("vimco") else reference.rws
            loss = objective(*networks, self.obs, self.num_particles, self.given)
        update(self.optimizer, loss)

    def convolve(self):
        """Runs PyTorch's convolutions forward and backward on the same images, in the chunks that are fastest on a CPU; does
        nothing for a lookup network"""
        if not self.is_evaluation:
            obs = self.obs.repeat(2, 1, 1) if self.algorithm == "pretrain" else self.obs
            for chunk in obs.split(64 if self.device.type == "cpu" else len(obs)):
                reference.embed(self.network, chunk).sum().backward()

    def warm_up(self):
        """Takes steps until they are compiled and, on a GPU, replayed, as in a run"""
        for _ in range(NUM_WARM_UPS + 2 if self.device.type == "cuda" else 1):
            self.step()

    def get_seconds(self, name, repeats=1):
        """How long a method takes, averaged over calls in a row"""
        start = time.perf_counter()
        for _ in range(repeats):
            getattr(self, name)()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats


# ------------------------------------------------------------------ measurements


def compare(algorithm, batch_size, num_particles, device, num_runs):
    """Alternates step, reference and convolutions. Returns: a row of the table"""
    steps = Steps(algorithm, batch_size, num_particles, device)
    steps.warm_up()
    Steps(algorithm, 2, num_particles, device).reference()  # a short warm-up
    seconds = {"step": [], "reference": [], "convolve": []}
    for _ in range(num_runs):
        for name, times in seconds.items():
            times += [steps.get_seconds(name) for _ in range(1 if name == "reference" else 3)]
    step, plain, convolve = map(statistics.median, seconds.values())
    to_convolutions = "-" if steps.is_evaluation else f"{step / convolve:.2f}"
    return (
        f"{algorithm:11} {len(steps.obs):6} x {steps.num_particles:<9} {step:8.4g} {plain:11.3f} {plain / step:7.1f}"
        f" {to_convolutions:>16}"
    )


# ------------------------------------------------------------------ on a GPU

NUM_IN_A_ROW = 200  # steps


def count_kernels(events):
    """From a profiler's events: the seconds of each kernel; the number of launches by the CPU"""
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = [event for event in events if re.match(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", event.name)]
    kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    return [event.time_range.elapsed_us() / 1e6 for event in kernels], len(launches)


def show_kernels(algorithm, batch_size, num_particles, device):
    """Prints the number of kernels and launches in a step, and their times"""
    steps = Steps(algorithm, batch_size, num_particles, device)
    steps.warm_up()
    torch.cuda.synchronize()
    seconds = steps.get_seconds("step", NUM_IN_A_ROW)
    with torch.profiler.profile(acc_events=True) as profiler:
        steps.step()
        torch.cuda.synchronize()
    kernels, num_launches = count_kernels(profiler.events())
    print(f"{algorithm:11} {len(kernels):9} {num_launches:9} {1e3 * sum(kernels):24.3f} {1e3 * seconds:25.3f}")


# ------------------------------------------------------------------ script


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive = parser.add, util.in_range(int, 1)
    add("--cuda", "measure a GPU", action="store_true")
    add("--quick", "a fifth of the batch, one run of each", action="store_true")
    add("--no-compile", "measure plain PyTorch", dest="compile", action="store_false")
    add("--algorithms", "what to measure (default: all)", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    add("--batch-size", "images (default: 250, the paper's); evaluations have 50, and particles in proportion", type=positive)
    add("--num-particles", "latents per image (default: 10; evaluations: 100)", type=util.in_range(int, 2))
    add("--num-runs", "runs of each", type=positive, default=3)
    return parser


def run(argv=None):
    args = get_parser().parse_args(argv)
    device = util.get_device(args.cuda)
    setting = args.batch_size or (50 if args.quick else 250), args.num_particles, device
    rendering.set_compile(args.compile, device)
    print("algorithm   images x latents   seconds   reference   ratio   x convolutions")
    for algorithm in args.algorithms:
        print(compare(algorithm, *setting, num_runs=1 if args.quick else args.num_runs), flush=True)
    if device.type == "cuda":
        print(f"algorithm     kernels  launches  milliseconds of kernels  of a step, {NUM_IN_A_ROW} in a row")
        for algorithm in args.algorithms:
            show_kernels(algorithm, *setting)
    return 0


if __name__ == "__main__":
    util.run_script(run)
