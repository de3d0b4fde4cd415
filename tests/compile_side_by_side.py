"""Compiles kernels as a run does before it begins, for a GPU that need not be there, and prints what was compiled: the names
of kernels, how often, and whether two were being compiled at a time."""

import collections
import json
import pathlib
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import ptx  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import losses  # noqa: E402
import models  # noqa: E402
from fast import gpu, kernel_check  # noqa: E402

compile_kernel, num_compiling, counts = JITFunction.run, 0, collections.Counter()
together = threading.Event()


def watch(kernel, *args, **options):
    global num_compiling
    num_compiling += 1
    if num_compiling > 1:
        together.set()
    together.wait(10)
    compile_kernel(kernel, *args, **options)
    counts[kernel.fn.__name__] += 1
    num_compiling -= 1


def fail():
    raise RuntimeError("this one does not work")


triton.runtime.driver.set_active(ptx.Driver(90))
JITFunction.run = watch
kernel_check.os.sched_getaffinity = lambda _: range(2)
gpu.is_gpu = lambda device: True
gpu.kernels.use(["drawing", "memory"])
memory = torch.zeros(2, 1, 3, dtype=torch.uint8)
network = models.LookupInferenceNetwork(2, num_arcs=3)
checks = kernel_check.get_checks(models.GenerativeModel(num_arcs=3), network, 1, 2, torch.device("cpu"))
functions = [fail, *checks["drawing"], kernel_check.get_memory_check(memory, memory.clone(), losses.remember, "cpu")]
kernel_check.compile_side_by_side(functions, torch.device("cpu"))
print(json.dumps({"kernels": counts, "together": together.is_set(), "restored": JITFunction.run is watch}))
