"""One process with fake GPUs that runs a script as Python would, and writes down what it did."""

import json
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.fake.log import ROOT, Log

PRELOADED = ["tests.fake.preload"]
OF_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "CUDA_VISIBLE_DEVICES")  # fmt: skip
SECONDS = 300  # of a run, before it is killed


class Outcome(dict):
    """What a run did: `status`, `output`, and the log's report."""

    @property
    def text(self) -> str:
        return f"exit status {self['status']}\n{self['output'][-3000:]}"


def run(target, *arguments, gpus: int = 1, folder: Path, environment=None) -> Outcome:
    """Call target(*arguments) in a process with so many fake GPUs, in `folder`; its exit status is that of SystemExit.

    target: a function of a module, or the path of a script, whose arguments are those of the command line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    output, report = folder / "output.txt", folder / "report.json"
    report.unlink(missing_ok=True)
    call = (target, arguments, gpus, folder, output, report, environment or {})
    process = context.Process(target=_work, args=call)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = json.loads(report.read_text()) if report.exists() else {"status": f"killed ({process.exitcode})"}
    return Outcome(found, output=output.read_text(errors="replace") if output.exists() else "")


def _work(target, arguments, gpus, folder, output, report, environment):
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # of this process's own children: what it is without a test
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    for name in OF_OTHERS:
        os.environ.pop(name, None)
    log = Log()
    status = _status(log, gpus, target, arguments, environment)
    sys.stdout.flush()
    sys.stderr.flush()
    report.write_text(json.dumps({"status": status, "seconds": time.process_time(), **log.report()}))


def _status(log, gpus, target, arguments, environment):
    from tests.fake_cuda import fake_cuda

    _hide_real_gpus()
    os.environ.update(environment)
    logging.getLogger().addHandler(_Notes(log))
    try:
        with fake_cuda(log, gpus):
            if callable(target):
                target(*arguments)
            else:
                _script(Path(target), arguments)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _hide_real_gpus():
    """CUDA looks at CUDA_VISIBLE_DEVICES once: from here on this process has no real GPU."""
    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_available()
    del os.environ["CUDA_VISIBLE_DEVICES"]


def _script(path, arguments):
    sys.argv = [str(path), *map(str, arguments)]
    sys.path[0:0] = [str(path.parent)]
    sys.path.append(str(ROOT))
    runpy.run_path(str(path), run_name="__main__")


class _Notes(logging.Handler):
    """A warning of this repository says that something slower is done instead: here that is a fault."""

    def __init__(self, log):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record):
        if not record.name.startswith("torch"):
            self.log.notes.append(record.getMessage())
