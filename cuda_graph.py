"""A step on a GPU, recorded once and replayed: one launch instead of a thousand.

The kernels of a training step are short, and launched one by one from Python they
keep a GPU waiting most of the time. A CUDA graph is launched as a whole. What it
records must not look at a value on the GPU, so the steps of `losses` do not.
"""

import collections
import sys

import torch

NUM_WARM_UPS = 3  # calls that compile kernels and allocate what stays, before a step is recorded


class ReplayedStep:
    """Calls step, a function of tensors on a GPU to a dict of scalars that may change models,
    optimisers and memories in place. The first calls with inputs of some shapes run it as it is;
    it is then recorded, and from then on replayed: the same kernels, random numbers and results.
    A step that cannot be recorded runs as it is, after one line of warning."""

    def __init__(self, step):
        self.step, self.stream = step, torch.cuda.Stream()
        self.num_calls, self.recordings = collections.Counter(), {}  # by the inputs' shapes

    def __call__(self, *inputs):
        shapes = tuple(x.shape for x in inputs)
        if self.num_calls[shapes] == NUM_WARM_UPS:
            self.recordings[shapes] = self._record(inputs)
        self.num_calls[shapes] += 1
        if not self.recordings.get(shapes):
            return self._call(inputs)
        graph, places, names, values = self.recordings[shapes]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return dict(zip(names, values.clone().unbind(), strict=True))  # the next replay writes over them

    def _call(self, inputs):
        """On the stream that records: what autograd and the allocator tie to a stream belongs to that one"""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            statistics = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return statistics

    def _record(self, inputs):
        """Returns: the graph, its inputs, names and values of the statistics, or None where it can't be recorded"""
        places, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                statistics = self.step(*places)
                values = torch.stack(list(statistics.values()))
        except RuntimeError as error:  # of CUDA, or of an operation that looks at values
            reason = str(error).strip().split("\n")[0][:100]
            print(f"warning: no CUDA graph, training is slower: {reason}", file=sys.stderr)
            return None
        return graph, places, list(statistics), values
