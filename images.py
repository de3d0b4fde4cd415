"""Characters from image files, and built-in letters.

`read_image` scales a whole image down by averaging. `find_characters` is for photographs and scans: it finds the sheet, and
the ink on it under uneven light, separates characters, and gives each the size and stroke width of Omniglot's. `draw_glyphs`
returns letters of a font, each drawn by twenty "hands".
"""

import contextlib
import functools
import importlib
import math
import pathlib
import warnings

import imageio.v3 as imageio
import numpy as np
import PIL.Image
import scipy.ndimage
import scipy.spatial

from util import UserError, warn

SIDE = 28
CHARACTER_SIDE = 19  # pixels, of a character's longer side in Omniglot (its median and a little)
STROKE_RADIUS = 3  # on a grid four times as fine: strokes of Omniglot are 1.6 pixels wide
MIN_CONTRAST = 0.1  # between ink and the paper around it, as a fraction of the range from black to white
SHEET_SIDE = 240  # pixels, of the photograph on which a sheet is found
MAX_WORKING_SIDE = 800  # pixels; larger photographs are scaled down first
COLOURS = ["P", "PA", "CMYK", "YCbCr", "LAB", "HSV"]  # Pillow's names of modes to be converted to red, green and blue
ONLY_RECOGNISED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow cannot read without other programs
HEIC_ADVICE = "convert it to JPEG or PNG, or pip install pillow-heif, which is then used"

ALPHABETS = [  # those of glyphs.npz, in its order
    "Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Lao", "Tifinagh", "N'Ko", "Lisu", "Ogham",
    "Old Italic", "Canadian syllabics",
]  # fmt: skip

# ------------------------------------------------------------------ decoding


@functools.cache
def get_suffixes():
    """The suffixes of all files that Pillow reads, ".png" and so on; HEIC among them where pillow-heif is installed"""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    suffixes = PIL.Image.registered_extensions().items()
    return {suffix for suffix, kind in suffixes if kind in PIL.Image.OPEN and kind not in ONLY_RECOGNISED}


def decode(name, content):
    """Decodes an image to grey values [rows, columns] in [0, 1], black 0, upright, as its camera held it; transparent pixels
    become white. Of several pictures in a file, such as an animation, the first is read, with a warning.

    Raises: UserError if it cannot be decoded, or has an unexpected shape or type
    """
    image = _read_pixels(name, content)
    if image.dtype == np.int32 and image.size and 0 <= image.min() and image.max() < 2**16:  # how older Pillows read 16 bits
        image = image.astype(np.uint16)
    right_shape = 0 not in image.shape and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] <= 4))
    if image.dtype not in (bool, np.uint8, np.uint16) or not right_shape:
        raise UserError(
            f"{name} has pixels of type {image.dtype} in the shape {list(image.shape)}; save it as 8-bit grey or RGB"
        )
    image = image.astype(np.float32) / (1 if image.dtype == bool else np.iinfo(image.dtype).max)
    if image.ndim == 2:
        return image
    alpha = image[..., -1] if image.shape[-1] in (2, 4) else np.ones(image.shape[:2], np.float32)
    grey = image[..., 0] if image.shape[-1] <= 2 else image[..., :3] @ np.float32([0.299, 0.587, 0.114])
    return grey * alpha + 1 - alpha


def _read_pixels(name, content):
    """The first picture in a file: [rows, columns(, channels)]"""
    get_suffixes()  # prepares Pillow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about large images
            with imageio.imopen(content, "r", plugin="pillow") as file:
                num_frames = file.properties(index=...).n_images
                mode = "RGBA" if file.metadata(index=0)["mode"] in COLOURS else None
                image = file.read(index=0, mode=mode, rotate=True)
    except Exception as error:  # decoders raise anything
        if isinstance(error.__cause__ or error, PIL.Image.DecompressionBombError):
            most = 2 * PIL.Image.MAX_IMAGE_PIXELS // 10**6
            raise UserError(f"{name} is too large: it has more than {most} million pixels; scale it down") from None
        if is_heic(content):
            raise UserError(f"{name} is a HEIC picture; {HEIC_ADVICE}") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise UserError(f"{name} is damaged or not an image ({reason})") from None
    if num_frames > 1:
        warn(f"{name} holds {num_frames} pictures; the first is read")
    return image


def is_heic(content):
    """Whether a file is in HEIC, the format of most telephones"""
    return content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def read_official(name, content):
    """Reads an image of Omniglot's official release: ink [28, 28] in [0, 1]"""
    return fit(1 - decode(name, content))


def read_image(name, content):
    """Reads an image file of any size, dark on light or light on dark, on paper of whatever brightness: ink [28, 28] in
    [0, 1]. Very thin strokes are darkened (see `shrink`), so that they survive when ink becomes binary.

    Raises: UserError if it cannot be decoded
    """
    return shrink(get_ink(decode(name, content)))


def shrink(ink):
    """Scales ink [rows, columns] in [0, 1] to [28, 28], and darkens it if its strokes become much thinner than a pixel"""
    ink = fit(ink)
    darkest = np.quantile(ink[ink > 0.02], 0.9) if (ink > 0.02).any() else 1
    return (ink * 1.5 / darkest).clip(0, 1) if darkest < 0.6 else ink


def get_ink(grey):
    """Ink on paper [rows, columns] in [0, 1]: 0 where the image is as bright as its paper, 1 where it differs most from it.
    Paper is what most of the image's edge shows; blank paper has no ink."""
    paper = _get_paper(grey)
    if ((grey - paper) ** 3).mean() > 0:  # what stands out is lighter
        grey, paper = 1 - grey, 1 - paper
    darkness = 1 - grey / np.maximum(paper, 1 / 255)  # a share of the light that falls there
    contrast = darkness.max()
    noise = max(np.quantile(-darkness, 0.999), 0)  # what is lighter than paper is noise; so is as much darkness
    if contrast < max(MIN_CONTRAST, 1.6 * noise):
        return np.zeros_like(darkness)
    darkness = np.where(darkness > min(noise, contrast / 3), darkness, 0)
    ink = np.quantile(darkness[darkness > contrast / 2], 0.9)
    return (darkness / ink).clip(0, 1) if ink < 0.9 else darkness


def _get_paper(grey):
    """The brightness of the paper, a number, or under uneven light [rows, columns]: fitted to the image's edge"""
    row, col = (np.linspace(-1, 1, n, dtype=np.float32) for n in grey.shape)
    edge = _get_edge(grey)
    paper = np.median(edge)
    distance = np.abs(edge - paper)
    if np.mean(distance < 1.5 / 255) > 0.5:
        return paper
    rows, cols = (_get_edge(np.broadcast_to(x, grey.shape)) for x in (row[:, None], col))
    terms = np.stack([np.ones_like(rows), rows, cols, rows * cols, rows**2, cols**2], 1)
    for _ in range(5):  # leaves out strokes that reach the edge
        near = distance <= 3 * np.median(distance)
        weights = np.linalg.lstsq(terms[near], edge[near], rcond=None)[0]
        distance = np.abs(edge - terms @ weights)
    constant, by_row, by_col, by_both, by_row2, by_col2 = weights.astype(np.float32)
    row = row[:, None]
    paper = constant + by_row * row + by_col * col + by_both * row * col + by_row2 * row**2 + by_col2 * col**2
    return paper.clip(edge.min(), edge.max())


def _get_edge(grey):
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def fit(image, side=SIDE):
    """Scales an image [rows, columns] in [0, 1] to [side, side] by area averaging; one that is not square is first
    centred on a square of paper."""
    square = make_square(image)
    if len(square) == side:
        return square
    average = _get_area_average(len(square), side)
    return (average @ square @ average.T).clip(0, 1)  # rounding may leave this range


def make_square(image):
    """Centres an image [rows, columns] on a square of paper, 0"""
    rows, cols = image.shape
    longer = max(rows, cols)
    top, left = (longer - rows) // 2, (longer - cols) // 2
    return np.pad(image, [(top, longer - rows - top), (left, longer - cols - left)])


def _get_area_average(num_in, num_out):
    """[num_out, num_in]: the share of each old cell in each new one"""
    edges = np.arange(num_out + 1) * num_in / num_out
    cells = np.arange(num_in)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (overlap.clip(0) * num_out / num_in).astype(np.float32)


# ------------------------------------------------------------------ characters on a page


def find_characters(name, content, side=SIDE):
    """Finds the characters on a photograph or scan, in reading order.

    Returns: a list of bool arrays [side, side], ink True; empty, with a warning, for a blank page
    Raises: UserError if the file cannot be decoded
    """
    ink = find_ink(find_sheet(decode(name, content)))
    characters, hopeless = [], 0
    for part in split_page(ink):
        character = normalise(part, side)
        if 4 / SIDE**2 <= character.mean() <= 0.5 and not _is_patch(part, ink):
            characters.append(character)
        else:
            hopeless += 1
    if not ink.any():
        warn(f"{name} is blank; skipped")
    elif hopeless:
        warn(f"{name}: {hopeless} parts have no legible strokes (a table, a shadow?); skipped")
    return characters


def _is_patch(part, page):
    """Whether a part of the ink on a page, [rows, columns] each, is a blank sheet, or what a sheet lies on, rather than strokes"""
    return part.size > 0.05 * page.size and part.mean() > 0.8 and max(part.shape) < 3 * min(part.shape)


def find_sheet(grey):
    """Cuts out the sheet of paper on a photograph that also shows what it lies on: grey values [rows, columns] -> the same,
    or the part around the sheet, with paper instead of the table in its corners. A sheet is convex, clearly brighter or
    darker than its surroundings all around, mostly empty, and reaches at most one corner of the photograph."""
    from skimage.transform import resize

    if min(grey.shape) < SHEET_SIDE / 2:  # not a photograph
        return grey
    shape = [max(round(n * min(SHEET_SIDE / max(grey.shape), 1)), 1) for n in grey.shape]
    small = resize(grey, shape, order=1, anti_aliasing=True)
    best, chosen = 0, None
    for light in (small, 1 - small):
        blank = scipy.ndimage.grey_closing(np.pad(light, 9, "edge"), (9, 9))[9:-9, 9:-9]  # erases what is written
        for threshold in np.linspace(blank.min(), blank.max(), 18)[1:-1]:
            corners, quality = _find_convex(blank > threshold)
            step = 0 if corners is None else _get_step(blank, corners)
            if step > MIN_CONTRAST and quality * min(step, 0.3) > best:
                best, chosen = quality * min(step, 0.3), (corners, blank if light is small else 1 - blank)
    if chosen is None:
        return grey
    sheet = _cut_out(grey, *chosen)
    # A small blank one may be a character: a bold stroke, or the inside of a box.
    return sheet if sheet.size > 0.3 * grey.size or find_ink(sheet).any() else grey


def _find_convex(region):
    """Returns, for the largest piece of a region, if it may be a sheet: its corners [K, 2], in order, and its share of the
    image, reduced where it is not quite convex; else None, 0"""
    pieces, _ = scipy.ndimage.label(region)
    sizes = np.bincount(pieces.flat)
    sizes[0] = 0
    piece = pieces == sizes.argmax()
    if (
        sizes.max() < 0.8 * sizes.sum()
        or not 0.05 < piece.mean() < 0.97
        or piece[:: len(piece) - 1, :: piece.shape[1] - 1].sum() > 1
    ):
        return None, 0
    points = np.argwhere(piece & ~scipy.ndimage.binary_erosion(piece))
    hull = scipy.spatial.ConvexHull(points)
    convexity = piece.sum() / (hull.volume + hull.area / 2 + 1)  # the hull goes through the pixels' centres
    return (points[hull.vertices].astype(float), piece.mean() * convexity**20) if convexity > 0.93 else (None, 0)


def _get_step(blank, corners):
    """By what share of its brightness a sheet is brighter than its surroundings, where they differ least"""
    start = corners @ [1, 1j]  # complex numbers, row + i * column
    side = np.roll(start, -1) - start
    number = np.repeat(np.arange(len(side)), np.abs(side).round().astype(int))
    border = start[number] + side[number] * np.random.RandomState(0).rand(len(number))
    away = -1j * side[number] / np.abs(side[number])  # ConvexHull goes round anticlockwise
    outside = border + 4 * away
    seen = (np.minimum(outside.real, outside.imag) >= 0) & (outside.real < len(blank)) & (outside.imag < blank.shape[1])
    if seen.mean() < 0.2:
        return 0
    inside, outside = (
        scipy.ndimage.map_coordinates(blank, [z.real, z.imag], order=1, mode="nearest")
        for z in (border[seen] - 3 * away[seen], outside[seen])
    )
    return np.quantile((inside - outside) / np.maximum(inside, 0.05), 0.1)


def _cut_out(grey, corners, blank):
    """The part of an image around a sheet, whose corners [K, 2] are those on a smaller, blank one"""
    from skimage.draw import polygon2mask
    from skimage.transform import resize

    mask = scipy.ndimage.binary_erosion(polygon2mask(blank.shape, corners), iterations=3)
    if not mask.any():
        return grey
    nearest = scipy.ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    paper = resize(blank[tuple(nearest)], grey.shape, order=1)
    mask = resize(mask.astype(np.float32), grey.shape, order=1) > 0.5
    (box,) = scipy.ndimage.find_objects(mask.astype(int))
    return np.where(mask, grey, paper)[box].astype(np.float32)


def find_ink(grey):
    """Finds the ink on a page [rows, columns]: bool. Ink is darker than the paper around it, or lighter, if what stands
    out on the page is lighter. The paper's brightness is estimated by filling in dark things narrower than a third
    of the page."""
    from skimage.filters import threshold_otsu
    from skimage.transform import resize

    if max(grey.shape) > MAX_WORKING_SIDE:
        scale = MAX_WORKING_SIDE / max(grey.shape)
        grey = resize(grey, [max(round(n * scale), 1) for n in grey.shape], order=1, anti_aliasing=True)
    detail = grey - scipy.ndimage.gaussian_filter(grey, max(grey.shape) / 8, mode="nearest")
    light = grey if ((detail - detail.mean()) ** 3).mean() <= 0 else 1 - grey
    coarse_shape = [max(round(n * min(96 / max(light.shape), 1)), 1) for n in light.shape]
    coarse = resize(light, coarse_shape, order=1, anti_aliasing=True)
    window = max(max(coarse_shape) // 3, 3)
    # Extrapolate the change in light beyond the edge.
    pad = [min(window, n - 1) for n in coarse.shape]
    coarse = np.pad(coarse, [(n, n) for n in pad], mode="reflect", reflect_type="odd").clip(0, 1)
    paper = scipy.ndimage.gaussian_filter(scipy.ndimage.grey_closing(coarse, (window, window)), window / 8)
    paper = paper[tuple(slice(n, m - n) for n, m in zip(pad, paper.shape, strict=True))]
    darkness = resize(paper, light.shape, order=1) - light
    strongest = np.sort(darkness, axis=None)[-max(min(darkness.size // 20, 30), 1)]
    if strongest < MIN_CONTRAST:
        return np.zeros(light.shape, bool)
    # Most of a page is paper: the threshold separates what is clearly darker from the rest.
    threshold = threshold_otsu(darkness.clip(0, strongest))
    return darkness > max(threshold, strongest / 3, MIN_CONTRAST / 2)


def split_page(ink):
    """Separates ink [rows, columns] into characters: pieces that are close, relative to their size, belong together.

    Returns: a list of bool arrays, each cropped to its ink, in reading order, without specks
    """
    pieces, num_pieces = scipy.ndimage.label(ink, np.ones((3, 3)))
    if num_pieces == 0:
        return []
    boxes = scipy.ndimage.find_objects(pieces)
    sides = np.array([max(box[0].stop - box[0].start, box[1].stop - box[1].start) for box in boxes])
    edges = find_edges(pieces, boxes, sides)
    longest = sides[~edges].max()
    kept = np.flatnonzero((sides >= max(0.06 * longest, min(3, longest))) & ~edges) + 1
    ink, sides = np.isin(pieces, kept), sides[kept - 1]
    reach = 0.12 * np.median(sides[sides >= sides.max() / 3])  # half of the largest gap within a character
    groups, num_groups = scipy.ndimage.label(scipy.ndimage.distance_transform_edt(~ink) <= reach, np.ones((3, 3)))
    groups = join_enclosed(groups * ink)
    boxes = [box for box in scipy.ndimage.find_objects(groups) if box is not None]
    numbers = np.unique(groups)[1:]
    height = np.median([box[0].stop - box[0].start for box in boxes])
    parts = []
    for number, box in zip(numbers, boxes, strict=True):
        row, col = (box[0].start + box[0].stop) / 2, box[1].start
        parts.append((row, col, groups[box] == number))
    # Lines of text: a new one begins where a character's middle is lower than the previous one's by its height.
    parts.sort(key=lambda part: part[0])
    line, lines, last = 0, [], None
    for row, col, part in parts:
        line += last is not None and row - last > 0.7 * height
        last = row
        lines.append((line, col, part))
    lines.sort(key=lambda part: part[:2])
    return [part for _, _, part in lines]


def find_edges(pieces, boxes, sides):
    """Finds long straight marks at the border of the photograph, the edges of the paper, say, if it was photographed at an
    angle, and their crumbs: pieces, numbers [rows, columns], with their boxes and longer sides -> bool, one per piece"""
    longest_page_side = max(pieces.shape)
    edges = np.zeros(len(boxes), bool)
    for i, box in enumerate(boxes):
        gaps = [gap for part, size in zip(box, pieces.shape, strict=True) for gap in (part.start, size - part.stop)]
        if sides[i] >= longest_page_side / 4 and min(gaps) <= 0.03 * longest_page_side:
            points = np.argwhere(pieces == i + 1).astype(float)
            along, across = np.sqrt(np.linalg.eigvalsh(np.cov(points.T)).clip(0)[::-1])
            depth = np.minimum(points, np.array(pieces.shape) - 1 - points).min(1).max()  # two edges meet in a corner
            edges[i] = across < 0.06 * along or depth < 0.08 * longest_page_side
    # Strokes of a closely cropped character reach the border, too, but are not much longer than its others.
    longest = sides[~edges].max(initial=0)
    edges &= sides > 1.5 * longest
    if edges.all():
        edges[:] = False
    if edges.any():
        distance = scipy.ndimage.distance_transform_edt(~np.isin(pieces, np.flatnonzero(edges) + 1))
        nearest = scipy.ndimage.minimum(distance, pieces, np.arange(1, len(boxes) + 1))
        edges |= (nearest <= 0.03 * longest_page_side) & (sides <= 0.3 * longest)
    return edges


def join_enclosed(groups):
    """What lies within a group's box belongs to it: numbers of groups [rows, columns] -> the same, with fewer groups"""
    boxes = dict(enumerate(scipy.ndimage.find_objects(groups), start=1))
    boxes = {number: box for number, box in boxes.items() if box is not None}
    for number, inner in sorted(boxes.items(), key=lambda item: _get_area(item[1])):
        outer = [
            other
            for other, box in boxes.items()
            if other != number and all(b.start <= i.start and i.stop <= b.stop for b, i in zip(box, inner, strict=True))
        ]
        if outer:
            groups = np.where(groups == number, min(outer, key=lambda other: _get_area(boxes[other])), groups)
            del boxes[number]
    return groups


def _get_area(box):
    return math.prod(part.stop - part.start for part in box)


def normalise(part, side=SIDE):
    """Centres a character's cropped ink [rows, columns] on side x side pixels, with Omniglot's size and stroke width: bool"""
    from skimage.morphology import dilation, disk, skeletonize
    from skimage.transform import resize

    fine = 4
    scale = fine * CHARACTER_SIDE / max(part.shape)
    length = max(skeletonize(part).sum(), 1)
    missing = (3 / scale - part.sum() / length) / 2  # strokes must survive the scaling
    pad = max(round(missing), 0) + 1
    part = np.pad(part, pad)
    if missing >= 1:
        part = dilation(part, disk(round(missing)))
    shape = [max(round(n * scale), 1) for n in part.shape]
    smooth = resize(part.astype(np.float32), shape, order=1, anti_aliasing=scale < 1) > 0.5
    points = np.argwhere(skeletonize(np.pad(smooth, 1))).astype(float)  # row, column
    if len(points) == 0:
        return np.zeros((side, side), bool)
    # A skeleton is shorter than its strokes by their thickness, so it is scaled up again, within limits.
    low, high = points.min(0), points.max(0)
    growth = np.clip((fine * CHARACTER_SIDE - 2 * STROKE_RADIUS) / max((high - low).max(), 1), 0.5, 1.7)
    points = (points - (low + high) / 2) * growth + (fine * SIDE - 1) / 2
    canvas = np.zeros((fine * SIDE, fine * SIDE), bool)
    canvas[tuple(points.round().astype(int).clip(0, fine * SIDE - 1).T)] = True
    return fit(dilation(canvas, disk(STROKE_RADIUS)).astype(np.float32), side) >= 0.5


# ------------------------------------------------------------------ built-in characters


def draw_glyphs():
    """Letters as drawn by every hand, in the size and stroke width of handwriting: from glyphs.npz, since what matplotlib and
    FreeType draw depends on their versions.

    Returns: obs [N, 28, 28], bool, ink True, upright; alphabet ids [N]; characters
        [N], numbered from 1 within their alphabet
    """
    with np.load(pathlib.Path(__file__).resolve().parent / "glyphs.npz") as stored:
        obs = np.unpackbits(stored["obs"], axis=1).astype(bool).reshape(-1, SIDE, SIDE)
        num_characters = stored["num_characters"]  # [L]
    num_hands = len(obs) // num_characters.sum()
    characters = np.concatenate([np.arange(1, num + 1) for num in num_characters]).repeat(num_hands)
    return obs, np.arange(len(num_characters)).repeat(num_characters * num_hands), characters
