"""save/index.html: a row for each run, with its progress, log p, and thumbnails that link to the PDFs. The page needs no
library and contains everything but the animations, which it links."""

import argparse
import base64
import html
import shlex
import time
import urllib.parse

import util
from results import report
from runs import checkpoints
from runs.curves import get_last
from util import UserError

KINDS = ["losses", "primitives", "prior", "reconstructions", "alphabets", "images"]
THUMBNAIL_PIXELS = 700

STYLE = """
body { font: 14px sans-serif; margin: 1.5em; color: #222 }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { border-top: 1px solid #ccc; padding: 8px 12px; text-align: left; vertical-align: top }
th { cursor: pointer; white-space: nowrap }
th:hover { background: #eef }
td { overflow-wrap: anywhere; max-width: 24em }
td[data-name=run] { min-width: 12em }
td.number { white-space: pre-wrap; font-variant-numeric: tabular-nums; min-width: 8em }
td.picture { min-width: 240px }
code { font-size: 11px; color: #555 }
img { max-width: 280px; max-height: 320px; border: 1px solid #ddd }
input { font: inherit; padding: 4px 8px; width: 20em; max-width: 90% }
@media (max-width: 700px) {
  body { margin: 0.7em }
  thead { display: none }
  table, tbody, tr, td { display: block; max-width: 100% }
  tr { border-top: 3px solid #888; padding: 6px 0 }
  td { border: 0; padding: 3px 0 }
  td[data-name]::before { content: attr(data-name) ": "; color: #777 }
  img { max-width: 100% }
}
"""

SCRIPT = """
function filter(text) {
  const words = text.toLowerCase().split(/\\s+/)
  for (const row of document.querySelectorAll('tbody tr'))
    row.style.display = words.every(word => row.textContent.toLowerCase().includes(word)) ? '' : 'none'
}
for (const head of document.querySelectorAll('th')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex
  const ascending = head.dataset.order !== 'up'
  head.dataset.order = ascending ? 'up' : 'down'
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent
  const compare = (a, b) => key(a).localeCompare(key(b), undefined, { numeric: true })
  body.append(...[...body.rows].sort((a, b) => ascending ? compare(a, b) : compare(b, a)))
}
"""


def get_thumbnail_path(name, kind):
    return util.SAVE / name / "thumbnails" / f"{kind}.png"


def get_newest(name, kind, suffix):
    """The newest checkpoint's file that a thumbnail represents, or None"""
    folder = util.SAVE / name
    if kind == "losses":
        return folder / "losses.pdf" if (folder / "losses.pdf").exists() else None
    numbered = [path for path in (folder / kind).glob(f"*{suffix}") if path.stem.split("-")[0].isdigit()]
    if kind == "images":
        numbered = [path for path in numbered if not path.stem.endswith("examples")]
    else:
        numbered = [path for path in numbered if path.stem.isdigit()]
    return max(numbered, key=lambda path: (int(path.stem.split("-")[0]), path.stat().st_mtime), default=None)


def describe(name):
    """The columns that a run's checkpoint tells, name -> (text, sort key)"""
    latest = checkpoints.get_path(name)
    if not latest.exists():
        return {"run": (name, name), "progress": ("its checkpoint lies elsewhere", "")}
    try:
        checkpoint = checkpoints.load(latest)
    except UserError as error:
        return {"run": (name, name), "progress": (str(error), "")}
    args, iteration = checkpoint["args"], checkpoint["iteration"]
    losses = [
        f"{key} {value:.4g}"
        for phase in checkpoint["statistics"]
        for key, value in get_last(checkpoint["statistics"], phase).items()
    ]
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(latest.stat().st_mtime))
    dataset = args["data_location"] + ", small" * args["small_dataset"]
    dataset += f": {checkpoint['data_summary']}" * bool(checkpoint["data_summary"])
    columns = {
        "run": (name, name),
        "saved": (saved, saved),
        "data": (dataset, dataset),
        "progress": (f"{iteration} of {args.get('num_iterations', iteration)}", str(iteration)),
        "last losses": ("\n".join(losses), losses[0].split()[-1] if losses else ""),
    }
    for run in report.read_runs(util.SAVE / name)[:1]:
        log_p = "\n".join(f"{key} {value:.2f}" for key, (value, _) in run.estimates.items())
        columns["log p"] = (f"{run.images_in_words}\n{log_p}", f"{run.estimates['best'][0]:.3f}")
    return columns


def get_command(name):
    """The command that started a run, as far as its checkpoint tells"""
    try:
        args = checkpoints.load(checkpoints.get_path(name))["args"]
    except UserError:
        return ""
    return shlex.join(["python", "main.py", *util.get_flags(argparse.Namespace(**args))])


def get_picture(name, kind):
    """HTML of a thumbnail that links to its PDF, and of the animation; "" if there is none"""
    pdf, thumbnail, cell = get_newest(name, kind, ".pdf"), get_thumbnail_path(name, kind), ""
    if pdf is not None and thumbnail.exists():
        picture = base64.b64encode(thumbnail.read_bytes()).decode()
        cell += f'<a href="{get_link(pdf)}"><img alt="{kind}" src="data:image/png;base64,{picture}"></a>'
    if kind == "reconstructions":
        for path in [get_newest(name, kind, ".gif"), util.SAVE / name / "reconstructions.gif"]:
            if path is not None and path.exists():
                cell += f'<a href="{get_link(path)}"><img alt="animation" src="{get_link(path)}"></a>'
    if kind == "images":
        others = sorted(path for path in (util.SAVE / name / kind).glob("*.pdf") if path != pdf)
        cell += " ".join(f'<a href="{get_link(path)}">{html.escape(path.name)}</a>' for path in others)
    return cell


def get_link(path):
    return urllib.parse.quote(str(path.relative_to(util.SAVE)))


def get_table(names):
    """The HTML table of runs, without columns that would be empty"""
    described = {name: describe(name) for name in names}
    pictures = {name: {kind: get_picture(name, kind) for kind in KINDS} for name in names}
    columns = [c for c in ["run", "saved", "data", "progress", "last losses", "log p"]
               if any(c in d for d in described.values())]  # fmt: skip
    kinds = [kind for kind in KINDS if any(pictures[name][kind] for name in names)]
    rows = []
    for name in names:
        cells = []
        for column in columns:
            text, key = described[name].get(column, ("", ""))
            text = html.escape(text)
            if column == "run":
                text = f"<b>{text}</b><br><code>{html.escape(get_command(name))}</code>"
            kind = ' class="number"' if column in ("last losses", "log p") else ""
            cells.append(f'<td{kind} data-name="{column}" data-key="{html.escape(key)}">{text}</td>')
        cells += [f'<td class="picture" data-name="{kind}" data-key="">{pictures[name][kind]}</td>' for kind in kinds]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{column}</th>" for column in [*columns, *kinds])
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>"


def write_overview():
    """Returns: the page's path"""
    names = {path.parents[1].name for path in util.SAVE.glob("*/checkpoints/latest.pt")}
    names |= {path.parents[1].name for path in util.SAVE.glob("*/thumbnails/*.png")}
    test_runs = sorted(name for name in names if name.startswith("test_run_"))
    parts = [("Runs", sorted(names - set(test_runs))), ("Test runs", test_runs)]
    body = "\n".join(f"<h2>{title}</h2>\n{get_table(some)}" for title, some in parts if some)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title><style>{STYLE}</style></head><body>
<input type="search" placeholder="filter, e.g. rws 20" oninput="filter(this.value)" aria-label="filter">
{body}
<script>{SCRIPT}</script></body></html>
"""
    path = util.SAVE / "index.html"
    util.write(path, page.encode())
    return path
