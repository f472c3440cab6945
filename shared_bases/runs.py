"""What a training run leaves on disk: metrics.jsonl, TensorBoard events, the best and the last checkpoint.

Checkpoints hold tensors and plain values only. `<name>.pth` (the original's name) is the best network: net_state_dict,
optimizer_state_dict, acc and epoch as the original's, and config. `<name>/last.pt` adds what an exact resume needs.
"""

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.checkpoints import load_checkpoint, save_checkpoint
from shared_bases.events import open_events
from shared_bases.models import Config
from shared_bases.run import RunError

PUBLISHED = Path(__file__).with_name("published.csv")


def _commit() -> str | None:
    """Commit of this checkout, None outside git; `-dirty` marks uncommitted changes."""
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
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


class Run:
    """Files of one training run. Only rank 0 writes; on other ranks every method but `load_last` does nothing.

    directory: where metrics.jsonl, events and last.pt go. best_path: the original's checkpoint path.
    """

    def __init__(self, directory: str, best_path: str, is_writer: bool = True):
        self.directory = Path(directory)
        self.best_path = best_path
        self.is_writer = is_writer
        self.last_path = self.directory / "last.pt"
        self.metrics_path = self.directory / "metrics.jsonl"
        self._metrics = self._events = None

    def prepare(self):
        """Make the directories and check that they can be written. Raises RunError if not."""
        if not self.is_writer:
            return
        try:
            for folder in (self.directory, Path(self.best_path).parent):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".write-test-{os.getpid()}"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir") from None

    def start_log(self, header: dict, resumed_at: int | None = None):
        """Open metrics.jsonl and TensorBoard events: anew with `header` first, or going on at epoch `resumed_at`."""
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
        """One line in metrics.jsonl and one point per curve in TensorBoard."""
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
            raise RunError(
                f"cannot write {self.metrics_path}: {error.strerror}; free space and continue with --resume"
            ) from None

    def save_best(self, payload: dict):
        if self.is_writer:
            save_checkpoint(self.best_path, payload)

    def save_numbered(self, payload: dict, epoch: int):
        """The original's file of every fifth epoch (from 1) on ILSVRC2012."""
        if self.is_writer:
            save_checkpoint(f"{self.best_path.removesuffix('.pth')}epoch{epoch}.pth", payload)

    def save_last(self, payload: dict):
        if self.is_writer:
            save_checkpoint(self.last_path, payload, keep_previous=True)

    def load_last(self) -> dict | None:
        """State of the last finished epoch, None if there is none. Raises CheckpointError if the file is damaged."""
        return load_checkpoint(self.last_path) if self.last_path.exists() else None

    def close(self):
        for writer in (self._metrics, self._events):
            if writer is not None:
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


def describe_run(args, config: Config, device: torch.device, parameters: int, macs: int) -> dict:
    """Header of metrics.jsonl: everything needed to repeat the run."""
    import torchvision

    return {
        "paper": "shared_bases",
        "command": "python " + " ".join(shlex.quote(word) for word in args.command),
        "reproduces": None if args.embedded_data or args.train_size else published_command(args, config),
        "data": "digits (embedded)" if args.embedded_data else args.dataset,
        "args": {name: value for name, value in vars(args).items() if name != "command"},
        "config": config.as_dict(),
        "params": parameters,
        "macs": macs,
        "device": str(device),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def command_flags(command: str) -> tuple[str, dict[str, str]]:
    """(script, {flag: value}) of the training half of a published command."""
    words = shlex.split(command.partition(" && ")[0])
    return words[1], dict(word.removeprefix("--").split("=", 1) for word in words[2:])


def published_command(args, config: Config) -> str | None:
    """The published command with this run's network and hyper-parameters, as in published.csv without its `python3 `.

    None if no row has them. Rows of the first README, whose schedule was another one, are not compared with.
    """
    asked = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay, "lambdaR": args.lambdaR,
             "batch_size": args.batch_size, **config.ranks()}  # fmt: skip
    with open(PUBLISHED, newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["table"].startswith("first README")]
    for row in rows:
        script, flags = command_flags(row["command"])
        if script != f"train_{args.dataset}.py" or flags["model"] != config.model:
            continue
        if all(float(flags[name]) == value for name, value in asked.items()):
            return row["command"].removeprefix("python3 ")
    return None


def command_line(argv) -> list[str]:
    """The words that were typed, script first (relative to the repository), for the log."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return [name, *(sys.argv[1:] if argv is None else argv)]
