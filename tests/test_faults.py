"""What a run promises under faults: checkpoints with wrong contents, kills between any two file operations, numbers
that are not finite, options out of range."""

import argparse
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same
from test_data import encode
from test_main import SHORT, TINY, get_run_folder, run

import diagnostics
import eval_logp
import main
import models
import read
import sweep
import util
from runs import checkpoints, convert
from util import UserError

FLAGS = [*SHORT, "--data-location", "data.mat"]
AFFINE = ["--likelihood", "learned-affine"]


def load_all(run_folder):
    return {path.name: util.load_checkpoint(path) for path in (run_folder / "checkpoints").glob("*.pt")}


# ------------------------------------------------------------------ damage, and files from elsewhere


def test_every_flipped_byte_is_noticed(folder):
    """Of a small file, each; of a run's model and memory, a thousand damages of any kind, and of its checkpoint, twenty"""
    small = bytearray(util.encode({"args": {"seed": 3}, "memory": torch.arange(6).view(1, 2, 3)}))
    assert util.decode(bytes(small))["memory"].sum() == 15
    for i in range(len(small)):
        small[i] ^= 1 << i % 8
        with pytest.raises(ValueError, match="digest"):
            util.decode(bytes(small))
        small[i] ^= 1 << i % 8
    run(*FLAGS)
    path, random_state = get_run_folder() / "checkpoints/latest.pt", random.Random(0)
    whole, checkpoint = path.read_bytes(), util.load_checkpoint(path)
    part = util.encode({name: checkpoint[name] for name in ("args", "generative_model", "memory", "statistics")})
    for i in range(1020):
        content = whole if i % 51 == 0 else part
        damaged, at, size = bytearray(content), random_state.randrange(len(content)), random_state.choice([1, 8, 512])
        kinds = [bytes(size), random_state.randbytes(size), damaged[at : at + size] * 2, b""]
        damaged[at : at + size] = kinds[i % 4]
        if damaged == content:
            continue
        if content is part:
            with pytest.raises(ValueError, match="digest"):
                util.decode(bytes(damaged))
            continue
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="latest.pt is (damaged|not a checkpoint)"):
            checkpoints.load(path)


def test_one_bad_run_does_not_stop_the_others(folder, capsys):
    run(*FLAGS)
    good = get_run_folder().name
    checkpoint = util.load_checkpoint(checkpoints.get_path(good))
    changes = [dict(args=[]), dict(generative_model=None), dict(statistics=[1, 2]), dict(iteration="3"), dict(iteration=-5)]
    changes += [dict(statistics={"train": table}) for table in [5, {"iteration": [1]}, {"theta_loss": torch.zeros(2)}]]
    for i, change in enumerate(changes):
        util.save_checkpoint(checkpoints.get_path(f"bad{i}"), {**checkpoint, **change})
    assert diagnostics.main("--num-reconstructions 2 --num-prior-samples 2".split()) == 0
    stdout, stderr = capsys.readouterr()
    assert f"{good}: drawn at iteration 12" in stdout and all(f"bad{i}" in stderr for i in range(len(changes)))
    assert sweep.main(["--status"]) == 0
    with pytest.raises(UserError, match="bad1/checkpoints/latest.pt"):
        eval_logp.main(["--checkpoint-path", "bad1"])


WRONG = [None, "text", 5, {}, [1, 2], torch.zeros(2), torch.zeros(3, 2, dtype=torch.uint8), torch.tensor(float("nan"))]
HOSTILE = [("name", value) for value in ["../../x", "/tmp/x", "a\0b", 5, ["a"], "a/b", ".."]]
HOSTILE += [("data_location", "a\0b"), ("likelihood", "../../x"), ("num_arcs", 10**12), ("p_lstm_hidden_size", 10**9)]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor in the place of a list
def test_forged_files_end_in_one_line(folder):
    """With the right digest, and anything in the place of each entry; nothing is allocated for sizes that are not the file's"""
    run(*FLAGS)
    latest = get_run_folder() / "checkpoints/latest.pt"
    checkpoint = util.load_checkpoint(latest)
    forged = [{**checkpoint, name: wrong} for name in checkpoint for wrong in WRONG if name not in ("format", "data_summary")]
    forged += [{**checkpoint, "args": {**checkpoint["args"], name: value}} for name, value in HOSTILE]
    num_refused, before, args = 0, sorted(folder.rglob("*")), main.parse_args(FLAGS)
    dataset = main.load_data(args)
    for contents in forged:
        util.save_checkpoint(latest, contents)
        try:
            models.from_checkpoint(checkpoints.load(latest))
            main.Run(args, dataset, torch.device("cpu")).restore(checkpoints.load(latest))
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and ("latest.pt" in str(error) or "save/" in str(error)), error
            num_refused += 1
    assert sorted(folder.rglob("*")) == before and num_refused > 0.8 * len(forged)


def test_a_file_of_an_older_version_is_rewritten(folder, capsys):
    run(*FLAGS, "--algorithm", "rws", "--num-iterations", "5")
    path = get_run_folder() / "checkpoints/latest.pt"
    saved = util.load_checkpoint(path)
    kept = ["args", "num_alphabets", "generative_model", "inference_network", "optimizer", "pretrain_optimizer", "iteration"]
    older = {name: saved[name] for name in [*kept, "pretrain_iteration", "random_state"]}
    older["args"] = older["args"].copy()
    del older["args"]["find_characters"], older["args"]["num_partitions"]
    statistics = {name: values for name, values in saved["statistics"]["train"].items() if name != "iteration"}
    statistics["pretrain_loss"] = saved["statistics"]["pretrain"]["phi_loss"]
    torch.save({**older, "memory": None, "statistics": statistics, "settings": {"data": saved["data"]}}, path)
    for name in ["1", "2", "3"]:
        (path.parent / f"{name}.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint") as error:
        run(*FLAGS, "--algorithm", "rws", "--num-iterations", "6")
    assert f"{path} is damaged or not a checkpoint" in str(error.value)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    pathlib.Path("damaged.pt").write_bytes(damaged)
    with pytest.raises(UserError, match="damaged.pt is damaged"):
        convert.convert(pathlib.Path("damaged.pt"))
    assert convert.convert(path) == "is rewritten" and convert.convert(path) == "is of this version already"
    run(*FLAGS, "--algorithm", "rws", "--num-iterations", "6")
    got = load_all(get_run_folder())["latest.pt"]
    get_run_folder().rename("converted")
    run(*FLAGS, "--algorithm", "rws", "--num-iterations", "6")
    for name, value in load_all(get_run_folder())["latest.pt"].items():
        assert_same(got[name], value, name)


def test_names_from_outside_are_shown_literally(folder, run_script):
    """Mathematics, bytes that are not UTF-8"""
    run(*FLAGS)
    names = [os.fsencode("$x_$.png"), b"lat\xff.png", b"a$b.png"]
    image = np.full((40, 40), 255, np.uint8)
    image[10:30, 18:21] = 0
    for name in names:
        with open(name, "wb") as file:
            file.write(encode(image))
    flags = ["--checkpoint-path", str(get_run_folder()), "--examples=1"]
    status, stdout, _ = run_script(read, *flags, *map(os.fsdecode, names))
    assert status == 0 and "lat\\udcff" in stdout
    location, own = os.fsdecode(b"$_{\xff$.npy"), "--algorithm own --num-data 2 --test-num-particles 3 --no-compile".split()
    np.save(location, np.random.RandomState(0).rand(20, 28, 28) < 0.1)
    for script, *flags in [
        (eval_logp, *own, "--checkpoint-path", get_run_folder().name, "--data-location", location),
        (eval_logp, "--report"),
        (main, *FLAGS, "--data-location", location, "--name", "other"),
        (diagnostics, "--loss-only"),
    ]:
        if script is diagnostics:
            os.rename("save/other", b"save/caf\xe9")
        status, _, stderr = run_script(script, *flags)
        assert status == 0, stderr
    assert b"_{\xff$.npy" in pathlib.Path("save/logp.csv").read_bytes()
    assert "_{\\udcff$.npy" in pathlib.Path("save/index.html").read_text()


def test_strokes_without_sharpness_or_width(folder):
    run(*FLAGS)
    latest = get_run_folder() / "checkpoints/latest.pt"
    checkpoint = util.load_checkpoint(latest)
    for name in ["pre_sharpness", "pre_dxdy"]:
        checkpoint["generative_model"][name].zero_()
    checkpoint["generative_model"]["pre_width"].fill_(-1e5)
    util.save_checkpoint(latest, checkpoint)
    assert diagnostics.main(["--num-reconstructions", "2", "--num-prior-samples", "2", "--svg"]) == 0


def test_a_question_without_a_terminal(folder, monkeypatch):
    run(*FLAGS)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="give --yes"):
        sweep.main(["--rm"])
    assert get_run_folder().exists()


def test_a_forged_evaluation_starts_over_or_ends_in_one_line(folder, capsys):
    run(*FLAGS)
    model = get_run_folder().name
    flags = "--algorithm rws --num-data 2 --num-particles 3 --test-num-particles 4 --lstm-hidden-size 8".split()
    flags += ["--num-iterations", "3", "--no-compile", "--checkpoint-path", model]
    assert eval_logp.main(flags) == 0
    path = util.SAVE / model / "logp/test_rws.pt"
    result = util.load_checkpoint(path, keys=set())
    state = {**result, "iteration": 2, "table": None, "network": None}
    for where, contents in [(path, {}), (checkpoints.get_state_path(path), state)]:
        path.unlink(missing_ok=True)
        util.save_checkpoint(where, contents)
        capsys.readouterr()
        try:
            assert eval_logp.main(flags) == 0 and "warning: " in capsys.readouterr().err
        except UserError as error:
            assert "cannot be used here" in str(error) and len(str(error).splitlines()) == 1


# ------------------------------------------------------------------ kills


def die(*cases):
    """Runs tests/die.py. Returns: for each case, the paths of what it leaves for each time that the script died"""
    command = [sys.executable, ROOT / "tests" / "die.py", json.dumps(cases)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr[-2000:]
    counts = json.loads(process.stdout)
    return [
        [pathlib.Path(case[3].replace("{n}", str(n + 1))) for n in range(num)] for case, num in zip(cases, counts, strict=True)
    ]


KINDS = [["mws"], ["rws"], ["vimco"], ["sleep"], ["mws", "--condition-on-alphabet", "--likelihood", "learned-affine"]]


@pytest.mark.long
def test_killed_between_any_two_file_operations(folder):
    """A stand-in for os.replace and os.fsync dies at the n-th call, for every n (of other kinds of runs, every
    eleventh); then the run goes on. All files, milestones included, end with the bits of one that was never stopped."""
    flags = [*TINY, "--data-location", "data.mat", "--pretrain-iterations", "1", "--num-iterations", "2"]
    flags += ["--save-interval", "2", "--test-interval", "2", "--test-num-particles", "3"]
    cases, expected = [], []
    for i, kind in enumerate(KINDS):
        run(*flags, "--algorithm", *kind)
        run_folder = get_run_folder()
        expected.append(run_folder.rename(f"expected{i}"))
        cases.append(["main", 11 if i else 1, str(run_folder), f"killed{i}_{{n}}", [*flags, "--algorithm", *kind]])
    model = shutil.copy("expected0/checkpoints/latest.pt", "model.pt")
    evaluate = "--num-data 2 --num-particles 3 --test-num-particles 4 --lstm-hidden-size 8 --num-iterations 5".split()
    evaluate += ["--no-compile", "--save-interval", "3", "--algorithm", "rws", "--checkpoint-path", model]
    assert eval_logp.main(evaluate) == 0
    run_folder = get_run_folder()
    expected.append(run_folder.rename("evaluated"))
    cases.append(["eval_logp", 1, str(run_folder), "killed5_{n}", evaluate])

    ends = die(*cases)
    assert [len(paths) for paths in ends] == [21, 1, 1, 1, 1, 9]  # losses.csv, twice, and five saves, of three operations each
    for i, paths in enumerate(ends[:-1]):
        want = load_all(expected[i])
        assert want.keys() == {"1.pt", "2.pt", "latest.pt"}
        for path in paths:
            assert_same(load_all(path), want)
            assert (path / "losses.csv").read_text() == (expected[i] / "losses.csv").read_text()
    want = load_evaluations(expected[-1])
    assert want.keys() == {"test_rws.pt"}
    for path in ends[-1]:
        assert_same(load_evaluations(path), want)


def load_evaluations(run_folder):
    return {path.name: util.load_checkpoint(path, keys=set()) for path in (run_folder / "logp").glob("*.pt")}


def test_a_run_continues_to_more_iterations(folder, capsys):
    flags = [*TINY, "--data-location", "data.mat", "--pretrain-iterations", "2"]
    run(*flags, "--num-iterations", "8", "--name", "long")
    run(*flags, "--num-iterations", "4", "--name", "short")
    run(*flags, "--num-iterations", "8", "--name", "short")
    got, want = (load_all(pathlib.Path("save") / name) for name in ("short", "long"))
    for checkpoint in [*got.values(), *want.values()]:
        checkpoint.pop("args")
    assert_same(got, want)
    capsys.readouterr()
    latest = pathlib.Path("save/short/checkpoints/latest.pt")
    before = latest.read_bytes()
    for number in ("8", "3"):
        run(*flags, "--num-iterations", number, "--name", "short")
    stdout, stderr = capsys.readouterr()
    assert latest.read_bytes() == before and stdout.count("save/short is complete: 8 iterations") == 2 and stderr == ""
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        run(*flags, "--name", "short", "--seed", "1")


# ------------------------------------------------------------------ divergence


PARAMETERS = ["generative_model.pre_dxdy", "generative_model.theta_affine", "inference_network.conv3.bias"]


@pytest.mark.parametrize("algorithm, where", [
    *[("mws", where) for where in PARAMETERS], ("rws", PARAMETERS[0]), ("rws", PARAMETERS[2]),
    ("vimco", PARAMETERS[1]), ("vimco", PARAMETERS[2]), ("sleep", PARAMETERS[0]),
])  # fmt: skip
def test_divergence_ends_the_run(folder, algorithm, where, monkeypatch):
    """Real NaN parameters, from the fourth iteration on"""
    train_step = main.train_step

    def diverge(run, obs_id):
        if run.iteration == 4:
            model, name = where.split(".", 1)
            dict(getattr(run, model).named_parameters())[name].data.fill_(torch.nan)
        return train_step(run, obs_id)

    monkeypatch.setattr(main, "train_step", diverge)
    with pytest.raises(UserError, match="no longer finite: training has diverged"):
        run(*FLAGS, *AFFINE, "--algorithm", algorithm, "--save-interval", "1")
    saved = load_all(get_run_folder())
    assert saved["latest.pt"]["iteration"] == 4
    for checkpoint in saved.values():
        assert all(x.isfinite().all() for x in checkpoint["generative_model"].values())


# ------------------------------------------------------------------ options

VALUES = ["0", "-1", "nan", "inf", "1" + 400 * "0", "1e400", "", "text", "9223372036854775807", "1e308"]


@pytest.mark.parametrize("script", [main, eval_logp, diagnostics, sweep])
def test_any_value_of_an_option_is_taken_or_refused_in_one_line(script, folder):
    actions = script.get_parser()._actions
    options = [action.option_strings[0] for action in actions if isinstance(action, argparse._StoreAction)]  # take a value
    assert len(options) >= 8
    for option in options:
        for value in VALUES:
            try:
                script.parse_args([f"{option}={value}"])
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 400, option


# ------------------------------------------------------------------ streams and environment


def test_a_full_disk_behind_standard_output_and_a_cache_that_cannot_be_written(folder):
    command = [sys.executable, ROOT / "main.py", *TINY, "--data-location", "data.mat", "--pretrain-iterations", "1"]
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "data.mat" / "cache"), "TMPDIR": str(folder)}
    with open("/dev/full", "w") as full:
        process = subprocess.run([*command, "--num-iterations", "2"], stdout=full, stderr=subprocess.PIPE, text=True, env=cache)
    assert process.returncode == 0 and load_all(get_run_folder())["latest.pt"]["iteration"] == 2
    code = "from fast import before_torch; import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=cache)
    assert process.stdout == f"{folder}/torchinductor_cache_{os.getuid()}\n"  # takes its place
    del cache["TORCHINDUCTOR_CACHE_DIR"]
    code = f"import getpass; getpass.getuser = lambda: {{}}['no name']; {code}"  # as for a user without a name, in a container
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=cache).stdout
        == process.stdout
    )


def test_closed_streams(folder):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, util\n"
        "def main():\n"
        "    util.warn('nobody reads this')\n"
        "    for i in util.show_progress(range(3)):\n"
        "        print('nor this', flush=True)\n"
        "    pathlib.Path('end').write_text(str(i))\n"
        "util.run_script(main)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: (os.close(1), os.close(2)))
    assert process.returncode == 0 and pathlib.Path("end").read_text() == "2"


def test_a_task_is_for_jobs_only():
    for where in ("", "none.json:3", "7"):
        with pytest.raises(UserError, match="is not a task of a sweep"):
            sweep.main([f"--task={where}"])
