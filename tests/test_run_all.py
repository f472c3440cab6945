"""run_all.sh: what it would run, what it repeats, how it reports a failure, how it stops and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs
import run_all

ROOT = Path(__file__).resolve().parents[1]


def test_the_shell_command_uses_the_given_python_and_lists_jobs(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", ROOT / "run_all.sh", "--list", "--only", "shiftresnet", "--output-dir=here"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "to do  shiftresnet: train shiftresnet20_3.0"
    assert not list(tmp_path.iterdir()), "--list writes nothing"


def test_a_python_that_does_not_exist_is_one_line():
    environment = {**os.environ, "PYTHON": "/does/not/exist"}
    result = subprocess.run(["bash", ROOT / "run_all.sh"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("setup: PYTHON=/does/not/exist is not an executable")


def commands(capsys, *flags):
    assert run_all.main(["--dry-run", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_data_decides_the_schedule_and_the_folder(tmp_path, capsys):
    training = commands(capsys, f"--data-dir={tmp_path}")[0]
    assert "--embedded-data" in training and "--epochs=" in training and "runs/shiftresnet/digits" in training
    (tmp_path / "cifar-10-batches-py").mkdir()
    training = commands(capsys, f"--data-dir={tmp_path}")[0]
    assert f"--data-dir {tmp_path}" in training and "--epochs=" in training and "runs/shiftresnet/short" in training
    training = commands(capsys, "--full")[0]
    assert "--recipe=published" in training and "--epochs=" not in training and "--data-dir data" in training
    assert "runs/shiftresnet/full" in training


def test_paths_are_relative_to_the_caller_and_within_the_repository_to_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"--output-dir={tmp_path}/here/shiftresnet/digits" in commands(capsys, "--output-dir=here")[0]
    monkeypatch.chdir(ROOT / "tests")
    assert "--output-dir=tests/here/shiftresnet/digits" in commands(capsys, "--output-dir=here")[0]


def paper_jobs(paper, kind, *extra):
    settings = jobs.setting_of(paper, output=Path("runs"), data_dir=Path("none"), full=kind == jobs.FULL,
                               device="auto", extra=extra)  # fmt: skip
    return jobs.PAPERS[paper].jobs(settings)


@pytest.mark.parametrize("paper", jobs.PAPERS)
def test_flags_after_the_dashes_go_to_training_only(paper):
    found = paper_jobs(paper, jobs.DIGITS, "--amp", "bf16")
    trains = [job.metrics is not None for job in found]
    assert [job.command[-2:] == ("--amp", "bf16") for job in found] == trains
    assert any(trains) and not all(trains)


@pytest.mark.parametrize("kind", [jobs.DIGITS, jobs.FULL])
@pytest.mark.parametrize("paper", jobs.PAPERS)
def test_jobs_have_scripts_titles_and_needs_that_exist(paper, kind):
    seen = []
    for job in paper_jobs(paper, kind):
        assert (ROOT / job.command[0]).is_file() and job.paper == paper
        assert job.title not in seen and set(job.after or ()) <= set(seen), job.title
        assert (job.metrics is not None) == job.title.startswith("train ") == (job.epochs > 0)
        seen.append(job.title)


def test_epochs_of_the_user_are_those_that_progress_and_later_jobs_expect():
    found = paper_jobs("epsilon_resnet", jobs.DIGITS, "--epochs", "2")
    assert found[0].epochs == 2 and "--step=90" in found[1].command
    assert paper_jobs("shiftresnet", jobs.DIGITS, "--epochs=many")[0].command[-1] == "--epochs=many"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--", "--amp", "bf16"], "flags after -- are for one paper's training commands: add --only PAPER"),
        (["--only=shiftresnet", "--only=deepshift", "--", "--amp=bf16"], "add --only PAPER"),
        (["--amp=bf16"], "unrecognized arguments: --amp=bf16"),
        (["--only=nothing"], "invalid choice: 'nothing'"),
        (["--jobs=0"], "'0' is not a number from 1 on"),
        (["--device=gpu"], "'gpu' is none of auto, cpu, cuda, cuda:N"),
        (["--data-dir=/does/not/exist"], "--data-dir /does/not/exist is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        run_all.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_an_output_directory_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_all.main([f"--output-dir={tmp_path}/file", "--only=shiftresnet"]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write to {tmp_path}/file: ")


@pytest.fixture
def paper_of(tmp_path, monkeypatch):
    """A function that makes shiftresnet a paper of jobs (title, Python code, after); its folder is tmp_path."""
    monkeypatch.setattr(run_all, "write_report", lambda output: True)
    monkeypatch.chdir(tmp_path)

    def set_jobs(*described):
        made = [jobs.Job("shiftresnet", title, tmp_path, ("-c", code), after=after) for title, code, after in described]
        monkeypatch.setattr(run_all, "PAPERS", {"shiftresnet": jobs.Paper(lambda setting: made, "none")})
        return made

    return set_jobs


def run(tmp_path, capsys, *flags):
    """Exit status and output of a call with the papers of `paper_of`."""
    return run_all.main([f"--output-dir={tmp_path}/runs", *flags]), capsys.readouterr().out


def leave_trace(tmp_path):
    return f"open({str(tmp_path / 'trace')!r}, 'a').write('x')"


def test_a_failure_is_shown_and_the_rest_goes_on(paper_of, tmp_path, capsys):
    paper_of(
        ("bad", "print('about to fail'); raise SystemExit(3)", ()),
        ("good", leave_trace(tmp_path), ()),
        ("after", leave_trace(tmp_path), ("bad",)),
        ("later", leave_trace(tmp_path), None),
    )
    for _ in range(2):
        status, output = run(tmp_path, capsys)
        assert status == 1 and "[1/4] shiftresnet: bad  0:00  FAILED (exit status 3)" in output
        assert "  | about to fail" in output and "3 of 4 jobs failed" in output
        assert "after  not run: it needs 'bad', which failed" in output
        assert "later  not run: it needs 'bad', which failed" in output
        assert (tmp_path / "trace").read_text() == "x", "a finished job is not repeated"
    assert "good  done before" in output
    assert (tmp_path / "bad.log").read_text().count("$ python -c") == 2, "the log of the first try is kept"


def test_what_is_repeated(paper_of, tmp_path, capsys):
    trace = leave_trace(tmp_path)
    first, _ = paper_of(("first", trace, ()), ("second", trace, ("first",)))
    assert run(tmp_path, capsys)[0] == 0 and (tmp_path / "trace").read_text() == "xx"
    assert run(tmp_path, capsys)[0] == 0 and (tmp_path / "trace").read_text() == "xx"
    first.marker.unlink()
    assert run(tmp_path, capsys)[0] == 0
    assert (tmp_path / "trace").read_text() == "xxxx", "with a job, those that need it"
    paper_of(("first", trace, ()), ("second", f"{trace}; 1", ("first",)))
    assert run(tmp_path, capsys)[0] == 0
    assert (tmp_path / "trace").read_text() == "xxxxx", "another command is another job"


def test_a_training_job_is_done_only_while_its_result_is_there(tmp_path):
    job = jobs.Job("shiftresnet", "train", tmp_path, ("-c", ""), epochs=2, metrics=tmp_path / "metrics.jsonl")
    job.marker.write_text(json.dumps(job.command))
    assert not job.is_done([job])
    job.metrics.write_text('{"type": "run"}\n{"type": "epoch"}\n{"type": "result", "top1"')
    assert job.epochs_done() == 1 and not job.is_done([job])
    job.metrics.write_text('{"type": "run"}\n{"type": "epoch"}\n{"type": "result", "top1": 1}\n')
    assert job.is_done([job]) and job.result()["top1"] == 1


def test_several_jobs_at_once(paper_of, tmp_path, capsys):
    def meet(mine, other):  # ends only when both are there at the same time
        return (
            f"import os, pathlib, time\npathlib.Path('{tmp_path}/{mine}').touch()\n"
            f"while not os.path.exists('{tmp_path}/{other}'): time.sleep(0.01)\n"
            f"print('threads', os.environ['OMP_NUM_THREADS'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
        )

    paper_of(("left", meet("a", "b"), ()), ("right", meet("b", "a"), ()), ("last", "", None))
    status, output = run(tmp_path, capsys, "--jobs=2", "--device=cpu")
    assert status == 0 and output.splitlines()[-2].startswith("[3/3] shiftresnet: last"), output
    assert "threads " in (tmp_path / "left.log").read_text()


def test_each_run_gets_its_gpu_and_its_share_of_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_all.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(run_all, "visible_gpus", lambda device: ["3", "5"])
    found = run_all.environments(3, "auto")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["3", "5", "3"]
    assert [each["OMP_NUM_THREADS"] for each in found] == ["2"] * 3
    assert "OMP_NUM_THREADS" not in run_all.environments(1, "auto")[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_all.environments(2, "cpu")[1]["OMP_NUM_THREADS"] == "7"


def test_gpus_are_counted_as_pytorch_does():
    import torch

    assert run_all.count_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(
    "device, environment, count, expected",
    [
        ("auto", None, 2, ["0", "1"]),
        ("cuda", "4,6,7", 3, ["4", "6", "7"]),
        ("auto", "GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("auto", "", 0, []),
        ("cuda:1", None, 2, []),
        ("cpu", None, 2, []),
    ],
)
def test_visible_gpus(device, environment, count, expected, monkeypatch):
    monkeypatch.setattr(run_all, "count_gpus", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if environment is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    assert run_all.visible_gpus(device) == expected


def test_progress_estimates_the_time_left(tmp_path, monkeypatch):
    job = jobs.Job("shiftresnet", "train x", tmp_path, ("-c", ""), epochs=5, metrics=tmp_path / "metrics.jsonl")
    job.metrics.write_text('{"type": "run"}\n{"type": "epoch"}\n')
    with open(tmp_path / "lock", "w") as lock:
        started = run_all.Run(job, "label", dict(os.environ), lock.fileno())
    started.process.wait()
    monkeypatch.setattr(run_all.Run, "seconds", 60)
    assert started.progress() == "label  1:00, epoch 1/5", "nothing is known of an epoch of an earlier call"
    job.metrics.write_text('{"type": "run"}\n' + 3 * '{"type": "epoch"}\n')
    assert started.progress() == "label  1:00, epoch 3/5, about 1:00 left"
    assert run_all.clock(3_725) == "1:02:05"


def test_lines_of_running_jobs_are_replaced_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(run_all.sys.stdout, "isatty", lambda: True)
    screen = run_all.Screen()
    screen.show(["one", "two"])
    screen.say("done")
    assert capsys.readouterr().out == "one\ntwo\n\x1b[2F\x1b[Jdone\n"


def test_the_table_has_finished_runs_only(tmp_path, capsys):
    header = {"type": "run", "data": "digits", "params": 12345, "macs": 67890}
    result = {"type": "result", "top1": 41.5, "epochs": 2, "epochs_in_paper": 160}
    made = [jobs.Job("shiftresnet", f"train {n}", tmp_path, (), metrics=tmp_path / f"{n}.jsonl") for n in "ab"]
    made[0].metrics.write_text(f"{json.dumps(header)}\n{json.dumps(result)}\n")
    made[1].metrics.write_text(f"{json.dumps(header)}\n")
    run_all.print_results([*made, jobs.Job("shiftresnet", "count", tmp_path, ())])
    lines = capsys.readouterr().out.split("\n")
    assert lines[2].split() == ["shiftresnet", "a", "digits", "41.50", "2", "/", "160", "12,345", "67,890"]
    assert lines[3:] == [""]


@pytest.mark.parametrize("code, status", [("print('page of', sys.argv[1:])", 0), ("sys.exit('error: no disk')", 1)])
def test_the_report_is_written_at_the_end_and_its_failure_shown(code, status, tmp_path, capfd, monkeypatch):
    made = [jobs.Job("shiftresnet", "good", tmp_path, ("-c", ""), after=())]
    monkeypatch.setattr(run_all, "PAPERS", {"shiftresnet": jobs.Paper(lambda setting: made, "none")})
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    (tmp_path / "report.py").write_text(f"import sys\n{code}\n")
    assert run_all.main([f"--output-dir={tmp_path}/runs"]) == status
    said = capfd.readouterr().out
    assert ("page of ['runs', '--output-dir', 'report']" in said) == (status == 0)
    assert ("the report FAILED: error: no disk" in said) == (status == 1)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import jobs, run_all
code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep({seconds}); open('trace', 'a').write('x')"
job = jobs.Job("shiftresnet", "slow", Path("."), ("-c", "import os; os.chdir({folder!r}); " + code))
run_all.PAPERS = {{"shiftresnet": jobs.Paper(lambda setting: [job], "none")}}
run_all.ROOT, run_all.write_report = Path({folder!r}), lambda output: True
sys.exit(run_all.main(["--output-dir", {folder!r}]))
"""


def start_slow_call(folder, seconds):
    """A call of run_all in a process of its own whose only job is at work; the job's process id too."""
    code = DRIVER.format(root=str(ROOT), folder=str(folder), seconds=seconds)
    call = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline and call.poll() is None
        time.sleep(0.02)
    return call, int((folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_call_leaves_no_process_and_the_next_goes_on(number, tmp_path):
    call, child = start_slow_call(tmp_path, seconds=600)
    call.send_signal(number)
    output, _ = call.communicate(timeout=60)
    assert call.returncode == 128 + number and "interrupted; the same command goes on from here" in output
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "slow.done").exists()


def test_a_run_that_outlives_a_killed_call_is_waited_for(tmp_path):
    call, child = start_slow_call(tmp_path, seconds=2)
    call.kill()
    call.communicate()
    (tmp_path / "pid").unlink()
    call, _ = start_slow_call(tmp_path, seconds=0)
    output, _ = call.communicate(timeout=60)
    assert call.returncode == 0 and "waiting: a run of another call is at work" in output, output
    assert (tmp_path / "trace").read_text() == "xx", "the second began after the first had ended"
