"""A soak test, run by hand: sweeps of small runs, trained and evaluated, while everything goes wrong around them.

    python tests/soak.py /tmp/soak --minutes 120        # as root, who may mount the small disk that it fills

At random moments a process is killed (SIGKILL), asked to stop, or frozen for a while, the disk is full for a while, or a
file that runs read again is truncated. Whenever the sweep has ended, it is started again, until it is
complete. Then every file must be that of an undisturbed sweep, bit for bit, and the next round begins with another seed.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from conftest import assert_same  # noqa: E402

SWEEP = [sys.executable, str(ROOT / "sweep.py"), "--test-run", "--models", "mws_3", "rws_3", "vimco_3", "--seeds", "0"]
TRAIN = [*SWEEP, "--", "--save-interval=3", "--num-particles=4"]
EVALUATE = [*SWEEP, "--eval-logp", "--eval-options=--save-interval=2", "--", "--num-particles=4"]
DISK = 400  # MB
PAUSE = 15  # seconds between two disturbances, on average; a run takes some seconds to start
# What a process writes for itself, or differs in when and where it was written
OTHERS = {"lock", "logs", ".sweep", "index.html"}


def get_files(save):
    """The files of a sweep that must agree, by their paths within save/"""
    paths = [path for path in save.rglob("*") if path.is_file()]
    names = {path: path.relative_to(save) for path in paths}
    return {name: path for path, name in names.items() if not OTHERS & set(name.parts) and name.suffix != ".lock"}


def run_sweep(command, folder, log):
    """Starts a sweep in a session of its own"""
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def get_processes(leader):
    """The sweep and its runs, by process group"""
    pids = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader and fields[0] != "Z":
                pids.append(int(path.parent.name))
    return pids


def send(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def freeze(moments, pids, folder):
    chosen = moments.choice(pids)
    send(chosen, signal.SIGSTOP)
    time.sleep(moments.uniform(0.1, 4))
    send(chosen, signal.SIGCONT)


def fill_disk(moments, pids, folder):
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    time.sleep(moments.uniform(0.1, 6))
    filler.unlink()


def truncate(moments, pids, folder):
    """Only files that runs read again (not losses.csv), and the latest checkpoint only where an older one is left"""
    patterns = ["*/checkpoints/latest.pt", "*/logp/*.pt", "*/logp/checkpoints/*.pt"]
    paths = sorted(path for pattern in patterns for path in (folder / "save").glob(pattern))
    paths = [path for path in paths if path.name != "latest.pt" or len(list(path.parent.glob("*.pt"))) > 1]
    if paths:
        path = moments.choice(paths)
        with contextlib.suppress(OSError):
            os.truncate(path, moments.randrange(path.stat().st_size + 1))


def kill(moments, pids, folder):
    send(moments.choice(pids), signal.SIGKILL)


def kill_all(moments, pids, folder):
    for pid in pids:
        send(pid, signal.SIGKILL)


def stop(moments, pids, folder):
    send(moments.choice(pids), moments.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))


DISTURBANCES = {kill: 4, kill_all: 2, stop: 3, freeze: 3, fill_disk: 3, truncate: 3}


def disturb(command, folder, moments, counts, log):
    """Runs a sweep to its end, however often it has to be started"""
    while True:
        process = run_sweep(command, folder, log)
        counts["starts"] += 1
        patience = time.time() + 600
        while process.poll() is None:
            time.sleep(min(moments.expovariate(1 / PAUSE), 60))
            pids = get_processes(process.pid)
            if pids and process.poll() is None:
                action = moments.choices(list(DISTURBANCES), DISTURBANCES.values())[0]
                action(moments, pids, folder)
                counts[action.__name__] += 1
            if time.time() > patience:
                sys.exit("a sweep hangs")
        while pids := get_processes(process.pid):  # runs that outlive it save and stop
            if time.time() > patience:
                sys.exit(f"processes {pids} outlive their sweep")
            time.sleep(0.2)
        if process.returncode == 0:
            return
        text = pathlib.Path(log.name).read_text(errors="replace")
        if "Traceback" in text:
            sys.exit(f"a traceback, see {log.name}")


def is_same(one, other):
    """Whether two files hold the same, bit for bit: of checkpoints their contents, since how a file refers to what occurs in
    it twice depends on whether that was loaded or made"""
    if one.suffix != ".pt":
        return one.read_bytes() == other.read_bytes()
    try:
        assert_same(*(torch.load(path, weights_only=True) for path in (one, other)))
    except AssertionError:
        return False
    return True


def compare(folder, undisturbed):
    """Exits if a file is missing, is one too many, or differs"""
    ours, theirs = get_files(folder / "save"), get_files(undisturbed / "save")
    differing = [name for name in ours.keys() & theirs.keys() if not is_same(ours[name], theirs[name])]
    wrong = sorted(map(str, [*(ours.keys() ^ theirs.keys()), *differing]))
    for path in (folder / "save").glob("*/logs/*.log"):
        if "Traceback" in path.read_text(errors="replace"):
            wrong.append(f"a traceback in {path}")
    if wrong:
        sys.exit(f"differs from the undisturbed sweep: {', '.join(wrong)}; kept in {folder}")
    return len(theirs)


def main(args):
    args.folder.mkdir(parents=True)
    undisturbed, disturbed = args.folder / "undisturbed", args.folder / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    with open(args.folder / "undisturbed.log", "w") as log:
        for command in [TRAIN, EVALUATE]:
            if run_sweep(command, undisturbed, log).wait() != 0:
                sys.exit(f"the undisturbed sweep failed, see {log.name}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", disturbed], check=True)
    seed, end, total = args.seed, time.time() + 60 * args.minutes, collections.Counter()
    while time.time() < end:
        moments, counts = random.Random(seed), collections.Counter()
        with open(args.folder / f"disturbed-{seed}.log", "w") as log:
            for command in [TRAIN, EVALUATE]:
                disturb(command, disturbed, moments, counts, log)
            # what was truncated after it was complete
            for command in [TRAIN, EVALUATE]:
                if run_sweep(command, disturbed, log).wait() != 0:
                    sys.exit(f"the sweep does not end well, see {log.name}")
        num_files = compare(disturbed, undisturbed)
        total += counts
        print(f"seed {seed}: {num_files} files are those of the undisturbed sweep; {dict(counts)}", flush=True)
        shutil.rmtree(disturbed / "save")
        seed += 1
    subprocess.run(["umount", disturbed], check=True)
    print(f"{seed - args.seed} rounds, all as if undisturbed; {dict(total)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a new folder", type=pathlib.Path)
    parser.add_argument("--minutes", help="how long (default: %(default)s)", type=float, default=120)
    parser.add_argument("--seed", help="of the moments of the first round (default: %(default)s)", type=int, default=0)
    main(parser.parse_args())
