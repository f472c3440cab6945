"""What a run leaves in models/<dataset>/<arch>/<label>: the original's files, metrics.jsonl and TensorBoard events."""

import csv
import json
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path

import torch

from common.checkpoints import save_checkpoint
from deepshift.events import open_events
from deepshift.run import RunError

ROOT = Path(__file__).resolve().parents[1]


def label(prefix: str, depth: str, weight_bits: int | None, desc: str | None) -> str:
    """Directory name of a run, as in the original: shift_0, shift_ps_all_wb_5, shift_q_3_wb_4_from_pretrained."""
    bits = "" if weight_bits is None else f"_wb_{weight_bits}"
    return f"{prefix}_{depth}{bits}" + (f"_{desc}" if desc else "")


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


def write_text(path: Path, text: str):
    """Replace a text file at once."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


class Run:
    """Files of one run. Only rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, directory: str | Path, is_writer: bool = True):
        self.directory, self.is_writer = Path(directory), is_writer
        self.checkpoint_path = self.directory / "checkpoint.pth.tar"
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

    def start_log(self, header: dict, columns: list[str], resumed_at: int | None = None, first: int = 0):
        """Open metrics.jsonl, train_log.csv and events: anew with `header`, or going on at epoch `resumed_at`.

        columns: of train_log.csv, whose first is the epoch, counted from `first`.
        """
        if not self.is_writer:
            return
        lines, rows = [{"type": "run", **header}], []
        if resumed_at is not None:
            earlier = [line for line in read_metrics(self.metrics_path) if line.get("type") != "result"]
            earlier = [line for line in earlier if line.get("epoch", -1) < resumed_at or line["type"] != "epoch"]
            lines = (earlier or lines) + [{"type": "resumed", "epoch": resumed_at, "command": header["command"]}]
            rows = [row for row in read_rows(self.directory / "train_log.csv") if int(row[0]) < resumed_at + first]
        write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
        self.write_csv("train_log.csv", [columns, *rows])
        self._metrics = open(self.metrics_path, "a")
        self._events = open_events(self.directory, purge_step=resumed_at)

    def log_epoch(self, record: dict, row: list):
        """One line in metrics.jsonl and train_log.csv, and one point per curve in TensorBoard."""
        if not self.is_writer:
            return
        self._write({"type": "epoch", **record})
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self._events.add_scalar(name, value, record["epoch"])
        self._events.flush()
        with open(self.directory / "train_log.csv", "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)

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

    def write_csv(self, name: str, rows: list[list]):
        if self.is_writer:
            text = "".join(",".join(str(cell) for cell in row) + "\n" for row in rows)
            write_text(self.directory / name, text)

    def write_text(self, name: str, text: str):
        if self.is_writer:
            write_text(self.directory / name, text)

    def write_weights_log(self, name: str, model: torch.nn.Module):
        """The tensors as text, as torch prints them."""
        if self.is_writer:
            parts = [f"{key} \t {value.size()}\n{value}\n\n" for key, value in model.state_dict().items()]
            self.write_text(name, "Model's state_dict:\n" + "".join(parts))

    def save(self, name: str, payload: dict, keep_previous: bool = False):
        if self.is_writer:
            save_checkpoint(self.directory / name, payload, keep_previous=keep_previous)

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


def read_rows(path: Path) -> list[list[str]]:
    """Complete rows of a train_log.csv without its header; [] if there is none."""
    try:
        header, *rows = csv.reader(path.read_text().splitlines())
    except (FileNotFoundError, ValueError):
        return []
    return [row for row in rows if len(row) == len(header) and row[0].isdigit()]


def describe_run(args, config: dict, device: torch.device, counts: dict, reproduces: str | None) -> dict:
    """Header of metrics.jsonl: everything needed to repeat the run. counts: params and macs."""
    import torchvision

    hidden = ("command", "notes", "shift_type_given", "shift_depth_given")
    return {
        "paper": "deepshift",
        "command": "python " + " ".join(shlex.quote(word) for word in args.command),
        "reproduces": None if args.embedded_data or args.train_size else reproduces,
        "data": "digits (embedded)" if args.embedded_data else args.dataset,
        "args": {name: value for name, value in vars(args).items() if name not in hidden},
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
