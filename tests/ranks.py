"""Run a function in two processes of a gloo group, for tests:  python -m tests.ranks MODULE:FUNCTION FOLDER

The interpreter imports once and forks twice, which costs a third of what torchrun does.
"""

import datetime
import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
SIZE, PATIENCE = 2, datetime.timedelta(seconds=120)


def run_in_ranks(where: str) -> list:
    """What a function (rank, size), called MODULE:FUNCTION, returns in each of two processes: tensors, plain values."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.ranks", where, folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def _child(function, folder, rank):
    status = 1
    try:
        store = f"file://{folder.resolve()}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=PATIENCE)
        torch.save(function(rank, SIZE), folder / f"{rank}.pt")
        dist.barrier()  # who leaves first would close the connection under the other
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # gloo's threads outlive the group and may abort a process that shuts down


def main(where, folder):
    module, _, name = where.partition(":")
    function, folder = getattr(importlib.import_module(module), name), Path(folder)
    torch.set_num_threads(1)
    children = []
    for rank in range(SIZE):
        child = os.fork()
        if not child:
            _child(function, folder, rank)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
