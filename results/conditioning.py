"""How much it helps a conditional model to know the alphabet of unseen drawings.

    python -m results.conditioning --checkpoint-path "pretrained/a_mws_5_batch-size=50"     # nine minutes on one core

Programs of test images are searched for under the prior of a mixture of all alphabets, which favours none: that of the mean
of their one-hot vectors. The sum of p(z, x | alphabet) over these programs bounds p(x | alphabet) from below, for every
alphabet. Prints how far the right alphabet's bound is above the mean of the wrong ones, with a 95 % interval over images, and
how often it is the highest.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import math

import torch

import data
import models
import rendering
import scoring
import util
from reading import search
from results import report
from runs import checkpoints

NUM_RANKS = 5


def get_bounds(model, network, obs, num_alphabets, effort):
    """Lower bounds on log p(x | alphabet) by the programs that a search finds: obs [R, C] -> [L], nats"""
    alphabets = torch.eye(num_alphabets)  # [L, L]
    proposals = network.sample(obs.expand(num_alphabets, -1, -1), math.ceil(search.NUM_PROPOSALS / num_alphabets), alphabets)
    latent, _ = search.find(model, obs, alphabets.mean(0), proposals.flatten(0, 1), effort=effort)  # [N, A, 2]
    return scoring.score(model, latent.unsqueeze(1).expand(-1, num_alphabets, -1, -1), obs.unsqueeze(0), alphabets).logsumexp(0)


def describe(bounds, right):
    """Describes bounds [N, L], given the right alphabets [N]"""
    num_images, num_alphabets = bounds.shape
    of_right = bounds.gather(1, right.unsqueeze(1)).squeeze(1)
    gain = of_right - (bounds.sum(1) - of_right) / (num_alphabets - 1)  # [N]
    half = report.get_half_width(gain)
    # Of alphabets that tie, as all do in a model that ignores them, each is as likely to be the first as any other
    better, equal = (compare(bounds, of_right.unsqueeze(1)).sum(1) for compare in (torch.gt, torch.eq))  # [N]
    num_best = min(NUM_RANKS, num_alphabets - 1)
    highest, among = (((num - better) / equal).clamp(0, 1).sum().item() for num in (1, num_best))
    evidence = (of_right - (bounds.logsumexp(1) - math.log(num_alphabets))).mean().item()
    return (
        f"{num_images} unseen images, {num_alphabets} alphabets\n"
        f"log p(x | right alphabet) is {gain.mean():.2f} nats per image above the mean of the wrong ones (95 % interval"
        f" {gain.mean() - half:.2f} to {gain.mean() + half:.2f}), {abs(evidence):.2f} {'above' if evidence > 0 else 'below'} log p(x) without"
        f" knowing it\nthe right alphabet is the most probable one for {highest:.3g} images (by chance:"
        f" {num_images / num_alphabets:.3g}), and among the best {num_best} for {among:.3g}"
        f" ({num_best * num_images / num_alphabets:.3g})"
    )


def main():
    parser = util.ArgumentParser(description=__doc__)
    parser.add("--checkpoint-path", "a conditional model", required=True)
    parser.add("--num-data", "number of test images, evenly spread", type=util.in_range(int, 2), default=50)
    parser.add("--effort", "as for eval_logp.py", type=util.in_range(float, 0.01), default=1.0)
    parser.add("--data-location", "as for main.py (default: where the model was trained)", type=util.to_location, default=None)
    parser.add("--seed", "seed of all random numbers", type=util.in_range(int), default=0)
    args = parser.parse_args()
    checkpoint = checkpoints.load_given(args.checkpoint_path)
    num_alphabets = checkpoint["num_alphabets"]
    if num_alphabets < 2:
        raise util.UserError(f"{args.checkpoint_path} is not conditional on the alphabet; give one that is")
    dataset = data.load_for_model(checkpoint, args.data_location)
    if not data.was_trained_on(checkpoint, dataset):
        util.warn("these are not the data that the model was trained on: it may have seen some of the images")
    images = dataset.test.select(data.spread(len(dataset.test.obs), args.num_data))
    data.warn_of_common(images, dataset.train)
    model, network = models.from_checkpoint(checkpoint)
    rendering.set_compile(True)
    util.set_seed(args.seed)
    effort = search.Effort().scale(args.effort)
    with torch.no_grad():
        progress = util.show_progress(images.obs, desc="searching", unit="image")
        bounds = torch.stack([get_bounds(model, network, obs, num_alphabets, effort) for obs in progress])
    if bounds.isnan().any():
        raise util.UserError(f"{args.checkpoint_path}: log p is not a number")
    print(describe(bounds, images.alphabet.argmax(1)))
    return 0


if __name__ == "__main__":
    util.run_script(main)
