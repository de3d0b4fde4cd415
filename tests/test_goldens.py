"""Reference values computed by an independent implementation in float32.

    python tests/test_goldens.py

prints how many agree, and how well.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import numpy as np
import pytest
import torch

import losses
import models
import rendering
import scoring

FOLDER = pathlib.Path(os.environ.get("GOLDENS_PATH", pathlib.Path(__file__).parent / "goldens"))
GENERATIVE = ["bernoulli", "learned_affine", "learned_affine_alphabet", "affine", "big_arcs_uniform_mixture"]
INFERENCE = sorted(path.stem.removeprefix("inference_") for path in FOLDER.glob("inference_*.npz"))


compared = []  # what was compared, its number of values, and the norm of the difference relative to that of the values


def get_error(what, got, want):
    """The norm of the difference, relative to that of the reference values"""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
    compared.append((what, want.numel(), error))
    return error


def load(name):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(FOLDER / f"{name}.npz").items()}


def get_key(name):
    """lstm_weight_ih stands for decoder.lstm.weight_ih, conv0_weight for conv0.weight, prior_linear_bias for prior.linear.bias"""
    return name.removeprefix("decoder.").replace(".", "_")


def load_parameters(module, golden):
    module.load_state_dict({name: golden[f"param_{get_key(name)}"] for name in module.state_dict()})


def assert_gradients(module, golden):
    """Of all parameters but the convolutions', of which the reference values are norms"""
    for name, parameter in module.named_parameters():
        if not name.startswith("conv"):
            key = get_key(name)
            error = get_error(f"gradient of {key}", parameter.grad, golden[f"grad_{key}"])
            assert error < (5e-4 if "theta" in name else 1e-4), (name, error)


def get_generative_model(name, golden):
    model = models.GenerativeModel(
        lstm_hidden_size=golden["param_prior_lstm_weight_hh"].shape[1],
        big_arcs="big_arcs" in name,
        likelihood={"bernoulli": "bernoulli", "affine": "affine"}.get(name, "learned-affine"),
        uniform_mixture=float(golden["uniform_mixture"]),
        num_alphabets=50 if "alphabet" in name else 0,
    )
    load_parameters(model, golden)
    return model


def test_render():
    golden = load("render")
    arcs = golden["arcs"].requires_grad_()
    params = golden["rendering_params"].requires_grad_()
    logits = rendering.get_logits(arcs, golden["on_offs"], params, 28, 28)
    assert (logits - golden["logits"]).abs().max() < 3e-4
    get_error("logits", logits, golden["logits"])
    (logits * golden["cotangent"]).sum().backward()
    for i in range(7):
        expected = golden["grad_arcs"][..., i]
        error = get_error(f"gradient of arcs {i}", arcs.grad[..., i], expected)
        assert error < (5e-4 if i == 4 else 1e-4), i
    assert get_error("gradient of rendering_params", params.grad, golden["grad_rendering_params"]) < 1e-4
    logits = rendering.get_logits(arcs, golden["on_offs"], params, 17, 23)
    assert (logits - golden["logits_17x23"]).abs().max() < 3e-4


@pytest.mark.parametrize("name", GENERATIVE)
def test_generative_model(name):
    golden = load(f"generative_{name}")
    model = get_generative_model(name, golden)
    latent, obs = golden["latent"], golden["obs"]
    torch.testing.assert_close(model.get_primitives(), golden["primitives"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.get_rendering_params(), golden["rendering_params"])
    assert (model.get_logits(latent).flatten(0, 1) - golden["logits"]).abs().max() < 3e-4
    log_prior, log_likelihood = model.log_prob(latent, obs, golden["alphabet"] if "alphabet" in name else None)
    torch.testing.assert_close(log_prior, golden["log_prior"], atol=1e-3, rtol=0)
    torch.testing.assert_close(log_likelihood, golden["log_likelihood"], atol=1e-3, rtol=0)
    get_error("log_prior", log_prior, golden["log_prior"])
    get_error("log_likelihood", log_likelihood, golden["log_likelihood"])
    (log_prior + log_likelihood).mean().backward()
    assert_gradients(model, golden)


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_network(name):
    golden = load(f"inference_{name}")
    num_alphabets = 50 if "alphabet" in name else 0
    if name == "lookup":
        network, given = models.LookupInferenceNetwork(num_data=20), golden["obs_id"]
    else:
        network = models.InferenceNetwork(uniform_mixture=float(golden["uniform_mixture"]), num_alphabets=num_alphabets)
        given = golden["obs"]
    load_parameters(network, golden)
    log_q = network.log_prob(golden["latent"], given, golden["alphabet"] if num_alphabets else None)
    torch.testing.assert_close(log_q, golden["log_q"], atol=1e-3, rtol=0)
    get_error("log_q", log_q, golden["log_q"])
    log_q.mean().backward()
    assert_gradients(network, golden)
    norms = [p.grad.norm().item() for n, p in network.named_parameters() if n.startswith("conv")]
    np.testing.assert_allclose(norms, golden["gradnorm_conv"], rtol=1e-4)


@pytest.mark.parametrize("num_particles", [2, 5, 50])
def test_objectives(num_particles):
    golden = load(f"objectives_{num_particles}")
    log_p, log_q = golden["log_p"].t(), golden["log_q"].t()
    torch.testing.assert_close(scoring.log_mean_weight(log_p - log_q), golden["iwae"], atol=1e-3, rtol=0)
    get_error("log mean weight", scoring.log_mean_weight(log_p - log_q), golden["iwae"])
    for name in ["rws", "vimco"]:
        scores = [log_p.clone().requires_grad_(), log_q.clone().requires_grad_()]
        loss, statistics = getattr(losses, name).__wrapped__(*scores)
        grad_log_p, grad_log_q = torch.autograd.grad(loss, scores)
        for key, value in [("loss", loss), *statistics.items()]:
            if key != "effective_sample_size":
                torch.testing.assert_close(value.double(), golden[f"{name}_{key}"], atol=1e-3, rtol=1e-5)
        for key, value in [("grad_log_p", grad_log_p), ("grad_log_q", grad_log_q)]:
            expected = golden[f"{name}_{key}"]
            assert get_error(f"{name}, {key}", value.t(), expected) < 1e-4, (name, key)


@pytest.mark.parametrize("packed", [True, False])
def test_memory_update(packed):
    golden = load("memory_update")
    model = models.GenerativeModel()
    load_parameters(model, golden)
    memory = golden["memory_before"].clone()
    if packed:
        memory = losses.pack(memory, torch.uint8)
    obs_id, obs = golden["obs_id"], golden["obs"]
    kept, log_joint, statistics = losses.update_memory(model, memory, obs, obs_id, golden["proposal"])
    expected = losses.pack(golden["memory_after"], torch.uint8)
    for after, want in zip(memory if packed else losses.pack(memory, torch.uint8), expected, strict=True):
        assert {tuple(z.tolist()) for z in after} == {tuple(z.tolist()) for z in want}
    best_first = golden["after_log_joint"].sort(1, descending=True).values
    torch.testing.assert_close(log_joint.t(), best_first, atol=1e-3, rtol=0)
    torch.testing.assert_close(sum(model.log_prob(kept, obs)), log_joint, atol=1e-3, rtol=0)
    for name, value in statistics.items():
        assert abs(value - golden[name]) < 1e-6, name


if __name__ == "__main__":
    torch.manual_seed(0)
    test_render()
    for name in GENERATIVE:
        test_generative_model(name)
    for name in INFERENCE:
        test_inference_network(name)
    for num_particles in (2, 5, 50):
        test_objectives(num_particles)
    what, _, error = max(compared, key=lambda item: item[2])
    num = sum(number for _, number, _ in compared)
    print(f"{num} values in {len(compared)} tensors agree; the largest relative difference of a tensor is {error:.1e} ({what})")
