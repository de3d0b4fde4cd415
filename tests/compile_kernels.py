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

from fast import (
    triton_convolution,  # noqa: E402
    triton_decoder,  # noqa: E402
    triton_memory,  # noqa: E402
    triton_rendering,  # noqa: E402
)

compile_kernel, results = JITFunction.run, []
SHOWN = ["SAMPLE", "SAVE", "UNITS", "num_warps"]  # what tells the kernels of a name apart


def run(kernel, *args, grid, warmup, **options):
    """In place of a launch"""
    compiled = compile_kernel(kernel, *args, grid=grid, warmup=True, **options)
    registers, stack = ptx.get_resources(compiled)
    code = ptx.dump(compiled, "-sass")
    num_instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP|BRA `\(\.L_x_\d+\))", code, re.M))
    sizes = " ".join(str(options[name]) for name in SHOWN if name in options)
    results.append(dict(kernel=kernel.fn.__name__, sizes=sizes, registers=registers, stack=stack,
                        shared=compiled.metadata.shared, instructions=num_instructions))  # fmt: skip


triton.runtime.driver.set_active(ptx.Driver(int(sys.argv[1])))
JITFunction.run = run
arcs, on, params = torch.zeros(2, 10, 7), torch.ones(2, 10, dtype=torch.bool), torch.ones(2)
logits, arc_id = triton_rendering.draw(arcs, on, params, 28, 28, -13.8)
triton_rendering.differentiate_draw(arcs, on, params, arc_id, logits, 28, 28, -13.8)
obs, maps = torch.zeros(2, 28, 28), torch.zeros(40, 2, 3)
log_prob, by_map, probs = triton_rendering.score_maps(obs, obs, maps, 1e-7)
triton_rendering.differentiate_score_maps(obs, maps, log_prob, by_map, probs, log_prob, 1e-7, 1e-7)
out, argmax = triton_convolution.convolve(obs, torch.zeros(64, 1, 3, 3), torch.zeros(64))
triton_convolution.differentiate_convolve(obs, argmax, out)
out, argmax = triton_convolution.pool(torch.zeros(2, 14, 14, 128), torch.zeros(128))
triton_convolution.differentiate_pool(argmax, out)
memory, latent = torch.zeros(2, 10, 10, dtype=torch.uint8), torch.zeros(20, 2, 10, 2, dtype=torch.int64)
triton_memory.get_candidates(memory, latent[0, :, 0, 0], latent[10:])
triton_memory.keep_best(memory, latent[0, :, 0, 0], latent, torch.zeros(20, 2), torch.zeros(2))
for num_units, triton_decoder.NUM_MULTIPROCESSORS in itertools.product((4, 64, 128), (128, 0)):  # few programs, and many
    weights = torch.zeros(4 * num_units, num_units), torch.zeros(66, num_units), torch.zeros(66)
    given = torch.zeros(128, 4 * num_units), torch.zeros(2, 4 * num_units), *weights
    latent, uniform = torch.zeros(2, 10, 2, dtype=torch.int64), torch.zeros(2, 10, 2)
    for save in (False, True):
        triton_decoder.decode(*given, uniform, latent, 0.0, save)
        log_prob, _, *saved = triton_decoder.decode(*given, uniform[:0], latent, 0.0, save)
    triton_decoder.differentiate_decode(*weights[:2], latent, log_prob, *saved, 0.0)
print(f"{'kernel':28}{'':18}registers  stack  shared  instructions")
for r in results:
    print(f"{r['kernel']:28}{r['sizes']:18}{r['registers']:9}{r['stack']:7}{r['shared']:8}{r['instructions']:14}")
