"""Whether the search finds programs of images that a model has drawn itself.

    python -m results.planted --checkpoint-path pretrained/mws_5.pt     # four minutes on one core

Such an image has a known program. A search is not told it, and should find one that is at least as probable; how far it falls
short is a part of its error that agreement between searches cannot show.
"""

from fast import before_torch  # noqa: F401  # isort: skip
import torch

import models
import rendering
import scoring
import util
from reading import search
from runs import checkpoints


def get_advantages(model, network, num, effort):
    """Draws images, and searches for their programs.

    Args: num: number of images; effort: search.Effort
    Returns: log p(z, x) of the best program found less that of the one that drew the image, [num], nats
    """
    alphabet = model.sample_alphabet(num) if model.num_alphabets else None  # [num, L]
    latent, obs = model.sample(num, alphabet)
    planted = scoring.score(model, latent.unsqueeze(0), obs, alphabet).squeeze(0)  # [num]
    proposals = network.sample(obs, search.NUM_PROPOSALS, alphabet)  # [P, num, A, 2]
    found = []
    for i in util.show_progress(range(num), desc="searching", unit="image"):
        given = None if alphabet is None else alphabet[i]
        found.append(search.find(model, obs[i], given, proposals[:, i], 1, effort)[1])
    return torch.cat(found) - planted


def describe(advantages):
    """Describes the result of `get_advantages`, [num]"""
    shortfall = (0 - advantages).clamp(min=0)
    return (
        f"a program at least as probable as the one that drew it is found for {int((shortfall < 0.01).sum())} of"
        f" {len(advantages)} images; the best one found falls short by {shortfall.mean():.2f} nats on average over all of them,"
        f" and by at most {shortfall.max():.1f}"
    )


def main():
    parser = util.ArgumentParser(description=__doc__)
    parser.add("--checkpoint-path", "checkpoint of main.py, or a run's folder or name for its latest one", required=True)
    parser.add("--num-data", "number of images", type=util.in_range(int, 1), default=25)
    parser.add("--effort", "as for eval_logp.py", type=util.in_range(float, 0.01), default=1.0)
    parser.add("--seed", "seed of all random numbers", type=util.in_range(int), default=0)
    args = parser.parse_args()
    model, network = models.from_checkpoint(checkpoints.load_given(args.checkpoint_path))
    rendering.set_compile(True)
    util.set_seed(args.seed)
    with torch.no_grad():
        print(describe(get_advantages(model, network, args.num_data, search.Effort().scale(args.effort))))
    return 0


if __name__ == "__main__":
    util.run_script(main)
