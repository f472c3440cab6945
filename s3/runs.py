"""What a run leaves in its directory: checkpoints of the original's names, metrics.jsonl and TensorBoard events."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.checkpoints import save_checkpoint
from s3.events import open_events
from s3.run import RunError

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """Commit of this checkout, None outside git; `-dirty` marks uncommitted changes."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device) -> str:
    """The device in words, such as 'NVIDIA H200' or 'AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def command_line(argv) -> list[str]:
    """The words that were typed, script first (relative to the repository), for the log."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return [name, *(sys.argv[1:] if argv is None else argv)]


class Run:
    """Files of one run. Only rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, directory: str | Path, is_writer: bool = True):
        self.directory, self.is_writer = Path(directory), is_writer
        self.checkpoint_path = self.directory / "checkpoint.pth.tar"
        self.best_path = self.directory / "model_best.pth.tar"
        self.metrics_path = self.directory / "metrics.jsonl"
        self._metrics = self._events = None

    def prepare(self):
        """Make the directory and check that it can be written. Raises RunError if not."""
        if not self.is_writer:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunError(f"cannot write to {self.directory}: {error.strerror}; choose another --output-dir") from None

    def start_log(self, header: dict, resumed_at: int | None = None):
        """Open metrics.jsonl and TensorBoard events: anew with `header`, or going on at epoch `resumed_at`."""
        if not self.is_writer:
            return
        lines = [{"type": "run", **header}]
        if resumed_at is not None:
            earlier = [line for line in read_metrics(self.metrics_path) if line.get("type") != "result"]
            earlier = [line for line in earlier if line.get("epoch", -1) < resumed_at or line["type"] != "epoch"]
            lines = (earlier or lines) + [{"type": "resumed", "epoch": resumed_at, "command": header["command"]}]
        temporary = self.metrics_path.with_name("metrics.jsonl.part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, self.metrics_path)
        self._metrics = open(self.metrics_path, "a")
        self._events = open_events(self.directory, purge_step=resumed_at)

    def log_epoch(self, record: dict):
        """One line in metrics.jsonl, and one point per curve in TensorBoard."""
        if not self.is_writer:
            return
        self._write({"type": "epoch", **record})
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self._events.add_scalar(name, value, record["epoch"])
        self._events.flush()

    def log_result(self, record: dict):
        """The last line of metrics.jsonl: the run is finished."""
        if self.is_writer:
            self._write({"type": "result", **record})

    def _write(self, line: dict):
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_path}: {error.strerror}; free space and go on with --resume "
                           f"{self.checkpoint_path}") from None  # fmt: skip

    def save(self, path: Path, payload: dict, keep_previous: bool = False):
        if self.is_writer:
            save_checkpoint(path, payload, keep_previous=keep_previous)

    def close(self):
        for writer in (self._metrics, self._events):
            if writer is not None:
                with contextlib.suppress(OSError):  # of a full disk: what is told is why the run ended
                    writer.close()


def read_metrics(path) -> list[dict]:
    """Lines of a metrics.jsonl; [] if there is none. A last line cut short by a kill is left out."""
    lines = []
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def describe_run(args, config: dict, device: torch.device, counts: dict, reproduces: str | None) -> dict:
    """Header of metrics.jsonl: everything needed to repeat the run. counts: params and macs."""
    import torchvision

    return {
        "paper": "s3",
        "command": "python " + " ".join(shlex.quote(word) for word in args.command),
        "reproduces": None if args.embedded_data or args.train_size else reproduces,
        "data": "digits (embedded)" if args.embedded_data else args.dataset,
        "args": {name: value for name, value in vars(args).items() if name != "command"},
        "config": config,
        **counts,
        "device": str(device),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
