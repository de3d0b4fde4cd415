"""Runs Triton's compiled kernels without a GPU: a stand-in for NVIDIA's driver that carries out their PTX, with numpy.

It is stricter than a GPU with compute-sanitizer. Every address must lie in one of the kernel's arguments or in the shared
memory it asked for, and be aligned. Registers and shared memory are NaN until written. Two warps must not touch one place
between two barriers, nor two programs at all, if one of them changes it, but by sums of integers. A warp's threads must
all take part in what they do together, and agree on what they write to one place. All warps run side by side.

Numbers are as on a GPU but for the last bits of its approximate functions (ex2, lg2, sqrt, div).
"""

import collections
import functools
import pathlib
import re
import subprocess
import tempfile

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
LANES = 32
GLOBAL = 1 << 40  # where the arguments lie; shared memory begins at 0
GAP = 256  # bytes between two arguments, which nobody may touch
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
         for kind, letter in [("u", "u"), ("b", "u"), ("s", "i")] for bits in (8, 16, 32, 64)}  # fmt: skip
REGISTERS = {"%rs": TYPES["u16"], "%rd": TYPES["u64"], "%SP": TYPES["u64"]}  # others have 32 bits
TYPES.update(f32=np.dtype("f4"), f64=np.dtype("f8"))

# ------------------------------------------------------------------ reading PTX

Instruction = collections.namedtuple("Instruction", "guard negated name operands function kinds text")
Block = collections.namedtuple("Block", "instructions end together")  # end: bra, ret or bar, an Instruction, or None


class Kernel:
    """The entry function of a PTX module: parameters (name -> type), constants (name -> bytes), blocks, labels
    (name -> index of a block)"""

    def __init__(self, ptx):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        head, body = re.search(r"\.entry\s+\w+\((.*?)\).*?\n\{(.*?)\n\}", ptx, re.S).groups()
        self.parameters = {name: TYPES[kind] for kind, name in re.findall(r"\.param\s+\.(\w+).*?(\w+)\s*(?:,|$)", head)}
        declared = re.findall(r"\.global\s+\.align\s+\d+\s+\.b(\d+)\s+(\S+)\[\d+\]\s*=\s*\{(.*?)\}", ptx, re.S)
        self.constants = {
            name: np.array(list(map(int, values.split(","))), UNSIGNED[int(bits)]) for bits, name, values in declared
        }
        self.local_size = sum(map(int, re.findall(r"\.local\s+.*?\.b8\s+\w+\[(\d+)\]", body)))
        self.num_threads = int(re.search(r"\.reqntid\s+(\d+)", ptx)[1])
        self.blocks, self.labels = [], {}
        self._divide(body)

    def _divide(self, body):
        """Blocks end at jumps, at barriers and before labels"""
        instructions = []
        for line in re.split(r"[;\n]", body):
            line = line.strip() if line.strip() not in "{}" else ""  # a scope of its own
            label = re.fullmatch(r"(\$\w+):", line)
            if label or not line or line.startswith("."):
                if label:
                    self._close(instructions, None)
                    self.labels[label[1]] = len(self.blocks)
                continue
            instruction = parse(line)
            if instruction.name[0] in ("bra", "ret") or instruction.name[:2] == ["bar", "sync"]:
                self._close(instructions, instruction)
            else:
                instructions.append(instruction)
        assert not instructions, "a kernel ends with ret"

    def _close(self, instructions, end):
        if instructions or end:
            self.blocks.append(Block(list(instructions), end, any(i.name[0] in TOGETHER for i in instructions)))
            instructions.clear()


def parse(line):
    """An Instruction: its guard, whether that is negated, its name in parts, its operands (those in braces as lists), and
    what it computes from operands of which types, if that is all it does"""
    guard, negated = None, False
    match = re.match(r"@(!?)(%\w+)\s+(.*)", line)
    if match:
        negated, guard, line = match[1] == "!", match[2], match[3]
    name, _, rest = line.partition(" ") if " " in line.split("\t")[0] else line.partition("\t")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest.strip())
    operands = [re.findall(r"[^,\s{}]+", x) if x.startswith("{") else x for x in operands]
    name = name.strip().split(".")
    is_packing = name[0] == "mov" and any(isinstance(x, list) for x in operands)
    function, kinds = get_function(name) if not is_packing and name[0] not in BESIDES else (None, None)
    return Instruction(guard, negated, name, operands, function, kinds, line)


# ------------------------------------------------------------------ what instructions compute


def _float(x):
    return x.astype(np.float64)


def _add_and_round_down(a, b):
    a, b = _float(a), _float(b)
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # what rounding to float64 left out
    rounded = total.astype(np.float32)
    above = (rounded > total) | ((rounded == total) & (error < 0))
    return np.where(above, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _shift_left(a, count):
    bits = a.dtype.itemsize * 8
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a, count):
    """Arithmetically, if a is signed"""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def _get_field(a, position, length):
    bits = a.dtype.itemsize * 8
    return _shift_right(_shift_left(a, (bits - position - length).astype(np.uint32)), (bits - length).astype(np.uint32))


def _get_high(a, b):
    """The upper half of a product"""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)


def _multiply_wide(a, b):
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _divide_integers(a, b):
    """Rounds towards zero"""
    assert b.all(), "division by zero"
    return (np.sign(a) * np.sign(b)).astype(a.dtype) * (np.abs(a) // np.abs(b)) if a.dtype.kind == "i" else a // b


def _convert(a, to, rounding):
    """From one type to another; numbers that an integer type lacks become its nearest, NaN 0"""
    if a.dtype.kind == "f" and to.kind in "iu":
        assert rounding, "rounded to integers how?"
        a = _round(_float(a), rounding)
        limits = np.iinfo(to)
        inside = (a >= limits.min) & (a < float(limits.max))
        whole = np.where(inside, a, 0).astype(to)
        return np.where(inside | np.isnan(a), whole, np.where(a > 0, limits.max, limits.min).astype(to))
    return _round(a, rounding).astype(to) if a.dtype.kind == "f" and to == a.dtype else a.astype(to)


def _round(a, rounding):
    return {"rzi": np.trunc, "rmi": np.floor, "rni": np.rint, "rpi": np.ceil}.get(rounding, lambda x: x)(a)


def _to_tf32(a):
    """To ten bits after the point, half away from zero"""
    bits = a.view(np.uint32)
    return np.where(np.isfinite(a), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _permute_bytes(a, b, selector):
    """prmt in its default mode"""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (chosen & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(chosen & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * i)
    return out


def _funnel_left(low, high, count):
    count = (count & np.uint32(31)).astype(np.uint64)
    return ((high.astype(np.uint64) << np.uint64(32) | low) << count >> np.uint64(32)).astype(np.uint32)


def _count_bits(a):
    return np.unpackbits(a[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)


def _apply_to_pairs(function, *pairs):
    return function(*(np.ascontiguousarray(x).view(np.float32) for x in pairs)).view(np.uint64)


UNARY = {
    "mov": lambda a: a, "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "rcp": np.reciprocal, "popc": _count_bits, "cvta": lambda a: a,
}  # fmt: skip
BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": _shift_left, "shr": _shift_right,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name, a, b):
    if name == "nan":
        return np.isnan(a) | np.isnan(b)
    if name == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if a.dtype.kind == "f":
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            return COMPARISONS[name[:2]](a, b) | unordered
        return COMPARISONS[name](a, b) & ~unordered
    return COMPARISONS[name](a, b)


# do more than compute
BESIDES = ("ld", "st", "red", "atom", "shfl", "redux", "mma", "ldmatrix", "stmatrix", "bar", "bra", "ret")


def get_function(name):
    """What an arithmetic instruction computes, and the types of its operands (one for all, or a list)"""
    if name[-1] == "f32x2":  # two at a time
        function, kinds = get_function([*name[:-1], "f32"])
        return functools.partial(_apply_to_pairs, function), [TYPES["u64"]] * len(kinds)
    first, kind = name[0], TYPES.get(name[-1], np.dtype(bool))
    if "cc" in name or first == "madc":  # carries
        return unknown, [kind] * 3
    if first == "cvt":
        if name[-2:] == ["tf32", "f32"]:
            return _to_tf32, [kind]
        to, rounding = TYPES[name[-2]], next((x for x in name if x in ("rzi", "rmi", "rni", "rpi")), None)
        return lambda a: _convert(a, to, rounding), [kind]
    if first in ("min", "max"):
        ieee, propagating = (np.fmin, np.minimum) if first == "min" else (np.fmax, np.maximum)
        return (propagating if "NaN" in name else ieee), [kind] * 2
    if first == "setp":
        return functools.partial(compare, name[1]), [kind] * 2
    if first == "selp":
        return lambda a, b, p: np.where(p, a, b), [kind, kind, np.dtype(bool)]
    if first in ("mul", "mad", "fma"):
        if kind.kind == "f":
            if first == "mul":
                return np.multiply, [kind] * 2
            return lambda a, b, c: (_float(a) * _float(b) + _float(c)).astype(kind), [kind] * 3
        multiply = {"lo": np.multiply, "hi": _get_high, "wide": _multiply_wide}[name[1]]
        if first == "mul":
            return multiply, [kind] * 2
        sum_kind = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if name[1] == "wide" else kind
        return lambda a, b, c: multiply(a, b) + c, [kind, kind, sum_kind]
    if first in ("div", "rem"):
        if kind.kind == "f":
            return np.divide, [kind] * 2
        return (_divide_integers if first == "div" else lambda a, b: a - _divide_integers(a, b) * b), [kind] * 2
    if first == "bfe":
        return _get_field, [kind, TYPES["u32"], TYPES["u32"]]
    if first == "prmt":
        return _permute_bytes, [kind] * 3
    if name[:3] == ["shf", "l", "wrap"]:
        return _funnel_left, [kind] * 3
    if first in ("shl", "shr"):
        return BINARY[first], [kind, TYPES["u32"]]
    if name[:2] == ["add", "rm"]:
        return _add_and_round_down, [kind] * 2
    if first in BINARY:
        assert "rm" not in name and "rp" not in name and "rz" not in name, name
        return BINARY[first], [kind] * 2
    return UNARY.get(first, unknown), [kind]


def unknown(*_):
    raise NotImplementedError("an instruction that this stand-in does not know")


# ------------------------------------------------------------------ memory


class Accesses:
    """Which warp wrote and read each number of a memory last, and when: how many barriers its program had passed. The first
    byte of a number stands for it; warps are numbered over all programs"""

    SEVERAL = 1 << 40  # in place of a warp

    def __init__(self, size, num_warps):
        self.writer, self.written, self.reader, self.read = (np.full(size, -1) for _ in range(4))
        self.num_warps = num_warps

    def _meets(self, other, then, warp, now):
        """Whether an access by another warp, now or without any barrier that orders it, is in the way"""
        elsewhere = (other != self.SEVERAL) & (other // self.num_warps != warp // self.num_warps)
        together = (then == now) | elsewhere
        return (other != -1) & (other != warp) & together

    def add_reads(self, place, warp, now):
        """Args: each [N]. Raises: AssertionError"""
        assert not self._meets(self.writer[place], self.written[place], warp, now).any(), "a warp reads what another one writes"
        several = self._meets(self.reader[place], self.read[place], warp, now)
        self.reader[place], self.read[place] = np.where(several, self.SEVERAL, warp), now
        crowded = self.reader[place] != warp
        self.reader[place[crowded]] = self.SEVERAL

    def add_writes(self, place, warp, now):
        """Args: each [N], where numbers change. Raises: AssertionError"""
        wrong = self._meets(self.writer[place], self.written[place], warp, now)
        wrong |= self._meets(self.reader[place], self.read[place], warp, now)
        assert not wrong.any(), "a warp overwrites what another one reads or writes"
        self.writer[place], self.written[place] = warp, now


class Memory:
    """A kernel's arguments, one after the other, with gaps; `places` are where they begin"""

    def __init__(self, arrays, num_warps):
        self.arrays, self.places, end = arrays, [], GAP
        for array in arrays:
            self.places.append(GLOBAL + end)
            end += -(-array.nbytes // GAP) * GAP + GAP
        self.bytes, self.exists, self.accesses = np.zeros(end, np.uint8), np.zeros(end, bool), Accesses(end, num_warps)
        for array, place in zip(arrays, self.places, strict=True):
            self._at(place, array)[:] = array.reshape(-1).view(np.uint8)
            self._at(place, array, self.exists)[:] = True

    def _at(self, place, array, of=None):
        return (self.bytes if of is None else of)[place - GLOBAL : place - GLOBAL + array.nbytes]

    def copy_back(self):
        for array, place in zip(self.arrays, self.places, strict=True):
            array.reshape(-1).view(np.uint8)[:] = self._at(place, array)

    def get_index(self, address, mask, size, width):
        """Where numbers lie in units of their size; all of a vector's width must exist. Raises: IndexError"""
        offset = np.where(mask, address - np.uint64(GLOBAL), np.uint64(0))
        wrong = (offset % np.uint64(width) != 0) | (offset + np.uint64(width) > np.uint64(len(self.bytes)))
        safe = np.where(wrong, np.uint64(0), offset)
        wrong |= ~(self.exists[safe] & self.exists[safe + np.uint64(width - 1)])
        if (wrong & mask).any():
            raise IndexError(f"{(wrong & mask).sum()} addresses lie in none of the kernel's arguments, or are not aligned")
        return safe // np.uint64(size)


class PrivateMemory:
    """Shared memory of each program, or local memory of each thread: owner, its number for each thread [S, LANES]"""

    def __init__(self, owner, size, num_warps):
        self.owner, self.size = owner.astype(np.uint64), -(-size // 16) * 16
        self.bytes = np.full((int(owner.max()) + 1) * self.size, 255, np.uint8)
        self.accesses = Accesses(len(self.bytes), num_warps)

    def get_index(self, address, mask, size, width):
        address = np.where(mask, address, 0).astype(np.uint64)
        if (address % np.uint64(width) != 0).any() or (mask & (address + np.uint64(width) > np.uint64(self.size))).any():
            raise IndexError("an address lies outside of the program's shared memory, or is not aligned")
        return (self.owner * np.uint64(self.size) + address) // np.uint64(size)


# ------------------------------------------------------------------ programs


class Launch:
    """The S warps of all programs of a launch, side by side: registers and masks are [S, LANES]"""

    def __init__(self, kernel, grid, parameters, memory, shared_size):
        self.kernel, self.memory, self.parameters, self.blocks = kernel, memory, parameters, kernel.blocks
        num_warps = kernel.num_threads // LANES
        self.shape = int(np.prod(grid)) * num_warps, LANES
        self.warp = np.broadcast_to(np.arange(self.shape[0])[:, None], self.shape)  # numbered over all programs
        self.program, thread = self.warp // num_warps, self.warp * LANES + np.arange(LANES)
        self.special = {"%laneid": np.arange(LANES), "%tid.x": thread % kernel.num_threads}
        rest = self.program
        for axis, size in zip("xyz", grid, strict=True):
            self.special[f"%nctaid.{axis}"], self.special[f"%ctaid.{axis}"], rest = size, rest % size, rest // size
        shared, local = PrivateMemory(self.program, shared_size, num_warps), PrivateMemory(thread, kernel.local_size, num_warps)
        self.spaces = {"global": memory, "shared": shared, "local": local}
        self.registers, self.constants = {}, {}
        self.place = np.zeros(self.shape, int)  # the block that each thread is about to run
        self.waiting = np.zeros(self.shape, bool)  # at a barrier
        self.now = np.zeros(self.shape, int)  # barriers passed

    def run(self):
        while (self.place < len(self.blocks)).any():
            running = ~self.waiting & (self.place < len(self.blocks))
            if running.any():
                self.run_next(running)
            else:
                self.pass_barriers()

    def run_next(self, running):
        """Of several blocks the first is run, so that threads which part meet again; what a warp does together waits for all
        its threads"""
        for number in np.unique(self.place[running]):
            mask = running & (self.place == number)
            if self.blocks[number].together:
                mask &= mask.all(1, keepdims=True)
            if mask.any():
                return self.run_block(number, mask)
        raise AssertionError("some of a warp's threads wait for others that never come")

    def pass_barriers(self):
        """When no thread can go on"""
        alive, last = self.place < len(self.blocks), np.zeros(self.program.max() + 1, int)
        np.maximum.at(last, self.program[alive], self.place[alive])
        assert (self.place == last[self.program])[alive].all(), "a program's threads wait at different barriers"
        self.now += self.waiting
        self.waiting[:] = False

    def run_block(self, number, mask):
        block, everyone = self.blocks[number], bool(mask.all())
        for instruction in block.instructions:
            taken = mask if instruction.guard is None else mask & self.get_guard(instruction)
            try:
                self.execute(instruction, taken, everyone and instruction.guard is None)
            except Exception as error:
                raise type(error)(f"{error}, in: {instruction.text}") from error
        self.place[mask] = number + 1
        if block.end is not None:
            taken = mask if block.end.guard is None else mask & self.get_guard(block.end)
            if block.end.name[0] == "bar":
                self.waiting |= taken
            else:
                to = self.kernel.labels[block.end.operands[0]] if block.end.name[0] == "bra" else len(self.blocks)
                self.place[taken] = to

    def get_guard(self, instruction):
        guard = self.registers[instruction.guard]
        return ~guard if instruction.negated else guard

    # -------------------------------------------------------------- operands

    def read(self, operand, kind):
        """[S, LANES] of a type"""
        value = self.registers.get(operand)
        if value is not None:
            if value.itemsize > kind.itemsize:  # as stores do
                value = value.astype(UNSIGNED[8 * kind.itemsize])
            return value if value.dtype is kind else value.view(kind)
        key = operand, kind
        if key not in self.constants:
            self.constants[key] = self._make_constant(operand, kind)
        return self.constants[key]

    def _make_constant(self, operand, kind):
        shape = self.shape
        if operand in self.special:
            return np.broadcast_to(self.special[operand], shape).astype(kind)
        if operand in self.kernel.constants:
            names = list(self.kernel.constants)
            return np.full(shape, self.memory.places[-len(names) + names.index(operand)], kind)
        if operand == "global_smem" or operand.startswith("__local_depot"):
            return np.zeros(shape, kind)
        if operand.startswith("%"):  # not written yet
            byte = b"\1" if kind.kind == "b" else b"\xff"
            return np.frombuffer(byte * kind.itemsize, kind).repeat(np.prod(shape)).reshape(shape)
        if operand[:2].lower() in ("0f", "0d"):
            value = np.array(int(operand[2:], 16), UNSIGNED[4 * len(operand[2:])]).view(f"f{len(operand[2:]) // 2}")
            return np.full(shape, value).view(kind)
        value = int(operand.rstrip("U"), 0)
        if kind.kind == "b":
            return np.full(shape, value != 0)
        return np.full(shape, value & (1 << 8 * kind.itemsize) - 1, UNSIGNED[8 * kind.itemsize]).view(kind)

    def write(self, register, value, mask, everyone):
        if register == "_":  # a number that nobody needs
            return
        if register[1] != "p":
            kind = REGISTERS.get(register[:3], TYPES["u32"])
            if value.itemsize != kind.itemsize:  # loads extend
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{kind.itemsize}")
            value = value.view(kind)
        if not everyone:
            value = np.where(mask, value, self.read(register, value.dtype))
        self.registers[register] = value

    def get_address(self, operand, space):
        """Of [register + offset]"""
        name, _, offset = operand.strip("[] ").partition("+")
        name = name.strip()
        kind = TYPES["u64"] if name[:3] in ("%rd", "%SP") or name in self.kernel.constants else TYPES["u32"]
        address = self.read(name, kind).astype(np.uint64)
        return address + np.uint64(int(offset or 0) % 2**64)

    # -------------------------------------------------------------- instructions

    def execute(self, instruction, mask, everyone):
        name, (to, *given) = instruction.name, instruction.operands
        if instruction.function is not None:
            value = instruction.function(*map(self.read, given, instruction.kinds))
            self.write(to, value, mask, everyone)
        elif everyone or mask.any():
            assert name[0] not in TOGETHER or mask.all(1)[mask.any(1)].all(), "some of a warp's threads do not take part"
            getattr(self, f"_{name[0]}")(name, instruction.operands, mask, everyone)

    def _mov(self, name, operands, mask, everyone):
        """Packs registers into one of twice the size, or unpacks it"""
        to, given = operands
        half = np.dtype(f"u{TYPES[name[1]].itemsize // 2}")
        if isinstance(to, list):
            parts = np.ascontiguousarray(self.read(given, TYPES[name[1]])).view(half).reshape(*self.shape, 2)
            for i, register in enumerate(to):
                self.write(register, parts[..., i], mask, everyone)
        else:
            parts = np.stack([self.read(x, half) for x in given], -1)
            self.write(to, parts.view(TYPES[name[1]]).squeeze(-1), mask, everyone)

    def _ld(self, name, operands, mask, everyone):
        to, kind = operands[0], TYPES[name[-1]]
        if name[1] == "param":
            value = np.array(self.parameters[operands[1].strip("[] ")]).view(kind)
            return self.write(to, np.full(self.shape, value), mask, everyone)
        registers, space = to if isinstance(to, list) else [to], self.spaces[name[1]]
        address = self.get_address(operands[1], name[1])
        index = space.get_index(address, mask, kind.itemsize, kind.itemsize * len(registers))
        numbers = space.bytes.view(kind)
        for i, register in enumerate(registers):
            place = index + np.uint64(i)
            space.accesses.add_reads(place[mask] * np.uint64(kind.itemsize), self.warp[mask], self.now[mask])
            self.write(register, numbers[place], mask, everyone)

    def _st(self, name, operands, mask, everyone):
        given, kind = operands[1], TYPES[name[-1]]
        registers, space = given if isinstance(given, list) else [given], self.spaces[name[1]]
        index = space.get_index(self.get_address(operands[0], name[1]), mask, kind.itemsize, kind.itemsize * len(registers))
        for i, register in enumerate(registers):
            place, value = (index + np.uint64(i))[mask], self.read(register, kind)[mask]
            self.store(space, place, value, mask)

    def store(self, space, place, value, mask):
        """place, value [N], in units of a number's size: of the threads in mask"""
        numbers = space.bytes.view(value.dtype)
        changed = numbers[place] != value
        position = place[changed] * np.uint64(value.dtype.itemsize)
        space.accesses.add_writes(position, self.warp[mask][changed], self.now[mask][changed])
        numbers[place] = value
        assert (numbers[place] == value).all(), "threads write different numbers to one place"

    def _red(self, name, operands, mask, everyone):
        kind = TYPES[name[-1]]
        assert "add" in name and kind.kind in "iu", "sums of floating-point numbers depend on their order"
        index = self.spaces[name[1]].get_index(self.get_address(operands[0], name[1]), mask, kind.itemsize, kind.itemsize)
        np.add.at(self.spaces[name[1]].bytes.view(kind), index[mask], self.read(operands[1], kind)[mask])

    def _atom(self, name, operands, mask, everyone):
        """Its result depends on the order of threads, and is left unknown"""
        self._red(name, operands[1:], mask, everyone)
        self.registers.pop(operands[0], None)

    def _shfl(self, name, operands, mask, everyone):
        to, given, by, limits, _ = operands
        lane, by = np.arange(LANES), self.read(by, TYPES["u32"]).astype(int)
        limits = self.read(limits, TYPES["u32"]).astype(int)
        segment, clamp = limits >> 8 & 31, limits & 31
        highest = lane & segment | clamp & ~segment
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": lane & segment | by & ~segment}[name[2]]
        exists = source >= highest if name[2] == "up" else source <= highest
        source = np.where(exists, source, lane)
        register, *exists_register = to.split("|")
        value = np.take_along_axis(self.read(given, TYPES["b32"]), source & 31, 1)
        self.write(register, value, mask, everyone)
        for predicate in exists_register:
            self.write(predicate, exists, mask, everyone)

    def _redux(self, name, operands, mask, everyone):
        function, (kind, _) = get_function([name[2], *name[3:]])
        total = functools.reduce(function, self.read(operands[1], kind).T)  # [S]
        self.write(operands[0], np.repeat(total[:, None], LANES, 1), mask, everyone)

    def _bar(self, name, operands, mask, everyone):
        assert name[1] == "warp"  # others end blocks

    def _mma(self, name, operands, mask, everyone):
        """m16n8k8 of TF32: a warp's product of matrices, whose elements its threads hold in a fixed pattern"""
        assert name[3:] == ["m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"], name
        a, b, c = ([self.read(x, TYPES["u32"]) for x in registers] for registers in operands[1:])
        group, member = np.divmod(np.arange(LANES), 4)
        left, right = (np.zeros((len(mask), *size), np.float32) for size in ((16, 8), (8, 8)))
        total = np.zeros((len(mask), 16, 8))
        for i, register in enumerate(a):
            left[:, group + 8 * (i % 2), member + 4 * (i // 2)] = (register & np.uint32(0xFFFFE000)).view(np.float32)
        for i, register in enumerate(b):
            right[:, member + 4 * i, group] = (register & np.uint32(0xFFFFE000)).view(np.float32)
        rows, cols = [group + 8 * (i // 2) for i in range(4)], [2 * member + i % 2 for i in range(4)]
        for i, register in enumerate(c):
            total[:, rows[i], cols[i]] = register.view(np.float32)
        total = (total + _float(left) @ _float(right)).astype(np.float32)
        for i, register in enumerate(operands[0]):
            self.write(register, np.ascontiguousarray(total[:, rows[i], cols[i]]), mask, everyone)

    def _get_matrices(self, name, operand, mask):
        """Where ldmatrix and stmatrix find each thread's pair of 16-bit numbers: for each matrix an index [S, LANES]"""
        assert name[3] == "m8n8" and "trans" not in name, name
        address = self.get_address(operand, "shared")
        lane = np.arange(LANES)
        for i in range(int(name[4][1:])):
            row = address[:, 8 * i + lane // 4]
            assert not (row % np.uint64(16))[mask].any(), "a row of a matrix is not aligned"
            yield self.spaces["shared"].get_index(row + (lane % 4 * 4).astype(np.uint64), mask, 4, 4)

    def _ldmatrix(self, name, operands, mask, everyone):
        shared, loaded = self.spaces["shared"], []
        for index in self._get_matrices(name, operands[1], mask):
            shared.accesses.add_reads(index[mask] * np.uint64(4), self.warp[mask], self.now[mask])
            loaded.append(shared.bytes.view(np.uint32)[index])
        for register, value in zip(operands[0], loaded, strict=True):
            self.write(register, value, mask, everyone)

    def _stmatrix(self, name, operands, mask, everyone):
        for register, index in zip(operands[1], self._get_matrices(name, operands[0], mask), strict=True):
            self.store(self.spaces["shared"], index[mask], self.read(register, TYPES["u32"])[mask], mask)


TOGETHER = ("shfl", "mma", "ldmatrix", "stmatrix", "redux")  # what a warp's threads do together

# ------------------------------------------------------------------ launches


class Driver:
    """What Triton asks a GPU's driver when it compiles"""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, LANES)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def dump(compiled, option):
    """What cuobjdump prints of a kernel that Triton compiled"""
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout


def get_resources(compiled):
    """Registers per thread, and the bytes of a thread's stack, where spilled registers go"""
    usage = dump(compiled, "-res-usage")
    return [int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")]


kernels = {}  # by their PTX


def read_kernel(compiled, max_stack):
    """Raises: AssertionError if it needs more of a GPU than it should"""
    ptx = compiled.asm["ptx"]
    if ptx not in kernels:
        assert compiled.metadata.shared <= 48 * 1024, "more shared memory than all GPUs give without being asked"
        registers, stack = get_resources(compiled)
        assert stack <= max_stack, f"{compiled.name} spills: {stack} bytes of stack, {registers} registers"
        kernels[ptx] = Kernel(ptx)
    return kernels[ptx]


def execute(compiled, grid, values, max_stack):
    """Runs a kernel that Triton compiled. Args: grid: up to three sizes; values: the arguments by name, tensors and numbers"""
    kernel, arrays, parameters = read_kernel(compiled, max_stack), {}, []
    given = [values[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    for value in given:
        if torch.is_tensor(value):
            assert value.is_contiguous(), "kernels take contiguous tensors"
            arrays[value.data_ptr(), value.nbytes] = value.detach().numpy()
    memory = Memory([*arrays.values(), *kernel.constants.values()], kernel.num_threads // LANES)
    places = dict(zip(arrays, memory.places, strict=False))
    scratch = [0] * (len(kernel.parameters) - len(given))  # pointers that these kernels don't use
    for value, kind in zip([*given, *scratch], kernel.parameters.values(), strict=True):
        value = places[value.data_ptr(), value.nbytes] if torch.is_tensor(value) else value
        parameters.append(np.array(value).astype(kind))
    parameters = dict(zip(kernel.parameters, parameters, strict=True))
    with np.errstate(all="ignore"):
        Launch(kernel, (*grid, 1, 1)[:3], parameters, memory, compiled.metadata.shared).run()
    memory.copy_back()


def use(patch, capability, max_stack):
    """Lets Triton compile for a GPU of some compute capability, and runs what it compiled here.
    Args: patch: pytest's monkeypatch; max_stack: bytes of it that a kernel's thread may need"""
    launch = JITFunction.run

    def run(kernel, *args, grid, warmup, **options):
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
            execute(compiled, grid, values, max_stack)
        return compiled

    patch.setattr(JITFunction, "run", run)
    triton.runtime.driver.set_active(Driver(capability))
