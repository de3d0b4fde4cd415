"""What a GPU needs of a step, and what is the same there. Without one, a step runs on the meta
device, where there are no values to look at, and under a stand-in for a CUDA graph."""

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cuda_graph
import losses
import main
import models
import patches
import rendering

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


@pytest.mark.parametrize("num_alphabets", [0, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_looks_at_no_value(name, num_alphabets):
    setup = Setup(name, "meta", num_alphabets=num_alphabets)
    statistics = setup.step(torch.arange(8, device="meta"))
    assert all(value.shape == () for value in statistics.values())


@pytest.mark.parametrize("name", ["rws", "vimco", "wake_theta"])
def test_gradients_are_those_of_the_latents_that_carry_weight(name, monkeypatch):
    setup, gradients = Setup(name, "cpu"), []
    with torch.no_grad():
        setup.network.decoder.linear.weight *= 30  # so that latents repeat
    for selects in (True, False):
        monkeypatch.setattr(losses, "_can_select", lambda latent, selects=selects: selects)
        torch.manual_seed(1)
        loss, _ = setup.get_loss(torch.arange(8))
        setup.optimizer.zero_grad()
        loss.backward()
        parameters = [*setup.model.parameters(), *setup.network.parameters()]
        gradients.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


aten = torch.ops.aten
LOOKING = [aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.equal.default]


class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes each operation with the tensors it was given, and
    repeats it on the same tensors; results go where they went at first. Unlike a CUDA graph,
    it runs what it records: the caller takes that back."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in LOOKING:
            raise RuntimeError(f"{function} looks at a value")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result))))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            again = function(*args, **kwargs)
            for place, x in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(place) and place.untyped_storage().data_ptr() not in given:
                    place.copy_(x)


class NoStream:
    def wait_stream(self, stream):
        pass


@pytest.fixture
def no_gpu(monkeypatch):
    """What cuda_graph.py needs of torch.cuda, without a GPU"""
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


@pytest.mark.parametrize("name", LOSSES)
def test_a_replayed_step_is_the_step(name, no_gpu, monkeypatch):
    def get_setup():
        torch.manual_seed(0)
        setup = Setup(name, "cpu", num_images=7)
        for group in setup.optimizer.param_groups:
            group["fused"] = True  # as on a GPU: it counts its steps in a tensor
        return setup

    @contextlib.contextmanager
    def record(graph, stream):
        state, random_state = copy.deepcopy([setup.get_state(), setup.optimizer.state_dict()]), torch.get_rng_state()
        with graph:
            yield
        for place, value in zip(setup.get_state(), state[0], strict=True):
            place.data.copy_(value)
        for key, values in setup.optimizer.state_dict()["state"].items():
            for place, value in zip(values.values(), state[1]["state"][key].values(), strict=True):
                place.copy_(value)
        torch.set_rng_state(random_state)

    monkeypatch.setattr(losses, "_can_select", lambda latent: False)
    monkeypatch.setattr(patches, "can_share", lambda obs: False)
    monkeypatch.setattr(torch.cuda, "graph", record)
    batches = [torch.arange(4), torch.arange(4, 7)] * 6  # the last batch of an epoch is smaller
    expected = get_setup()
    torch.manual_seed(1)
    expected_statistics = [expected.step(obs_id) for obs_id in batches]
    setup = get_setup()
    step = cuda_graph.ReplayedStep(setup.step)
    torch.manual_seed(1)
    statistics = [step(obs_id.clone()) for obs_id in batches]
    assert len(step.recordings) == 2 and all(step.recordings.values())
    assert statistics == expected_statistics
    for got, want in zip(setup.get_state(), expected.get_state(), strict=True):
        assert torch.equal(got, want)


def test_what_cannot_be_recorded_goes_on_as_it_is(no_gpu, capsys):
    step = cuda_graph.ReplayedStep(lambda x: {"double": torch.tensor(2 * x.item())})
    assert [step(torch.tensor(i))["double"].item() for i in range(6)] == [0, 2, 4, 6, 8, 10]
    assert capsys.readouterr().err.count("warning: no CUDA graph") == 1


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
    latent, obs = model.sample(8)
    latent = latent.unsqueeze(0).repeat(3, 1, 1, 1)
    results = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        log_joint = sum(there.log_prob(latent.to(device), obs.to(device)))
        log_joint.mean().backward()
        results.append([log_joint.detach(), *(parameter.grad for parameter in there.parameters())])
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], atol=1e-2, rtol=0)
    for got, want in zip(results[1][1:], results[0][1:], strict=True):
        assert (got.cpu() - want).norm() <= 1e-3 * want.norm()


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
        for x, y in zip(got[1:], want[1:], strict=True):
            assert (x.cpu() - y).norm() <= 3e-2 * y.norm()


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
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_training(tmp_path, monkeypatch, capfd, flags):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--test-run", "--cuda", *flags]) == 0
    captured = capfd.readouterr()
    assert "trained 40 iterations" in captured.out and "no CUDA graph" not in captured.err
