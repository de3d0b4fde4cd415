"""Where characters come from: files in every format, downloads, and what people bring."""

import hashlib
import http.server
import io
import os
import pathlib
import re
import shutil
import struct
import threading
import zipfile

import numpy as np
import PIL.Image
import pytest
import scipy.io
import scipy.sparse
import torch
from conftest import NUM_ALPHABETS, make_mat

import data
import images
from util import UserError


def save_mat(path, **changes):
    mat = {key: value for key, value in {**make_mat(), **changes}.items() if value is not None}
    scipy.io.savemat(path, mat)
    return str(path)


def draw(size=100, width=6, paper=255, ink=0, light=0.0, noise=0.0):
    """An L on paper, 0 to 255 [size, size], unevenly lit if `light` is not 0"""
    rows, cols = np.mgrid[:size, :size] / size
    strokes = (abs(cols - 0.3) * size <= width / 2) & (rows > 0.2) & (rows < 0.8)
    strokes |= (abs(rows - 0.8) * size <= width / 2) & (cols > 0.3) & (cols < 0.75)
    grey = np.where(strokes, ink, paper) * (1 - light * (0.7 * cols + 0.3 * rows))
    return grey + noise * np.random.RandomState(0).randn(size, size)


def encode(grey, kind="PNG", **options):
    PIL.Image.fromarray(np.clip(grey, 0, 255).round().astype(np.uint8)).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def fill(folder, num=12, alphabets=("a", "b", "c"), **options):
    """Writes images of as many alphabets in turn; "": in no folder. Returns: the folder"""
    for i in range(num):
        (folder / alphabets[i % len(alphabets)]).mkdir(parents=True, exist_ok=True)
        (folder / alphabets[i % len(alphabets)] / f"{i}.png").write_bytes(encode(draw(40 + i), **options))
    return folder


def describe(location, **options):
    return data.load(str(location), **options).summary


def test_mat(tmp_path):
    dataset = data.load(save_mat(tmp_path / "chardata.mat"))
    num_valid = round(200 * 1345 / 24345)
    assert [len(split.obs) for split in dataset[:3]] == [200 - num_valid, num_valid, 40]
    assert dataset.num_alphabets == NUM_ALPHABETS
    order = np.random.RandomState(123).permutation(200)
    for split, ids in zip(dataset[:3], [order[:-num_valid], order[-num_valid:], np.arange(40)], strict=True):
        assert split.obs.dtype == torch.float32
        assert (split.obs[:, 1:] == 0).all()  # upright: the ink is in the top row, from the left
        assert (split.obs[:, 0].sum(1).numpy() == ids % 28 + 1).all()
        assert (split.obs[:, 0, 0] == 1).all()
        assert (split.alphabet.argmax(1).numpy() == ids % NUM_ALPHABETS).all()
        assert split.alphabet.shape == (len(ids), NUM_ALPHABETS) and (split.alphabet.sum(1) == 1).all()


def test_small_dataset_and_dataset_size(tmp_path):
    path = save_mat(tmp_path / "chardata.mat")
    small = data.load(path, small_dataset=True)
    assert small.train.alphabet.sum(0).tolist() == [10] * NUM_ALPHABETS
    full = data.load(path)
    assert (small.test.obs == full.test.obs).all() and len(small.test.obs) == 40
    of_first = full.train.obs[full.train.alphabet[:, 0] == 1]
    assert (small.train.obs[:10] == of_first[:10]).all()
    sized = data.load(path, dataset_size=15)
    assert sized.train.alphabet.sum(0).tolist() == [3] * NUM_ALPHABETS and len(sized.test.obs) == 40
    assert data.get_fingerprint(small.train) != data.get_fingerprint(full.train)
    for bad in (dict(dataset_size=1000), dict(dataset_size=7), dict(dataset_size=5, small_dataset=True)):
        with pytest.raises(UserError):
            data.load(path, **bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target=None), "not in chardata.mat's format"),
        (dict(data=np.zeros((100, 200))), "784"),
        (dict(data=np.full((784, 200), 1.5)), "values from"),
        (dict(data=np.full((784, 200), -0.1)), "values from"),
        (dict(testdata=np.full((784, 40), np.nan)), "values from"),
        (dict(target=np.zeros((5, 200))), "not one-hot"),
        (dict(target=np.eye(5)), r"have the shapes \(784, 200\), \(5, 5\), \(1, 200\); expected"),
        (dict(targetchar=np.zeros((1, 7))), "shape"),
        (dict(data=np.array(["text"])), "shape"),
        (dict(target=np.eye(4)[np.arange(200) % 4].T), "same L"),
    ],
)
def test_bad_mat(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        data.load(save_mat(tmp_path / "bad.mat", **changes))


def make_release(write, num_hands=20):
    """write(name, png bytes): two alphabets of 105 x 105 black strokes on white, one in each half"""
    for half, alphabet, num_characters in [("images_background", "Aaa", 3), ("images_evaluation", "Bbb", 2)]:
        for character in range(1, num_characters + 1):
            for hand in range(num_hands):
                image = np.ones((105, 105), bool)
                image[10:30, : 30 + hand] = False  # the upper left
                write(f"{half}/{alphabet}/character{character:02}/{hand:02}.png", encode(image * 255))


def test_official_release_zipped_and_unpacked(tmp_path):
    zips = tmp_path / "zips"
    zips.mkdir()
    unpacked = tmp_path / "unpacked"
    archives = {half: zipfile.ZipFile(zips / f"{half}.zip", "w") for half in ("images_background", "images_evaluation")}

    def write(name, png):
        archives[name.split("/")[0]].writestr(name, png)
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(png)

    make_release(write)
    for archive in archives.values():
        archive.close()
    datasets = [data.load(str(path)) for path in (zips, unpacked)]
    assert len(list(zips.iterdir())) == 2  # nothing unpacked
    for dataset in datasets:
        assert dataset.num_alphabets == 2
        assert len(dataset.test.obs) == 25 and len(dataset.train.obs) + len(dataset.valid.obs) == 75
        assert set(dataset.train.character.tolist()) == {1, 2, 3}
        assert dataset.train.obs[:, 4:7, :7].all() and not dataset.train.obs[:, 9:].any()
    for a, b in zip(datasets[0].train, datasets[1].train, strict=True):
        assert (a == b).all()
    one = data.load(str(zips / "images_background.zip"))
    assert one.num_alphabets == 1 and len(one.test.obs) == 15
    assert data.load(str(unpacked / "images_background")).num_alphabets == 1
    broken = (zips / "images_background.zip").read_bytes()
    (zips / "images_background.zip").write_bytes(broken[: len(broken) // 2])
    with pytest.raises(UserError, match="images_background.zip"):
        data.load(str(zips))


def test_area_average():
    rows = np.arange(105)[:, None] * np.ones((1, 105), np.float32)
    expected = [(np.arange(15 * i, 15 * (i + 1)) // 4).mean() for i in range(28)]  # in quarters of a pixel
    np.testing.assert_allclose(images.fit(rows / 105)[:, 3] * 105, expected, rtol=1e-5)


def test_where_ink_goes(tmp_path):
    """90 wide, 15 rows of paper above and below: ink in rows 25 to 45 of 90, columns 20 to 70"""
    grey = np.full((60, 90), 250)
    grey[10:30, 20:70] = 5
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encode(grey))
    dataset = data.load(str(tmp_path))
    assert dataset.num_alphabets == 0 and dataset.train.alphabet is None
    assert dataset.train.obs[:, 8:13, 7:21].all()
    assert not dataset.train.obs[:, :7].any() and not dataset.train.obs[:, 15:].any()


def test_photographs_are_searched_for_characters(tmp_path):
    """Two characters on each page, under uneven light; a page that cannot be read is left out with a warning"""
    for alphabet in ["a", "b"]:
        (tmp_path / alphabet).mkdir()
        for page in range(4):
            grey = np.full((200, 300), 200.0) - np.linspace(0, 60, 300)
            grey[50:150, 60:70] -= 90
            grey[50:60, 200:260] -= 90
            grey[50:150, 225:235] -= 90
            (tmp_path / alphabet / f"{page}.png").write_bytes(encode(grey))
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    dataset = data.load(str(tmp_path), find_characters=True)
    assert len(dataset.train.obs) + len(dataset.valid.obs) + len(dataset.test.obs) == 16
    assert dataset.num_alphabets == 2 and dataset.train.obs.sum((1, 2)).min() > 20
    with pytest.raises(UserError, match="--find-characters is for a folder"):
        data.load("glyphs", find_characters=True)


@pytest.mark.parametrize("margin", [1, 3])
def test_characters_cropped_closely(margin):
    """Strokes along its border are not paper"""
    (expected,) = data.find_characters("x", encode(draw(200, 12)))
    rows, cols = np.nonzero(draw(200, 12) < 128)
    box = np.pad(draw(200, 12)[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1], margin, constant_values=255)
    for content in (encode(box), encode(255 - box)):
        (found,) = data.find_characters("x", content)
        assert (found & expected).sum() > 0.7 * (found | expected).sum()


@pytest.mark.parametrize("pen", [4, 12])
def test_dots_belong_to_their_letters(pen):
    """Also those of a fine pen; a dot alone remains a dot, not the cross that it is thinned to"""
    grey = np.full((400, 500), 255, np.uint8)
    for left in (100, 300):
        grey[150:300, left : left + pen] = grey[80 : 80 + pen, left : left + pen] = 0
    found = data.find_characters("x", encode(grey))
    assert [scipy.ndimage.label(ink, np.ones((3, 3)))[1] for ink in found] == [2, 2]
    grey[140:] = 255
    for side in (28, 112):
        dots = data.find_characters("x", encode(grey), side)
        assert len(dots) == 2 and all(3 / 28**2 < dot.mean() < 6 / 28**2 for dot in dots)


@pytest.mark.parametrize("full", [255, 4095, 65535])
def test_sixteen_bits_of_any_depth(full):
    PIL.Image.fromarray((draw(60) / 255 * full).round().astype(np.uint16)).save(file := io.BytesIO(), "PNG")
    (found,), (expected,) = (data.find_characters("x", content) for content in (file.getvalue(), encode(draw(60))))
    assert (found == expected).all()


def test_glyphs():
    dataset = data.load("glyphs")
    assert dataset.summary == "9960 images, 14 alphabets, mean ink 0.12"
    # The same whatever is installed: published numbers and older runs depend on it
    assert [data.get_fingerprint(split) for split in dataset[:3]] == ["f7c5429f34fe", "88a599335956", "c06b791d5d45"]
    assert set(dataset.train.character[dataset.train.alphabet[:, 0] == 1].tolist()) == set(range(1, 41))


def test_omniglot(omniglot, monkeypatch):
    dataset = data.load(str(omniglot / "chardata.mat"))
    assert [len(split.obs) for split in dataset[:3]] == [23000, 1345, 8115] and dataset.num_alphabets == 50
    monkeypatch.setenv("OMNIGLOT_PATH", str(omniglot / "chardata.mat"))
    for location in ("local", "om"):
        small = data.load(location, small_dataset=True)
        assert len(small.train.obs) == 500 and (small.train.alphabet.sum(0) == 10).all()
        assert (small.train.obs[0] == dataset.train.obs[dataset.train.alphabet[:, 0] == 1][0]).all()


def test_omniglot_release(omniglot, tmp_path):
    path = omniglot / "images_evaluation.zip"
    if not path.exists():
        pytest.skip(f"no zip of the official release at {omniglot}")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        for name in whole.namelist():
            if re.match("images_evaluation/(Angelic|Keble|ULOG)/", name):
                some.writestr(name, whole.read(name))
    dataset = data.load(str(tmp_path / "some.zip"))
    assert sum(len(split.obs) for split in dataset[:3]) == 20 * (20 + 26 + 26)
    assert dataset.alphabet_names == ("Angelic", "Keble", "ULOG")


# ------------------------------------------------------------------ download


@pytest.fixture
def server():
    """An HTTP server on this machine: /whole, /cut (breaks off), 404 else"""
    content = np.random.RandomState(0).bytes(300_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/whole", "/cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100_000] if self.path == "/cut" else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url, server.content = f"http://127.0.0.1:{server.server_port}", content
    server.blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    yield server
    server.shutdown()


def test_download(server, tmp_path):
    path = tmp_path / "new" / "chardata.mat"
    data.download(f"{server.url}/whole", path, server.blob_id)
    assert path.read_bytes() == server.content
    assert [file.name for file in path.parent.iterdir()] == ["chardata.mat"]
    for name, blob_id, message in [
        ("cut", server.blob_id, "not the expected file|cannot download"),
        ("missing", server.blob_id, "Not Found"),
        ("whole", "0" * 40, "not the expected file"),
    ]:
        with pytest.raises(UserError, match=message):
            data.download(f"{server.url}/{name}", tmp_path / "again.mat", blob_id)
        assert list(tmp_path.iterdir()) == [path.parent]


def test_local_is_downloaded_when_missing(server, tmp_path, monkeypatch):
    """Where the network is down: nothing answers at a port that was just closed"""
    monkeypatch.setenv("OMNIGLOT_PATH", str(tmp_path / "chardata.mat"))
    monkeypatch.setattr(data, "CHARDATA_URL", f"{server.url}/whole")
    monkeypatch.setattr(data, "CHARDATA_BLOB_ID", server.blob_id)
    with pytest.raises(UserError, match="is damaged"):  # it arrived, though it is noise
        data.load("local")
    (tmp_path / "chardata.mat").unlink()
    server.server_close()
    server.shutdown()
    with pytest.raises(UserError, match=re.escape(f"put it at {tmp_path / 'chardata.mat'}")):
        data.load("local")
    assert list(tmp_path.iterdir()) == []


def test_thin_strokes_survive():
    rows, cols = np.mgrid[:1000, :1000]
    diagonal, *others = abs(rows - cols), abs(rows - 400), abs(3 * rows - cols - 700) / 3
    huge = abs(np.subtract(*np.mgrid[:3000, :3000]))
    for line, width in ((diagonal, 4), *((line, 4) for line in others), (huge, 1)):
        ink = data.read_image("thin.png", encode(255 * (line >= width))) >= 0.5
        assert ink.any(0).all() and ink.sum() < 90  # unbroken from left to right, and still thin


def test_damaged_and_missing_files(tmp_path):
    """One line that names the file, whatever the decoder raises"""
    png = encode(draw(30))

    def write_folder(name, write):
        (tmp_path / name).mkdir()
        write(tmp_path / name)

    def write_broken_zip(folder):
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("a.png", png)
        content = (folder / "a.zip").read_bytes()
        (folder / "a.zip").write_bytes(content.replace(png[20:60], bytes(40)))

    whole = pathlib.Path(save_mat(tmp_path / "whole.mat")).read_bytes()
    (tmp_path / "cut.mat").write_bytes(whole[:5000])
    (tmp_path / "noise.mat").write_bytes(bytes(range(256)) * 20)
    scipy.io.savemat(tmp_path / "sparse.mat", {**make_mat(20, 6), "data": scipy.sparse.eye(784, 20)})
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "zeros.npy", np.zeros((5, 784)))
    np.save(tmp_path / "single.npy", np.eye(28)[None])
    np.save(tmp_path / "full.npy", np.full((5, 28, 28), 255, np.uint8))
    np.savez(tmp_path / "text.npz", images=np.array("no array of numbers"))
    (tmp_path / "text.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "no image")
    write_folder("empty", lambda _: None)
    write_folder("broken", write_broken_zip)
    write_folder("pipe", lambda folder: os.mkfifo(folder / "a.png"))
    for name, kind in [("wide", np.float32), ("deep", np.int32)]:  # pixels of more than 16 bits
        image = PIL.Image.fromarray(1000 * draw(30).astype(kind))
        write_folder(name, lambda folder, image=image: image.save(folder / "a.png", "TIFF"))
    for name, words in {
        "cut.mat": "is damaged", "noise.mat": "is damaged", "sparse.mat": "not in chardata.mat's format", "empty.npy": "is damaged",
        "objects.npy": "is damaged", "zeros.npy": "values from 0 to 0;", "full.npy": "5 blank", "text.npz": "expected numbers",
        "single.npy": "too few images to split into",
        "text.txt": "is not a .mat, .npy", "none.zip": "holds no images", "empty": "holds no images",
        "broken/a.zip": "a.png is damaged", "pipe": "holds no images", "wide": "pixels of Pillow's mode F", "deep": "pixels of Pillow's mode I",
        "missing": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            data.load(str(tmp_path / name))
        assert len(str(error.value).splitlines()) == 1 and str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError, match="no such file or folder"):
        data.load("~nosuchuser/x")


def test_an_animated_image_is_its_first_picture(capsys):
    grey = np.full((30, 30), 255, np.uint8)
    grey[5:25, 14:16] = 0
    frames = [PIL.Image.fromarray(frame) for frame in (grey, np.full_like(grey, 255))]
    frames[0].save(file := io.BytesIO(), "PNG", save_all=True, append_images=frames[1:])
    ink = data.read_image("film.png", file.getvalue())
    assert np.array_equal(ink, data.read_image("still.png", encode(grey)))
    assert capsys.readouterr().err == "warning: film.png holds 2 pictures; the first is read\n"


def test_images_are_decoded_as_one_sees_them(capsys):
    grey = np.full((60, 40), 255, np.uint8)
    grey[5:55, 5:12] = grey[5:12, 5:35] = 0
    upright, picture = 1 - grey / 255, PIL.Image.fromarray(grey)
    turned = [np.rot90(upright, k) for k in (2, 3, 1)]
    for orientation, expected in zip([1, 3, 6, 8], [upright, *turned], strict=True):  # as cameras note it
        # Two tags, the first of a type that Pillow reads but cannot write: a width of 0.5
        exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIfHHIII", 8, 2, 0x100, 11, 1, 0.5, 0x112, 3, 1, orientation, 0)
        for encoding, kind in [("L", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG")]:
            picture.convert(encoding).save(file := io.BytesIO(), kind, exif=exif)
            np.testing.assert_allclose(1 - images.decode("x", file.getvalue()), expected, atol=0.1)
    palette = PIL.Image.fromarray((grey == 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0] * 2)
    palette.save(file := io.BytesIO(), "PNG", transparency=0)  # black on what one sees through
    np.testing.assert_allclose(1 - images.decode("x", file.getvalue()), upright)
    thumbnail = picture.resize((10, 15)).convert("RGB")
    picture.convert("RGB").save(file := io.BytesIO(), "MPO", save_all=True, append_images=[thumbnail])  # of a phone
    assert images.decode("phone.jpg", file.getvalue()).shape == (60, 40)
    assert capsys.readouterr().err == "warning: phone.jpg holds 2 pictures; the first is read\n"


# ------------------------------------------------------------------ what people bring


@pytest.mark.parametrize("width", [1, 4, 20])
@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (225, 0), (200, 60), (160, 100), (120, 0), (120, 100)])
@pytest.mark.parametrize("light_on_dark", [False, True])
def test_paper_of_any_brightness(width, paper, ink, light_on_dark):
    expected = data.read_image("x", encode(draw(400, width))) >= 0.5
    assert 20 < expected.sum() < 90
    for options, kind in [({}, "PNG"), (dict(noise=2), "JPEG"), (dict(light=0.4), "PNG")]:
        grey = draw(400, width, paper, ink, **options)
        found = data.read_image("x", encode(255 - grey if light_on_dark else grey, kind)) >= 0.5
        assert (found & expected).sum() > 0.7 * (found | expected).sum(), (options, found.sum())


def test_paper_of_other_kinds():
    letter = draw() < 128
    expected = data.read_image("x", encode(draw())) >= 0.5
    yellow, blue = np.array([250, 240, 120]), np.array([40, 50, 140])
    transparent = np.zeros((100, 100, 4))
    transparent[letter, 3] = 255
    scans = []
    for ink, paper in [(900, 3100), (4090, 10), (65000, 100)]:  # the first two of 12 bits
        PIL.Image.fromarray((np.where(letter, ink, paper)).astype(np.uint16)).save(file := io.BytesIO(), "PNG")
        scans.append(file.getvalue())
    for content in [encode(np.where(letter[..., None], blue, yellow)), encode(transparent), *scans]:
        assert (data.read_image("x", content) >= 0.5).tolist() == expected.tolist()
    assert not data.read_image("x", encode(draw(paper=200, ink=200, noise=3))).any()  # blank paper's noise is no ink
    assert not data.read_image("x", encode(np.zeros((50, 50)))).any()  # nor is black paper


def test_blank_and_solid_images_are_named_or_refused(tmp_path):
    fill(tmp_path / "some")
    (tmp_path / "some/a/blank.png").write_bytes(encode(np.full((40, 40), 255)))
    (tmp_path / "some/b/thick.png").write_bytes(encode(np.pad(np.zeros((50, 50)), 5, constant_values=255)))
    assert describe(tmp_path / "some").endswith("; 1 blank, 1 more than half ink")
    white = np.full((40, 40, 4), 255)
    white[..., 3] = 255 * (draw(40) < 128)
    (tmp_path / "white").mkdir()
    for i in range(6):
        (tmp_path / f"white/{i}.png").write_bytes(encode(white))
    np.save(tmp_path / "solid.npy", np.pad(np.ones((9, 26, 28)), [(0, 0), (1, 1), (0, 0)]))
    for name, words in [("white", "of 6 images, 6 blank"), ("solid.npy", "9 more than half|dark on light|9 solid|9 blank")]:
        with pytest.raises(UserError, match=words):
            data.load(str(tmp_path / name))


def test_each_part_must_show_characters(tmp_path):
    """Parts of their own scale are read alike; a blank one, for which any model has a high log p, is refused"""
    path = str(tmp_path / "chardata.mat")
    expected = [data.get_fingerprint(split) for split in data.load(save_mat(path))[:3]]
    scaled = data.load(save_mat(path, data=make_mat()["data"] * 255))
    assert [data.get_fingerprint(split) for split in scaled[:3]] == expected
    for blank, message in [(0, "values from 0 to 0;"), (2, "of 40 test images, 38 blank")]:
        images = make_mat()["testdata"] * (np.arange(40) < blank)
        with pytest.raises(UserError, match=message):
            data.load(save_mat(path, testdata=images))


def test_what_may_not_divide_the_images_as_meant(tmp_path, capsys):
    """Parts within alphabets, parts by other names, and images along an array's last axis"""
    for name in ["a/train", "a/test", "b/Test_images"]:
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "own" / name / f"{i}.png").write_bytes(encode(draw()))
    np.save(tmp_path / "last.npy", make_mat()["data"].reshape(28, 28, 200))
    for path, message in [
        ("own", "the folders Test_images, test, train do not divide the images; for that, put train/ and test/ outermost"),
        ("last.npy", f"{tmp_path}/last.npy is read as 28 images of 28 x 200 pixels; if"),
    ]:
        data.load(str(tmp_path / path))
        assert capsys.readouterr().err.startswith(f"warning: {message}")


def test_stray_pictures_are_left_out_by_name(tmp_path, capsys):
    folder = fill(tmp_path / "own")
    for name in ("grid.jpg", "notes.txt", "phone.HEIC", "page.pdf"):
        (folder / name).write_bytes(encode(draw(), "JPEG"))
    dataset = data.load(str(folder), small_dataset=False)
    assert (
        dataset.summary
        == "12 images, 3 alphabets, mean ink 0.13; skipped: 4 files (1 HEIC, 1 PDF, 1 TXT, 1 outside the folders)"
    )
    assert dataset.alphabet_names == ("a", "b", "c")
    warning = capsys.readouterr().err.splitlines()[0]
    assert all(words in warning for words in ["grid.jpg", "phone.HEIC", "pip install pillow-heif"])
    (folder / "a/7.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(UserError, match="7.jpg is damaged or not an image .*; HEIC needs pip install"):
        data.load(str(folder))
    mostly_flat = fill(tmp_path / "flat", alphabets=("", "", "old"))
    assert describe(mostly_flat) == "12 images, no alphabets, mean ink 0.13"


def test_a_clone_of_omniglots_repository(tmp_path):
    def write(name, png):
        path = tmp_path / "python" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        if "Aaa/character01" in name:
            copy = tmp_path / "python" / name.replace("background", "background_small1")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(png)

    make_release(write)
    plain = data.load(str(tmp_path / "python"))
    (tmp_path / "omniglot_grid.jpg").write_bytes(encode(draw(), "JPEG"))
    (tmp_path / "python/one-shot/run01/training").mkdir(parents=True)
    (tmp_path / "python/one-shot/run01/training/class01.png").write_bytes(encode(draw()))
    clone = data.load(str(tmp_path), True)
    counts = "100 images, 2 alphabets, mean ink 0.07; skipped: {}; 20 to train on"
    assert clone.summary == counts.format("22 files (22 outside the folders)")
    assert data.get_fingerprint(plain.test) == data.get_fingerprint(data.load(str(tmp_path)).test)
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as inner:
        make_release(lambda name, png: inner.writestr(name, png))
    with zipfile.ZipFile(tmp_path / "omniglot-master.zip", "w") as outer:  # as GitHub packs it
        outer.writestr("omniglot-master/omniglot_grid.jpg", encode(draw(), "JPEG"))
        outer.write(tmp_path / "images_background.zip", "omniglot-master/python/images_background.zip")
    assert describe(tmp_path / "omniglot-master.zip").startswith("100 images, 2 alphabets, mean ink 0.07; skipped: 1 file")


def test_all_that_pillow_reads(tmp_path):
    folder = fill(tmp_path, 6)
    for suffix, kind in dict(tif="TIFF", bmp="BMP", webp="WEBP", gif="GIF", pgm="PPM", JPEG="JPEG").items():
        (folder / f"a/more.{suffix}").write_bytes(encode(draw(), kind))
    assert describe(folder) == "12 images, 3 alphabets, mean ink 0.10"


def test_links_and_folders_of_systems(tmp_path):
    folder = fill(tmp_path / "own")
    for link, to in {
        "latest": ".",
        "a/up": "..",
        "a/x": "../b",
        "b/y": "../a",
        "self": "self",
        "no": "where",
        "0": "c",
    }.items():
        os.symlink(to, folder / link)
    assert describe(folder) == "12 images, 3 alphabets, mean ink 0.13"
    assert data.load(str(folder)).alphabet_names == ("a", "b", "c")
    os.symlink(fill(tmp_path / "elsewhere", 4, ["d"]) / "d", folder / "d")  # a link to what is nowhere else is followed
    for hidden in ["lost+found", "$RECYCLE.BIN", "System Volume Information", "a/@eaDir/1.png", "#recycle", "b/.thumbnails"]:
        fill(folder / hidden, 3, [""])
    for hidden in [".DS_Store", "a/Thumbs.db", "a/._1.png", "desktop.ini"]:
        (folder / hidden).write_bytes(b"no image")
    assert describe(folder) == "16 images, 4 alphabets, mean ink 0.14"


def test_folders_without_permission(tmp_path, monkeypatch):
    folder, listed = fill(tmp_path), os.scandir

    def refuse(path):
        if os.path.basename(path) in ("lost+found", "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (folder / "lost+found").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(PermissionError):
        data.load(str(folder))
    (folder / "b").rename(folder / ".b")
    assert describe(folder) == "8 images, 2 alphabets, mean ink 0.13"


@pytest.mark.parametrize(
    ("names", "sizes", "num_alphabets"),
    [
        (["train/x", "train/y", "test/x", "test/y"], (11, 1, 12), 2),
        (["d/Training", "d/Testing"], (11, 1, 12), 0),
        (["train/x", "val/x"], (11, 1, 12), 1),
        (["train/x", "validation/x", "test/x"], (8, 8, 8), 1),
    ],
)
def test_folders_that_are_split_already(tmp_path, names, sizes, num_alphabets):
    fill(tmp_path, 24, names)
    (tmp_path / "docs").mkdir()
    if "d/Testing" not in names:
        (tmp_path / "docs/figure.png").write_bytes(encode(draw()))
    dataset = data.load(str(tmp_path))
    assert tuple(len(split.obs) for split in dataset[:3]) == sizes and dataset.num_alphabets == num_alphabets
    test = {(data.read_image("x", path.read_bytes()) >= 0.5).tobytes() for path in tmp_path.glob(f"{names[-1][:4]}*/**/*.png")}
    assert names[-1].startswith("d/") or all(image.bool().numpy().tobytes() in test for image in dataset.test.obs)


def test_arrays_as_people_have_them(tmp_path):
    ink = np.stack([255 - draw(28, 3).astype(np.uint8)] * 12)
    ink[np.arange(12), 2, np.arange(12) + 8] = 255
    forms = dict(
        bytes=ink, paper_one=1 - ink / 255, paper_255=255 - ink, floats=ink.astype(np.float64), share=ink / 255, bools=ink > 127,
        first=ink[:, None], last=ink[..., None], flat=ink.reshape(12, 784), wide=ink.astype(np.uint16) * 257, binary=(ink > 127) * 1,
        large=ink.repeat(2, 1).repeat(2, 2), rounded=ink / 255 * 1.000001,
    )  # fmt: skip
    expected = None
    for name, array in forms.items():
        np.save(tmp_path / f"{name}.npy", array)
        dataset = data.load(str(tmp_path / f"{name}.npy"))
        expected = expected or data.get_fingerprint(dataset.train)
        assert data.get_fingerprint(dataset.train) == expected, name
        assert ("dark on light" in dataset.summary) == name.startswith("paper"), dataset.summary
    assert {image.bool().numpy().tobytes() for image in dataset.train.obs} <= {(image > 127).tobytes() for image in ink}
    with pytest.raises(UserError, match="there are only"):
        data.load(str(tmp_path / "bytes.npy"), small_dataset=True)
    np.save(tmp_path / "solid.npy", np.pad(np.ones((12, 60, 60), np.uint8), [(0, 0), (20, 25), (20, 25)]))
    assert data.load(str(tmp_path / "solid.npy")).train.obs.mean() == pytest.approx((60 / 105) ** 2, abs=0.02)
    for wrong, words in [(ink / 255 * 1.5, "0 to 1.5"), (ink / 255 - 0.5, "from -0.5"), (ink[..., None].repeat(3, 3), "shape")]:
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(UserError, match=f"wrong.npy has .*{words}"):
            data.load(str(tmp_path / "wrong.npy"))
    labels = np.arange(12) % 3
    in_bytes = np.array(["ш".encode(), b"y", b"\xff"])[labels]
    for name, more in dict(a=labels, b=np.array(["x", "y", "z"])[labels], c=in_bytes).items():
        np.savez(tmp_path / f"{name}.npz", images=ink, labels=more)
        assert describe(tmp_path / f"{name}.npz").startswith("12 images, 3 alphabets"), name
    np.savez(tmp_path / "alone.npz", ink)
    assert data.get_fingerprint(data.load(str(tmp_path / "alone.npz")).train) == expected
    np.savez(tmp_path / "short.npz", images=ink, labels=labels[:5])
    with pytest.raises(UserError, match="short.npz has 12 images, but labels of the shape"):
        data.load(str(tmp_path / "short.npz"))
    np.savez(tmp_path / "two.npz", a=ink, b=ink)
    with pytest.raises(UserError, match="two.npz holds a, b; give one array of images"):
        data.load(str(tmp_path / "two.npz"))


@pytest.mark.parametrize("paper, ink", [(255, 0), (245, 0), (230, 20), (15, 240)])
def test_larger_arrays_on_paper_of_any_brightness(paper, ink, tmp_path):
    """As the same pixels in image files"""
    greys = np.stack([draw(105, 4, paper, ink)] * 12).round().astype(np.uint8)
    np.save(tmp_path / "grey.npy", greys)
    obs = data.load(str(tmp_path / "grey.npy")).train.obs.bool().numpy()
    assert (obs == (data.read_image("x", encode(greys[0])) >= 0.5)).all()


def test_one_polarity_for_an_array(tmp_path):
    """Even of images whose edge is mostly ink, or with faint ink"""
    ink = np.zeros((12, 56, 56), np.uint8)
    ink[:, 20:30] = 255
    ink[0, :2] = ink[0, -2:] = ink[0, :, :2] = ink[0, :, -2:] = 255  # a box, as large as the image
    for array in (ink, 255 - ink):
        np.save(tmp_path / "boxes.npy", array)
        dataset = data.load(str(tmp_path / "boxes.npy"))
        assert max(split.obs.mean((1, 2)).max() for split in (dataset.train, dataset.test)) < 0.5


def test_characters_folders_that_are_split_already(tmp_path):
    """With folders named as in the official release, dark on light or light on dark"""
    for part, characters in [("train", range(1, 7)), ("test", (7, 8))]:
        for alphabet, character, light in [(x, i, y) for x in "ab" for i in characters for y in (False, True)]:
            folder = tmp_path / part / alphabet / f"character{character:02}"
            folder.mkdir(parents=True, exist_ok=True)
            grey = draw(40 + character)
            (folder / f"{light}.png").write_bytes(encode(255 - grey if light else grey))
    dataset = data.load(str(tmp_path))
    assert len(dataset.test.obs) == 8 and set(dataset.test.character.tolist()) == {7, 8} and dataset.num_alphabets == 2
    assert set(dataset.train.character.tolist()) == set(range(1, 7)) and dataset.train.obs.mean() < 0.2


def test_a_flat_test_folder_beside_alphabets(tmp_path):
    """Test images in no alphabet's folder: all are kept, and none is trained on"""
    fill(tmp_path / "train", 8, ("a", "b"))
    fill(tmp_path / "test", 3, ("",))
    dataset = data.load(str(tmp_path))
    assert (len(dataset.train.obs), len(dataset.test.obs)) == (8, 3)


def test_zips_of_any_system(tmp_path):
    for system, name, litter in [
        ("windows", "letters\\{}\\{}.PNG", "letters\\a\\Thumbs.db"),
        ("mac", "letters/{}/{}.png", "__MACOSX/letters/a/._1.png"),
    ]:
        with zipfile.ZipFile(tmp_path / f"{system}.zip", "w") as archive:
            archive.writestr(litter, b"no image")
            for i in range(12):
                archive.writestr(name.format("abc"[i % 3], i), encode(draw()))
        assert describe(tmp_path / f"{system}.zip") == "12 images, 3 alphabets, mean ink 0.05"


def test_a_folder_and_its_zip_are_the_same_data(tmp_path):
    """Although "-" comes before "/", and so a name of one before those in the other"""
    for i, name in enumerate(["a", "a-2", "b"]):
        fill(tmp_path / "folder" / name, 4 + i, ("",))
    shutil.make_archive(tmp_path / "folder", "zip", tmp_path / "folder")
    assert len({data.get_fingerprint(data.load(str(tmp_path / name)).train) for name in ("folder", "folder.zip")}) == 1


def test_glyphs_of_another_size_are_refused(monkeypatch):
    monkeypatch.setattr(images, "SIDE", 56)
    with pytest.raises(UserError, match="glyphs.* are 28 x 28 pixels"):
        data.load("glyphs")


def test_large_pictures_are_not_called_damaged(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match="large.png is too large .* exceeds limit of 4000 pixels"):
        images.decode("large.png", encode(draw(100)))


def test_the_fingerprint_knows_grey_images():
    obs = (torch.rand(5, 28, 28) < 0.3).float()
    binary, grey, darker = (data.get_fingerprint(data.Split(x, None, None)) for x in (obs, obs * 0.5, obs * 0.6))
    assert binary == hashlib.sha1(np.packbits(obs.bool().numpy()).tobytes()).hexdigest()[:12]
    assert len({binary, grey, darker}) == 3
