"""The structure: imports go one way, and other code can use the project beside modules of its own."""

import ast
import subprocess
import sys

from conftest import ROOT

# A module imports only from lines below its own (and within its folder; scripts also import scripts).
LEVELS = """
main sweep diagnostics eval_logp oneshot read demo benchmark
cluster results
reading runs
losses
scoring
models data
rendering images
fast
util
"""


def get_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_go_one_way():
    level = {name: i for i, line in enumerate(LEVELS.split("\n")) for name in line.split()}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")]:
        ours = path.stem if path.parent == ROOT else path.parent.name
        if ours == "__init__":
            continue
        for name in get_imports(path):
            if name in level and name != ours:
                allowed = level[name] > level[ours] or level[name] == level["main"] == level[ours]
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_beside_other_code(tmp_path):
    """As a package, whatever its folder is called, it leaves the names of its modules to others"""
    for name in ["data", "images", "util"]:
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    code = f"""
import importlib, sys
sys.path.append({str(ROOT.parent)!r})
strokes = importlib.import_module({ROOT.name!r})
model, network = strokes.models.from_checkpoint(strokes.runs.checkpoints.load({str(ROOT / "pretrained/mws_20.pt")!r}))
latent, obs = model.sample(3)
strokes.reading.characters.read(model, strokes.reading.characters.from_inks(list(obs.numpy() > 0), 'sample'))
print(model.log_prob(latent.unsqueeze(0), obs)[1].shape, len(strokes.data.load("glyphs").train.obs))
model.get_logits(latent).numpy()
assert not any(name in sys.modules for name in ["models", "losses", "fast", "runs", "rendering"])
importlib.invalidate_caches()
import data, images, util
assert data.mine and images.mine and util.mine
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["torch.Size([1,", "3])", "7057"], process.stdout
