"""Characters from image files, and built-in letters.

`read_image` scales a whole image down by averaging. `find_characters` is for photographs and scans: it finds the sheet and
the ink on it, even under uneven light, separates characters, and gives each the size and stroke width of Omniglot's.
`draw_glyphs` returns letters of a font, each drawn by twenty "hands".
"""

import contextlib
import functools
import importlib
import io
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import scipy.ndimage
import scipy.spatial
import skimage

from util import UserError, count, is_out_of_memory, warn

SIDE = 28
CHARACTER_SIDE = round(19 / 28 * SIDE)  # pixels, a character's longer side (a little more than Omniglot's median)
STROKE_RADIUS = round(3 / 28 * SIDE)  # on a grid four times as fine: strokes of Omniglot are 1.6 pixels of 28 wide
MIN_CONTRAST = 0.1  # between ink and the paper around it, as a fraction of the range from black to white
ACCENT = 0.5  # the farthest that a dot or an accent is from the rest of its character, as a share of the rest's size
MOST_TILT = 0.14  # of lines of text, a tangent: eight degrees
LINE_COST = 0.5  # of one more line, in squared distances of characters from the middle of their line, relative to their height
TILT_COST = 0.7  # of the largest tilt, in the same unit
MOST_DOTS = 3  # dots as small as specks, for each larger piece of ink; if there are more, all are specks
PALE, LEAST_IN_SHADOW = 0.7, 0.6  # of the darkest ink's darkness: the most of a shadow, the least of ink on a page with one
SHEET_SIDE = 240  # pixels, the longer side of the photograph when a sheet is sought
MAX_WORKING_SIDE = 800  # pixels; larger photographs are scaled down first
ONLY_RECOGNISED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow needs other programs to read

ALPHABETS = [  # of glyphs.npz, in order
    "Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Lao", "Tifinagh", "N'Ko", "Lisu", "Ogham",
    "Old Italic", "Canadian syllabics",
]  # fmt: skip

# ------------------------------------------------------------------ decoding


@functools.cache
def get_suffixes():
    """The suffixes of all files that Pillow reads, such as ".png"; with HEIC if pillow-heif is installed"""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    suffixes = PIL.Image.registered_extensions().items()
    return {suffix for suffix, kind in suffixes if kind in PIL.Image.OPEN and kind not in ONLY_RECOGNISED}


def decode(name, content):
    """Decodes an image to grey values [rows, columns] in [0, 1], black 0, rotated upright; transparent pixels become white.
    From a file with several pictures, such as an animation, the first is read, with a warning.

    Raises: UserError if it cannot be decoded
    """
    get_suffixes()  # prepares Pillow for HEIC
    try:
        with PIL.Image.open(io.BytesIO(content)) as file:
            num_pictures = getattr(file, "n_frames", 1)
            file.getexif()
            file.info.pop("exif", None)  # or it would be written anew, which fails if one of its tags is odd
            image = PIL.ImageOps.exif_transpose(file)
            deep = image.mode.startswith("I")  # 16 bits, or 12 or 8 of them
            pixels = np.asarray(image if deep else image.convert("RGBA"), np.float32)
            pixels /= next((full for full in (255, 4095) if pixels.max() <= full), 65535)
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({str(error).partition(',')[0]}); scale it down") from None
    except Exception as error:  # decoders may raise anything
        if is_out_of_memory(error):
            raise UserError(f"{name} needs more memory than there is; scale it down") from None
        reason = str(error).partition("<")[0][:80].strip()  # without the name of the buffer
        advice = "HEIC needs pip install pillow-heif" if b"ftyp" in content[:12] else "repair or remove it"
        raise UserError(f"{name} is damaged or not an image ({reason}); {advice}") from None
    if image.mode == "F" or not 0 <= pixels.min() <= pixels.max() <= 1:
        raise UserError(f"{name} has pixels of Pillow's mode {image.mode}; save it as 8-bit grey or RGB")
    if num_pictures > 1:
        warn(f"{name} holds {num_pictures} pictures; the first is read")
    if deep:
        return pixels
    alpha = pixels[..., 3]
    return pixels[..., :3] @ np.float32([0.299, 0.587, 0.114]) * alpha + 1 - alpha


def read_image(name, content):
    """Reads an image file of any size, dark on light or light on dark, on paper of any brightness: ink [28, 28] in [0, 1].
    Very thin strokes are darkened (see `shrink`), so that they survive when ink becomes binary.

    Raises: UserError if it cannot be decoded
    """
    return shrink(get_ink(decode(name, content)))


def shrink(ink):
    """Scales ink [rows, columns] in [0, 1] to [28, 28]; darkens it if its strokes become much thinner than a pixel"""
    ink = fit(ink)
    darkest = np.quantile(ink[ink > min(0.02, ink.max() / 2)], 0.9) if ink.max() > 0 else 1
    return (ink * 1.5 / darkest).clip(0, 1) if darkest < 0.6 else ink


def get_ink(grey):
    """Ink on paper [rows, columns] in [0, 1]: 0 where the image is as bright as its paper, 1 where it differs most from it.
    Paper is what most of the image's edge shows; blank paper has no ink."""
    paper = _get_paper(grey)
    if ((grey - paper) ** 3).mean() > 0:  # the ink is lighter
        grey, paper = 1 - grey, 1 - paper
    darkness = np.where(paper > 0, 1 - grey / np.maximum(paper, 1 / 255), 0)  # as a share of the light falling there
    contrast = darkness.max()
    noise = max(np.quantile(-darkness, 0.999), 0)  # values lighter than paper are noise; so are values as much darker
    if contrast < max(MIN_CONTRAST, 1.6 * noise):
        return np.zeros_like(darkness)
    darkness = np.where(darkness > min(noise, contrast / 3), darkness, 0)
    ink = np.quantile(darkness[darkness > contrast / 2], 0.9)
    return (darkness / ink).clip(0, 1) if ink < 0.9 else darkness


def _get_paper(grey):
    """The brightness of the paper, fitted to the image's edge: a number or, under uneven light, [rows, columns]"""
    edge = _get_edge(grey)
    paper = np.median(edge)
    distance = np.abs(edge - paper)
    if np.mean(distance < 1.5 / 255) > 0.5:
        return paper
    row, col = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in grey.shape), indexing="ij")
    terms = np.stack([np.ones_like(row), row, col, row * col, row**2, col**2], -1)  # [rows, columns, 6]
    at_edge = _get_edge(terms)
    for _ in range(5):  # leaves out strokes that reach the edge
        near = distance <= 3 * np.median(distance)
        weights = np.linalg.lstsq(at_edge[near], edge[near], rcond=None)[0]
        distance = np.abs(edge - at_edge @ weights)
    return (terms @ weights.astype(np.float32)).clip(edge.min(), edge.max())


def _get_edge(grey):
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def fit(image, side=SIDE):
    """Scales an image [rows, columns] in [0, 1] to [side, side] by area averaging, centred on a square of paper if it is not
    square."""
    return skimage.transform.resize_local_mean(make_square(image), (side, side)).clip(0, 1)  # against rounding


def make_square(image):
    """Centres an image [rows, columns] on a square of paper, 0"""
    rows, cols = image.shape
    longer = max(rows, cols)
    top, left = (longer - rows) // 2, (longer - cols) // 2
    return np.pad(image, [(top, longer - rows - top), (left, longer - cols - left)])


# ------------------------------------------------------------------ characters on a page


def find_characters(name, content, side=SIDE):
    """Finds the characters on a photograph or scan, in reading order.

    Returns: a list of bool arrays [side, side], ink True; empty, with a warning, for a blank page
    Raises: UserError if the file cannot be decoded
    """
    ink = find_ink(find_sheet(decode(name, content)))
    parts = split_page(ink)
    characters = [normalise(part, side) for part in parts if not _is_patch(part, ink)]
    legible = [character for character in characters if 3 / SIDE**2 <= character.mean() <= 0.5]  # a dot is a little more
    if not ink.any():
        warn(f"{name} is blank; skipped")
    elif len(legible) < len(parts):
        num = len(parts) - len(legible)
        warn(f"{name}: skipped {count(num, 'part')} without legible strokes (a table, a shadow?)")
    return legible


def _is_patch(part, page):
    """Whether a part of the ink on a page, [rows, columns] each, is a blank sheet or the table, rather than strokes"""
    return part.size > 0.05 * page.size and part.mean() > 0.8 and max(part.shape) < 3 * min(part.shape)


def find_sheet(grey):
    """Cuts out the sheet of paper in a photograph that also shows the table: grey values [rows, columns] -> the same, or the
    part around the sheet, with paper instead of the table in its corners. A sheet is convex, clearly brighter or darker than
    its surroundings on all sides, mostly empty, and reaches at most one corner of the photograph."""
    if min(grey.shape) < SHEET_SIDE / 2 or max(grey.shape) > 10 * min(grey.shape):  # not a photograph
        return grey
    small = _scale_down(grey, SHEET_SIDE)
    best, chosen = 0, None
    for light in (small, 1 - small):
        blank = scipy.ndimage.grey_closing(np.pad(light, 9, "edge"), (9, 9))[9:-9, 9:-9]  # erases what is written
        for threshold in np.linspace(blank.min(), blank.max(), 18)[1:-1]:
            corners, quality = _find_convex(blank > threshold)
            step = 0 if corners is None else _get_step(blank, corners)
            if step > MIN_CONTRAST and quality * min(step, 0.3) > best:
                best, chosen = quality * min(step, 0.3), (corners, blank if light is small else 1 - blank)
    if chosen is None or _goes_on_beside(grey, *chosen):
        return grey
    sheet = _cut_out(grey, *chosen)
    # A small blank region may be a character: a bold stroke, or the inside of a box.
    return sheet if sheet.size > 0.3 * grey.size or find_ink(sheet).any() else grey


def _find_convex(region):
    """Returns: the corners [K, 2], in order, of a region's largest piece, and its share of the image, reduced if it is not
    quite convex; None, 0 if it cannot be a sheet"""
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
    """How much brighter a sheet is than its surroundings, as a share of its brightness, where they differ least"""
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


def _goes_on_beside(grey, corners, blank):
    """Whether there are as many strokes beside a supposed sheet as on it: then it is only a part of a page, in or beside a
    shadow. What is twice as thick as the sheet's strokes (a pen, say) is none. Arguments as for `_cut_out`"""
    sheet = skimage.draw.polygon2mask(blank.shape, corners)
    areas = [scipy.ndimage.binary_erosion(area, iterations=5, border_value=1) for area in (sheet, ~sheet)]
    light = _darken_ink(_scale_down(grey, MAX_WORKING_SIDE))
    darkness = _get_darkness(light, _fill_in_narrow(light))
    on, beside = (skimage.transform.resize(area, light.shape, order=0) for area in areas)
    if not on.any() or not beside.any():
        return False
    ink = darkness > PALE * np.quantile(darkness[on], 0.995)
    thickness, pieces = scipy.ndimage.distance_transform_edt(ink), skimage.measure.label(ink)
    thickest = scipy.ndimage.maximum(thickness, pieces, np.arange(pieces.max() + 1))  # of each piece
    strokes = ink & (thickest[pieces] <= 2 * np.quantile(thickness[on & ink], 0.95))
    return strokes[beside].mean() > 0.5 * ink[on].mean()


def _cut_out(grey, corners, blank):
    """The part of an image around a sheet, whose corners [K, 2] are given on a smaller, blank image"""
    mask = scipy.ndimage.binary_erosion(skimage.draw.polygon2mask(blank.shape, corners), iterations=3)
    if not mask.any():
        return grey
    nearest = scipy.ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    paper = skimage.transform.resize(blank[tuple(nearest)], grey.shape, order=1)
    mask = skimage.transform.resize(mask.astype(np.float32), grey.shape, order=1) > 0.5
    (box,) = scipy.ndimage.find_objects(mask.astype(int))
    return np.where(mask, grey, paper)[box].astype(np.float32)


def _scale_down(grey, side):
    """Scales grey values [rows, columns] so that the longer side has at most the given number of pixels"""
    scale = min(side / max(grey.shape), 1)
    shape = [max(round(n * scale), 1) for n in grey.shape]
    return skimage.transform.resize_local_mean(grey, shape).astype(grey.dtype)  # lines a pixel wide stay whole


def find_ink(grey):
    """Finds the ink on a page [rows, columns]: bool. Ink is darker than the paper around it, or lighter, if that is what stands
    out on the page. Shadows are not ink."""
    light = _darken_ink(_scale_down(grey, MAX_WORKING_SIDE))
    paper = _fill_in(light)
    ink = _find_dark(paper - light)
    if _is_shadow(ink, _get_darkness(light, paper)):
        ink = _find_dark(_get_darkness(light, _fill_in_narrow(light)), LEAST_IN_SHADOW)
    return ink


def _darken_ink(grey):
    """Grey values [rows, columns], inverted if what stands out is lighter than its surroundings or, however bold, than the even
    background of a picture drawn on a screen"""
    edge = _get_edge(grey)
    if np.mean(np.abs(edge - np.median(edge)) < 1.5 / 255) > 0.95:
        return grey if grey.mean() <= np.median(edge) else 1 - grey
    detail = grey - scipy.ndimage.gaussian_filter(grey, max(grey.shape) / 8, mode="nearest")
    return grey if ((detail - detail.mean()) ** 3).mean() <= 0 else 1 - grey


def _get_darkness(light, paper):
    """The share of the light falling on paper that is missing"""
    return 1 - light / np.maximum(paper, 1 / 255)


def _fill_in(light):
    """The paper's brightness on a page [rows, columns], by filling in dark things narrower than a third of it"""
    coarse = _scale_down(light, 96)
    window = max(max(coarse.shape) // 3, 3)
    # Extrapolate the change in light beyond the edge, which strokes may reach.
    pad = [min(window, n - 1) for n in coarse.shape]
    blank = np.maximum(coarse, _get_paper(coarse))
    extended = np.pad(blank, [(n, n) for n in pad], mode="reflect", reflect_type="odd").clip(0, 1)
    interior = tuple(slice(n, m - n) for n, m in zip(pad, extended.shape, strict=True))
    extended[interior] = coarse
    paper = scipy.ndimage.gaussian_filter(scipy.ndimage.grey_closing(extended, (window, window)), window / 8)[interior]
    return skimage.transform.resize(paper, light.shape, order=1)


def _fill_in_narrow(light):
    """Like `_fill_in`, but only things narrower than an eleventh of the page, so that the edges of shadows, straight or round,
    stay sharp"""
    coarse = _scale_down(light, 240)
    reach = max(max(coarse.shape) // 22, 1)
    extended = np.pad(coarse, 2 * reach, "edge")
    shapes = np.ones([2 * reach + 1] * 2), skimage.morphology.disk(reach)
    paper = np.min([scipy.ndimage.grey_closing(extended, footprint=shape) for shape in shapes], 0)
    return skimage.transform.resize(paper[2 * reach : -2 * reach, 2 * reach : -2 * reach], light.shape, order=1)


def _find_dark(darkness, least=1 / 3):
    """The pixels that are clearly darker than the paper. Args: darkness: how much darker each one is, [rows, columns]; least: share
    of the darkest ink's darkness"""
    strongest = _get_strongest(darkness)
    if strongest < MIN_CONTRAST:
        return np.zeros(darkness.shape, bool)
    # Most of a page is paper: the threshold separates clearly darker pixels from the rest.
    threshold = skimage.filters.threshold_otsu(darkness.clip(0, strongest))
    return darkness > max(threshold, least * strongest, MIN_CONTRAST / 2)


def _get_strongest(darkness):
    """The darkness of the darkest ink, but for a few pixels"""
    return np.sort(darkness, axis=None)[-max(min(darkness.size // 200, 30), 1)]


def _is_shadow(ink, darkness):
    """Whether what counts as ink includes a shadow: a wide area that is much paler than the darkest ink"""
    wide = scipy.ndimage.minimum_filter(ink, max(max(ink.shape) // 20, 8), mode="nearest")
    return wide.any() and np.median(darkness[wide]) < PALE * _get_strongest(darkness)


def split_page(ink):
    """Separates ink [rows, columns] into characters: pieces that are close relative to their size belong together.

    Returns: a list of bool arrays, each cropped to its ink, in reading order, without specks
    """
    pieces = skimage.measure.label(ink)
    if not pieces.any():
        return []
    boxes = np.array([region.bbox for region in skimage.measure.regionprops(pieces)])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    edges = find_edges(pieces, sides)
    longest = sides[~edges].max()
    speck = max(0.06 * longest, min(3, longest))
    kept = np.flatnonzero((sides >= speck) & ~edges) + 1
    ink = np.isin(pieces, kept)
    typical = np.median(sides[kept - 1][sides[kept - 1] >= longest / 3])
    reach = 0.12 * typical  # half of the largest gap within a character
    groups = join_enclosed(skimage.measure.label(scipy.ndimage.distance_transform_edt(~ink) <= reach) * ink)
    # Dots of a fine pen are as small as specks
    width = 2 * np.median(scipy.ndimage.distance_transform_edt(ink)[skimage.morphology.skeletonize(ink)])
    dots = np.flatnonzero((sides < speck) & (sides >= max(0.8 * width, 2)) & ~edges) + 1
    if len(dots) <= MOST_DOTS * len(kept):
        groups = np.where(np.isin(pieces, dots), groups.max() + pieces, groups)
    regions = [region for region in skimage.measure.regionprops(join_dots(groups, typical)) if max(region.image.shape) >= speck]
    boxes = np.array([region.bbox for region in regions])
    return [regions[i].image for i in np.lexsort([boxes[:, 1], find_lines(boxes)])]


def find_lines(boxes):
    """Numbers the lines of text on a page that may be tilted: boxes [N, 4] (top, left, bottom, right, in pixels) -> [N], from
    0. At each tilt, a line begins where a character's middle is lower than the previous one's by its height. Of the tilts, the
    one is chosen at which few lines hold all characters closely."""
    height, (y, x) = np.median(boxes[:, 2] - boxes[:, 0]), (boxes[:, :2] + boxes[:, 2:]).T / 2
    best, least = None, np.inf
    for tilt in sorted(np.linspace(-MOST_TILT, MOST_TILT, 57), key=abs):
        level = y - tilt * x
        order = level.argsort(kind="stable")
        line = np.empty(len(boxes), int)
        line[order] = np.cumsum(np.diff(level[order], prepend=level.min()) > 0.7 * height)
        mean = np.bincount(line, level) / np.bincount(line)
        cost = (((level - mean[line]) / height) ** 2).sum() + LINE_COST * len(mean) + TILT_COST * abs(tilt) / MOST_TILT
        if cost < least:
            best, least = line, cost
    return best


def find_edges(pieces, sides):
    """Finds long straight marks at the border of the photograph (such as edges of paper photographed at an angle) and their
    crumbs: pieces, numbers [rows, columns], and their longer sides [N] -> bool [N]"""
    longest_page_side = max(pieces.shape)
    edges = np.zeros(len(sides), bool)
    for i, region in enumerate(skimage.measure.regionprops(pieces)):
        top, left, bottom, right = region.bbox
        gap = min(top, left, pieces.shape[0] - bottom, pieces.shape[1] - right)
        if sides[i] >= longest_page_side / 4 and gap <= 0.03 * longest_page_side:
            depth = np.minimum(region.coords, np.array(pieces.shape) - 1 - region.coords).min(1).max()  # two edges in a corner
            is_straight = region.axis_minor_length < 0.06 * region.axis_major_length
            edges[i] = is_straight or depth < 0.08 * longest_page_side
    # Strokes of a closely cropped character also reach the border, but are not much longer than its others.
    longest = sides[~edges].max(initial=0)
    edges &= sides > 1.5 * longest
    if edges.all():
        edges[:] = False
    if edges.any():
        distance = scipy.ndimage.distance_transform_edt(~np.isin(pieces, np.flatnonzero(edges) + 1))
        nearest = scipy.ndimage.minimum(distance, pieces, np.arange(1, len(sides) + 1))
        edges |= (nearest <= 0.03 * longest_page_side) & (sides <= 0.3 * longest)
    return edges


def join_enclosed(groups):
    """Merges groups that lie within another's box into it: numbers of groups [rows, columns] -> the same, with fewer groups"""
    regions = sorted(skimage.measure.regionprops(groups), key=lambda region: region.area_bbox)
    joined = groups.copy()
    for i, inner in enumerate(regions):
        top, left, bottom, right = inner.bbox
        for outer in regions[i + 1 :]:
            if outer.bbox[0] <= top and outer.bbox[1] <= left and bottom <= outer.bbox[2] and right <= outer.bbox[3]:
                joined[joined == inner.label] = outer.label
                break
    return joined


def join_dots(groups, typical):
    """Merges small groups into the nearest larger one that they are above or below, as dots and accents are, unless another one is
    almost as near: numbers of groups [rows, columns] and the typical side of a character -> the same, with fewer groups"""
    regions, numbers = skimage.measure.regionprops(groups), np.arange(groups.max() + 1)
    boxes = np.array([region.bbox for region in regions])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    larger = np.flatnonzero(sides >= typical / 3)
    trees = [scipy.spatial.cKDTree(regions[i].coords) for i in larger]
    for i in np.flatnonzero(sides < typical / 3):
        gaps = np.array([tree.query(regions[i].coords)[0].min() for tree in trees])
        nearest, *others = gaps.argsort()
        letter = larger[nearest]
        is_above = boxes[i, 1] < boxes[letter, 3] and boxes[letter, 1] < boxes[i, 3]  # or below
        if is_above and gaps[nearest] <= ACCENT * sides[letter] and all(gaps[others] > 1.5 * gaps[nearest]):
            numbers[regions[i].label] = regions[letter].label
    return numbers[groups]


def is_blob(part):
    """Whether the largest circle in a part of the ink [rows, columns] nearly fills it"""
    return 2 * scipy.ndimage.distance_transform_edt(np.pad(part, 1)).max() - 0.5 > 0.8 * min(part.shape)


def normalise(part, side=SIDE):
    """Centres a character's cropped ink [rows, columns] on side x side pixels, with Omniglot's size and stroke width: bool. A
    blob becomes a dot"""
    fine = 4
    if 1.5 * min(part.shape) > max(part.shape) and is_blob(part):
        canvas = np.zeros((fine * SIDE, fine * SIDE), np.float32)
        canvas[skimage.draw.disk(((fine * SIDE - 1) / 2,) * 2, STROKE_RADIUS + 1)] = 1
        return fit(canvas, side) >= 0.5
    scale = fine * CHARACTER_SIDE / max(part.shape)
    length = max(skimage.morphology.skeletonize(part).sum(), 1)
    missing = (3 / scale - part.sum() / length) / 2  # strokes must survive the scaling
    pad = max(round(missing), 0) + 1
    part = np.pad(part, pad)
    if missing >= 1:
        part = skimage.morphology.dilation(part, skimage.morphology.disk(round(missing)))
    shape = [max(round(n * scale), 1) for n in part.shape]
    smooth = skimage.transform.resize(part.astype(np.float32), shape, order=1, anti_aliasing=scale < 1) > 0.5
    points = np.argwhere(skimage.morphology.skeletonize(np.pad(smooth, 1))).astype(float)  # row, column
    if len(points) == 0:
        return np.zeros((side, side), bool)
    # A skeleton is shorter than its strokes by their thickness, so it is scaled up, within limits.
    low, high = points.min(0), points.max(0)
    growth = np.clip((fine * CHARACTER_SIDE - 2 * STROKE_RADIUS) / max((high - low).max(), 1), 0.5, 1.7)
    points = (points - (low + high) / 2) * growth + (fine * SIDE - 1) / 2
    canvas = np.zeros((fine * SIDE, fine * SIDE), bool)
    canvas[tuple(points.round().astype(int).clip(0, fine * SIDE - 1).T)] = True
    return fit(skimage.morphology.dilation(canvas, skimage.morphology.disk(STROKE_RADIUS)).astype(np.float32), side) >= 0.5


# ------------------------------------------------------------------ built-in characters


def draw_glyphs():
    """Letters drawn by every hand, in the size and stroke width of handwriting. They come from glyphs.npz, since what
    matplotlib and FreeType draw depends on their versions.

    Returns: obs [N, 28, 28], bool, ink True, upright; alphabet ids [N]; characters [N], numbered from 1 within their alphabet
    Raises: UserError if images are to have another size
    """
    if SIDE != 28:
        raise UserError(f"the built-in letters (glyphs) are 28 x 28 pixels, but images.SIDE is {SIDE}; use your own data")
    with np.load(pathlib.Path(__file__).resolve().parent / "glyphs.npz") as stored:
        obs = np.unpackbits(stored["obs"], axis=1).astype(bool).reshape(-1, SIDE, SIDE)
        num_characters = stored["num_characters"]  # [L]
    num_hands = len(obs) // num_characters.sum()
    characters = np.concatenate([np.arange(1, num + 1) for num in num_characters]).repeat(num_hands)
    return obs, np.arange(len(num_characters)).repeat(num_characters * num_hands), characters
