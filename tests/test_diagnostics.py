"""Pictures: figures, curves, and the script end to end."""

import gc
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.parse

import imageio.v3 as imageio
import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import find_chromium
from test_data import fill
from test_main import TINY
from test_util import cut

import data
import diagnostics
import eval_logp
import main
import models
import util
from reading import variation
from results import drawings, figures, report
from runs import checkpoints
from util import UserError

TRAIN = [*TINY, *"--likelihood learned-affine --data-location data.mat --pretrain-iterations 4 --num-iterations 12".split()]
DRAW = "--num-reconstructions 6 --num-prior-samples 5 --alphabet-num-rows 2 --alphabet-num-cols 2".split()

# ------------------------------------------------------------------ figures


def test_stages_and_tiles():
    model = models.GenerativeModel(num_arcs=5)
    latent, _ = model.sample(6)
    latent[0, :, 1] = 0
    latent[1, :, 1] = 1  # as in traces, whose first stroke may leave ink
    stages = drawings.draw_stages(variation.get_drawing(model, latent), 28)
    assert stages.shape == (6, 5, 28, 28)
    for z, stage in zip(latent, stages, strict=True):
        visible = z[:, 1].nonzero().squeeze(1).tolist()
        assert stage.isnan().flatten(1).all(1).tolist() == [i >= len(visible) for i in range(5)]
        if visible:
            torch.testing.assert_close(stage[len(visible) - 1], model.get_logits(z).sigmoid().detach())
            first = z.clone()
            first[visible[0] + 1 :, 1] = 0
            torch.testing.assert_close(stage[0], model.get_logits(first).sigmoid().detach())
    grid = figures.tile(torch.arange(3.0).view(3, 1, 1).expand(3, 28, 28), 2, below=4)
    assert grid.shape == (2 + 2 * 34, 2 + 2 * 30)
    assert (grid[2:30, 2:30] == 0).all() and (grid[2:30, 32:60] == 1).all() and (grid[36:64, 2:30] == 2).all()
    assert np.isnan(grid).sum() == grid.size - 3 * 28 * 28


def test_the_newest_stroke_is_in_colour_where_it_retraces_others():
    """And the paper, which is grey in young models and ends at the edge of a turned page, is not"""
    model = models.GenerativeModel(num_arcs=3)
    latent, _ = model.sample(1)
    latent[0, :, 1] = 1
    drawing = variation.get_drawing(model, latent)
    turned = drawing._replace(map=torch.tensor([[[0.7, 0.7, 0.0], [-0.7, 0.7, 0.0]]]))
    strokes, paper = drawings.draw_stages(turned, 28, alone=True), drawings.draw_parts(turned, 0 * turned.on.unsqueeze(1), 28)
    stages = strokes.cummax(1).values  # the second and third retrace the first where they are lighter
    stages[0, 1] = strokes[0, 1] = strokes[0, 0]
    colours = figures.colour_newest(stages, strokes, paper)
    assert torch.equal(colours[0, 0], colours[0, 1])
    is_grey = (colours.amax(-1) - colours.amin(-1) < 1e-6)[0, 0]
    is_paper = (strokes[0, 0] - paper[0, 0]) < 1e-9
    assert is_paper.any() and torch.equal(is_grey, is_paper)


def test_primitives_lie_within_their_tiles():
    model = models.GenerativeModel(num_primitives=1)
    with torch.no_grad():
        model.pre_dxdy.fill_(0.1)
    probs, _, side = drawings.draw_primitives(model, 56)
    edge = torch.cat([probs[0, 0], probs[0, -1], probs[0, :, 0], probs[0, :, -1]])
    params = model.get_rendering_params()
    half = drawings.get_half_width(*model.get_primitives()[0, 3:].tolist(), *params.tolist())
    assert edge.max() < probs.max() / 2 and side > 2 * half


def test_colours_and_names_of_lines(monkeypatch):
    """More lines than matplotlib has colours to start with differ; names of the same parts in another order keep apart"""
    kept = {}
    monkeypatch.setattr(figures, "save_pdf", lambda path, some: kept.setdefault(path, some[0]))
    lines = {f"model {i}": report.Line([1, 2], *[np.array([i, -np.inf])] * 3, np.array([i, i + 1])) for i in range(16)}
    title = ["the first 50 images", "", "best estimate; trained for 10000 to 200000 iterations " * 3]
    report.draw_lines("lines.pdf", lines, title, "iteration", limits=report.choose_limits(lines.values()))
    (axes,) = kept["lines.pdf"].axes
    assert len({line.get_color() for line in axes.lines}) == 16 and axes.get_ylim() == (-6.25, 19.0)
    assert kept["lines.pdf"].get_suptitle().replace("\n", " ").count("200000 iterations") == 3
    infinite = {"model": report.Line([1], *[np.array([-np.inf])] * 4)}
    assert report.choose_limits(infinite.values()) is None
    assert report.get_labels(["new_mws", "mws_new", "mws_old"])[0]["mws_new"] == "mws_new"


def test_curves_of_one_point_and_axes_of_own_statistics():
    table = dict.fromkeys(["theta_loss", "accuracy", "new_map"], torch.tensor([0.5]))
    statistics = {
        "train": {"iteration": torch.tensor([1]), **table},
        "test": {"iteration": torch.tensor([1]), "right": torch.ones(1)},
    }
    figure = figures.losses_figure(statistics, None, "title")
    assert [axes.get_ylabel() for axes in figure.axes] == ["nats per image", "", "share", ""]
    assert all(axes.lines[0].get_marker() == "." for axes in figure.axes)


def test_titles_lose_no_words():
    """Unless a single one, such as a run's name, is longer than a line; all frames of an animation are of the same size"""
    title = f"log p(x | strokes): the ink under them\n{'long_name' * 9}, iteration 5"
    words = figures.make_figure(3, 2, title).get_suptitle().split("\n")
    assert words[:2] == ["log p(x | strokes): the ink under them", f"{('long_name' * 9)[:18]}…{'long_name' * 2},"]
    assert words[2:] == ["iteration 5"]
    obs = torch.zeros(8, 28, 28)
    assert figures.pair_frame(obs, obs, "short").shape == figures.pair_frame(obs, obs, "a long title " * 20).shape


def test_thinned_curves():
    values = np.arange(1.0, 100_001)
    x, mean, low, high = figures.thin((values, values))
    assert len(x) == figures.MAX_POINTS
    assert x == pytest.approx(mean) and (low < mean).all() and (mean < high).all()
    x, mean, low, high = figures.thin((np.array([7.0, 9.0]), np.array([3.0, 1.0])))
    assert list(x) == [7, 9] and list(mean) == list(low) == list(high) == [3, 1]
    assert figures.smooth(np.full(200, 5.0)) == pytest.approx(5)


# ------------------------------------------------------------------ the script


def train(*flags):
    main.main([*TRAIN, *flags])
    return util.get_path_base(main.parse_args([*TRAIN, *flags]))


def get_files(name):
    files = (util.SAVE / name).rglob("*.*")
    return {str(f.relative_to(util.SAVE / name)) for f in files if f.suffix in (".pdf", ".gif", ".svg", ".json")}


FILES = {"losses.pdf", "primitives/12.pdf", "prior/12.pdf", "reconstructions/12.pdf", "reconstructions/12.gif"}


def test_every_kind_of_run(folder, capsys):
    """Conditional or not; runs without a checkpoint, with a damaged one, without data; and the overview of all"""
    plain, conditional = train("--algorithm", "rws", "--likelihood", "bernoulli"), train("--condition-on-alphabet")
    flags = f"--num-data 3 --num-particles 4 --num-iterations 3 --test-num-particles 5 --checkpoint-path {plain}"
    eval_logp.main([*flags.split(), "--algorithm", "rws", "--no-compile"])
    pathlib.Path("save/empty").mkdir()
    shutil.copytree(util.SAVE / plain / "checkpoints", "save/broken/checkpoints")
    for path in pathlib.Path("save/broken/checkpoints").iterdir():
        cut(path)
    capsys.readouterr()
    assert diagnostics.main(DRAW) == 0
    stdout, stderr = capsys.readouterr()
    assert "empty: no checkpoint yet, skipped" in stdout and "broken: no checkpoint" in stderr
    assert get_files(plain) == FILES | {"reconstructions.gif"}
    assert get_files(conditional) == FILES | {"alphabets/12.pdf", "reconstructions.gif"}
    frames = imageio.imread(util.SAVE / plain / "reconstructions.gif")
    assert len(frames) == 6  # iterations 1, 2, 3, 6, 10, 12
    check_overview(folder, plain, conditional)
    pathlib.Path("data.mat").unlink()
    assert diagnostics.main([*DRAW, "--checkpoint-path", f"save/{conditional}/checkpoints/6.pt"]) == 0
    stdout = capsys.readouterr().out
    assert "no reconstructions and alphabets without its data: " in stdout and "data.mat" in stdout
    new = get_files(conditional) - FILES - {"alphabets/12.pdf", "reconstructions.gif"}
    assert new == {"losses/6.pdf", "primitives/6.pdf", "prior/6.pdf"}


def test_vectors(folder):
    model = train("--condition-on-alphabet")
    flags = [*DRAW, "--checkpoint-path", model, "--resolution", "40", "--svg", "--obs-ids", "3", "5"]
    assert diagnostics.main(flags) == 0
    folder = util.SAVE / model / "reconstructions/12"
    assert {path.name for path in folder.iterdir()} == {"3.svg", "3.json", "5.svg", "5.json"}
    checkpoint = util.load_checkpoint(checkpoints.find(model))
    generative_model, _ = models.from_checkpoint(checkpoint)
    train_split = data.load("data.mat").train
    for i in (3, 5):
        program = json.loads((folder / f"{i}.json").read_text())
        latent = torch.tensor([[[s["primitive"], s["on"]] for s in program["strokes"]]]).unsqueeze(0)
        log_joint = sum(generative_model.log_prob(latent, train_split.obs[i : i + 1], train_split.alphabet[i : i + 1]))
        assert program["log_joint"] == pytest.approx(log_joint.item(), abs=1e-2)
        assert (folder / f"{i}.svg").read_text().count("<path") == sum(s["on"] for s in program["strokes"])
    with pytest.raises(UserError, match="--obs-ids 1000: there are"):
        diagnostics.main([*flags, "--obs-ids", "1000"])


@pytest.mark.parametrize("flags", [["--images=x.png", "--examples=9"], ["--no-refit"]])
def test_flags_that_moved(flags):
    with pytest.raises(UserError, match=f"{flags[0].split('=')[0]} is gone: read .* with python read.py"):
        diagnostics.main(["--checkpoint-path", "mws_20", *flags])


def count_figures():
    return sum(isinstance(x, matplotlib.figure.Figure) for x in gc.get_objects())


@pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op. is deprecated")  # one of the objects that are counted
def test_many_checkpoints(folder, monkeypatch):
    """What one checkpoint after another is drawn with goes again; no display, no pyplot"""
    model = train()
    checkpoints = util.SAVE / model / "checkpoints"
    checkpoint = {**util.load_checkpoint(checkpoints / "10.pt"), "statistics": {}}
    for iteration in range(100, 110):
        util.save_checkpoint(checkpoints / f"{iteration}.pt", {**checkpoint, "iteration": iteration})
    util.save_checkpoint(checkpoints / "latest.pt", {**checkpoint, "iteration": 200})
    monkeypatch.setattr(diagnostics, "MAX_FRAMES", 8)
    gc.collect()
    before, has_pyplot = count_figures(), "matplotlib.pyplot" in sys.modules  # another test's
    diagnostics.main([*DRAW, "--checkpoint-path", model])
    gc.collect()
    assert count_figures() <= before and ("matplotlib.pyplot" in sys.modules) == has_pyplot
    assert len(imageio.imread(util.SAVE / model / "reconstructions.gif")) == 8


# ------------------------------------------------------------------ the overview page


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.images = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if (tag, name) == ("a", "href")]
        self.images += [value for name, value in attrs if (tag, name) == ("img", "src")]


def check_overview(folder, model, other):
    text = pathlib.Path("save/index.html").read_text()
    page = Page(text)
    assert len(page.links) == len(page.images) == 4 + 5 + 4
    assert all((util.SAVE / urllib.parse.unquote(link)).is_file() for link in page.links)
    films = [src for src in page.images if not src.startswith("data:image/png;base64,")]
    assert len(films) == 4 and all(film.endswith(".gif") and film in page.links for film in films)
    value = torch.load(f"save/{model}/logp/test_rws.pt", weights_only=True)["log_p"]
    assert f"rws {value:.2f}" in text and other in text
    assert "http" not in re.sub('http://www.w3.org|base64,[^"]*', "", text)
    if find_chromium() is None:  # to open the page with
        return
    # The page tells by its title how its images loaded.
    script = "<script>onload = () => document.title = [...document.images].filter(i => i.naturalWidth > 20).length</script>"
    pathlib.Path("save/probe.html").write_text(text.replace("</body>", f"{script}</body>"))
    command = [find_chromium(), *"--headless --no-sandbox --disable-gpu --dump-dom --disable-sync".split()]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={folder}/browser", (folder / "save/probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>13</title>" in dom


def test_without_any_run(folder, capsys):
    assert diagnostics.main([]) == 0
    assert "no run in save/ yet" in capsys.readouterr().out and not pathlib.Path("save").exists()
    with pytest.raises(UserError, match="there is no checkpoint mws_20; save/ holds no run"):
        diagnostics.main(["--checkpoint-path", "mws_20"])


def test_learns_real_characters(omniglot, folder):
    """MWS on fifty characters, to be quick: its loss falls, and it draws its ink where theirs is"""
    location = str(omniglot / "chardata.mat")
    flags = "--dataset-size 50 --batch-size 50 --pretrain-iterations 0 --num-iterations 75 --likelihood bernoulli"
    flags = [*flags.split(), *"--num-particles 2 --memory-size 2 --no-compile --data-location".split(), location]
    main.main(flags)
    name = util.get_path_base(main.parse_args(flags))
    checkpoint = checkpoints.load(checkpoints.find(name))
    loss = checkpoint["statistics"]["train"]["theta_loss"]
    assert loss[:5].mean() - loss[-5:].mean() > 20
    subject = diagnostics.TrainedModel(name, checkpoint, data.load(location, False, 50))
    obs_id = torch.arange(50)
    obs = subject.get_images(obs_id)[0]
    probs = drawings.draw(subject.generative_model, subject.reconstruct(obs_id), 28)

    def get_overlap(probs):
        return (probs * obs).sum() / obs.sum() - (probs * (1 - obs)).sum() / (1 - obs).sum()

    upright = get_overlap(probs)
    assert upright > 0.15
    for flipped in ([1], [2], [1, 2]):
        assert upright > get_overlap(probs.flip(flipped)) + 0.05


def test_data_with_other_alphabets(folder, capsys):
    model = train("--condition-on-alphabet")
    fill(folder / "other", 84, "0123456")
    capsys.readouterr()
    flags = ["--checkpoint-path", model, "--data-location", "other"]
    assert diagnostics.main([*DRAW, *flags]) == 0
    assert "the model knows 5 alphabets, other has 7; set --data-location" in capsys.readouterr().out
    assert get_files(model) == {"losses.pdf", "primitives/12.pdf", "prior/12.pdf"}
    primitives = pathlib.Path(f"save/{model}/primitives/12.pdf").read_bytes()
    with pytest.raises(UserError, match="the model knows 5 alphabets, other has 7"):
        eval_logp.main([*flags, "--algorithm", "rws"])
    fill(folder / "few", 24, "01"), fill(folder / "few", 3, "234")
    assert data.load("few").train.alphabet.sum(0).min() == 0  # such an alphabet has new characters alone
    assert diagnostics.main([*DRAW, "--checkpoint-path", model, "--data-location", "few"]) == 0
    assert any(file.startswith("alphabets/") for file in get_files(model))
    assert pathlib.Path(f"save/{model}/primitives/12.pdf").read_bytes() == primitives


def test_data_of_another_size(folder, capsys):
    """A model trained on a few photographs reads all of other data that has no such part and no photographs"""
    fill(folder / "mine", 24)
    model = train("--algorithm", "rws", "--dataset-size", "6", "--find-characters", "--data-location", "mine")
    evaluate = ["--checkpoint-path", model, *"--algorithm own --mode train --test-num-particles 5 --no-compile --force".split()]
    for location, num_images, kind in [("mine", 6, "training"), ("data.mat", 50, "other")]:
        assert eval_logp.main([*evaluate, "--data-location", location]) == 0
        result = report.load_result(f"save/{model}/logp/train_own.pt")
        assert len(result["log_p_by_image"]) == num_images and result["settings"]["kind_of_images"] == kind
    capsys.readouterr()
    assert eval_logp.main(["--report"]) == 0
    heading = "the first 50 images of the training part of data.mat, not the data of the models' training (fingerprint "
    assert heading in capsys.readouterr().out
    assert diagnostics.main([*DRAW, "--checkpoint-path", model, "--data-location", "data.mat"]) == 0
    assert "data.mat is not its training data" in capsys.readouterr().out
    assert any(name.startswith("reconstructions/12-data.mat") for name in get_files(model))
    with pytest.raises(UserError, match="--find-characters is for a folder of your own images"):
        data.load("data.mat", find_characters=True)
