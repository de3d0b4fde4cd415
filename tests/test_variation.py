"""Strokes that vary, how well they match other images, and one-shot classification by them."""

import csv
import itertools
import math
import pathlib
import re
import zipfile

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from test_util import cut

import images
import models
import oneshot
import rendering
import util
from reading import matching, oneshot_runs, variation
from reading.variation import Deviations, Variation

MOVED = Deviations(*[1e-6] * 6, 0.1)  # only the shift varies


def get_centre(num=4, likelihood="learned-affine"):
    torch.manual_seed(1)
    model = models.GenerativeModel(8, num_arcs=4, likelihood=likelihood).requires_grad_(False)
    latent, obs = model.sample(num)
    latent[:, 1:, 1] = 1
    return model, latent, obs, variation.get_drawing(model, latent, obs)


@pytest.mark.parametrize("likelihood", ["learned-affine", "bernoulli"])
def test_a_drawing_that_does_not_vary_is_the_program(likelihood):
    """Under its most probable map"""
    model, latent, obs, centre = get_centre(likelihood=likelihood)
    log_p = variation.get_log_likelihood(centre, obs, floor=1.2e-7)
    if likelihood == "bernoulli":
        torch.testing.assert_close(log_p, model.log_likelihood(latent.unsqueeze(0), obs)[0], atol=1e-2, rtol=0)
    else:
        by_map = model.get_map_log_posterior(latent, obs).amax(1)
        total = model.log_likelihood(latent.unsqueeze(0), obs)[0] + math.log(40)
        torch.testing.assert_close(log_p, by_map + total, atol=1e-2, rtol=0)
    same = variation.vary(centre, variation.get_none(centre), variation.HAND)
    torch.testing.assert_close(variation.get_probs(same), variation.get_probs(centre))


def test_the_score_is_as_defined():
    _, _, obs, centre = get_centre()
    deviations = Deviations(0.1, 0.2, 0.3, 0.7, 0.4, 0.5, 0.6)
    e = variation.get_none(centre)
    e.displacement[:] = 0.5
    e.start[:] = -1
    e.pen[:] = torch.tensor([2.0, -1.0])
    e.warp[:] = torch.tensor([[1.0, 0.5, 0.25], [0.0, -0.5, 1.0]])
    drawing = variation.vary(centre, e, deviations)
    torch.testing.assert_close(drawing.displacement, centre.displacement + 0.05)
    torch.testing.assert_close(drawing.start, centre.start - 0.3)
    torch.testing.assert_close(drawing.sharpness, centre.sharpness * math.exp(1.4))
    torch.testing.assert_close(drawing.width, centre.width * math.exp(-0.7))
    warp = torch.tensor([[1.4, 0.25, 0.15], [0.0, 0.8, 0.6], [0, 0, 1]])  # the map is applied after the warp
    outer = torch.cat([centre.map, torch.tensor([[[0.0, 0, 1]]]).expand(4, 1, 3)], 1)
    torch.testing.assert_close(drawing.map, (outer @ warp)[:, :2])
    distance = (8 * 0.25 + 2 + 4 + 1 + 1 + 0.25 + 0.0625 + 0.25 + 1) / 2
    torch.testing.assert_close(e.get_distance(), torch.full((4,), distance))
    q = variation.get_probs(drawing).clamp(0.01, 0.99)
    obs = 0.75 * obs
    expected = torch.where(obs > 0, 0.75 * q.log() + 0.25 * (1 - q).log(), (1 - q).log()).sum((1, 2)) - distance
    torch.testing.assert_close(variation.score(centre, e, obs, deviations), expected)


def test_gradients_against_finite_differences():
    _, _, obs, centre = get_centre()
    centre = variation.Drawing(*(x.double() if x.is_floating_point() else x for x in centre))
    centre = centre._replace(sharpness=centre.sharpness * 0.3)  # smooth
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(Variation._fields):
        e = variation.get_none(centre)
        direction = torch.randn(e[i].shape, generator=generator, dtype=torch.double)

        def f(x, e=e, name=name):
            return variation.score(centre, e._replace(**{name: x}), obs.double(), variation.HAND).sum()

        value = (0.3 * direction).requires_grad_()
        (gradient,) = torch.autograd.grad(f(value), value)
        with torch.no_grad():
            difference = (f(value + 1e-6 * direction) - f(value - 1e-6 * direction)) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=2e-2, abs=0.05), name


def get_grid(centre, num=41):
    """Every shift on a grid: Variation of num^2 drawings of one program"""
    steps = torch.linspace(-3, 3, num)  # standard deviations
    shifts = torch.cartesian_prod(steps, steps)
    none = variation.get_none(centre)
    e = Variation(*(x.expand(len(shifts), *x.shape[1:]).clone() for x in none))
    e.warp[:, :, 2] = shifts
    return e


def test_the_forward_score_is_that_of_a_grid():
    """Where only a shift varies, all can be tried: for every program, character and test image; a coarse score is no better"""
    _, _, _, centre = get_centre(3, "bernoulli")
    characters = (variation.get_probs(centre) > 0.4).float()
    drawing = centre.select(torch.arange(3).expand(2, 3))  # [2, 3]
    strokes = matching.Strokes(characters, drawing)  # two traces of each of three characters
    shift = torch.tensor([0.15, -0.22]).view(1, 2, 1)
    moved = centre._replace(map=torch.cat([centre.map[:, :, :2], centre.map[:, :, 2:] + shift], 2))
    tests = (variation.get_probs(moved) > 0.4).float()
    e, coarse = matching.match(strokes, tests, MOVED)
    assert e.theta.shape == (2, 3, 3, 4) and coarse.shape == (2, 3, 3)
    image, source = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    schedule = matching.FINE._replace(num_steps=120)
    fitted, refined = matching.refine(strokes, tests, e, coarse, image, source, MOVED, schedule)
    assert fitted.on.shape == (2, 3, 3, 4)
    forward = refined.logsumexp(0)
    exact = torch.empty(2, 3, 3)
    for k, i, j in itertools.product(range(2), range(3), range(3)):
        e = get_grid(centre.select([j]))
        many = drawing.select([k] * len(e.start), [j] * len(e.start))
        moved = variation.vary(many, e, MOVED)
        log_p = variation.get_log_likelihood(moved, tests[i].expand(len(e.start), -1, -1), matching.FLOOR)
        exact[k, i, j] = (log_p - e.get_distance()).max()
    best = exact.logsumexp(0)
    torch.testing.assert_close(forward.diagonal(), best.diagonal(), atol=1, rtol=0)
    assert forward.argmax(1).tolist() == best.argmax(1).tolist() == [0, 1, 2]
    assert (coarse.logsumexp(0).diagonal() < forward.diagonal() + 1).all()


def test_distances():
    ink = np.zeros((20, 20), bool)
    ink[5, 5:15] = True
    points, other = matching.get_points(ink), matching.get_points(ink.T)
    assert matching.get_hausdorff_distance(points, matching.get_points(np.roll(ink, 3, 0))) == 0
    assert matching.get_hausdorff_distance(points, other) == pytest.approx(np.sqrt((points**2).sum(1) + 0.25).mean(), abs=0.1)
    assert np.ptp(matching.get_points(ink, scale=True), axis=0).tolist() == [0, 1]


def test_what_it_takes_to_explain_a_character():
    among = torch.tensor([[-1.0, -30, -50], [-20, -1, -40], [-60, -70, -1]])
    effort = matching.get_baseline(torch.tensor([-10.0, -20, -30]), among)
    assert effort.tolist() == [-25, -25, -47.5] and matching.get_baseline(torch.tensor([-3.0]), among[:1, :1]).tolist() == [-3]


def test_a_fit_is_repeatable_and_never_worse():
    _, _, obs, centre = get_centre()
    obs = obs.flip(0)
    fits = [variation.refit(centre, obs, variation.HAND, matching.COARSE, aligned_to=obs.flip(0)) for _ in range(2)]
    scores = [variation.get_log_likelihood(drawing, obs) - distance for drawing, _, distance in fits]
    assert torch.equal(*scores)
    unchanged = variation.get_log_likelihood(centre, obs)
    assert (scores[0] >= unchanged).all() and (scores[0] > unchanged + 5).any()
    sharp = matching.COARSE._replace(num_steps=3, when=0.0)
    drawing, _, distance = variation.refit(centre, obs, variation.HAND, sharp)
    assert (variation.get_log_likelihood(drawing, obs) - distance >= unchanged).all()


def test_a_fit_begins_where_it_is_told():
    _, _, obs, centre = get_centre()
    start = variation.get_none(centre)
    start.displacement[:, 1] = 1
    moved = variation.vary(centre, start, variation.HAND)
    obs = (variation.get_probs(moved) > 0.5).float()
    drawing, _, distance = variation.refit(centre, obs, variation.HAND, matching.COARSE._replace(num_steps=0), start)
    torch.testing.assert_close(drawing.displacement, moved.displacement)
    torch.testing.assert_close(distance, torch.ones(4))


def test_alignment_takes_the_ink_to_its_place():
    source, target = torch.zeros(1, 28, 28), torch.zeros(1, 28, 28)
    source[0, 4:16, 6:14] = 1
    target[0, 10:22, 10:26] = 1  # twice as wide, elsewhere
    warp = torch.eye(3)[:2] + variation._align(source, target)
    seen = rendering.apply_maps(source, warp)
    assert (seen.round() - target).abs().sum() < 30 and target.sum() == 192


# ------------------------------------------------------------------ runs and the script


def write_runs(folder, num_runs=2, num_characters=3):
    """Characters of the built-in alphabets by two of their hands, in the format of Omniglot's all_runs.zip"""
    glyphs, _, _ = images.draw_glyphs()
    for run in range(1, num_runs + 1):
        lines, order = [], np.random.RandomState(run).permutation(num_characters)
        for i in range(num_characters):
            training, test = f"run{run:02}/training/class{i + 1:02}.png", f"run{run:02}/test/item{order[i] + 1:02}.png"
            for path, hand in [(training, 0), (test, 1)]:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                glyph = glyphs[20 * (3 * i + 40 * run) + hand]
                imageio.imwrite(folder / path, np.where(np.kron(glyph, np.ones((4, 4))), 0, 255).astype(np.uint8))
            lines.append(f"{test} {training}\n")
        (folder / f"run{run:02}/class_labels.txt").write_text("".join(sorted(lines)))
    return folder


def test_runs_are_read_and_damage_is_one_line(tmp_path):
    folder = write_runs(tmp_path / "runs")
    (folder / "run01/training/._class01.png").write_bytes(b"what a Mac puts beside files")
    runs = oneshot_runs.load(folder)
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, pathlib.Path("all_runs") / path.relative_to(folder))
    for one, other in zip(runs, oneshot_runs.load(tmp_path / "runs.zip"), strict=True):
        assert one.name == other.name and all(torch.equal(a, b) for a, b in zip(one[1:4], other[1:4], strict=True))
        assert [ink.shape for ink in one.inks] == [(112, 112)] * 6
        for ink, obs, same in zip(one.inks, [*one.characters, *one.tests], other.inks, strict=True):
            assert (ink == same).all() and (ink == np.kron(obs.bool(), np.ones((4, 4), bool))).all()
    assert [run.name for run in runs] == ["run01", "run02"] and runs[0].tests.shape == (3, 28, 28)
    assert runs[0].answers.sort().values.tolist() == [0, 1, 2]
    triangles = 255 - 255 * np.kron(np.eye(28), np.tri(4)).astype(np.uint8)  # cover 10 of a pixel's 16 parts
    imageio.imwrite(folder / "run01/training/class01.png", triangles)
    torch.testing.assert_close(oneshot_runs.load(folder)[0].characters[0], torch.eye(28) * 10 / 16)
    labels, item = folder / "run02/class_labels.txt", folder / "run02/test/item02.png"
    for path, content, message in [
        (labels, b"run02/test/item01.png\n", "does not name a test and a training image"),
        (labels, b"run02/test/item01.png run02/training/class09.png\n", "that exist: .*class09.png"),
        (labels, b"run02/test/item01.png run02/test/item01.png\n", "does not name a test and a training image"),
        (item, item.read_bytes()[:40], "item02.png is damaged"),
        (item, imageio.imwrite("<bytes>", np.full((105, 105), 255, np.uint8), extension=".png"), "item02.png is blank"),
    ]:
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(util.UserError, match=message) as raised:
            oneshot_runs.load(folder)
        assert "\n" not in str(raised.value)
        path.write_bytes(before)
    with pytest.raises(util.UserError, match="holds 2 runs called run01"):
        oneshot_runs.load(write_runs(folder / "again").parent)
    cut(tmp_path / "runs.zip")
    for path in (tmp_path / "runs.zip", tmp_path / "none", tmp_path):
        with pytest.raises(util.UserError) as raised:
            oneshot_runs.load(path / "save" if path == tmp_path else path)
        assert "\n" not in str(raised.value)


def test_the_script_classifies_resumes_and_tells_what_is_wrong(tmp_path, run_script, assert_refused, monkeypatch):
    write_runs(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    asked = []
    # Compiling would take longer than all the rest
    monkeypatch.setattr(rendering, "set_compile", lambda enabled, **_: asked.append(enabled))
    argv = ["--checkpoint-path", "pretrained/mws_20", "--runs", "runs", "--num-steps=10", "--num-traces=2"]
    status, stdout, stderr = run_script(oneshot, *argv, "--run-ids", "2")
    assert status == 0 and "of 3 wrong" in stdout + stderr, stderr
    results = tmp_path / "save/mws_20/oneshot"
    before = (results / "run02.pt").read_bytes()
    assert run_script(oneshot, *argv)[0] == 0
    assert (results / "run02.pt").read_bytes() == before
    rows = list(csv.DictReader(open(tmp_path / "save/mws_20/oneshot.csv")))
    assert [row["run"] for row in rows] == ["run01", "run02"]
    result = util.load_checkpoint(results / "run02.pt", keys=oneshot.RESULT_KEYS)
    total = matching.combine(result["forward"], result["backward"], result["structure"])
    assert int(rows[1]["wrong"]) == (total.argmax(1) != result["answers"]).sum() < 2 and "95 % interval" in stdout
    assert (results / "run02.pdf").stat().st_size > 10_000
    lines = oneshot.write_table(tmp_path / "table.csv", [{"images": 20, "wrong": 1}, {"images": 20, "wrong": 3}])
    assert lines[0] == "wrong: 4 of 40, 10.0% (95 % interval 4.0% to 23.1%; standard error over runs 5.0%)"
    rows = [{"images": images, "wrong": wrong} for images, wrong in [(100, 8), (100, 7), (100, 9), (100, 8), (2, 1)]]
    assert "over runs 0.5%" in oneshot.write_table(tmp_path / "table.csv", rows)[0]  # not that of 8.0, 7.0, 9.0, 8.0, 50.0
    (results / "run02.pt").unlink()
    assert run_script(oneshot, *argv, "--run-ids", "2", "--no-compile")[0] == 0
    assert asked == [True, True, False]
    assert (results / "run02.pt").read_bytes() == before  # seeded, each run by itself
    for extra, message in [
        (["--num-steps=11"], "num-steps is 10 there and 11 here"),
        (["--run-ids", "3"], "has 2 runs"),
        (["--num-traces=1"], "num-traces is 2 there and 1 here"),
        (["--runs", "nowhere"], "there is no nowhere"),
    ]:
        assert_refused(oneshot, [*argv, *extra], [message])


@pytest.mark.parametrize(
    ("line", "encoding"),
    [
        ("item{}.jpg class{}.JPG", "utf-8"),
        ("Run 1\\test\\item{}.jpg\tRun 1\\training\\class{}.JPG", "latin-1"),
        ("C:/my data/Run 1/test/item{}.jpg, C:/my data/Run 1/training/class{}.JPG", "utf-8-sig"),
        ("training/class{1}.jpg ./test/ITEM{0}.JPG", "utf-8"),
    ],
)
def test_labels_and_images_as_people_make_them(tmp_path, line, encoding, capsys):
    folder = tmp_path / "Run 1"
    for i in range(3):
        letter = np.full((200, 200), 190, np.uint8)  # on grey paper, with thin strokes
        letter[40:160, 50 + 40 * i : 53 + 40 * i] = letter[157:160, 40:160] = 70
        for name in (f"training/class{i}.JPG", f"test/item{2 - i}.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(imageio.imwrite("<bytes>", letter, extension=".jpg"))
    lines = "\r\n".join(line.format(i, 2 - i) for i in range(3))
    (folder / "class_labels.txt").write_bytes(lines.encode(encoding))
    runs = oneshot_runs.load(tmp_path)
    assert runs[0].answers.tolist() == [2, 1, 0] and capsys.readouterr().err == ""
    assert re.fullmatch(r"6 images, 1 run, mean ink 0.0[3-9]", oneshot_runs.summarise(runs))
    if "my data" not in line and "\\" not in line:  # names relative to the run's own folder
        (run,) = oneshot_runs.load(folder)
        assert run.name == "Run 1" and run.answers.tolist() == [2, 1, 0]
    for wrong, message in [
        ("item0.jpg item1.jpg", "a line"),
        ("item0.jpg class0.JPG\nitem0.jpg class1.JPG", "twice"),
        ("\n", "no line"),
    ]:
        (folder / "class_labels.txt").write_text(wrong)
        with pytest.raises(util.UserError, match=message):
            oneshot_runs.load(tmp_path)
