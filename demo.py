"""A page to draw a character on and see it read at once, stroke by stroke.

    pip install 'gradio>=6'
    python demo.py            # then open http://127.0.0.1:7860

Draw with the mouse or a pen, choose a known character, or upload a photograph. The page shows the library's strokes that
make up the ink, new examples as by other hands, and the known characters that it most resembles. Only this machine can open
the page, unless --host or --share says otherwise.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import base64
import html
import itertools
import pathlib
import threading

import imageio.v3 as imageio
import numpy as np
import torch

import data
import images
import models
import util
from read import MODEL, get_strokes
from reading import characters, matching
from results import drawings
from runs import checkpoints
from util import UserError

PAGE, BRUSH = 420, 12  # pixels: Omniglot's proportion of stroke and page
NUM_EXAMPLES, NUM_ALIKE = 9, 6
MOST = 20  # characters read from a photograph, at most
PAUSE = 200  # milliseconds without drawing, after which the page is read
SECONDS = 0.5  # in which a stroke is drawn

# ------------------------------------------------------------------ what the page shows


class Reader:
    """Reads characters with a model. Args: model: GenerativeModel; known: data.Split of known characters"""

    def __init__(self, model, known):
        self.model = model
        known = known.select(known.obs.flatten(1).any(1).nonzero().squeeze(1))  # those that are not blank
        which = (
            known.obs.flatten(1) if known.character is None else np.column_stack([known.alphabet.argmax(1), known.character])
        )
        self.known = known.obs[np.unique(which, axis=0, return_index=True)[1]]  # one drawing of each character
        self.points = [matching.get_points(obs, scale=True) for obs in self.known.numpy() >= 0.5]
        self.library = drawings.draw_primitives(model, 40)[0]  # [K, R, R]
        self.read(characters.from_inks([np.eye(56, dtype=bool)], ""))  # the first reading is slow

    def read(self, found):
        """HTML about Characters. Seeds the random numbers, so not to be called twice at a time"""
        if not len(found):
            return "<p>There is no character on this page.</p>"
        left_out = f"<p>The first {MOST} of {len(found)} characters are shown.</p>" * (len(found) > MOST)
        found = characters.Characters(found.inks[:MOST], found.files[:MOST])
        util.set_seed(0)
        reading = characters.read(self.model, found)
        examples = drawings.vary_strokes(reading.drawing, NUM_EXAMPLES, 56)
        return left_out + "<hr>".join(self.show(found, reading, examples[i], i) for i in range(len(found)))

    def show(self, found, reading, examples, i):
        strokes = get_strokes(reading, i)
        visible = list(dict.fromkeys(stroke["primitive"] for stroke in strokes["strokes"] if stroke["on"]))
        points = matching.get_points(found.obs[i].numpy() >= 0.5, scale=True)
        distance = torch.tensor([matching.get_hausdorff_distance(points, other) for other in self.points])
        alike = self.known[distance.topk(min(NUM_ALIKE, len(distance)), largest=False).indices]
        log_p, deviation = reading.log_likelihood[i].item(), reading.deviation[i].sum().item()
        return f"""{animate(strokes, found.inks[i])}
<p>{util.count(int(reading.drawing.on[i].sum()), "stroke")}; log p(x | strokes) {log_p:.0f} nats (how probable they make the
ink); they deviate from the library's by {deviation:.1f} nats (0: they are in it)</p>
<p>From the library:<br>{show(self.library[visible])}</p><p>By other hands:<br>{show(examples)}</p><p>Resembles:<br>{show(alike)}</p>"""


def show(drawn):
    """Images [N, R, R], ink 1, as HTML"""
    return " ".join(f'<img src="{to_uri(1 - image.numpy())}" width="40" style="display:inline;margin:1px">' for image in drawn)


def to_uri(grey):
    png = imageio.imwrite("<bytes>", (255 * grey).round().clip(0, 255).astype(np.uint8), extension=".png")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def animate(program, ink):
    """Strokes as an SVG that draws them one after the other over the ink [H, W], see drawings.get_program"""
    side, paths = drawings.NUM_PIXELS, []
    for number, stroke in enumerate(s for s in program["strokes"] if s["on"]):
        path = drawings.get_path([stroke[name] for name in ("x_start", "y_start", "dx", "dy", "theta")])
        paths.append(
            f'<path d="{path}" pathLength="1" fill="none" stroke="hsl({47 * (number + 1) % 360} 80% 40%)" stroke-width="0.7"'
            f' stroke-linecap="round" stroke-dasharray="1 2" stroke-dashoffset="1.1"><title>stroke {number + 1}</title><animate'
            f' attributeName="stroke-dashoffset" from="1" to="0" begin="{SECONDS * number}s" dur="{SECONDS}s" fill="freeze"/></path>'
        )
    return f"""<svg class="strokes" viewBox="0 0 {side} {side}" width="{3 * PAGE // 4}" style="border:1px solid #ccc;background:white">
<image href="{to_uri(1 - 0.25 * images.make_square(ink))}" width="{side}" height="{side}"/>
{"".join(paths)}</svg>"""


# ------------------------------------------------------------------ the page

PAD = f"""<canvas width="{PAGE}" height="{PAGE}"
style="max-width:100%;border:1px solid #888;background:white;touch-action:none;cursor:crosshair">
</canvas><br><button class="primary lg">Clean page</button>"""
DRAW = f"""
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d');
pen.lineWidth = {BRUSH};
pen.lineCap = pen.lineJoin = 'round';
let timer, pointer = null;  // of several fingers, the first draws
const at = e => [e.offsetX * canvas.width / canvas.clientWidth, e.offsetY * canvas.height / canvas.clientHeight];
const send = () => {{ clearTimeout(timer); timer = setTimeout(() => trigger('submit', {{png: canvas.toDataURL()}}), {PAUSE}); }};
const draw = canvas.onpointermove = e => {{ if (e.pointerId === pointer) {{ pen.lineTo(...at(e)); pen.stroke(); }} }};
canvas.onpointerdown = e => {{
    if ((pointer ?? e.pointerId) !== e.pointerId || e.button) return;
    pointer = e.pointerId;
    clearTimeout(timer);
    canvas.setPointerCapture(e.pointerId);
    pen.beginPath();
    pen.moveTo(at(e)[0] - 0.1, at(e)[1]);  // a line of no length would leave no dot
    draw(e);
}};
canvas.onpointerup = canvas.onpointercancel = e => {{
    if (e.pointerId !== pointer) return;
    pointer = null;
    send();
}};
const clear = () => {{ clearTimeout(timer); pen.clearRect(0, 0, canvas.width, canvas.height); }};
canvas.addEventListener('clear', clear);
element.querySelector('button').onclick = () => {{ clear(); send(); }};
"""
CLEAR = "(...given) => { document.querySelector('canvas').dispatchEvent(new Event('clear')); return given; }"


def build(reader):
    """The page: gradio.Blocks"""
    import gradio

    others = itertools.cycle(torch.randperm(len(reader.known), generator=torch.Generator().manual_seed(0)).tolist())

    newest, turn = {}, threading.Lock()  # visitor: the last request; others are not answered

    def respond(request, find):
        """HTML about the Characters that find() returns, unless the visitor has asked for others since"""
        newest[request.session_hash] = find
        try:
            found = find()
        except UserError as error:
            return f"<p>{html.escape(str(error))}</p>"
        with turn:
            words = reader.read(found) if newest[request.session_hash] is find else ""
        return words if newest[request.session_hash] is find else gradio.skip()

    def read_page(event: gradio.EventData, request: gradio.Request):
        png = base64.b64decode(event.png.split(",")[1])
        return respond(request, lambda: characters.from_inks([images.decode("the page", png) < 0.5], "page"))

    def read_file(path, request: gradio.Request):
        return respond(request, lambda: characters.take(pathlib.Path(path).name, pathlib.Path(path).read_bytes()))

    def read_known(request: gradio.Request):
        ink = np.kron(reader.known[next(others)].numpy() >= 0.5, np.ones((4, 4), bool))
        return respond(request, lambda: characters.from_inks([ink], "known"))

    with gradio.Blocks(title="Learning to write", analytics_enabled=False) as page:
        gradio.Markdown("# Draw a character, and see it read\nThe strokes come from a library that a model has learned.")
        with gradio.Row():
            with gradio.Column(min_width=PAGE):
                pad = gradio.HTML(html_template=PAD, js_on_load=DRAW)
                known = gradio.Button("A known character")
                upload = gradio.UploadButton("A photograph", file_types=["image"])
            with gradio.Column(min_width=PAGE):
                answer = gradio.HTML()
        pad.submit(read_page, None, answer, show_progress="hidden", trigger_mode="multiple", concurrency_limit=None)
        known.click(read_known, None, answer, js=CLEAR)
        upload.upload(read_file, upload, answer, js=CLEAR)
    return page


def main(argv=None):
    args = get_parser().parse_args(argv)
    try:
        import gradio
    except ImportError:
        gradio = None
    if gradio is None or int(gradio.__version__.split(".")[0]) < 6:
        raise UserError("the page needs gradio, 6 or newer: pip install 'gradio>=6'")
    model, _ = models.from_checkpoint(checkpoints.load_given(args.checkpoint_path))
    try:
        known = data.load(args.data_location).train
    except (UserError, OSError) as error:
        util.warn(f"{util.describe_error(error)}; the page knows built-in letters instead")
        known = data.load("glyphs").train
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    page = build(Reader(model, known))
    try:
        page.launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme, footer_links=[])
    except Exception as error:  # from gradio, or from the HTTP client by which it tries the page
        raise UserError(f"--host {args.host} --port {args.port}: {util.get_reason(error)}; give others") from None
    return 0


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add = parser.add
    add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one", default=MODEL)
    add("--data-location", "known characters, as for main.py", type=util.to_location, default="local")
    add("--host", "address to listen on; 0.0.0.0: all of this machine's", default="127.0.0.1")
    add("--port", "port to listen on", type=util.in_range(int, 1, 65535), default=7860)
    add("--share", "also open the page to the internet, through gradio.live", action="store_true")
    return parser


if __name__ == "__main__":
    util.run_script(main)
