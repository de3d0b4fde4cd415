"""save/index.html: one row a run with its last losses, log p, and thumbnails that link to the PDFs."""

import base64
import html
import urllib.parse

import report
import util
from util import UserError

KINDS = ["losses", "primitives", "prior", "reconstructions", "alphabets"]

STYLE = """
body { font: 14px sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse }
th, td { border-top: 1px solid #ccc; padding: 8px 12px; text-align: left; vertical-align: top }
td.number { white-space: pre; font-variant-numeric: tabular-nums }
img { max-width: 150px; max-height: 190px; border: 1px solid #ddd }
"""


def get_thumbnail_path(name, kind):
    return util.SAVE / name / "thumbnails" / f"{kind}.png"


def get_newest_pdf(name, kind):
    """The PDF that a thumbnail stands for, or None"""
    folder = util.SAVE / name
    if kind == "losses":
        return folder / "losses.pdf" if (folder / "losses.pdf").exists() else None
    numbered = [path for path in (folder / kind).glob("*.pdf") if path.stem.isdigit()]
    return max(numbered, key=lambda path: int(path.stem), default=None)


def get_cells(name):
    """A run's row: name, progress, losses, log p, thumbnails, as HTML"""
    latest = util.get_checkpoint_path(name)
    try:
        checkpoint = util.load_checkpoint(latest)
        progress = f"{checkpoint['iteration']} of {checkpoint['args']['num_iterations']}"
        losses = [f"{key} {values[-1]:.4g}" for key, values in checkpoint["statistics"].items() if len(values)]
    except UserError as error:
        progress, losses = str(error), []
    run = report.read_run(util.SAVE / name, "test")
    log_p = [f"{key} {value:.2f}" for key, (value, _) in run.estimates.items()] if run else ["not evaluated"]
    cells = [html.escape("\n".join(lines)) for lines in ([name], [progress], losses, log_p)]
    for kind in KINDS:
        pdf, thumbnail = get_newest_pdf(name, kind), get_thumbnail_path(name, kind)
        if pdf is None or not thumbnail.exists():
            cells.append("")
            continue
        picture = base64.b64encode(thumbnail.read_bytes()).decode()
        link = urllib.parse.quote(str(pdf.relative_to(util.SAVE)))
        cells.append(f'<a href="{link}"><img alt="{kind}" src="data:image/png;base64,{picture}"></a>')
    return cells


def write_overview():
    """Returns: the page's path"""
    names = sorted(path.parents[1].name for path in util.SAVE.glob("*/checkpoints/latest.pt"))
    header = "".join(f"<th>{title}</th>" for title in ["run", "iteration", "last losses", "log p", *KINDS])
    rows = [header]
    for name in names:
        cells = get_cells(name)
        rows.append(
            f"<td>{cells[0]}</td>"
            + "".join(f'<td class="number">{cell}</td>' for cell in cells[1:4])
            + "".join(f"<td>{cell}</td>" for cell in cells[4:])
        )
    table = "\n".join(f"<tr>{row}</tr>" for row in rows)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>{STYLE}</style></head>\n'
        f"<body><h1>Runs in {html.escape(str(util.SAVE))}/</h1>\n<p>Nats an image; a thumbnail leads to its PDF.</p>\n"
        f"<table>\n{table}\n</table></body></html>\n"
    )
    path = util.SAVE / "index.html"
    util.write(path, page.encode())
    return path
