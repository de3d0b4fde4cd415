"""Draws what models have learned, into save/<run>/.

    python diagnostics.py                                        # every run in save/
    python diagnostics.py --checkpoint-path save/mws_20/checkpoints/latest.pt
    python diagnostics.py --checkpoint-path mws_20 --resolution 112 --svg

Writes losses.pdf; primitives, prior, reconstructions and (for a conditional model) alphabets, each as <iteration>.pdf in its
own folder; reconstructions/<iteration>.gif, drawn stroke by stroke; reconstructions.gif, over the course of training; and
save/index.html, an overview of all runs. Programs are drawn as the model sees them: through its most probable affine map.
read.py reads your own characters.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import functools
import io
import itertools
import math
import pathlib
import sys

import imageio.v3 as imageio
import torch

import data
import models
import scoring
import util
from reading import variation
from results import drawings, figures, overview
from runs import checkpoints
from util import UserError

NUM_PROPOSALS = 10  # programs that the inference network proposes for an image; the best is drawn
BATCH_SIZE = 50  # images whose programs are inferred together
NUM_COUNTED = 2000  # samples from the prior, to estimate how often it uses each primitive
NUM_FILMED, MAX_FRAMES = 16, 40  # characters (stroke by stroke, twice as many) and frames in animations
MOVED = "images as-is examples vary vary-strokes no-refit num-particles num-best num-rounds num-mutants".split()  # to read.py
STROKE_MILLISECONDS, CHECKPOINT_MILLISECONDS = 900, 600  # for which each frame of an animation is shown

# ------------------------------------------------------------------ a model to draw


class TrainedModel:
    """A model to draw, with its data and its memory, if any.

    Args: checkpoint: of checkpoints.load; dataset: None if unavailable; other_data: the name of the data set if the model
        was not trained on it, else ""
    """

    def __init__(self, name, checkpoint, dataset=None, other_data=""):
        self.name, self.folder, self.path = name, util.SAVE / name, pathlib.Path(checkpoint["path"])
        self.dataset, self.other_data = dataset, other_data
        self.memory = checkpoints.get_programs(checkpoint)  # programs of the images that it was trained on
        self.iteration, self.num_alphabets = checkpoint["iteration"], checkpoint["num_alphabets"]
        self.settings = checkpoint["settings"]
        self.generative_model, self.inference_network = models.from_checkpoint(checkpoint)

    @property
    def remembers(self):
        """Whether its memory holds programs of the data's images"""
        return self.memory is not None and not self.other_data

    @functools.cached_property
    def is_latest(self):
        """Whether this was the newest checkpoint of the run when it was read"""
        latest = checkpoints.get_path(self.name)
        if self.path.resolve() == latest.resolve():
            return True
        newest = checkpoints.load_newest(latest, warn=lambda _: None)  # damage has been reported, or does not matter here
        return newest is None or self.iteration >= newest["iteration"]

    def get_title(self):
        data_name = f", reading {self.other_data}, which it was not trained on" if self.other_data else ""
        return f"{self.name}, iteration {self.iteration}{data_name}"

    def get_stem(self, kind):
        """The stem of a file in the run's folder"""
        return f"{kind}/{self.iteration}" + (f"-{self.other_data}" if self.other_data else "")

    def get_images(self, obs_id):
        """Training images by index: obs [N, R, C]; their alphabets [N, L], or None for an unconditional model"""
        split = self.dataset.train
        return split.obs[obs_id], split.alphabet[obs_id] if self.num_alphabets else None

    def reconstruct(self, obs_id):
        """Programs of training images, the best in the memory or else inferred: [N, A, 2]"""
        if self.remembers:
            return models.unpack(self.memory[obs_id, 0])
        obs, alphabet = self.get_images(obs_id)
        best = []
        for ids in torch.arange(len(obs)).split(BATCH_SIZE):
            given = None if alphabet is None else alphabet[ids]
            latent = self.inference_network.sample(obs[ids], NUM_PROPOSALS, given)  # [P, B, A, 2]
            log_joint = scoring.score(self.generative_model, latent, obs[ids], given)
            best.append(latent[log_joint.argmax(0), torch.arange(len(ids))])
        return torch.cat(best)

    def see(self, obs_id, resolution):
        """Training images, and their programs as the model sees them: [N, R, R] each"""
        obs, latent = self.get_images(obs_id)[0], self.reconstruct(obs_id)
        drawing = variation.get_drawing(self.generative_model, latent, obs)
        return drawings.resize(obs, resolution), variation.get_probs(drawing, resolution, resolution)

    def get_alphabet_name(self, obs_id):
        """The name of a training image's alphabet; "" if there are no alphabets"""
        alphabet = self.dataset.train.alphabet
        return "" if alphabet is None else self.dataset.alphabet_names[alphabet[obs_id].argmax()]

    def get_usage(self):
        """Each primitive's share of the strokes in the memory or, if there is none, in samples from the prior: [K]"""
        if self.memory is not None:
            latent = models.unpack(self.memory.flatten(0, 1))
        else:
            with torch.random.fork_rng(devices=[]):
                latent = self.generative_model.sample_latent(NUM_COUNTED)
        visible = latent[..., 0][latent[..., 1] > 0]
        counts = visible.bincount(minlength=len(self.generative_model.pre_theta))
        return counts / counts.sum().clamp(min=1)


# ------------------------------------------------------------------ files


def choose_ids(given, num_all, num_default, flag):
    """The given ids or, if none, evenly spaced ones. Raises: UserError if an id is out of range"""
    if given and max(given) >= num_all:
        raise UserError(f"{flag} {max(given)}: there are {num_all}, counted from 0")
    return torch.tensor(given) if given else data.spread(num_all, num_default)


def save_figures(trained, stem, some_figures):
    """Writes an iterable of figures as the pages of a PDF in the run's folder and, for the newest checkpoint with its own data,
    the first as a thumbnail. Args: stem: <kind>, or <kind>/<name>"""
    pages = iter(some_figures)
    first = next(pages)
    figures.save_pdf(trained.folder / f"{stem}.pdf", itertools.chain([first], pages))
    if trained.is_latest and not trained.other_data:
        thumbnail = io.BytesIO()
        first.set_layout_engine(None)  # it is laid out for the PDF already
        first.savefig(thumbnail, format="png", dpi=overview.THUMBNAIL_PIXELS / first.get_size_inches()[0])
        util.write(overview.get_thumbnail_path(trained.name, stem.split("/")[0]), thumbnail.getvalue())


def save_film(path, frames, milliseconds):
    """Writes frames [H, W, 3] as an animated GIF that pauses at the last one"""
    durations = [milliseconds] * (len(frames) - 1) + [4 * milliseconds] if len(frames) > 1 else milliseconds
    util.write(path, imageio.imwrite("<bytes>", frames, extension=".gif", duration=durations, loop=0))


# ------------------------------------------------------------------ what is drawn


def draw_losses(trained, checkpoint):
    """Writes losses.pdf or, for an older checkpoint, losses/<iteration>.pdf"""
    statistics = checkpoint["statistics"]
    if not figures.get_curves(statistics):
        print(f"{trained.name}: no losses in this checkpoint")
        return
    log_num_images = None
    if trained.memory is not None:  # the entropy of a prior with one equally probable program per image
        log_num_images = math.log(len(trained.memory) / max(trained.num_alphabets, 1))
    tested = "training images" if checkpoint["args"]["small_dataset"] else "test images"  # by main.py --test-interval
    figure = figures.losses_figure(statistics, log_num_images, f"{trained.name}, iteration {trained.iteration}", tested)
    save_figures(trained, "losses" if trained.is_latest else f"losses/{trained.iteration}", [figure])


def draw_model(trained, args):
    """Draws what needs no data: the library of strokes and samples from the prior"""
    model, iteration = trained.generative_model, trained.iteration
    source = "memory" if trained.memory is not None else "prior"
    title = f"{trained.name}, iteration {iteration}: "
    figure = figures.primitives_figure(model, args.resolution, f"{title}primitives", trained.get_usage(), source)
    save_figures(trained, f"primitives/{iteration}", [figure])
    latent, _ = model.sample(args.num_prior_samples)
    maps = model.likelihood.sample_maps(len(latent))
    probs = drawings.draw(model, latent, args.resolution, maps)
    title += "samples from the prior" + ", through random maps" * (maps is not None)
    save_figures(trained, f"prior/{iteration}", [figures.grid_figure(probs, figures.choose_num_cols(len(probs)), title)])


def draw_reconstructions(trained, args):
    """Returns: obs_id [N], obs [N, R, C] and a Drawing of their programs, for the animations"""
    obs_id = choose_ids(args.obs_ids, len(trained.dataset.train.obs), args.num_reconstructions, "--obs-ids")
    obs, alphabet = trained.get_images(obs_id)
    latent = trained.reconstruct(obs_id)  # [N, A, 2]
    log_joint = scoring.score(trained.generative_model, latent.unsqueeze(0), obs, alphabet)[0].tolist()
    source = "memory" if trained.remembers else "inference network"
    title = f"{trained.get_title()}: programs of {'' if trained.other_data else 'training '}images ({source})"
    labels = [
        "\n".join(filter(None, [f"image {i}", trained.get_alphabet_name(i), f"{score:.0f} nats"]))
        for i, score in zip(obs_id.tolist(), log_joint, strict=True)
    ]
    drawing = variation.get_drawing(trained.generative_model, latent, obs)
    pages = figures.stroke_figures(obs, drawing, labels, title, args.resolution)
    save_figures(trained, trained.get_stem("reconstructions"), pages)
    if args.svg:
        folder = trained.folder / trained.get_stem("reconstructions")
        map_ids = drawings.get_map_ids(trained.generative_model, latent, obs)
        for i, name in enumerate(obs_id.tolist()):
            program = drawings.get_program(drawing.select([i]), latent[i], map_ids[i])
            drawings.save_program(folder / str(name), program, iteration=trained.iteration, obs_id=name, log_joint=log_joint[i])
    return obs_id, obs, drawing


def film_strokes(trained, obs, drawing, resolution):
    """Animates reconstructions, drawn stroke by stroke beside their images"""
    first = slice(2 * NUM_FILMED)
    obs, stages = drawings.resize(obs[first], resolution), drawings.draw_stages(drawing.select(first), resolution)
    current, frames = torch.zeros_like(obs), []
    for i, stage in enumerate([torch.zeros_like(obs), *stages.unbind(1)]):
        if len(frames) and stage.isnan().all():
            break
        current = torch.where(stage.isnan(), current, stage)
        frames.append(figures.pair_frame(obs, current, f"{trained.get_title()}: images and programs, {i} strokes"))
    save_film(trained.folder / f"{trained.get_stem('reconstructions')}.gif", frames, STROKE_MILLISECONDS)


def film_training(trained, obs_id, args):
    """Animates the same characters over the course of training, unless an older checkpoint or other data are drawn"""
    numbered = [path for path in checkpoints.get_numbered(trained.path.parent) if int(path.stem) < trained.iteration]
    if not numbered or not trained.is_latest or trained.other_data:
        return
    obs_id, frames = obs_id[:NUM_FILMED], []
    for path in [*(numbered[i] for i in data.spread(len(numbered), MAX_FRAMES - 1)), trained.path]:
        try:
            checkpoint = checkpoints.load(path)
            if not checkpoints.is_of_run(checkpoint, trained.settings):
                continue
            then = TrainedModel(trained.name, checkpoint, trained.dataset)
        except UserError as error:
            print(f"{trained.name}: {error}, left out of the animation")
            continue
        title = f"{trained.name}: images and programs at iteration {then.iteration}"
        frames.append(figures.pair_frame(*then.see(obs_id, args.resolution), title))
    save_film(trained.folder / "reconstructions.gif", frames, CHECKPOINT_MILLISECONDS)


def draw_alphabets(trained, args):
    """Draws images of each alphabet, their reconstructions, and new characters"""
    num_cols, num = args.alphabet_num_cols, args.alphabet_num_rows * args.alphabet_num_cols
    alphabet_ids = choose_ids(args.alphabet_ids, trained.num_alphabets, trained.num_alphabets, "--alphabet-ids")
    model, one_hot, pages = trained.generative_model, torch.eye(trained.num_alphabets), []
    for alphabet_id in alphabet_ids.tolist():
        members = trained.dataset.train.alphabet[:, alphabet_id].nonzero().squeeze(1)
        new, _ = model.sample(num, one_hot[alphabet_id].expand(num, -1))
        panels = {"new characters": drawings.draw(model, new, args.resolution)}
        if len(members):
            obs_id = members[data.spread(len(members), num)]
            obs, seen = trained.see(obs_id, args.resolution)
            panels = {"images": obs, "as the model sees them": seen, **panels}
        title = f"{trained.dataset.alphabet_names[alphabet_id]} (--alphabet-ids {alphabet_id}): {trained.get_title()}"
        pages.append(figures.panels_figure(panels, num_cols, title))
    save_figures(trained, trained.get_stem("alphabets"), pages)


# ------------------------------------------------------------------ runs


def read_run(name, checkpoint, args, load_data):
    """Returns: a TrainedModel, with its data if available; names what cannot be drawn without them"""
    dataset, other_data = None, ""
    if not args.loss_only:
        try:
            dataset = data.load_for_model(checkpoint, args.data_location, load_data)
        except (UserError, OSError) as error:
            missing = "reconstructions" + (" and alphabets" if checkpoint["num_alphabets"] else "")
            print(f"{name}: no {missing} without its data: {util.describe_error(error)}")
    if dataset is not None and not data.was_trained_on(checkpoint, dataset):
        location = args.data_location or checkpoint["args"]["data_location"]
        other_data = util.get_location_name(location)
        print(f"{name}: {location} is not its training data; the network infers the programs of its images")
    return TrainedModel(name, checkpoint, dataset, other_data)


def draw_run(name, checkpoint, args, load_data):
    """Draws everything that can be drawn of a run"""
    util.set_seed(0)
    with checkpoints.using(checkpoint):
        trained = read_run(name, checkpoint, args, load_data)
        draw_losses(trained, checkpoint)
        if args.loss_only:
            return
        draw_model(trained, args)
        if trained.dataset is not None:
            obs_id, obs, drawing = draw_reconstructions(trained, args)
            film_strokes(trained, obs, drawing, args.resolution)
            film_training(trained, obs_id, args)
            if trained.num_alphabets:
                draw_alphabets(trained, args)
    print(f"{name}: drawn at iteration {trained.iteration}")


def draw_all(args, load_data):
    """Draws every run in save/, and names those that cannot be drawn"""
    names = sorted(path.name for path in util.SAVE.glob("[!.]*") if path.is_dir() or path.is_symlink())
    if not names:
        print(f"there is no run in {util.SAVE}/ yet; train one with python main.py")
    for name in names:
        try:
            checkpoint = checkpoints.load_newest(checkpoints.get_path(name))
            if checkpoint is None:
                print(f"{name}: no checkpoint yet, skipped")
            else:
                draw_run(name, checkpoint, args, load_data)
        except (UserError, PermissionError) as error:  # save/ may be shared
            print(f"{name}: {util.describe_error(error)}", file=sys.stderr)


def main(argv=None):
    args, load_data = parse_args(argv), functools.cache(data.load_and_tell)
    if args.checkpoint_path is None:
        draw_all(args, load_data)
    else:
        checkpoint = checkpoints.load_given(args.checkpoint_path, parts=())
        draw_run(checkpoints.get_run_name(checkpoint), checkpoint, args, load_data)
    if util.SAVE.is_dir():
        print(f"overview: {overview.write_overview()}")
    return 0


def get_parser():
    parser = util.ArgumentParser(description=__doc__)
    add, positive, natural = parser.add, util.in_range(int, 1), util.in_range(int, 0)
    parser.start_group("what to draw")
    add("--checkpoint-path", "a checkpoint, or a run's folder or name (default: every run in save/)")
    add("--data-location", "as for main.py (default: where each model was trained)", type=util.to_location, default=None)
    add("--loss-only", "draw only losses.pdf", action="store_true")
    add("--num-reconstructions", "number of training images", type=positive, default=100)
    add("--num-prior-samples", "number of samples from the prior", type=positive, default=100)
    add("--obs-ids", "indices of training images (default: evenly spaced)", type=natural, nargs="+")
    add("--alphabet-ids", "indices of alphabets, from 0 (default: all)", type=natural, nargs="+")
    add("--alphabet-num-rows", "rows of characters per alphabet", type=util.in_range(int, 1, 50), default=4)
    add("--alphabet-num-cols", "columns of characters per alphabet", type=util.in_range(int, 1, 50), default=5)
    parser.start_group("how to draw it")
    add("--resolution", "side of a drawing in pixels", type=util.in_range(int, 8, 1024), default=28)
    add("--svg", "also write each reconstruction as SVG, with its program as JSON", action="store_true")
    return parser


def parse_args(argv=None):
    """Raises: UserError if arguments are out of range, or have moved to read.py"""
    flags = [word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    moved = [flag for flag in flags if flag.startswith("--") and flag[2:] in MOVED]
    if moved:
        raise UserError(f"{moved[0]} is gone: read your own characters with python read.py my/*.png; see its --help")
    return get_parser().parse_args(argv)


if __name__ == "__main__":
    util.run_script(main)
