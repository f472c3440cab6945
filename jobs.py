"""What run_all.py runs: for each paper, the commands that train, evaluate, count, and convert, compress or pack.

A paper's function takes a Setting and returns its jobs in order; PAPERS at the end lists the functions.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DIGITS, SHORT, FULL = "digits", "short", "full"  # embedded digits; few epochs of the real data; the paper's schedule


@dataclass(frozen=True)
class Job:
    """One command of a paper. epochs and metrics (path of its metrics.jsonl) are set for training jobs only.

    command: without the interpreter. after: titles of the paper's jobs that it needs; None: all those before it.
    """

    paper: str
    title: str
    folder: Path
    command: tuple[str, ...]
    epochs: int = 0
    metrics: Path | None = None
    after: tuple[str, ...] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.title.replace(' ', '-')}.log"

    @property
    def marker(self) -> Path:
        """File that says that the job succeeded, and with which command."""
        return self.log.with_suffix(".done")

    def read_metrics(self) -> list[dict]:
        """Whole lines of a training job's metrics.jsonl; [] without any."""
        lines = []
        try:
            for line in self.metrics.read_text().splitlines():
                lines.append(json.loads(line))
        except (OSError, AttributeError, json.JSONDecodeError):  # none yet, no training job, a line being written
            pass
        return lines

    def epochs_done(self) -> int:
        return sum(line.get("type") == "epoch" for line in self.read_metrics())

    def result(self) -> dict | None:
        """What a finished training run reached."""
        lines = self.read_metrics()
        return lines[-1] if lines and lines[-1].get("type") == "result" else None

    def needs(self, jobs: list["Job"]) -> list["Job"]:
        """Those of all jobs that must have succeeded before this one."""
        before = [other for other in jobs[: jobs.index(self)] if other.paper == self.paper]
        return before if self.after is None else [other for other in before if other.title in self.after]

    def is_done(self, jobs: list["Job"]) -> bool:
        """Whether the same command has succeeded, after what it needs, and a training run's result is still there."""
        try:
            same = json.loads(self.marker.read_text()) == list(self.command)
            time_done = self.marker.stat().st_mtime_ns
            newer = all(need.marker.stat().st_mtime_ns <= time_done for need in self.needs(jobs))
        except (OSError, json.JSONDecodeError):
            return False
        return same and newer and (self.metrics is None or self.result() is not None)


@dataclass(frozen=True)
class Setting:
    """Where a paper's jobs read and write, and on which schedule. Runs of different kinds have folders of their own."""

    paper: str
    kind: str  # DIGITS, SHORT or FULL
    folder: Path
    data: tuple[str, ...]  # flags that choose data and device
    extra: tuple[str, ...]  # the user's own flags for training

    def epochs(self, digits: int, short: int, full: int) -> int:
        """Epochs of this kind, or those that the user's own flags say."""
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--epochs", type=int, default={DIGITS: digits, SHORT: short, FULL: full}[self.kind])
        try:
            return parser.parse_known_args(self.extra)[0].epochs
        except argparse.ArgumentError:  # the training script itself says what is wrong
            return 0

    def job(self, title: str, *command: str, **more) -> Job:
        return Job(self.paper, title, self.folder, tuple(command), **more)

    def train(self, title: str, *command: str, epochs: int, metrics: Path, after=()) -> Job:
        """A training job; the user's own flags come last, and so win."""
        return self.job(f"train {title}", *command, *self.extra, epochs=epochs, metrics=metrics, after=after)


def shiftresnet_jobs(setting: Setting) -> list[Job]:
    """ShiftResNet20 (expansion 3) against ResNet20 on CIFAR-10, or on the digits."""
    folder = setting.folder
    epochs = setting.epochs(digits=8, short=2, full=160)  # 2 on CIFAR-10: under 10 minutes each on 2 cores
    schedule = ["--recipe=published"] if setting.kind == FULL else [f"--epochs={epochs}"]
    jobs = []
    networks = {"shiftresnet20_3.0": ["--arch=shiftresnet20", "--expansion=3"], "resnet20": ["--arch=resnet20"]}
    for name, flags in networks.items():
        # channels-last: 1.7x the images/s of ShiftResNet20 (expansion 3) on the CPU, 0.95x of ResNet20
        train = ["shiftresnet/main.py", *flags, *schedule, *setting.data, "--channels-last", "--seed=1",
                 f"--output-dir={folder}", "--auto-resume"]  # fmt: skip
        jobs.append(setting.train(name, *train, epochs=epochs, metrics=folder / name / "metrics.jsonl"))
        evaluate = ["shiftresnet/eval.py", f"--model={folder / name}.t7", *setting.data]
        jobs.append(setting.job(f"evaluate {name}", *evaluate, after=(f"train {name}",)))
        jobs.append(setting.job(f"count {name}", "shiftresnet/count.py", *flags, after=()))
    return jobs


def deepshift_jobs(setting: Setting) -> list[Job]:
    """The convolutional network on MNIST, or on the digits: float, Q from scratch, PS from the float one; packed."""
    folder, full = setting.folder, setting.kind == FULL
    epochs = setting.epochs(digits=6, short=3, full=10)
    size = [] if full else [f"--epochs={epochs}", *(["--batch-size=32"] if setting.kind == DIGITS else [])]
    fast, gentle = ([], []) if full else (["--lr=0.03", "--momentum=0.9"], ["--lr=0.001"])
    networks = folder / "mnist" / "simple_conv"
    last = "shift_ps_all_wb_5_from_pretrained"
    runs = {
        "shift_0": fast,
        "shift_q_all_wb_5": ["--shift-depth=1000", "--shift-type=Q", *fast],
        last: [f"--weights={networks}/shift_0/weights.pth", "--shift-depth=1000", "--shift-type=PS",
               "--optimizer=radam", "--desc=from_pretrained", *gentle],
    }  # fmt: skip
    script = ["deepshift/mnist.py", "--type=conv", *setting.data, "--channels-last", f"--output-dir={folder}"]
    jobs = []
    for name, flags in runs.items():
        train = [*script, *flags, *size, "--seed=1", "--auto-resume", "--log-interval=1000"]
        after = ("train shift_0",) if name == last else ()
        jobs.append(setting.train(name, *train, epochs=epochs, metrics=networks / name / "metrics.jsonl", after=after))
    test = [*script, "--shift-type=PS", "-e", f"--resume={networks / last}/weights.packed", "--desc=evaluated"]
    jobs.append(setting.job("evaluate packed weights", *test, after=(f"train {last}",)))
    # After the other test: both write into the same folder.
    jobs.append(setting.job("evaluate on integer kernels", *test, "--use-kernel=True",
                            after=("evaluate packed weights",)))  # fmt: skip
    for bits in (5, 4):
        count = ("deepshift/count.py", "mnist", "--arch=simple_conv", "--shift-type=PS", f"--weight-bits={bits}")
        jobs.append(setting.job(f"count {bits} bits", *count, after=()))
    return jobs


def s3_jobs(setting: Setting) -> list[Job]:
    """S3 (3 bits) against its float twin, ResNet20 on CIFAR-10 or ResNet8 on the digits; converted, packed, counted."""
    folder = setting.folder
    epochs = setting.epochs(digits=6, short=2, full=200)
    network, size = ["--dataset=cifar10", "--arch=resnet20"], "--batch-size=128"
    if setting.kind == DIGITS:
        network, size = ["--dataset=digits", "--arch=resnet8"], "--batch-size=16"
    jobs = []
    for method in ("s3", "float"):
        train = ["s3/main.py", *network, f"--method={method}", *setting.data, size, f"--epochs={epochs}",
                 "--channels-last", "--seed=1", "--print-freq=1000", f"--output-dir={folder / method}",
                 "--auto-resume"]  # fmt: skip
        jobs.append(setting.train(method, *train, epochs=epochs, metrics=folder / method / "metrics.jsonl"))
    best, plain, packed = (str(folder / name) for name in ("s3/model_best.pth.tar", "plain.pth.tar", "s3.packed"))
    jobs.append(setting.job("convert and pack", "s3/convert.py", best, plain, "--packed", packed, after=("train s3",)))
    after = ("convert and pack",)
    evaluate = ["s3/main_eval.py", "--evaluate", *network, *setting.data]
    jobs.append(setting.job("evaluate plain weights", *evaluate, f"--resume={plain}", after=after))
    jobs.append(setting.job("evaluate on packed kernels", *evaluate, f"--resume={packed}", "--use-kernel", after=after))
    jobs.append(setting.job("count with zeros", "s3/count.py", f"--checkpoint={packed}", "--layers", after=after))
    runs = [str(folder / method) for method in ("s3", "float")]
    plot = ["s3/plot.py", *runs, f"--output={folder / 'curves.png'}"]
    jobs.append(setting.job("plot", *plot, after=("train s3", "train float")))
    return jobs


def shared_bases_jobs(setting: Setting) -> list[Job]:
    """ResNet32 with shared filter bases (s = 8, u = 1) against ResNet32 on CIFAR-10, or on the digits."""
    folder = setting.folder
    epochs = setting.epochs(digits=6, short=2, full=300)  # 2 on CIFAR-10: under 10 minutes each on 2 cores
    small = ["--batch_size=64"] if setting.kind == SHORT else ["--batch_size=32", "--lr=0.02"]
    schedule = [] if setting.kind == FULL else [f"--epochs={epochs}", *small]
    jobs, shared = [], folder / "CIFAR10-ResNet32_SingleShared-S8-U1-L10.0-0"
    networks = {"ResNet32_SingleShared": (["--shared_rank=8"], ["--lambdaR=10"], shared),
                "ResNet32": ([], [], folder / "CIFAR10-ResNet32-S16-U1-L10-0")}  # fmt: skip
    for name, (rank, weight, run) in networks.items():
        network = [f"--model={name}", *rank]
        train = ["shared_bases/train_cifar10.py", *network, *setting.data, *weight, *schedule,
                 "--channels-last",  # 1.15x the images/s on the CPU
                 "--seed=1", f"--output-dir={folder}", "--auto-resume"]  # fmt: skip
        jobs.append(setting.train(name, *train, epochs=epochs, metrics=run / "metrics.jsonl"))
        evaluate = ["shared_bases/eval_cifar10.py", f"--pretrained={run}.pth", *network, *setting.data]
        jobs.append(setting.job(f"evaluate {name}", *evaluate, after=(f"train {name}",)))
        count = ["shared_bases/count.py", "--dataset=cifar10", *network]
        jobs.append(setting.job(f"count {name}", *count, after=()))
    similarity = ["shared_bases/similarity.py", f"{shared}.pth", f"--output={folder}/similarity.png"]
    jobs.append(setting.job("similarity of the bases", *similarity, after=("train ResNet32_SingleShared",)))
    return jobs


def epsilon_resnet_jobs(setting: Setting) -> list[Job]:
    """An epsilon-ResNet that discards blocks while it trains, then compressed; on CIFAR-10, or on the digits."""
    folder, data = setting.folder, setting.data
    epochs = setting.epochs(digits=10, short=3, full=1000)
    if setting.kind == FULL:
        name, steps, schedule, criterion = "cifar10-e_2.5-n_18", 390, ["-n", "18", "-e", "2.5"], []
    else:  # high epsilon and weight decay: a block closes and decays within minutes, not days
        size, steps, drop = ("3", 1562, 2) if setting.kind == SHORT else ("2", 45, 8)
        name = f"cifar10-e_6-n_{size}"
        schedule = ["-n", size, "-e", "6", f"--epochs={epochs}", "--batch_size=32", "--weight_decay=3e-3",
                    f"--lr_schedule=0:0.1,{drop}:0.01", "--lr_reset_schedule=none"]  # fmt: skip
        criterion = ["--criterion=gate"]  # the original's wants 238 closed steps in a row
    run, step = folder / f"train_log.{name}", epochs * steps
    cfg = run / f"compressed_model_{step}.cfg"
    train = ["epsilon_resnet/cifarEpsilonResnet.py", "--cifar10", *schedule, *data, "--channels-last", "--seed=1", "-o",
             name, f"--output-dir={folder}", "--auto-resume"]  # fmt: skip
    compress = ["epsilon_resnet/compressModel.py", "--dir", str(run), f"--step={step}", "--verify", *criterion, *data]
    evaluate = ["epsilon_resnet/cifarCompressedResnet.py", "--gpu=0", "--cifar10", f"--cfg={cfg}", *data]
    return [
        setting.train(name, *train, epochs=epochs, metrics=run / "metrics.jsonl"),
        setting.job("compress", *compress),
        setting.job("evaluate the compressed network", *evaluate, after=("compress",)),
        setting.job("count the compressed network", "epsilon_resnet/count.py", f"--cfg={cfg}", after=("compress",)),
        setting.job("plot", "epsilon_resnet/plot.py", str(run), after=(f"train {name}",)),
    ]


@dataclass(frozen=True)
class Paper:
    """A paper's jobs, and the folder under --data-dir that says that its real data set is there."""

    jobs: Callable[[Setting], list[Job]]
    data_set: str


PAPERS = {
    "shiftresnet": Paper(shiftresnet_jobs, "cifar-10-batches-py"),
    "deepshift": Paper(deepshift_jobs, "MNIST"),
    "s3": Paper(s3_jobs, "cifar-10-batches-py"),
    "shared_bases": Paper(shared_bases_jobs, "cifar-10-batches-py"),
    "epsilon_resnet": Paper(epsilon_resnet_jobs, "cifar-10-batches-py"),
}


def setting_of(paper: str, *, output: Path, data_dir: Path, full: bool, device: str, extra=()) -> Setting:
    """Digits where the paper's data set is not found under data_dir, unless `full` is asked for."""
    found = (data_dir / PAPERS[paper].data_set).exists()
    kind = FULL if full else SHORT if found else DIGITS
    data = ["--embedded-data"] if kind == DIGITS else ["--data-dir", str(data_dir)]
    return Setting(paper, kind, output / paper / kind, (*data, f"--device={device}"), tuple(extra))
