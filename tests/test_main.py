"""The training script, end to end, as a user runs it."""

import csv
import functools
import pathlib
import signal
import subprocess
import sys
import time

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, needs_compiler
from test_data import fill
from test_util import cut, put_code, small_disk

import diagnostics
import eval_logp
import losses
import main
import rendering
import util
from results import overview
from runs import checkpoints
from util import UserError

TINY = (
    "--num-arcs 3 --num-primitives 5 --q-lstm-hidden-size 8 --obs-embedding-dim 8 --batch-size 5"
    " --num-particles 2 --memory-size 2 --log-interval 3 --likelihood bernoulli --no-compile"
).split()
SHORT = [*TINY, *"--pretrain-iterations 6 --num-iterations 12 --save-interval 5".split()]


def run(*flags, status=0):
    """Runs main.py in this process"""
    assert main.main(list(flags)) == status


def get_run_folder():
    (folder,) = [path for path in pathlib.Path("save").iterdir() if path.is_dir()]
    return folder


def load_latest():
    return util.load_checkpoint(get_run_folder() / "checkpoints" / "latest.pt")


@pytest.mark.parametrize("algorithm", ["mws", "rws", "vimco", "sleep"])
@pytest.mark.parametrize("conditional", [False, True])
def test_training(folder, capfd, algorithm, conditional):
    flags = ["--algorithm", algorithm, *"--data-location data.mat --test-interval 6 --test-num-particles 4".split()]
    run(*SHORT, *flags, *["--condition-on-alphabet", "--likelihood", "learned-affine"] * conditional)
    stdout, stderr = capfd.readouterr()
    path = get_run_folder() / "checkpoints"
    assert str(path / "latest.pt") in stdout.splitlines()[-1]
    assert sorted(p.name for p in path.iterdir()) == ["1.pt", "10.pt", "2.pt", "3.pt", "6.pt", "latest.pt"]
    checkpoint = load_latest()
    statistics = checkpoint["statistics"]
    names = {"mws": ["prior_loss", "novel_proportion", "new_map"]}.get(algorithm, [])
    for name in ["theta_loss", "phi_loss", *names]:
        assert len(statistics["train"][name]) == 12 and statistics["train"][name].isfinite().all()
    assert len(statistics["pretrain"]["phi_loss"]) == 6
    tested = statistics["test"]
    assert tested["iteration"].tolist() == [6, 12] and (tested["test_log_p"] < 0).all() and (tested["test_kl"] >= 0).all()
    assert checkpoint["num_alphabets"] == (5 if conditional else 0)
    with open(get_run_folder() / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    phases = ["pretrain"] * 6 + ["train"] * 6 + ["test"] + ["train"] * 6 + ["test"]
    assert [row["phase"] for row in rows] == phases and rows[13]["iteration"] == "7"
    got = torch.tensor([float(row["theta_loss"]) for row in rows if row["phase"] == "train"])
    assert torch.equal(got, statistics["train"]["theta_loss"])
    assert float(rows[-1]["test_kl"]) == pytest.approx(tested["test_kl"][-1])
    assert torch.load(path / "latest.pt", weights_only=True)["iteration"] == 12
    assert "novel_proportion" in stderr or algorithm != "mws"


def test_steps_are_recorded_anew_when_a_callback_changes_what_they_read(folder, monkeypatch):
    """A CUDA graph reads a number, and the place of any tensor, only when it is recorded"""
    get_steps, recorded = main.get_steps, []

    def change(run):
        (group, _), i = run.optimizer.param_groups, run.iteration
        if i == 2:
            group["lr"] *= 0.5
        elif i == 3:
            group["weight_decay"] = 0.1
        elif i == 4:
            run.optimizer.state.clear()
        elif i == 5:
            run.optimizer = run.parts["optimizer"] = main.get_optimizer(run.generative_model, run.inference_network, 2.0)
        elif i == 6:
            run.generative_model.pre_width.requires_grad_(False)
        elif i == 7:
            run.generative_model.pre_theta.data = run.generative_model.pre_theta.data.clone()
        elif i == 8:
            run.generative_model.likelihood.temperature = 2.0
        elif i == 9:
            run.train_data = run.train_data._replace(obs=1 - run.train_data.obs)

    monkeypatch.setattr(main, "test", change)
    monkeypatch.setattr(main, "get_steps", lambda run: recorded.append(run.iteration) or get_steps(run))
    run(*TINY, *"--pretrain-iterations 1 --num-iterations 11 --test-interval 1 --data-location data.mat".split())
    assert recorded == [0, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "memory", [torch.zeros(3), torch.nn.Embedding(2, 3), torch.randn(5, 4, 3), torch.zeros(100, 2, 3, 2).long()]
)
def test_a_part_called_memory_of_another_kind(folder, monkeypatch, memory, capsys):
    """It is saved as any other; only plain programs are taken for remembered ones"""
    objective = losses.keeps(lambda: {"memory": memory})(functools.partial(losses.wake_sleep))
    monkeypatch.setitem(losses.OBJECTIVES, "rws", objective)
    run(*TINY, *"--algorithm rws --pretrain-iterations 1 --num-iterations 2 --data-location data.mat".split())
    name = get_run_folder().name
    assert eval_logp.main(["--checkpoint-path", name, *"--algorithm own --mode train --num-data 2".split()]) == 0
    assert diagnostics.main(["--checkpoint-path", name, "--num-reconstructions", "2"]) == 0
    assert "error" not in capsys.readouterr().err and (get_run_folder() / "reconstructions" / "2.pdf").exists()


def test_killed_at_random_moments_ends_with_the_same_bits(folder):
    """Of MWS; test_faults.py has the others, killed at each file operation"""
    flags = [*TINY, *"--pretrain-iterations 20 --num-iterations 70 --save-interval 7 --data-location data.mat".split()]
    flags += ["--test-interval", "50", "--test-num-particles", "2"]
    run(*flags)
    expected = load_latest()
    get_run_folder().rename("expected")
    killed = 0
    for seconds in [0.8, 1.5, None]:
        process = forks.start(forks.MAIN, *flags)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
    assert process.exitcode == 0 and killed >= 1  # a fast machine may be done before the last
    assert_same(load_latest(), expected)
    for path in pathlib.Path("expected/checkpoints").glob("*.pt"):
        assert_same(util.load_checkpoint(get_run_folder() / "checkpoints" / path.name), util.load_checkpoint(path))


def test_no_numbered_checkpoint_is_newer_than_the_latest(folder, monkeypatch):
    written, write = [], util.write
    monkeypatch.setattr(util, "write", lambda path, content: written.append(path.stem) or write(path, content))
    run(*TINY, *"--pretrain-iterations 1 --num-iterations 4 --data-location data.mat".split())
    assert [name for name in written if name != "losses"] == ["1", "latest", "2", "latest", "3", "latest", "latest"]


def test_signals_save_and_exit(folder, stop_at, capfd):
    flags = [*TINY, *"--num-iterations 60 --pretrain-iterations 10 --data-location data.mat".split()]
    run(*flags)
    expected = load_latest()
    run_folder = pathlib.Path("save") / get_path_base(flags)
    run_folder.rename("expected")
    process = forks.start(forks.MAIN, *flags, stdout="stdout")
    while not (run_folder / "checkpoints/2.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "SIGTERM" in pathlib.Path("stdout").read_text() and 2 <= load_latest()["iteration"] < 60

    for number, iteration in ((signal.SIGINT, 46), (signal.SIGUSR1, 51)):  # in this process
        stop_at(main, iteration - 1, number)
        run(*flags, status=128 + number)
        assert number.name in capfd.readouterr().out and load_latest()["iteration"] == iteration
    run(*flags)
    assert_same(load_latest(), expected)


def get_path_base(flags):
    return util.get_path_base(main.parse_args(flags))


@needs_compiler
@pytest.mark.long
def test_a_compiled_run_goes_on_with_the_same_bits(folder, stop_at):
    flags = [*SHORT, "--compile", "--data-location", "data.mat", "--likelihood", "learned-affine"]
    try:
        run(*flags)
        expected = load_latest()
        get_run_folder().rename("expected")
        stop_at(main, 6)
        run(*flags, status=128 + signal.SIGTERM)
        assert load_latest()["iteration"] == 7
        run(*flags)
    finally:
        rendering.set_compile(False)
    assert_same(load_latest(), expected)


def test_damaged_latest_goes_on_from_the_newest_intact_one(folder, capfd):
    flags = [*SHORT, "--data-location", "data.mat"]
    run(*flags)
    checkpoints = get_run_folder() / "checkpoints"
    expected = {path: util.load_checkpoint(path) for path in checkpoints.iterdir()}
    curves = (get_run_folder() / "losses.csv").read_text()
    cut(checkpoints / "latest.pt")
    put_code(checkpoints / "10.pt")
    capfd.readouterr()
    assert diagnostics.main(["--loss-only"]) == 0 and "6.pt, the newest intact checkpoint" in capfd.readouterr().err
    run(*flags)
    stdout, stderr = capfd.readouterr()
    assert "resuming at iteration 6 " in stdout
    assert len([line for line in stderr.splitlines() if line.startswith("warning:")]) == 3
    assert_same({path: util.load_checkpoint(path) for path in checkpoints.iterdir()}, expected)
    assert (get_run_folder() / "losses.csv").read_text() == curves  # cut back to iteration 6, and appended to
    for path in checkpoints.iterdir():
        cut(path)
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        run(*flags)


def test_a_folder_with_other_settings_is_refused(folder):
    flags = [*SHORT, "--data-location", "data.mat"]
    run(*flags)
    checkpoint = (get_run_folder() / "checkpoints" / "latest.pt").read_bytes()
    other = pathlib.Path("save") / get_path_base([*flags, "--seed", "5", "--big-arcs"])
    get_run_folder().rename(other)
    with pytest.raises(UserError, match="seed is 0 there and 5 here, .*big-arcs is False there and True here"):
        run(*flags, "--seed", "5", "--big-arcs")
    assert (other / "checkpoints" / "latest.pt").read_bytes() == checkpoint


BAD_INPUT = [
    ("--data-location missing.mat", ["missing.mat"]),
    ("--data-location cut.mat", ["cut.mat", "damaged"]),
    ("--data-location data.mat --small-dataset --dataset-size 5", ["exclude"]),
    ("--data-location data.mat --dataset-size 500", ["500"]),
    ("--data-location plain.npy --condition-on-alphabet", ["fewer than two alphabets"]),
    ("--data-location data.mat --batch-size 0", ["--batch-size", "out of range"]),
    ("--data-location data.mat --num-particles many", ["--num-particles"]),
    ("--data-location data.mat --p-uniform-mixture 1.5", ["--p-uniform-mixture"]),
    ("--data-location data.mat --algorithm vimco --num-particles 1", ["vimco"]),
    ("--data-location data.mat --initial-max-curve 0.6", ["--initial-max-curve"]),
    ("--data-location data.mat --likelihood normal", ["--likelihood"]),
    ("--num-itertions 5", ["unrecognized arguments"]),
    ("--data-location data.mat --algorithm em", ["--algorithm"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("--cuda", ["GPU"]),
]


def test_bad_input(folder, assert_refused):
    pathlib.Path("cut.mat").write_bytes(pathlib.Path("data.mat").read_bytes()[:3000])
    np.save("plain.npy", np.pad(np.ones((20, 8, 8)), [(0, 0), (10, 10), (10, 10)]))
    for flags, words in BAD_INPUT:
        if flags != "--cuda" or not torch.cuda.is_available():
            assert_refused(main, flags.split(), words)
    assert not pathlib.Path("save").exists()
    pathlib.Path("save").write_text("a file where the folder should be")
    assert_refused(main, [*SHORT, "--data-location", "data.mat"], ["save"])


def test_what_cannot_fit_ends_in_one_line(folder, assert_refused):
    assert_refused(main, [*TINY, "--data-location", "data.mat", "--q-lstm-hidden-size", "100000"], ["out of memory"])


def test_full_disk(folder):
    with small_disk(folder / "save", 3):
        with pytest.raises(UserError, match="No space left.*intact"):
            run(*TINY, "--num-iterations", "300", "--save-interval", "1", "--data-location", "data.mat")
        saved = list((get_run_folder() / "checkpoints").iterdir())
        assert any(path.name == "latest.pt" for path in saved) and all(util.load_checkpoint(path) for path in saved)


def test_test_run(folder):
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, ROOT / "main.py", "--test-run", "--num-particles", "4", "--memory-size", "4"],
        capture_output=True,
        text=True,
    )
    assert time.perf_counter() - start < 120
    assert process.returncode == 0 and "trained" in process.stdout
    assert get_run_folder().name.startswith("test_run_")


def test_the_line_about_the_data_is_printed_and_kept(tmp_path, run_script, monkeypatch):
    fill(tmp_path / "letters", 16, ["a", "b"])
    (tmp_path / "letters/notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    line = "16 images, 2 alphabets, mean ink 0.13; skipped: 1 file (1 TXT)"
    argv = [*TINY, *"--data-location letters --pretrain-iterations 1 --num-iterations 1".split()]
    assert f"letters: {line}\n" in run_script(main, *argv, "--name", "lines")[1]
    checkpoint = checkpoints.load(checkpoints.find("lines"))
    assert checkpoint["data_summary"] == line
    (tmp_path / "save/index.html").unlink(missing_ok=True)
    assert f"letters: {line}" in overview.write_overview().read_text()
    size = ["--algorithm", "own", "--num-data", "2", "--test-num-particles", "2"]
    assert f"letters: {line}\n" in run_script(eval_logp, "--checkpoint-path", "lines", *size)[1]
