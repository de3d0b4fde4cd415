"""Evaluation and its report, end to end, against exact enumeration where there are few latents."""

import argparse
import collections
import contextlib
import csv
import functools
import math
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import pathlib
import re
import shlex
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same
from test_enumeration import NUM_IMAGES, get_exact, get_latents, get_tiny
from test_util import cut

import data
import eval_logp
import losses
import main
import models
import scoring
import sweep
import util
from cluster import tasks
from fast import kernel_check
from reading import search
from results import conditioning, report
from runs import checkpoints, convert
from util import UserError

TRAIN = (
    "--data-location data.mat --num-primitives 2 --num-arcs 2 --q-lstm-hidden-size 8 --obs-embedding-dim 8"
    " --batch-size 7 --algorithm rws --num-particles 2 --pretrain-iterations 0 --num-iterations 4 --no-compile"
).split()
EVALUATE = "--num-data 4 --num-particles 8 --test-num-particles 200 --lstm-hidden-size 8 --no-compile".split()


def train(*flags):
    """Runs main.py. Returns: the run's path base"""
    main.main([*TRAIN, *flags])
    return util.get_path_base(main.parse_args([*TRAIN, *flags]))


@pytest.fixture
def model(folder):
    """A trained model with 8 latents; returns its path base"""
    return train()


def evaluate(model, algorithm="rws", *flags, num_iterations=30, status=0):
    """Runs eval_logp.py. Returns: what it saved"""
    flags = [*EVALUATE, "--checkpoint-path", model, "--algorithm", algorithm, *flags]
    assert eval_logp.main([*flags, "--num-iterations", str(num_iterations)]) == status
    return load(model, algorithm)


def load(model, algorithm, mode="test"):
    return torch.load(util.SAVE / model / "logp" / f"{mode}_{algorithm}.pt", weights_only=True)


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("num_samples", [7, 12])
def test_sleep_in_parts_has_the_gradient_of_one_batch(num_samples, monkeypatch):
    model = get_tiny()[0]
    network = models.InferenceNetwork(num_primitives=2, num_arcs=2, lstm_hidden_size=8, obs_embedding_dim=8)
    latent, obs = model.sample(num_samples)
    parts, left = [], [latent.split(4), obs.split(4)]
    monkeypatch.setattr(model, "sample", lambda num, _: (parts.append(num), [x[len(parts) - 1] for x in left])[1])
    loss, statistics = losses.sleep_in_parts(model, network, num_samples, at_once=4)
    assert sum(parts) == num_samples and max(parts) == 4
    whole = -network.log_prob(latent.unsqueeze(0), obs).mean()
    torch.testing.assert_close([loss.detach(), statistics["phi_loss"]], [whole.detach()] * 2)
    for got, want in zip(*(torch.autograd.grad(x, [*network.parameters()]) for x in (loss, whole)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_programs_seen_in_training_join_the_bound(model, on_gpu, monkeypatch):
    """On a GPU, too, whose steps look no scores up: every hundred steps"""
    monkeypatch.setattr(eval_logp, "looks_scores_up", lambda evaluation: not on_gpu)
    monkeypatch.setattr(eval_logp, "PROPOSAL_INTERVAL", 10)
    seen, estimate_step = [], eval_logp.estimate_step
    monkeypatch.setattr(
        eval_logp, "estimate_step", lambda evaluation: (seen.append(evaluation.table.num_scored), estimate_step(evaluation))
    )
    evaluate(model, "rws", "--num-particles", "50", "--test-num-particles", "1", num_iterations=9)
    assert seen[0] == (0 if on_gpu else 32)
    result = evaluate(model, "rws", "--num-particles", "50", "--test-num-particles", "1", "--force", num_iterations=10)
    assert seen[4] == result["num_scored"] == 32  # 8 programs of 4 images
    torch.testing.assert_close(result["enumeration_bound_by_image"], get_exact_log_p(model), atol=1e-3, rtol=0)


# ------------------------------------------------------------------ the table of scores


@pytest.mark.parametrize("collide", [False, True])
def test_scores_are_looked_up(monkeypatch, collide):
    """Even if all latents had the same hash, no score would be another's."""
    if collide:
        monkeypatch.setattr(scoring, "get_hash", lambda codes, obs_id: torch.zeros_like(obs_id))
    model, network, obs = get_tiny()
    table = scoring.ScoreTable(num_arcs=2)
    for _ in range(3):
        ids = torch.randperm(NUM_IMAGES)[:2]
        latent = get_latents()[torch.randint(8, (20, 2))]  # [20, 2, A, 2]
        expected = sum(model.log_prob(latent, obs[ids]))
        torch.testing.assert_close(table.score(ids, model, latent, obs[ids]), expected)
    if collide:
        return
    every = get_latents().unsqueeze(1).expand(-1, NUM_IMAGES, -1, -1)
    table.score(torch.arange(NUM_IMAGES), model, every, obs)
    assert table.num_scored == 8 * NUM_IMAGES
    monkeypatch.setattr(scoring, "score_rows", None)  # nothing is scored again
    again = table.score(torch.arange(NUM_IMAGES), model, every, obs)
    log_p, _ = get_exact(model, network, obs, torch.arange(NUM_IMAGES))
    torch.testing.assert_close(again, log_p)
    rows = table.settle()
    bound = scoring.get_enumeration_bound(rows, NUM_IMAGES)
    torch.testing.assert_close(bound, log_p.detach().double().logsumexp(0))
    best = scoring.get_enumeration_bound(scoring.keep_best(rows, 3), NUM_IMAGES)
    torch.testing.assert_close(best, log_p.detach().double().topk(3, 0).values.logsumexp(0))
    torch.testing.assert_close(table.score(torch.arange(NUM_IMAGES), model, every, obs), log_p)


def test_scores_of_a_prior_in_its_own_precision():
    model, network, obs = get_tiny()
    log_prior, images = model.log_prior, torch.arange(NUM_IMAGES)
    log_p, _ = get_exact(model, network, obs, images)
    model.log_prior = lambda *args: log_prior(*args).double()
    every = get_latents().unsqueeze(1).expand(-1, NUM_IMAGES, -1, -1)
    torch.testing.assert_close(scoring.ScoreTable(num_arcs=2).score(images, model, every, obs), log_p)


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_RECENT", 100)
    monkeypatch.setattr(scoring.keep_best, "__defaults__", (50,))
    model = models.GenerativeModel(likelihood="bernoulli")
    _, obs = model.sample(3)
    table, best = scoring.ScoreTable(num_arcs=10), torch.empty(0, 3)
    for _ in range(10):
        latent = model.sample(90)[0].view(30, 3, 10, 2)
        best = torch.cat([best, table.score(torch.arange(3), model, latent, obs)])
        assert len(table.settled.key) <= 150 and len(table.recent.key) <= 100
    rows = table.settle()
    for image in range(3):
        kept = rows.log_joint[rows.obs_id == image].sort(descending=True).values
        torch.testing.assert_close(kept, best[:, image].sort(descending=True).values[:50])


# ------------------------------------------------------------------ estimates


def get_exact_log_p(model, *flags):
    """log p(x) of the images that are evaluated: [N], by listing all latents"""
    checkpoint = checkpoints.load(checkpoints.find(model))
    args = eval_logp.parse_args([*EVALUATE, "--checkpoint-path", model, *flags])
    images, num_alphabets = eval_logp.load_images(args, checkpoint)[0], checkpoint["num_alphabets"]
    generative_model, _ = models.from_checkpoint(checkpoint)
    latent = get_latents().unsqueeze(1).expand(-1, len(images.obs), -1, -1)
    with torch.no_grad():
        log_joint = sum(generative_model.log_prob(latent, images.obs, images.alphabet if num_alphabets else None))
    return log_joint.double().logsumexp(0)


@pytest.mark.parametrize("algorithm, conditional", [("sleep", True), ("rws", False), ("vimco", False)])
def test_estimates_of_an_enumerable_model(folder, algorithm, conditional):
    model = train(*["--condition-on-alphabet"] * conditional)
    result = evaluate(model, algorithm, "--test-num-particles", "5000", "--batch-size", "4", num_iterations=100)
    exact = get_exact_log_p(model)
    assert result["log_p"] == pytest.approx(exact.mean().item(), abs=0.05)
    assert result["log_p"] == pytest.approx(result["log_p_by_image"].mean().item())
    assert result["standard_error"] == pytest.approx(exact.std().item() / 2, rel=0.05)
    torch.testing.assert_close(result["enumeration_bound_by_image"], exact, atol=1e-3, rtol=0)
    assert (result["log_p_by_image"] < exact + 0.05).all()
    assert len(result["statistics"]["train"]["phi_loss"]) == 100
    assert algorithm == "sleep" or result["num_scored"] == 32  # 8 latents of 4 images


@pytest.mark.parametrize("memory_size", [2, 8])
def test_own_network_and_memory(folder, memory_size):
    """The guaranteed bound is below log p(x), and equal to it once the memory holds all eight programs"""
    model = train("--algorithm", "mws", "--memory-size", str(memory_size), "--num-iterations", "8")
    given = "--mode train --images spread --num-data 9 --test-num-particles".split()
    for num_particles in (1, 3000):
        main_flags = ["--checkpoint-path", model, "--algorithm", "own", "--force", "--no-compile", *given, str(num_particles)]
        assert eval_logp.main(main_flags) == 0
        result, exact = load(model, "own", "train"), get_exact_log_p(model, *given, "1")
        bound = result["enumeration_bound_by_image"]
        assert len(bound) == 9 and (bound < exact + 1e-4).all() and result["settings"]["num_iterations"] == 0
        if memory_size == 8:
            torch.testing.assert_close(bound, exact, atol=1e-4, rtol=0)
    assert result["log_p"] == pytest.approx(exact.mean().item(), abs=0.1)
    obs = data.load("data.mat").train.obs
    images = eval_logp.load_images(eval_logp.parse_args(main_flags), checkpoints.load(checkpoints.find(model)))[0]
    assert (images.obs == obs[torch.linspace(0, len(obs) - 1, 9).round().long()]).all()


def test_every_checkpoint(folder, capsys, monkeypatch):
    """Each milestone once; resumed; a damaged one is left out; training and test images stay apart"""
    model = train(*"--algorithm mws --memory-size 2 --num-iterations 6 --dataset-size 20".split())
    every = f"--algorithm own --every-checkpoint --no-compile --test-num-particles 20 --checkpoint-path {model}".split()
    path = checkpoints.get_path(model, 3)
    path.write_bytes(path.read_bytes()[:-100])
    other = checkpoints.load(checkpoints.get_path(model, 2))
    util.save_checkpoint(checkpoints.get_path(model, 4), {**other, "args": {**other["args"], "seed": 1}, "iteration": 4})
    calls, run = [], eval_logp.run
    monkeypatch.setattr(eval_logp, "run", lambda *args: calls.append(1) or run(*args))
    assert eval_logp.main([*every, "--mode", "train"]) == 0
    stderr = capsys.readouterr().err
    assert re.search(r"warning: .*/3.pt is damaged.*; left out", stderr) and len(calls) == 3
    assert "/4.pt is left out: it is of another run: seed is 1 there and 0 here\n" in stderr
    assert eval_logp.main([*every, "--mode", "train"]) == 0 and len(calls) == 3
    assert eval_logp.main(every) == 0 and len(calls) == 6
    rows = {mode: list(csv.DictReader(open(f"save/{model}/logp/{mode}_every_checkpoint.csv"))) for mode in ("train", "test")}
    assert [row["iteration"] for row in rows["train"]] == ["1", "2", "6"]  # 6 is the latest, too
    assert {row["images"] for row in rows["train"]} == {"training"} and {row["images"] for row in rows["test"]} == {"test"}
    assert all(float(row["enumeration bound"]) <= float(row["log p"]) + 1 for row in rows["train"])
    capsys.readouterr()
    lines = report.compare_milestones([model, "no_run"])
    assert lines[0].startswith("all 6 images of the test part of the model's data (fingerprint ")
    assert "at iteration 6" in lines[1] and pathlib.Path("save/logp_by_iteration.pdf").exists()
    assert "no_run is left out: none of its checkpoints is evaluated" in capsys.readouterr().err
    images = {(row["images"], row["fingerprint"]) for row in csv.DictReader(open("save/logp_by_iteration.csv"))}
    assert len(images) == 1  # never both in one figure

    pathlib.Path("shared").mkdir()
    alone = shutil.copy(checkpoints.get_path(model, 6), "shared/model.pt")  # without milestones beside it
    assert eval_logp.main([*every, "--mode", "train", "--checkpoint-path", alone]) == 0
    assert "at iteration 6" in capsys.readouterr().out
    checkpoint = checkpoints.load(alone)
    untrained = dict(
        args={**checkpoint["args"], "seed": 1}, settings={**checkpoint["settings"], "seed": 1}, iteration=0, statistics={}
    )
    for name in ["optimizer", "pretrain_optimizer"]:
        untrained[name] = {}
    seeds = [model, f"{model}_seed=1"]
    util.save_checkpoint(checkpoints.get_path(seeds[1]), {**checkpoint, **untrained})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no usable GPU"):
            eval_logp.main([*every, "--cuda"])
    with pytest.raises(UserError, match="past its pretraining"):
        eval_logp.main([*every, "--mode", "train", "--checkpoint-path", seeds[1]])
    assert len(report.compare_milestones(seeds)) == 3 and f"{seeds[1]} is left out" in capsys.readouterr().err
    shutil.copytree(util.SAVE / model, util.SAVE / f"{model}_seed=2")
    assert ", 1 seed, " in report.compare_milestones([model, f"{model}_seed=2"])[1]
    assert f"{model}_seed=2 is left out: it is a copy of {model}, not another seed" in capsys.readouterr().err
    runs = {name: report.read_milestones(name) for name in (model, f"{model}_seed=2")}
    for result in [result for found in runs[f"{model}_seed=2"].values() for result in found.values()]:
        result["model_settings"]["algorithm"] = "vimco"  # whose first step is that of rws
    assert len(report.draw_milestones(runs, util.SAVE / "x.pdf")) == 4 and not capsys.readouterr().err
    behind = report.get_milestones_folder(seeds[1], "train")
    behind.mkdir(parents=True)
    result = report.load_result(report.get_milestones_folder(model, "train") / "6.pt")
    other = {**result["settings"], "model": "other"}
    util.save_checkpoint(behind / "5.pt", {**result, "settings": other, "model_iteration": 5})  # of the other seed
    assert len(report.compare_milestones(seeds)) == 3
    assert (
        f"{behind}/5.pt is left out: it is of a different model from this run's current one (seed is 0"
        in capsys.readouterr().err
    )
    checkpoints.get_path(seeds[1]).unlink()  # as if it had come alone: a seed that has not got as far
    with pytest.raises(UserError, match="in common"):
        report.compare_milestones(seeds)


@pytest.fixture
def small_model(folder):
    """A conditional model that knows ten images of each alphabet; returns its path base"""
    return train("--small-dataset", "--condition-on-alphabet", "--likelihood", "bernoulli")


OWN = "--algorithm own --num-data 4 --test-num-particles 20 --no-compile --checkpoint-path".split()


def test_the_images_are_the_first_of_the_test_part(small_model):
    """With their alphabets, by default and whatever the model was trained on; with --mode train its own training images"""
    whole, small = data.load("data.mat"), data.load("data.mat", small_dataset=True)
    for flags, split, kind in [([], whole.test, "test"), (["--mode", "train"], small.train, "training")]:
        evaluate(small_model, "mws", *MWS, *flags)
        result = load(small_model, "mws", "train" if flags else "test")
        assert result["settings"]["images"] == f"{data.get_fingerprint(split.select(slice(4)))} (4)"
        assert result["settings"]["kind_of_images"] == kind
        exact = get_exact_log_p(small_model, *flags)
        torch.testing.assert_close(result["enumeration_bound_by_image"], exact, atol=1e-3, rtol=0)


def test_a_conditional_model_knows_its_alphabets_by_name(folder):
    """Equally many others are refused, unless they have no names or are the same data, renamed"""
    obs = torch.bernoulli(torch.full((40, 28, 28), 0.1)).numpy()
    for name, images, labels in [("one", obs, "ab"), ("renamed", obs, "bc"), ("other", obs[::-1], "bc")]:
        np.savez(f"{name}.npz", images=images, labels=np.array(list(labels) * 20))
    checkpoint = checkpoints.load(checkpoints.find(train("--condition-on-alphabet", "--data-location", "one.npz")))
    assert data.load_for_model(checkpoint).alphabet_names == ("a", "b")
    assert data.load_for_model(checkpoint, "renamed.npz").alphabet_names == ("b", "c")
    with pytest.raises(UserError, match="the model's alphabets differ from those of other.npz"):
        data.load_for_model(checkpoint, "other.npz")
    data.load_for_model({**checkpoint, "alphabet_names": ["alphabet 1", "alphabet 2"]}, "other.npz")
    del checkpoint["alphabet_names"]
    data.load_for_model(checkpoint, "other.npz")


def test_the_model_of_an_evaluation_is_the_runs(folder, capsys):
    """Not one that training has replaced, as by starting over, nor the network of an earlier iteration of pretraining"""
    flags = [*TRAIN, "--name", "own"]
    main.main([*flags, "--num-iterations", "9"])
    evaluate("own", "own")
    path = util.SAVE / "own"
    assert len(report.read_runs(path)) == 1 and not capsys.readouterr().err.count("left out")
    shutil.rmtree(path / "checkpoints")
    assert len(report.read_runs(path)) == 1  # results alone are trusted
    main.main(flags)
    assert not report.read_runs(path)
    left_out = f"{path}/logp/test_own.pt is left out: it is of a different model from this run's current one"
    assert f"{left_out} (iteration 9 of 4)" in capsys.readouterr().err
    checkpoint = checkpoints.load(checkpoints.find("own"))
    early = {**checkpoint, "iteration": 0}
    later = {**early, "inference_network": {name: x + 1 for name, x in early["inference_network"].items()}}
    assert checkpoints.get_digest(early) != checkpoints.get_digest(later)
    assert checkpoints.get_digest(checkpoint) == checkpoints.get_digest({**later, "iteration": 4})


def test_an_evaluation_is_repeatable_and_kept(model, capsys, monkeypatch):
    first = evaluate(model, "vimco")
    evaluate(model, "vimco")
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="num-iterations is 30 there and 31 here; --force"):
        evaluate(model, "vimco", num_iterations=31)
    again = evaluate(model, "vimco", "--force")
    assert_same({**again, "args": None}, {**first, "args": None})
    cut(util.SAVE / model / "logp" / "test_vimco.pt")
    util.write(util.SAVE / model / "logp/checkpoints/test_vimco.pt", b"PK broken")
    assert evaluate(model, "vimco")["log_p"] == first["log_p"]
    assert capsys.readouterr().err.count("it is evaluated again, and the file is now test_vimco.pt.old") == 2
    cut(util.SAVE / model / "logp" / "test_vimco.pt")
    evaluate(model, "vimco")
    assert "the file is now test_vimco.pt.old2" in capsys.readouterr().err
    for error in (OSError(5, "Input/output error"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with monkeypatch.context() as patch, pytest.raises((UserError, type(error))):
            patch.setattr(pathlib.Path, "read_bytes", mock.Mock(side_effect=error))
            checkpoints.load_saved(util.SAVE / model / "logp" / "test_vimco.pt", report.load_result, {})
        with monkeypatch.context() as patch, pytest.raises((UserError, type(error)), match="cannot be read|memory|^$"):
            patch.setattr(pathlib.Path, "read_bytes", mock.Mock(side_effect=error))
            checkpoints.load_newest(checkpoints.get_path(model))  # without falling back to an older one
    assert (util.SAVE / model / "logp" / "test_vimco.pt").exists()  # it may be intact
    other = evaluate(model, "vimco", "--force", "--seed", "1")
    assert other["log_p"] != first["log_p"]
    main.main([*TRAIN[:-3], "--num-iterations", "6", "--no-compile"])  # the same run, continued
    with pytest.raises(UserError, match="at iteration 4 there and .* at iteration 6 here"):
        evaluate(model, "vimco")
    assert evaluate(model, "vimco", "--force")["model_iteration"] == 6


def test_an_evaluation_in_progress_is_not_replaced_by_another(model, stop_at):
    """Unless --force is given; one with the same settings resumes"""
    flags = [*EVALUATE, "--checkpoint-path", model, "--algorithm", "rws", "--num-iterations", "30"]
    stop_at(eval_logp, 10)
    assert eval_logp.main(flags) == 128 + signal.SIGTERM
    state = util.SAVE / model / "logp/checkpoints/test_rws.pt"
    before = state.read_bytes()
    for change in (["--lstm-hidden-size", "9"], ["--num-data", "3"], ["--test-num-particles", "100"]):
        with pytest.raises(UserError, match="holds a different evaluation: .* is .* there and .* here; --force"):
            eval_logp.main([*flags, *change])
        assert state.read_bytes() == before
    assert eval_logp.main(flags) == 0
    resumed = load(model, "rws")
    evaluate(model, "rws", "--force")
    assert_same(resumed["log_p_by_image"], load(model, "rws")["log_p_by_image"])


def test_leads_are_paired_over_images():
    """The best model's, with the interval of Student's t: 2 ± 4.303 * 1 / sqrt(3) for differences of 1, 2 and 3; only among
    memoised evaluations with equal settings, of models with as many latents, trained equally long on the same images"""
    runs, bounds = [], {"mws_5": [-3, -1, -5], "mws_5_seed=1": [-1, 1, -3], "mws_5_seed=2": [9, 9, 9], "rws_5": [-3, -2, -7]}
    others = ["vimco_5", "mws_10", "tvo_5", "sleep_5"]
    for name, bound in {**bounds, **dict.fromkeys(others, [0, 0, 0])}.items():
        runs.append(get_fake_run(name, "cc", -140.0))
        runs[-1].results["mws"]["enumeration_bound_by_image"] = torch.tensor(bound, dtype=torch.double)
    for run, effort in zip(runs, [1, 1, 2, 1, 3, 1, 1, 1], strict=True):
        run.results["mws"]["settings"]["effort"] = effort
    runs[-3].results["mws"]["model_settings"]["num_particles"] = 7
    runs[-2].results["mws"]["model_iteration"] = 8
    runs[-1].results["mws"]["model_settings"]["data"] = "others"
    (models,) = report.group(runs).values()
    line = "mws_5 is 2.0 nats per image ahead of rws_5; 95 % interval over images -0.5 to 4.5; seeds: 2 and 1"
    assert report.describe_leads(models) == [f"{line} at iteration 7"]
    del models["tvo_5"]
    assert report.describe_leads(models) == [line]


def test_a_row_averages_what_all_of_its_seeds_have(capsys, monkeypatch):
    """An evaluation more of one seed, or one of another effort, leaves the others in the row"""
    first, second, third = (
        get_fake_run(name, "cc", value) for name, value in [("a", -3.0), ("a_seed=1", -5.0), ("a_seed=2", -9.0)]
    )
    (own,) = get_fake_run("a", "cc", -1.0, algorithm="own").results.values()
    first.results["own"] = own
    (row,) = get_rows(first, second, third)
    estimates = [pytest.approx(-17 / 3), -1.0, pytest.approx(-17 / 3), pytest.approx(-17 / 3)]
    assert [row[key] for key in ("mws", "own", "best", "enumeration bound")] == estimates and row["seeds"] == 3
    assert row["evaluated by"].endswith("search 1; own: test-num-particles 1") and not capsys.readouterr().err
    second.results["mws"]["settings"]["effort"] = 2
    (row,) = get_rows(first, second, third)
    assert [row[key] for key in ("mws", "best", "enumeration bound", "seeds")] == [-6.0, -6.0, -6.0, 2]
    assert re.fullmatch(
        r"warning: a_seed=1: its evaluation by mws: .* effort 2, .* is left out of the row, .* effort 1, .*\n",
        capsys.readouterr().err,
    )
    drawn = {}
    monkeypatch.setattr(report, "draw_lines", lambda path, lines, *_: drawn.update(lines))
    other = get_fake_run("b", "cc", -2.0)
    other.results["own"] = {**own, "settings": {**own["settings"], "model": "b"}}
    low = get_fake_run("c", "cc", -4.0)
    low.results["mws"]["log_p"] = -9.0
    report.write_figure("logp.pdf", get_rows(first, third, other, low))
    assert list(drawn) == ["a", "c"]  # best of the same evaluations, which both seeds of a have
    values = [x.item() for x in (drawn["a"].y, drawn["a"].high, drawn["c"].y)]
    assert values == [-6.0, pytest.approx(-3.0), -4.0]  # the bound of c, which is above its estimate
    assert re.search("the figure is of the models evaluated by mws: .*, and leaves out b\n", capsys.readouterr().err)
    second.results["own"] = {**own, "settings": {**own["settings"], "model": "a_seed=1"}}
    (row,) = get_rows(first, second)
    assert [row[key] for key in ("own", "best", "enumeration bound", "seeds")] == [-1.0, -1.0, -1.0, 2]  # the search was of one
    del first.results["mws"]
    (row,) = get_rows(first, third)
    assert [row[key] for key in ("own", "mws", "best", "enumeration bound")] == [-1.0, -9.0, None, None]  # nothing in common


def test_only_seeds_of_one_model_share_a_row(capsys):
    """Not runs that their names alone make seeds, nor copies"""
    runs = [get_fake_run(f"a_seed={i}", "cc", -float(i)) for i in range(4)]
    backup = get_fake_run("a_seed=0", "cc", 0.0)._replace(name="a_backup")
    backup.results["mws"]["run"] = "a_seed=0"
    runs[1].results["mws"]["model_settings"]["likelihood"] = "bernoulli"
    runs[2].results["mws"]["settings"]["model"] = "a_seed=0"
    runs[3].results["mws"]["model_settings"].update(seed=3, later_setting=1)
    assert [(row["model"], row["seeds"], row["mws"]) for row in get_rows(backup, *runs)] == [
        ("a", 2, -1.5),
        ("a_seed=1", 1, -1.0),
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {name} is left out: it is a copy of a_seed=0, not another seed" for name in ("a_seed=2", "a_backup")
    ]
    names = [
        "b_data-location=x.npz-1",
        "b_data-location=y.npz-2_seed=1",
        "b_data-location=y.npz-2",
        "b_data-location=z.npz-3_seed=4",
    ]
    runs = [get_fake_run(name, "cc", -float(i)) for i, name in enumerate(names)]  # of the same data, which moved, and others
    for run, letters in zip(runs, ["same", "same", "other", "other"], strict=True):
        run.results["mws"]["model_settings"]["data"] = letters
    assert [(row["model"], row["seeds"], row["mws"]) for row in get_rows(*runs)] == [(names[0], 2, -0.5), (names[2], 2, -2.5)]
    settings = {"c": {"data": "a"}, "c_seed=1": {"data": "b"}, "c_seed=2": {"data": "b"}}  # replaced between seeds
    assert list(report.name_rows(settings).values()) == ["c", "c_data=b", "c_data=b"]


# ------------------------------------------------------------------ memoised evaluation

MWS = "--effort 0.01 --memory-size 8 --num-particles 4".split()


@pytest.mark.parametrize("memory_size, num_threads", [(8, 2), (2, 1)])
def test_memoised_evaluation_of_an_enumerable_model(model, memory_size, num_threads, monkeypatch):
    """The bound is never above log p(x), and the halves' agree exactly with it once each has found every program; side by
    side, in two processes, or one after the other"""
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # more than one would compete with other tests
    size = ["--num-data=4", "--test-num-particles=5000"] if memory_size == 8 else ["--num-data=2", "--test-num-particles=1"]
    flags = [*MWS, "--memory-size", str(memory_size), *size]
    result = evaluate(model, "mws", *flags, num_iterations=60 if memory_size == 8 else 0)
    exact, bound = get_exact_log_p(model, size[0]), result["enumeration_bound_by_image"]
    assert (bound < exact + 1e-4).all() and (result["bound_by_half"] < bound + 1e-4).all()
    if memory_size < 8:
        assert bound.mean() < exact.mean() - 0.01
        return
    torch.testing.assert_close(bound, exact, atol=1e-4, rtol=0)
    assert result["search_error"] == 0 and torch.equal(*result["bound_by_half"])
    assert result["log_p"] == pytest.approx(exact.mean().item(), abs=0.02)
    torch.testing.assert_close(result["log_p_by_half"], exact.expand(2, -1), atol=0.3, rtol=0)
    assert not list((util.SAVE / model / "logp/checkpoints").glob("*.pt"))


def test_a_half_that_dies_at_its_start_does_not_hold_up_the_other():
    """What it was sent is larger than a pipe"""
    spawn, resource_tracker = multiprocessing.spawn, multiprocessing.resource_tracker
    resource_tracker.ensure_running()
    python, before = spawn.get_executable(), time.monotonic()
    spawn.set_executable("/bin/false")
    try:
        process = eval_logp.run_in_background(1, torch.zeros(10**6))
        process.join(10)
        assert process.exitcode == 1 and time.monotonic() - before < 10
    finally:
        spawn.set_executable(python)


def test_evaluations_by_other_searches_share_no_row(model, monkeypatch, capsys):
    """Nor those of other efforts; results of a search without a number are of the first"""
    flags, path = [*MWS, "--num-data", "2", "--test-num-particles", "1"], util.SAVE / model
    evaluate(model, "mws", *flags, num_iterations=0)
    (run,) = report.read_runs(path)
    settings = "num-iterations 0, num-particles 4, batch-size 50, lstm-hidden-size 8, test-num-particles 1, memory-size 8"
    assert run.work == {"mws": f"mws: {settings}, effort 0.01, search {search.VERSION}"}
    monkeypatch.setattr(search, "VERSION", 99)
    with pytest.raises(UserError, match=r"effort is 0\.01 there and 0\.03 here, search is \d there and 99 here; --force"):
        evaluate(model, "mws", *flags, "--effort", "0.03", num_iterations=0)
    first = load(model, "mws")
    del first["settings"]["search"]
    util.save_checkpoint(path / "logp" / "test_mws.pt", first)
    util.save_checkpoint(path / "logp" / "copy.pt", first)
    (run,) = report.read_runs(path)
    assert run.work["mws"].endswith("effort 0.01, search 1")
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"warning: {path}/logp/copy.pt is left out: a result by this name would be test_mws.pt"
    )


def test_the_mixture_of_both_networks_estimates_what_neither_alone_can():
    """Each of two networks proposes but a half of the programs: together they propose all"""
    model, network, obs = get_tiny()
    halves, exact = [], get_exact(model, network, obs, torch.arange(NUM_IMAGES))[0].double().logsumexp(0)
    for first in (0, 1):
        half = object.__new__(eval_logp.Evaluation)
        vars(half).update(generative_model=model, network=get_tiny()[1], obs=obs, alphabet=None, device=torch.device("cpu"))
        half.args = argparse.Namespace(test_num_particles=4000)
        half.table = scoring.ScoreTable(num_arcs=2)
        with torch.no_grad():
            half.network.decoder.linear.bias[first] += 20  # of the first primitive or the second, for both strokes
        halves.append(half)
    only = [get_latents()[:, :, 0].eq(first).all(1) for first in (0, 1)]
    log_joint = get_exact(model, network, obs, torch.arange(NUM_IMAGES))[0].double()
    want = torch.stack([log_joint[some].logsumexp(0) for some in only])
    log_p, by_half = eval_logp.estimate_together(halves, eval_logp.StopSignal())
    torch.testing.assert_close(by_half.double(), want.detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(log_p.double(), want.detach().logsumexp(0), atol=0.05, rtol=0)
    assert (log_p.double() < exact).all()


def test_a_memoised_evaluation_resumes_to_the_same_bits(model, monkeypatch):
    """Stopped within a search and in training, of either half, and while both make their estimates"""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    flags = [*MWS, "--num-data", "2"]
    whole, calls = evaluate(model, "mws", *flags, num_iterations=5), collections.Counter()

    def interrupt(name, function, at, *args):
        calls[name] += 1
        if calls[name] in at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    stops = [(search, "mutate", (3, 7)), (eval_logp, "memoised_step", (2, 8)), (scoring, "log_mean_weight", (2,))]
    for module, name, at in stops:
        monkeypatch.setattr(module, name, functools.partial(interrupt, name, getattr(module, name), at))
    for _ in range(5):
        evaluate(model, "mws", *flags, "--force", num_iterations=5, status=128 + signal.SIGTERM)
    evaluate(model, "mws", *flags, "--force", num_iterations=5)
    assert calls["mutate"] > 8 and calls["memoised_step"] == 10
    assert_same({**load(model, "mws"), "args": None}, {**whole, "args": None})


# ------------------------------------------------------------------ the report


def test_report(model, capsys):
    other = train("--seed", "1")
    values = {algorithm: [evaluate(name, algorithm)["log_p"] for name in (model, other)] for algorithm in ("rws", "vimco")}
    capsys.readouterr()
    assert eval_logp.main(["--report", "--all"]) == 0
    table = capsys.readouterr().out
    (row,) = csv.DictReader(open("save/logp.csv"))
    assert row["model"] == model and row["particles"] == "2" and row["iteration"] == "4" and row["seeds"] == "2"
    for algorithm, (a, b) in values.items():
        assert float(row[algorithm]) == pytest.approx((a + b) / 2)
        assert float(row[f"{algorithm} s.e. over seeds"]) == pytest.approx(abs(a - b) / 2)
        assert f"{(a + b) / 2:.2f} ± {abs(a - b) / 2:.2f}" in table
    best = [max(pair) for pair in zip(*values.values(), strict=True)]
    assert float(row["best"]) == pytest.approx(np.mean(best))
    assert row["sleep"] == "" and re.search(r"^rws_2\S+ .* missing ", table, re.M)
    exact = [get_exact_log_p(name).mean().item() for name in (model, other)]
    assert float(row["enumeration bound"]) == pytest.approx(np.mean(exact), abs=1e-3)
    assert "without a value: mws_3, mws_5" in table
    assert (util.SAVE / "logp.pdf").read_bytes().startswith(b"%PDF")
    path = util.SAVE / other / "logp" / "test_vimco.pt"
    result = torch.load(path, weights_only=True)  # as if of an older model
    result["settings"]["model"], result["model_iteration"] = "older", 2
    util.save_checkpoint(path, result)
    assert eval_logp.main(["--report"]) == 0 and "left out: it is of a different model" in capsys.readouterr().err
    (util.SAVE / other / "checkpoints/2.pt").unlink()
    cut(util.SAVE / model / "logp" / "test_rws.pt")
    wrong = {"log_p": None, "latents": {}, "args": {}, "settings": {}, "log_p_by_image": 3, "model_iteration": "q"}
    for name, value in wrong.items():  # with a right digest
        util.save_checkpoint(util.SAVE / f"wrong_{name}" / "logp/test_rws.pt", {**result, name: value})
    assert eval_logp.main(["--report"]) == 0
    stderr = capsys.readouterr().err
    assert "damaged" in stderr and "test_vimco.pt is left out: its model is older" in stderr
    assert stderr.count("cannot be used here") == len(wrong) and stderr.count("\n") == 2 + len(wrong)
    (row,) = csv.DictReader(open("save/logp.csv"))
    assert float(row["rws"]) == pytest.approx(values["rws"][1])
    assert float(row["vimco"]) == pytest.approx(values["vimco"][0])


def test_networks_estimate_in_evaluation_mode(model, monkeypatch):
    modes, get_log_weight = [], scoring.get_log_weight

    def look(generative_model, network, **options):
        modes.append((generative_model.training, network.training))
        return get_log_weight(generative_model, network, **options)

    monkeypatch.setattr(scoring, "get_log_weight", look)
    evaluate(model, "rws")
    assert modes and set(modes) == {(False, False)}


def test_an_objective_with_state_evaluates(model, monkeypatch):
    rws = losses.rws

    def counted(table, **others):
        loss, statistics = rws(**others)
        table += 1
        return loss, {**statistics, "count": table}

    monkeypatch.setitem(losses.OBJECTIVES, "rws", losses.keeps(lambda: {"table": torch.zeros(())})(counted))
    count = evaluate(model, "rws")["statistics"]["train"]["count"]
    assert count.tolist() == list(range(1, len(count) + 1))


def make_older(result):
    """As an older version saved an evaluation of the training images of a small data set"""
    settings = {name: value for name, value in result["settings"].items() if name not in ("kind_of_images", "num_dreams")}
    return {**result, "settings": {**settings, "mode": "test"}, "is_own_data": True}


def test_older_evaluations_are_kept_and_renamed_when_rewritten(small_model, capsys, monkeypatch):
    """And training and test images are in tables of their own"""
    assert eval_logp.main([*OWN, small_model, "--mode", "train"]) == 0
    logp = util.SAVE / small_model / "logp"
    expected, (task,) = load(small_model, "own", "train"), get_evaluation_tasks(small_model, monkeypatch)
    (logp / "train_own.pt").unlink()
    torch.save(make_older(expected), logp / "test_own.pt")
    assert eval_logp.main([*OWN, small_model]) == 0
    assert "python -m runs.convert rewrites it; it is evaluated again, and" in capsys.readouterr().err
    assert convert.convert(logp / "test_own.pt.old") == f"is rewritten as {logp / 'train_own.pt'}"
    assert_same(load(small_model, "own", "train")["settings"], expected["settings"])
    assert tasks.get_progress(task).done
    tested = load(small_model, "own", "test")
    torch.save(make_older(expected), logp / "test_own.pt")  # when there is one by the right name
    unseen = {**make_older(tested), "settings": {**make_older(tested)["settings"], "mode": "unseen"}}
    torch.save(unseen, logp / "unseen_own.pt")
    (logp / "test_every_checkpoint").mkdir()
    torch.save(make_older(expected), logp / "test_every_checkpoint" / "2.pt")
    for old, new in [("test_own.pt", "train_own.pt.old"), ("unseen_own.pt", "test_own.pt")]:
        assert convert.convert(logp / old) == f"is rewritten as {logp / new}"
    milestone = logp / "train_every_checkpoint" / "2.pt"
    assert convert.convert(logp / "test_every_checkpoint" / "2.pt") == f"is rewritten as {milestone}"
    assert_same(load(small_model, "own", "test")["settings"], tested["settings"])
    for path in [logp / "train_own.pt.old", milestone]:
        assert_same(report.load_result(path)["settings"], expected["settings"])
    capsys.readouterr()
    assert eval_logp.main(["--report"]) == 0
    stdout, stderr = capsys.readouterr()
    tables = stdout.split("\n\n")
    assert len(tables) == 3 and not stderr
    assert tables[0].startswith("the first 4 images of the test part of the model's data, unseen (fingerprint ")
    assert tables[0].endswith("\nnot all are unseen: 4 equal training images")
    assert tables[1].startswith("the first 4 training images, on which")
    for table, mode in zip(tables, ["test", "train"], strict=False):
        assert table.count(small_model) == 1 and f"{load(small_model, 'own', mode)['log_p']:.2f}" in table
    assert "a figure of the first 4 images of the test part" in tables[2]
    rows = list(csv.DictReader(open("save/logp.csv")))
    assert [row["images"] for row in rows] == ["test", "training"]
    assert rows[1]["fingerprint"] == expected["settings"]["images"]
    assert eval_logp.main(["--report", "--mode", "train"]) == 0
    assert [row["images"] for row in csv.DictReader(open("save/logp_train.csv"))] == ["training"]


def test_a_sweeps_evaluation_is_of_the_trained_model_as_it_is_now(model, monkeypatch):
    """Not of its parameters before, even at the same iteration, nor on other images; one that is still to be trained has none"""
    assert eval_logp.main([*OWN, model]) == 0
    (task,) = get_evaluation_tasks(model, monkeypatch)
    assert tasks.get_progress(task).done and tasks.get_progress(task).value
    assert not tasks.get_progress(task._replace(total=5)).done
    path = shutil.copy("data.mat", "copy.mat")
    (other,) = get_evaluation_tasks(model, monkeypatch, "--data-location", path)
    assert re.fullmatch(r"images-from is data\.mat-\w+ there and copy\.mat-\w+ here", tasks.get_progress(other).others)
    (same,) = get_evaluation_tasks(model, monkeypatch, "--data-location", str(pathlib.Path("data.mat").resolve()))
    assert tasks.get_progress(same).done
    assert eval_logp.main([*OWN, model, "--num-data=1000", "--force"]) == 0  # all six that there are
    for num, others in [(1000, ""), (50, ""), (6, ""), (5, "num-data is 1000 there and 5 here")]:
        (some,) = get_evaluation_tasks(model, monkeypatch, f"--num-data={num}")
        assert (tasks.get_progress(some).done, tasks.get_progress(some).others) == (not others, others)
    path = checkpoints.get_path(model)
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["generative_model"].values())).add_(1)
    util.save_checkpoint(path, {name: value for name, value in checkpoint.items() if name not in ("format", "digest")})
    progress = tasks.get_progress(task)
    assert not progress.done and progress.replaces and not progress.others and not progress.damage
    task.get_evaluation_path().write_bytes(b"PK broken")
    progress = tasks.get_progress(task)
    assert not progress.replaces and progress.damage.startswith(f"save/{model}/logp/test_own.pt is damaged")
    searched = task._replace(settings={**task.settings, "algorithm": "mws"})
    old = {"settings": {"model": "of before"}, **dict(args={}, iteration=0, log_p=[], num_searched=1)}
    util.save_checkpoint(searched.get_state_paths()[1], old)  # of the second half alone
    assert tasks.get_progress(searched).replaces
    settings = {**searched.settings, "model": tasks.get_training_progress(task).model}
    for path, num_searched, iteration in zip(searched.get_state_paths(), (4, 1), (10, 0), strict=True):
        state = dict(settings=settings, args=settings, iteration=iteration, log_p=[], num_searched=num_searched)
        util.save_checkpoint(path, state)
    progress = tasks.get_progress(searched)  # of both halves: one that gets on in the second is not stuck
    assert not progress.replaces and (progress.steps, progress.iteration) == (15, 5)


def get_evaluation_tasks(model, monkeypatch, *options):
    args = sweep.parse_args(["--eval-logp", "--eval-algorithms", "own", "--eval-options", shlex.join([*OWN[2:-1], *options])])
    run_args = argparse.Namespace(**checkpoints.load(checkpoints.find(model))["args"])
    monkeypatch.setattr(sweep, "get_runs", lambda _: {model: run_args})
    return sweep.get_tasks(args)


def get_fake_run(name, fingerprint, log_p, kind="test", search_error=None, algorithm="mws"):
    latents = dict(obs_id=torch.arange(50), codes=torch.ones(50, 1).short(), log_joint=torch.full((50,), log_p).double())
    images = report.Images(kind, f"{fingerprint} (50)")
    settings = dict.fromkeys(report.WORK_BY_ALGORITHM["mws"], 1) | dict(algorithm=algorithm, model=name)
    result = dict(
        settings={**settings, "kind_of_images": kind, "images": images.fingerprint, "mode": "test"},
        args=dict(num_data=50, images="first", data_location=None),
        model_settings=dict(algorithm="mws", num_particles=2, memory_size=3, likelihood="affine"),
        model_iteration=7,
        log_p=log_p,
        standard_error=1.0,
        log_p_by_image=torch.zeros(50),
        enumeration_bound=log_p,
        enumeration_bound_by_image=latents["log_joint"],
        latents=latents,
    )
    if search_error:
        result |= dict(search_error=search_error[0], bound_by_half=torch.full((2, 50), log_p - search_error[1]))
    return report.Run(name, images, {algorithm: result})


def get_rows(*runs):
    return [report.get_row(*model) for models in report.group(runs).values() for model in models.items()]


def test_a_seed_counts_once(capsys):
    """Though trained twice, with the same data from two places, and on machines that round differently"""
    runs = [get_fake_run(f"mws_5{place}", "aa", log_p) for place, log_p in [("", -100.0), ("_data-location=b", -101.0)]]
    for run in runs:
        run.first["model_settings"]["seed"] = 0
    (row,) = get_rows(*runs)
    assert (row["seeds"], row["mws"]) == (1, -100.0)
    assert "mws_5_data-location=b is left out: it has the same seed as mws_5" in capsys.readouterr().err


def test_different_images_share_no_row_and_no_table(monkeypatch, capsys, folder):
    """Not even of two seeds; test images and then those of most models come first, and only they are drawn"""
    runs = [get_fake_run("mws_5", "aa", -100.0, "training"), get_fake_run("mws_5_seed=1", "bb", -130.0)]
    runs += [get_fake_run("mws_5_seed=2", "cc", -140.0, search_error=(0.25, 1.0)), get_fake_run("rws_5", "cc", -150.0)]
    runs += [get_fake_run("mws_5_seed=3", "cc", -142.0, search_error=(0.75, 2.0))]
    rows = get_rows(*runs)
    assert [(row["model"], row["fingerprint"][:2], row["mws"], row["seeds"]) for row in rows] == [
        ("mws_5", "cc", -141.0, 2), ("rws_5", "cc", -150.0, 1), ("mws_5", "bb", -130.0, 1), ("mws_5", "aa", -100.0, 1),
    ]  # fmt: skip
    assert [(row["search error"], row["gain of two"]) for row in rows] == [(0.5, 1.5)] + [(None, None)] * 3
    drawn = []
    monkeypatch.setattr(report, "read_runs", lambda path: runs)
    monkeypatch.setattr(report, "write_figure", lambda path, rows: drawn.extend(rows))
    pathlib.Path("save/mws_5/logp").mkdir(parents=True)
    report.main()
    assert [row["fingerprint"] for row in drawn] == ["cc (50)"] * 2
    tables = capsys.readouterr().out.split("\n\n")
    assert ["search error" in table for table in tables] == [True, False, False, False]
    assert re.search(r"^mws_5 .* 0.50 +1.50$", tables[0], re.M) and re.search(r"^rws_5 .* missing$", tables[0], re.M)
    runs[2].first["model_iteration"] = 9
    runs[2].results["own"] = runs[2].results["mws"]
    (row, *_) = get_rows(*runs[2:])
    assert [report.describe_value(row, name) for name in ("mws", "own")] == ["-141.00 ± 1.00", "-140.00 (1)"]
    assert "the row of mws_5_seed=2 averages seeds at different iterations: 7, 9" in capsys.readouterr().err


def test_only_comparable_evaluations_share_a_row(capsys):
    def get_result(model, num_particles, algorithm):
        settings = dict.fromkeys([*report.WORK, *report.WORK_BY_ALGORITHM["mws"]], 1) | dict(
            model=model, num_particles=num_particles, algorithm=algorithm
        )
        return dict(settings={**settings, "mode": "test"}, model_iteration=7)

    def choose(**results):
        """Returns: those that share a row; the reasons why others are left out"""
        shown = report.choose_comparable("run", {name: get_result(*about, name) for name, about in results.items()})
        return list(shown), re.findall(r"its (.*); eval_logp.py --force repeats it\n", capsys.readouterr().err)

    assert choose(sleep=("a", 10), rws=("b", 100), vimco=("b", 100)) == (
        ["rws", "vimco"],
        ["model is a, not b, num-particles is 10, not 100"],
    )
    others = dict(mws=("b", 7), own=("b", 7))  # whose effort is not that of a training
    assert choose(**others) == (["own", "mws"], [])
    assert choose(**others, rws=("b", 100), vimco=("b", 200)) == (["vimco", "own", "mws"], ["num-particles is 100, not 200"])
    assert choose(own=("a", 7), vimco=("b", 200)) == (["vimco"], ["model is a, not b"])


def test_what_the_alphabet_is_worth():
    """Where a search finds all programs, the bounds are log p(x | alphabet). In words: the right one's lead over the mean of the
    others is 3 and 1.5 nats; 2.25 ± 12.706 * 0.75. It is one of two that tie for the second image"""
    torch.manual_seed(0)
    model = models.GenerativeModel(2, num_arcs=2, num_alphabets=3)
    network = models.InferenceNetwork(2, num_arcs=2, num_alphabets=3)
    obs = model.sample(1, torch.eye(3)[:1])[1][0]
    joint = sum(model.log_prob(get_latents().unsqueeze(1).expand(-1, 3, -1, -1), obs.expand(3, -1, -1), torch.eye(3)))  # [8, L]
    bounds = conditioning.get_bounds(model, network, obs, 3, search.Effort().scale(0.01))
    torch.testing.assert_close(bounds, joint.logsumexp(0))
    bounds = torch.tensor([[0.0, -2.0, -4.0], [-4.0, -1.0, -1.0]])
    lines = conditioning.describe(bounds, torch.tensor([0, 1])).splitlines()
    assert lines[0] == "2 unseen images, 3 alphabets"
    assert "is 2.25 nats per image above the mean of the wrong ones (95 % interval -7.28 to 11.78), 0.67 above" in lines[1]
    assert (
        lines[2]
        == "the right alphabet is the most probable one for 1.5 images (by chance: 0.667), and among the best 2 for 2 (1.33)"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.pt")), ids=lambda path: path.stem)
def test_pretrained_models(folder, path):
    """Whole, found from anywhere, and better on their own samples than on noise"""
    checkpoint = checkpoints.load(checkpoints.find(f"pretrained/{path.stem}"))
    generative_model, network = models.from_checkpoint(checkpoint)
    alphabet = torch.eye(50)[:2] if checkpoint["num_alphabets"] else None
    latent, obs = generative_model.sample(2, alphabet)
    noise = torch.bernoulli(obs.mean().expand(obs.shape))
    log_p = []
    for images in (obs, noise):
        log_weight = scoring.get_log_weight(generative_model, network, images, 20, alphabet)
        log_p.append(scoring.log_mean_weight(log_weight).mean())
    assert log_p[0] > log_p[1] + 50


def test_joint_bound_takes_each_latent_once():
    def get_result(codes, log_joint):
        codes = torch.tensor(codes, dtype=torch.int16).unsqueeze(1)
        latents = dict(obs_id=torch.zeros(len(codes)).int(), codes=codes, log_joint=torch.tensor(log_joint))
        return dict(latents=latents, log_p_by_image=torch.zeros(1))

    results = [get_result([4, 2], [-3.0, -1.0]), get_result([2, 6], [-1.0, -2.0])]
    bound = report.get_joint_bound(results)
    assert bound.item() == pytest.approx(math.log(math.exp(-3) + math.exp(-1) + math.exp(-2)))


@pytest.mark.parametrize("part, algorithm", [("generative_model", "rws"), ("inference_network", "mws")])
def test_nan_is_refused_at_once_and_infinity_is_not(part, algorithm, model):
    path = checkpoints.find(model)
    checkpoint = checkpoints.load(path)
    checkpoint[part] |= {"mask": torch.tensor([0, -torch.inf]), "count": torch.tensor(3)}
    for value, error in [(1.0, None), (torch.nan, f"the {part.replace('_', ' ')} has values that are not numbers")]:
        checkpoint[part]["last"] = torch.tensor([0, value])
        util.save_checkpoint(path, checkpoint)
        with pytest.raises(UserError, match=error) if error else contextlib.nullcontext():
            checkpoints.load_given(path, parts=eval_logp.get_parts(algorithm))
    if part == "inference_network":
        checkpoints.load_given(path, parts=eval_logp.get_parts("rws"))  # which trains a network of its own


def test_kernels_are_tried_with_every_network(model, monkeypatch):
    built, checkpoint = [], checkpoints.load(checkpoints.find(model))
    monkeypatch.setattr(kernel_check, "check", lambda build, *_: built.append(type(build()[1])))
    for algorithm in ("mws", "rws", "sleep", "own"):
        args = eval_logp.parse_args(["--checkpoint-path", model, "--algorithm", algorithm])
        eval_logp.check_kernels(args, checkpoint, 2, torch.device("cpu"))
    own, lookup = models.InferenceNetwork, models.LookupInferenceNetwork
    assert built == [lookup, own, lookup, own, own]


def test_bad_input(folder, run_script, assert_refused):
    pathlib.Path("broken.pt").write_bytes(b"PK")
    torch.save({"a": 1}, "other.pt")
    for flags, words in [
        (["--algorithm", "rws"], ["--checkpoint-path"]),
        (["--checkpoint-path", "save/none/checkpoints/latest.pt"], ["save/none", "python main.py"]),
        (["--checkpoint-path", "mws_20"], ["mws_20", "python main.py"]),
        (["--checkpoint-path", "broken.pt"], ["broken.pt", "damaged"]),
        (["--checkpoint-path", "other.pt"], ["other.pt", "not a checkpoint"]),
        (["--checkpoint-path", "other.pt", "--num-data", "0"], ["--num-data"]),
        (["--checkpoint-path", "other.pt", "--algorithm", "tvo"], ["--algorithm"]),
    ]:
        assert_refused(eval_logp, flags, words)
    status, stdout, stderr = run_script(eval_logp, "--report")
    assert status == 0 and stdout.count("\n") == 1 and "nothing in save/" in stdout and not stderr
    assert not pathlib.Path("save").exists()
