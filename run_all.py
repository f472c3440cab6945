"""Run the main jobs of every paper: train, evaluate the saved file, count. Called by run_all.sh after the set-up.

    bash run_all.sh                                     # digits that need no download, minutes on a laptop
    bash run_all.sh --data-dir DIR                      # the real data sets found under DIR, for a few epochs
    bash run_all.sh --data-dir DIR --full --jobs 4      # the papers' own schedules, four runs at once; wants GPUs
    bash run_all.sh --only shiftresnet -- --amp bf16    # flags after -- go to this paper's training commands

Runs go to runs/<paper>/<digits, short or full>/, each with a log beside it; the page that sums them up to
report/index.html (with --output-dir DIR to DIR/report). A finished job is not repeated, an interrupted one goes on
where it was.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH

from jobs import DIGITS, PAPERS, Job, setting_of

ROOT = Path(__file__).resolve().parent
LAST_LINES = 12
SECONDS_BETWEEN_LINES = 60  # of a run's progress, where there is no terminal
SECONDS_BETWEEN_SHOWS = 0.5  # on a terminal
SECONDS_TO_STOP = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def clock(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{int(seconds) % 60:02d}"


class Screen:
    """Lines that stay, and below them, on a terminal, one line per running job that is written again and again."""

    def __init__(self):
        self.live, self.shown = sys.stdout.isatty(), 0

    def say(self, text: str):
        self.show([])
        print(text, flush=True)

    def show(self, lines: list[str]):
        if not self.live:
            return
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self.shown}F\x1b[J" if self.shown else ""
        print(up + "".join(f"{line[:width]}\n" for line in lines), end="", flush=True)
        self.shown = len(lines)


class Run:
    """A started job: its process, whose output goes to the job's log."""

    def __init__(self, job: Job, label: str, environment: dict, lock: int):
        self.job, self.label = job, label
        self.start = self.last_line = time.monotonic()
        self.at_start = job.epochs_done()
        with open(job.log, "a") as log:
            log.write(f"$ python {shlex.join(job.command)}\n")
            log.flush()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            command = [sys.executable, *job.command]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(lock,), **streams)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def progress(self) -> str:
        """Elapsed time and, of a training job, epochs and an estimate of the time left."""
        text = f"{self.label}  {clock(self.seconds)}"
        if self.job.epochs:
            done = self.job.epochs_done()
            text += f", epoch {done}/{self.job.epochs}"
            if done > self.at_start:
                left = self.seconds / (done - self.at_start) * (self.job.epochs - done)
                text += f", about {clock(left)} left"
        return text

    def outcome(self) -> str:
        """The line that stays when the process has ended; of a failed one also the last lines of its log."""
        text = f"{self.label}  {clock(self.seconds)}  "
        if self.process.returncode == 0:
            result = self.job.result()
            return text + ("ok" if result is None else f"ok, top-1 {result['top1']:.2f}%")
        lines = self.job.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        text += f"FAILED (exit status {self.process.returncode})\n  $ python {shlex.join(self.job.command)}\n"
        return text + f"  last lines of {self.job.log}:\n" + "\n".join(f"  | {line}" for line in lines)


def count_gpus() -> int:
    """As PyTorch sees them; asked in a process of its own, since this one would keep PyTorch in memory for hours."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)


def visible_gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that runs may be spread over; [] where `device` leaves no choice."""
    if device not in ("auto", "cuda"):
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = count_gpus()
    return named[:count] or [str(number) for number in range(count)]


def environments(at_once: int, device: str) -> list[dict]:
    """Environment variables of the runs that go on at the same time: each has its GPU and its share of the CPU."""
    shared = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if at_once == 1:
        return [shared]
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared.setdefault("OMP_NUM_THREADS", str(max(1, processors // at_once)))
    gpus = visible_gpus(device)
    if not gpus:
        return [shared] * at_once
    return [{**shared, "CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(at_once)]


class Runner:
    """Runs jobs, as many at once as there are environments, each after those that it needs."""

    def __init__(self, jobs: list[Job], environments: list[dict], lock: int):
        self.jobs, self.environments, self.lock = jobs, environments, lock
        self.screen, self.last_show = Screen(), 0.0
        self.runs, self.signal = {}, None  # runs: by place among the environments
        self.waiting, self.succeeded, self.failed = list(jobs), set(), []

    def run(self) -> int | None:
        """Run all jobs; returns None, or the number of the signal that ended it early."""
        before = {number: signal.signal(number, self._note_signal) for number in SIGNALS}
        try:
            while (self.waiting or self.runs) and self.signal is None:
                self._collect()
                self._start_ready()
                self._show()
                time.sleep(0.1)
            return self.signal
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number, frame):
        self.signal = number

    def _start_ready(self):
        for job in list(self.waiting):
            needs = job.needs(self.jobs)
            failed = [need.title for need in needs if need in self.failed]
            label = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.paper}: {job.title}"
            if failed:
                self.screen.say(f"{label}  not run: it needs '{failed[0]}', which failed")
                self.failed.append(job)
            elif not self.succeeded.issuperset(needs):
                continue
            elif job.is_done(self.jobs):
                self.screen.say(f"{label}  done before")
                self.succeeded.add(job)
            elif len(self.runs) == len(self.environments):
                continue
            else:
                place = next(place for place in range(len(self.environments)) if place not in self.runs)
                job.marker.unlink(missing_ok=True)
                self.runs[place] = Run(job, label, self.environments[place], self.lock)
            self.waiting.remove(job)

    def _collect(self):
        for place, run in list(self.runs.items()):
            if run.process.poll() is None:
                continue
            del self.runs[place]
            if run.process.returncode == 0:
                run.job.marker.write_text(json.dumps(run.job.command))
                self.succeeded.add(run.job)
            else:
                self.failed.append(run.job)
            self.screen.say(run.outcome())

    def _show(self):
        now = time.monotonic()
        if self.screen.live and now - self.last_show > SECONDS_BETWEEN_SHOWS:
            self.last_show = now
            self.screen.show([run.progress() for run in self.runs.values()])
        for run in () if self.screen.live else self.runs.values():
            if now - run.last_line > SECONDS_BETWEEN_LINES:
                run.last_line = now
                print(run.progress(), flush=True)

    def _stop(self):
        self.screen.show([])
        for run in self.runs.values():
            run.process.terminate()
        for run in self.runs.values():
            try:
                run.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()


def print_results(jobs: list[Job]):
    """A table of the accuracies that the training jobs reached."""
    rows = [("paper", "run", "data", "top-1 (%)", "epochs run / in paper", "parameters", "multiply-adds")]
    for job in jobs:
        header, result = next(iter(job.read_metrics()), None), job.result()
        if result is not None:
            rows.append((job.paper, job.title.removeprefix("train "), header["data"], f"{result['top1']:.2f}",
                         f"{result['epochs']} / {result['epochs_in_paper']}", f"{header['params']:,}",
                         f"{header['macs']:,}"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows if len(rows) > 1 else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_report(output: Path) -> bool:
    """Let report.py sum up the runs in a page and say where it is. False if that failed.

    Of runs elsewhere the page is there, too: the source tree may be read-only, or somebody else's.
    """
    page = Path("report") if output == Path("runs") else output / "report"
    command = ["report.py", str(output), "--output-dir", str(page)]
    print("\nwriting the report ...", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(f"the report FAILED: {lines[-1]}\n  $ python {shlex.join(command)}")
    return done.returncode == 0


def lock_folder(output: Path):
    """Hold the folder for this call and, by inheritance, for its runs, which may outlive a call that is killed."""
    output.mkdir(parents=True, exist_ok=True)
    lock = open(output / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: a run of another call is at work in {output} (Ctrl-C to give up)", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.sh", description=__doc__, usage="%(prog)s [flags] [-- FLAGS]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--only", action="append", choices=tuple(PAPERS), help="this paper only; may be given several times")
    add("--full", action="store_true", help="the papers' own schedules on the real data, downloaded where missing")
    add("--data-dir", metavar="DIR", help="where data sets are, in torchvision's layout (default: data)")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    text = "runs at once, spread over the visible GPUs; on the CPU each has its share of threads (default: 1)"
    add("--jobs", type=positive, default=1, metavar="N", help=text)
    add("--output-dir", default=ROOT / "runs", metavar="DIR", help="where runs go (default: runs)")
    add("--list", action="store_true", help="show the jobs and whether they are done, run nothing")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Flags, and in `extra` those after -- . Paths in the repository are relative to it: logs name no machine's."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = build_parser()
    args = parser.parse_args(own)
    args.only, args.extra = list(dict.fromkeys(args.only or PAPERS)), extra
    if extra and len(args.only) > 1:
        parser.error("flags after -- are for one paper's training commands: add --only PAPER")
    if args.data_dir and not args.full and not Path(args.data_dir).is_dir():
        parser.error(f"--data-dir {args.data_dir} is not a folder; leave it out to train on digits that need no data")
    args.data_dir, args.output_dir = (
        path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for path in (Path(args.data_dir or ROOT / "data").resolve(), Path(args.output_dir).resolve())
    )
    return args


def main(argv=None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    os.chdir(ROOT)
    settings = [setting_of(paper, output=args.output_dir, data_dir=args.data_dir, full=args.full, device=args.device,
                           extra=args.extra) for paper in args.only]  # fmt: skip
    jobs = [job for setting in settings for job in PAPERS[setting.paper].jobs(setting)]
    if args.list or args.dry_run:
        for job in jobs:
            state = "done  " if job.is_done(jobs) else "to do "
            print(f"{state} {job.paper}: {job.title}" if args.list else f"python {shlex.join(job.command)}")
        return 0
    for setting in settings:
        if setting.kind == DIGITS:
            print(f"{setting.paper}: on embedded digits, there is no {args.data_dir / PAPERS[setting.paper].data_set}")
    try:
        for setting in settings:
            setting.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(args.output_dir) as lock:
            runner = Runner(jobs, environments(args.jobs, args.device), lock.fileno())
            stopped = runner.run()
        if not stopped:
            print_results(jobs)
            reported = write_report(args.output_dir)
    except KeyboardInterrupt:  # while waiting for the lock, or in the report
        stopped = signal.SIGINT
    except OSError as error:
        print(f"error: cannot write to {args.output_dir}: {error}; choose another --output-dir", file=sys.stderr)
        return 1
    if stopped:
        print("\ninterrupted; the same command goes on from here")
        return 128 + stopped
    if runner.failed:
        print(f"\n{len(runner.failed)} of {len(jobs)} jobs failed; the same command tries them again")
    return 1 if runner.failed or not reported else 0


if __name__ == "__main__":
    sys.exit(main())
