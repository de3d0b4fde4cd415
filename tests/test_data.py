import hashlib
import http.server
import io
import os
import re
import threading
import time
import zipfile

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import pytest
import scipy.io
import scipy.sparse
import torch

import data
import images
from util import UserError

NUM_ALPHABETS = 5


def make_mat(num_train=200, num_test=40):
    """In chardata.mat's format, column by column: image i has ink in its top row, left part of i + 1 pixels"""
    random_state = np.random.RandomState(0)
    mat = {}
    for prefix, num in [("", num_train), ("test", num_test)]:
        images = np.zeros((num, 28, 28), np.float32)
        for i, image in enumerate(images):
            image[0, : i % 28 + 1] = 1
        mat[prefix + "data"] = images.transpose(0, 2, 1).reshape(num, 784).T
        mat[prefix + "target"] = np.eye(NUM_ALPHABETS, dtype=np.uint8)[np.arange(num) % NUM_ALPHABETS].T
        mat[prefix + "targetchar"] = random_state.randint(1, 9, (1, num))
    return mat


def save_mat(path, **changes):
    mat = {key: value for key, value in {**make_mat(), **changes}.items() if value is not None}
    scipy.io.savemat(path, mat)
    return str(path)


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
        (dict(target=None), "has no target"),
        (dict(data=np.zeros((100, 200))), "784"),
        (dict(data=np.full((784, 200), 1.5)), r"outside \[0, 1\]"),
        (dict(data=np.full((784, 200), -0.1)), r"outside \[0, 1\]"),
        (dict(testdata=np.full((784, 40), np.nan)), r"outside \[0, 1\]"),
        (dict(target=np.zeros((5, 200))), "not one-hot"),
        (dict(target=np.eye(5)), "shape"),
        (dict(targetchar=np.zeros((1, 7))), "shape"),
        (dict(data=np.array(["text"])), "shape"),
        (dict(target=np.eye(4)[np.arange(200) % 4].T), "different numbers"),
    ],
)
def test_bad_mat(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        data.load(save_mat(tmp_path / "bad.mat", **changes))


def test_damaged_and_missing_files(tmp_path):
    whole = tmp_path / "whole.mat"
    save_mat(whole)
    (tmp_path / "cut.mat").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "noise.mat").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros((5, 784)))
    np.save(tmp_path / "bytes.npy", np.full((5, 28, 28), 255, np.uint8))
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "no image")
    for name in "cut.mat noise.mat empty.npy text.txt empty objects.npy flat.npy bytes.npy none.zip missing".split():
        with pytest.raises(UserError) as error:
            data.load(str(tmp_path / name))
        assert name in str(error.value)


def make_release(write, num_hands=20):
    """write(name, png bytes): two alphabets of 105 x 105 black strokes on white, one in each half"""
    for half, alphabet, num_characters in [("images_background", "Aaa", 3), ("images_evaluation", "Bbb", 2)]:
        for character in range(1, num_characters + 1):
            for hand in range(num_hands):
                image = np.ones((105, 105), bool)
                image[10:30, : 30 + hand] = False  # the upper left
                png = imageio.imwrite("<bytes>", (image * 255).astype(np.uint8), extension=".png")
                write(f"{half}/{alphabet}/character{character:02}/{hand:02}.png", png)


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
    average = images._get_area_average(105, 28)
    np.testing.assert_allclose(average.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(average.sum(0), 28 / 105, rtol=1e-5)
    np.testing.assert_allclose(average[0, :5] * 3.75, [1, 1, 1, 0.75, 0], atol=1e-6)


@pytest.mark.parametrize("invert", [False, True])
def test_own_images(tmp_path, invert):
    for i in range(8):
        grey = np.full((60, 90), 250, np.uint8)
        grey[10:30, 20:70] = 5
        folder = tmp_path / "all"
        folder.mkdir(exist_ok=True)
        imageio.imwrite(folder / f"{i}.{'jpg' if i % 2 else 'png'}", 255 - grey if invert else grey)
        folder = tmp_path / "sorted" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(folder / f"{i}.png", np.stack([grey] * 3, -1))
    dataset = data.load(str(tmp_path / "all"))
    assert dataset.num_alphabets == 0 and dataset.train.alphabet is None
    # 90 wide, 15 rows of paper above: ink in rows 25-45 of 90, columns 20-70
    assert dataset.train.obs[:, 8:13, 7:21].all()
    assert not dataset.train.obs[:, :7].any() and not dataset.train.obs[:, 15:].any()
    dataset = data.load(str(tmp_path / "sorted"))
    assert dataset.num_alphabets == 2 and len(dataset.train.obs) == 6
    (tmp_path / "all" / "0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="0.png"):
        data.load(str(tmp_path / "all"))


def test_photographs_are_searched_for_characters(tmp_path):
    """Two characters on each page, under uneven light; a page that cannot be read is left out with a warning"""
    for alphabet in ["a", "b"]:
        (tmp_path / alphabet).mkdir()
        for page in range(4):
            grey = np.full((200, 300), 200.0) - np.linspace(0, 60, 300)
            grey[50:150, 60:70] -= 90
            grey[50:60, 200:260] -= 90
            grey[50:150, 225:235] -= 90
            imageio.imwrite(tmp_path / alphabet / f"{page}.png", grey.astype(np.uint8))
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    dataset = data.load(str(tmp_path), find_characters=True)
    assert len(dataset.train.obs) + len(dataset.valid.obs) + len(dataset.test.obs) == 16
    assert dataset.num_alphabets == 2 and dataset.train.obs.sum((1, 2)).min() > 20
    with pytest.raises(UserError, match="--find-characters is for a folder"):
        data.load("glyphs", find_characters=True)


def test_arrays(tmp_path):
    images = (np.random.RandomState(0).rand(12, 28, 28) < 0.2).astype(np.float32)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images)
    np.save(tmp_path / "large.npy", images.repeat(2, 1).repeat(2, 2))
    datasets = [data.load(str(tmp_path / name)) for name in ("a.npy", "a.npz", "large.npy")]
    for dataset in datasets:
        assert dataset.num_alphabets == 0
        assert (dataset.train.obs == datasets[0].train.obs).all()
    assert {image.tobytes() for image in images} >= {image.numpy().tobytes() for image in datasets[0].train.obs}
    with pytest.raises(UserError, match="has only"):
        data.load(str(tmp_path / "a.npy"), small_dataset=True)
    solid = np.pad(np.ones((12, 60, 60), np.uint8), [(0, 0), (20, 25), (20, 25)])  # averages of ones, rounded, are no more
    np.save(tmp_path / "solid.npy", solid)
    np.save(tmp_path / "rounded.npy", images * np.float32(1.000001))
    assert data.load(str(tmp_path / "solid.npy")).train.obs.mean() == pytest.approx((60 / 105) ** 2, abs=0.02)
    assert (data.load(str(tmp_path / "rounded.npy")).train.obs == datasets[0].train.obs).all()


def test_glyphs():
    start = time.perf_counter()
    dataset = data.load("glyphs")
    assert time.perf_counter() - start < 20
    assert dataset.num_alphabets == 14
    ink = dataset.train.obs.mean().item()
    assert 0.05 < ink < 0.2  # Omniglot's is 0.08
    rows = dataset.train.obs.any(2).float().sum(1)
    cols = dataset.train.obs.any(1).float().sum(1)
    extent = torch.maximum(rows, cols)  # a gap inside a character counts as nothing
    assert 12 < extent.mean() < 24
    assert (dataset.train.obs.flatten(1).sum(1) > 5).all()
    again = data.load("glyphs")
    assert data.get_fingerprint(again.train) == data.get_fingerprint(dataset.train)
    assert (dataset.train.alphabet.sum(0) >= 10).all()


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
    """An HTTP server on this machine: /whole, /cut (breaks off once, then whole), /always-cut, 404 else"""
    content = np.random.RandomState(0).bytes(300_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        requests = []

        def do_GET(self):
            self.requests.append(self.path)
            if self.path not in ("/whole", "/cut", "/always-cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            cut = self.path == "/always-cut" or self.path == "/cut" and len(self.requests) == 1
            self.wfile.write(content[:100_000] if cut else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url, server.requests = f"http://127.0.0.1:{server.server_port}", Handler.requests
    server.blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    server.content = content
    yield server
    server.shutdown()


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_download(server, tmp_path, monkeypatch, name):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = tmp_path / "new" / "chardata.mat"
    data.download(f"{server.url}/{name}", path, server.blob_id)
    assert path.read_bytes() == server.content
    assert [file.name for file in path.parent.iterdir()] == ["chardata.mat"]
    assert len(server.requests) == (1 if name == "whole" else 2)


@pytest.mark.parametrize(
    ("name", "blob_id", "num_requests", "message"),
    [
        ("always-cut", None, 3, "broke off"),
        ("missing", None, 1, "Not Found"),
        ("whole", "0" * 40, 1, "not the expected file"),
    ],
)
def test_failed_download(server, tmp_path, monkeypatch, name, blob_id, num_requests, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=message):
        data.download(f"{server.url}/{name}", tmp_path / "chardata.mat", blob_id or server.blob_id)
    assert list(tmp_path.iterdir()) == [] and len(server.requests) == num_requests


def test_local_is_downloaded_when_missing(server, tmp_path, monkeypatch):
    """Where the network is down: nothing answers at a port that was just closed."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
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
    for line in (abs(rows - cols), abs(rows - 400), abs(3 * rows - cols - 700) / 3):
        content = imageio.imwrite("<bytes>", (255 * (line >= 4)).astype(np.uint8), extension=".png")
        ink = data.read_image("thin.png", content) >= 0.5
        assert ink.any(0).all() and ink.sum() < 90  # unbroken from left to right, and still thin


def test_files_that_decoders_choke_on(tmp_path):
    """One line that names the file, whatever the decoder raises"""
    grey = np.full((30, 30), 255, np.uint8)
    grey[5:25, 14:16] = 0
    png = imageio.imwrite("<bytes>", grey, extension=".png")

    def write_folder(name, write):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        return tmp_path / name

    def write_zip(path):
        with zipfile.ZipFile(path / "a.zip", "w") as archive:
            archive.writestr("a.png", png)
        content = (path / "a.zip").read_bytes()
        (path / "a.zip").write_bytes(content.replace(png[20:60], bytes(40)))

    scipy.io.savemat(tmp_path / "sparse.mat", {**make_mat(20, 6), "data": scipy.sparse.eye(784, 20)})
    np.savez(tmp_path / "text.npz", images=np.array("no array of numbers"))
    cases = {
        tmp_path / "sparse.mat": "not a plain matrix",
        tmp_path / "text.npz": "expected numbers",
        write_folder("broken", write_zip) / "a.zip": "a.zip: a.png is damaged",
        write_folder("pipe", lambda folder: os.mkfifo(folder / "a.png")): "a pipe or a device",
        write_folder("wide", lambda folder: imageio.imwrite(folder / "a.tif", grey.astype(np.float32))): "holds no images",
    }
    (tmp_path / "wide" / "a.tif").rename(tmp_path / "wide" / "a.png")
    cases[tmp_path / "wide"] = "pixels of type float32"
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as error:
            data.load(str(path))
        assert len(str(error.value).splitlines()) == 1 and str(tmp_path) in str(error.value) or "a.png" in str(error.value)
    with pytest.raises(UserError, match="there is no such user"):
        data.load("~nosuchuser/x")


def test_an_animated_image_is_its_first_picture(capsys):
    grey = np.full((30, 30), 255, np.uint8)
    grey[5:25, 14:16] = 0
    frames = [PIL.Image.fromarray(frame) for frame in (grey, np.full_like(grey, 255))]
    frames[0].save(file := io.BytesIO(), "PNG", save_all=True, append_images=frames[1:])
    ink = data.read_image("film.png", file.getvalue())
    assert np.array_equal(ink, data.read_image("still.png", imageio.imwrite("<bytes>", grey, extension=".png")))
    assert capsys.readouterr().err == "warning: film.png holds 2 pictures; the first is read\n"


def test_images_are_decoded_as_one_sees_them(capsys):
    grey = np.full((60, 40), 255, np.uint8)
    grey[5:55, 5:12] = grey[5:12, 5:35] = 0
    upright, picture = 1 - grey / 255, PIL.Image.fromarray(grey)
    turned = [np.rot90(upright, k) for k in (2, 3, 1)]
    for orientation, expected in zip([1, 3, 6, 8], [upright, *turned], strict=True):  # as cameras note it
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
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


def test_hidden_files():
    hidden = [".a.png", "x/._a.png", "__MACOSX/x/a.png", ".git/a.png"]
    assert all(map(data.is_hidden, hidden)) and not any(map(data.is_hidden, ["a.png", "./x/a.png", "../x/a.b.png"]))
