import os
import pathlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a process for each core

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]


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
    """What mostly waits goes first, to two workers; each begins with an equal part of the list"""
    waiting, others = ([item for item in items if bool(item.get_closest_marker("waits")) == waits] for waits in (True, False))
    first, second = waiting[::2], waiting[1::2]
    place = max(len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) - len(first), 0)
    items[:] = first + others[:place] + second + others[place:]
