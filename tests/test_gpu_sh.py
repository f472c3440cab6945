"""tests/gpu.sh without a GPU: a fake interpreter stands for all that it starts, and fails or hangs as it is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import run as benchmarks
from tests import gpu_smoke, gpu_stages
from tests.readme_commands import check_arguments

ROOT = Path(__file__).resolve().parents[1]
# Run as $PYTHON. FAIL and HANG have words, with commas between, of the commands that fail, or never end after
# what they print; DEVICE is what training records, none: there is no GPU.
FAKE = """\
import json, os, pathlib, sys, time
words = sys.argv[1:]
if words[0] == "tests/gpu_stages.py":
    os.execv(sys.executable, [sys.executable, *words])
text, device = " ".join(words), os.environ.get("DEVICE", "cuda:0")
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join([str(os.getpid()), *text.split()]) + chr(10))
bad, hanging = (filter(None, os.environ.get(name, "").split(",")) for name in ("FAIL", "HANG"))
is_bad, hangs = any(word in text for word in bad), any(word in text for word in hanging)
if "torch.empty" in text:
    print("Fake GPU, torch 2") if device != "none" else sys.exit("AssertionError: no CUDA here")
elif "find_spec" in text:
    print("xdist")
elif "pytest" in words:
    print("[gw0] [ 50%] PASSED tests/common/test_a.py::test_x[a b] ")
    print("[gw1] [100%] FAILED tests/common/test_a.py::test_y " if is_bad else "")
elif "benchmarks/run.py" in words:
    folder = pathlib.Path(words[words.index("--results") + 1])
    (folder / "bench_shift_cuda.csv").write_text("comparison,name" + chr(10) + "fp32,shift2d" + chr(10))
elif "capture_gpu.py" in text:
    pathlib.Path(words[-1], "capture.csv").write_text("paper,equal" + chr(10) + "s3,True" + chr(10))
elif "--output-dir=" in text:
    folder = pathlib.Path(text.split("--output-dir=")[1], "run")
    folder.mkdir(parents=True)
    lines = [{"type": "run", "device": device}, {"type": "result", "top1": 50.0}]
    (folder / "metrics.jsonl").write_text(chr(10).join(map(json.dumps, lines)))
if ".py" in text:
    print("Acc: 50.000%")
sys.stdout.flush()
if hangs:
    time.sleep(600)
if is_bad:
    print("one", "two", "three", "four", sep=chr(10), file=sys.stderr)
sys.exit(is_bad)
"""
ALL = ["smoke", "tests", "capture", "bench", "sanitizer"]


@pytest.fixture
def gpu_sh(tmp_path):
    """Function that starts a copy of gpu.sh whose interpreter is the fake one, and returns the process."""
    root, tools = tmp_path / "repository", tmp_path / "tools"
    (root / "tests").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / "setup.sh", root)
    for name in ("gpu.sh", "gpu_stages.py", "gpu_smoke.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests")
    (root / "tests/capture_gpu.py").touch()
    (tools / "python").write_text(f"#!{sys.executable} -SE\n{FAKE}")
    (tools / "compute-sanitizer").write_text('#!/bin/sh\nwhile [ "$1" != -m ]; do last=$1; shift; done; "$last" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def start(*arguments, **environment):
        environment = {"PYTHON": str(tools / "python"), "CALLS": str(tmp_path / "calls"), **environment}
        path = {"PATH": f"{tools}:{os.environ['PATH']}"}
        words = ["bash", root / "tests/gpu.sh", *arguments]
        return subprocess.Popen(words, env={**os.environ, **path, **environment}, cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    return start


def finish(process):
    """(exit status, the summary's lines by stage, all that was said)."""
    output, errors = process.communicate(timeout=60)
    summary = output.rpartition("\n\n")[2]
    lines = {line.split()[0]: line for line in summary.splitlines() if not line.startswith(" ")}
    return process.returncode, lines, output + errors


def calls(tmp_path):
    """Commands that the fake interpreter was asked for, from their first word on."""
    return [line.split(" ", 1)[1] for line in (tmp_path / "calls").read_text().splitlines()]


def test_all_stages_in_order(gpu_sh, tmp_path):
    status, lines, said = finish(gpu_sh())
    assert status == 0, said
    assert list(lines) == ALL and all(line.split()[1] == "ok" for line in lines.values()), said
    assert "15 of 15 commands ended well on cuda" in lines["smoke"] and "1 passed" in lines["tests"]
    made = [text for text in calls(tmp_path) if not text.startswith("-c")]
    order = ["shiftresnet/", "deepshift/", "s3/", "shared_bases/", "epsilon_resnet/", "-m pytest -m gpu tests -v",
             "tests/capture_gpu.py --out", "run.py --device cuda --quick", "run.py --device cuda --results",
             "tests/common -k every_kernel", "tests/common -k equals_the_definition"]  # fmt: skip
    first = [min(number for number, text in enumerate(made) if part in text) for part in order]
    assert first[5:] == list(range(15, 21)) and max(first[:5]) < 15, made
    assert not any("--device" in text for text in made[:15]), "smoke must try the default device"
    out = tmp_path / "repository/runs/gpu"
    assert "    paper,equal\n    s3,True\n" in said, "what capture measured is in the summary"
    tables = ("capture.csv", "bench-quick/bench_shift_cuda.csv", "bench/bench_shift_cuda.csv")
    logs = ("smoke/s3-graph.log", "tests.log", "capture.log", "bench.log", "memcheck.log", "racecheck.log")
    for name in ("summary.txt", *tables, *logs):
        assert (out / name).stat().st_size, name
    for line in lines.values():
        assert line in (out / "summary.txt").read_text()
        assert (tmp_path / "repository" / line.rpartition("; see ")[2]).exists(), line


def test_some_stages_keep_the_order_and_results_go_where_the_caller_says(gpu_sh, tmp_path):
    status, lines, said = finish(gpu_sh("bench", "tests", "--seconds", "50", OUT="here"))
    assert status == 0 and list(lines) == ["tests", "bench"], said
    assert "tests: at most 50 s" in said and (tmp_path / "here/bench.log").exists()
    assert not (tmp_path / "here/smoke").exists()


FAILURES = {  # stage -> (word of the command that fails, what its line of the summary says)
    "smoke": ("shiftresnet/eval.py", "14 of 15 commands ended well on cuda; not so: shiftresnet-eval;"),
    "tests": ("-m gpu tests ", "1 failed, 1 passed: tests/common/test_a.py::test_y;"),
    "capture": ("capture_gpu.py", "exit 1, 1 rows in capture.csv;"),
    "bench": ("--quick", "bench-quick: FAILED, 1 rows; bench: ok, 1 rows;"),
    "sanitizer": ("every_kernel", "memcheck: FAILED, 1 failed, 1 passed; racecheck: ok, 1 passed;"),
}


def test_a_stage_that_fails_does_not_stop_the_next(gpu_sh):
    status, lines, said = finish(gpu_sh(FAIL=",".join(word for word, _ in FAILURES.values())))
    assert status == 1 and list(lines) == ALL, said
    for stage, (_, shown) in FAILURES.items():
        assert lines[stage].split()[1] == "FAILED" and shown in lines[stage]
    summary = said.rpartition("\n\n")[2]
    assert summary.count("    two\n    three\n    four\n") == 4 and "    one" not in said, "all but tests' own log"


def test_one_stage_that_fails_decides_the_status(gpu_sh):
    status, lines, said = finish(gpu_sh("tests", "capture", FAIL="-m pytest"))
    assert status == 1 and [line.split()[1] for line in lines.values()] == ["FAILED", "ok"], said


def test_a_stage_is_cut_off_at_its_limit_and_leaves_what_it_had(gpu_sh, tmp_path):
    start = time.monotonic()
    status, lines, said = finish(gpu_sh("tests", "bench", "sanitizer", "--seconds", "2", HANG="--quick"))
    assert status == 1 and time.monotonic() - start < 10, said
    assert [line.split()[1] for line in lines.values()] == ["ok", "cut", "ok"], said
    assert "bench-quick: cut off, 1 rows; bench: cut off, 0 rows" in lines["bench"]
    assert not any("--device cuda --results" in text for text in calls(tmp_path)), "begun after its time was up"


def test_tests_that_are_cut_off_are_counted(gpu_sh):
    _, lines, said = finish(gpu_sh("tests", "--seconds", "1", HANG="-m pytest", FAIL="-m pytest"))
    assert lines["tests"].split()[1:3] == ["cut", "off"], said
    assert "1 failed, 1 passed: tests/common/test_a.py::test_y;" in lines["tests"]


def test_a_run_on_another_device_than_the_gpu_fails(gpu_sh):
    status, lines, said = finish(gpu_sh("smoke", DEVICE="cpu"))
    assert status == 1 and "2 of 15 commands ended well on cuda" in lines["smoke"]  # evaluations do not record one
    assert "exit 0, device cpu, accuracy 50.00%" in said


def test_what_is_written_before_a_stage_ends(gpu_sh, tmp_path):
    """Told to end in the middle, it ends what runs, and what was there before is whole."""
    process = gpu_sh("tests", "bench", HANG="--quick")
    results = tmp_path / "repository/runs/gpu/bench-quick/bench_shift_cuda.csv"
    deadline = time.monotonic() + 20
    while not results.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "tests     ok" in (results.parents[1] / "summary.txt").read_text()
    child = int((tmp_path / "calls").read_text().splitlines()[-1].split()[0])
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("arguments, said", [
    (["nothing"], "there is no stage 'nothing'; there are smoke, tests, capture, bench, sanitizer"),
    (["--seconds", "0"], "must be a number of seconds, at least 1, not '0'"),
    (["--seconds", "soon"], "must be a number of seconds, at least 1, not 'soon'"),
    (["--fast"], "unrecognized arguments: --fast"),
])  # fmt: skip
def test_bad_arguments_are_one_line(gpu_sh, tmp_path, arguments, said):
    process = gpu_sh(*arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and not output and not (tmp_path / "calls").exists()
    assert errors.startswith("gpu.sh: ") and errors.rstrip().endswith(said) and errors.count("\n") == 1


def test_without_a_gpu_one_line(gpu_sh):
    output, errors = (process := gpu_sh(DEVICE="none")).communicate(timeout=60)
    assert process.returncode == 1 and not output
    assert errors == ("gpu.sh: PyTorch sees no CUDA device here (AssertionError: no CUDA here); "
                      "the rest of the tests: bash tests/run.sh\n")  # fmt: skip


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    """Without the script of capture that stage fails; without compute-sanitizer that stage is skipped."""
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    runner = gpu_stages.Runner(tmp_path)
    assert gpu_stages.capture(runner)[:2] == ("FAILED", "there is no tests/capture_gpu.py")
    status, detail, *_ = gpu_stages.sanitizer(runner)
    assert status == "skipped" and detail.startswith("compute-sanitizer is not installed")


def test_outcomes_are_read_from_what_pytest_prints(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text(
        "tests/a.py::test_one[x - y] PASSED                [ 10%]\n"
        "tests/a.py::test_two SKIPPED (no such thing)      [ 20%]\n"
        "[gw3] [ 30%] FAILED tests/a.py::test_three[a b] \n"
        "E   assert PASSED tests/a.py\n"
        "FAILED tests/a.py::test_three[a b] - AssertionError: tests/b.py::x PASSED\n"
        "ERROR tests/c.py - ImportError: no\n"
        "SKIPPED [1] tests/a.py:7: no such thing\n"
    )
    assert gpu_stages.count_outcomes(log) == {
        "ERROR": ["tests/c.py"],
        "FAILED": ["tests/a.py::test_three[a b]"],
        "PASSED": ["tests/a.py::test_one[x - y]"],
        "SKIPPED": ["tests/a.py::test_two"],
    }


def test_every_command_of_smoke_and_bench_parses(tmp_path):
    for chain in gpu_smoke.chains(tmp_path, "cuda"):
        for check in chain:
            check_arguments(check.words[0], check.words[1:])
    for quick in (True, False):
        for _, script, *arguments in benchmarks.commands(list(benchmarks.ON_GPU), "cuda", tmp_path, quick):
            check_arguments(str(Path(script).relative_to(ROOT)), arguments)


def test_a_damaged_record_counts_as_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"type": "run", "device": "cuda"}) + "\n{")
    assert gpu_smoke.recorded(tmp_path) == ("", "")
