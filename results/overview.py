"""save/index.html: each run's progress, log p, and pictures that link to the PDFs. The page needs no library and contains
everything except the animations, which are linked."""

import base64
import html
import os
import time
import urllib.parse

import util
from results import report
from runs import checkpoints
from runs.curves import get_last
from util import UserError

KINDS = ["losses", "primitives", "prior", "reconstructions", "alphabets"]
THUMBNAIL_PIXELS = 700

STYLE = """
body { font: 14px sans-serif; margin: 1.5em; color: #222 }
h2 { border-top: 1px solid #ccc; padding-top: 0.7em; overflow-wrap: anywhere }
img { max-width: min(280px, 100%); max-height: 320px; border: 1px solid #ddd; vertical-align: top; margin: 4px }
"""


def get_thumbnail_path(name, kind):
    return util.SAVE / name / "thumbnails" / f"{kind}.png"


def describe(name):
    """Lines of text about a run's checkpoint"""
    latest = checkpoints.get_path(name)
    try:
        if not latest.exists():
            return ["its checkpoint is elsewhere"]
        checkpoint = checkpoints.load(latest)
    except (UserError, PermissionError) as error:
        return [util.describe_error(error)]
    args, iteration, statistics = checkpoint["args"], checkpoint["iteration"], checkpoint["statistics"]
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(latest.stat().st_mtime))
    return [
        f"iteration {iteration} of {args['num_iterations']}, saved {saved}",
        f"{args['data_location']}: {checkpoint['data_summary']}",
        ", ".join(
            f"{'pretraining: ' * (phase == 'pretrain')}{key} {value:.4g}"
            for phase in statistics
            for key, value in get_last(statistics, phase).items()
        ),
    ]


def describe_evaluations(name):
    """Lines of text about a run's evaluations on one set of images, if there are any"""
    lines = []
    for run in report.read_runs(util.SAVE / name)[:1]:
        row = report.get_row(run.name, [run])
        log_p = ", ".join(f"{key} {row[key]:.2f}" for key in report.ESTIMATES if row[key] is not None)
        lines.append(f"log p, {row['images in words']}: {log_p}")
    return lines


def get_pictures(name):
    """HTML of a run's thumbnails, each linked to its newest PDF, and of its animations"""
    folder, shown = util.SAVE / name, {}  # file -> what it shows, and the picture that links to it

    def find_newest(kind, suffix):
        return next(reversed(checkpoints.get_numbered(folder / kind, suffix)), folder / "none")

    for kind in KINDS:
        thumbnail = get_thumbnail_path(name, kind)
        pdf = folder / "losses.pdf" if kind == "losses" else find_newest(kind, "pdf")
        if thumbnail.exists():
            shown[pdf] = kind, f"data:image/png;base64,{base64.b64encode(thumbnail.read_bytes()).decode()}"
    shown[find_newest("reconstructions", "gif")] = "reconstructions, stroke by stroke", None
    shown[folder / "reconstructions.gif"] = "reconstructions in the course of training", None
    lines = []
    for path, (words, picture) in shown.items():
        if path.exists():
            link = urllib.parse.quote(os.fsencode(path.relative_to(util.SAVE)))
            lines.append(f'<a href="{link}"><img alt="{words}" src="{picture or link}"></a>')
    return "\n".join(lines)


def write_overview():
    """Returns: the page's path"""
    names = {path.parents[1].name for path in util.SAVE.glob("*/checkpoints/latest.pt")}
    names |= {path.parents[1].name for path in util.SAVE.glob("*/thumbnails/*.png")}
    runs = []
    for name in sorted(names, key=lambda name: (report.is_test_run(name), name)):
        lines = "<br>".join(map(html.escape, [*describe(name), *describe_evaluations(name)]))
        runs.append(f"<h2>{html.escape(name)}</h2>\n<p>{lines}</p>\n{get_pictures(name)}")
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title><style>{STYLE}</style></head><body>
{chr(10).join(runs)}
</body></html>
"""
    path = util.SAVE / "index.html"
    util.write(path, page.encode(errors="backslashreplace"))
    return path
