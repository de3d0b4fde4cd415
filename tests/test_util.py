"""Folders of runs, checkpoints, bad files."""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import zipfile
from typing import Annotated

import pytest
import torch

import data
import main
import models
import util
from runs import checkpoints, locks
from util import UserError

DIFFERENT = dict(
    seed=["--seed", "1"],
    data_location=["--data-location", "glyphs"],
    data_path=["--data-location", "a/b.mat"],
    other_path=["--data-location", "a-b.mat"],
    small_dataset=["--small-dataset"],
    dataset_size=["--dataset-size", "100"],
    batch_size=["--batch-size", "100"],
    condition_on_alphabet=["--condition-on-alphabet"],
    likelihood=["--likelihood", "affine"],
    num_arcs=["--num-arcs", "5"],
    num_primitives=["--num-primitives", "32"],
    initial_max_curve=["--initial-max-curve", "0.2"],
    big_arcs=["--big-arcs"],
    p_lstm_hidden_size=["--p-lstm-hidden-size", "8"],
    p_uniform_mixture=["--p-uniform-mixture", "0.1"],
    q_lstm_hidden_size=["--q-lstm-hidden-size", "32"],
    q_uniform_mixture=["--q-uniform-mixture", "0.1"],
    obs_embedding_dim=["--obs-embedding-dim", "32"],
    rws=["--algorithm", "rws"],
    vimco=["--algorithm", "vimco"],
    sleep=["--algorithm", "sleep"],
    tvo=["--algorithm", "tvo"],
    num_partitions=["--algorithm", "tvo", "--num-partitions", "7"],
    log_beta_min=["--algorithm", "tvo", "--log-beta-min", "-2"],
    num_particles=["--num-particles", "5"],
    memory_size=["--memory-size", "5"],
    split=["--num-particles", "5", "--memory-size", "15"],
    find_characters=["--find-characters"],
    prior_lr_factor=["--prior-lr-factor", "0.1"],
    pretrain_iterations=["--pretrain-iterations", "100"],
    test_run=["--test-run"],
)


def test_path_base():
    for flags, expected in [
        ([], "mws_20_large"),
        (["--small-dataset"], "mws_20"),
        (["--small-dataset", "--condition-on-alphabet", "--num-particles", "20", "--memory-size", "20"], "a_mws_40"),
        (["--small-dataset", "--algorithm", "vimco", "--num-particles", "5"], "vimco_5"),
        (["--small-dataset", "--num-particles", "1", "--memory-size", "2"], "mws_3"),
        (["--small-dataset", "--seed", "3", "--prior-lr-factor", "1"], "mws_20_seed=3"),
        (["--data-location", "om", "--small-dataset"], "mws_20"),  # the same data
        (["--cuda", "--save-interval", "10", "--log-interval", "3", "--test-interval", "7"], "mws_20_large"),
        (["--algorithm", "rws", "--memory-size", "3"], "rws_10_large"),  # rws has no memory
        (["--num-iterations", "100"], "mws_20_large"),  # a run can be continued
        (["--name", "mine", "--seed", "3"], "mine"),
        (["--name", "mine", "--test-run"], "test_run_mine"),
        (["--test-run"], "test_run_mws_20_large"),
        (["--test-run", "--likelihood", "affine"], "test_run_mws_20_large_likelihood=affine"),
        (["--test-run", "--algorithm", "rws", "--num-particles", "40"], "test_run_rws_40_large"),
    ]:
        assert util.get_path_base(main.parse_args(flags)) == expected


def test_names_of_data_locations(monkeypatch):
    monkeypatch.setitem(util.SITES, "lab", pathlib.Path("/lab/chardata.mat"))
    assert [util.get_location_name(location) for location in ("local", "om", "lab", "glyphs")] == [*["local"] * 3, "glyphs"]
    names = {util.get_path_base(main.parse_args(["--data-location", path])) for path in ("données.npy", "手書き", "手書")}
    assert len(names) == 3 and any("_data-location=donn-es.npy-" in name for name in names)


def test_seeds_give_different_numbers():
    drawn = set()
    for seed in (5, 5 + 2**32, 5 + 2**33, 2**63 - 1, 2**64 + 5):
        util.set_seed(seed)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 5


def test_long_names_of_seeds_differ_in_the_seed_alone():
    flags = [flag for key, flags in DIFFERENT.items() if key not in ("seed", "dataset_size", "vimco") for flag in flags]
    name, seeded = (util.get_path_base(main.parse_args([*flags, "--seed", seed])) for seed in ("0", "12"))
    assert len(name) > 190 and seeded.replace("_seed=12", "") == name != seeded


def test_a_checkpoint_from_elsewhere_keeps_apart_from_a_run_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_args = vars(main.parse_args(["--small-dataset"]))

    def get_name(path):
        return checkpoints.get_run_name({"path": path, "args": run_args})

    ours = checkpoints.get_path("mws_20")
    others = ["pretrained/mws_20.pt", "there/save/mws_20/checkpoints/latest.pt"]
    for path in others:
        util.write(path, b"theirs")
    assert [get_name(path) for path in others] == ["mws_20"] * 2
    util.write(ours, b"ours")
    assert [get_name(path) for path in [ours, shutil.copy(ours, "copy.pt"), *others]] == [
        "mws_20", "mws_20", "mws_20-from-pretrained", "mws_20-from-there",
    ]  # fmt: skip
    pathlib.Path("save/linked").symlink_to(pathlib.Path("there/save/mws_20").absolute())
    assert get_name("save/linked/checkpoints/latest.pt") == "linked"


def test_runs_that_differ_do_not_share_a_folder():
    names = {key: util.get_path_base(main.parse_args(flags)) for key, flags in {**DIFFERENT, "default": []}.items()}
    for a, b in itertools.combinations(names, 2):
        assert names[a] != names[b], (a, b)
    assert all(len(name) < 255 and "/" not in name for name in names.values())
    flags = [flag for key, flags in DIFFERENT.items() if key not in ("dataset_size", "test_run", "vimco") for flag in flags]
    assert len(util.get_path_base(main.parse_args(flags))) < 255
    fields = {name for name, field in util.get_fields().items() if field.setting.changes_result}
    assert not fields - set(DIFFERENT) - {"algorithm"}


SMALL = "--num-primitives 5 --num-arcs 3 --obs-embedding-dim 8 --q-lstm-hidden-size 8".split()


def make_run(args):
    split = data.Split(torch.ones(4, 28, 28), None, None)
    return main.Run(args, data.Dataset(split, split, split, 0), torch.device("cpu"))


def make_checkpoint(iteration=3):
    """Of a run that has not begun, but for its iteration"""
    args = main.parse_args(SMALL)
    return {**make_run(args).get_checkpoint(), "iteration": iteration, "optimizer": {}, "pretrain_optimizer": {}}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (1, 3, 10, "latest"):
        util.save_checkpoint(checkpoints.get_path("run", name), make_checkpoint(12 if name == "latest" else name))
    return pathlib.Path("save/run/checkpoints")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def put_code(path):
    path.write_bytes(pickle.dumps(RunsCode()))


def put_code_in_zip(path):
    torch.save(RunsCode(), path)


def put_code_in_checkpoint(path):
    torch.save({**make_checkpoint(), "memory": RunsCode()}, path)


def put_other_things(path):
    torch.save({"weights": torch.zeros(3)}, path)


def put_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")


DAMAGES = [
    cut,
    put_code,
    put_code_in_zip,
    put_code_in_checkpoint,
    put_other_things,
    put_zip,
    lambda path: path.write_bytes(b""),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(run_folder, damage, capsys):
    assert checkpoints.load_newest(checkpoints.get_path("run"))["iteration"] == 12
    damage(run_folder / "latest.pt")
    with pytest.raises(UserError, match="latest.pt") as error:
        util.load_checkpoint(run_folder / "latest.pt")
    assert len(str(error.value).splitlines()) == 1
    assert checkpoints.load_newest(checkpoints.get_path("run"))["iteration"] == 10
    assert "latest.pt" in capsys.readouterr().err
    for run in ("run", run_folder.parent):
        assert checkpoints.load_given(run)["iteration"] == 10
    with pytest.raises(UserError, match="latest.pt"):  # this file, not the run
        checkpoints.load_given(run_folder / "latest.pt")
    damage(run_folder / "10.pt")
    assert checkpoints.load_newest(checkpoints.get_path("run"))["iteration"] == 3
    for name in (1, 3):
        damage(run_folder / f"{name}.pt")
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        checkpoints.load_newest(checkpoints.get_path("run"))
    assert not pathlib.Path("executed").exists()


def test_missing_checkpoints(run_folder):
    assert checkpoints.load_newest(checkpoints.get_path("another")) is None
    with pytest.raises(UserError, match="no checkpoint"):
        util.load_checkpoint("save/run/checkpoints/7.pt")
    (run_folder / "latest.pt").unlink()
    assert checkpoints.load_newest(checkpoints.get_path("run"))["iteration"] == checkpoints.load_given("run")["iteration"] == 10
    with pytest.raises(UserError, match="there is no checkpoint other; save/ holds run"):
        checkpoints.find("other")


@contextlib.contextmanager
def small_disk(folder, size):
    """A real disk that is soon full: a tmpfs of so many megabytes, at a new folder"""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_run_is_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locks.lock_run("run"):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            with locks.lock_run("run"):
                pass
        with locks.lock_run("another"):
            pass
    with locks.lock_run("run"):
        pass


def test_numbers_out_of_range():
    parse = util.in_range(int, 1, 5)
    assert parse("5") == 5
    for text in ("0", "6"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)
    for text in ("nan", "inf", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            util.in_range(float, 0)(text)


def test_milestones():
    assert [i for i in range(1, 300) if main.is_milestone(i)] == [1, 2, 3, 6, 10, 15, 25, 39, 63, 100, 158, 251]
    assert [i for i in range(90_000, 110_000) if main.is_milestone(i)] == [90_000, 95_000, 100_000, 105_000]


def test_an_old_name_that_is_taken_again_is_refused(monkeypatch):
    def mine(other: Annotated[bool, util.Setting("a setting", formerly="test_run")] = False):
        pass

    monkeypatch.setitem(util.CHOICES["algorithm"], "mine", mine)
    with pytest.raises(UserError, match="was formerly test_run, as another one is called now"):
        util.get_fields()


def test_a_setting_that_all_runs_share_with_an_objective(monkeypatch):
    """It stays in the names of all runs"""
    setting = util.get_fields()["prior_lr_factor"].setting

    def mine(prior_lr_factor: Annotated[float, setting] = 1.0):
        pass

    monkeypatch.setitem(util.CHOICES["algorithm"], "mine", mine)
    flags = ["--prior-lr-factor=0.5", "--algorithm"]
    assert all("prior-lr-factor=0.5" in util.get_path_base(main.parse_args([*flags, name])) for name in ("rws", "mine"))


@pytest.mark.parametrize(
    "kind, default, parse, words",
    [
        (int, 1e3, None, "setting mine: its default 1000.0 is not of the type int"),
        (tuple, (1, 2), None, "setting mine needs a plain type such as str"),
    ],
)
def test_settings_declared_wrongly(kind, default, parse, words):
    with pytest.raises(ValueError, match=words):
        util.make_field("mine", Annotated[kind, util.Setting("a setting", parse=parse)], default)


@pytest.mark.parametrize("parse, text", [(json.loads, '{"a": 2.0}'), (lambda name: getattr(torch, name), "float64")])
def test_a_value_whose_text_cannot_be_read_back_is_not_passed_on(parse, text, monkeypatch):
    """By the sweep, to main.py"""

    def mine(extra: Annotated[object | None, util.Setting("anything", parse=parse)] = None):
        pass

    monkeypatch.setitem(util.CHOICES["algorithm"], "mine", mine)
    assert util.get_flags(main.parse_args(["--algorithm=mine"])) == ["--algorithm=mine"]
    with pytest.raises(util.UserError, match="the setting extra cannot be passed on"):
        util.get_flags(main.parse_args(["--algorithm=mine", f"--extra={text}"]))


def test_settings_added_and_removed_since_a_checkpoint(monkeypatch, capsys):
    def mine(
        length: Annotated[int, util.Setting("a length", limit=3)] = 100,
        depth: Annotated[int | None, util.Setting("a depth", limit=2)] = None,
    ):
        pass

    monkeypatch.setitem(util.CHOICES["algorithm"], "mine", mine)
    assert util.get_path_base(main.parse_args(["--test-run", "--algorithm", "mine"])) == "test_run_mine_10_large"
    for flags, length in [([], 100), (["--test-run"], 3)]:
        saved = {**vars(main.parse_args(flags)), "odd_one": 0.5}
        del saved["length"]
        assert util.make_args(saved).length == length
    checkpoint = make_checkpoint()
    models.from_checkpoint(checkpoints.fill_in({**checkpoint, "args": {**checkpoint["args"], "odd_one": 0.5}}))
    assert "has a setting odd-one (0.5), which no longer exists" in capsys.readouterr().err


def test_a_tensor_among_the_parts_keeps_its_shape():
    run = make_run(main.parse_args(SMALL))
    run.parts["memory"] = torch.cat([run.parts["memory"]] * 2)
    run.state = {}
    with pytest.raises(UserError, match="part memory of the run has changed its shape"):
        run.get_checkpoint()
    run.optimizer = torch.optim.SGD(run.generative_model.parameters())
    with pytest.raises(UserError, match="run.optimizer is not that of run.parts"):
        run.get_checkpoint()
