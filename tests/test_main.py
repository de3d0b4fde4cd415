"""The training script, end to end, as a user runs it."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.io
import torch
from test_data import make_mat
from test_util import cut, put_code

import util

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = (
    "--num-arcs 3 --num-primitives 5 --q-lstm-hidden-size 8 --obs-embedding-dim 8 --batch-size 7"
    " --num-particles 2 --memory-size 2 --log-interval 3 --no-compile"
).split()
SHORT = [*TINY, *"--pretrain-iterations 6 --num-iterations 12 --save-interval 5".split()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data of 5 alphabets in chardata.mat's format"""
    monkeypatch.chdir(tmp_path)
    scipy.io.savemat("data.mat", make_mat(80, 6))
    return tmp_path


def run(*flags, check=0, **options):
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert process.returncode == check, process.stderr + process.stdout
    return process


def get_run_folder():
    (folder,) = [path for path in pathlib.Path("save").iterdir() if path.is_dir()]
    return folder


def load_latest():
    return util.load_checkpoint(get_run_folder() / "checkpoints" / "latest.pt")


def assert_same(a, b, name=""):
    """Two checkpoints, bit for bit"""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}/{i}")
    else:
        assert a == b, name


@pytest.mark.parametrize("algorithm", ["mws", "rws", "vimco", "sleep"])
@pytest.mark.parametrize("conditional", [False, True])
def test_training(folder, algorithm, conditional):
    flags = ["--algorithm", algorithm, "--data-location", "data.mat", "--test-interval", "6", "--test-num-particles", "4"]
    process = run(*SHORT, *flags, *["--condition-on-alphabet"] * conditional)
    path = get_run_folder() / "checkpoints"
    assert str(path / "latest.pt") in process.stdout.splitlines()[-1]
    assert sorted(p.name for p in path.iterdir()) == ["1.pt", "10.pt", "2.pt", "3.pt", "6.pt", "latest.pt"]
    checkpoint = load_latest()
    statistics = checkpoint["statistics"]
    names = {"mws": ["prior_loss", "novel_proportion", "new_map"]}.get(algorithm, [])
    for name in ["theta_loss", "phi_loss", *names]:
        assert len(statistics[name]) == 12 and statistics[name].isfinite().all()
    assert len(statistics["pretrain_loss"]) == 6
    assert statistics["test_iteration"].tolist() == [6, 12]
    assert (statistics["test_log_p"] < 0).all() and (statistics["test_kl"] >= 0).all()
    assert checkpoint["num_alphabets"] == (5 if conditional else 0)
    assert torch.load(path / "latest.pt", weights_only=True)["iteration"] == 12
    assert "novel_proportion" in process.stderr or algorithm != "mws"


@pytest.mark.parametrize("algorithm", ["mws", "vimco"])
def test_killed_twenty_times_ends_with_the_same_bits(folder, algorithm):
    flags = [*TINY, *"--pretrain-iterations 60 --num-iterations 240 --save-interval 4 --data-location data.mat".split()]
    flags += ["--algorithm", algorithm, "--test-interval", "50", "--test-num-particles", "2"]
    run(*flags)
    expected = load_latest()
    get_run_folder().rename("expected")
    seconds = "1.0"
    command = [sys.executable, ROOT / "tests" / "kill.py", "20" if algorithm == "mws" else "5", "0", seconds, *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-2]) >= 5  # a fast machine may be done before the last
    assert_same(load_latest(), expected)
    for path in pathlib.Path("expected/checkpoints").glob("*.pt"):
        assert_same(util.load_checkpoint(get_run_folder() / "checkpoints" / path.name), util.load_checkpoint(path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_exit(folder, number):
    flags = [*TINY, *"--num-iterations 60 --pretrain-iterations 30 --data-location data.mat".split()]
    run(*flags)
    expected = load_latest()
    get_run_folder().rename("expected")
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    checkpoints = pathlib.Path("save") / pathlib.Path(expected_folder_name(flags)) / "checkpoints"
    while not (checkpoints / "2.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    start = time.perf_counter()
    stdout, _ = process.communicate(timeout=60)
    assert time.perf_counter() - start < 10
    assert process.returncode == 128 + number
    assert number.name in stdout and 2 <= load_latest()["iteration"] < 60
    assert "going on from iteration" in run(*flags).stdout
    assert_same(load_latest(), expected)


def expected_folder_name(flags):
    import main

    return util.get_path_base(main.parse_args(flags))


def test_a_complete_run_is_not_repeated(folder):
    flags = [*SHORT, "--data-location", "data.mat"]
    run(*flags)
    before = load_latest()
    run(*flags)
    assert_same(load_latest(), before)


def test_damaged_latest_goes_on_from_the_newest_intact_one(folder):
    flags = [*SHORT, "--data-location", "data.mat"]
    run(*flags)
    expected, checkpoints = load_latest(), get_run_folder() / "checkpoints"
    cut(checkpoints / "latest.pt")
    put_code(checkpoints / "10.pt")
    process = run(*flags)
    assert "going on from iteration 6 " in process.stdout
    assert len([line for line in process.stderr.splitlines() if line.startswith("warning:")]) == 3
    assert_same(load_latest(), expected)
    for path in checkpoints.iterdir():
        cut(path)
    assert_one_line(run(*flags, check=2), "no checkpoint in")


def assert_one_line(process, *words):
    assert process.stderr.count("\n") == 1 or "warning" in process.stderr, process.stderr
    line = process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr and line.startswith("main.py: error:")
    for word in words:
        assert word in line


def test_a_folder_with_other_settings_is_refused(folder):
    flags = [*SHORT, "--data-location", "data.mat"]
    run(*flags)
    checkpoint = (get_run_folder() / "checkpoints" / "latest.pt").read_bytes()
    other = pathlib.Path("save") / expected_folder_name([*flags, "--seed", "5", "--big-arcs"])
    get_run_folder().rename(other)
    process = run(*flags, "--seed", "5", "--big-arcs", check=2)
    assert_one_line(process, "seed is 0 there and 5 here", "big-arcs is False there and True here")
    assert (other / "checkpoints" / "latest.pt").read_bytes() == checkpoint
    other.rename(other.with_name(expected_folder_name(flags)))
    scipy.io.savemat("data.mat", make_mat(90, 6))
    assert_one_line(run(*flags, check=2), "data is")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data-location missing.mat", ["missing.mat"]),
        ("--data-location cut.mat", ["cut.mat", "damaged"]),
        ("--data-location data.mat --small-dataset --dataset-size 5", ["exclude"]),
        ("--data-location data.mat --dataset-size 500", ["500"]),
        ("--data-location plain.npy --condition-on-alphabet", ["no alphabets"]),
        ("--data-location data.mat --batch-size 0", ["--batch-size", "out of range"]),
        ("--data-location data.mat --num-particles many", ["--num-particles"]),
        ("--data-location data.mat --p-uniform-mixture 1.5", ["--p-uniform-mixture"]),
        ("--data-location data.mat --algorithm vimco --num-particles 1", ["vimco"]),
        ("--data-location data.mat --initial-max-curve 0.6", ["--initial-max-curve"]),
        ("--data-location data.mat --likelihood normal", ["--likelihood"]),
        ("--data-location data.mat --algorithm em", ["--algorithm"]),
        ("--no-such-flag", ["--no-such-flag"]),
        ("--cuda", ["GPU"]),
    ],
)
def test_bad_input(folder, flags, words):
    if "--cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pathlib.Path("cut.mat").write_bytes(pathlib.Path("data.mat").read_bytes()[:3000])
    np.save("plain.npy", np.zeros((20, 28, 28)))
    assert_one_line(run(*flags.split(), check=2), *words)
    assert not pathlib.Path("save").exists()


def test_an_unwritable_folder(folder):
    pathlib.Path("save").write_text("a file where the folder should be")
    assert_one_line(run(*SHORT, "--data-location", "data.mat", check=2), "save")


def test_full_disk(folder):
    """A real full disk: a tmpfs of one megabyte."""
    disk = folder / "save"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        process = run(*SHORT, "--data-location", "data.mat", check=2)
        assert "No space left" in process.stderr and "Traceback" not in process.stderr
        saved = list((get_run_folder() / "checkpoints").iterdir())
        assert saved and all(util.load_checkpoint(path) for path in saved)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_divergence_is_reported(folder):
    process = run(*SHORT, "--data-location", "data.mat", "--prior-lr-factor", "1e38", check=2)
    assert "no longer finite" in process.stderr.splitlines()[-1]


def test_test_run(folder):
    start = time.perf_counter()
    process = run("--test-run")
    assert time.perf_counter() - start < 120
    assert "trained" in process.stdout
    assert get_run_folder().name.startswith("test_run_")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["mws", "rws", "vimco"])
def test_learns_real_characters(omniglot, folder, algorithm):
    """A part of the README's claim; the whole of it takes the command there."""
    flags = "--small-dataset --batch-size 50 --pretrain-iterations 20 --num-iterations 40 --no-compile".split()
    flags += ["--num-particles", "5" if algorithm == "mws" else "10", "--memory-size", "5", "--algorithm", algorithm]
    run(*flags, "--data-location", str(omniglot / "chardata.mat"))
    loss = load_latest()["statistics"]["theta_loss"]
    assert loss[:3].mean() - loss[-3:].mean() > 20


def test_conditional_on_real_alphabets(omniglot, folder):
    run(*SHORT, "--data-location", str(omniglot / "chardata.mat"), "--small-dataset", "--condition-on-alphabet")
    checkpoint = load_latest()
    assert checkpoint["num_alphabets"] == 50
    assert checkpoint["generative_model"]["prior.lstm.weight_ih"].shape[1] == 5 + 2 + 50
