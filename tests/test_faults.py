"""What a run promises under faults: checkpoints with wrong contents, kills between any two file operations, numbers
that are not finite, options out of range."""

import argparse
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_main import SHORT, TINY, folder, get_run_folder, run, run_script  # noqa: F401
from test_rendering import check_nan_reaches_the_likelihood
from torch.utils._pytree import tree_leaves

import diagnostics
import eval_logp
import main
import sweep
import util
from runs import checkpoints
from util import UserError

FLAGS = [*SHORT, "--data-location", "data.mat"]
AFFINE = ["--likelihood", "learned-affine"]


def load_all(run_folder):
    return {path.name: util.load_checkpoint(path) for path in (run_folder / "checkpoints").glob("*.pt")}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        for a, b in zip(tree_leaves(got[name]), tree_leaves(want[name]), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name


# ------------------------------------------------------------------ wrong contents


def get_places(value, path=()):
    """Paths to the entries of nested dicts and lists"""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for key, entry in items:
        yield (*path, key)
        yield from get_places(entry, (*path, key))


def get_wrong(value):
    """Values that must not stand where this one does"""
    yield "text" if not isinstance(value, str) else 5
    if torch.is_tensor(value):
        yield value.unsqueeze(0) if value.dim() else torch.zeros(2)
        if value.numel() > 1:
            yield value[:1]
            yield value[1:]
        yield value.double() if value.dtype == torch.float32 else value.float()
        if value.is_floating_point():
            yield torch.full_like(value, torch.nan)
            yield torch.full_like(value, 1e30)
            yield value.to(torch.complex64)
        if value.dim() in (1, 2) and value.numel():
            yield value.to_sparse()
        elif value.dtype == torch.uint8 and value.dim() == 3:
            yield torch.full_like(value, 255)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from [-3, 2.5, 10**400, True]
    elif isinstance(value, float):
        yield from [torch.nan, torch.inf]
    elif isinstance(value, dict):
        yield {}
    elif isinstance(value, list):
        yield value[:-1]


# What may be otherwise without a run being another: beside the settings, and what Adam does not use.
FREE = "cuda data_location test_run compile log_interval save_interval save_minutes tensorboard test_interval test_batch_size name "
FREE += "test_num_particles num_iterations amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay"
FREE = {*FREE.split(), "initial_lr"}


def test_wrong_contents_are_found(folder):  # noqa: F811
    """Each entry of a checkpoint removed, of another type, another shape, NaN or huge"""
    run(*FLAGS, *AFFINE)
    original = util.load_checkpoint(get_run_folder() / "checkpoints/latest.pt")
    checkpoints.check(original, resumable=True)
    places = [p for p in get_places(original) if not FREE & set(p) and p[0] != "settings"]
    # of a parameter's moments, those of a few
    places = [p for p in places if p[1:2] != ("state",) or len(p) < 3 or p[2] in (0, 7)]
    assert len(places) > 100
    num_checked = 0
    for place in places:
        for wrong in [None, *get_wrong(get_entry(original, place))]:
            damaged = replace(original, place, wrong)
            if wrong is None:
                if len(place) == 1:
                    continue  # found by util.load_checkpoint
            if place == ("memory",) and torch.is_tensor(wrong) and is_memory(wrong):
                continue  # how many images there are, only the run itself knows
            if place[0] == "args" and isinstance(wrong, int | float) and is_plausible(place[-1], wrong):
                continue
            if place[0] == "statistics" and torch.is_tensor(wrong) and not wrong.is_sparse and (wrong == 1e30).all():
                continue
            try:
                checkpoints.check(damaged, resumable=True)
            except UserError as found:
                error = found
            else:
                raise AssertionError(f"{place}: {wrong!r} was not found")
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
            num_checked += 1
    assert num_checked > 400


def replace(value, path, new):
    """A copy with another entry at the path, or none if it is None"""
    value, (key, *rest) = value.copy(), path
    if rest:
        value[key] = replace(value[key], rest, new)
    elif new is None:
        del value[key]
    else:
        value[key] = new
    return value


def get_entry(value, path):
    for key in path:
        value = value[key]
    return value


def is_memory(tensor):
    """Whether a memory of other images could hold it"""
    right = tensor.shape[1:] == (2, 3) and not tensor.is_sparse and tensor.dtype == torch.uint8
    return right and tensor.max() < 10


def is_plausible(name, value):
    """Another value that an argument might have, which nothing else in a checkpoint tells of"""
    return name in ("seed", "prior_lr_factor", "pretrain_iterations") and value is True or type(value) is type(None)


@pytest.mark.parametrize("wrong", [dict(memory=torch.zeros(1, 2, 3, dtype=torch.uint8)), "nan", "cut"])
def test_an_older_checkpoint_takes_the_place_of_a_wrong_one(folder, wrong, capsys):  # noqa: F811
    run(*FLAGS)
    expected, latest = load_all(get_run_folder()), get_run_folder() / "checkpoints/latest.pt"
    checkpoint = util.load_checkpoint(latest)
    if wrong == "nan":
        checkpoint["generative_model"]["pre_width"][3] = torch.nan
    util.save_checkpoint(latest, {**checkpoint, **(wrong if isinstance(wrong, dict) else {})})
    if wrong == "cut":
        latest.write_bytes(latest.read_bytes()[:-100])
    capsys.readouterr()
    if isinstance(wrong, dict):  # only the data tell how many images there are
        with pytest.raises(UserError, match="its memory holds 1 images, the data 76"):
            diagnostics.main(["--checkpoint-path", str(latest)])
    else:
        assert diagnostics.main(["--loss-only"]) == 0 and "warning: " in capsys.readouterr().err
    run(*FLAGS)
    assert_same(load_all(get_run_folder()), expected)
    assert "newest intact checkpoint" in capsys.readouterr().err
    assert not pathlib.Path("executed").exists()


def test_one_bad_run_does_not_stop_the_others(folder, capsys):  # noqa: F811
    run(*FLAGS)
    good = get_run_folder().name
    checkpoint = util.load_checkpoint(checkpoints.get_path(good))
    for i, change in enumerate([dict(args={}), dict(generative_model=None), dict(statistics=[1, 2]), dict(iteration=-3)]):
        util.save_checkpoint(checkpoints.get_path(f"bad{i}"), {**checkpoint, **change})
    flags = "--num-reconstructions 2 --num-prior-samples 2".split()
    assert diagnostics.main(flags) == 0
    stdout, stderr = capsys.readouterr()
    assert f"{good}: drawn at iteration 12" in stdout and all(f"bad{i}" in stderr for i in range(4))
    assert sweep.main(["--status"]) == 0
    with pytest.raises(UserError, match="bad1.* is not a valid checkpoint: generative_model is not a dict"):
        eval_logp.main(["--checkpoint-path", "bad1"])


HOSTILE = [
    *[("name", value) for value in ["../../x", "/tmp/x", "a\0b", 5, ["a"], "", "a/b", ".."]],
    ("p_uniform_mixture", 1.5), ("p_uniform_mixture", 1e300), ("data_location", "a\0b"), ("data_location", ""),
    ("test_run", "yes"), ("num_iterations", -1), ("num_iterations", "many"), ("algorithm", "rws"), ("likelihood", "none"),
    ("small_dataset", 1), ("find_characters", None), ("num_partitions", 0), ("seed", 2**64),
]  # fmt: skip


def test_foreign_arguments_are_refused_and_nothing_is_written_elsewhere(folder, capsys):  # noqa: F811
    """As the command line would refuse them"""
    run(*FLAGS)
    checkpoint = util.load_checkpoint(get_run_folder() / "checkpoints/latest.pt")
    (folder / "foreign").mkdir()
    before = sorted(folder.rglob("*"))
    for name, value in HOSTILE:
        util.save_checkpoint("foreign/x.pt", {**checkpoint, "args": {**checkpoint["args"], name: value}})
        for script in (diagnostics, eval_logp):
            with pytest.raises(UserError) as found:
                script.main(["--checkpoint-path", "foreign/x.pt"])
            assert "is not a valid checkpoint" in str(found.value) and len(str(found.value).splitlines()) == 1, (name, value)
    for settings in [{"num_particles": 7}, {"algorithm": "rws"}, {"seed": "1"}]:
        util.save_checkpoint("foreign/x.pt", {**checkpoint, "settings": {**checkpoint["settings"], **settings}})
        with pytest.raises(UserError, match="its settings contradict its arguments"):
            diagnostics.main(["--checkpoint-path", "foreign/x.pt"])
    (folder / "foreign/x.pt").unlink()
    assert sorted(folder.rglob("*")) == before


def test_names_from_outside_are_shown_literally(folder, run_script, capsys):  # noqa: F811
    """Mathematics, bytes that are not UTF-8; a pipe is not read"""
    run(*FLAGS)
    names = [os.fsencode("$x_$.png"), b"lat\xff.png", b"a$b.png"]
    image = np.full((40, 40), 255, np.uint8)
    image[10:30, 18:21] = 0
    for name in names:
        with open(name, "wb") as file:
            file.write(imageio.imwrite("<bytes>", image, extension=".png"))
    os.mkfifo("pipe.png")
    flags = ["--checkpoint-path", str(get_run_folder()), "--num-rounds=1", "--num-particles=3", "--examples=1", "--no-refit"]
    status, stdout, stderr = run_script(diagnostics, *flags, "--images", "pipe.png", *map(os.fsdecode, names))
    assert status == 0 and "pipe.png is not a file but" in stderr and "lat\\udcff.png: log p" in stdout
    latest = get_run_folder() / "checkpoints/latest.pt"
    latest.unlink()
    os.mkfifo(latest)
    run(*FLAGS)
    assert "latest.pt is not a file but" in capsys.readouterr().err


def test_strokes_without_sharpness_or_width(folder):  # noqa: F811
    run(*FLAGS)
    latest = get_run_folder() / "checkpoints/latest.pt"
    checkpoint = util.load_checkpoint(latest)
    for name in ["pre_sharpness", "pre_dxdy"]:
        checkpoint["generative_model"][name].zero_()
    checkpoint["generative_model"]["pre_width"].fill_(-1e5)
    util.save_checkpoint(latest, checkpoint)
    assert diagnostics.main(["--num-reconstructions", "2", "--num-prior-samples", "2", "--svg"]) == 0


def test_a_question_without_a_terminal(folder, monkeypatch):  # noqa: F811
    run(*FLAGS)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="give --yes"):
        sweep.main(["--rm"])
    assert get_run_folder().exists()


def test_wrong_contents_of_evaluations_are_found(folder, capsys):  # noqa: F811
    """A result and the checkpoint of an evaluation: each entry removed, of another type or shape, NaN"""
    run(*FLAGS)
    model = get_run_folder().name
    flags = (
        "--algorithm rws --num-data 2 --num-particles 3 --test-num-particles 4 --lstm-hidden-size 8 --num-iterations 3".split()
    )
    flags += ["--no-compile", "--save-interval", "2", "--checkpoint-path", model]
    kept, save = {}, util.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            util, "save_checkpoint", lambda path, value: (kept.setdefault(path.parent.name, value), save(path, value))
        )
        assert eval_logp.main(flags) == 0
    path = util.SAVE / model / "logp/test_rws.pt"
    for original, where in [
        (util.load_checkpoint(path, keys=set()), path),
        (kept["checkpoints"], path.parent / "checkpoints/test_rws.pt"),
    ]:
        num_found = 0
        places = [
            p for p in get_places(original) if len(p) < 3 and p[0] not in ("settings", "args", "statistics", "num_scored")
        ]
        for place in [p for p in places if not (p[0] in ("model_settings", "optimizer", "network") and len(p) > 1)]:
            for wrong in [None, *get_wrong(get_entry(original, place))]:
                if torch.is_tensor(wrong) and (place[0] == "random_state" or not wrong.is_sparse and (wrong == 1e30).all()):
                    continue
                if isinstance(wrong, bool | int) and isinstance(get_entry(original, place), int):
                    continue
                path.unlink(missing_ok=True)
                util.save_checkpoint(where, replace(original, place, wrong))
                capsys.readouterr()
                assert eval_logp.main(flags) == 0, (place, wrong)
                stderr = capsys.readouterr().err
                num_found += "warning: " in stderr
                assert "warning: " in stderr, (place, wrong)
        assert num_found > 20


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


def test_killed_between_any_two_file_operations(folder):  # noqa: F811
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
    assert [len(paths) for paths in ends] == [18, 1, 1, 1, 1, 9]  # losses.csv, twice, and four saves, of three operations each
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


def test_a_run_continues_to_more_iterations(folder, capsys):  # noqa: F811
    flags = [*TINY, "--data-location", "data.mat", "--pretrain-iterations", "2"]
    run(*flags, "--num-iterations", "8", "--name", "long")
    run(*flags, "--num-iterations", "4", "--name", "short")
    run(*flags, "--num-iterations", "8", "--name", "short")
    got, want = (load_all(pathlib.Path("save") / name) for name in ("short", "long"))
    for checkpoint in [*got.values(), *want.values()]:
        checkpoint.pop("args")
    assert_same(got, want)
    capsys.readouterr()
    for number in ("8", "3"):
        run(*flags, "--num-iterations", number, "--name", "short")
    stdout, stderr = capsys.readouterr()
    assert stdout.count("save/short is complete: 8 iterations") == 2 and stderr == ""
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        run(*flags, "--name", "short", "--seed", "1")


# ------------------------------------------------------------------ divergence


def test_nan_reaches_the_likelihood():
    """test_rendering.py does the same with compiled kernels"""
    check_nan_reaches_the_likelihood()


PARAMETERS = ["generative_model.pre_dxdy", "generative_model.theta_affine", "inference_network.conv3.bias"]


@pytest.mark.parametrize("algorithm, where", [
    *[("mws", where) for where in PARAMETERS], ("rws", PARAMETERS[0]), ("rws", PARAMETERS[2]),
    ("vimco", PARAMETERS[1]), ("vimco", PARAMETERS[2]), ("sleep", PARAMETERS[0]),
])  # fmt: skip
def test_divergence_ends_the_run(folder, algorithm, where, monkeypatch):  # noqa: F811
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
        checkpoints.check(checkpoint, resumable=True)


# ------------------------------------------------------------------ options

VALUES = ["0", "-1", "nan", "inf", "1" + 400 * "0", "1e400", "", "text", "9223372036854775807", "1e308"]


def get_options(script):
    """The flags of a script that take a value, from its parser"""
    parser = {"main": main.get_parser, "eval_logp": eval_logp.get_parser, "diagnostics": diagnostics.get_parser,
              "sweep": sweep.get_parser}[script]()  # fmt: skip
    takes = (argparse._StoreAction,)
    return [action.option_strings[0] for action in parser._actions if isinstance(action, takes)]


@pytest.mark.parametrize("script", ["main", "eval_logp", "diagnostics", "sweep"])
def test_any_value_of_an_option_is_taken_or_refused_in_one_line(script, folder):  # noqa: F811
    module = {"main": main, "eval_logp": eval_logp, "diagnostics": diagnostics, "sweep": sweep}[script]
    options = get_options(script)
    assert len(options) >= 8
    for option in options:
        for value in VALUES:
            try:
                module.parse_args([f"{option}={value}"])
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 400, option


# ------------------------------------------------------------------ streams and environment


def test_a_full_disk_behind_standard_output_and_a_cache_that_cannot_be_written(folder):  # noqa: F811
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    command = [sys.executable, ROOT / "main.py", *TINY, "--data-location", "data.mat", "--pretrain-iterations", "1"]
    temporary = folder / "tmp"
    temporary.mkdir()
    (temporary / f"torchinductor_cache_{os.getuid()}").symlink_to(cache_dir())  # what is compiled already stays so
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "data.mat" / "cache"), "TMPDIR": str(temporary)}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*command, "--num-iterations", "2", "--compile"], stdout=full, stderr=subprocess.PIPE, text=True, env=cache
        )
    assert process.returncode == 0 and load_all(get_run_folder())["latest.pt"]["iteration"] == 2
    assert process.stderr.count("warning: ") == 1 and "which cannot be written" in process.stderr
    assert "not compiled" not in process.stderr


def test_closed_streams(folder):  # noqa: F811
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
