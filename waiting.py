"""How threads wait for each other; imported before torch, which reads it once.

Threads of torch's OpenMP wait for work in a loop that takes a core for milliseconds. Where other
processes need the cores, too, all then wait for each other: a run was ten times slower than it need be.
After some microseconds they sleep instead, which costs nothing measurable on an idle machine.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
