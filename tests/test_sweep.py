"""Sweeps of small models: here, on a real Slurm, and what one may do wrong."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import scipy.io
import torch
from test_data import make_mat
from test_main import assert_same

import eval_logp
import locks
import main
import slurm
import sweep
import tasks
import util
from util import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = (
    "--data-location data.mat --likelihood bernoulli --num-primitives 5 --num-arcs 3"
    " --q-lstm-hidden-size 8 --obs-embedding-dim 8 --batch-size 5 --num-particles 2 --memory-size 2 --no-compile"
)
# sweep.py with two models in place of the paper's, as a script
SMALL_SWEEP = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import sweep, test_sweep, util
sweep.get_sweep_argss = lambda *_: test_sweep.get_small_argss(FLAGS)
util.run_script(sweep.main)
"""


def get_small_argss(flags):
    for algorithm in ["mws", "rws"]:
        yield main.parse_args([*TINY.split(), "--algorithm", algorithm, *flags])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scipy.io.savemat("data.mat", make_mat(80, 6))
    return tmp_path


@pytest.fixture
def make_sweep(folder, monkeypatch):
    """Puts two small models, which take the given flags of main.py, in place of the paper's. Returns: their path bases"""

    def make(flags):
        flags = flags.split()
        pathlib.Path("small_sweep.py").write_text(SMALL_SWEEP.replace("FLAGS", repr(flags)))
        monkeypatch.setattr(sweep, "get_sweep_argss", lambda *_: get_small_argss(flags))
        monkeypatch.setattr(
            sweep,
            "TEST_RUN_EVALUATION",
            "--num-data=3 --num-iterations=5 --num-particles=5 --test-num-particles=20".split(),
        )
        return [util.get_path_base(args) for args in get_small_argss(flags)]

    return make


def run(*flags, status=0):
    """Runs sweep.py in this process. Returns: what it printed"""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert sweep.main(list(flags)) == status, stdout.getvalue()
    return stdout.getvalue()


def report():
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        eval_logp.main(["--report"])
    return stdout.getvalue()


def load(name):
    return util.load_checkpoint(util.get_checkpoint_path(name))


# ------------------------------------------------------------------ what there is to do


def test_the_models_of_the_paper():
    argss = list(sweep.get_sweep_argss())
    names = [util.get_path_base(args) for args in argss]
    singles = [f"{algorithm}_{num}" for algorithm in ("mws", "rws", "vimco") for num in (3, 5, 10, 20, 40)]
    assert names == [*singles, "a_mws_40_large"]
    mws = [(args.num_particles, args.memory_size) for args in argss[:5]]
    assert mws == [(1, 2), (2, 3), (5, 5), (10, 10), (20, 20)]
    assert [args.num_particles for args in argss[5:10]] == [3, 5, 10, 20, 40]
    assert argss[-1].num_particles == argss[-1].memory_size == 20 and argss[-1].condition_on_alphabet
    for test_run in (False, True):
        argss = list(sweep.get_sweep_argss(test_run, "glyphs"))
        assert len({util.get_path_base(args) for args in argss}) == 16
        for args in argss:
            flags = sweep.get_flags(args)
            assert all(re.fullmatch(r"--[\w=./-]+", flag) for flag in flags)
            assert vars(main.parse_args(flags)) == vars(args)


def test_dry_run_prints_what_would_be_run(folder):
    stdout = run("--dry-run", "--models", "rws_5", "a_mws_40_large")
    expected = [
        f"{sys.executable} {ROOT}/main.py --small-dataset --algorithm=rws --num-particles=5",
        f"{sys.executable} {ROOT}/main.py --condition-on-alphabet --num-particles=20 --memory-size=20",
    ]
    assert stdout.splitlines() == expected
    assert not pathlib.Path("save").exists()


# ------------------------------------------------------------------ here


def test_sweep_here(make_sweep, monkeypatch):
    """Trained two at a time, interrupted, killed, gone on with; evaluated, reported, deleted"""
    models = make_sweep("--pretrain-iterations 5 --num-iterations 300 --save-interval 10")
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "small_sweep.py", "--jobs", "2"], stdout=subprocess.PIPE, text=True)
        reached = 10 if number == signal.SIGINT else 63
        while not all(util.get_checkpoint_path(name, reached).exists() for name in models):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=60)
        wait_for(lambda: not any(locks.is_locked(util.SAVE / name / "lock") for name in models), 30)
        if number == signal.SIGINT:
            assert process.returncode == 128 + number and stdout.count("stopped, goes on when the sweep does") == 2
            assert all("stopped by SIGINT" in tasks.get_log_end(tasks.Task(name, "train", [], 300)) for name in models)
        assert all(reached <= load(name)["iteration"] < 300 for name in models)
    stdout = run("--jobs", "2")
    assert "2 of 2 done" in stdout and len(re.findall(r"^\w+.*: done, 300 iterations", stdout, re.M)) == 2
    stdout = run("--status")
    assert [line.split()[1:3] for line in stdout.splitlines()[1:]] == [["done", "300/300"]] * 2
    went_on = [load(name) for name in models]
    shutil.rmtree("save")
    run("--jobs", "2")
    for checkpoint, name in zip(went_on, models, strict=True):
        assert_same(checkpoint, load(name))
    assert "2 are complete already\n0 of 0 done" in run()

    assert "3 of 3 done" in run("--eval-logp", "--test-run", "--jobs", "2", "--models", models[1])
    paths = [f"save/{models[1]}/logp/test_{algorithm}.pt" for algorithm in ("sleep", "rws", "vimco")]
    values = [f"{torch.load(path, weights_only=True)['log_p']:.2f}" for path in paths]
    stdout = run("--status", "--eval-logp", "--test-run", "--models", models[1])
    assert [line.split()[1:5:2] for line in stdout.splitlines()[1:]] == [
        [a, "300/300"] for a in ("sleep", "rws", "vimco")
    ]
    assert [(line.split()[2], line.split()[4]) for line in stdout.splitlines()[1:]] == [("done", v) for v in values]
    stdout = report()
    assert all(value in stdout for value in values)

    pathlib.Path("save/notes").mkdir()
    stdout = run("--rm", "--dry-run")
    assert sorted(stdout.splitlines()) == sorted(f"save/{name}" for name in models)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert "nothing is deleted" in run("--rm", status=1)
    assert "deleted 2 runs" in run("--rm", "--yes")
    assert sorted(path.name for path in pathlib.Path("save").iterdir()) == ["logp.csv", "logp.pdf", "notes"]


def test_failures_and_locks(make_sweep):
    models = make_sweep("--pretrain-iterations 0 --num-iterations 8")
    task = tasks.Task(models[0], "train", [], 8)
    (util.SAVE / models[1] / "checkpoints").mkdir(parents=True)
    pathlib.Path(util.get_checkpoint_path(models[1])).write_bytes(b"PK broken")
    with locks.lock_run(models[0]):
        stdout = run("--jobs", "2", status=1)
        assert f"{models[0]}: is being worked on by process {os.getpid()} on" in stdout
        assert (
            f"{models[1]}: failed with status 2, see save/{models[1]}/logs/train.log" in stdout
            and "is intact" in stdout
        )
        assert "0 of 2 done" in stdout
        stdout = run("--status")
        assert [line.split()[1] for line in stdout.splitlines()[1:]] == ["running", "failed"]
        stdout = run("--rm", "--dry-run")
        assert "is being worked on and stays" in stdout and stdout.splitlines()[-1] == f"save/{models[1]}"
    assert not tasks.get_progress(task).done


BAD_INPUT = [
    ("--jobs 0", ["--jobs", "out of range"]),
    ("--cluster", ["no sbatch on the PATH"]),
    ("--cancel", ["no scancel on the PATH"]),
    ("--models mws_4", ["mws_4", "not in the sweep"]),
    ("--cluster --dry-run --time soon", ["--time soon"]),
    ("--status --rm", ["exclude"]),
    ("--test-run --models test_run_mws_3", ["save"]),
]


def test_bad_input(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    pathlib.Path("save").write_text("a file where the folder should be")
    for flags, words in BAD_INPUT:
        with pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "argv", ["sweep.py", *flags.split()])
            util.run_script(sweep.main)
        stderr = capsys.readouterr().err
        assert end.value.code == 2 and stderr.count("\n") == 1 and all(word in stderr for word in words), stderr


def test_times():
    for text, seconds in [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-00:00:30", 86430)]:
        assert slurm.get_seconds(text) == seconds


# ------------------------------------------------------------------ on Slurm


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory):
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm to start: {', '.join(missing) or 'needs root'}")
    folder = tmp_path_factory.mktemp("slurm")
    process = subprocess.run([ROOT / "tests/start-slurm.sh", folder], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr
    yield folder / "slurm.conf"
    for name in ("slurmctld", "slurmd"):
        with contextlib.suppress(OSError):
            os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def cluster(slurm_conf, folder, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    yield
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout, 60)


def wait_for(condition, seconds=240):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.5)


def get_states(*flags):
    """Of each task, as --status shows it"""
    stdout = run("--status", *flags)
    return [re.search(r"  (waiting|running|done|failed)  ", line)[1] for line in stdout.splitlines()[1:]]


SUBMIT = ["--cluster", "--mem=1G", "--gres=none"]


@pytest.mark.xdist_group("slurm")
def test_sweep_on_slurm(cluster, make_sweep):
    """Stopped for lack of time, requeued, finished, with the bits of a run here; then evaluated"""
    models = make_sweep("--pretrain-iterations 0 --num-iterations 100")
    run("--models", models[0])
    saved = [util.get_checkpoint_path(models[0], iteration).stat().st_mtime for iteration in (25, 100)]
    num_iterations = round((100 - 25) / (saved[1] - saved[0]) * 28)  # 28 s, where a job has up to 25
    shutil.rmtree("save")
    models = make_sweep(f"--pretrain-iterations 0 --num-iterations {num_iterations} --save-interval 100")
    assert "Submitted batch job" in run(*SUBMIT, "--time=1")
    assert "in the queue already" in run(*SUBMIT)
    wait_for(lambda: "running" in get_states())
    assert len(slurm.get_jobs(False, None)) == 2
    wait_for(lambda: get_states() == ["done"] * 2)
    logs = {name: (util.SAVE / name / "logs/train.log").read_text() for name in models}
    stopped = next(name for name, log in logs.items() if "stopped by SIGUSR1" in log)
    assert "resuming at iteration" in logs[stopped]
    finished = load(stopped)
    wait_for(lambda: not slurm.get_jobs(False, None))
    evaluation = ["--eval-logp", "--test-run", "--models", models[0]]
    run(*SUBMIT, *evaluation)
    wait_for(lambda: get_states(*evaluation) == ["done"] * 3)
    stdout = report()
    assert re.search(rf"^{re.escape(models[0])} ", stdout, re.M) and "missing" not in stdout
    shutil.rmtree("save")
    run("--models", stopped)
    assert_same(finished, load(stopped))


@pytest.mark.xdist_group("slurm")
def test_cancel_and_om_repeat(cluster, make_sweep, monkeypatch):
    foreign = ["sbatch", "--parsable", "--mem=1M", "-J", "strokes-of-another", "--wrap", "sleep 600"]
    foreign = subprocess.run(foreign, capture_output=True, text=True, check=True).stdout.strip()
    make_sweep("--pretrain-iterations 10 --num-iterations 100000")
    run(*SUBMIT)
    assert "cancelled 2 jobs" in run("--cancel")
    wait_for(lambda: not slurm.get_jobs(False, None))
    queue = subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True).stdout.split()
    assert queue == [foreign]
    subprocess.run(["scancel", foreign], check=True)

    # A stand-in that does with its arguments what the real one does
    pathlib.Path("om-repeat").write_text(
        '#!/bin/sh\nexec sh -c "$(echo "$*" | sed "s/ -J \\([^ ]*\\) / -J \\1_repeat_1 /") >> om-repeat.log"\n'
    )
    pathlib.Path("om-repeat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.getcwd()}:{os.environ['PATH']}")
    models = make_sweep("--pretrain-iterations 3 --num-iterations 10")
    stdout = run(*SUBMIT, "--dry-run")
    commands = [line for line in stdout.splitlines() if line.startswith("om-repeat sbatch --time=2:00:00 --mem=1G ")]
    assert len(commands) == 2 and all(f" -J {slurm.get_tag(False, None)}-train-" in command for command in commands)
    run(*SUBMIT)
    assert {job.index for job in slurm.get_jobs(False, None)} == {0, 1}
    wait_for(lambda: get_states() == ["done"] * 2)
    assert all((util.SAVE / name / "logs/train.log").exists() for name in models)
    pathlib.Path("a folder").mkdir()
    monkeypatch.chdir("a folder")
    with pytest.raises(UserError, match="om-repeat splits its command"):
        run(*SUBMIT)
    with pytest.raises(UserError, match="sbatch refused the job: .*partition"):
        slurm.submit(
            [(0, tasks.Task("x", "train", [], 1))], sweep.parse_args([*SUBMIT, "--no-repeat", "--partition=no"])
        )


def test_tasks_share_the_gpus_that_the_sweep_may_use(folder, monkeypatch):  # noqa: F811
    """And no others: those named by the parent's CUDA_VISIBLE_DEVICES, if it is set"""
    seen = []
    monkeypatch.setattr(tasks.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(tasks.subprocess, "Popen", lambda *_, env, **__: seen.append(env) or types.SimpleNamespace(pid=0))
    task = tasks.Task("run", "train", [], 1)
    for visible, expected in [("4,5", ["4", "5", "4"]), (None, ["0", "1", "0"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"])]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        seen.clear()
        for slot in range(3):
            tasks.start(task, slot, 3, 2)
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == expected
