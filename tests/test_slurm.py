"""Sweeps on a real Slurm of one node, as job arrays and by a stand-in for om-repeat."""

import functools
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
import types

import conftest
import pytest
from conftest import ROOT, assert_same
from test_sweep import get_cells, get_small_argss, load, run

import main
import sweep
import util
from cluster import slurm, tasks
from runs import checkpoints, locks, saving
from util import UserError

EVALUATION = "--num-data=3 --num-iterations=5 --num-particles=5 --test-num-particles=20"
SUBMIT = ["--cluster", "--mem=3G", "--gres=none"]
HELD = [*SUBMIT, "--sbatch=--hold"]  # in the queue, but not started


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
def cluster(slurm_conf, folder, monkeypatch):
    """Three small models in place of the paper's, on a Slurm without om-repeat. Returns: their names"""
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    odd = pathlib.Path("50%a")  # which Slurm would replace in the names of files
    odd.mkdir()
    pathlib.Path("data.mat").rename(odd / "data.mat")
    monkeypatch.chdir(odd)
    monkeypatch.setattr(sweep, "get_sweep_argss", lambda *_: get_small_argss([], ["mws", "rws", "vimco"]))
    yield [util.get_path_base(args) for args in sweep.get_sweep_argss()]
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode:  # the test failed while it was down
        start_controller()
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not list_jobs(), seconds=60)


@pytest.fixture
def om_repeat(monkeypatch):
    monkeypatch.setenv("PATH", f"{ROOT / 'tests/openmind'}:{os.environ['PATH']}")


wait_for = functools.partial(
    conftest.wait_for, seconds=200, describe=lambda: subprocess.run(["squeue"], capture_output=True, text=True).stdout
)


def start_controller():
    subprocess.run(["slurmctld", "-f", os.environ["SLURM_CONF"]], check=True)


def find_job(number, array_index):
    """The process of an array's job that the warning goes to; Slurms of other tests may run beside this one's"""
    wanted = [f"SLURM_ARRAY_JOB_ID={number}", f"SLURM_ARRAY_TASK_ID={array_index}", f"SLURM_SUBMIT_DIR={os.getcwd()}"]
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = [b"", *(process / "cmdline").read_bytes().split(b"\0")]
            environ = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if words[-2].startswith(b"--task=") and all(x.encode() in environ for x in wanted):
            return int(process.name)
    raise AssertionError(f"no job {number}_{array_index} is running")


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
    main.main(util.get_flags(sweep.get_runs(sweep.parse_args(["--", *settings]))[model]))
    assert_same(finished, load(model))


# ------------------------------------------------------------------ sweeps


@pytest.mark.long
def test_job_arrays(cluster):
    """One of two is warned: it alone is requeued, and ends with the bits of a run here; a model is evaluated after its
    training, with as many threads as Slurm gives it CPUs"""
    chosen = ["--models", *cluster[:2]]
    settings = ["--pretrain-iterations=0", "--num-iterations=300", "--save-interval=100"]
    names = list(sweep.get_runs(sweep.parse_args([*chosen, "--", *settings])))
    stdout = run(*HELD, "--time=10", *chosen, "--", *settings)
    number = re.search(r"Submitted batch job (\d+)", stdout)[1]
    assert run(*SUBMIT, *chosen, "--", *settings).count("in the queue already, as job") == 2
    evaluation = ["--eval-logp", "--eval-algorithms", "rws", "--models", cluster[1], "--eval-options", EVALUATION]
    setup = "--setup=echo $OMP_NUM_THREADS threads"
    assert "rws: submitted" in run(*SUBMIT, "--cpus-per-task=2", setup, *evaluation, "--", *settings)
    assert [cells["state"] for cells in get_cells(*evaluation, "--", *settings)] == ["queued"]
    subprocess.run(["scontrol", "release", number], check=True)
    wait_for(lambda: has_reached(names[1], 25))
    process = find_job(number, 1)
    controller = pathlib.Path(os.environ["SLURM_CONF"]).parent / "slurmctld.pid"
    os.kill(int(controller.read_text()), signal.SIGKILL)  # when the job is about to requeue itself
    os.kill(process, signal.SIGUSR1)  # what scancel --signal=USR1 --batch does, for which Slurm must be up
    output = util.SAVE / ".sweep" / f"{number}_1.out"
    wait_for(lambda: "cannot be requeued" in output.read_text())
    start_controller()
    wait_for(lambda: all(has_reached(name, 251) for name in names))
    wait_for((util.SAVE / names[1] / "logp/test_rws.pt").exists)
    wait_for(lambda: not list_jobs())
    assert [(cells["state"], cells["iteration"]) for cells in get_cells(*chosen, "--", *settings)] == [("done", "300/300")] * 2
    shown = [subprocess.run(["scontrol", "show", "job", f"{number}_{i}"], capture_output=True, text=True) for i in range(2)]
    assert [re.search(r"Restarts=(\d+)", process.stdout)[1] for process in shown] == ["0", "1"]
    log = read_log(names[1])
    assert log.count("stopped by SIGUSR1") == 1 and re.search(r"resuming at iteration [1-9]\d+", log)
    assert "stopped by" not in read_log(names[0])
    assert [cells["state"] for cells in get_cells(*evaluation, "--", *settings)] == ["done"]
    assert "2 threads" in read_log(names[1], "eval_rws")
    assert_bits_of_a_run_here(names[1], settings)


@pytest.mark.long
def test_om_repeat(cluster, om_repeat):
    """A run whose job is killed without a warning, as at its time limit, loses next to nothing, and ends with the
    bits of a run here; its evaluation waits for the end of the chain; nothing stays in the queue"""
    settings = ["--pretrain-iterations=0", "--num-iterations=250", "--save-minutes=0.01"]
    chosen = ["--models", cluster[0]]
    (name,) = sweep.get_runs(sweep.parse_args([*chosen, "--", *settings]))
    stdout = run(*SUBMIT, *chosen, "--", *settings)
    assert "DeprecationWarning" not in stdout
    evaluation = [*chosen, "--eval-logp", "--eval-algorithms", "sleep", "--eval-options", EVALUATION]
    assert "sleep: submitted" in run(*SUBMIT, *evaluation, "--", *settings)
    assert [cells["state"] for cells in get_cells(*evaluation, "--", *settings)] == ["queued"]
    wait_for(lambda: has_reached(name, 100))
    (number,) = [line.split()[0] for line in list_jobs("%i %T") if line.endswith(" RUNNING")]
    reached = load(name)["iteration"]
    subprocess.run(["scancel", number], check=True)
    wait_for((util.SAVE / name / "logp/test_sleep.pt").exists)
    wait_for(lambda: not list_jobs())
    log = read_log(name)
    (resumed,) = [int(iteration) for iteration in re.findall(r"resuming at iteration (\d+)", log)]
    assert resumed >= reached
    assert_bits_of_a_run_here(name, settings)


@pytest.mark.long
def test_data_are_found_where_jobs_inherit_nothing(cluster, monkeypatch):
    monkeypatch.setenv("OMNIGLOT_PATH", "data.mat")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    words = ["--models", cluster[0], "--", "--pretrain-iterations=0", "--num-iterations=2", "--data-location=local"]
    run(*SUBMIT, *words)
    wait_for(lambda: not list_jobs())
    (name,) = sweep.get_runs(sweep.parse_args(words))
    assert load(name)["iteration"] == 2 and "data-location" not in name


@pytest.mark.long
def test_memory(cluster, monkeypatch):
    """A job that takes too much has failed, in Slurm's words"""
    eat = f"--setup={sys.executable} -c 'import time; x = bytes(10**9) * 2; time.sleep(30)'"
    chosen = ["--models", cluster[0]]
    monkeypatch.setattr(sweep, "WAIT_SECONDS", 0.5)
    stdout = run("--cluster", "--mem=1200M", "--gres=none", *chosen, eat, "--wait", status=1)
    assert not list_jobs() and " failed " in stdout
    *_, row, note = run("--status", *chosen, status=1).splitlines()
    assert " failed " in row and re.search(r"ExitCode 0:9; the end of save/.sweep/\d+_0.out: .*memory limit", note)
    assert run(*HELD, *chosen).count(": submitted") == 1  # a new submission starts over


def test_the_users_environment_and_a_slurm_that_hangs(cluster, monkeypatch, capsys, tmp_path):
    run(*HELD, "--models", cluster[0])
    monkeypatch.setenv("SQUEUE_STATES", "R")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SBATCH_WAIT", "1")
    assert "in the queue already" in run(*HELD, "--models", cluster[0])
    (tmp_path / "squeue").write_text("#!/bin/sh\nsleep 30\n")
    (tmp_path / "squeue").chmod(0o755)
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        context.setattr(slurm, "TIMEOUT", 0.6)
        start = time.time()
        run("--status", "--models", cluster[0])
        assert time.time() - start < 20
        assert "Slurm does not answer" in capsys.readouterr().err
    for options in (
        "--parsable",
        "-Q",
        "--chdir=/tmp",
        "--wrap=true",
        "-a 1-2",
        "--output=x",
        "--signal=USR1",
        "-J name",
        "--parsab",
        "-HQ",
    ):
        with pytest.raises(UserError, match="leave it out"):
            run("--cluster", "--dry-run", f"--sbatch={options}")


def test_status_and_cancel_without_options_are_of_everything(cluster):
    run(*HELD, "--models", cluster[0])
    run(*HELD, "--seeds", "3", "--models", cluster[1])
    stdout = run("--status", status=None)
    assert stdout.count("JobHeldUser") == 2 and "_seed=3" in stdout
    assert "cancelled 2 jobs" in run("--cancel")


# ------------------------------------------------------------------ the queue


def test_jobs_of_the_queue_are_told_apart(cluster):
    names = cluster
    stdout = run(*HELD, "--jobs=2")
    number = re.search(r"Submitted batch job (\d+)", stdout)[1]
    assert "ArrayTaskThrottle=2" in subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    assert sorted(list_jobs("%j")) == sorted(names)
    (comment,) = set(list_jobs("%k"))
    foreign = [
        "sbatch",
        "--parsable",
        "--mem=1M",
        "--hold",
        "--array=0-2",
        f"--comment={comment}x\nand\udce9",
        "--wrap",
        "true",
    ]
    foreign = subprocess.run(foreign, capture_output=True, text=True, check=True).stdout.strip()
    run(*HELD, "--seeds", "3", "4", "--models", names[0])
    for location in ("./data.mat", os.path.abspath("data.mat")):  # the same data as data.mat
        stdout = run(*HELD, "--", f"--data-location={location}")
        assert stdout.count("in the queue already") == 3 and "other options" not in stdout
    stdout = run(*HELD, "--models", names[0], "--", "--num-iterations=5")
    assert re.search(r"as job \w+, but with other options: num-iterations is 200000 there and 5 here; --cancel", stdout)
    assert [(c["state"], c["job"]) for c in get_cells("--models", *names)] == [
        ("queued", f"{number}_{i} (JobHeldUser)") for i in range(3)
    ]

    for path in (util.SAVE / names[0] / "logs", util.SAVE / "elsewhere" / "logs", util.SAVE / "not a run" / "logs"):
        path.mkdir(parents=True, exist_ok=True)
        if path.parent.name != "not a run":
            (path / "train.log").touch()
    stdout = run("--rm", "--dry-run")
    assert f"save/{names[0]} has jobs in the queue and stays" in stdout and stdout.splitlines()[-1] == "save/elsewhere"

    assert run("--cancel", "--dry-run", "--models", names[1]).startswith(f"would cancel {number}_1: {names[1]} train\n")
    assert len(list_jobs()) == 3 + 3 + 2
    stdout = run("--cancel", "--models", names[1])
    assert "cancelled 1 job" in stdout and "other runs from here are in the queue" in stdout
    assert [cells["state"] for cells in get_cells("--models", *names)] == ["queued", "stopped", "queued"]
    stdout = run("--cancel", "--models", *names)
    assert "cancelled 2 jobs" in stdout and all(re.search(rf"_seed={seed}_\S* \(1 job\)", stdout) for seed in (3, 4))
    assert "cancelled 2 jobs" in run("--cancel", "--seeds", "3", "4")
    wait_for(lambda: sorted(list_jobs()) == [f"{foreign}_{i}" for i in range(3)])


def test_what_slurm_refuses(cluster, om_repeat, monkeypatch):
    """Also where om-repeat says that all is well"""
    for flags in (["--partition=no"], ["--partition=no", "--no-repeat"], ["--no-repeat", "--sbatch", "--nodes 'a b'"]):
        with pytest.raises(UserError, match="(refused the job|sbatch failed): .*(partition|node count)"):
            run(*SUBMIT, *flags)
    assert not list_jobs() and "nothing to submit" not in run("--cluster", "--dry-run")
    with pytest.raises(UserError, match="--jobs .* om-repeat .* give --no-repeat"):
        run(*SUBMIT, "--jobs=2")
    with pytest.raises(UserError, match="no such file"):
        run(*SUBMIT, "--", "--data-location=nowhere.mat")
    assert run(*HELD).count(": submitted") == 3
    for kinds, num_new in [(["sleep", "rws"], 2), (["sleep", "rws", "vimco"], 1)]:
        assert run(*HELD, "--eval-logp", "--eval-algorithms", *kinds, "--models", cluster[0]).count(": submitted") == num_new
    evaluations = ["--cancel", "--eval-logp"]
    assert "cancelled 1 job" in run(*evaluations, "--eval-algorithms", "rws", "--models", cluster[0])
    assert "cancelled 2 jobs" in run(*evaluations)
    assert "cancelled 3 jobs" in run("--cancel")
    pathlib.Path("a folder").mkdir()
    shutil.copy("data.mat", "a folder")
    monkeypatch.chdir("a folder")
    with pytest.raises(UserError, match="om-repeat splits its command"):
        run(*SUBMIT)


def test_without_slurm(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{folder}:{pathlib.Path(shutil.which('bash')).parent}")
    pathlib.Path("squeue").write_text("#!/bin/bash\necho one >&2; echo 'squeue: error: nobody answers' >&2; exit 1\n")
    pathlib.Path("squeue").chmod(0o755)
    assert get_cells("--models", "mws_3")[0]["state"] == "waiting"
    assert capsys.readouterr().err == "warning: squeue failed: one squeue: error: nobody answers\n"
    stdout = run("--cluster", "--dry-run", "--models", "mws_3", "--gres=gpu:a100:1", "--sbatch=--qos='a b'")
    assert all(f" {word} " in stdout for word in ["--gres=gpu:a100:1", "'--qos=a b'"])
    assert "--cuda" in stdout.splitlines()[-1]
    assert "--cuda" not in run("--cluster", "--dry-run", "--models", "mws_3", "--no-cuda")
    stdout = run("--cluster", "--dry-run", "--models", "mws_3", "--time=none", "--mem=none").splitlines()[0]
    assert "--time" not in stdout and "--mem" not in stdout and "--signal=B:USR1@120 --requeue" in stdout
    for gres, others, on_gpu in [
        ("none", "", False),
        ("none", "--gres gpu:1", True),
        ("gpu:1", "--gres=none", False),
        ("none", "-H -G1", True),
    ]:
        stdout = run("--cluster", "--dry-run", "--models", "mws_3", f"--gres={gres}", f"--sbatch={others}")
        assert ("--cuda" in stdout) == on_gpu, (gres, others)


# ------------------------------------------------------------------ in a job


def test_a_run_saves_by_the_clock(monkeypatch):
    now, saves = [10_000.0], []
    monkeypatch.setattr(saving, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    clock = saving.SaveClock(5)
    for now[0] in range(10_000, 11_000):
        if clock.is_due():
            saves.append(now[0] - 10_000)
            clock.restart()
    assert saves == [300, 600, 900]


def test_a_job_waits_for_the_one_before_it(folder, monkeypatch, capsys):
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


def test_a_job_saves_before_its_end(tmp_path):
    """A fifth of its short limit before that; a signal long before the end, which is somebody's, counts at once"""
    code = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138)); time.sleep(30)"
    for seconds, least, most in [(3, 2.4, 3.5), (500, 0, 2)]:
        start = time.time()
        with open(tmp_path / "log", "w") as log, saving.StopSignal() as stop:
            stop.received = signal.SIGUSR1
            assert slurm.run_command([sys.executable, "-c", code], log, stop, start + seconds) == 138
        assert least <= time.time() - start <= most


def make_listing(task, setup=""):
    listing = slurm.Listing(slurm.FOLDER / "abc.json", [task], [], setup, {})
    util.write(listing.path, json.dumps(listing._asdict(), default=str).encode())
    return str(listing.path)


def test_a_job_without_the_gpu_that_it_was_given(folder):
    """Fails at once, and --status says why"""
    flags = [*util.get_flags(next(sweep.get_sweep_argss())), "--cuda"]
    path = make_listing(tasks.Task("mws_3", "train", flags, 200000))
    assert slurm.run_task(f"{path}:0") == 2
    (cells,) = get_cells("--models", "mws_3")
    assert cells["state"] == "failed" and cells["on"] == "GPU" and cells["log"] == "save/mws_3/logs/train.log"
    assert "no usable GPU" in run("--status", "--models", "mws_3", status=1)


def test_tasks_that_cannot_go_on(folder, monkeypatch):
    """Too many starts without progress since it was submitted; nothing to evaluate"""
    monkeypatch.setattr(tasks.Task, "get_command", lambda _: ["false"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    task = tasks.Task("run", "train", [], 1)
    where = f"{make_listing(task)}:0"
    for _ in range(2):
        tasks.open_log(task, ", submitted as job 7").close()
        assert [slurm.run_task(where) for _ in range(5)] == [1, 1, 1, 2, 2]
        assert "3 requeues without progress (at step 0): it does not start again" in tasks.get_log_end(task, 1)
    monkeypatch.setattr(slurm, "get_queue", lambda **_: [])
    (evaluation,) = sweep.get_tasks(sweep.parse_args(["--eval-logp", "--models", "rws_3", "--eval-algorithms", "rws"]))
    assert slurm.run_task(f"{make_listing(evaluation)}:0") == 2
    assert "nothing to evaluate" in run("--status", "--eval-logp", "--models", "rws_3", status=1)


def test_a_task_that_is_stopped_by_its_jobs_end_waits_to_be_killed(folder, monkeypatch):
    """Else om-repeat would take it for complete"""
    monkeypatch.setattr(slurm, "HOLD", 3)
    monkeypatch.setattr(tasks.Task, "get_command", lambda _: [sys.executable, "-c", "import sys; sys.exit(143)"])
    path = make_listing(tasks.Task("run", "train", [], 1), "echo set up")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    for where, is_chain in [(path, False), (f"{path}:0", True)]:
        start = time.time()
        assert slurm.run_task(where) == 143
        assert (time.time() - start > 3) == is_chain == ("waiting for Slurm to end this job" in read_log("run"))
    assert read_log("run").count("set up") == 2
