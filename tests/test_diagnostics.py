"""Pictures: strokes as vectors, curves, and the script end to end."""

import gc
import html.parser
import json
import math
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
from test_main import TINY, folder  # noqa: F401
from test_util import cut

import data
import diagnostics
import drawings
import eval_logp
import figures
import main
import models
import rendering
import strokes
import util
from util import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAIN = [*TINY, *"--likelihood learned-affine --data-location data.mat --pretrain-iterations 4 --num-iterations 12".split()]
DRAW = "--num-reconstructions 6 --num-prior-samples 5 --alphabet-num-rows 2 --alphabet-num-cols 2".split()

# ------------------------------------------------------------------ vectors


def sample_svg_path(path, num=200):
    """Points of "M x y L x y" or "M x y A r r 0 large sweep x y", by the formulas of
    the SVG standard (appendix B.2.4): [num, 2]"""
    tokens = path.split()
    x1, y1, x2, y2 = (float(token) for token in (*tokens[1:3], *tokens[-2:]))
    t = np.linspace(0, 1, num)[:, None]
    start, end = np.array([x1, y1]), np.array([x2, y2])
    if tokens[3] == "L":
        return start + t * (end - start)
    radius, large, sweep = float(tokens[4]), tokens[7] == "1", tokens[8] == "1"
    half = (start - end) / 2
    radius = max(radius, np.hypot(*half))
    factor = math.sqrt(max(radius**2 / (half @ half) - 1, 0)) * (-1 if large == sweep else 1)
    centre = factor * np.array([half[1], -half[0]]) + (start + end) / 2
    first, last = (math.atan2(*(point - centre)[::-1]) for point in (start, end))
    angle = (last - first) % (2 * math.pi) if sweep else -((first - last) % (2 * math.pi))
    phi = first + t[:, 0] * angle
    return centre + radius * np.stack([np.cos(phi), np.sin(phi)], 1)


def rasterise(svg, resolution):
    """Ink [R, R] of an SVG file's paths at the points where the renderer has its pixels' centres, which are those of
    the SVG's pixels at 28 x 28"""
    side = np.linspace(0.5, strokes.NUM_PIXELS - 0.5, resolution)
    centres = np.stack(np.meshgrid(side, side), -1)  # x, y
    ink = np.zeros((resolution, resolution), bool)
    found = re.search(r'transform="matrix\(([^)]*)\)"', svg)
    a, b, c, d, e, f = map(float, found[1].split()) if found else (1, 0, 0, 1, 0, 0)
    canonical = (centres - [e, f]) @ np.linalg.inv([[a, c], [b, d]]).T  # where each point of the picture is drawn
    for path, width in re.findall(r'<path d="([^"]*)".*stroke-width="([^"]*)"', svg):
        points = sample_svg_path(path)
        distance = np.min([np.hypot(*(canonical - point).transpose(2, 0, 1)) for point in points], 0)
        ink |= distance <= float(width) / 2
    if found:
        ink &= ((canonical >= 0) & (canonical <= strokes.NUM_PIXELS)).all(-1)
    return ink


def get_mean_distance(a, b):
    """Between the ink of two images, in pixels: the mean way from a pixel of one to the nearest of the other"""

    def one_way(a, b):
        a, b = np.argwhere(a), np.argwhere(b)
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1).mean()

    return max(one_way(a, b), one_way(b, a))


@pytest.mark.parametrize("big_arcs", [False, True])
def test_svg_agrees_with_the_renderer(big_arcs):
    torch.manual_seed(2)
    model = models.GenerativeModel(big_arcs=big_arcs, initial_max_curve=0.9 if big_arcs else 0.3, num_arcs=5)
    with torch.no_grad():
        model.pre_width.copy_(torch.linspace(-3, -0.5, 64))
        model.pre_rendering_params.copy_(torch.tensor([8.0, -4.0]))
        model.pre_theta[:4] = 0 if not big_arcs else 1  # straight
    latent, _ = model.sample(6)
    latent[..., 1:, 1] = 1
    resolution = 112  # four times as fine, so that half a pixel is two here
    probs = figures.draw(model, latent, resolution).numpy()
    distances = []
    for drawn, z in zip(probs, latent, strict=True):
        ink = rasterise(strokes.to_svg(strokes.get_program(model, z)), resolution)
        distances.append(get_mean_distance(drawn > 0.5, ink) / 4)
    assert max(distances) < 0.1


def test_programs_lie_over_their_images():
    """Seen through the most probable map: as SVG, within half a pixel of the model's probabilities"""
    torch.manual_seed(3)
    model = models.GenerativeModel()
    with torch.no_grad():
        model.pre_rendering_params.copy_(torch.tensor([8.0, -4.0]))
        model.theta_affine += 0.1 * torch.randn(40, 2, 3)
    latent, obs = model.sample(12)
    map_id, maps = drawings.get_maps(model, latent, obs)
    by_map = [rendering.apply_maps(model.get_logits(latent).sigmoid(), m.expand(12, 2, 3)) for m in model.theta_affine]
    scores = torch.stack([get_log_likelihood(probs, obs) for probs in by_map])
    assert (scores.argmax(0) == map_id).all()
    seen, canonical = (drawings.draw(model, latent, 28, m) for m in (maps, None))
    assert (get_log_likelihood(seen, obs) - get_log_likelihood(canonical, obs)).mean() > 20
    distances = []
    for z, i, probs in zip(latent, map_id, drawings.draw(model, latent, 112, maps).numpy(), strict=True):
        svg = strokes.to_svg(strokes.get_program(model, z, i))
        assert svg.count("<path") == z[:, 1].sum() and "matrix(" in svg
        if (probs > 0.5).sum() > 50:
            distances.append(get_mean_distance(probs > 0.5, rasterise(svg, 112)) / 4)
    assert len(distances) > 6 and max(distances) < 0.3
    pen = drawings.get_pen_path(model, latent, 28, maps)
    assert torch.equal(pen[:, 0, 1], pen[:, 1, 0]) and pen.shape == (12, 10, 2, 2)


def get_log_likelihood(probs, obs):
    """Of images [N, R, C] under probabilities of ink: [N]"""
    probs = probs.clamp(1e-6, 1 - 1e-6)
    return (obs * probs.log() + (1 - obs) * (1 - probs).log()).flatten(1).sum(1).detach()


def test_strokes_off_the_page():
    model = models.GenerativeModel(num_primitives=2, num_arcs=4)
    with torch.no_grad():
        model.pre_dxdy.copy_(torch.tensor([[0.3, 0.0], [3.0, 0.0]]))
    latent = torch.tensor([[[0, 0], [0, 1], [1, 0], [0, 1]]])
    assert drawings.is_off_page(model, latent).tolist() == [[False, False, False, True]]


def test_path_of_a_known_arc():
    # A quarter circle from the left to the top of a circle around the middle: clockwise.
    quarter = strokes.get_path([0.25, 0.5, 0.25, 0.25, math.pi / 4])
    points = sample_svg_path(quarter)
    assert np.hypot(*(points - 14).T) == pytest.approx(27 / 4, abs=1e-3)
    assert points[-1] == pytest.approx([14, 14 - 27 / 4], abs=1e-3)
    assert strokes.get_path([0.5, 0.5, 0.1, 0, 0.0]).split()[3] == "L"
    assert strokes.get_path([0.5, 0.5, 0.1, 0, 2.0]).split()[7:9] == ["1", "1"]


def test_half_width():
    # scale 10, bias -5: half of the highest probability is that of the logit where exp(...) is ink
    half = strokes.get_half_width(20.0, 0.05, 10.0, -5.0)
    ink = 10 * math.exp(400 * (0.05**2 - half**2)) - 5
    assert 1 / (1 + math.exp(-ink)) == pytest.approx(0.5 / (1 + math.exp(-5)), rel=1e-5)
    assert strokes.get_half_width(20.0, 0.0, 3.0, 8.0) == 0  # all black
    assert strokes.get_half_width(0.0, 0.1, 3.0, -3.0) == 0


# ------------------------------------------------------------------ figures


def test_stages_and_tiles():
    model = models.GenerativeModel(num_arcs=5)
    latent, _ = model.sample(6)
    latent[0, :, 1] = 0
    latent[1, 1:, 1] = 1
    stages = figures.draw_stages(model, latent, 28)
    for z, stage in zip(latent, stages, strict=True):
        visible = z[:, 1].nonzero().squeeze(1).tolist()
        assert stage.isnan().flatten(1).all(1).tolist() == [i >= len(visible) for i in range(4)]
        if visible:
            torch.testing.assert_close(stage[len(visible) - 1], model.get_logits(z).sigmoid().detach())
            first = z.clone()
            first[visible[0] + 1 :, 1] = 0
            torch.testing.assert_close(stage[0], model.get_logits(first).sigmoid().detach())
    grid = figures.tile(torch.arange(3.0).view(3, 1, 1).expand(3, 28, 28), 2, below=4)
    assert grid.shape == (2 + 2 * 34, 2 + 2 * 30)
    assert (grid[2:30, 2:30] == 0).all() and (grid[2:30, 32:60] == 1).all() and (grid[36:64, 2:30] == 2).all()
    assert np.isnan(grid).sum() == grid.size - 3 * 28 * 28


def test_thinned_curves():
    x, mean, low, high = figures.thin(np.arange(1.0, 100_001))
    assert len(x) == figures.MAX_POINTS
    assert x == pytest.approx(mean) and (low < mean).all() and (mean < high).all()
    x, mean, low, high = figures.thin([3.0, 1.0])
    assert list(x) == [1, 2] and list(mean) == list(low) == list(high) == [3, 1]
    assert figures.smooth(np.full(200, 5.0)) == pytest.approx(5)


def test_extent_of_primitives():
    model = models.GenerativeModel(num_primitives=40, big_arcs=True, initial_max_curve=0.9)
    primitives = model.get_primitives().detach()
    for primitive in primitives:
        extent = figures.get_extent(primitive.unsqueeze(0))
        arcs = torch.cat([torch.zeros(2), primitive])[None, None] + torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0])
        for zoom, fits in [(0.49 / extent, True), (0.8 / extent, False)]:
            scaled = arcs * torch.tensor([1, 1, zoom, zoom, 1, 1 / zoom, zoom])
            ink = figures.draw_arcs(model, scaled, torch.ones(1, 1, dtype=torch.long), 64)[0]
            border = torch.cat([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).max()
            assert (border < 0.1 + ink.min()) == fits, (primitive, zoom)


# ------------------------------------------------------------------ the script


def train(*flags):
    main.main([*TRAIN, *flags])
    return util.get_path_base(main.parse_args([*TRAIN, *flags]))


def get_files(name):
    files = (util.SAVE / name).rglob("*.*")
    return {str(f.relative_to(util.SAVE / name)) for f in files if f.suffix in (".pdf", ".gif", ".svg", ".json")}


FILES = {"losses.pdf", "primitives/12.pdf", "prior/12.pdf", "reconstructions/12.pdf", "reconstructions/12.gif"}


def test_every_kind_of_run(folder, capsys):  # noqa: F811
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


def test_vectors_and_own_images(folder, capsys):  # noqa: F811
    model = train("--condition-on-alphabet")
    row, col = np.mgrid[:200, :150]
    letter = (abs(row - 2 * col / 3 - 50) < 4).astype(np.uint8)
    imageio.imwrite("dark.png", 255 - 255 * letter)
    imageio.imwrite("light.png", 255 * letter)
    flags = [*DRAW, "--checkpoint-path", model, "--resolution", "40", "--svg", "--obs-ids", "3", "5"]
    assert diagnostics.main(flags) == 0
    pathlib.Path("broken.png").write_bytes(b"no image")
    own = ["--images", "dark.png", "broken.png", "light.png", "--num-particles", "50", "--num-rounds", "2"]
    own += ["--num-mutants", "10", "--as-is", "--examples", "4", "--vary", "1"]
    capsys.readouterr()
    for _ in range(2):  # a second call leaves the first one's files
        assert diagnostics.main([*flags, *own]) == 0
    stdout, stderr = capsys.readouterr()
    folder = util.SAVE / model  # noqa: F811
    assert stderr.count("warning: broken.png is damaged or not an image") == 2
    assert stdout.count("dark.png: log p(x, z) = -") == 2 and str(folder / "images/dark-2.svg") in stdout
    stems = ["12", "12-2", "12-examples", "12-2-examples"]
    assert sorted(path.stem for path in (folder / "images").glob("*.pdf")) == sorted(stems)
    assert {path.name for path in (folder / "reconstructions/12").iterdir()} == {"3.svg", "3.json", "5.svg", "5.json"}
    assert (folder / "images/12.pdf").exists()
    checkpoint = util.load_checkpoint(util.find_checkpoint(model))
    generative_model, _ = models.from_checkpoint(checkpoint)
    for name in ("dark", "light"):
        program = json.loads((folder / f"images/{name}.json").read_text())
        latent = torch.tensor([[[s["primitive"], s["on"]] for s in program["strokes"]]]).unsqueeze(0)
        obs = torch.as_tensor(data.read_image("x", pathlib.Path(f"{name}.png").read_bytes()) >= 0.5).float()
        assert obs.sum() > 20 and (obs - obs.flip(0)).abs().sum() > 10
        alphabet = torch.eye(5)[program["alphabet"]].unsqueeze(0)
        log_joint = sum(generative_model.log_prob(latent, obs.unsqueeze(0), alphabet))
        assert program["log_joint"] == pytest.approx(log_joint.item(), abs=1e-2)
        num_on = sum(s["on"] for s in program["strokes"])
        assert (folder / f"images/{name}.svg").read_text().count("<path") == num_on
    with pytest.raises(UserError, match="--obs-ids 1000: there are"):
        diagnostics.main([*flags, "--obs-ids", "1000"])
    with pytest.raises(UserError, match="there is no character to read"):
        diagnostics.main([*flags, "--images", "none.png"])
    assert "warning: cannot read none.png (No such file" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs --checkpoint-path"):
        diagnostics.main(["--images", "dark.png"])


def count_figures():
    return sum(isinstance(x, matplotlib.figure.Figure) for x in gc.get_objects())


def test_many_checkpoints(folder, monkeypatch):  # noqa: F811
    """What one checkpoint after another is drawn with goes again; no display, no pyplot"""
    model = train()
    checkpoints = util.SAVE / model / "checkpoints"
    checkpoint = {**util.load_checkpoint(checkpoints / "10.pt"), "statistics": {}}
    for iteration in range(100, 110):
        torch.save({**checkpoint, "iteration": iteration}, checkpoints / f"{iteration}.pt")
    torch.save({**checkpoint, "iteration": 200}, checkpoints / "latest.pt")
    monkeypatch.setattr(diagnostics, "MAX_FRAMES", 8)
    gc.collect()
    before = count_figures()
    diagnostics.main([*DRAW, "--checkpoint-path", model])
    gc.collect()
    assert count_figures() <= before and "matplotlib.pyplot" not in sys.modules
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


def find_chromium():
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def check_overview(folder, model, other):  # noqa: F811
    text = pathlib.Path("save/index.html").read_text()
    page = Page(text)
    assert len(page.links) == len(page.images) == 4 + 5 + 4
    assert all((util.SAVE / urllib.parse.unquote(link)).is_file() for link in page.links)
    films = [src for src in page.images if not src.startswith("data:image/png;base64,")]
    assert len(films) == 4 and all(film.endswith(".gif") and film in page.links for film in films)
    value = torch.load(f"save/{model}/logp/test_rws.pt", weights_only=True)["log_p"]
    assert f"rws {value:.2f}" in text and other in text
    assert "http" not in re.sub("http://www.w3.org", "", text)
    if find_chromium() is None:  # to open the page with
        return
    # The page tells by its title how its images loaded.
    script = (
        "<script>onload = () => document.title = [...document.images].filter(i => i.naturalWidth > 20).length</script>"
    )
    pathlib.Path("save/probe.html").write_text(text.replace("</body>", f"{script}</body>"))
    command = [find_chromium(), *"--headless --no-sandbox --disable-gpu --dump-dom --disable-sync".split()]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={folder}/browser", (folder / "save/probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>13</title>" in dom


def test_missing_and_nothing(folder, capsys):  # noqa: F811
    assert diagnostics.main([]) == 0
    assert "no run in save/ yet" in capsys.readouterr().out and not pathlib.Path("save").exists()
    with pytest.raises(UserError, match="there is no checkpoint mws_20; save/ holds no run"):
        diagnostics.main(["--checkpoint-path", "mws_20"])


def test_learns_real_characters(omniglot, folder):  # noqa: F811
    """MWS on fifty characters, to be quick: its loss falls, and it draws its ink where theirs is"""
    location = str(omniglot / "chardata.mat")
    flags = "--dataset-size 50 --batch-size 50 --pretrain-iterations 0 --num-iterations 75 --likelihood bernoulli"
    flags = [*flags.split(), *"--num-particles 2 --memory-size 2 --no-compile --data-location".split(), location]
    main.main(flags)
    name = util.get_path_base(main.parse_args(flags))
    checkpoint = util.load_checkpoint(util.find_checkpoint(name))
    loss = checkpoint["statistics"]["theta_loss"]
    assert loss[:5].mean() - loss[-5:].mean() > 20
    subject = diagnostics.Subject(name, util.get_checkpoint_path(name), checkpoint, data.load(location, False, 50))
    obs_id = torch.arange(50)
    obs = subject.get_images(obs_id)[0]
    probs = figures.draw(subject.generative_model, subject.reconstruct(obs_id), 28)

    def get_overlap(probs):
        return (probs * obs).sum() / obs.sum() - (probs * (1 - obs)).sum() / (1 - obs).sum()

    upright = get_overlap(probs)
    assert upright > 0.15
    for flipped in ([1], [2], [1, 2]):
        assert upright > get_overlap(probs.flip(flipped)) + 0.05


def make_folder(path, num_alphabets):
    """Images in subfolders, which are alphabets"""
    for i in range(num_alphabets):
        (folder := pathlib.Path(path) / str(i)).mkdir(parents=True)  # noqa: F811
        for j in range(12):
            imageio.imwrite(folder / f"{j}.png", np.random.RandomState(j).randint(0, 2, (28, 28), np.uint8) * 255)


def test_data_with_other_alphabets(folder, capsys):  # noqa: F811
    model = train("--condition-on-alphabet", "--algorithm", "rws")
    make_folder("other", 7)
    capsys.readouterr()
    flags = ["--checkpoint-path", model, "--data-location", "other"]
    assert diagnostics.main([*DRAW, *flags]) == 0
    assert "the model knows 5 alphabets, other has 7; give its data" in capsys.readouterr().out
    assert get_files(model) == {"losses.pdf", "primitives/12.pdf", "prior/12.pdf"}
    with pytest.raises(UserError, match="the model knows 5 alphabets, other has 7"):
        eval_logp.main([*flags, "--algorithm", "rws"])
