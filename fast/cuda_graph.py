"""CUDA graphs: a step is recorded once, then replayed with one launch instead of some two hundred.

The kernels of a training step are short; launched one by one from Python, they leave the GPU idle most of the time. A CUDA
graph is launched as a whole. A recorded step must not read values from the GPU, and the objectives in losses.py do not.
"""

import collections
import contextlib

import torch
from torch.utils._pytree import tree_leaves

from util import get_reason, warn

NUM_WARM_UPS = 3  # calls before a step is recorded, to compile kernels and allocate what persists


class ReplayedStep:
    """Wraps a step: a function from tensors on a GPU to a dict of scalars, which may change models, optimisers and memories in
    place. The first few calls for given input shapes run the step itself; it is then recorded, and replayed from then on, with
    the same kernels, random numbers and results. A step that cannot be recorded keeps running as it is, after a one-line
    warning. Args: device: where the step's tensors are; by default, the current GPU"""

    def __init__(self, step, device=None):
        self.step, self.device, self.stream = step, device, torch.cuda.Stream(device)
        self.num_calls, self.recordings = collections.Counter(), {}  # keyed by the inputs' shapes
        self.can_record = True

    def __call__(self, *inputs):
        shapes = tuple(x.shape for x in inputs)
        if self.can_record and self.num_calls[shapes] == NUM_WARM_UPS:
            self._record(shapes, inputs)
        self.num_calls[shapes] += 1
        if shapes not in self.recordings:
            # Clones are aligned in memory as when the step is recorded, so that the same kernels are compiled
            return self._call([x.clone() for x in inputs])
        graph, places, names, values = self.recordings[shapes]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return dict(zip(names, values.clone().unbind(), strict=True))  # the next replay overwrites them

    def _call(self, inputs):
        """Runs the step on the recording stream, so that autograd and the allocator tie what they keep to it"""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            statistics = self.step(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return statistics

    def _record(self, shapes, inputs):
        """Records the graph, its inputs, and the names and values of the statistics; if that fails, gives up recording"""
        places, graph, before = [x.clone() for x in inputs], torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                statistics = self.step(*places)
                values = torch.stack(list(statistics.values())) if statistics else torch.empty(0)
        except Exception as error:  # from CUDA, an operation that reads values, or an optimiser that cannot be recorded
            self._give_up(before, error)
        else:
            self.recordings[shapes] = graph, places, list(statistics), values

    def _give_up(self, stream, error):
        """A failed capture may leave its stream current, and the random generator marked as being captured, so that it refuses
        to work from then on. Earlier recordings would continue with the generator's old state."""
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        self.recordings.clear()
        self.can_record = False
        cause = error.__context__ or error  # ending the capture also fails, and hides the original error
        warn(f"no CUDA graph, steps are slower: {get_reason(cause, 100)}")


def check_recordable(optimizer):
    """Raises: RuntimeError if a step is being recorded and the optimiser counts steps on the CPU, where replays would not count"""
    if torch.cuda.is_current_stream_capturing():
        values = [x for x in tree_leaves(list(optimizer.state.values())) if x is not None]
        if not all(torch.is_tensor(x) and x.device.type != "cpu" for x in values):
            raise RuntimeError(f"{type(optimizer).__name__} keeps part of its state on the CPU")
