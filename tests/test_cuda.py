"""What a GPU needs of a run, and what is the same there. Without one, whole runs and evaluations are built on the
meta device, where there are no values to look at, and take a GPU's branches there. tests/test_kernels.py has the
Triton kernels themselves, tests/test_cuda_graph.py a stand-in for CUDA graphs."""

import copy
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, assert_near, assert_same
from test_models import GRUDecoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import benchmark
import data
import eval_logp
import losses
import main
import models
import rendering
import util
from fast import cuda_graph, gpu, kernel_check
from results import report
from runs import checkpoints

aten = torch.ops.aten
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
LOSSES = {
    "sleep": lambda *networks, obs, **_: losses.sleep(*networks, 2 * len(obs)),
    "rws": lambda *networks, obs, alphabet, **_: losses.rws(*networks, obs, 4, alphabet),
    "vimco": lambda *networks, obs, alphabet, **_: losses.vimco(*networks, obs, 4, alphabet),
    "wake_theta": lambda *networks, obs, alphabet, **_: losses.wake_theta(*networks, obs, 4, alphabet),
    "mws": lambda *networks, obs, alphabet, memory, obs_id: losses.mws(*networks, memory, obs, obs_id, 4, alphabet),
}


class Setup:
    """A model, network, optimiser, memory and images, and a step of an objective on some of them"""

    def __init__(self, name, device, num_images=8, num_alphabets=0):
        self.loss = LOSSES[name]
        self.model = models.GenerativeModel(num_alphabets=num_alphabets).to(device)
        self.network = models.InferenceNetwork(num_alphabets=num_alphabets).to(device)
        self.optimizer = main.get_optimizer(self.model, self.network, 0.5)
        self.memory = losses.init_memory(num_images).to(device)
        self.alphabet = self.model.sample_alphabet(num_images) if num_alphabets else None
        self.obs = self.model.sample(num_images, self.alphabet)[1]

    def get_loss(self, obs_id):
        alphabet = None if self.alphabet is None else self.alphabet[obs_id]
        given = dict(obs=self.obs[obs_id], alphabet=alphabet, memory=self.memory, obs_id=obs_id)
        return self.loss(self.model, self.network, **given)

    def step(self, obs_id):
        loss, statistics = self.get_loss(obs_id)
        main.update(self.optimizer, loss)
        return {"loss": loss.detach(), **statistics}

    def get_state(self):
        return [*self.model.state_dict().values(), *self.network.state_dict().values(), self.memory]


# ------------------------------------------------------------------ without a GPU


META = torch.device("meta")
FLAGS = ["--batch-size", "4", "--num-particles", "5", "--memory-size", "5", "--likelihood"]


class Reader(TorchDispatchMode):
    """Lets what is on the meta device be copied to the CPU, as zeros, or True: what checkpoints do, and steps must not"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.full(args[0].shape, dtype == torch.bool, dtype=dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["kernels"])
def on_meta(request):
    """The meta device, by operators that stand for the kernels, or by plain PyTorch"""
    rendering.set_compile(request.param == "kernels", META)
    assert gpu.kernels.are_used("drawing", torch.empty(1, device=META)) == (request.param == "kernels")
    yield META
    rendering.set_compile(False)


def get_dataset(num_alphabets, num=10):
    pixels = torch.rand(num, 28, 28, generator=torch.Generator().manual_seed(0))
    split = data.Split((pixels < 0.1).float(), None, None)
    if num_alphabets:
        split = split._replace(alphabet=torch.eye(num_alphabets)[torch.arange(num) % num_alphabets])
    return data.Dataset(split, split, split, num_alphabets)


def get_run(algorithm, num_alphabets=0, flags=(*FLAGS, "learned-affine")):
    flags = ["--algorithm", algorithm, *flags, *["--condition-on-alphabet"] * (num_alphabets > 0)]
    return main.Run(main.parse_args(flags), get_dataset(num_alphabets), META)


CASES = [("mws", "learned-affine", 0, "kernels")]
CASES += [("mws", "bernoulli", 5, "kernels"), ("rws", "learned-affine", 5, "kernels"), ("rws", "learned-affine", 5, "plain")]
CASES += [("vimco", "learned-affine", 0, "kernels"), ("sleep", "learned-affine", 5, "kernels")]


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("algorithm, likelihood, num_alphabets, on_meta", CASES, indirect=["on_meta"])
def test_a_run_looks_at_no_value(algorithm, likelihood, num_alphabets, on_meta, tmp_path):
    """A run, its steps, a checkpoint of it and a run that is restored from that"""
    flags, path = [*FLAGS, likelihood], tmp_path / "checkpoint.pt"
    run = get_run(algorithm, num_alphabets, flags)
    for i in range(6):  # more than an epoch
        statistics = main.pretrain_step(run) if i < 2 else main.train_step(run, main.get_obs_id(run))
        assert all(value.shape == () and value.is_meta for value in statistics.values())
        run.record("pretrain" if i < 2 else "train", statistics)
        run.pretrain_iteration, run.iteration = run.pretrain_iteration + (i < 2), run.iteration + (i >= 2)
    with Reader():
        util.save_checkpoint(path, run.get_checkpoint())
    checkpoint = util.load_checkpoint(path)
    assert all(not x.is_meta for x in tree_leaves(checkpoint) if torch.is_tensor(x))
    again = get_run(algorithm, num_alphabets, flags)
    again.restore(checkpoints.fill_in(checkpoint))
    assert again.iteration == 4 and all(p.is_meta for p in again.generative_model.parameters())
    main.train_step(again, main.get_obs_id(again))


def test_a_decoder_without_kernels_runs_where_they_are_on(on_meta, monkeypatch):
    """Somebody's GRU, in the prior and the network, through a run's steps and the check of its kernels"""
    monkeypatch.setattr(models, "Decoder", GRUDecoder)
    monkeypatch.setattr(gpu, "log_prob", None)
    monkeypatch.setattr(gpu, "sample", None)
    run = get_run("mws", 5)
    for _ in range(2):
        main.pretrain_step(run)
        statistics = main.train_step(run, main.get_obs_id(run))
        assert all(value.shape == () and value.is_meta for value in statistics.values())
    checks = kernel_check.get_checks(run.generative_model, run.inference_network, 3, 4, META)
    assert checks["decoder"] == [] and checks.keys() == {"decoder", "drawing", "scoring", "convolution"}


@pytest.mark.parametrize("algorithm, num_alphabets, on_meta", [
    ("sleep", 5, "kernels"), ("rws", 0, "kernels"), ("vimco", 5, "kernels"), ("vimco", 5, "plain"),
], indirect=["on_meta"])  # fmt: skip
def test_the_training_of_an_evaluation_looks_at_no_value(algorithm, num_alphabets, on_meta):
    run, dataset = get_run("mws", num_alphabets), get_dataset(num_alphabets)
    with Reader():
        checkpoint = run.get_checkpoint()
    flags = ["--checkpoint-path", "given", "--algorithm", algorithm, "--num-particles", "4", "--batch-size", "3"]
    args = eval_logp.parse_args(flags)
    evaluation = eval_logp.Evaluation(args, checkpoint, dataset.test, META)
    for _ in range(3):
        statistics = eval_logp.train_step(evaluation, eval_logp.get_obs_id(evaluation))
        assert all(value.is_meta for value in statistics.values())
        evaluation.iteration += 1
    assert evaluation.table.num_scored == 0
    with Reader():
        state = evaluation.get_checkpoint({})
    evaluation.restore(state)


# What one call launches on a GPU; of other operations that are no views, one is counted.
NUM_LAUNCHES = {
    "convolution": 3, "convolution_backward": 6, "logsumexp": 8, "_log_softmax": 1, "topk": 3, "index_put_": 2,
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts launches"""

    def __init__(self):
        super().__init__()
        self.num_launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.arguments)
        if not (is_view or "empty" in name or name in ("_unsafe_view", "detach") or "profiler" in str(function)):
            self.num_launches += NUM_LAUNCHES.get(name, 1)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm, limit", [("mws", 200), ("rws", 196), ("vimco", 210)])
def test_number_of_launches(algorithm, limit, monkeypatch):
    """Of a step at the paper's setting, but for those of Adam, which are four"""
    rendering.set_compile(True, META)
    kernels = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *_, **__: kernels.append(kernel))
    try:
        run = get_run(algorithm, flags=["--batch-size", "10"])
        run.optimizer.step = run.pretrain_optimizer.step = lambda: None
        obs_id = main.get_obs_id(run)
        with Counter() as step:
            main.train_step(run, obs_id)
        num_kernels = len(kernels)
        with Counter() as pretraining:
            main.pretrain_step(run)
    finally:
        rendering.set_compile(False)
    assert step.num_launches + num_kernels <= limit and pretraining.num_launches + len(kernels) - num_kernels <= 110


def test_kernels_are_compiled_side_by_side(tmp_path):
    """Without launching any, and past a check that fails"""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("compiling for a GPU that is not there needs Triton 3.3")
    strict = ["-W", "error::UserWarning"]  # of defaults that are about to change
    command = [sys.executable, *strict, str(ROOT / "tests/compile_side_by_side.py")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    names = ["_draw", "_differentiate_draw", "_get_candidates", "_keep_best"]
    assert json.loads(process.stdout) == {"kernels": dict.fromkeys(names, 1), "together": True, "restored": True}


@pytest.mark.parametrize("name", ["rws", "vimco", "wake_theta"])
def test_gradients_are_those_of_the_latents_that_carry_weight(name, monkeypatch):
    setup, gradients = Setup(name, "cpu"), []
    parameters = [*setup.model.parameters(), *setup.network.parameters()]
    with torch.no_grad():
        setup.network.decoder.linear.weight *= 30  # so that latents repeat
    for selects in (True, False):
        monkeypatch.setattr(gpu, "is_gpu", lambda device, selects=selects: not selects)
        torch.manual_seed(1)
        loss, _ = setup.get_loss(torch.arange(8))
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    assert_near(*gradients, 1e-5)


def test_the_benchmark_counts_kernels_and_launches():
    def event(name, device, start, end):
        on = getattr(torch.autograd.DeviceType, device)
        time_range = types.SimpleNamespace(elapsed_us=lambda: end - start)
        return types.SimpleNamespace(name=name, device_type=on, time_range=time_range)

    events = [event("cudaGraphLaunch", "CPU", 0, 5), event("aten::add", "CPU", 0, 9), event("cuLaunchKernel", "CPU", 5, 6)]
    events += [event("_draw", "CUDA", 10, 30), event("_draw", "CUDA", 40, 50), event("Memset (Device)", "CUDA", 60, 61)]
    kernels, num_launches = benchmark.count_kernels(events)
    assert num_launches == 2 and kernels == pytest.approx([2e-5, 1e-5])


# ------------------------------------------------------------------ on a GPU


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request):
    rendering.set_compile(request.param, torch.device("cuda"))
    yield
    rendering.set_compile(False)


@needs_gpu
@pytest.mark.parametrize("likelihood", models.LIKELIHOODS)
def test_scores_and_gradients_are_those_of_the_cpu(compiled, likelihood):
    model = models.GenerativeModel(likelihood=likelihood)
    with torch.no_grad():  # strokes that differ: equal ones tie where they meet, and rounding decides
        model.pre_sharpness += torch.randn(64)
        model.pre_width += 0.3 * torch.randn(64)
    latent, obs = model.sample(8)
    latent = latent.unsqueeze(0).repeat(3, 1, 1, 1)
    results = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        log_joint = sum(there.log_prob(latent.to(device), obs.to(device)))
        log_joint.mean().backward()
        results.append([log_joint.detach(), *(parameter.grad for parameter in there.parameters())])
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], atol=1e-2, rtol=0)
    assert_near([x.cpu() for x in results[1][1:]], results[0][1:], 1e-3)


@needs_gpu
def test_inference_networks_are_those_of_the_cpu():
    networks = [models.InferenceNetwork(), models.LookupInferenceNetwork(8)]
    obs, obs_id, results = models.GenerativeModel().sample(8)[1], torch.arange(8), []
    latent = networks[0].sample(obs, 3)
    for device in ("cpu", "cuda"):
        for network, given in zip(copy.deepcopy(networks), (obs, obs_id), strict=True):
            log_q = network.to(device).log_prob(latent.to(device), given.to(device))
            log_q.mean().backward()
            gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            results.append([log_q.detach(), *gradients])
    for want, got in zip(results[:2], results[2:], strict=True):  # convolutions are TF32's
        torch.testing.assert_close(got[0].cpu(), want[0], atol=1e-2, rtol=0)
        assert_near([x.cpu() for x in got[1:]], want[1:], 3e-2)


@needs_gpu
def test_the_memory_is_that_of_the_cpu(compiled):
    setup = Setup("mws", torch.device("cuda"))
    before, obs_id = setup.memory.clone(), torch.arange(8, device="cuda")
    proposal = setup.network.sample(setup.obs, 4)
    losses.update_memory(setup.model, setup.memory, setup.obs, obs_id, proposal)
    on_cpu = before.cpu()
    losses.update_memory(setup.model.cpu(), on_cpu, setup.obs.cpu(), obs_id.cpu(), proposal.cpu())
    for a, b in zip(setup.memory.cpu(), on_cpu, strict=True):
        assert {tuple(z.tolist()) for z in a} == {tuple(z.tolist()) for z in b}


@needs_gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_recorded_and_replayed_without_waiting(compiled, name, capsys):
    """Bits may differ: not every kernel of the convolutions' adds in a fixed order."""
    results = []
    for wrap in (lambda step: step, cuda_graph.ReplayedStep):
        torch.manual_seed(0)
        setup = Setup(name, torch.device("cuda"), num_images=7)
        step, statistics = wrap(setup.step), []
        batches = [torch.arange(4, device="cuda"), torch.arange(4, 7, device="cuda")]
        for i in range(12):
            torch.cuda.set_sync_debug_mode("error" if i > 1 and step == setup.step or i > 7 else "default")
            statistics.append(step(batches[i % 2]))
        torch.cuda.set_sync_debug_mode("default")
        results.append([x["loss"].item() for x in statistics])
    assert "warning" not in capsys.readouterr().err
    assert results[1] == pytest.approx(results[0], rel=1e-3)


@needs_gpu
def test_as_many_characters_are_drawn_as_asked_for(compiled):
    """cuDNN samples from at most 65 535 images at once"""
    latent, obs = models.GenerativeModel(num_arcs=2).to("cuda").sample(70_000)
    assert len(latent) == 70_000 and 0.01 < obs[-1000:].mean() < 0.2


@needs_gpu
def test_a_step_that_reads_a_value_goes_on_without_a_graph(capsys):
    def step(x):
        drawn = torch.rand((), device="cuda")
        return {"sum": x.sum() + drawn, "read": torch.full((), drawn.item(), device="cuda")}

    x, results = torch.ones(3, device="cuda"), []
    for wrap in (lambda step: step, cuda_graph.ReplayedStep):
        torch.manual_seed(0)
        wrapped = wrap(step)
        results.append([tuple(value.item() for value in wrapped(x).values()) for _ in range(8)])
    assert results[0] == results[1]
    assert capsys.readouterr().err.count("warning: no CUDA graph") == 1


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_training(tmp_path, monkeypatch, capfd, flags):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--test-run", "--cuda", *flags]) == 0
    captured = capfd.readouterr()
    assert "trained 40 iterations" in captured.out and "warning" not in captured.err


@needs_gpu
@pytest.mark.parametrize("algorithm", ["mws", "rws", "vimco"])
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_a_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, algorithm, flags):
    monkeypatch.chdir(tmp_path)
    command = ["--test-run", "--cuda", "--algorithm", algorithm, *flags]
    assert main.main(command) == 0
    latest = next(tmp_path.glob("save/*/checkpoints/latest.pt"))
    expected = util.load_checkpoint(latest)
    latest.write_bytes(latest.with_name("10.pt").read_bytes())
    assert main.main(command) == 0
    assert_same(util.load_checkpoint(latest), expected)


@needs_gpu
@pytest.mark.parametrize("algorithm", ["sleep", "rws", "vimco", "mws"])
def test_evaluation(tmp_path, monkeypatch, capfd, algorithm):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--test-run", "--cuda"]) == 0
    latest = next(tmp_path.glob("save/*/checkpoints/latest.pt"))
    flags = "--num-data 4 --num-iterations 12 --num-particles 20 --test-num-particles 50 --compile --cuda --effort 0.1".split()
    assert eval_logp.main(["--checkpoint-path", str(latest), "--algorithm", algorithm, *flags]) == 0
    captured = capfd.readouterr()
    assert "log p(x) = -" in captured.out and "warning" not in captured.err


@needs_gpu
@pytest.mark.parametrize("algorithm", ["sleep", "rws", "mws"])
def test_a_stopped_evaluation_goes_on(tmp_path, monkeypatch, stop_at, algorithm):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--test-run", "--cuda"]) == 0
    latest = next(tmp_path.glob("save/*/checkpoints/latest.pt"))
    flags = "--num-data 4 --num-iterations 12 --num-particles 20 --test-num-particles 50 --cuda --effort 0.1".split()
    command = ["--checkpoint-path", str(latest), "--algorithm", algorithm, *flags]
    stop_at(eval_logp, 5)
    assert eval_logp.main(command) == 128 + signal.SIGTERM
    assert eval_logp.main(command) == 0
    (path,) = tmp_path.glob("save/*/logp/*.pt")
    assert len(report.load_result(path)["statistics"]["train"]["iteration"]) == 12
