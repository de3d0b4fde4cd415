"""Recording and replaying a step, with a stand-in for a CUDA graph; tests/test_cuda.py does it on a GPU."""

import contextlib
import copy

import pytest
import torch
from test_cuda import Setup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fast import cuda_graph, gpu

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
    device = torch.device("cuda", 0)

    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass


class Generator:
    """Stands in for torch's CUDA generator: once a capture has failed, its state stays registered as being captured"""

    def __init__(self):
        self.state = ["sound"]

    def manual_seed(self, seed):  # called where there is a GPU
        pass

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.state = other.state


@pytest.fixture
def no_gpu(monkeypatch):
    """What cuda_graph.py needs of torch.cuda, without a GPU"""
    monkeypatch.setattr(gpu.kernels, "operators", [])  # which need one
    monkeypatch.setattr(torch.cuda, "default_generators", [Generator()])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


@pytest.mark.parametrize("name", ["mws", "vimco"])
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

    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
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


@pytest.mark.parametrize("stage", ["beginning", "step", "end", "step and end"])
def test_training_goes_on_wherever_a_capture_fails(stage, no_gpu, monkeypatch, capsys):
    """As on a GPU: the capturing stream stays the current one, the generator refuses to work, and the error of ending the
    capture hides the one that caused it"""
    current, generator = [NoStream()], torch.cuda.default_generators[0]
    usual = current[0]

    @contextlib.contextmanager
    def failing(graph, stream):
        if stage == "beginning":
            raise RuntimeError("no memory for a graph")
        current[0] = stream
        generator.state = ["capturing"]
        try:
            yield
            if stage == "step":
                raise RuntimeError("the step failed")
        except RuntimeError:
            if "end" in stage:
                raise RuntimeError("capture_end failed") from None
            current[0] = usual  # torch.cuda.graph restores the stream only if the capture can be ended
            raise
        if stage == "end":
            raise RuntimeError("capture_end failed")

    def step(x):
        if generator.state != ["sound"] and stage == "step and end":
            raise RuntimeError("the step failed")
        return {"random": torch.rand(3).sum() + x}

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    replayed = cuda_graph.ReplayedStep(step)
    replayed.recordings["earlier"] = "a recording with the generator's old state"
    torch.manual_seed(3)
    values, state = [], None
    for i in range(6):
        monkeypatch.setattr(torch.cuda, "graph", failing)
        state = torch.get_rng_state()
        values.append(replayed(torch.tensor(float(i)))["random"])
        if i == cuda_graph.NUM_WARM_UPS:  # on a GPU nothing is drawn while recording
            torch.set_rng_state(state)
            values[-1] = step(torch.tensor(float(i)))["random"]
    torch.manual_seed(3)
    assert values == [step(torch.tensor(float(i)))["random"] for i in range(6)]
    assert current[0] is usual and generator.state == ["sound"] and not replayed.recordings
    (line,) = capsys.readouterr().err.splitlines()
    cause = {"beginning": "no memory for a graph", "end": "capture_end failed"}.get(stage, "the step failed")
    assert line == f"warning: no CUDA graph, steps are slower: {cause}"


def test_a_step_without_statistics(no_gpu):
    replayed = cuda_graph.ReplayedStep(lambda x: {})
    for _ in range(6):
        assert replayed(torch.ones(2)) == {}


def test_an_optimiser_that_counts_steps_on_the_cpu_is_not_recorded(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    for kind, reason in [(torch.optim.SGD, None), (torch.optim.Adagrad, "Adagrad keeps part of its state on the CPU")]:
        optimizer = kind([parameter], lr=0.1)
        optimizer.step()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        cuda_graph.check_recordable(optimizer)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=reason) if reason else contextlib.nullcontext():
            cuda_graph.check_recordable(optimizer)
