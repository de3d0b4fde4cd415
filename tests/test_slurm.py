"""Sweeps on a real Slurm of one node, as job arrays and by a stand-in for om-repeat."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_main import assert_same
from test_sweep import folder, get_cells, get_small_argss, load, run  # noqa: F401

import main
import sweep
import util
from cluster import slurm, tasks
from runs import checkpoints, locks, saving
from util import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATION = "--num-data=3 --num-iterations=5 --num-particles=5 --test-num-particles=20"
SUBMIT = ["--cluster", "--mem=1M", "--gres=none"]


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory):
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm to start: {', '.join(missing) or 'needs root'}")
    state = tmp_path_factory.mktemp("slurm")
    process = subprocess.run([ROOT / "tests/start-slurm.sh", state], capture_output=True, text=True, timeout=60)
    try:
        assert process.returncode == 0, process.stdout + process.stderr
        yield state / "slurm.conf"
    finally:
        for path in state.glob("*.pid"):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def cluster(slurm_conf, folder, monkeypatch):  # noqa: F811
    """Three small models in place of the paper's, on a Slurm without om-repeat. Returns: their names"""
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    monkeypatch.setattr(sweep, "get_sweep_argss", lambda *_: get_small_argss([], ["mws", "rws", "vimco"]))
    yield [util.get_path_base(args) for args in sweep.get_sweep_argss()]
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not list_jobs(), 60)


@pytest.fixture
def om_repeat(monkeypatch):
    monkeypatch.setenv("PATH", f"{ROOT / 'tests/openmind'}:{os.environ['PATH']}")


def wait_for(condition, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.2)


def list_jobs(format="%i"):
    command = ["squeue", "--noheader", "--array", f"--format={format}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def has_reached(model, iteration):
    return checkpoints.get_path(model, iteration).exists()


def read_log(model, name="train"):
    return (util.SAVE / model / "logs" / f"{name}.log").read_text()


def assert_bits_of_a_run_here(model, settings):
    finished = load(model)
    shutil.rmtree(util.SAVE / model)
    (args,) = [args for args in sweep.get_runs(sweep.parse_args(["--", *settings])).values() if util.get_path_base(args) == model]
    main.main(sweep.get_flags(args))
    assert_same(finished, load(model))


# ------------------------------------------------------------------ sweeps


@pytest.mark.waits
def test_job_arrays(cluster, monkeypatch):
    """One of two is warned: it alone is requeued, and ends with the bits of a run here; a model is evaluated after its
    training, with as many threads as Slurm gives it CPUs"""
    monkeypatch.setattr(sweep.report, "ALGORITHMS", ["rws"])
    chosen = ["--models", *cluster[:2]]
    settings = ["--pretrain-iterations=0", "--num-iterations=190", "--save-interval=100"]
    names = [util.get_path_base(args) for args in sweep.get_runs(sweep.parse_args([*chosen, "--", *settings])).values()]
    stdout = run(*SUBMIT, "--time=10", *chosen, "--", *settings)
    number = re.search(r"Submitted batch job (\d+)", stdout)[1]
    assert run(*SUBMIT, *chosen, "--", *settings).count("in the queue already, as job") == 2
    evaluation = ["--eval-logp", "--models", cluster[1], "--eval-options", EVALUATION]
    setup = "--setup=echo $OMP_NUM_THREADS threads"
    assert "rws: submitted" in run(*SUBMIT, "--cpus-per-task=2", setup, *evaluation, "--", *settings)
    assert [cells["state"] for cells in get_cells(*evaluation, "--", *settings)] == ["queued"]
    wait_for(lambda: all(has_reached(name, 25) for name in names))
    subprocess.run(["scancel", "--signal=USR1", "--batch", f"{number}_1"], check=True)
    wait_for(lambda: all(has_reached(name, 158) for name in names))
    wait_for((util.SAVE / names[1] / "logp/test_rws.pt").exists)
    wait_for(lambda: not list_jobs())
    assert [(cells["state"], cells["iteration"]) for cells in get_cells(*chosen, "--", *settings)] == [("done", "190/190")] * 2
    shown = [subprocess.run(["scontrol", "show", "job", f"{number}_{i}"], capture_output=True, text=True) for i in range(2)]
    assert [re.search(r"Restarts=(\d+)", process.stdout)[1] for process in shown] == ["0", "1"]
    log = read_log(names[1])
    assert log.count("stopped by SIGUSR1") == 1 and re.search(r"resuming at iteration [1-9]\d+", log)
    assert "stopped by" not in read_log(names[0])
    assert [cells["state"] for cells in get_cells(*evaluation, "--", *settings)] == ["done"]
    assert "2 threads" in read_log(names[1], "eval_rws")
    assert_bits_of_a_run_here(names[1], settings)


@pytest.mark.waits
def test_om_repeat(cluster, om_repeat, monkeypatch):
    """A run whose job is killed without a warning, as at its time limit, loses next to nothing, and ends with the
    bits of a run here; its evaluation is submitted at its end; nothing stays in the queue"""
    monkeypatch.setattr(sweep.report, "ALGORITHMS", ["sleep"])
    settings = ["--pretrain-iterations=0", "--num-iterations=300", "--save-minutes=0.01"]
    chosen = ["--models", cluster[0]]
    (name,) = [util.get_path_base(args) for args in sweep.get_runs(sweep.parse_args([*chosen, "--", *settings])).values()]
    stdout = run(*SUBMIT, *chosen, "--", *settings)
    assert "DeprecationWarning" not in stdout
    evaluation = [*chosen, "--eval-logp", "--eval-options", EVALUATION]
    assert "sleep: will be submitted when its training is complete" in run(*SUBMIT, *evaluation, "--", *settings)
    assert {cells["job"] for cells in get_cells(*evaluation, "--", *settings)} == {"after training"}
    wait_for(lambda: has_reached(name, 158))
    (number,) = [line.split()[0] for line in list_jobs("%i %T") if line.endswith(" RUNNING")]
    reached = load(name)["iteration"]
    subprocess.run(["scancel", number], check=True)
    wait_for((util.SAVE / name / "logp/test_sleep.pt").exists)
    wait_for(lambda: not list_jobs())
    log = read_log(name)
    (resumed,) = [int(iteration) for iteration in re.findall(r"resuming at iteration (\d+)", log)]
    assert resumed >= reached
    assert_bits_of_a_run_here(name, settings)


# ------------------------------------------------------------------ the queue

HELD = [*SUBMIT, "--sbatch=--hold"]  # in the queue, but never started


def test_jobs_of_the_queue_are_told_apart(cluster):
    names = cluster
    stdout = run(*HELD, "--jobs=2")
    number = re.search(r"Submitted batch job (\d+)", stdout)[1]
    assert "ArrayTaskThrottle=2" in subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    (job_name,) = set(list_jobs("%j"))
    foreign = ["sbatch", "--parsable", "--mem=1M", "--hold", "--array=0-2", "-J", f"{job_name}x", "--wrap", "true"]
    foreign = subprocess.run(foreign, capture_output=True, text=True, check=True).stdout.strip()
    run(*HELD, "--seeds", "3", "4", "--models", names[0])
    for location in ("./data.mat", os.path.abspath("data.mat")):  # the same data as data.mat
        assert run(*HELD, "--", f"--data-location={location}").count("in the queue already") == 3
    assert [(c["state"], c["job"]) for c in get_cells()] == [("queued", f"{number}_{i} (JobHeldUser)") for i in range(3)]

    for path in (util.SAVE / names[0] / "checkpoints", util.SAVE / "elsewhere" / "checkpoints"):
        path.mkdir(parents=True)
    stdout = run("--rm", "--dry-run")
    assert f"save/{names[0]} has jobs in the queue and stays" in stdout and stdout.splitlines()[-1] == "save/elsewhere"

    assert run("--cancel", "--dry-run", "--models", names[1]).startswith(f"would cancel {number}_1: {names[1]} train\n")
    assert len(list_jobs()) == 3 + 3 + 2
    stdout = run("--cancel", "--models", names[1])
    assert "cancelled 1 jobs" in stdout and "other runs from here are in the queue" in stdout
    assert [cells["state"] for cells in get_cells()] == ["queued", "waiting", "queued"]
    stdout = run("--cancel")
    assert "cancelled 2 jobs" in stdout and re.search(r"_seed=3_.* \(1 jobs\), .*_seed=4_.* \(1 jobs\)", stdout)
    assert "cancelled 2 jobs" in run("--cancel", "--seeds", "3", "4")
    wait_for(lambda: sorted(list_jobs()) == [f"{foreign}_{i}" for i in range(3)])


def test_what_slurm_refuses(cluster, om_repeat, monkeypatch):
    """Also where om-repeat says that all is well"""
    for flags in (["--partition=no"], ["--partition=no", "--no-repeat"], ["--no-repeat", "--sbatch", "--nodes 'a b'"]):
        with pytest.raises(UserError, match="refused the job: .*(partition|node count)"):
            run(*SUBMIT, *flags)
    assert not list_jobs() and "nothing to submit" not in run("--cluster", "--dry-run")
    with pytest.raises(UserError, match="--jobs .* om-repeat .* give --no-repeat"):
        run(*SUBMIT, "--jobs=2")
    with pytest.raises(UserError, match="no such file"):
        run(*SUBMIT, "--", "--data-location=nowhere.mat")
    assert run(*HELD).count(": submitted") == 3
    for kinds in (["sleep", "rws"], ["sleep", "rws", "vimco"]):  # what is left to a training is added to
        monkeypatch.setattr(sweep.report, "ALGORITHMS", kinds)
        stdout = run(*HELD, "--no-repeat", "--eval-logp", "--models", cluster[0])
        assert stdout.count("will be submitted when its training is complete") == 1 + (len(kinds) == 2)
    left = slurm.take_after_training(cluster[0])
    assert [task.kind for task, _ in left] == ["sleep", "rws", "vimco"] and all("sbatch" in command for _, command in left)
    util.write(slurm.get_after_path(cluster[0]), json.dumps([[list(task), command] for task, command in left]).encode())
    assert "cancelled 6 jobs" in run("--cancel") and not slurm.get_after_path(cluster[0]).exists()
    pathlib.Path("a folder").mkdir()
    shutil.copy("data.mat", "a folder")
    monkeypatch.chdir("a folder")
    with pytest.raises(UserError, match="om-repeat splits its command"):
        run(*SUBMIT)


def test_without_slurm(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("PATH", f"{folder}:{pathlib.Path(shutil.which('bash')).parent}")
    pathlib.Path("squeue").write_text("#!/bin/bash\necho one >&2; echo 'squeue: error: nobody answers' >&2; exit 1\n")
    pathlib.Path("squeue").chmod(0o755)
    assert get_cells("--models", "mws_3")[0]["state"] == "waiting"
    assert capsys.readouterr().err == "warning: Slurm does not answer (squeue: error: nobody answers)\n"
    stdout = run("--cluster", "--dry-run", "--models", "mws_3", "--gres=gpu:a100:1", "--mail=me@here", "--sbatch=--qos='a b'")
    assert all(f" {word} " in stdout for word in ["--gres=gpu:a100:1", "--mail-user=me@here", "'--qos=a b'"])
    assert "--cuda" in stdout.splitlines()[-1]
    assert "--cuda" not in run("--cluster", "--dry-run", "--models", "mws_3", "--no-cuda")
    for text, seconds in [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-00:00:30", 86430)]:
        assert slurm.get_seconds(text) == seconds


# ------------------------------------------------------------------ in a job


def test_a_run_saves_by_the_clock_and_before_its_job_ends(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "time", lambda: now[0])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def get_saves(until):
        clock, start, saves = saving.SaveClock(5), now[0], []
        for now[0] in range(int(start), int(start) + until):
            if clock.is_due():
                saves.append(now[0] - start)
                clock.restart()
        return saves

    assert get_saves(1000) == [300, 600, 900]
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now[0] + 720))
    assert get_saves(760) == [300, 600, 660, 670, 680, 690, 700, 710, 720, 730, 740, 750]


def test_a_job_waits_for_the_one_before_it(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with locks.lock_run("run"):
        thread = threading.Thread(target=lambda: locks.lock_run("run").__enter__())
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"warning: save/run is being trained by process \d+ on .*; waiting up to 300 seconds .*\n", stderr)
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with locks.lock_run("another"), pytest.raises(UserError, match="is being trained by"), locks.lock_run("another"):
        pass


def test_warnings_that_come_early_wait(monkeypatch):
    for seconds_left, delay in [(150, 30), (119, 0), (500, 0), (None, 0)]:
        end = None if seconds_left is None else time.time() + seconds_left
        monkeypatch.setattr(slurm, "get_job_end", lambda: end)  # noqa: B023
        assert abs(slurm.get_delay(120) - delay) < 1


def test_a_job_without_the_gpu_that_it_was_given(folder):  # noqa: F811
    """Fails at once, and --status says why"""
    flags = [*sweep.get_flags(next(sweep.get_sweep_argss())), "--cuda"]
    listing = slurm.Listing(pathlib.Path("listing.json"), False, "", 120, [tasks.Task("mws_3", "train", flags, 200000)])
    slurm.write_listing(listing)
    assert slurm.run_task(f"{listing.path}:0") == 2
    (cells,) = get_cells("--models", "mws_3")
    assert cells["state"] == "failed" and cells["on"] == "GPU" and cells["log"] == "save/mws_3/logs/train.log"
    assert "no usable GPU" in run("--status", "--models", "mws_3").splitlines()[-1]


def test_a_task_that_is_stopped_by_its_jobs_end_waits_to_be_killed(folder, monkeypatch):  # noqa: F811
    """Else om-repeat would take it for complete"""
    monkeypatch.setattr(slurm, "HOLD", 3)
    monkeypatch.setattr(tasks.Task, "get_command", lambda _: [sys.executable, "-c", "import sys; sys.exit(143)"])
    for repeated in (False, True):
        listing = slurm.Listing(pathlib.Path(f"{repeated}.json"), repeated, "echo set up", 120, [["run", "train", [], 1]])
        slurm.write_listing(listing)
        start = time.time()
        assert slurm.run_task(f"{listing.path}:0") == 143
        assert (time.time() - start > 3) == repeated == ("waiting for Slurm to end this job" in read_log("run"))
    assert read_log("run").count("set up") == 2
