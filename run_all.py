"""Run the main job of every paper: train, evaluate the saved file, count. Called by run_all.sh after the set-up.

    bash run_all.sh                            # digits that need no download, minutes on a laptop
    bash run_all.sh --data-dir DIR             # the real data sets found under DIR, on a short schedule
    bash run_all.sh --data-dir DIR --full      # the papers' own schedules; wants a GPU
    bash run_all.sh --only shiftresnet -- --amp bf16    # flags after -- go to the training commands

Runs go to runs/<paper>/. A finished job is not repeated, an interrupted one goes on where it was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LAST_LINES = 12


@dataclass(frozen=True)
class Job:
    """One command of a paper. epochs and metrics (path of metrics.jsonl) are set for training jobs only."""

    paper: str
    title: str
    command: tuple[str, ...]
    epochs: int = 0
    metrics: Path | None = None

    def log_path(self, output: Path) -> Path:
        return output / self.paper / f"{self.title.replace(' ', '-')}.log"


def shiftresnet_jobs(args, output: Path) -> list[Job]:
    """ShiftResNet20 (expansion 3) against ResNet20 on CIFAR-10, or on the digits."""
    folder = output / "shiftresnet"
    real = has_real_data(args.data_dir, "cifar-10-batches-py")
    data = ["--data-dir", args.data_dir] if real or args.full else ["--embedded-data"]
    epochs = 160 if args.full else 2 if real else 8  # 2 on CIFAR-10: under 10 minutes each on 2 cores
    schedule = ["--recipe=published"] if args.full else [f"--epochs={epochs}"]
    jobs = []
    networks = {"shiftresnet20_3.0": ["--arch=shiftresnet20", "--expansion=3"], "resnet20": ["--arch=resnet20"]}
    for name, flags in networks.items():
        common = [*data, f"--device={args.device}"]
        train = [
            "shiftresnet/main.py",
            *flags,
            *schedule,
            *common,
            "--channels-last",  # 1.7x the images/s of ShiftResNet20 (expansion 3) on the CPU, 0.95x of ResNet20
            "--seed=1",
            f"--output-dir={folder}",
            "--auto-resume",
        ]
        jobs.append(Job("shiftresnet", f"train {name}", (*train, *args.extra), epochs, folder / name / "metrics.jsonl"))
        evaluate = ["shiftresnet/eval.py", f"--model={folder / name}.t7", *common]
        jobs.append(Job("shiftresnet", f"evaluate {name}", tuple(evaluate)))
        jobs.append(Job("shiftresnet", f"count {name}", ("shiftresnet/count.py", *flags)))
    return jobs


def shared_bases_jobs(args, output: Path) -> list[Job]:
    """ResNet32 with shared filter bases (s = 8, u = 1) against ResNet32 on CIFAR-10, or on the digits."""
    folder = output / "shared_bases"
    real = has_real_data(args.data_dir, "cifar-10-batches-py")
    data = ["--data-dir", args.data_dir] if real or args.full else ["--embedded-data"]
    epochs = 300 if args.full else 2 if real else 6  # 2 on CIFAR-10: under 10 minutes each on 2 cores
    small = ["--batch_size=64"] if real else ["--batch_size=32", "--lr=0.02"]
    schedule = [] if args.full else [f"--epochs={epochs}", *small]
    jobs = []
    networks = {"ResNet32_SingleShared": ["--lambdaR=10", "--shared_rank=8"], "ResNet32": []}
    for name, flags in networks.items():
        common = [f"--model={name}", *flags[1:], *data, f"--device={args.device}"]
        train = [
            "shared_bases/train_cifar10.py",
            *common,
            *flags[:1],
            *schedule,
            "--channels-last",  # 1.15x the images/s on the CPU
            "--seed=1",
            f"--output-dir={folder}",
            "--auto-resume",
        ]
        ranks = "S8-U1-L10.0" if flags else "S16-U1-L10"
        run = folder / f"CIFAR10-{name}-{ranks}-0"
        jobs.append(Job("shared_bases", f"train {name}", (*train, *args.extra), epochs, run / "metrics.jsonl"))
        evaluate = ["shared_bases/eval_cifar10.py", f"--pretrained={run}.pth", *common]
        jobs.append(Job("shared_bases", f"evaluate {name}", tuple(evaluate)))
        count = ["shared_bases/count.py", "--dataset=cifar10", f"--model={name}", *flags[1:]]
        jobs.append(Job("shared_bases", f"count {name}", tuple(count)))
    run = folder / "CIFAR10-ResNet32_SingleShared-S8-U1-L10.0-0"
    similarity = ["shared_bases/similarity.py", f"{run}.pth", f"--output={folder}/similarity.png"]
    jobs.append(Job("shared_bases", "similarity of the bases", tuple(similarity)))
    return jobs


def epsilon_resnet_jobs(args, output: Path) -> list[Job]:
    """An epsilon-ResNet that discards blocks while it trains, then compressed; on CIFAR-10, or on the digits."""
    folder = output / "epsilon_resnet"
    real = has_real_data(args.data_dir, "cifar-10-batches-py")
    data = [*(["--data-dir", args.data_dir] if real or args.full else ["--embedded-data"]), f"--device={args.device}"]
    if args.full:
        name, epochs, steps, schedule = "cifar10-e_2.5-n_18", 1000, 390, ["-n", "18", "-e", "2.5"]
        criterion = []
    else:  # high epsilon and weight decay: a block closes and decays within minutes, not days
        size, epochs, steps, drop = ("3", 3, 1562, 2) if real else ("2", 10, 45, 8)
        name = f"cifar10-e_6-n_{size}"
        schedule = ["-n", size, "-e", "6", f"--epochs={epochs}", "--batch_size=32", "--weight_decay=3e-3",
                    f"--lr_schedule=0:0.1,{drop}:0.01", "--lr_reset_schedule=none"]  # fmt: skip
        criterion = ["--criterion=gate"]  # the original's wants 238 closed steps in a row
    run, step = folder / f"train_log.{name}", epochs * steps
    cfg = run / f"compressed_model_{step}.cfg"
    train = ["epsilon_resnet/cifarEpsilonResnet.py", "--cifar10", *schedule, *data, "--channels-last", "--seed=1", "-o",
             name, f"--output-dir={folder}", "--auto-resume", *args.extra]  # fmt: skip
    compress = ["--dir", str(run), f"--step={step}", "--verify", *criterion, *data]
    return [
        Job("epsilon_resnet", f"train {name}", tuple(train), epochs, run / "metrics.jsonl"),
        Job("epsilon_resnet", "compress", ("epsilon_resnet/compressModel.py", *compress)),
        Job(
            "epsilon_resnet",
            "evaluate the compressed network",
            ("epsilon_resnet/cifarCompressedResnet.py", "--gpu=0", "--cifar10", f"--cfg={cfg}", *data),
        ),
        Job("epsilon_resnet", "count the compressed network", ("epsilon_resnet/count.py", f"--cfg={cfg}")),
        Job("epsilon_resnet", "plot", ("epsilon_resnet/plot.py", str(run))),
    ]


def deepshift_jobs(args, output: Path) -> list[Job]:
    """The convolutional network on MNIST, or on the digits: float, Q from scratch, PS from the float one."""
    folder = output / "deepshift"
    real = has_real_data(args.data_dir, "MNIST")
    data = [*(["--data-dir", args.data_dir] if real or args.full else ["--embedded-data"]), f"--device={args.device}"]
    epochs = 10 if args.full else 3 if real else 6
    size = [] if args.full else [f"--epochs={epochs}", *([] if real else ["--batch-size=32"])]
    fast, gentle = ([], []) if args.full else (["--lr=0.03", "--momentum=0.9"], ["--lr=0.001"])
    networks = folder / "mnist" / "simple_conv"
    runs = {
        "shift_0": fast,
        "shift_q_all_wb_5": ["--shift-depth=1000", "--shift-type=Q", *fast],
        "shift_ps_all_wb_5_from_pretrained": [f"--weights={networks}/shift_0/weights.pth", "--shift-depth=1000",
                                              "--shift-type=PS", "--optimizer=radam", "--desc=from_pretrained",
                                              *gentle],
    }  # fmt: skip
    script, jobs = ["deepshift/mnist.py", "--type=conv", *data, "--channels-last", f"--output-dir={folder}"], []
    for name, flags in runs.items():
        train = [*script, *flags, *size, "--seed=1", "--auto-resume", "--log-interval=1000", *args.extra]
        jobs.append(Job("deepshift", f"train {name}", tuple(train), epochs, networks / name / "metrics.jsonl"))
    packed = networks / name / "weights.packed"
    test = [*script, "--shift-type=PS", "-e", f"--resume={packed}", "--desc=evaluated"]
    jobs.append(Job("deepshift", "evaluate packed weights", tuple(test)))
    jobs.append(Job("deepshift", "evaluate on integer kernels", (*test, "--use-kernel=True")))
    for bits in (5, 4):
        count = ("deepshift/count.py", "mnist", "--arch=simple_conv", "--shift-type=PS", f"--weight-bits={bits}")
        jobs.append(Job("deepshift", f"count {bits} bits", count))
    return jobs


PAPERS = {
    "shiftresnet": shiftresnet_jobs,
    "deepshift": deepshift_jobs,
    "shared_bases": shared_bases_jobs,
    "epsilon_resnet": epsilon_resnet_jobs,
}


def has_real_data(data_dir: str, name: str) -> bool:
    return (Path(data_dir) / name).exists()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def epochs_done(job: Job) -> int:
    """Epochs that the job's metrics.jsonl has."""
    try:
        return sum('"type": "epoch"' in line for line in job.metrics.read_text().splitlines())
    except (OSError, AttributeError):
        return 0


def progress(job: Job, seconds: float, at_start: int) -> str:
    """Elapsed time and, for a training job, epochs and an estimate of the time left."""
    text = clock(seconds)
    if job.epochs:
        done = epochs_done(job)
        text += f", epoch {done}/{job.epochs}"
        if done > at_start:
            text += f", about {clock(seconds / (done - at_start) * (job.epochs - done))} left"
    return text


def run_job(job: Job, label: str, output: Path) -> bool:
    """Run one job with its output in a log, showing one progress line. True if it succeeded."""
    log_path = job.log_path(output)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    start, at_start, shown = time.monotonic(), epochs_done(job), ""
    live = sys.stdout.isatty()
    with open(log_path, "w") as log:
        process = subprocess.Popen([sys.executable, *job.command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if live:
                    shown = f"{label}  {progress(job, time.monotonic() - start, at_start)}"
                    print(f"\r{shown:<{os.get_terminal_size().columns - 1}}", end="", flush=True)
                time.sleep(0.2)
        except KeyboardInterrupt:
            process.wait()
            raise
    state = "ok" if process.returncode == 0 else f"FAILED (exit status {process.returncode})"
    line = f"{label}  {clock(time.monotonic() - start)}  {state}"
    print(f"\r{line:<{len(shown)}}" if live else line, flush=True)
    if process.returncode == 0:
        marker(job, output).write_text(json.dumps(job.command))
        return True
    print(f"  $ python {shlex.join(job.command)}\n  last lines of {log_path}:")
    for text in log_path.read_text(errors="replace").splitlines()[-LAST_LINES:]:
        print(f"  | {text}")
    return False


def marker(job: Job, output: Path) -> Path:
    """File that says that the job succeeded, and with which command."""
    return job.log_path(output).with_suffix(".done")


def is_done(job: Job, output: Path) -> bool:
    try:
        return json.loads(marker(job, output).read_text()) == list(job.command)
    except (OSError, json.JSONDecodeError):
        return False


def print_results(jobs: list[Job]):
    """A table of the accuracies that the training jobs reached."""
    rows = [("paper", "run", "data", "top-1 (%)", "epochs run / in paper", "parameters", "multiply-adds")]
    for job in jobs:
        if job.metrics is None or not job.metrics.exists():
            continue
        lines = [json.loads(line) for line in job.metrics.read_text().splitlines()]
        header, result = lines[0], lines[-1]
        if result["type"] == "result":
            rows.append((job.paper, job.title.removeprefix("train "), header["data"], f"{result['top1']:.2f}",
                         f"{result['epochs']} / {result['epochs_in_paper']}", f"{header['params']:,}",
                         f"{header['macs']:,}"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows if len(rows) > 1 else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(PAPERS), help="this paper only; may be given several times"
    )
    parser.add_argument("--full", action="store_true", help="the papers' own schedules on the real data")
    parser.add_argument(
        "--data-dir", default="./data", metavar="DIR", help="where data sets are (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs", metavar="DIR", help="where runs go (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the jobs and whether they are done, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="more flags for the training commands")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    os.chdir(ROOT)
    output = Path(args.output_dir)
    jobs = [job for paper in args.only or PAPERS for job in PAPERS[paper](args, output)]
    if args.list or args.dry_run:
        for job in jobs:
            state = "done  " if is_done(job, output) else "to do "
            print(f"{state} {job.paper}: {job.title}" if args.list else f"python {shlex.join(job.command)}")
        return 0
    failed = 0
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.paper}: {job.title}"
        if is_done(job, output):
            print(f"{label}  done before")
            continue
        try:
            failed += not run_job(job, label, output)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here")
            return 130
    print_results(jobs)
    if failed:
        print(f"\n{failed} of {len(jobs)} jobs failed; the same command tries them again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
