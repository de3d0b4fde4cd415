"""The search for programs, and finding characters on photographs and scans."""

import io

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import scipy.ndimage
import torch

import images
import losses
import models
import rendering
from reading import characters, search
from results import drawings, planted
from util import UserError


@pytest.mark.parametrize("likelihood, num_alphabets", [("bernoulli", 2), ("translation", 0)])
def test_the_best_programs_where_all_can_be_listed(likelihood, num_alphabets):
    model = models.GenerativeModel(num_primitives=4, num_arcs=3, likelihood=likelihood, num_alphabets=num_alphabets)
    codes = torch.cartesian_prod(torch.arange(0, 8, 2), torch.arange(8), torch.arange(8))  # all 256
    alphabet = model.sample_alphabet(3) if num_alphabets else None
    _, obs = model.sample(3, alphabet)
    every = losses.unpack(codes).unsqueeze(1).expand(-1, 3, -1, -1)
    want = losses.score(model, every, obs, alphabet).topk(5, 0)
    effort = search.Effort(6, 2, population=10, num_mutants=40, num_hot_rounds=30, num_cold_rounds=30)
    for i in range(3):
        latent, log_joint = search.find(model, obs[i], alphabet[i] if num_alphabets else None, None, 10, effort)
        torch.testing.assert_close(log_joint[:5], want.values[:, i], atol=1e-3, rtol=0)
        assert torch.equal(latent[0], every[want.indices[0, i], i])


@pytest.mark.parametrize("num_alphabets", [0, 2])
def test_programs_that_drew_an_image_are_found(num_alphabets):
    """Or better ones: of so small a model, all of them"""
    model = models.GenerativeModel(num_primitives=4, num_arcs=3, likelihood="translation", num_alphabets=num_alphabets)
    network = models.InferenceNetwork(num_primitives=4, num_arcs=3, num_alphabets=num_alphabets)
    effort = search.Effort(6, 2, population=10, num_mutants=40, num_hot_rounds=10, num_cold_rounds=10)
    with torch.no_grad():
        advantages = planted.get_advantages(model, network, 4, effort)
    assert advantages.shape == (4,)
    assert (advantages > -1e-3).all()
    advantages[:2] = torch.tensor([-3.0, -2.0])
    line = planted.describe(advantages)
    assert "for 2 of 4 images" in line
    assert "by 1.25 nats on average over all of them, and by at most 3.0" in line


@pytest.mark.parametrize("likelihood, num_alphabets", [("learned-affine", 3), ("bernoulli", 0)])
def test_beginnings_are_scored_as_programs_are(likelihood, num_alphabets):
    """With invisible strokes after them; under some of the maps from below"""
    model = models.GenerativeModel(num_arcs=6, num_primitives=7, likelihood=likelihood, num_alphabets=num_alphabets)
    alphabet = model.sample_alphabet(1) if num_alphabets else None
    latent, obs = model.sample(20, None if alphabet is None else alphabet.expand(20, -1))
    codes, want = losses.pack(latent), losses.score(model, latent.unsqueeze(1), obs[:1], alphabet)[:, 0]
    for floor in (-50.0, -2.0):  # cheaper is only ink that is not drawn
        image = search.Image(model, obs[0], alphabet if alphabet is None else alphabet[0])
        for map_id in [None] if likelihood == "bernoulli" else [None, torch.tensor([1, 5])]:
            beams = search.BeamSearch(image, map_id, floor, 0.0)
            beam = beams.begin(codes)
            if floor == -50:
                torch.testing.assert_close(beam.log_prior + beam.log_likelihood, image.score(codes, map_id))
                torch.testing.assert_close(image.score(codes), want)
                assert map_id is None or (image.score(codes, map_id) < want).all()
            logits = model.get_logits(latent).clamp(min=floor)
            torch.testing.assert_close(beam.log_likelihood, image.get_log_likelihood(logits, map_id))
            for on in (0, 1):  # strokes added to a beam
                fields = beams.extend(beams.begin(codes[:, :3]), on, 50, False)
                assert len(fields[0]) > 20 and (fields[0][:, 3] % 2 == on).all()
                torch.testing.assert_close(fields, tuple(beams.begin(fields[0])[:4]))
    rest = torch.cat([codes[:, :4], 2 * (codes[:, 4:] // 2)], 1)
    torch.testing.assert_close(beams.begin(codes[:, :4]).logits, model.get_logits(models.unpack(rest)))


def test_gains_are_those_of_strokes_on_an_empty_page():
    """Exactly so from pixels, if maps shift the page by whole pixels; what is drawn already gains nothing"""
    cases = [
        ("bernoulli", None, 28),
        ("bernoulli", None, 22),
        ("translation", torch.tensor([10]), 28),
        ("translation", None, 28),
    ]
    for likelihood, map_id, rows in cases:
        model = models.GenerativeModel(num_primitives=5, likelihood=likelihood, num_rows=rows)
        if likelihood == "translation" and map_id is None:  # all maps: a single one, as in the case before
            model.likelihood.theta_affine = model.likelihood.theta_affine[10:11]
        model.pre_rendering_params.data = torch.tensor([20.0, -12.0])  # dark strokes
        beams = search.BeamSearch(search.Image(model, model.sample(1)[1][0]), map_id, -2.0, 0.0)
        row, col = torch.tensor([13, 9, 16]), torch.tensor([12, 17, 14])
        place = torch.stack([col / 27, 1 - row / (rows - 1)], 1)  # [3, 2]
        arcs = torch.cat([place.unsqueeze(1).expand(3, 5, 2), model.get_primitives().expand(3, 5, 5)], 2)
        logits = rendering.get_logits(arcs.view(15, 1, 7), torch.ones(15, 1), model.get_rendering_params(), rows, 28)
        blank = torch.full_like(logits, beams.floor)
        want = beams.get_log_likelihood(logits) - beams.get_log_likelihood(blank)
        gain = beams.get_gain(blank[:3], place)  # [3, 5]
        torch.testing.assert_close(gain.flatten(), want, atol=1e-3, rtol=1e-4)
        again = beams.get_gain(logits, place.repeat_interleave(5, 0)).view(3, 5, 5).diagonal(dim1=1, dim2=2)
        assert again.abs().mean() < 0.15 * gain.abs().mean()


def test_beams_look_ahead(monkeypatch):
    """Of first strokes, all of which leave no ink, one goes on that leads to where the ink is"""
    monkeypatch.setattr(search, "NUM_SCORED", 20)  # all of them
    model = models.GenerativeModel(num_primitives=20, num_arcs=3, likelihood="bernoulli")
    model.pre_rendering_params.data = torch.tensor([20.0, -12.0])  # dark strokes
    pairs = torch.cartesian_prod(2 * torch.arange(20), 2 * torch.arange(20) + 1, torch.tensor([0]))  # one moves, one draws
    with torch.no_grad():
        drawings = model.get_logits(models.unpack(pairs)) > 0
        obs = drawings[drawings.flatten(1).sum(1).argmax()].float()
        beams = search.BeamSearch(search.Image(model, obs), None, -2.0, 0.0)
        beam = beams.begin(2 * torch.arange(20).unsqueeze(1))
        promise = (beam.next_log_prior + beam.gain).flatten(1).amax(1)
        is_good = promise > promise.max() - 6
        first = torch.cat([beams.grow(torch.empty(1, 0, dtype=torch.long), 1)[:, 0] // 2 for _ in range(100)])
    assert is_good.sum() <= 12
    assert is_good[first].float().mean() > 0.9


def test_selection_keeps_distinct_programs_and_prefers_probable_ones():
    codes, log_joint = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]]), torch.tensor([0.0, 0.0, -1.0, -2.0])
    best, score = search.select(codes, log_joint, 4)
    assert best[:, 1].tolist() == [1, 2, 3] and score.tolist() == [0, -1, -2]
    drawn = torch.cat([search.select(codes, log_joint, 1, temperature=2.0)[0][:, 1] for _ in range(4000)])
    share = drawn.bincount(minlength=4)[1:] / 4000
    torch.testing.assert_close(share, torch.tensor([0.0, -0.5, -1.0]).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("num_primitives, num_arcs", [(10, 6), (1, 1)])
def test_mutants_are_programs(num_primitives, num_arcs):
    population = torch.randint(2 * num_primitives, (5, num_arcs))
    population[:, 0] -= population[:, 0] % 2
    library = search.get_library(models.GenerativeModel(num_primitives=num_primitives).get_primitives())
    mutants = search.mutate(population, library, 500)
    assert mutants.shape == (500, num_arcs) and mutants.min() >= 0 and mutants.max() < 2 * num_primitives
    assert (mutants[:, 0] % 2 == 0).all() and (num_arcs == 1 or len(mutants.unique(dim=0)) > 300)


def test_similar_strokes_have_similar_ends_and_middles():
    primitives = models.GenerativeModel(num_primitives=10).get_primitives()
    (_, x_middle, x), (_, y_middle, y) = (some.t() for some in drawings.get_points(primitives, 3))
    shape = torch.stack([x, y, x_middle, y_middle], 1).float()
    distance = search.get_library(primitives).distance
    expected = (shape.unsqueeze(1) - shape).square().sum(2) + 1e-4
    torch.testing.assert_close(distance, expected.fill_diagonal_(torch.inf))


def test_how_many_programs_are_wanted_does_not_change_what_is_found():
    model = models.GenerativeModel(num_primitives=8, num_arcs=5)
    found = []
    for num_best in (1, 20):
        torch.manual_seed(0)
        obs = model.sample(1)[1][0]
        found.append(search.find(model, obs, num_best=num_best, effort=search.Effort().scale(0.05)))
    assert found[0][0].shape == (1, 5, 2) and found[1][0].shape == (20, 5, 2)
    assert torch.equal(found[0][0], found[1][0][:1]) and torch.equal(found[0][1], found[1][1][:1])


def test_crossing_joins_programs_where_they_meet():
    model = models.GenerativeModel(num_primitives=10, num_arcs=6)
    library = search.get_library(model.get_primitives())
    codes, other = search.pack(model.sample_latent(400)), search.pack(model.sample_latent(400))
    children = search._cross(codes, other, library)

    def get_end(program):
        return library.offset[program // 2].sum(0)

    jumps = []
    for child, first, second in zip(children, codes, other, strict=True):
        joined = {
            (i, j): torch.cat([first[:i], second[j:], child[6 - j + i :]]) for i in range(1, 6) for j in range(i, 6)
        }  # the rest is invisible
        places = [place for place, program in joined.items() if torch.equal(program, child)]
        assert places and (child[6 - min(j - i for i, j in places) :] % 2 == 0).all()
        jumps.append(min((get_end(first[:i]) - get_end(second[:j])).norm() for i, j in places))
    anywhere = (library.offset[codes[:, :3] // 2].sum(1) - library.offset[other[:, :3] // 2].sum(1)).norm(dim=1)
    assert torch.stack(jumps).mean() < 0.7 * anywhere.mean()


def test_beyond_a_share_of_a_beam_only_one_of_programs_alike_goes_on():
    scores = -100.0 * torch.arange(12)  # far apart, so that the draw follows their order
    likeness = torch.tensor([0, 0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5]).unsqueeze(1).expand(-1, 3)
    assert search.sample(scores, likeness, 6, 0.5).tolist() == [0, 1, 2, 4, 6, 8]
    assert search.sample(scores, likeness, 6, 0.0).tolist() == [0, 4, 6, 8, 10, 11]
    assert search.sample(scores, None, 6, 0.5).tolist() == [0, 1, 2, 3, 4, 5]
    assert search.sample(scores, likeness, 100, 0.5).tolist() == list(range(12))


# ------------------------------------------------------------------ characters on a page


def encode(grey):
    return imageio.imwrite("<bytes>", (255 * grey.clip(0, 1)).astype(np.uint8), extension=".png")


def write_t(page, top, left, size, ink=0.0):
    """A capital T, its strokes a tenth of its size"""
    thick = max(size // 10, 1)
    page[top : top + thick, left : left + size] = ink
    page[top : top + size, left + (size - thick) // 2 : left + (size + thick) // 2] = ink
    return page


def get_t():
    (t,) = images.find_characters("t", encode(write_t(np.ones((100, 100)), 20, 20, 60)))
    return t


def is_like(character, other, share=0.75):
    return (character & other).sum() > share * max(character.sum(), other.sum())


def test_size_stroke_and_polarity_of_a_character():
    t = get_t()
    rows, cols = np.flatnonzero(t.any(1)), np.flatnonzero(t.any(0))
    assert 18 <= np.ptp(rows) + 1 <= 21 and abs(rows.mean() - 13.5) < 1.5 and abs(cols.mean() - 13.5) < 1.5
    assert 1.2 < t.sum() / (2 * np.ptp(rows)) < 2.2  # width of a stroke
    row, col = np.mgrid[:600, :800]
    light = 0.35 + 0.5 * np.exp(-((col - 250) ** 2 + (row - 200) ** 2) / 300**2)
    pages = {
        "small": write_t(np.ones((800, 800)), 500, 100, 40),
        "light on dark": write_t(np.zeros((300, 200)), 100, 50, 100, ink=1.0),
        "uneven light": light * write_t(np.ones((600, 800)), 150, 300, 200, ink=0.5),
        "noise": write_t(np.full((300, 300), 0.8), 100, 90, 100) + np.random.RandomState(0).normal(0, 0.02, (300, 300)),
    }
    for name, page in pages.items():
        (found,) = images.find_characters(name, encode(page))
        assert is_like(found, t), name


def test_thick_strokes_and_several_characters(capsys):
    t = get_t()
    page = np.ones((300, 700))
    page[50:110, 50:230] = page[50:250, 110:170] = 0  # strokes a third of the character's size
    write_t(page, 60, 320, 150)
    write_t(page, 60, 520, 150)
    found = images.find_characters("page", encode(page))
    assert len(found) == 3 and all(is_like(character, t) for character in found[1:])
    assert is_like(found[0], t, 0.45)  # a pixel to the side, perhaps
    dotted = np.ones((200, 100))
    dotted[60:180, 46:54] = dotted[20:32, 44:56] = 0
    assert len(images.find_characters("i", encode(dotted))) == 1
    assert capsys.readouterr().err == ""
    strip = np.ones((125, 2500))
    strip[60:66, 100:-100] = 0
    assert len(images.find_characters("strip", encode(strip))) == 1
    assert images.find_characters("blank", encode(np.full((90, 90), 0.7))) == []
    assert "warning: blank is blank" in capsys.readouterr().err


def draw_line(page, start, end, thick=5, ink=0.1):
    for t in np.linspace(0, 1, 2 * max(page.shape)):
        row, col = (round(a + t * (b - a)) for a, b in zip(start, end, strict=True))
        page[max(row - thick // 2, 0) : row + thick // 2 + 1, max(col - thick // 2, 0) : col + thick // 2 + 1] = ink


def test_the_edge_of_the_paper_is_no_character():
    """As on a photograph turned by three degrees; but a long straight stroke within the page is one"""
    t = get_t()
    page = np.ones((400, 600))
    write_t(page, 120, 150, 100)
    draw_line(page, (0, 0), (399, 21)), draw_line(page, (30, 0), (0, 570)), draw_line(page, (399, 200), (385, 599))
    (found,) = images.find_characters("turned", encode(page))
    assert is_like(found, t)
    draw_line(page, (300, 380), (300, 530))
    assert len(images.find_characters("dash", encode(page))) == 2
    tight = np.ones((100, 100))
    tight[:, 45:55] = 0
    assert len(images.find_characters("one stroke", encode(tight))) == 1
    two = np.ones((100, 100))
    two[:, 20:30] = two[:, 60:70] = 0
    assert sum(x.sum() for x in images.find_characters("two strokes", encode(two))) > 40


def test_what_lies_within_a_characters_box_belongs_to_it():
    page = np.ones((400, 600))
    page[100:300, 100:112] = page[288:300, 100:240] = page[160:230, 200:212] = 0  # a bar inside an L
    write_t(page, 120, 380, 150)
    found = images.find_characters("page", encode(page))
    assert len(found) == 2 and is_like(found[1], get_t())


def test_files_that_cannot_be_read_are_named_and_the_others_are_read(tmp_path, capsys):
    write_t(page := np.ones((300, 400)), 50, 30, 100), write_t(page, 50, 230, 100)
    (tmp_path / "two.png").write_bytes(encode(page))
    (tmp_path / "broken.png").write_bytes(encode(page)[:50])
    (tmp_path / "blank.png").write_bytes(encode(np.ones((50, 50))))
    paths = [tmp_path / f"{name}.png" for name in ("broken", "two", "none", "blank")]
    found = characters.find(paths)
    assert found.names == ["two-1", "two-2"] and found.obs.shape == (2, 28, 28)
    for ink, obs in zip(found.inks, found.obs, strict=True):
        assert ink.shape == (112, 112) and is_like(ink, np.kron(obs >= 0.5, np.ones((4, 4), bool)))
    assert len(capsys.readouterr().err.splitlines()) == 3
    with pytest.raises(UserError, match="no character to read"):
        characters.find(paths[:1])


LETTERS = {"T": [(1, 1, 3, 1), (2, 1, 2, 3)], "L": [(1, 1, 1, 3), (1, 3, 3, 3)], "X": [(1, 1, 3, 3), (3, 1, 1, 3)]}


def draw_sheet(paper=235, ink=40):
    """Twelve letters on a sheet of 480 x 360"""
    sheet = PIL.Image.new("L", (480, 360), paper)
    for i in range(12):
        row, col = divmod(i, 4)
        for x0, y0, x1, y1 in LETTERS["TLX"[i % 3]]:
            at = [120 * col + 30 * x0, 120 * row + 30 * y0, 120 * col + 30 * x1, 120 * row + 30 * y1]
            PIL.ImageDraw.Draw(sheet).line(at, ink, width=6)
    return sheet


def lay_on_desk(sheet, desk, share, angle=0, place=(0.5, 0.5)):
    """A photograph of 500 x 400 on which a sheet takes some share: JPEG bytes"""
    rows, cols = np.mgrid[:400, :500]
    if isinstance(desk, str):  # wood
        desk = 110 + 30 * np.sin(rows / 6 + np.sin(cols / 60)) + 15 * np.sin(cols * rows / 5000)
    photo = PIL.Image.fromarray(np.broadcast_to(desk, rows.shape).astype(np.uint8))
    scale = (share * photo.width * photo.height / (sheet.width * sheet.height)) ** 0.5
    sheet = sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), PIL.Image.LANCZOS)
    mask = PIL.Image.new("L", sheet.size, 255)
    sheet, mask = (image.rotate(angle, PIL.Image.BICUBIC, expand=True) for image in (sheet, mask))
    photo.paste(sheet, [round((a - b) * where) for a, b, where in zip(photo.size, sheet.size, place, strict=True)], mask)
    noisy = np.asarray(photo) + 3 * np.random.RandomState(0).randn(400, 500)
    PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("desk", "share", "options"),
    [
        (20, 0.3, {}), (80, 0.6, dict(angle=8)), (80, 0.2, dict(place=(0, 0))), ("wood", 0.4, dict(angle=-20)),
        ("wood", 0.6, dict(place=(1, 0.8), angle=4)), (150, 0.8, dict(angle=4)), (250, 0.3, dict(angle=-8)),
    ],
)  # fmt: skip
def test_a_sheet_on_a_desk(desk, share, options):
    photo = lay_on_desk(draw_sheet(), desk, share, **options)
    assert len(images.find_characters("desk.jpg", photo)) == 12


@pytest.mark.parametrize("shade", [0.7, 0.5])
@pytest.mark.parametrize("where", ["corner", "slanted", "middle"])
def test_a_shadow_on_the_page(where, shade):
    """Whether it falls across the page or looks like a sheet itself"""
    rows, cols = np.mgrid[:360, :480]
    shadow = {
        "corner": (rows > 170) & (cols > 250),
        "slanted": cols + 0.6 * rows > 350,
        "middle": (rows / 360 - 0.5) ** 2 / 0.08 + (cols / 480 - 0.5) ** 2 / 0.04 < 1,
    }[where]
    light = scipy.ndimage.gaussian_filter(np.where(shadow, shade, 1.0), 3)
    page = np.asarray(draw_sheet()) / 255 * light + 0.01 * np.random.RandomState(0).randn(360, 480)
    assert len(images.find_characters("shadow.png", encode(page))) == 12


@pytest.mark.parametrize("side", [14, 300])
def test_things_beside_a_sheet(side):
    """As dark as the ink, and as much of it, but no strokes: keys or a pen on the desk"""
    sheet = draw_sheet()
    desk = np.full((400, 500), 150)
    for left in range(10, 480, 20 if side < 100 else 440):
        desk[20 : 20 + side, left : left + 14] = 30
    assert len(images.find_characters("desk.jpg", lay_on_desk(sheet, desk, 0.4, place=(0.5, 1)))) == 12


def test_sheets_of_other_kinds(capsys):
    dark = lay_on_desk(draw_sheet(paper=40, ink=220), 180, 0.5, angle=5)
    assert len(images.find_characters("chalk.jpg", dark)) == 12
    for share, words in [(0.15, "skipped 1 part without legible strokes"), (0.5, "is blank")]:
        assert images.find_characters("empty.jpg", lay_on_desk(PIL.Image.new("L", (480, 360), 235), 60, share)) == []
        assert words in capsys.readouterr().err
    bold = PIL.Image.new("L", (100, 100), 255)  # a letter that looks like a sheet stays one
    PIL.ImageDraw.Draw(bold).rectangle((25, 20, 75, 80), outline=0, width=12)
    (found,) = images.find_characters("box.png", encode(np.asarray(bold) / 255))
    assert found.sum() > 50 and not found[12:16, 12:16].any()
