"""CUDA graphs: a step is recorded once, then replayed with one launch instead of a thousand.

The kernels of a training step are short; launched one by one from Python they leave the GPU
idle most of the time. A CUDA graph is launched as a whole. A recorded step must not read
values from the GPU, and those in losses.py do not.
"""

import collections
import sys

import torch

NUM_WARM_UPS = 3  # calls before a step is recorded, which compile kernels and allocate what persists


class ReplayedStep:
    """Wraps a step: a function from tensors on a GPU to a dict of scalars, which may change models,
    optimisers and memories in place. The first few calls for given input shapes run the step itself;
    then it is recorded and from then on replayed, with the same kernels, random numbers and results.
    A step that cannot be recorded keeps running as it is, after a one-line warning."""

    def __init__(self, step):
        self.step, self.stream = step, torch.cuda.Stream()
        self.num_calls, self.recordings = collections.Counter(), {}  # keyed by the inputs' shapes

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
        return dict(zip(names, values.clone().unbind(), strict=True))  # the next replay overwrites them

    def _call(self, inputs):
        """Runs the step on the recording stream, to which autograd and the allocator then tie what they keep"""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            statistics = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return statistics

    def _record(self, inputs):
        """Returns: the graph, its inputs, names and values of the statistics; None if it cannot be recorded"""
        places, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                statistics = self.step(*places)
                values = torch.stack(list(statistics.values()))
        except RuntimeError as error:  # from CUDA, or from an operation that reads values
            reason = str(error).strip().split("\n")[0][:100]
            print(f"warning: no CUDA graph, training is slower: {reason}", file=sys.stderr)
            return None
        return graph, places, list(statistics), values
