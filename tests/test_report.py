"""Recording of runs; the READMEs' tables are what the records say."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).resolve().parents[1]
PAPERS = [paper for paper in report.PAPERS if (ROOT / paper / "README.md").exists()]


@pytest.mark.parametrize("paper", PAPERS)
def test_readme_table_is_generated_from_the_records(paper):
    assert (ROOT / paper / "README.md").read_text() == report.readme_with_table(paper)


@pytest.mark.parametrize("paper", PAPERS)
def test_records_agree_with_their_logs_in_every_column(paper):
    for row in report.read_results(paper):
        header, *epochs, result = [json.loads(line) for line in (ROOT / paper / row["log"]).read_text().splitlines()]
        seen = [line["test_top1"] for line in epochs]
        assert [line["epoch"] for line in epochs] == list(range(int(row["epochs"])))
        assert (seen[-1], max(seen)) == (result["top1"], result["best_top1"]), row["log"]
        assert result["best_epoch"] == seen.index(max(seen)), "the first of the best"
        expected = {
            **{name: result[name] for name in ("epochs", "epochs_in_paper", "top1", "best_top1", "best_epoch")},
            **{name: header[name] for name in ("command", "reproduces", "seed", "params", "macs", "hardware")},
            "commit": header["commit"],
            "script": header["command"].split()[1],
            "dataset": header["data"],
            "top1_paper": report.published_top1(paper, header["reproduces"]),
            "seconds": round(result["seconds"]),
            "versions": " ".join(f"{package} {version}" for package, version in header["versions"].items()),
            "log": row["log"],
        }
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_commits_of_records_exist():
    """All of them are in this repository's history; five, from before that was asked, had more changes beside them."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here: the commits of records are not looked up")
    commits = [row["commit"] for paper in PAPERS for row in report.read_results(paper)]
    missing = [commit for commit in set(commits) if subprocess.run(
        ["git", "-C", ROOT, "cat-file", "-e", commit.removesuffix("-dirty") + "^{commit}"], capture_output=True
    ).returncode]  # fmt: skip
    assert not missing
    assert sum(commit.endswith("-dirty") for commit in commits) <= 5, "new ones are refused"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "shiftresnet").mkdir()
    shutil.copy(ROOT / "shiftresnet" / "published.csv", tmp_path / "shiftresnet")
    (tmp_path / "shiftresnet" / "README.md").write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def write_run(folder, finished=True, seed=1, top1=41.0):
    paths = "--data-dir /home/me/data --output-dir=/home/me/x"
    header = {
        "type": "run",
        "paper": "shiftresnet",
        "reproduces": "main.py --arch=shiftresnet20 --expansion=3 --dataset=cifar10",
        "command": f"python shiftresnet/main.py --arch=shiftresnet20 --expansion=3 --seed={seed} {paths}",
        "data": "cifar10",
        "args": {"dataset": "cifar10", "data_dir": "/home/me/data", "output_dir": "/home/me/x"},
        "seed": seed,
        "params": 95642,
        "macs": 17,
        "hardware": "CPU",
        "versions": {"torch": "2"},
        "commit": "abc",
    }
    epochs = [
        {"type": "epoch", "epoch": n, "test_top1": top1 - 1 + n, "train_loss": 2.0 - n, "test_loss": 2.1 - n}
        for n in (0, 1)
    ]
    result = {"type": "result", "top1": top1, "best_top1": top1, "best_epoch": 1, "epochs": 2, "epochs_in_paper": 160,
              "seconds": 61.0, "checkpoint": "/home/me/x/shiftresnet20_3.0.t7"}  # fmt: skip
    folder.mkdir()
    lines = [header, *epochs, *([result] if finished else [])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_recording_a_run_writes_csv_log_table_and_curves(repository, capsys):
    run = write_run(repository / "shiftresnet20_3.0")
    assert report.main(["--record", str(run)]) == 0
    (row,) = csv.DictReader((repository / "shiftresnet" / "results.csv").open())
    assert (row["top1"], row["top1_paper"], row["epochs"], row["epochs_in_paper"]) == ("41.0", "89.56", "2", "160")
    files = [path for path in (repository / "shiftresnet").rglob("*") if path.is_file()]
    everything = "".join(path.read_text() for path in files if path.suffix != ".png")
    assert "/home/me" not in everything and "--data-dir DIR" in everything
    table = (repository / "shiftresnet" / "README.md").read_text()
    assert "| 89.56% | 41.00% | 41.00% (1) | **short:** 2 / 160 |" in table
    assert table.startswith("before\n") and table.endswith("\nafter\n") and "old" not in table
    assert (repository / "shiftresnet" / "plots" / "curves.png").stat().st_size > 10_000
    assert report.main(["--record", str(run)]) == 1
    assert "is recorded already" in capsys.readouterr().err


def test_seeds_of_one_command_share_a_line(repository):
    runs = [write_run(repository / f"shiftresnet20_3.0.{seed}", seed=seed, top1=39.0 + seed) for seed in (1, 2, 3)]
    assert report.main(["--record", *map(str, runs)]) == 0
    table = (repository / "shiftresnet" / "README.md").read_text()
    assert "| 89.56% | 41.00 ± 1.00% (n = 3) | 41.00 ± 1.00% (n = 3) | **short:** 2 / 160 |" in table
    assert table.count("main.py") == 1 and "--seed" not in table
    assert [f"[{seed}](logs/" in table for seed in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(
    "paper, command, top1",
    [
        ("shiftresnet", "main.py --arch=shiftresnet20 --expansion=3 --dataset=cifar10", "89.56"),
        ("epsilon_resnet", "cifarEpsilonResnet.py --gpu 1 -n 18 -e 2.5 -o cifar10-e_2.5-n_18 --cifar10", "94.76"),
        ("shiftresnet", "main.py --arch=nothing", ""),
        ("shiftresnet", None, ""),
    ],
)
def test_published_numbers_are_accuracies(paper, command, top1):
    assert report.published_top1(paper, command) == top1


def test_an_unfinished_or_missing_run_is_refused(repository, capsys):
    run = write_run(repository / "shiftresnet20_3.0", finished=False)
    assert report.main(["--record", str(run)]) == 1
    assert "the run is not finished; go on with --resume" in capsys.readouterr().err
    assert report.main(["--record", str(repository / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ("null", '"abc-dirty"'))
def test_a_run_that_no_commit_holds_is_refused(repository, capsys, commit):
    metrics = write_run(repository / "shiftresnet20_3.0") / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"commit": "abc"', f'"commit": {commit}'))
    assert report.main(["--record", str(metrics.parent)]) == 1
    assert "is of a work tree that no commit holds" in capsys.readouterr().err
    assert not (repository / "shiftresnet" / "results.csv").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace('"type": "epoch"', '"typ": "epoch"', 1), "is damaged"),
        (lambda text: "7\n" + text, "is damaged"),
        (lambda text: text.replace('"shiftresnet"', '"another"', 1), "is of none of these papers"),
        (lambda text: text.replace('"hardware"', '"software"', 1), "is damaged: it has no 'hardware'"),
    ],
)
def test_a_damaged_run_is_one_line_and_changes_nothing(repository, capsys, change, message):
    metrics = write_run(repository / "shiftresnet20_3.0") / "metrics.jsonl"
    metrics.write_text(change(metrics.read_text()))
    before = sorted((repository / "shiftresnet").rglob("*"))
    assert report.main(["--record", str(metrics.parent)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {metrics} {message}")
    assert sorted((repository / "shiftresnet").rglob("*")) == before


def test_a_missing_log_is_one_line(repository, capsys):
    run = write_run(repository / "shiftresnet20_3.0")
    assert report.main(["--record", str(run)]) == 0
    (log,) = (repository / "shiftresnet" / "logs").iterdir()
    log.unlink()
    capsys.readouterr()
    assert report.main(["--readmes"]) == 1
    assert capsys.readouterr().err == (
        f"error: shiftresnet/logs/{log.name} is missing or damaged; restore it from the repository\n"
    )


def test_commands_are_shown_without_what_decides_no_result():
    command = "python a/b.py --type conv --output-dir=DIR --auto-resume --data-dir DIR --seed=1 --print-weights False"
    assert report.shortened(command) == "python a/b.py --type conv --seed=1"
    assert report.shortened("python a/b.py --data-dir --lr 1 --no-auto-resume") == (
        "python a/b.py --data-dir --lr 1 --no-auto-resume"
    )
