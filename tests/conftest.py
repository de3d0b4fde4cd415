import gc
import os
import pathlib
import shutil
import signal
import sys
import time
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a process for each core

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import scipy.io  # noqa: E402
import torch  # noqa: E402

import util  # noqa: E402

gc.set_threshold(50_000, 20, 20)  # of all that torch and its compiler import, little becomes garbage

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_ALPHABETS = 5
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def assert_near(got, want, tolerance, floor=0.0):
    """The norm of each difference is at most a tolerance times that of the tensor wanted, plus a floor"""
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + floor


def assert_same(a, b, name=""):
    """Two checkpoints, bit for bit"""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}/{i}")
    else:
        assert a == b or (a != a and b != b), name


def make_mat(num_train=200, num_test=40):
    """In chardata.mat's format, column by column: image i has ink in its top row, left part of i + 1 pixels"""
    random_state = np.random.RandomState(0)
    mat = {}
    for prefix, num in [("", num_train), ("test", num_test)]:
        images = np.zeros((num, 28, 28), np.float32)
        for i, image in enumerate(images):
            image[0, : i % 28 + 1] = 1
        mat[prefix + "data"] = images.transpose(0, 2, 1).reshape(num, 784).T
        mat[prefix + "target"] = np.eye(NUM_ALPHABETS, dtype=np.uint8)[np.arange(num) % NUM_ALPHABETS].T
        mat[prefix + "targetchar"] = random_state.randint(1, 9, (1, num))
    return mat


def fork(function):
    """Calls a function in a process of its own. Returns: the process's id"""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            sys.__stderr__.flush()
        finally:
            os._exit(1)
    return pid


def wait_for(condition, seconds=240, describe=lambda: ""):
    """Waits until a condition, a function, holds. Args: describe: a function that says, if it does not, what there is instead"""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, describe()
        time.sleep(0.1)


def find_chromium():
    """Its path, or None"""
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def pytest_addoption(parser):
    capabilities = parser.getgroup("strokes").addoption
    capabilities("--capability", type=int, default=90, help="of the GPU that kernels are compiled for where there is none")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data of 5 alphabets in chardata.mat's format"""
    monkeypatch.chdir(tmp_path)
    scipy.io.savemat("data.mat", make_mat(80, 6))
    return tmp_path


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Calls a script's main with arguments as its last lines do. Returns: (status, stdout, stderr)"""

    def run_script(script, *argv):
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
            patch.setattr(sys, "stdout", sys.stdout)  # run_script replaces them
            patch.setattr(sys, "stderr", sys.stderr)
            util.run_script(script.main)
        return end.value.code, *capsys.readouterr()

    return run_script


@pytest.fixture
def assert_refused(run_script):
    """Calls a script's main with arguments that it refuses, in one line with all of some words"""

    def assert_refused(script, argv, words):
        status, _, stderr = run_script(script, *argv)
        assert status == 2 and stderr.count("\n") == 1 and stderr.startswith(f"{script.__name__}.py: error:"), (argv, stderr)
        assert all(word in stderr for word in words), (argv, stderr)

    return assert_refused


@pytest.fixture
def stop_at(monkeypatch):
    """Sends the process a signal, once, when a script's run has reached an iteration and is about to take the next step"""

    def stop_at(script, iteration, number=signal.SIGTERM):
        train_step, numbers = script.train_step, [number]

        def interrupt(run, obs_id):
            if run.iteration == iteration and numbers:
                os.kill(os.getpid(), numbers.pop())
            return train_step(run, obs_id)

        monkeypatch.setattr(script, "train_step", interrupt)

    return stop_at


@pytest.fixture(scope="session")
def omniglot():
    """The folder with chardata.mat and the official release's zips, where there is one."""
    folder = pathlib.Path(os.environ.get("OMNIGLOT_PATH", ROOT.parent / "shared" / "data" / "omniglot"))
    if folder.is_file():
        folder = folder.parent
    if not (folder / "chardata.mat").exists():
        pytest.skip(f"no Omniglot at {folder}; set $OMNIGLOT_PATH")
    return folder


def pytest_collection_modifyitems(items):
    """What takes longest goes first: Slurm's tests, which mostly wait, beside those that compute"""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
