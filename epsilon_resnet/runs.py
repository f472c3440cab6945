"""What a training run leaves on disk, under the original's names, and what it needs to go on.

train_log.<output>/: log.log and stat.json (the original's), model-<step>.pth after every epoch (the last 10, and one
per half hour), `checkpoint` (a list of them), metrics.jsonl and TensorBoard events. Checkpoints hold tensors and
plain values only.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from epsilon_resnet.events import open_events
from epsilon_resnet.logfile import close_log, open_log
from epsilon_resnet.run import RunError

RECENT = 10
SECONDS_BETWEEN_KEPT = 1800.0
MODEL_FILE = re.compile(r"model-(\d+)\.pth")


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


def model_files(directory) -> dict[int, Path]:
    """Checkpoints of a run by their step, in order."""
    found = ((MODEL_FILE.fullmatch(path.name), path) for path in Path(directory).glob("model-*.pth"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


class Run:
    """Files of one training run. Only rank 0 writes; on other ranks every method but `latest` does nothing."""

    def __init__(self, directory: str, is_writer: bool = True, keep_steps=()):
        self.directory, self._kept = Path(directory), {f"model-{step}.pth" for step in keep_steps}
        self.is_writer = is_writer
        self.metrics_path = self.directory / "metrics.jsonl"
        self.log_path = self.directory / "log.log"
        self.stat_path = self.directory / "stat.json"
        self._metrics = self._events = self._log = None
        self._recent, self._next_kept = [], time.monotonic() + SECONDS_BETWEEN_KEPT

    def prepare(self, keep: bool):
        """Make the directory. An earlier run in it is kept (to go on with) or put aside under a new name.

        Returns the new name, or None. Raises RunError if the directory cannot be written.
        """
        if not self.is_writer:
            return None
        try:
            aside = None if keep else self._put_aside()
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
            return aside
        except OSError as error:
            raise RunError(
                f"cannot write to {self.directory}: {error.strerror}; choose another -o or --output-dir"
            ) from None

    def _put_aside(self):
        if not self.directory.is_dir() or not any(self.directory.iterdir()):
            return None
        stamp, number = time.strftime("%Y%m%d-%H%M%S"), 0
        aside = self.directory.with_name(f"{self.directory.name}.{stamp}")
        while aside.exists():
            number += 1
            aside = self.directory.with_name(f"{self.directory.name}.{stamp}-{number}")
        self.directory.rename(aside)
        return aside

    def latest(self) -> Path | None:
        """The checkpoint of the last finished epoch, None if there is none."""
        return next(reversed(model_files(self.directory).values()), None)

    def start_log(self, header: dict, resumed: dict | None = None):
        """Open log.log, stat.json, metrics.jsonl and events: anew, or going on after `resumed`, a checkpoint's payload.

        What an interrupted run wrote after that checkpoint is dropped; later checkpoints are renamed to *.pth.old.
        """
        if not self.is_writer:
            return
        lines, self.statistics = [{"type": "run", **header}], []
        if resumed is not None:
            epoch = resumed["epoch"]
            earlier = [line for line in read_metrics(self.metrics_path) if line.get("type") != "result"]
            earlier = [line for line in earlier if line.get("epoch", -1) < epoch]
            lines = (earlier or lines) + [{"type": "resumed", "epoch": epoch, "command": header["command"]}]
            self._go_back_to(epoch, resumed["step"])
        self._replace(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
        self._metrics = open(self.metrics_path, "a")
        self._events = open_events(self.directory, purge_step=None if resumed is None else resumed["epoch"] + 1)
        self._log = open_log(self.log_path)
        self.message("Argv: %s", header["command"].removeprefix("python "))

    def _go_back_to(self, epoch, step):
        self.statistics = [entry for entry in read_statistics(self.stat_path) if entry["epoch_num"] <= epoch]
        files = model_files(self.directory)
        for later in (path for number, path in files.items() if number > step):
            later.rename(later.with_name(later.name + ".old"))
        self._recent = [path for path in self._listed() if path.exists()]
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        kept = text.split(f"Start Epoch {epoch + 1} ...", 1)[0]
        if kept != text:  # with the time stamp of the cut line removed
            self._replace(self.log_path, kept[: kept.rfind("\n") + 1])

    def _listed(self):
        try:
            lines = (self.directory / "checkpoint").read_text().splitlines()
        except OSError:
            return []
        names = [line.split('"')[1] for line in lines if line.startswith("all_model_checkpoint_paths") and '"' in line]
        return [self.directory / Path(name).name for name in names]

    def message(self, text: str, *values):
        """A line in log.log."""
        if self.is_writer:
            self._log.info(text, *values, stacklevel=2)

    def log_epoch(self, record: dict, statistics: dict[str, float], step: int):
        """One epoch: statistics in log.log, stat.json and TensorBoard (epochs from 1), and `record` (from 0)."""
        if not self.is_writer:
            return
        epoch = record["epoch"] + 1
        for name, value in sorted(statistics.items()):
            self._log.info("%s: %s", name, f"{value:.5g}")
            self._events.add_scalar(name, value, epoch)
        self.statistics.append({**statistics, "epoch_num": epoch, "global_step": step})
        for name in ("lr", "train_loss", "train_top1", "test_loss", "test_top1", "closed_blocks", "seconds"):
            if record.get(name) is not None:
                self._events.add_scalar(name, record[name], epoch)
        self._events.flush()
        self._replace(self.stat_path, json.dumps(self.statistics))
        self._write({"type": "epoch", **record})

    def log_result(self, record: dict):
        """The last line of metrics.jsonl: the run is finished."""
        if self.is_writer:
            self._write({"type": "result", **record})

    def _write(self, line: dict):
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_path}: {error.strerror}; free space, then go on") from None

    @staticmethod
    def _replace(path: Path, text: str):
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; free space, then go on") from None

    def save(self, payload: dict):
        """Write model-<step>.pth, remove checkpoints that are no longer needed, list the rest in `checkpoint`."""
        if not self.is_writer:
            return
        path = self.directory / f"model-{payload['step']}.pth"
        save_checkpoint(path, payload)
        self._recent = [*(kept for kept in self._recent if kept != path), path]
        while len(self._recent) > RECENT:
            oldest = self._recent.pop(0)
            if oldest.name in self._kept:
                continue
            if time.monotonic() >= self._next_kept:
                self._next_kept += SECONDS_BETWEEN_KEPT
            else:
                oldest.unlink(missing_ok=True)
        lines = [f'all_model_checkpoint_paths: "{kept.name}"\n' for kept in self._recent]
        self._replace(self.directory / "checkpoint", f'model_checkpoint_path: "{path.name}"\n' + "".join(lines))

    def close(self):
        for writer in (self._metrics, self._events):
            if writer is not None:
                writer.close()
        if self._log is not None:
            close_log(self._log)


def load_state(path) -> dict:
    """Payload of a model-<step>.pth. Raises CheckpointError if it is damaged, naming a good one beside it."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        for earlier in reversed(model_files(Path(path).parent).values()):
            if earlier.name != Path(path).name and _is_good(earlier):
                raise CheckpointError(f"{error}; or go on with --load {earlier}") from None
        raise


def _is_good(path) -> bool:
    try:
        load_checkpoint(path)
        return True
    except CheckpointError:
        return False


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


def read_statistics(path) -> list[dict]:
    """Content of a stat.json, [] if there is none or it is not one."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return []
    return [entry for entry in content if isinstance(entry, dict) and "epoch_num" in entry]


def versions() -> dict[str, str]:
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def describe_run(args, config, device: torch.device, *, parameters: int, macs: int, reproduces: str | None) -> dict:
    """Header of metrics.jsonl: everything needed to repeat the run."""
    return {
        "paper": "epsilon_resnet",
        "command": "python " + " ".join(shlex.quote(word) for word in args.command),
        "reproduces": reproduces,
        "data": "digits (embedded)" if args.embedded_data else args.dataset,
        "args": {name: value for name, value in vars(args).items() if name != "command"},
        "config": config.as_dict(),
        "params": parameters,
        "macs": macs,
        "device": str(device),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def command_line(script: str, argv) -> list[str]:
    """The words that were typed, script first (relative to the repository), for the log."""
    root = Path(__file__).resolve().parents[1]
    return [str(Path(script).resolve().relative_to(root)), *(sys.argv[1:] if argv is None else argv)]
