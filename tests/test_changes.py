"""A researcher's change is made in one place, and works through kill, resume, pictures, evaluation and sweep: each is made to
the text of a copy of the project, which is then used as a researcher would use it."""

import argparse
import collections
import enum
import functools
import inspect
import json
import pathlib
import shutil
from typing import Annotated

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same
from test_models import GRUDecoder, MixtureWeights

import data
import eval_logp
import losses
import main
import models
import util
from runs import checkpoints

TINY = (
    "--data-location=data.mat --small-dataset --num-arcs=3 --num-primitives=5 --q-lstm-hidden-size=8 --obs-embedding-dim=8 --batch-size=5"
    " --num-particles=2 --log-interval=3 --no-compile --pretrain-iterations=2 --num-iterations=6"
).split()

ADAMW = {
    "main.py": [
        ("torch.optim.Adam(groups, lr=lr,", "torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1,"),
        (
            "        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)\n",
            "        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.num_iterations)\n"
            '        self.parts["schedule"] = schedule\n'
            "        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)\n",
        ),
    ]
}


def get_code(kind):
    """Of a class in test_models.py, as it would stand in models.py"""
    return inspect.getsource(kind).replace("models.", "").replace("torch.nn.", "nn.")


GRU = {
    "models.py": [
        (
            "# ------------------------------------------------------------------ likelihoods\n",
            f"{get_code(GRUDecoder)}\n\n# ------------------------------------------------------------------ likelihoods\n",
        ),
        ("self.prior = Decoder(", "self.prior = GRUDecoder("),
    ]
}
WEIGHTS = {
    "models.py": [
        (
            "# The choices of main.py's --likelihood\n",
            f"{get_code(MixtureWeights)}\n\n# The choices of main.py's --likelihood\n",
        ),
        ('"bernoulli": Bernoulli}', '"bernoulli": Bernoulli, "weights": MixtureWeights}'),
        ("import argparse\n", "import argparse\nfrom typing import Annotated\n"),
    ]
}
OBJECTIVE = {
    "losses.py": [
        (
            '    return loss, {"phi_loss": loss.detach()}\n\n\ndef sleep_in_parts',
            '    return loss, {"phi_loss": loss, "bias": inference_network.decoder.linear.bias[1]}\n\n\ndef sleep_in_parts',
        ),
        (
            'util.CHOICES["algorithm"] = OBJECTIVES\n',
            '''

def init_annealed(num_data, num_arcs, num_primitives, memory_size: Annotated[int, MEMORY_SIZE] = 10):
    memory = init_memory(num_data, memory_size, num_arcs, num_primitives)
    scale = torch.nn.Parameter(torch.ones(()))
    return {"memory": memory, "baseline": torch.zeros(()), "scale": scale, "scale_optimizer": torch.optim.Adam([scale], 0.1)}


@keeps(init_annealed)
def annealed(
    generative_model, inference_network, obs, obs_id, num_particles, alphabet, iteration, memory, baseline, scale, scale_optimizer,
    start: Annotated[float, Setting("temperature at first", 1, 100)] = 2.0,
    decay: Annotated[float, Setting("iterations in which it falls", 1)] = 4.0,
):
    """MWS at a temperature that falls to one, with a running mean of the loss as a statistic"""
    loss, statistics = mws(generative_model, inference_network, memory, obs, obs_id, num_particles, alphabet)
    temperature = 1 + (start - 1) * (-iteration / decay).exp()
    baseline.mul_(0.9).add_(0.1 * loss.detach())
    scale_optimizer.zero_grad()
    scale.square().backward()
    scale_optimizer.step()
    statistics |= {"test_gap": loss.detach() - baseline, "temperature": temperature, "done": iteration, "baseline": baseline}
    return loss * scale.detach() / temperature, statistics


OBJECTIVES["annealed"] = annealed
util.CHOICES["algorithm"] = OBJECTIVES
''',
        ),
    ]
}
FLOAT64 = {
    "models.py": [
        (
            "return generative_model.to(device), inference_network.to(device)",
            "return generative_model.to(device).double(), inference_network.to(device).double()",
        )
    ]
}
ROUGH = {  # what works in a first draft: NumPy's numbers and random numbers, layers of one's own
    "main.py": [
        ("import math\n", "import math\nimport random\n\nimport numpy as np\n"),
        (
            "class Run:\n",
            "class Best:\n"
            "    value = 1e9\n\n"
            "    def state_dict(self):\n"
            "        return {'value': self.value}\n\n"
            "    def load_state_dict(self, state):\n"
            "        self.value = state['value']\n\n\n"
            "class Run:\n",
        ),
        (
            "        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)\n",
            "        self.state['mean'] = self.parts['mean'] = torch.zeros(())\n"
            "        self.best = self.parts['best'] = Best()\n"
            "        freeze = lambda run: run.iteration == 2 and run.generative_model.pre_dxdy.requires_grad_(False)\n"
            "        more = lambda run: setattr(run.args, 'num_particles', run.args.num_particles + 1)\n"
            "        self.callbacks += [(2, freeze), (2, more)]\n"
            "        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)\n",
        ),
        (
            "    loss, statistics = losses.get_loss(args, step, run.state)\n",
            "    step = step._replace(obs=step.obs.roll(np.random.randint(3) + random.randrange(3), 1))\n"
            "    loss, statistics = losses.get_loss(args, step, run.state)\n"
            "    run.state['mean'].mul_(0.9).add_(0.1 * loss.detach())\n"
            "    run.best.value = min(run.best.value, np.float32(loss.item()))\n"
            "    run.reason = run.iteration == 5\n",
        ),
    ],
    "models.py": [
        (
            "        self.conv0 = nn.Conv2d(1, 64, 3, padding=2)\n",
            "        self.conv0 = nn.Sequential(nn.Conv2d(1, 64, 3, padding=2), nn.BatchNorm2d(64))\n"
            "        self.register_buffer('total', torch.full((), 1e-9, dtype=torch.double))\n",
        ),
        (
            "    def embed(self, obs):\n",
            "    def get_extra_state(self):\n        return {'x': 1}\n\n    def embed(self, obs):\n",
        ),
        (
            "class InferenceNetwork(_Network):\n",
            "class InferenceNetwork(_Network):\n    def set_extra_state(self, state):\n        pass\n",
        ),
    ],
    "util.py": [
        (
            "    q_lstm_hidden_size:",
            "    scales: Annotated[tuple, Setting('unused', parse=lambda text: tuple(map(float, text.split(','))))] = (1.0, 2.0)\n"
            "    q_lstm_hidden_size:",
        )
    ],
}
CASES = {
    "rough": (ROUGH, ["--algorithm=rws", "--scales=0.5,3"], ["scales=0.5-3.0-"]),
    "training": ({**ADAMW, **OBJECTIVE}, ["--algorithm=annealed", "--memory-size=2", "--decay=3"], ["decay=3.0"]),
    "models": (
        {"models.py": [*GRU["models.py"], *WEIGHTS["models.py"], *FLOAT64["models.py"]]},
        ["--algorithm=rws", "--likelihood=weights", "--num-maps=4"],
        ["num-maps=4"],
    ),
}  # name: changes, flags, what the run's name says of them

USE = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import diagnostics, eval_logp, main, sweep, util
flags = json.loads(sys.argv[2])
path_base = util.get_path_base(main.parse_args(flags))
train_step = main.train_step

def interrupt(run, obs_id):
    if run.iteration == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(run, obs_id)

assert main.main([*flags, "--name=whole"]) == 0
main.train_step = interrupt
assert main.main(flags) == 128 + signal.SIGTERM
main.train_step = train_step
assert main.main(flags) == 0
assert diagnostics.main(["--checkpoint-path", path_base, "--num-reconstructions=2", "--num-prior-samples=2"]) == 0
evaluate = "--num-data=2 --num-particles=3 --test-num-particles=10 --no-compile --num-iterations=3 --memory-size=5".split()
for algorithm in ["own", "mws"]:
    assert eval_logp.main([*evaluate, "--effort=0.01", "--checkpoint-path", path_base, "--algorithm", algorithm]) == 0
assert eval_logp.main(["--report"]) == 0
names = list(sweep.get_runs(sweep.parse_args(["--models", "rws_5", "--", *flags])))
print(json.dumps([path_base, names]))
"""


def change(copy, changes):
    """Replaces texts in files of a copy"""
    for name, pairs in changes.items():
        text = (copy / name).read_text()
        for old, new in pairs:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (copy / name).write_text(text)


@pytest.fixture
def copy(folder):
    """A copy of the project's modules, beside data of five alphabets"""
    left_out = shutil.ignore_patterns(".*", "docs", "pretrained", "save", "shared", "tests", "__pycache__")
    return pathlib.Path(shutil.copytree(ROOT, folder / "changed_copy", ignore=left_out))


def use(code, *argv):
    process = forks.run(code, *argv)
    assert process.returncode == 0, process.stderr[-3000:]
    return process


def load(path_base, name="latest"):
    return torch.load(f"save/{path_base}/checkpoints/{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_a_change_works_everywhere(copy, name):
    changes, flags, words = CASES[name]
    change(copy, changes)
    process = use(USE, str(copy), json.dumps([*TINY, *flags]))
    path_base, names = json.loads(process.stdout.splitlines()[-1])
    assert names == [path_base] and all(word in path_base for word in words)
    whole, resumed = load("whole"), load(path_base)
    resumed["args"], whole["args"] = {}, {}
    assert_same(resumed, whole)
    if name == "training":
        assert resumed["schedule"]["last_epoch"] == 6 and resumed["optimizer"]["param_groups"][0]["lr"] < 1e-9
        assert resumed["hyperparameters"]["optimizer"][0]["betas"] == [0.9, 0.95]
        table = resumed["statistics"]["train"]
        torch.testing.assert_close(table["temperature"], 1 + (-torch.arange(6.0) / 3).exp())
        assert table["test_gap"].isfinite().all() and resumed["baseline"] != 0 and resumed["memory"].shape == (50, 2, 3)
        assert table["done"].tolist() == list(range(6)) and table["baseline"].unique().numel() == 6
        assert resumed["scale"] == pytest.approx(0.4, abs=0.05)
        assert resumed["statistics"]["pretrain"]["bias"].unique().numel() == 2  # values of then, not of when they were saved
        assert {"temperature", "test_gap"} <= set(open(f"save/{path_base}/losses.csv").readline().strip().split(","))
    elif name == "rough":
        assert resumed["reason"] == "True" and resumed["iteration"] == 6 and resumed["mean"] != 0
        assert type(resumed["best"]["value"]) is float and resumed["best"]["value"] < 1e9
        assert resumed["requires_grad"] == {"generative_model.pre_dxdy": False} and resumed["changed_args"] == {
            "num_particles": 4
        }
        assert resumed["inference_network"]["total"] == torch.tensor(1e-9, dtype=torch.double)
    else:
        model = resumed["generative_model"]
        assert model["weight_logits"].shape == (4,) and "prior.gru.weight_hh" in model
        assert model["weight_logits"].abs().sum() > 0 and all(x.dtype == torch.double for x in model.values())


CONTINUE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import diagnostics, eval_logp, main, util
flags = json.loads(sys.argv[2])
assert main.main(flags) == 0
path_base = util.get_path_base(main.parse_args(flags))
assert diagnostics.main(["--checkpoint-path", path_base, "--loss-only"]) == 0
evaluate = "--num-data=2 --test-num-particles=10 --no-compile --algorithm=rws --num-particles=3 --num-iterations=12 --force".split()
assert eval_logp.main([*evaluate, "--checkpoint-path", path_base]) == 0
print(path_base)
"""


def test_a_run_goes_on_with_changed_settings_and_statistics(copy):
    """A setting more and a renamed one, a statistic more and one less: old checkpoints stay in use, under the same name. Of
    hyperparameters the code's hold, and the change is named"""
    flags = [*TINY, "--algorithm=rws"]
    before = use(CONTINUE, str(copy), json.dumps([*flags, "--prior-lr-factor=0.5"])).stdout.splitlines()[-1]
    change(copy, {
        "util.py": [
            ("    prior_lr_factor: Annotated[float, Setting(", '    temperature: Annotated[float, Setting("of nothing")] = 1.0\n'
             '    prior_rate: Annotated[float, Setting(formerly="prior_lr_factor", help='),
        ],
        "main.py": [("args.prior_lr_factor)", "args.prior_rate)"), ("lr=1e-3):\n    \"\"\"Adam for both", "lr=2e-3):\n    \"\"\"Adam for both")],
        "losses.py": [("def rws(log_p, log_q):", "def rws(log_p, log_q, iteration):"), (
            '    return theta_loss + phi_loss, {"theta_loss": theta_loss, "phi_loss": phi_loss, "effective_sample_size": size}\n\n\n'
            "@particle_objective\ndef wake_theta",
            '    return theta_loss + phi_loss, {"theta_loss": theta_loss, "done": iteration, "spread": log_weight.std(), "one": 1}\n\n\n'
            "@particle_objective\ndef wake_theta",
        )],
    })  # fmt: skip
    flags = [*flags, "--prior-lr-factor=0.5", "--num-iterations=9"]  # by its old name
    process = use(CONTINUE, str(copy), json.dumps(flags))
    assert process.stdout.splitlines()[-1] == before and "prior-lr-factor=0.5" in before
    assert "optimizer: lr changed from 0.001 to 0.002; using that of the code" in process.stderr
    table = load(before)["statistics"]["train"]
    assert table["iteration"].tolist() == list(range(1, 10))
    assert table["effective_sample_size"].isfinite().tolist() == [True] * 6 + [False] * 3
    assert table["spread"].isfinite().tolist() == [False] * 6 + [True] * 3 and table["done"][6:].tolist() == [6, 7, 8]
    result = torch.load(f"save/{before}/logp/test_rws.pt", weights_only=True)
    assert result["statistics"]["train"]["done"].tolist() == list(range(12))
    assert load(before)["optimizer"]["param_groups"][0]["lr"] == 2e-3


def get_parts(make_schedule=None, lr=1e-3, num_groups=1):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3))]} for _ in range(num_groups)]
    parts = {"optimizer": torch.optim.Adam(groups, lr)}
    hyperparameters = checkpoints.get_hyperparameters(parts)
    if make_schedule:
        parts["schedule"] = make_schedule(parts["optimizer"])
    return parts, hyperparameters


def make_cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)


@pytest.mark.parametrize(
    "options, lr, warning",
    [
        ([make_cosine], 5e-4, ""),
        (
            [make_cosine, 2e-3],
            5e-4,
            "schedule: base_lrs is [0.001] in the checkpoint and [0.002] in the code; the schedule goes on",
        ),
        ([None], 1e-3, "optimizer: lr changed from 0.0005 to 0.001; using that of the code"),
        ([lambda x: torch.optim.lr_scheduler.ExponentialLR(x, 0.9)], 1e-3, "schedule: a different kind of schedule"),
        ([lambda x: torch.optim.lr_scheduler.LinearLR(x, 0.1)], 1e-4, "schedule: a different kind of schedule"),
        ([None, 1e-3, 2], 1e-3, "optimizer: a different kind of optimiser, or number of groups"),
        ([make_cosine, 1e-3, 2], 1e-3, "schedule: its optimiser starts afresh"),
    ],
)
def test_learning_rates_under_changed_schedules(options, lr, warning, capsys):
    """After half of a cosine from 1e-3"""
    parts, hyperparameters = get_parts(make_cosine)
    for _ in range(8):
        parts["optimizer"].step()
        parts["schedule"].step()
    saved = {**checkpoints.get_states(parts), "hyperparameters": hyperparameters}
    ours, hyperparameters = get_parts(*options)
    checkpoints.restore_parts(ours, saved, hyperparameters)
    assert [group["lr"] for group in ours["optimizer"].param_groups] == pytest.approx([lr] * len(hyperparameters["optimizer"]))
    stderr = capsys.readouterr().err
    assert warning in stderr and stderr.count("\n") == bool(warning) + ("its optimiser" in warning)


@pytest.mark.parametrize("second", ["exponential", "cosine"])
def test_schedules_that_follow_each_other(second, capsys):
    """The state of another kind is not used, even if it is the second's"""

    def make(optimizer, second="exponential"):
        first, exponential = (torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in (0.5, 0.9))
        return torch.optim.lr_scheduler.SequentialLR(
            optimizer, [first, exponential if second == "exponential" else make_cosine(optimizer)], [4]
        )

    parts, hyperparameters = get_parts(make)
    saved = {**checkpoints.get_states(parts), "hyperparameters": hyperparameters}
    ours, hyperparameters = get_parts(functools.partial(make, second=second))
    checkpoints.restore_parts(ours, saved, hyperparameters)
    assert ("schedule: a different kind of schedule" in capsys.readouterr().err) == (second == "cosine")


@pytest.mark.parametrize("changed", [{"momentum": 0.9}, {"centered": True}, {"alpha": 0.9}])
def test_options_of_an_optimiser_that_need_more_state(changed, capsys):
    """It then starts afresh, and only then"""

    def step(parameter, optimizer):
        parameter.grad = torch.ones(3)
        optimizer.step()

    parameter = torch.nn.Parameter(torch.zeros(3))
    before, after = ({"optimizer": torch.optim.RMSprop([parameter], **options)} for options in ({}, changed))
    step(parameter, before["optimizer"])
    saved = {**checkpoints.get_states(before), "hyperparameters": checkpoints.get_hyperparameters(before)}
    checkpoints.restore_parts(after, saved, checkpoints.get_hyperparameters(after))
    step(parameter, after["optimizer"])
    assert ("it is initialised afresh" in capsys.readouterr().err) == ("alpha" not in changed)


def test_what_an_optimiser_keeps_in_its_groups_is_restored(capsys):
    """Also what a new one lacks; a rate of many digits that a schedule has left alone has not changed"""
    parts, hyperparameters = get_parts(lambda x: torch.optim.lr_scheduler.StepLR(x, 100), lr=1 / 3000)
    parts["optimizer"].param_groups[0]["count"] = 2
    saved = {**checkpoints.get_states(parts), "hyperparameters": hyperparameters}
    ours, hyperparameters = get_parts(None, lr=1 / 3000)
    checkpoints.restore_parts(ours, saved, hyperparameters)
    (group,) = ours["optimizer"].param_groups
    assert group["count"] == 2 and group["lr"] == 1 / 3000 and "initial_lr" not in group
    assert not capsys.readouterr().err


def test_parameters_in_the_state_are_trained_once(monkeypatch):
    """By the run's optimiser, unless one in the state trains them"""

    def init():
        critic = torch.nn.Linear(28 * 28, 1)
        return {
            "temperature": torch.nn.Parameter(torch.ones(())),
            "critic": critic,
            "own": torch.optim.SGD(critic.parameters()),
        }

    @losses.keeps(init)
    @losses.particle_objective
    def tempered(log_p, log_q, temperature):
        return temperature**2 - log_p.mean(), {}

    monkeypatch.setitem(losses.OBJECTIVES, "tempered", tempered)
    run = make_run("--algorithm=tempered")
    main.train_step(run, torch.arange(5))
    assert run.state["temperature"].item() == pytest.approx(1 - 1e-3) and len(run.optimizer.param_groups[-1]["params"]) == 1


def test_another_cell_is_not_taken_for_an_lstm():
    class Normalised(torch.nn.LSTMCell):
        def forward(self, x, state=None):
            return tuple(torch.nn.functional.layer_norm(part, part.shape[1:]) for part in super().forward(x, state))

    model = models.GenerativeModel()
    model.prior.lstm = Normalised(66, 64)
    with pytest.raises(TypeError, match="for another cell .Normalised., override its _step"):
        model.sample(2)


def make_run(*flags):
    return main.Run(main.parse_args([*TINY, *flags]), data.load("glyphs", dataset_size=14), torch.device("cpu"))


def test_a_model_whose_shape_has_changed_is_not_saved(folder):
    """As when a callback leaves out maps: no evaluation could load it"""
    run = make_run()
    path, before = main.save(run), torch.get_rng_state()
    content = path.read_bytes()
    maps = run.generative_model.likelihood.theta_affine
    maps.data = maps.data[:20].clone()
    with pytest.raises(util.UserError, match="does not make this program's models .*size mismatch for likelihood.theta_affine"):
        main.save(run)
    assert path.read_bytes() == content and torch.equal(torch.get_rng_state(), before)


def test_a_setting_that_cannot_be_saved_is_named():
    with pytest.raises(util.UserError, match="the setting mine of the run cannot be saved and loaded: it holds more"):
        checkpoints.copy({"args": {"seed": 0, "mine": pathlib.Path("a")}})


def test_the_network_of_an_evaluation_is_built_as_a_runs_is(monkeypatch):
    """But for what the evaluation itself sets"""
    build = models.build_inference_network
    monkeypatch.setattr(models, "build_inference_network", lambda *args, **others: build(*args, **others, obs_embedding_dim=7))
    args = vars(main.parse_args(["--num-primitives=5", "--num-arcs=3", "--q-uniform-mixture=0.5"]))
    evaluation = argparse.Namespace(algorithm="sleep", lstm_hidden_size=9)
    network = eval_logp.build_network(evaluation, dict(args=args, num_alphabets=4), 2)
    assert network.conv3.out_channels == 7 and network.num_alphabets == 4
    decoder = network.decoder
    assert (decoder.num_primitives, decoder.num_arcs, decoder.uniform_mixture, decoder.lstm.hidden_size) == (5, 3, 0, 9)


def test_a_likelihood_with_a_parameter_of_the_models_name(monkeypatch):
    class Wide(models.Bernoulli):
        def __init__(self):
            super().__init__()
            self.pre_width = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setitem(models.LIKELIHOODS, "wide", Wide)
    with pytest.raises(util.UserError, match="the likelihood wide has a parameter pre_width, as the model has: rename it"):
        models.GenerativeModel(likelihood="wide")


def test_divergence_of_the_state_and_losses_that_are_no_numbers(monkeypatch, capsys):
    """Parameters in the state are finite in what is saved, as the models' are; a loss may be nan although they are"""
    init = losses.keeps(lambda num_alphabets: {"critic": torch.nn.Linear(1, num_alphabets)})
    monkeypatch.setitem(losses.OBJECTIVES, "mine", init(lambda **_: None))
    run = make_run("--algorithm=mine", "--condition-on-alphabet")
    assert run.state["critic"].out_features == 14
    run.get_checkpoint()
    run.state["critic"].weight.data[3] = torch.nan
    with pytest.raises(util.UserError, match="training has diverged"):
        run.get_checkpoint()
    run.state["critic"].weight.data[3] = run.iteration = 3
    run.record("train", {"theta_loss": torch.nan, "phi_loss": 1.0})
    run.curves = argparse.Namespace(update=lambda statistics: None)
    main.show(run, util.show_progress(total=5, disable=True))
    assert "warning: theta_loss is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["obs", "optimizer", "alphabet"])
def test_names_of_state_that_are_taken(name, monkeypatch):
    monkeypatch.setitem(losses.OBJECTIVES, "mine", losses.keeps(lambda: {name: torch.zeros(())})(lambda **_: None))
    with pytest.raises(util.UserError, match=f"a part called {name}: the name is taken"):
        losses.init_state(argparse.Namespace(algorithm="mine"), 5, torch.device("cpu"))


def test_a_partial_of_an_objective_keeps_what_it_fixes_and_the_state(monkeypatch):
    """Its arguments are not replaced by the run's of the same name, nor those of its state, and what it fixes is no setting"""
    taken = []

    def init(num_data, weight):
        return {"memory": torch.full((num_data,), weight)}

    def plain(memory, num_particles, weight: Annotated[float, util.Setting("a weight")] = 1.0):
        taken.append((memory.tolist(), num_particles, weight))
        return memory.sum(), {}

    def pass_on(objective):
        return functools.wraps(objective)(lambda *args, iteration, **others: objective(*args, **others))

    mine, fixed = losses.keeps(init)(functools.partial(plain)), dict(num_particles=3, weight=2.0)
    kept_later = losses.keeps(init)(functools.partial(plain, **fixed))
    losses.keeps(init)(plain)
    ours = functools.partial(plain, **fixed)
    for name, objective in [("mine", mine), ("wrapped", pass_on(plain)), ("ours", ours), ("theirs", kept_later)]:
        monkeypatch.setitem(losses.OBJECTIVES, name, objective)
        args = main.parse_args(["--algorithm", name, "--num-particles", "4", "--weight", "5"])
        step = losses.Step(*[torch.nn.Linear(1, 1)] * 2, torch.zeros(1), None, None, 4, 0, torch.tensor(0))
        losses.get_loss(args, step, losses.init_state(args, 2, torch.device("cpu")))
    assert taken == [([5.0, 5.0], 4, 5.0)] * 2 + [([2.0, 2.0], 3, 2.0)] * 2
    assert util.get_fields()["weight"].owners == (("algorithm", "mine"), ("algorithm", "wrapped"))
    monkeypatch.setitem(losses.OBJECTIVES, "rws_3", functools.partial(losses.rws, num_particles=3))
    assert main.parse_args(["--algorithm", "rws_3"]).algorithm == "rws_3"


def test_frozen_parameters_stay_as_they_are():
    frozen, free = (torch.nn.Parameter(torch.ones(2), requires_grad=x) for x in (False, True))
    main.update(torch.optim.AdamW([frozen, free], weight_decay=0.1), free.sum())
    assert torch.equal(frozen, torch.ones(2)) and (free < 1).all()
    parts = {"state": free, "layer": torch.nn.Linear(1, 1), "computed": free.sum()}
    parts["layer"].bias.requires_grad_(False)
    assert checkpoints.get_requires_grad(parts) == {"state": True, "layer.weight": True, "layer.bias": False}
    checkpoints.set_requires_grad(parts, {"state": False, "layer.bias": True, "gone": True})
    assert checkpoints.get_requires_grad(parts) == {"state": False, "layer.weight": True, "layer.bias": True}


def test_callbacks_and_a_reason_to_stop(copy):
    """Images drawn in a callback leave the run's random numbers as they are; a reason completes it"""
    change(copy, {
        "main.py": [(
            "        self.num_called = 0",
            "        def look(run):\n"
            "            run.generative_model.sample(3)\n"
            "            run.record('test', {'looked': run.iteration})\n"
            "            assert len(run.statistics['train']['iteration']) == run.iteration and not run.generative_model.training\n"
            "            run.reason = 'it has seen enough' if run.iteration == 4 else ''\n"
            "            return False\n"
            "        self.callbacks.append((2, look))\n"
            "        self.num_called = 0",
        )],
    })  # fmt: skip
    code = CONTINUE.replace("assert main.main(flags) == 0\n", "assert main.main(flags) == main.main(flags) == 0\n")
    process = use(code, str(copy), json.dumps([*TINY, "--algorithm=rws"]))
    assert "is complete: 4 iterations, stopped because it has seen enough" in process.stdout
    path_base, stopped = process.stdout.splitlines()[-1], load(process.stdout.splitlines()[-1])
    shutil.move("save", "stopped")
    main.main([*TINY, "--algorithm=rws", "--num-iterations=4"])
    whole = load(path_base)
    for part in ["generative_model", "inference_network"]:
        assert_same(stopped[part], whole[part])


def test_what_cannot_be_resumed_is_refused_before_the_first_step(copy):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import main, util; sys.argv[1:2] = []; util.run_script(main.main)"
    before = "        self.hyperparameters = checkpoints.get_hyperparameters(self.parts)\n"
    missing = "self.state['mine'] = torch.zeros(3)"
    for part in ["self.parts['iteration'] = torch.zeros(3)", "self.parts['mine'] = Mine()", missing]:
        state = "class Mine:\n    def state_dict(self):\n        return {'x': signal}\n\n\nclass Run:\n"
        text = (copy / "main.py").read_text()
        change(copy, {"main.py": [(before, f"        {part}\n{before}"), ("class Run:\n", state)]})
        process = forks.run(code, str(copy), *TINY)
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert ("part mine" in process.stderr) == ("mine" in part) and not list(pathlib.Path("save").glob("*/checkpoints/*"))
        (copy / "main.py").write_text(text)


Level = enum.IntEnum("Level", "LOW HIGH")


@pytest.mark.parametrize(
    "value", [{np.int64(3): 1}, {3: collections.deque([1.0])}, [Level.LOW], (torch.Size([2]),), collections.defaultdict(int)]
)
def test_what_looks_plain_but_may_not_load_is_tried(value):
    """Such as counts by obs_id.numpy(), or what an optimiser keeps from its first step on"""
    assert not checkpoints.is_plain({"part": value})
    assert checkpoints.is_plain(
        dict(torch.nn.BatchNorm1d(2).state_dict(), x=[(1, 2.0), None, {"a": True, 3: torch.nn.Parameter()}])
    )


@pytest.mark.parametrize("rate", [torch.tensor(1e-3), torch.tensor([1e-3]), torch.tensor(1e-3, requires_grad=True)])
def test_a_rate_that_is_a_tensor_stays_the_same_tensor(rate):
    parts, hyperparameters = get_parts(lr=rate)
    saved = {**checkpoints.get_states(parts), "hyperparameters": hyperparameters}
    saved["optimizer"]["param_groups"][0]["lr"] = torch.full_like(rate, 5e-4)
    checkpoints.restore_parts(parts, saved, hyperparameters)
    assert parts["optimizer"].param_groups[0]["lr"] is rate and rate == 5e-4


def test_an_optimiser_replaced_on_the_way_starts_afresh(capsys):
    run = make_run("--algorithm=rws")
    run.optimizer = run.parts["optimizer"] = torch.optim.SGD(run.generative_model.parameters(), momentum=0.9)
    main.train_step(run, torch.arange(5))
    make_run("--algorithm=rws").restore(checkpoints.fill_in(checkpoints.copy(run.get_checkpoint())))
    assert "optimizer: a different kind of optimiser" in capsys.readouterr().err


def test_settings_in_a_group_of_their_own_or_without_a_value(monkeypatch):
    def to_norm(text):
        return None if text == "none" else float(text)

    @losses.particle_objective
    def clipped(
        log_p,
        log_q,
        clip: Annotated[float | None, util.Setting("norm of the gradient", parse=to_norm, group="averaging")] = 1.0,
    ):
        return log_p.sum(), {"huge": 1e300}

    monkeypatch.setitem(losses.OBJECTIVES, "clipped", clipped)
    monkeypatch.setitem(util.CHOICES, "test_batch_size", {5: torch.relu})  # a built-in function declares no settings
    for text, clip in [("none", None), ("2", 2.0)]:
        args = main.parse_args(["--algorithm=clipped", f"--clip={text}"])
        assert args.clip == clip and vars(main.parse_args(util.get_flags(args))) == vars(args)
    step = losses.Step(*models.build(args, 0), torch.zeros(1, 28, 28), None, None, 2, 0, torch.tensor(0))
    assert losses.get_loss(args, step, {})[1]["huge"] == torch.inf


@functools.cache
def get_mask():
    return torch.ones(28, 28)


class Masked(models.Bernoulli):
    def __init__(self, num_blurs: Annotated[int | None, util.Setting("of the mask", 1, group="model")] = None):
        super().__init__()
        self.register_buffer("mask", get_mask(), persistent=False)
        self.turn = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 5))


@pytest.mark.parametrize("num_primitives", [5, 2000])
def test_constants_and_parametrisations_of_a_part(num_primitives, monkeypatch):
    """Whether or not sizes are compared on the meta device first, where they are another"""
    monkeypatch.setitem(models.LIKELIHOODS, "masked", Masked)
    args = util.make_args({"likelihood": "masked", "num_primitives": num_primitives})
    get_mask() if num_primitives > 5 else get_mask.cache_clear()
    states = [model.state_dict() for model in models.build(args, 0)]
    get_mask() if num_primitives > 5 else get_mask.cache_clear()
    checkpoint = dict(args=vars(args), num_alphabets=0, generative_model=states[0], inference_network=states[1])
    model, _ = models.from_checkpoint(checkpoint)
    assert model.likelihood.mask.sum() == 28 * 28 and any(name.endswith("base") for name in states[0])


def test_a_schedule_that_has_ended():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    run = argparse.Namespace(get_schedulers=lambda: [schedule])
    optimizer.step()
    main.step_schedules(run)
    with pytest.raises(util.UserError, match="cannot go on: Tried to step 3 times.*; give it the full length at the start"):
        for _ in range(2):
            main.step_schedules(run)


class Replacing(torch.optim.lr_scheduler.LRScheduler):
    """Puts a number in place of a learning rate that is a tensor, as torch's CosineAnnealingWarmRestarts did until 2.9"""

    def get_lr(self):
        return [0.5**self.last_epoch]

    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5**self.last_epoch


@pytest.mark.parametrize(
    "lr, make_schedule, changes_number",
    [
        (torch.tensor(1.0), Replacing, False),
        (1.0, Replacing, True),
        (torch.tensor(1.0), lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), False),
        (1.0, lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), True),
        (1.0, lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), False),
    ],
)
def test_a_recorded_step_notices_a_schedule(lr, make_schedule, changes_number):
    """It reads a tensor anew, but no number"""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([parameter], lr=lr, fused=torch.is_tensor(lr))
    schedule = make_schedule(optimizer)
    (group,), run = optimizer.param_groups, argparse.Namespace(get_schedulers=lambda: [schedule])
    group["lr"] = lr  # set on a GPU once all parts exist
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert main.step_schedules(run) == changes_number
    assert group["lr"] == (1.0 if isinstance(schedule, torch.optim.lr_scheduler.ConstantLR) else 0.5)
    assert group["lr"] is lr or not torch.is_tensor(lr)


def test_a_recorded_step_notices_a_schedule_of_momentum():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.1, fused=True)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cycle], [2])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)  # set on a GPU once all parts exist
    run = argparse.Namespace(get_schedulers=lambda: [schedule])
    optimizer.step()
    assert [main.step_schedules(run) for _ in range(4)] == [False, False, True, True]
