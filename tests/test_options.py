"""Whatever a run saves, it can read: over the values of every option of main.py, alone and in pairs, a run is
saved, resumed to the same bits, evaluated and drawn.

    python tests/test_options.py 1000 7     # a thousand cases drawn with seed 7; the suite has 20
"""

import argparse
import contextlib
import io
import itertools
import os
import pathlib
import random
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import scipy.io  # noqa: E402
import torch  # noqa: E402
from conftest import assert_same, make_mat  # noqa: E402

import diagnostics  # noqa: E402
import eval_logp  # noqa: E402
import main  # noqa: E402
import util  # noqa: E402
from runs import checkpoints  # noqa: E402
from util import UserError  # noqa: E402

TINY = (
    "--num-arcs=3 --num-primitives=4 --q-lstm-hidden-size=3 --p-lstm-hidden-size=2 --obs-embedding-dim=4 --batch-size=3"
    " --num-particles=2 --memory-size=2 --pretrain-iterations=1 --likelihood=bernoulli --dataset-size=10"
    " --data-location=data.mat --no-compile"
).split()
LEFT_OUT = "-h --cuda --tensorboard --test-run --compile --data-location --find-characters --num-iterations".split()
# So that cases stay small
LARGEST = {"--num-arcs": 7, "--num-primitives": 130, "--dataset-size": 25, "--pretrain-iterations": 2}


def draw_value(random_state, action):
    """A word that sets an option to a value from its type, or None for an option that is left out"""
    flag = action.option_strings[0]
    if flag in LEFT_OUT:
        return None
    if action.nargs == 0:
        return flag
    if action.choices:
        return f"{flag}={random_state.choice(list(action.choices))}"
    if action.type is util.to_run_name:
        return f"{flag}={random_state.choice(['mine', '1', 'a=b', 'x.pt'])}"
    setting = util.get_fields()[action.dest].setting
    low, high = setting.low or 0, min(setting.high or 5, LARGEST.get(flag, 5))
    if flag == "--dataset-size":
        return f"{flag}={random_state.choice([5, 10, 25])}"
    value = random_state.choice([low, high, random_state.uniform(low, high)])
    return f"{flag}={value if action.type.__name__ == 'float' else round(value)}"


def draw_cases(num, seed):
    """Lists of words: every option alone, then random pairs"""
    random_state = random.Random(seed)
    actions = [action for action in main.get_parser()._actions if draw_value(random_state, action)]
    alone = [[action] for action in actions]
    algorithm = [action for action in actions if "--algorithm" in action.option_strings]
    pairs = ([*random_state.sample(actions, 2), *algorithm] for _ in itertools.count())
    for some in itertools.islice(itertools.chain(alone, pairs), num):
        yield [draw_value(random_state, action) for action in some]


def parse(words):
    """Returns: main.py's arguments; None if the command line refuses them"""
    given = [flag for flag in TINY if not ("--small-dataset" in words and flag.startswith("--dataset-size"))]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            main.parse_args([*given, *words])
    except (UserError, SystemExit):
        return None
    return [*given, *words]


def check(words, draw):
    """One case, in the working directory"""
    flags = parse(words)
    if flags is None:
        return False
    path_base = util.get_path_base(main.parse_args(flags))
    states = []
    for stops in ([2], [1, 2]):
        for num_iterations in stops:
            assert main.main([*flags, f"--num-iterations={num_iterations}"]) == 0
        for path in checkpoints.get_path(path_base).parent.glob("*.pt"):
            checkpoints.load(path)
        states.append(util.load_checkpoint(checkpoints.get_path(path_base)))
        shutil.move(util.SAVE / path_base, f"state{len(states)}")
    states[1]["args"] = states[0]["args"]
    assert_same(*states)
    if draw:
        (util.SAVE / path_base).mkdir()
        shutil.move("state2/checkpoints", util.SAVE / path_base)
        assert diagnostics.main(["--num-reconstructions=2", "--num-prior-samples=2", f"--checkpoint-path={path_base}"]) == 0
        evaluation = "--algorithm=own --mode=train --num-data=2 --test-num-particles=3 --no-compile".split()
        assert eval_logp.main([*evaluation, f"--checkpoint-path={path_base}"]) == 0
    for folder in ["state1", "state2", "save"]:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def check_all(num, seed, draw_every, part=slice(None)):
    """Returns: how many of the cases the command line accepts"""
    scipy.io.savemat("data.mat", make_mat(80, 6))
    num_valid = 0
    for i, words in enumerate([*draw_cases(num, seed)][part]):
        try:
            num_valid += check(words, draw=i % draw_every == 0)
        except BaseException:
            print(f"failed: {' '.join([*TINY, *words])}", file=sys.stderr)
            raise
    return num_valid


@pytest.mark.parametrize("part", range(4))
def test_what_a_run_saves_is_valid(tmp_path, monkeypatch, part):
    """20 cases, in four parts that run side by side"""
    monkeypatch.chdir(tmp_path)
    assert check_all(20, seed=0, draw_every=10, part=slice(part, None, 4)) > 2


def test_no_gradients_no_refusal(folder):
    """Parameters that the loss does not depend on; found by the test above on an older version"""
    for words in [["--num-arcs=1"], ["--p-uniform-mixture=1"], ["--num-primitives=1", "--num-arcs=2", "--algorithm=rws"]]:
        assert check(words, draw="--num-arcs=1" in words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num", type=int)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        accepted = check_all(arguments.num, arguments.seed, draw_every=10)
        os.chdir(ROOT)
    print(f"{accepted} of {arguments.num} cases are accepted by the command line; all of them hold")
