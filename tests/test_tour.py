"""docs/tour.ipynb runs as it stands, and was saved with its output"""

import json
import os
import re
import subprocess
import sys

from conftest import ROOT


def test_tour():
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    environment = {**os.environ, "MPLBACKEND": "agg"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    saved = "".join("".join(out.get("text", "")) for cell in cells for out in cell["outputs"])
    for text in (process.stdout, saved):  # a search's last digits depend on the machine
        log_joint = float(re.search(r"log p\(x, z\) = (.*) nats", text)[1])
        log_prior, log_likelihood = map(float, text.splitlines()[-1].split(", "))
        assert abs(log_prior + log_likelihood - log_joint) < 0.2 and log_joint > -150
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"]) == 4
