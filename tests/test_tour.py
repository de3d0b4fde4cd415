"""docs/tour.ipynb runs as it stands, and was saved with its output"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def test_tour():
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    environment = {**os.environ, "MPLBACKEND": "agg"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    saved = "".join("".join(out.get("text", "")) for cell in cells for out in cell["outputs"])
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d", text)] for text in (process.stdout, saved)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1) and len(saved) > 100  # last digits depend on the machine
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"]) == 5
