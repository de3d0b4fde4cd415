"""Sweeps of small models on this machine, and what users may do wrong; test_slurm.py has those on Slurm."""

import contextlib
import io
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
import types

import pytest
import torch
from conftest import ROOT, assert_same, fork, wait_for
from test_main import TINY

import eval_logp
import main
import sweep
import util
from cluster import slurm, tasks
from runs import checkpoints, locks
from runs.saving import StopSignal
from util import UserError


def get_small_argss(flags, algorithms=("mws", "rws")):
    for algorithm in algorithms:
        yield main.parse_args([*TINY, "--data-location", "data.mat", "--algorithm", algorithm, *flags])


@pytest.fixture
def make_sweep(folder, monkeypatch):
    """Puts two small models, which take the given flags of main.py, in place of the paper's. Returns: their path bases"""

    def make(flags):
        flags = flags.split()
        monkeypatch.setattr(sweep, "get_sweep_argss", lambda *_: get_small_argss(flags))
        small = "--num-data=3 --num-iterations=5 --num-particles=5 --test-num-particles=20".split()
        monkeypatch.setattr(sweep, "TEST_RUN_EVALUATION", small)
        return [util.get_path_base(args) for args in get_small_argss(flags)]

    return make


def run(*flags, status=0, script=sweep):
    """Runs a script in this process; status: what it must end with, None for any. Returns: what it printed"""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        ended_with = script.main(list(flags))
    assert status is None or ended_with == status, stdout.getvalue()
    return stdout.getvalue()


def load(name):
    return util.load_checkpoint(checkpoints.get_path(name))


def get_cells(*flags):
    """What --status shows of each task: state, iteration, value, ..."""
    rows = [re.split("  +", line) for line in run("--status", *flags, status=None).splitlines()]
    return [dict(zip(rows[0][1:], row[1:], strict=False)) for row in rows[1:] if len(row) > 4]


# ------------------------------------------------------------------ what there is to do


def test_the_models_of_the_paper():
    argss = list(sweep.get_sweep_argss())
    names = [util.get_path_base(args) for args in argss]
    singles = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in (3, 5, 10, 20, 40)]
    assert names == [*singles, "a_mws_40"] == sweep.report.PAPER_MODELS
    mws = [(args.num_particles, args.memory_size) for args in argss[:5]]
    assert mws == [(1, 2), (2, 3), (5, 5), (10, 10), (20, 20)]
    assert [args.num_particles for args in argss[5:10]] == [3, 5, 10, 20, 40]
    assert argss[-1].num_particles == argss[-1].memory_size == 20 and argss[-1].condition_on_alphabet
    for test_run in (False, True):
        argss = list(sweep.get_sweep_argss(test_run, "glyphs"))
        assert len({util.get_path_base(args) for args in argss}) == 16
        for args in argss:
            flags = util.get_flags(args)
            assert all(re.fullmatch(r"--[\w=./-]+", flag) for flag in flags)
            assert vars(main.parse_args(flags)) == vars(args)
    for words in ["--data-location local", "--data-location glyphs", "--compile", "--no-compile"]:
        for test_run in [[], ["--test-run"]]:
            args = main.parse_args([*test_run, *words.split()])
            assert vars(main.parse_args(util.get_flags(args))) == vars(args)


def test_dry_run_prints_what_would_be_run(folder):
    stdout = run("--dry-run", "--models", "rws_5", "a_mws_40")
    expected = [
        f"{sys.executable} {ROOT}/main.py --small-dataset --algorithm=rws --num-particles=5",
        f"{sys.executable} {ROOT}/main.py --small-dataset --condition-on-alphabet --num-particles=20 --memory-size=20",
    ]
    assert stdout.splitlines() == expected
    large = run("--dry-run", "--models", "a_mws_40_large", "--large-conditional")
    assert large.splitlines() == [expected[1].replace(" --small-dataset", "")]
    other_size = run("--dry-run", "--models", "rws_5", "--seeds", "3", "--", "--dataset-size", "50")
    assert other_size.split()[2:] == ["--seed=3", "--dataset-size=50", "--algorithm=rws", "--num-particles=5"]
    assert not pathlib.Path("save").exists()


def test_evaluations_of_a_sweep():
    """Of test images by the paper's algorithms, with the run's seed; others, and training images, are chosen by options"""
    some = sweep.get_tasks(sweep.parse_args(["--eval-logp", "--models", "rws_3", "--seeds", "0", "2"]))
    assert [task.kind for task in some] == ["sleep", "rws", "vimco"] * 2
    assert [(task.settings["seed"], task.settings["mode"]) for task in some] == [(0, "test")] * 3 + [(2, "test")] * 3
    assert [task.settings.get("num_dreams") for task in some] == [5000, None, None] * 2 and "--seed=2" in some[3].flags
    assert [str(path) for path in some[4].get_state_paths()] == ["save/rws_3_seed=2/logp/checkpoints/test_rws.pt"]
    chosen = ["--eval-logp", "--models", "rws_3", "--eval-algorithms", "own"]
    (task,) = sweep.get_tasks(sweep.parse_args([*chosen, "--eval-options=--mode train --seed 5"]))
    assert (task.kind, task.settings["mode"], task.settings["seed"]) == ("train_own", "train", 5)
    assert [path.name for path in (task.get_evaluation_path(), task.get_path("log"), task.get_lock())] == [
        "train_own.pt", "eval_train_own.log", ".train_own.lock",
    ]  # fmt: skip
    with pytest.raises(UserError, match="the sweep itself sets"):
        sweep.get_tasks(sweep.parse_args([*chosen, "--eval-options=--every-checkpoint"]))


# ------------------------------------------------------------------ here


def test_a_run_stopped_before_its_last_test_is_not_complete(make_sweep, monkeypatch):
    name, _ = make_sweep("--pretrain-iterations 0 --num-iterations 4 --test-interval 4 --test-num-particles 3")
    (task, _), flags = sweep.get_tasks(sweep.parse_args([])), util.get_flags(next(iter(sweep.get_sweep_argss())))
    with monkeypatch.context() as context:
        context.setattr(main, "test", lambda run: os.kill(os.getpid(), signal.SIGTERM) or False)
        assert main.main(flags) == 128 + signal.SIGTERM
    assert load(name)["iteration"] == 4 and not tasks.get_progress(task).done
    assert main.main(flags) == 0 and tasks.get_progress(task).done
    resumed = load(name)
    assert resumed["statistics"]["test"]["iteration"].tolist() == [4]
    shutil.rmtree(util.SAVE / name)
    assert main.main(flags) == 0
    assert_same(resumed, load(name))
    latest = checkpoints.get_path(name)
    latest.write_bytes(latest.read_bytes()[:-1000])  # progress is that of the newest intact checkpoint
    cells, _ = get_cells()
    assert (cells["state"], cells["iteration"]) == ("stopped", "3/4")
    assert run("--status").count(f"{latest} is damaged") == 1


def test_the_end_of_a_log_is_that_of_the_last_attempt(folder):
    task = tasks.Task("a", "train", [], 5)
    for line in ["first\nfailed", "second", "--- of the user's: not a header", ""]:
        with tasks.open_log(task) as log:
            log.write(line)
        assert tasks.get_log_end(task) == line
    assert slurm.get_attempts(task) == ("", [])
    for words, is_failed in [("2", True), ("143", False), ("0", False), ("torn", True)]:
        task.get_path("status").write_text(words)
        assert tasks.is_failed(task) == is_failed


def test_a_task_that_cannot_start_stops_no_other(make_sweep):
    models = make_sweep("--pretrain-iterations 0 --num-iterations 2")
    (util.SAVE / models[0]).mkdir(parents=True)
    (util.SAVE / models[0] / "logs").write_text("a file")
    stdout = run("--jobs", "2", status=1)
    reason = f"cannot write save/{models[0]}/logs/train.log (File exists); what was saved before is intact: fix that and run"
    assert f"{models[0]}: not started: {reason} the same command again" in stdout
    assert f"{models[1]}: done, 2 iterations" in stdout and "1 of 2 done" in stdout


def test_options_of_a_queued_task():
    def get_task(*options):
        words = ["--eval-logp", "--models", "rws_5", "--eval-algorithms", "mws", f"--eval-options={' '.join(options)}"]
        (task,) = sweep.get_tasks(sweep.parse_args(words))
        return task

    queued = get_task("--num-data 4", "--num-particles 5")
    assert sweep.describe_change(queued, get_task("--num-data=4", "--num-particles=5", "--force")) == ""
    change = sweep.describe_change(queued, get_task("--num-data 5", "--num-particles 4"))
    assert change == (
        ", but with other options: num-particles is 5 there and 4 here, num-data is 4 there and 5 here; --cancel cancels it"
    )
    change = sweep.describe_change(queued, queued._replace(total=7))
    assert "options: training-iterations is 200000 there and 7 here;" in change
    old = tasks.Task("rws_5", "train", ["--gone=3"], 200000)
    assert "--gone=3" in sweep.describe_change(old, old._replace(flags=[]))


@pytest.mark.long
def test_sweep_here(make_sweep, monkeypatch):
    """Trained two at a time, interrupted, resumed; evaluated, reported, deleted"""
    models = make_sweep("--pretrain-iterations 5 --num-iterations 110 --save-interval 10")
    pid = fork(lambda: pathlib.Path("sweep.out").write_text(run("--jobs", "2", status=128 + signal.SIGINT)))
    wait_for(lambda: all(checkpoints.get_path(name, 10).exists() for name in models))
    os.kill(pid, signal.SIGINT)
    assert os.waitpid(pid, 0)[1] == 0
    assert pathlib.Path("sweep.out").read_text().count("stopped, resumes when the sweep does") == 2
    assert not any(locks.is_locked(util.SAVE / name / "lock") for name in models)
    assert all("stopped by SIGINT" in tasks.get_log_end(tasks.Task(name, "train", [], 110)) for name in models)
    assert all(10 <= load(name)["iteration"] < 110 for name in models)
    stdout = run("--jobs", "2")
    assert "2 of 2 done" in stdout and len(re.findall(r"^\w+.*: done, 110 iterations", stdout, re.M)) == 2
    assert [(cells["state"], cells["iteration"]) for cells in get_cells()] == [("done", "110/110")] * 2
    for name in models:
        every = f"--algorithm own --every-checkpoint --num-data 2 --test-num-particles 3 --no-compile --checkpoint-path {name}"
        assert eval_logp.main(every.split()) == 0
    stdout = run("--plot")
    assert pathlib.Path("save/logp_by_iteration.pdf").exists() and stdout.count(" at iteration 110\n") == 2
    resumed = load(models[0])
    shutil.rmtree(util.SAVE / models[0])
    main.main(util.get_flags(next(sweep.get_sweep_argss())))
    assert_same(resumed, load(models[0]))
    assert "2 tasks complete already\n0 of 0 done" in run()

    evaluation = ["--eval-logp", "--eval-algorithms", "rws", "--test-run", "--models", models[1]]
    assert "1 of 1 done" in run(*evaluation, "--jobs", "2")
    value = f"{torch.load(f'save/{models[1]}/logp/test_rws.pt', weights_only=True)['log_p']:.2f}"
    some_cells = get_cells(*evaluation)
    assert [(cells["state"], cells["iteration"], cells["log p"]) for cells in some_cells] == [("done", "5/5", value)]
    assert value in run("--report", script=eval_logp)
    for option in ["--seed=7", "--images=spread", "--num-data=6"]:  # other evaluations, which are still to be done
        (cells,) = get_cells(*evaluation, f"--eval-options={option}")
        assert (cells["state"], cells["iteration"]) == ("stopped", "0/5")
    stdout = run(*evaluation, "--dry-run", "--eval-options=--num-data=6")
    assert "num-data is 3 there and 6 here; --eval-options=--force replaces it" in stdout and "--force" not in stdout.split()
    stdout = run(*evaluation, "--dry-run", "--eval-options=--seed=7 --force")
    assert stdout.count("--force") == 2 and "skipped" not in stdout
    with monkeypatch.context() as context:
        context.setattr(eval_logp, "estimate_step", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        (task,) = sweep.get_tasks(sweep.parse_args([*evaluation, "--eval-options=--num-data=6"]))
        assert eval_logp.main([*task.flags, "--force", "--no-compile"]) == 128 + signal.SIGTERM
    for options, iteration in [("--num-data=6", "5/5"), ("--num-data=7", "0/5"), ("--num-data=6 --images=spread", "0/5")]:
        (cells,) = get_cells(*evaluation, f"--eval-options={options}")
        assert (cells["state"], cells["iteration"]) == ("stopped", iteration)

    stdout = run("--rm", "--eval-logp", "--eval-algorithms", "mws", "--dry-run")
    assert stdout == "there is nothing to delete in save/\n"
    (task,) = sweep.get_tasks(sweep.parse_args(evaluation))
    assert "nothing to delete" in run("--rm", *evaluation, "--eval-options=--num-data=7", "--yes")
    assert str(task.get_evaluation_path()) in run("--rm", *evaluation, "--eval-options=--seed=0", "--dry-run")
    own = [f"save/{models[1]}/logp/{name}" for name in ("test_rws.pt", "checkpoints/test_rws.pt")]
    every = pathlib.Path(f"save/{models[1]}/logp/test_every_checkpoint/110.pt")
    assert run("--rm", *evaluation, "--yes").splitlines()[:2] == own and every.exists()
    assert not any(map(os.path.exists, own))
    pathlib.Path("save/notes/logp").mkdir(parents=True)
    pathlib.Path("save/notes/logp/test_mws.pt").touch()  # of a checkpoint from elsewhere
    assert "save/notes/logp" in run("--rm", "--eval-logp", "--dry-run").splitlines()
    stdout = run("--rm", "--dry-run")
    assert sorted(stdout.splitlines()) == sorted(f"save/{name}" for name in models)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert "nothing is deleted" in run("--rm", status=1)
    assert "deleted 2 runs" in run("--rm", "--yes")
    assert sorted(path.name for path in pathlib.Path("save").iterdir()) == [
        "logp.csv", "logp.pdf", "logp_by_iteration.csv", "logp_by_iteration.pdf", "notes",
    ]  # fmt: skip


def test_a_killed_sweep_stops_its_tasks(folder, monkeypatch):
    """So that they save"""
    script = "trap 'echo asked to stop; exit 143' TERM; echo started; while :; do sleep 0.1; done"
    monkeypatch.setattr(tasks.Task, "get_command", lambda _: ["bash", "-c", script])
    task = tasks.Task("run", "train", [], 1)
    log = task.get_path("log")
    pid = fork(lambda: (tasks.start(task, 0, 1, []), time.sleep(60)))
    wait_for(lambda: log.exists() and "started" in log.read_text().splitlines())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: "asked to stop" in log.read_text().splitlines(), 10)


SLOW_TO_SAVE = """
import signal, sys, time
received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
while not received:
    time.sleep(0.05)
time.sleep(2)
sys.exit(128 + received[-1])
"""


def test_a_job_cancelled_while_it_saves_stays_out_of_the_queue(monkeypatch, tmp_path):
    """Its run is warned again and again before the time limit, but not once the job is cancelled"""
    calls = []
    monkeypatch.setattr(slurm, "call", calls.append)
    timers = [threading.Timer(t, os.kill, (os.getpid(), n)) for t, n in ((0.7, signal.SIGUSR1), (1.7, signal.SIGTERM))]
    with StopSignal() as stop, open(tmp_path / "log", "w") as log:
        for timer in timers:
            timer.start()
        status = slurm.run_command([sys.executable, "-c", SLOW_TO_SAVE], log, stop, math.inf)
        slurm.requeue("7_0", stop)
    assert status == 128 + signal.SIGTERM and not calls


def test_failures_and_locks(make_sweep, monkeypatch):
    models = make_sweep("--pretrain-iterations 0 --num-iterations 8")
    task = tasks.Task(models[0], "train", [], 8)
    (util.SAVE / models[1] / "checkpoints").mkdir(parents=True)
    pathlib.Path(checkpoints.get_path(models[1])).write_bytes(b"PK broken")
    with locks.lock_run(models[0]):
        stdout = run("--jobs", "2", status=1)
        assert f"{models[0]}: skipped, process {os.getpid()} on" in stdout
        assert f"{models[1]}: failed with status 2, see save/{models[1]}/logs/train.log" in stdout and "is intact" in stdout
        assert "0 of 2 done" in stdout
        assert [cells["state"] for cells in get_cells()] == ["running", "failed"]
        *_, damage, reason = run("--status", status=1).splitlines()
        assert f"save/{models[1]}/checkpoints/latest.pt is damaged" in damage and "is intact" in reason
        stdout = run("--rm", "--dry-run")
        assert "is in use and stays" in stdout and stdout.splitlines()[-1] == f"save/{models[1]}"
    assert not tasks.get_progress(task).done
    for path in ("logp/.test_mws.lock", "logp/test_every_checkpoint/.5.lock", "oneshot/.lock"):
        with locks.lock(util.SAVE / models[0] / path, "in use"):
            assert f"save/{models[0]} is in use and stays" in run("--rm", "--dry-run")

    with contextlib.ExitStack() as stack:  # a run starts before the answer

        def answer():
            stack.enter_context(locks.lock_run(models[0]))
            return "y\n"

        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(readline=answer))
        stdout = run("--rm")
    assert stdout.endswith(f"save/{models[0]} is in use and stays\ndeleted 1 run\n")
    assert [path.name for path in util.SAVE.iterdir() if path.is_dir()] == [models[0]]


BAD_INPUT = [
    ("--jobs 0", ["--jobs", "out of range"]),
    ("--cluster", ["sbatch is not on the PATH"]),
    ("--cuda", ["--cuda", "no usable GPU"]),
    ("--models mws_4", ["mws_4", "not in the sweep"]),
    ("--status --rm", ["exclude"]),
    ("--eval-logp --eval-options '--seed'", ["--seed"]),
    ("--test-run --models test_run_mws_3", ["save"]),
]


def test_bad_input(folder, monkeypatch, assert_refused):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pathlib.Path("save").write_text("a file where the folder should be")
    for flags, words in BAD_INPUT:
        assert_refused(sweep, flags.split(), words)


def test_tasks_share_the_gpus_that_the_sweep_may_use(folder, monkeypatch):
    """And no others: those named by the parent's CUDA_VISIBLE_DEVICES, if it is set"""
    seen = []
    monkeypatch.setattr(tasks.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(tasks.subprocess, "Popen", lambda *_, env, **__: seen.append(env) or types.SimpleNamespace(pid=0))
    task = tasks.Task("run", "train", [], 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, expected in [
        ("MIG-a,MIG-b,MIG-c", ["MIG-a", "MIG-b", "MIG-c"]),
        ("4,5", ["4", "5", "4"]),
        (None, ["0", "1", "0"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
    ]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        seen.clear()
        for slot in range(3):
            tasks.start(task, slot, 3, tasks.get_visible_gpus())
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == expected
