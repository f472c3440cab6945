"""The stages of tests/gpu.sh:  bash tests/gpu.sh [--seconds N] [smoke] [tests] [capture] [bench] [sanitizer]

smoke      the papers' training scripts and two evaluations on their default device, side by side, two epochs of digits
tests      pytest -m gpu
capture    training steps replayed from a CUDA graph against plain ones
bench      the benchmarks of the GPU kernels: a few rows of each, then all
sanitizer  tests of the kernels under compute-sanitizer, where that is installed

They run in this order, each for at most so many seconds, and a stage that fails or is cut off does not stop the next.
Logs and results are written at once to $OUT, by default runs/gpu; summary.txt there has a line of each stage when it
ends. The exit status is 1 if one failed or was cut off. Needs the standard library only: what needs more runs in
$PYTHON.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.gpu_smoke import chains, judge

PYTHON = os.environ.get("PYTHON", sys.executable)
DEVICE = os.environ.get("GPU_SH_DEVICE", "cuda")  # what smoke must have run on: cpu, to try its commands without a GPU
LIMITS = {"smoke": 90, "tests": 300, "capture": 120, "bench": 600, "sanitizer": 900}  # seconds, in order
KILL_AFTER = 5  # seconds that a command has to end by itself when its time is up
TIMED_OUT = (124, 137)  # exit statuses of timeout(1): the command was told to end, was killed
DESCRIBE = """
import sys, torch
torch.empty(1, device=sys.argv[1])
name = torch.cuda.get_device_name() if torch.cuda.is_available() else sys.argv[1]
print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, python {sys.version.split()[0]}")
"""
PLUGINS = "import importlib.util as u; print(*[name for name in ('xdist', 'pytest_timeout') if u.find_spec(name)])"
# pytest -v, in one process or several; a last list of failures names those that never began, too.
OUTCOME = re.compile(
    r"^(?:(?:\[gw\d+\] \[ *\d+%\] )?(?P<first>PASSED|FAILED|ERROR|SKIPPED) (?P<test>tests/.+?)(?: - .*)?"
    r"|(?P<name>tests/.+?) (?P<last>PASSED|FAILED|ERROR|SKIPPED)\b.*)$"
)


class Done(NamedTuple):
    """How a command ended: its exit status, and whether the stage's time was up."""

    status: int
    is_cut_off: bool

    def __str__(self):
        return "cut off" if self.is_cut_off else "ok" if self.status == 0 else "FAILED"


class Outcome(NamedTuple):
    """How a stage ended: ok, FAILED, cut off or skipped. notes: what its line of the summary has no room for."""

    status: str
    detail: str
    where: Path
    notes: tuple[str, ...] = ()


class Runner:
    """Runs commands until a stage's time is up, and says how stages ended on the screen and in summary.txt."""

    def __init__(self, out: Path):
        self.out, self.deadline, self.is_stopped = out, 0.0, False
        self.running: set[subprocess.Popen] = set()
        self.summary = open(out / "summary.txt", "w", encoding="utf-8")

    def say(self, line: str):
        print(line, flush=True)
        self.summary.write(line + "\n")
        self.summary.flush()

    def run(self, words, log: Path, **environment: str) -> Done:
        """One command, what it says in `log`; not begun once the time is up."""
        left = self.deadline - time.monotonic()
        if left < 0.1 or self.is_stopped:
            return Done(1, True)
        # timeout(1) ends a command with all its children, even should this process be killed.
        limited = ["timeout", "-k", str(KILL_AFTER), f"{left:.1f}", *words]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        with open(log, "w") as output:
            process = subprocess.Popen(
                limited, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            self.running.add(process)
            status = process.wait()
            self.running.discard(process)
        return Done(status, status in TIMED_OUT and time.monotonic() >= self.deadline - 0.1)

    def stop(self, number, _):
        """Signal handler: ends everything that runs."""
        self.is_stopped = True
        for process in list(self.running):
            process.terminate()
        sys.exit(128 + number)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(processes: int) -> dict[str, str]:
    """Environment that shares the cores among so many processes."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // processes)))}


def ask(program: str, *arguments: str, patience=120) -> tuple[bool, str]:
    """Whether a short program ends well, and its last line, or the reason."""
    try:
        asked = subprocess.run([PYTHON, "-c", program, *arguments], capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:  # a broken driver can hang
        return False, f"no answer in {patience} s"
    said = (asked.stderr if asked.returncode else asked.stdout).strip().splitlines()
    return asked.returncode == 0, said[-1] if said else f"exit {asked.returncode}"


def last_lines(log: Path, count=3) -> list[str]:
    try:
        return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-count:]
    except OSError:
        return []


def rows_of(folder: Path) -> int:
    """Rows, without the headers, of all CSV files."""
    return sum(max(0, len(path.read_text().splitlines()) - 1) for path in folder.glob("*.csv"))


def smoke(runner: Runner) -> Outcome:
    folder = runner.out / "smoke"
    folder.mkdir(exist_ok=True)
    statuses, notes = {}, []
    with tempfile.TemporaryDirectory() as runs:
        every = chains(Path(runs), DEVICE)
        threads = threads_of(len(every))

        def run_chain(chain):
            for check in chain:
                log, start = folder / f"{check.name}.log", time.monotonic()
                done = runner.run([PYTHON, *check.words], log, **threads)
                is_good, seen = judge(check, log, DEVICE)
                statuses[check.name] = "FAILED" if str(done) == "ok" and not is_good else str(done)
                line = f"  {check.name:22} {statuses[check.name]:8} {time.monotonic() - start:5.1f} s  "
                line += f"exit {done.status}, {seen}"
                runner.say(line)
                if statuses[check.name] != "ok":
                    notes.extend([line, *(f"    {text}" for text in last_lines(log))])

        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(run_chain, every))
    bad = [name for name, status in statuses.items() if status != "ok"]
    detail = f"{len(statuses) - len(bad)} of {len(statuses)} commands ended well on {DEVICE}"
    status = "FAILED" if "FAILED" in statuses.values() else "cut off" if bad else "ok"
    return Outcome(status, detail + (f"; not so: {', '.join(bad)}" if bad else ""), folder, tuple(notes))


def count_outcomes(log: Path) -> dict[str, list[str]]:
    """PASSED, FAILED, ERROR and SKIPPED -> names of the tests; a log has them even if pytest was cut off."""
    found = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        match = OUTCOME.match(line.rstrip())
        if match:
            found[match["test"] or match["name"]] = match["first"] or match["last"]
    return {kind: [name for name, last in found.items() if last == kind] for kind in sorted(set(found.values()))}


def run_tests(runner: Runner) -> Outcome:
    log, xml = runner.out / "tests.log", runner.out / "tests.xml"
    xml.unlink(missing_ok=True)  # one that is cut off leaves none
    plugins = ask(PLUGINS)[1].split()
    processes = min(8, cores()) if "xdist" in plugins else 1
    words = [PYTHON, "-m", "pytest", "-m", "gpu", "tests", "-v", "--tb=short", f"--junitxml={xml}"]
    words += ["-n", str(processes)] if "xdist" in plugins else []
    words += ["--timeout=120"] if "pytest_timeout" in plugins else []
    done = runner.run(words, log, **threads_of(processes))
    counted = count_outcomes(log)
    bad = [*counted.get("FAILED", ()), *counted.get("ERROR", ())]
    detail = ", ".join(f"{len(names)} {kind.lower()}" for kind, names in counted.items()) or "no test ran"
    status = str(done) if counted.get("PASSED") or done.is_cut_off else "FAILED"
    return Outcome(status, detail + (f": {', '.join(bad)}" if bad else ""), log)


def capture(runner: Runner) -> Outcome:
    script, log, table = Path("tests/capture_gpu.py"), runner.out / "capture.log", runner.out / "capture.csv"
    if not (ROOT / script).exists():
        return Outcome("FAILED", f"there is no {script}", runner.out)
    table.unlink(missing_ok=True)
    done = runner.run([PYTHON, str(script), "--out", str(runner.out)], log)
    lines = [f"    {line}" for line in last_lines(table, 40)]
    detail = f"exit {done.status}, {max(0, len(lines) - 1)} rows in {table.name}"
    return Outcome(str(done), detail, log, (*lines, *complaints(done, log)))


def complaints(done: Done, log: Path) -> list[str]:
    return [] if done.status == 0 else [f"    {text}" for text in last_lines(log)]


def bench(runner: Runner) -> Outcome:
    """The quick rows of every kernel are in bench-quick before the whole benchmarks begin, in bench."""
    details, notes, statuses = [], [], []
    for name, flags in (("bench-quick", ["--quick"]), ("bench", [])):
        folder, log = runner.out / name, runner.out / f"{name}.log"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.csv"):
            old.unlink()
        words = [PYTHON, "benchmarks/run.py", "--device", DEVICE, *flags, "--results", str(folder)]
        done = runner.run(words, log)
        statuses.append(str(done))
        details.append(f"{name}: {done}, {rows_of(folder)} rows")
        notes += complaints(done, log)
    status = "FAILED" if "FAILED" in statuses else statuses[-1]
    return Outcome(status, "; ".join(details), runner.out / "bench", tuple(notes))


def sanitizer(runner: Runner) -> Outcome:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return Outcome("skipped", "compute-sanitizer is not installed (it comes with the CUDA toolkit)", runner.out)
    chosen = {
        "memcheck": "every_kernel or equals_the_definition or half or naive or int8",
        "racecheck": "equals_the_definition or half or naive",
    }
    details, notes, statuses = [], [], []
    for tool, tests in chosen.items():
        log = runner.out / f"{tool}.log"
        words = [program, "--error-exitcode", "1", "--tool", tool, PYTHON, "-m", "pytest", "-m", "gpu"]
        words += ["tests/common", "-k", tests, "-v", "--tb=short"]
        # PyTorch's caching allocator would hide what goes beyond a tensor.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        done = runner.run(words, log, **environment)
        statuses.append(str(done))
        counted = ", ".join(f"{len(names)} {kind.lower()}" for kind, names in count_outcomes(log).items())
        details.append(f"{tool}: {done}, {counted or 'no test ran'}")
        notes += complaints(done, log)
    status = "FAILED" if "FAILED" in statuses else statuses[-1]
    return Outcome(status, "; ".join(details), runner.out, tuple(notes))


STAGES = {"smoke": smoke, "tests": run_tests, "capture": capture, "bench": bench, "sanitizer": sanitizer}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"gpu.sh: {message}\n")


def stage_name(text: str) -> str:
    if text not in STAGES:
        raise argparse.ArgumentTypeError(f"there is no stage {text!r}; there are {', '.join(STAGES)}")
    return text


def seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 1, not {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = ", ".join(f"{name} {limit}" for name, limit in LIMITS.items())
    parser.add_argument("stages", nargs="*", type=stage_name, metavar="STAGE", help="these only (default: all)")
    parser.add_argument("--seconds", type=seconds, metavar="N", help=f"time limit of each stage (default: {limits})")
    return parser


def describe_device() -> str:
    """One line about the device and the versions; ends with one line and status 1 where there is none."""
    is_there, said = ask(DESCRIBE, DEVICE)
    if not is_there:
        sys.exit(f"gpu.sh: PyTorch sees no CUDA device here ({said}); the rest of the tests: bash tests/run.sh")
    return said


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    device = describe_device()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    out.mkdir(parents=True, exist_ok=True)
    runner, lines, are_good = Runner(out), [], True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    runner.say(device)
    for name in [name for name in LIMITS if name in args.stages or not args.stages]:
        limit, start = args.seconds or LIMITS[name], time.monotonic()
        runner.deadline = start + limit
        runner.say(f"{name}: at most {limit} s")
        try:
            outcome = STAGES[name](runner)
        except Exception as error:  # of this file: the other stages are worth having all the same
            outcome = Outcome("FAILED", f"{type(error).__name__}: {error}", out)
        where = os.path.relpath(outcome.where, ROOT) if outcome.where.is_relative_to(ROOT) else outcome.where
        line = f"{name:9} {outcome.status:8} {time.monotonic() - start:5.0f} s  {outcome.detail}; see {where}"
        for text in (line, *outcome.notes):
            runner.say(text)
        lines += [line, *outcome.notes]
        are_good &= outcome.status in ("ok", "skipped")
    print("\n" + "\n".join(lines), flush=True)
    return 0 if are_good else 1


if __name__ == "__main__":
    sys.exit(main())
