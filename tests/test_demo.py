"""The page to draw on, in a real browser"""

import base64
import io
import re
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import find_chromium

import data
import demo
import models
from runs import checkpoints


@pytest.fixture(scope="module")
def browser():
    gradio = pytest.importorskip("gradio", "6", reason="no gradio: pip install 'gradio>=6'")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no chromium to open the page with")
    model, _ = models.from_checkpoint(checkpoints.load(checkpoints.find(demo.MODEL)))
    page = demo.build(demo.Reader(model, data.load("glyphs", small_dataset=True).train))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=None)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def visit():
            visitor = browser.new_page(viewport=dict(width=1100, height=900))
            visitor.set_default_timeout(30_000)
            visitor.goto(url)
            visitor.wait_for_selector("canvas")
            return visitor

        yield visit
        browser.close()
    page.close()
    gradio.close_all()


def draw(visitor, *lines, pause=0):
    """Draws lines with the mouse: lists of points (x, y), fractions of the page; pauses after each, in milliseconds"""
    box = visitor.query_selector("canvas").bounding_box()
    for line in lines:
        x, y = (np.array(line).T * demo.PAGE + [[box["x"]], [box["y"]]]).round()
        visitor.mouse.move(x[0], y[0])
        visitor.mouse.down()
        for point in zip(x[1:], y[1:], strict=True):
            visitor.mouse.move(*point)
        visitor.mouse.up()
        visitor.wait_for_timeout(pause)


def get_ink(visitor):
    url = visitor.evaluate("document.querySelector('canvas').toDataURL()")
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))[..., 3] > 127


def get_strokes(visitor):
    """Points of the strokes in the answer, as pixels of the page (x, y): a list of [n, 2]"""
    script = """[...document.querySelectorAll('svg.strokes path')].map(p => [...Array(20).keys()].map(i => {
        const at = p.getPointAtLength(i / 19 * p.getTotalLength()); return [at.x, at.y]; }))"""
    return [np.array(points) / 28 * demo.PAGE for points in visitor.evaluate(script)]


def test_strokes_lie_on_the_ink_that_two_visitors_draw(browser):
    visitors = browser(), browser()
    lines = [[(0.2, 0.3), (0.8, 0.3)], [(0.5, 0.3), (0.5, 0.8)]], [[(0.3, 0.7), (0.5, 0.2), (0.7, 0.7)]]
    for visitor, some in zip(visitors, lines, strict=True):
        draw(visitor, *some, pause=1.5 * demo.PAUSE)  # each is sent, and the first is still being read when the second comes
    for visitor in visitors:
        where = np.argwhere(get_ink(visitor))[:, ::-1]
        for _ in range(100):  # until the answer to the last stroke is there
            visitor.wait_for_timeout(200)
            distance = np.linalg.norm(np.concatenate([[[0, 0]], *get_strokes(visitor)])[1:, None] - where, axis=2)
            if distance.min(0, initial=np.inf).max() < 2 * demo.BRUSH:
                break
        assert distance.min(0).max() < 2 * demo.BRUSH and distance.min(1).max() < demo.BRUSH
        text = visitor.inner_text("body")
        assert re.search(r"\d+ strokes; log p\(x \| strokes\) -\d+ nats", text) and "nan" not in text
        assert len(visitor.query_selector_all("img")) >= demo.NUM_EXAMPLES + demo.NUM_ALIKE + 1
    visitor.click("text=Clean page")
    visitor.wait_for_selector("text=There is no character on this page.")
    assert not get_ink(visitor).any() and not get_strokes(visitor)
    box = visitor.query_selector("canvas").bounding_box()
    visitor.mouse.move(box["x"] + demo.PAGE / 2, box["y"] + demo.PAGE / 2)
    visitor.mouse.down()
    visitor.evaluate("""for (const kind of ['down', 'move', 'up']) document.querySelector('canvas').dispatchEvent(
        new PointerEvent('pointer' + kind, {pointerId: 77, clientX: 9, clientY: 9}))""")  # a second finger draws nothing
    visitor.mouse.up()
    visitor.mouse.click(box["x"] + 9, box["y"] + 9, button="right")
    assert 0.5 < get_ink(visitor).sum() / (np.pi * demo.BRUSH**2 / 4) < 1.5
    visitor.wait_for_selector("svg.strokes path", state="attached")
    rng = np.random.RandomState(0)
    draw(visitor, *rng.uniform(0.05, 0.95, (100, 2, 2)))
    visitor.wait_for_function("document.querySelectorAll('svg.strokes path').length > 50", timeout=60_000)
    assert get_ink(visitor).mean() > 0.3
    visitor.click("text=Clean page")  # nothing but the last page is waiting to be read
    visitor.wait_for_selector("text=There is no character on this page.", timeout=15_000)


def test_a_known_character_and_a_photograph(browser, tmp_path):
    visitor = browser()
    draw(visitor, [(0.2, 0.3), (0.8, 0.3)])  # which is neither kept nor read
    visitor.click("text=A known character")
    visitor.wait_for_selector("svg.strokes path", state="attached")
    assert not get_ink(visitor).any()
    draw(visitor, [(0.2, 0.3), (0.8, 0.3)])
    page = PIL.Image.new("L", (400, 300), 200)
    page.paste(30, (60, 100, 160, 108)), page.paste(30, (250, 60, 258, 200))
    page.save(tmp_path / "page.png")
    visitor.set_input_files("input[type=file]", tmp_path / "page.png")
    visitor.wait_for_function("document.querySelectorAll('svg.strokes').length == 2")
    assert not get_ink(visitor).any()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    visitor.set_input_files("input[type=file]", tmp_path / "broken.png")
    visitor.wait_for_selector("text=broken.png is damaged or not an image")
    visitor.click("text=A known character")
    visitor.wait_for_timeout(100)
    visitor.click("text=Clean page")  # the answer to it is shorter, and must not be overtaken
    visitor.wait_for_selector("text=There is no character on this page.")
    visitor.wait_for_timeout(1000)
    assert not get_strokes(visitor)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(demo.UserError, match="pip install 'gradio>=6'"):
        demo.main([])
