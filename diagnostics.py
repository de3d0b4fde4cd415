"""Draws what models have learned, into save/<path_base>/.

    python diagnostics.py --data-location om                     # every run in save/
    python diagnostics.py --checkpoint-path save/mws_20/checkpoints/latest.pt
    python diagnostics.py --checkpoint-path mws_20 --images my/letters/*.png

losses.pdf; primitives, prior, reconstructions and, for a conditional model, alphabets, each
as <iteration>.pdf in a folder of its name; reconstructions/<iteration>.gif, drawn stroke by
stroke; reconstructions.gif, as training went on; and save/index.html, an overview of all runs.
"""

import functools
import io
import math
import pathlib
import sys

import imageio.v3 as imageio
import torch
from matplotlib.backends.backend_pdf import PdfPages

import data
import figures
import losses
import models
import overview
import strokes
import util
from util import UserError

NUM_FILMED, MAX_FRAMES = 16, 40  # characters and frames of reconstructions.gif
NUM_PROPOSALS = 10  # of the inference network, the best of which is drawn

# ------------------------------------------------------------------ a model and its data


class Subject:
    """A model to draw, its data and its memory, where there are any."""

    def __init__(self, name, checkpoint, dataset, memory):
        self.folder, self.dataset, self.memory = util.SAVE / name, dataset, memory
        self.iteration, self.num_alphabets = checkpoint["iteration"], checkpoint["num_alphabets"]
        self.generative_model, self.inference_network = models.from_checkpoint(checkpoint)

    def get_images(self, obs_id):
        """Training images by number: obs [N, R, C], alphabet [N, L] or None"""
        split = self.dataset.train
        return split.obs[obs_id], split.alphabet[obs_id] if self.num_alphabets else None

    def reconstruct(self, obs_id):
        """The programs of training images, best first in the memory, or read: [N, A, 2]"""
        if self.memory is not None:
            return losses.unpack(self.memory[obs_id, 0])
        return infer(self.generative_model, self.inference_network, *self.get_images(obs_id), NUM_PROPOSALS)[0]


@torch.no_grad()
def infer(generative_model, inference_network, obs, alphabet, num_particles):
    """The best of a number of programs that the inference network proposes for each image.

    Args: obs [B, R, C]; alphabet [B, L] one-hot or None
    Returns: latent [B, A, 2]; log_joint [B], its log p(z, x) in nats
    """
    best = []
    for ids in torch.arange(len(obs)).split(50):
        some_alphabet = None if alphabet is None else alphabet[ids]
        latent = inference_network.sample(obs[ids], num_particles, some_alphabet)  # [P, B, A, 2]
        log_joint, particle_id = losses.score(generative_model, latent, obs[ids], some_alphabet).max(0)
        best.append((latent[particle_id, torch.arange(len(ids))], log_joint))
    return [torch.cat(parts) for parts in zip(*best, strict=True)]


def choose_ids(given, num_all, num_default, flag):
    """Those asked for, else as many as asked for, evenly spaced. Raises: UserError if there are not so many"""
    if given is None:
        return torch.linspace(0, num_all - 1, min(num_default, num_all)).round().long()
    if max(given) >= num_all:
        raise UserError(f"{flag} {max(given)}: there are {num_all}, counted from 0")
    return torch.tensor(given)


# ------------------------------------------------------------------ files


def save_figures(name, kind, iteration, some_figures):
    """Writes an iterable of figures as the pages of a PDF, and the first as a thumbnail. Returns: the PDF's path"""
    file, thumbnail = io.BytesIO(), io.BytesIO()
    with PdfPages(file, metadata={"CreationDate": None}) as pages:
        for figure in some_figures:
            pages.savefig(figure)
            if thumbnail.tell() == 0:
                figure.savefig(thumbnail, format="png", dpi=300 / figure.get_size_inches()[0])
    stem = kind if iteration is None else f"{kind}/{iteration}"
    util.write(util.SAVE / name / f"{stem}.pdf", file.getvalue())
    util.write(overview.get_thumbnail_path(name, kind), thumbnail.getvalue())


def save_film(path, frames, milliseconds):
    """Frames [H, W, 3] as an animated GIF, the last one held"""
    durations = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    util.write(path, imageio.imwrite("<bytes>", frames, extension=".gif", duration=durations, loop=0))


def save_programs(folder, subject, latent, names, **details):
    """SVG and JSON of each latent [N, A, 2]; details: lists of N plain values"""
    for i, name in enumerate(names):
        program = strokes.get_program(subject.generative_model, latent[i])
        util.write(folder / f"{name}.svg", strokes.to_svg(program).encode())
        more = {key: values[i] for key, values in details.items()}
        text = strokes.to_json(program, iteration=subject.iteration, **more)
        util.write(folder / f"{name}.json", text.encode())


# ------------------------------------------------------------------ what is drawn


def draw_losses(name, checkpoint):
    """losses.pdf"""
    statistics, memory = checkpoint["statistics"], checkpoint["memory"]
    if not any(len(values) for values in statistics.values()):
        print(f"{name}: no losses yet")
        return
    log_num_images = None
    if memory is not None:  # the prior loss of one program for each image, equally often, were its entropy
        log_num_images = math.log(len(memory) / max(checkpoint["num_alphabets"], 1))
    figure = figures.losses_figure(statistics, log_num_images, name)
    save_figures(name, "losses", None, [figure])


def draw_model(name, subject, args):
    """What needs no data: the library of strokes, samples from the prior"""
    model, iteration = subject.generative_model, subject.iteration
    title = f"{name}, iteration {iteration}"
    figure = figures.primitives_figure(model, args.resolution, f"primitives of {title}")
    save_figures(name, "primitives", iteration, [figure])
    latent, _ = model.sample(args.num_prior_samples)
    figure = figures.grid_figure(figures.draw(model, latent, args.resolution), 10, f"samples from the prior of {title}")
    save_figures(name, "prior", iteration, [figure])


def draw_reconstructions(name, subject, args):
    """Returns: obs_id [N], obs [N, R, R], stages [N, A - 1, R, R], what the films show too"""
    obs_id = choose_ids(args.obs_ids, len(subject.dataset.train.obs), args.num_reconstructions, "--obs-ids")
    obs, _ = subject.get_images(obs_id)
    latent = subject.reconstruct(obs_id)  # [N, A, 2]
    stages = figures.draw_stages(subject.generative_model, latent, args.resolution)  # [N, A - 1, R, R]
    obs = figures.resize(obs, args.resolution)  # [N, R, R]
    source = "memory" if subject.memory is not None else "inference network"
    title = f"{name}, iteration {subject.iteration}\ntraining images and their programs ({source}), stroke by stroke"
    labels = [str(i) for i in obs_id.tolist()]
    pages = figures.stroke_figures(obs, stages, labels, title)
    save_figures(name, "reconstructions", subject.iteration, pages)
    if args.svg:
        folder = subject.folder / "reconstructions" / str(subject.iteration)
        save_programs(folder, subject, latent, labels, obs_id=obs_id.tolist())
    return obs_id, obs, stages


def film_strokes(name, subject, obs, stages, num_cols=4):
    """Images beside their reconstructions, which are drawn stroke by stroke"""
    obs, stages = obs[: NUM_FILMED * 2], stages[: NUM_FILMED * 2]
    current, frames = torch.zeros_like(obs), []
    for stage in [torch.zeros_like(obs), *stages.unbind(1)]:
        if len(frames) and stage.isnan().all():
            break
        current = torch.where(stage.isnan(), current, stage)
        frames.append(pair_frame(obs, current, num_cols, f"{name}, iteration {subject.iteration}"))
    save_film(subject.folder / "reconstructions" / f"{subject.iteration}.gif", frames, 500)


def pair_frame(obs, probs, num_cols, title):
    """Images beside drawings, [N, R, R] each, as a frame"""
    return figures.to_frame(figures.tile(torch.stack([obs, probs], 1).flatten(0, 1), 2 * num_cols), title)


def film_training(name, subject, obs_id, args):
    """The same characters, as training went on"""
    checkpoints = util.get_checkpoint_path(name).parent.glob("*.pt")
    iterations = sorted(int(path.stem) for path in checkpoints if path.stem.isdigit())
    if len(iterations) < 2:
        return
    chosen = torch.linspace(0, len(iterations) - 1, min(MAX_FRAMES, len(iterations))).round().long().tolist()
    obs_id, frames = obs_id[:NUM_FILMED], []
    obs = figures.resize(subject.get_images(obs_id)[0], args.resolution)
    for i in chosen:
        try:
            checkpoint = util.load_checkpoint(util.get_checkpoint_path(name, iterations[i]))
        except UserError as error:
            print(f"{name}: {error}, left out of the film")
            continue
        then = Subject(name, checkpoint, subject.dataset, None if subject.memory is None else checkpoint["memory"])
        probs = figures.draw(then.generative_model, then.reconstruct(obs_id), args.resolution)
        frames.append(pair_frame(obs, probs, 4, f"{name}, iteration {then.iteration}"))
    if frames:
        save_film(subject.folder / "reconstructions.gif", frames, 300)


def draw_alphabets(name, subject, args):
    """For each alphabet its images, their reconstructions, and new characters"""
    num_cols, num = args.alphabet_num_cols, args.alphabet_num_rows * args.alphabet_num_cols
    alphabet_ids = choose_ids(args.alphabet_ids, subject.num_alphabets, subject.num_alphabets, "--alphabet-ids")
    model, one_hot = subject.generative_model, torch.eye(subject.num_alphabets)

    def draw_pages():
        for alphabet_id in alphabet_ids.tolist():
            members = subject.dataset.train.alphabet[:, alphabet_id].nonzero().squeeze(1)
            obs_id = members[torch.linspace(0, len(members) - 1, min(num, len(members))).round().long()]
            new, _ = model.sample(num, one_hot[alphabet_id].expand(num, -1))
            panels = {
                "images": figures.resize(subject.get_images(obs_id)[0], args.resolution),
                "reconstructions": figures.draw(model, subject.reconstruct(obs_id), args.resolution),
                "new characters": figures.draw(model, new, args.resolution),
            }
            title = f"alphabet {alphabet_id} of {name}, iteration {subject.iteration}"
            yield figures.panels_figure(panels, num_cols, title)

    save_figures(name, "alphabets", subject.iteration, draw_pages())


def draw_images(name, subject, args):
    """Reads programs off the user's own images, the best of many; a conditional model tries all alphabets"""
    obs = torch.stack([torch.as_tensor(data.read_image(path, read_file(path)) >= 0.5).float() for path in args.images])
    num_alphabets, networks = subject.num_alphabets, (subject.generative_model, subject.inference_network)
    alphabets = torch.eye(num_alphabets).unbind() if num_alphabets else [None]
    num_particles, tries = math.ceil(args.num_particles / len(alphabets)), []
    for alphabet in alphabets:
        given = None if alphabet is None else alphabet.expand(len(obs), -1)
        tries.append(infer(*networks, obs, given, num_particles))
    log_joint, best = torch.stack([score for _, score in tries]).max(0)  # [N]
    latent = torch.stack([latent for latent, _ in tries])[best, torch.arange(len(obs))]  # [N, A, 2]
    stems = [pathlib.Path(path).stem for path in args.images]
    names = [f"{stem}-{i}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]
    details = dict(image=[str(path) for path in args.images], log_joint=log_joint.tolist())
    if num_alphabets:
        details["alphabet"] = best.tolist()
    save_programs(subject.folder / "images", subject, latent, names, **details)
    stages = figures.draw_stages(subject.generative_model, latent, args.resolution)
    labels = [f"{stem[:12]}\n{score:.0f} nats" for stem, score in zip(names, log_joint.tolist(), strict=True)]
    title = f"{name}, iteration {subject.iteration}\nbest of {args.num_particles} programs, stroke by stroke"
    pages = figures.stroke_figures(figures.resize(obs, args.resolution), stages, labels, title)
    save_figures(name, "images", subject.iteration, pages)


def read_file(path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--images: cannot read {path} ({error.strerror})") from None


# ------------------------------------------------------------------ runs


def draw_run(name, checkpoint, args, load_data):
    """All that can be drawn of a run; what needs data that is missing is named"""
    util.set_seed(0)
    draw_losses(name, checkpoint)
    if args.loss_only:
        return
    dataset, memory = None, checkpoint["memory"]
    try:
        dataset = data.load_for_model(checkpoint, args.data_location, load_data)
    except UserError as error:
        missing = "reconstructions" + (" and alphabets" if checkpoint["num_alphabets"] else "")
        print(f"{name}: without its data no {missing}: {error}")
    if dataset is not None and checkpoint["settings"]["data"] != data.get_fingerprint(dataset.train):
        print(f"{name}: these are not the images that it was trained on; it reads them, its memory is left out")
        memory = None
    subject = Subject(name, checkpoint, dataset, memory)
    draw_model(name, subject, args)
    if args.images:
        draw_images(name, subject, args)
    if dataset is not None:
        obs_id, obs, stages = draw_reconstructions(name, subject, args)
        film_strokes(name, subject, obs, stages)
        film_training(name, subject, obs_id, args)
        if subject.num_alphabets:
            draw_alphabets(name, subject, args)
    print(f"{name}: drawn at iteration {subject.iteration}")


def draw_all(args, load_data):
    """Every run in save/; what cannot be drawn is named"""
    names = sorted(path.name for path in util.SAVE.glob("*") if path.is_dir())
    if not names:
        print(f"there is no run in {util.SAVE}/ yet; train one with python main.py")
    for name in names:
        try:
            checkpoint = util.load_newest_checkpoint(name)
            if checkpoint is None:
                print(f"{name}: no checkpoint yet, skipped")
            else:
                draw_run(name, checkpoint, args, load_data)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    load_data = functools.lru_cache(2)(data.load)
    if args.checkpoint_path is None:
        draw_all(args, load_data)
    else:
        path = util.find_checkpoint(args.checkpoint_path)
        checkpoint = util.load_checkpoint(path)
        draw_run(util.get_run_name(path, checkpoint["args"]), checkpoint, args, load_data)
    if util.SAVE.is_dir():
        print(f"overview: {overview.write_overview()}")
    return 0


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range or something is missing"""
    parser = util.ArgumentParser(description=__doc__)
    add, positive, natural = parser.add, util.in_range(int, 1), util.in_range(int, 0)
    add("--data-location", "as main.py takes it (default: where each model was trained)", default=None)
    add("--checkpoint-path", "draw this one: a file, or a run's folder or path base (default: every run in save/)")
    add("--loss-only", "draw losses.pdf only", action="store_true")
    add("--resolution", "pixels of a drawing's side", type=util.in_range(int, 8, 1024), default=28)
    add("--num-reconstructions", "training images to draw", type=positive, default=100)
    add("--num-prior-samples", "samples from the prior to draw", type=positive, default=100)
    add("--obs-ids", "numbers of the training images to draw (default: evenly spaced)", type=natural, nargs="+")
    add("--alphabet-ids", "numbers of the alphabets to draw (default: all)", type=natural, nargs="+")
    add("--alphabet-num-rows", "rows of characters of an alphabet", type=positive, default=4)
    add("--alphabet-num-cols", "columns of characters of an alphabet", type=positive, default=5)
    add("--svg", "also write each reconstruction as SVG, with its program as JSON", action="store_true")
    add("--images", "image files of your own: read programs off them (needs --checkpoint-path)", nargs="+")
    add("--num-particles", "programs to try for each of --images", type=positive, default=1000)
    args = parser.parse_args(argv)
    if args.images and args.checkpoint_path is None:
        raise UserError("--images needs --checkpoint-path, the model that reads them")
    return args


if __name__ == "__main__":
    util.run_script(main)
