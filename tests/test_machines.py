"""What may happen to a run's data, folders and machines: data move, file systems cannot lock, memory is limited, there is no
Linux, nobody looks at a terminal."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import scipy.io
import torch
from conftest import ROOT, assert_same, fork, make_mat, wait_for
from test_main import SHORT, TINY, get_run_folder, load_latest, run

import data
import eval_logp
import main
import sweep
import util
from cluster import tasks
from runs import checkpoints, locks
from runs.saving import StopSignal
from util import UserError

# ------------------------------------------------------------------ data that move

LONG = "--p-lstm-hidden-size 5 --p-uniform-mixture 0.1 --q-uniform-mixture 0.2 --prior-lr-factor 0.7".split()


@pytest.mark.parametrize("flags", [[], ["--name", "mine"], LONG])  # with LONG, the folder's name is cut off
def test_a_run_goes_on_wherever_its_data_are(folder, flags):
    run(*SHORT, *flags, "--data-location", "data.mat")
    expected = load_latest()
    shutil.rmtree("save")
    run(*SHORT, *flags, "--data-location", "data.mat", "--num-iterations", "5")
    started = get_run_folder()
    pathlib.Path("job/12").mkdir(parents=True)
    pathlib.Path("data.mat").rename("job/12/staged.mat")
    (started / "checkpoints/latest.pt").write_bytes(b"damaged")
    run(*SHORT, *flags, "--data-location", "job/12/staged.mat")
    assert get_run_folder() == started
    assert load_latest()["args"]["data_location"] != expected.pop("args")["data_location"]
    assert_same({name: value for name, value in load_latest().items() if name in expected}, expected)


def test_other_data_are_another_run(folder, monkeypatch):
    """In a place of the same name; changed where they are, they are refused. Omniglot counts as well, wherever it is"""
    monkeypatch.setenv("OMNIGLOT_PATH", "data.mat")
    run(*SHORT, "--num-iterations", "5")
    started = get_run_folder()
    run(*SHORT, "--num-iterations", "7", "--data-location", "data.mat")
    assert get_run_folder() == started and load_latest()["iteration"] == 7
    pathlib.Path("other").mkdir()
    scipy.io.savemat("other/data.mat", make_mat(90, 6))
    run(*SHORT, "--data-location", "other/data.mat", "--num-iterations", "2")
    assert len(list(util.SAVE.iterdir())) == 2 and checkpoints.load_newest(checkpoints.get_path(started.name))["iteration"] == 7
    scipy.io.savemat("other/data.mat", make_mat(70, 6))
    with pytest.raises(UserError, match="data is .* there and .* here"):
        run(*SHORT, "--data-location", "other/data.mat")


def test_a_sweep_finds_runs_whose_data_moved(folder, monkeypatch, capsys):
    flags = [*SHORT, "--num-iterations", "2"]
    monkeypatch.setattr(sweep, "get_sweep_argss", lambda *_: [main.parse_args(flags)])
    monkeypatch.setattr(sweep.report, "ALGORITHMS", ["rws"])
    run(*flags, "--data-location", "data.mat")
    started = get_run_folder().name
    os.mkdir("there")
    pathlib.Path("data.mat").rename("there/data.mat")
    settings = ["--", "--data-location", "there/data.mat"]
    assert list(sweep.get_runs(sweep.parse_args(settings))) == [started]
    assert sweep.main(settings) == 0 and "1 task complete already" in capsys.readouterr().out
    task, *_ = sweep.get_tasks(sweep.parse_args(["--eval-logp", *settings]))
    assert task.model == started and "--data-location=there/data.mat" in task.flags
    evaluation = ["--eval-logp", "--eval-algorithms", "own", "--eval-options=--num-data 2 --test-num-particles 3 --no-compile"]
    assert sweep.main([*evaluation, *settings]) == 0 and ": done" in capsys.readouterr().out
    os.renames("there/data.mat", "elsewhere/data.mat")
    settings[-1] = "elsewhere/data.mat"
    assert sweep.main([*evaluation, *settings]) == 0 and "1 task complete already" in capsys.readouterr().out
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("loads data only to name a run"))
    assert list(sweep.get_runs(sweep.parse_args(["--", "--data-location", "there/data.mat", "--seed=3"]))) != [started]


# ------------------------------------------------------------------ files and folders


def test_a_file_system_without_locks(folder, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    run(*SHORT, "--data-location", "data.mat", "--num-iterations", "2")
    stderr = capsys.readouterr().err
    assert stderr.count("warning: ") == 1 and f"nothing can be locked in {folder}" in stderr
    assert os.strerror(errno.ENOLCK) in stderr and not locks.is_locked(get_run_folder() / "lock")
    for _ in range(2):  # a lock for each checkpoint, one warning
        evaluation = "--algorithm own --every-checkpoint --num-data 2 --test-num-particles 3 --no-compile --checkpoint-path"
        assert eval_logp.main([*evaluation.split(), str(get_run_folder())]) == 0
    assert capsys.readouterr().err.count("nothing can be locked") == 1


def test_whether_a_file_is_locked(tmp_path):
    """Asking does not keep a run from starting"""
    path, asking = tmp_path / "lock", []
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as is_locked does
        asking.append(file)
        assert not locks.is_locked(path)
        with pytest.raises(UserError, match="is busy by another process"), locks.lock(path, "is busy"):
            pass
    with locks.lock(path, "is busy"):
        assert locks.is_locked(path)
    assert not locks.is_locked(path) and not locks.is_locked(tmp_path / "none")


def test_several_processes_write_the_same_file(tmp_path):
    path = tmp_path / "index.html"

    def write(text):
        for _ in range(100):
            util.write(path, text * 50_000)

    writers = [fork(functools.partial(write, text)) for text in (b"a", b"b", b"c")]
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0] * 3
    assert len(set(path.read_bytes())) == 1 and os.listdir(tmp_path) == ["index.html"]


def test_what_a_killed_writer_leaves_is_removed(tmp_path):
    def die():
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        util.write(tmp_path / "1.pt", b"x")

    assert os.waitpid(fork(die), 0)[1] == signal.SIGKILL
    assert re.fullmatch(r"\.1\.pt\..*\.tmp", *os.listdir(tmp_path))
    os.utime(next(tmp_path.iterdir()), (0, 0))
    (tmp_path / ".1.pt.2.tmp").write_bytes(b"being written")
    util.write(tmp_path / "1.pt", b"x")
    assert sorted(os.listdir(tmp_path)) == [".1.pt.2.tmp", "1.pt"]
    assert (tmp_path / "1.pt").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))


def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    util.write(tmp_path / "x", b"y")
    assert (tmp_path / "x").read_bytes() == b"y"


def test_a_link_to_nowhere_is_named(folder, assert_refused):
    pathlib.Path("save").symlink_to("/scratch/purged")
    words = "save is a link to /scratch/purged, which does not exist"
    assert_refused(main, [*SHORT, "--data-location", "data.mat"], [words])


def test_line_ends_do_not_depend_on_gits_settings(tmp_path):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no clone, or no git")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    (tmp_path / "job.sh").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "x.pt").write_bytes(b"\0\1\n\2\r\n")
    git = ["git", "-C", tmp_path, "-c", "core.autocrlf=true", "-c", "user.name=x", "-c", "user.email=x"]
    for command in ["init -q", "add -A", "commit -qm x", "rm -q *.sh *.pt", "reset -q --hard"]:
        subprocess.run([*git, *command.split()], check=True)
    assert (tmp_path / "job.sh").read_bytes() == b"#!/bin/sh\n" and (tmp_path / "x.pt").read_bytes() == b"\0\1\n\2\r\n"


# ------------------------------------------------------------------ other systems than Linux

WITHOUT_LINUX = """
import builtins, ctypes, io, os
del os.sched_getaffinity, os.sched_setaffinity
def refusing(function):
    def call(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *args, **kwargs)
    return staticmethod(call)  # a class may keep it, as pathlib of Python 3.10 does
builtins.open = io.open = refusing(io.open)
os.stat = refusing(os.stat)
class Library:
    def __init__(self, library): self.library = library
    def __getattr__(self, name):
        if name == "prctl": raise AttributeError("dlsym(RTLD_DEFAULT, prctl): symbol not found")
        return getattr(self.library, name)
load = ctypes.CDLL
ctypes.CDLL = lambda name, *args, **kwargs: Library(load(name)) if name is None else load(name, *args, **kwargs)
"""


def test_without_what_only_linux_has(folder):
    """As on macOS; in a process of its own, and those that it starts"""
    pathlib.Path("sitecustomize.py").write_text(WITHOUT_LINUX)
    flags = [*TINY, "--data-location", "data.mat", "--pretrain-iterations", "1", "--num-iterations", "2"]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import diagnostics, eval_logp, main, sweep, util
def run():
    assert not util.pathlib.Path("/proc/self").exists()
    assert main.main({flags!r}) == 0
    evaluate = "--algorithm own --num-data 2 --test-num-particles 3 --no-compile --checkpoint-path".split()
    assert eval_logp.main([*evaluate, *map(str, util.SAVE.glob("*"))]) == 0
    assert diagnostics.main(["--num-reconstructions=2", "--num-prior-samples=2"]) == 0
    sweep.get_sweep_argss = lambda *_: [main.parse_args([*{flags!r}, "--name=swept"])]
    assert sweep.main(["--jobs=2"]) == 0 and sweep.main(["--status"]) == 0
util.run_script(run)
"""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "swept: done, 2 iterations" in process.stdout and "drawn at iteration 2" in process.stdout
    assert hasattr(ctypes.CDLL(None), "prctl") == (sys.platform == "linux")


# ------------------------------------------------------------------ logs and signals


def test_a_log_has_whole_lines(folder, monkeypatch, capfd):
    run(*SHORT, "--data-location", "data.mat")
    stderr = capfd.readouterr().err
    assert "\r" not in stderr and stderr.endswith("\n")
    first, last = stderr.splitlines()  # within twenty seconds
    assert first.startswith("0%| 0/18 [00:00<?") and re.search(r"training: 100%\| 18/18 .*theta_loss=\d+", last)
    monkeypatch.setattr(util, "LOG_INTERVAL", 0.2)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with util.show_progress(total=100, desc="searching", unit="round") as bar:
        for _ in range(100):
            time.sleep(0.01)
            bar.update()
    lines = sys.stderr.getvalue().splitlines()
    assert 4 <= len(lines) <= 8 and all(re.fullmatch(r"searching: +\d+%\| \d+/100 \[.*round/s\]|.*\?round.*", x) for x in lines)
    path = tasks.Task("run", "train", [], 1).get_path("log")
    util.write(path, "\n".join(["trained", *lines, "12 of 3/4 [sic]", "a:  3%|  | 3/9 [00:01<00:03, 2.0s/it]"]).encode())
    assert tasks.read_log(tasks.Task("run", "train", [], 1)) == ["trained", "12 of 3/4 [sic]"]


def test_a_second_ctrl_c_ends_a_program_at_once(tmp_path):
    received = tmp_path / "received"

    def loop():
        with StopSignal() as stop:
            (tmp_path / "started").touch()
            while True:
                time.sleep(0.01)
                if stop.received is not None:
                    received.touch()

    pid = fork(loop)
    wait_for((tmp_path / "started").exists, 10)
    os.kill(pid, signal.SIGTERM)
    wait_for(received.exists, 10)
    received.unlink()
    os.kill(pid, signal.SIGINT)
    wait_for(received.exists, 10)
    os.kill(pid, signal.SIGINT)
    assert os.waitpid(pid, 0)[1] == signal.SIGINT


def test_a_ctrl_c_reaches_the_runs_of_a_sweep_once(folder, monkeypatch):
    """Though a terminal sends it to all processes of its group"""
    script = "trap 'echo asked to stop' INT; echo started; while [ $SECONDS -lt 60 ]; do sleep 0.05; [ ! -f end ] || exit; done"
    monkeypatch.setattr(tasks.Task, "get_command", lambda _: ["bash", "-c", script])
    task = tasks.Task("run", "train", [], 1)

    def sweep_on():
        os.setpgid(0, 0)
        with StopSignal() as stop, contextlib.redirect_stdout(io.StringIO()):
            tasks.run_all([task], 1, [], stop)

    pid = fork(sweep_on)
    wait_for(lambda: "started" in tasks.read_log(task), 10)
    os.killpg(pid, signal.SIGINT)
    wait_for(lambda: "asked to stop" in tasks.read_log(task), 10)
    time.sleep(0.3)
    pathlib.Path("end").touch()
    assert os.waitpid(pid, 0)[1] == 0 and tasks.read_log(task).count("asked to stop") == 1


# ------------------------------------------------------------------ TensorBoard, compilation


def test_tensorboard_shows_all_of_a_resumed_run(folder):
    """Killed after it had logged what it had not saved; the files are read back"""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = [*TINY, *"--pretrain-iterations 9 --log-interval 1 --tensorboard --data-location data.mat".split()]
    run(*flags, "--num-iterations", "3")
    run_folder = get_run_folder()
    shutil.copytree(run_folder / "checkpoints", "saved")
    run(*flags, "--num-iterations", "6")
    shutil.rmtree(run_folder / "checkpoints")
    shutil.copytree("saved", run_folder / "checkpoints")
    run(*flags, "--num-iterations", "5", "--test-interval", "5", "--test-num-particles", "2")
    events = accumulator.EventAccumulator(str(run_folder / "tensorboard")).Reload()
    statistics = load_latest()["statistics"]
    for tag, name, steps in [
        ("pretrain/phi_loss", "phi_loss", range(1, 10)),
        ("train/theta_loss", "theta_loss", range(1, 6)),
        ("test/test_kl", "test_kl", [5]),
    ]:
        scalars = events.Scalars(tag)
        assert [x.step for x in scalars] == list(steps), tag
        assert torch.tensor([x.value for x in scalars]).equal(statistics[tag.split("/")[0]][name])
