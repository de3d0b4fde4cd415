"""Draws the letters of `--data-location glyphs` into glyphs.npz: those of DejaVu Sans, which ships with matplotlib.

    python tests/draw_glyphs.py

The file in the repository is from matplotlib 3.11.2; other versions draw a few hundred of the images a little differently,
so that models trained on them would not compare.
"""

import pathlib
import unicodedata

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import get_font
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

PATH = pathlib.Path(__file__).resolve().parents[1] / "glyphs.npz"
NUM_HANDS = 20
MAX_NUM_CHARACTERS = 40  # per alphabet

# First and last code point of a stretch of letters
ALPHABETS = {
    "Latin": (0x0041, 0x007A), "Greek": (0x0391, 0x03C9), "Cyrillic": (0x0410, 0x044F),
    "Armenian": (0x0531, 0x0586), "Georgian": (0x10D0, 0x10FA), "Hebrew": (0x05D0, 0x05EA),
    "Arabic": (0x0621, 0x064A), "Lao": (0x0E81, 0x0EAE), "Tifinagh": (0x2D30, 0x2D65),
    "N'Ko": (0x07CA, 0x07EA), "Lisu": (0xA4D0, 0xA4F7), "Ogham": (0x1681, 0x169A),
    "Old Italic": (0x10300, 0x1031E), "Canadian syllabics": (0x1401, 0x1676),
}  # fmt: skip


def draw_glyphs():
    """Draws every letter with every hand. Returns: obs [N, 28, 28], bool; the number of characters of each alphabet"""
    random_state = np.random.RandomState(123)
    renderer = RendererAgg(28, 28, 72)
    context = renderer.new_gc()
    context.set_linewidth(0)
    context.set_antialiased(True)
    covered = get_font(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf").get_charmap()
    obs, sizes = [], []
    for first, last in ALPHABETS.values():
        letters = [c for c in range(first, last + 1) if c in covered and unicodedata.category(chr(c))[0] == "L"]
        chosen = np.linspace(0, len(letters) - 1, min(len(letters), MAX_NUM_CHARACTERS)).round().astype(int)
        sizes.append(len(chosen))
        for i in chosen:
            outline = TextPath((0, 0), chr(letters[i]), size=1, prop={"family": "DejaVu Sans"})
            box = outline.get_extents()
            obs += [draw_glyph(outline, box, renderer, context, random_state) for _ in range(NUM_HANDS)]
    return np.stack(obs), sizes


def draw_glyph(outline, box, renderer, context, random_state):
    """An outline, slightly rotated, sheared, stretched and shifted, as a bool image."""
    size = 19 / max(box.width, box.height) * random_state.uniform(0.85, 1.1)
    stretch = random_state.uniform(0.85, 1.15)
    jitter = (
        Affine2D()
        .translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
        .scale(size * stretch, size / stretch)
        .skew(random_state.normal(0, 0.1), random_state.normal(0, 0.05))
        .rotate(random_state.normal(0, 0.1))
        .translate(*(renderer.width / 2 + random_state.normal(0, 0.8, 2)))
    )
    renderer.clear()
    renderer.draw_path(context, outline, jitter, (0, 0, 0))
    return np.asarray(renderer.buffer_rgba())[..., 3] >= 128


if __name__ == "__main__":
    images, num_characters = draw_glyphs()
    np.savez_compressed(PATH, obs=np.packbits(images.reshape(len(images), -1), 1), num_characters=np.array(num_characters))
    print(f"{len(images)} images: {PATH}")
