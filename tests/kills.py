"""Run a training script again and again, killed at chosen moments, until it may finish:

    python -m tests.kills deepshift.mnist FLAGS --output-dir=DIR --auto-resume

Each attempt is a forked child, so that the libraries are imported once. The plan is fixed, so that every attempt but
the last dies and the runs in between go on from later and later epochs, whatever the machine's speed.
"""

import fnmatch
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # what each attempt would import
import tensorboardX  # noqa: F401
import torch._dynamo  # noqa: F401
import torchvision  # noqa: F401

from common.data import digits

NAME = "checkpoint.pth.tar"
STATES = (NAME, "last.pt", "model-*.pth")  # what a run goes on from, in the papers
# (moment, of which checkpoint of the attempt): "at random" dies before its first one, some time earlier.
PLAN = (("half written", 2), ("at random", 1), ("written", 2), ("renamed", 1), ("at random", 1), ("half written", 2))
RESUMED_AT = [1, 2, 3, 4]  # epochs that the plan's attempts and the last run go on from, each at least once
EPOCHS = 6  # of the run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment, count, folder):
    """Let this process end at that moment of its count-th checkpoint."""
    fsync, replace, seen = os.fsync, os.replace, []

    def dying_fsync(descriptor):
        found = os.fstat(descriptor)
        temporary = (path for name in STATES for path in folder.rglob(f".{name}.*.tmp"))
        ours = any(os.path.samestat(found, path.stat()) for path in temporary)
        if ours and moment == "half written" and len(seen) + 1 == count:
            os.ftruncate(descriptor, found.st_size // 2)
            die()
        fsync(descriptor)

    def dying_replace(source, target):
        if not any(fnmatch.fnmatch(os.path.basename(target), name) for name in STATES):
            return replace(source, target)
        seen.append(target)
        if moment in ("written", "at random") and len(seen) == count:
            die()
        replace(source, target)
        if moment == "renamed" and len(seen) == count:
            die()

    os.fsync, os.replace = dying_fsync, dying_replace


def attempt(script, flags, prepare=lambda: None):
    """Exit status of the script in a child, below 0 where a signal ended it."""
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        prepare()
        paper = script.__name__.split(".")[0]
        os._exit(importlib.import_module(f"{paper}.engine").run_script(script.main, flags))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def few_digits():
    """The first 120 of scikit-learn's: 96 for training, 24 for testing."""
    found = sklearn.datasets.load_digits()
    return found.images[:120].astype("int64"), found.target[:120].astype("int64")


def run(name, flags):
    script = importlib.import_module(name)
    digits._read_digits = few_digits
    folder = Path(next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--output-dir=")))
    rng, longest = random.Random(5), 0.0
    for moment, count in PLAN:
        delay = rng.uniform(0.1, 1) * longest if moment == "at random" else 0  # 0: none
        start = time.monotonic()

        def prepare(moment=moment, count=count, delay=delay):
            die_at(moment, count, folder)
            signal.setitimer(signal.ITIMER_REAL, delay)  # whose signal ends the process, too

        status = attempt(script, flags, prepare)
        assert status in (-signal.SIGKILL, -signal.SIGALRM), f"{moment} of checkpoint {count}: it ended with {status}"
        longest = max(longest, time.monotonic() - start)
    print(json.dumps({"kills": len(PLAN)}))
    return attempt(script, flags)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
