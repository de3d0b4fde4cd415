import os
import pathlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a process for each core

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]


def assert_near(got, want, tolerance, floor=0.0):
    """Each tensor is another one, to a tolerance of that one's norm"""
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + floor


def pytest_addoption(parser):
    capabilities = parser.getgroup("strokes").addoption
    capabilities("--capability", type=int, default=90, help="of the GPU that kernels are compiled for where there is none")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
    """What mostly waits goes first, beside what computes"""
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
