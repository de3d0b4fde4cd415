"""Makes Triton's interpreter as strict as a GPU with compute-sanitizer, which finds what may go unnoticed on a CPU.

Every address that a kernel reads or writes must lie in one of its arguments. Programs run from the last to the first: on
a GPU their order is anyone's guess. What a kernel allocates is filled with NaN until it is written.
"""

import numpy as np
import torch
import triton
from triton.runtime import interpreter

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


class Checked:
    """Stands for the interpreter's functions that access memory"""

    def __init__(self, module):
        self.module, self.places = module, np.empty((0, 2), np.uint64)

    def __getattr__(self, name):
        return getattr(self.module, name)

    def enter(self, arguments):
        """Call with the arguments of each kernel"""
        tensors = [x for x in arguments if torch.is_tensor(x)]
        assert all(x.is_contiguous() for x in tensors), "kernels take contiguous tensors"
        places = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
        self.places = np.array(places, np.uint64).reshape(-1, 2)

    def check(self, address, mask, size):
        address = address[np.broadcast_to(mask, address.shape).astype(bool)].reshape(-1, 1)
        inside = (address >= self.places[:, 0]) & (address + np.uint64(size) <= self.places[:, 1])
        if not inside.any(1).all():
            raise IndexError(f"{(~inside.any(1)).sum()} addresses lie in none of the kernel's arguments")

    def load(self, address, mask, other, dtype):
        self.check(address, mask, np.dtype(dtype).itemsize)
        return self.module.load(address, mask, other, dtype)

    def store(self, address, value, mask):
        self.check(address, mask, value.dtype.itemsize)
        return self.module.store(address, value, mask)

    def atomic_rmw(self, operation, address, value, mask, semantics):
        self.check(address, mask, value.dtype.itemsize)
        return self.module.atomic_rmw(operation, address, value, mask, semantics)


def be_strict(patch):
    """Args: patch: pytest's monkeypatch"""
    checked, executor, builder = Checked(interpreter._interpreter), interpreter.GridExecutor, interpreter.InterpreterBuilder
    init_args, set_grid_idx = executor._init_args_hst, builder.set_grid_idx

    def init_args_and_enter(self, *given):
        args, kwargs = init_args(self, *given)
        checked.enter([*args, *kwargs.values()])
        return args, kwargs

    def set_reversed_grid_idx(self, *position):
        set_grid_idx(self, *(size - 1 - i for size, i in zip(self.grid_dim, position, strict=True)))

    patch.setattr(interpreter, "_interpreter", checked)
    patch.setattr(executor, "_init_args_hst", init_args_and_enter)
    patch.setattr(builder, "set_grid_idx", set_reversed_grid_idx)
    patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    if VERSION < (3, 7):
        accept_numpy(patch)


def accept_numpy(patch):
    """Before Triton 3.7 the interpreter takes int() of an array of one number, which numpy 2.4 refuses"""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
