"""Reading characters of one's own: strokes on the ink, and what is written about them"""

import functools
import json

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch

import images
import models
import read
from reading import characters, matching, search
from runs import checkpoints

LINES = {  # (x, y), fractions of a character's box, y downwards
    "K": [[(0.2, 0), (0.2, 1)], [(0.8, 0), (0.2, 0.55)], [(0.35, 0.42), (0.85, 1)]],
    "i": [[(0.5, 0.28), (0.5, 1)], [(0.5, 0.06), (0.5, 0.14)]],
    "theta": [[(0.5 + 0.35 * np.cos(a), 0.5 + 0.5 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 40)], [(0.15, 0.5), (0.85, 0.5)]],
    "nine": [
        [(0.2, 0.1), (0.8, 0.1)], [(0.2, 0.24), (0.8, 0.24)], [(0.1, 0.4), (0.9, 0.4)], [(0.5, 0), (0.4, 0.45), (0.05, 0.75)],
        [(0.55, 0.4), (0.95, 0.7)], [(0.35, 0.6), (0.35, 1)], [(0.35, 0.6), (0.68, 0.6), (0.68, 1)], [(0.35, 0.8), (0.68, 0.8)],
        [(0.35, 1), (0.68, 1)],
    ],
}  # fmt: skip


@pytest.fixture
def photograph(tmp_path):
    """A page of all characters under uneven light, with noise"""
    page = PIL.Image.new("L", (1200, 320), 255)
    for i, lines in enumerate(LINES.values()):
        for line in lines:
            points = [(60 + 280 * i + 200 * x, 50 + 220 * y) for x, y in line]
            PIL.ImageDraw.Draw(page).line(points, 0, 9, "curve")
    light = 0.9 - 0.4 * np.arange(1200) / 1200
    grey = light * (0.25 + 0.75 * np.asarray(page) / 255) + 0.02 * np.random.RandomState(0).randn(320, 1200)
    imageio.imwrite(tmp_path / "page.png", (255 * grey.clip(0, 1)).astype(np.uint8))
    return tmp_path / "page.png"


def get_points(strokes, num=40):
    """Points of strokes as in JSON, of those that leave ink, (x, y) of the unit square"""
    points = []
    for s in [s for s in strokes if s["on"]]:
        heading = np.arctan2(s["dy"], s["dx"]) + np.linspace(s["theta"], -s["theta"], num)
        way = np.stack([np.cos(heading), np.sin(heading)], 1).cumsum(0)
        points.append([s["x_start"], s["y_start"]] + way * np.hypot(s["dx"], s["dy"]) / max(np.linalg.norm(way[-1]), 1e-9))
    return np.concatenate(points)


def test_strokes_lie_on_the_ink(photograph, tmp_path, run_script):
    """Of a photograph; all ink has strokes, all strokes have ink; the same numbers twice"""
    output = tmp_path / "out"
    status, stdout, stderr = run_script(read, str(photograph), "--output", str(output), "--examples", "3")
    assert status == 0 and stdout.count("page.png: ") == 4, stderr
    content = {path.name: path.read_bytes() for path in output.iterdir()}
    names = [f"page-{i}.{kind}" for i in range(1, 5) for kind in ("json", "svg")]
    assert sorted(content) == sorted([*names, "strokes.pdf", "examples.pdf"])
    for i, (name, lines) in enumerate(LINES.items(), start=1):
        program = json.loads(content[f"page-{i}.json"])
        drawn = np.concatenate([np.concatenate([np.linspace(a, b, 50) for a, b in zip(x, x[1:])]) for x in lines])  # noqa: B905
        found = get_points(program["strokes"])
        drawn = drawn * [200, -220]  # a stroke's thickness is beyond it, and the box may be elsewhere
        drawn = (drawn - (drawn.min(0) + drawn.max(0)) / 2) / np.ptp(drawn, 0).max() * np.ptp(found, 0).max()
        found = found - (found.min(0) + found.max(0)) / 2
        distance = np.linalg.norm(found[:, None] - drawn, axis=2) * 28  # pixels
        assert distance.min(1).max() < 1.5 and distance.min(0).max() < 1.5, (name, distance.min(1).max(), distance.min(0).max())
        assert len(lines) <= sum(s["on"] for s in program["strokes"]) <= 3 * len(lines)
        assert program["map"] == [[1, 0, 0], [0, 1, 0]] and -200 < program["log_likelihood"] < -5
        assert program["deviation"] == pytest.approx(sum(s["deviation"] for s in program["strokes"]), rel=1e-5)
        assert content[f"page-{i}.svg"].count(b"<path") == sum(s["on"] for s in program["strokes"])
    assert run_script(read, str(photograph), "--output", str(output), "--examples", "3")[0] == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == content


def test_programs_and_files_that_cannot_be_read(photograph, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(search, "QUICK", search.Effort(1, 1, 10, 10, 5, 0))
    monkeypatch.setattr(search, "STAGES", search.STAGES[:1])
    monkeypatch.setattr(matching, "TRACING", matching.TRACING._replace(num_steps=1))
    monkeypatch.setattr(search, "read", functools.partial(search.read, num_proposals=50))
    monkeypatch.setattr(read.rendering, "set_compile", lambda enabled: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    letter = np.full((105, 105), 255, np.uint8)
    letter[20:80, 50:53] = 0
    for name in ("a/x.png", "b/x.png", "x-program.png", "..png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        imageio.imwrite(tmp_path / name, letter)
    model = ["--checkpoint-path", "pretrained/a_mws_5_batch-size=50"]
    files = ["a/x.png", "broken.png", "none.png", "b/x.png", "x-program.png", "..png"]
    status, _, stderr = run_script(read, *files, "--as-is", "--program", *model)
    assert status == 0 and stderr.count("skipped") == 2, stderr
    (folder,) = (tmp_path / "save").glob("*/read")
    names = ["x", "x-again", "x-program-again", "image"]
    assert {path.stem for path in folder.glob("*.json")} == {*names, *(f"{name}-program" for name in names)}
    program = json.loads((folder / "x-program.json").read_text())
    assert len(program["strokes"]) == 10 and program["log_joint"] < 0 and 0 <= program["alphabet"] < 50 and "map_id" in program
    assert program["model"] == folder.parent.name
    # What was found is kept if the search stops before its end
    found = iter([search.find])
    monkeypatch.setattr(search, "find", lambda *args: next(found)(*args))
    for path in folder.glob("*-program.*"):
        path.unlink()
    with pytest.raises(RuntimeError, match="StopIteration"):
        read.main([*files[:1], *files[3:], "--as-is", "--program", *model])
    assert [path.name for path in folder.glob("*-program.json")] == ["x-program.json"]
    status, _, stderr = run_script(read, "none.png")
    assert status == 2 and stderr.splitlines()[-1].endswith(
        "there is no character to read; give images of characters, or --as-is"
    )


def test_a_model_in_double_precision_reads_the_same():
    model, _ = models.from_checkpoint(checkpoints.load(checkpoints.find(read.MODEL)))
    cross = np.zeros((60, 60), bool)
    cross[28:32, 5:55] = cross[5:55, 28:32] = True
    found = characters.from_inks([cross], "cross")
    single, double = (characters.read(some, found) for some in (model, model.double()))
    assert torch.equal(single.latent, double.latent) and double.drawing.theta.dtype == torch.float32
    torch.testing.assert_close(single.log_likelihood, double.log_likelihood, atol=0.1, rtol=0)
    assert characters.from_inks([~cross & cross], "blank").obs.shape == (0, 28, 28)


@pytest.mark.parametrize("ink", [0, 1])
def test_bold_letters_drawn_on_a_screen(ink):
    """An E whose pen is a quarter of its size, dark or light, although it covers most of the picture"""
    page = PIL.Image.new("1", (400, 400), 1 - ink)
    for line in ([(70, 70), (70, 330)], [(70, 70), (330, 70)], [(70, 200), (330, 200)], [(70, 330), (330, 330)]):
        PIL.ImageDraw.Draw(page).line(line, ink, 84)
    assert (images.find_ink(np.float32(page)) == (np.array(page) == ink)).mean() > 0.99
    (character,) = images.find_characters("E", imageio.imwrite("<bytes>", 255 * np.uint8(page), extension=".png"))
    assert 0.05 < character.mean() < 0.2


@pytest.mark.parametrize("tilt", [-0.1, -0.03, 0.0, 0.05, 0.12])
def test_lines_of_a_tilted_page(tilt):
    """Ten lines of twenty characters, then a single line of few characters far apart, which are not lines of their own"""
    generator = np.random.default_rng(0)
    row, col = np.divmod(np.arange(200), 20)
    top = 40 * row + generator.uniform(-4, 4, 200)
    boxes = np.stack([top, 40 * col, top + 25, 40 * col + 25], 1)
    boxes[:, [0, 2]] += tilt * boxes[:, 1:2]
    assert images.find_lines(boxes).tolist() == row.tolist()
    sparse = np.array([[tilt * x, x, tilt * x + 25, x + 25] for x in (0, 200, 400, 600)])
    assert images.find_lines(sparse).tolist() == [0] * 4


def test_lines_of_an_upright_page_with_few_characters():
    """Those of the second line stand further left than those of the first"""
    for middles in ([(0, 500), (60, 0)], [(0, 400), (0, 500), (60, 0), (60, 100)], [(0, 600), (60, 0), (60, 100), (60, 200)]):
        boxes = np.array([[y - 20, x - 20, y + 20, x + 20] for y, x in middles])
        assert images.find_lines(boxes).tolist() == [y // 60 for y, _ in middles]
