"""What is the same on a GPU."""

import copy

import pytest
import torch

import losses
import main
import models
import rendering

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request):
    rendering.set_compile(request.param, torch.device("cuda"))
    yield
    rendering.set_compile(False)


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


def test_objectives_run_and_the_memory_agrees(compiled):
    device = torch.device("cuda")
    model, network = models.GenerativeModel().to(device), models.InferenceNetwork().to(device)
    _, obs = model.sample(8)
    memory = losses.init_memory(8).to(device)
    before, obs_id = memory.clone(), torch.arange(8, device=device)
    proposal = network.sample(obs, 4)
    losses.update_memory(model, memory, obs, obs_id, proposal)
    on_cpu = before.cpu()
    losses.update_memory(model.cpu(), on_cpu, obs.cpu(), obs_id.cpu(), proposal.cpu())
    for a, b in zip(memory.cpu(), on_cpu, strict=True):
        assert {tuple(z.tolist()) for z in a} == {tuple(z.tolist()) for z in b}
    model.to(device)
    for loss, _ in [
        losses.sleep(model, network, 16),
        losses.rws(model, network, obs, 4),
        losses.vimco(model, network, obs, 4),
        losses.mws(model, network, memory, obs, obs_id, 4),
    ]:
        loss.backward()
        assert loss.isfinite()


def test_training(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--test-run", "--cuda"]) == 0
    assert "trained 40 iterations" in capfd.readouterr().out
