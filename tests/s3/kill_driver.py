"""Run s3/main.py again and again, killing it with SIGKILL, until it finishes; used by test_training.py.

Each attempt is a forked child, so that the libraries are imported once. Odd attempts are killed while a checkpoint is
being written (fsync is slowed down in the child, a temporary file is waited for), even ones after a random time.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sklearn.datasets  # noqa: F401  what each attempt would import
import tensorboardX  # noqa: F401
import torchvision  # noqa: F401

from s3 import engine, main

KILLS = 8
TIMEOUT = 60.0


def attempt(flags, slow_writes):
    """Start the script in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)
    if slow_writes:
        fsync = os.fsync

        def slow_fsync(descriptor):
            time.sleep(0.1)
            fsync(descriptor)

        os.fsync = slow_fsync
    os._exit(engine.run_script(main.main, flags))


def kill_once(flags, folder, while_writing, delay):
    """Kill one attempt; False if it ended before."""
    child, start = attempt(flags, while_writing), time.monotonic()
    while time.monotonic() - start < (TIMEOUT if while_writing else delay):
        if os.waitpid(child, os.WNOHANG)[0] != 0:
            return False
        if while_writing and any(".tmp" in path.name for path in folder.rglob("*")):
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def run(flags):
    folder = Path(next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--output-dir=")))
    rng, kills = random.Random(5), {"while_writing": 0, "at_random": 0}
    for number in range(KILLS):
        while_writing = number % 2 == 1
        if kill_once(flags, folder, while_writing, rng.uniform(0.05, 1.0)):
            kills["while_writing" if while_writing else "at_random"] += 1
    _, status = os.waitpid(attempt(flags, False), 0)
    print(json.dumps(kills))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
