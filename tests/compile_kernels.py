"""Compiles every Triton kernel for a GPU that need not be there, at the sizes of the paper's setting, and prints
what each needs: its registers per thread, the bytes of a thread's stack, where spilled registers go, the bytes of shared
memory per program, and how many instructions it has. Usage: compile_kernels.py CAPABILITY"""

import itertools
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import ptx  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fast import gpu, triton_decoder  # noqa: E402

compile_kernel = JITFunction.run
SHOWN = ["SAMPLE", "SAVE", "UNITS", "num_warps"]  # what tells the kernels of a name apart


def run(kernel, *args, grid, warmup, **options):
    """In place of a launch"""
    compiled = compile_kernel(kernel, *args, grid=grid, warmup=True, **options)
    registers, stack = ptx.get_resources(compiled)
    code = ptx.dump(compiled, "-sass")
    num_instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP|BRA `\(\.L_x_\d+\))", code, re.M))
    sizes = " ".join(str(options[name]) for name in SHOWN if name in options)
    name, shared = kernel.fn.__name__, compiled.metadata.shared
    print(f"{name:28}{sizes:18}{registers:9}{stack:7}{shared:8}{num_instructions:14}")


triton.runtime.driver.set_active(ptx.Driver(int(sys.argv[1])))
JITFunction.run = run
print(f"{'kernel':28}{'':18}registers  stack  shared  instructions")
arcs, on, params = torch.zeros(2, 10, 7, requires_grad=True), torch.ones(2, 10, dtype=torch.bool), torch.ones(2)
gpu.DrawArcs.apply(arcs, on, params, 28, 28).sum().backward()
obs, maps = torch.zeros(2, 28, 28), torch.zeros(40, 2, 3, requires_grad=True)
gpu.ScoreMaps.apply(obs, obs, maps, None).sum().backward()
gpu.Convolve.apply(obs, torch.zeros(64, 1, 3, 3, requires_grad=True), torch.zeros(64)).sum().backward()
gpu.Pool.apply(torch.zeros(2, 128, 14, 14, requires_grad=True), torch.zeros(128)).sum().backward()
memory, proposal = torch.zeros(2, 10, 10, dtype=torch.uint8), torch.zeros(10, 2, 10, 2, dtype=torch.int64)
latent = gpu.get_candidates(memory, torch.arange(2), proposal)
gpu.remember(memory, torch.arange(2), latent, torch.zeros(20, 2), torch.zeros(2))
for num_units, triton_decoder.NUM_MULTIPROCESSORS in itertools.product((4, 64, 128), (128, 0)):  # few programs, and many
    weights = torch.zeros(4 * num_units, num_units), torch.zeros(66, num_units), torch.zeros(66)
    given = torch.zeros(128, 4 * num_units, requires_grad=True), torch.zeros(2, 4 * num_units), *weights
    gpu.sample(*given, 1, 10, 0.0)[1].sum().backward()
    gpu.log_prob(*given, proposal[0], 0.0).sum().backward()
    with torch.no_grad():
        gpu.sample(*given, 1, 10, 0.0)
        gpu.log_prob(*given, proposal[0], 0.0)
