"""What report.py reads: run directories, recorded runs, published numbers. Nothing here writes."""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
COLUMNS = (
    "script", "command", "reproduces", "dataset", "epochs", "epochs_in_paper", "seed", "top1", "best_top1",
    "best_epoch", "top1_paper", "params", "macs", "seconds", "hardware", "versions", "commit", "log",
)  # fmt: skip
NUMBERS = ("epochs", "epochs_in_paper", "top1", "best_top1", "params", "macs", "seconds")
PUBLISHED_COLUMNS = ("paper", "table", "dataset", "model", "method", "setting", "metric", "value", "command")
OTHER_TABLES = ("superseded", "read by eye", "first README")  # of published.csv
EMBEDDED = "digits (embedded)"


class ReportError(Exception):
    """One line for the user."""


@dataclass(frozen=True)
class Run:
    """One training run: header, epochs and result of its metrics.jsonl. result: None if it has not finished.

    source: its directory (or log, if recorded). problem: what is wrong with its file, "" if nothing.
    """

    name: str
    header: dict
    epochs: list = field(repr=False)
    result: dict | None
    source: Path
    recorded: bool = False
    problem: str = ""

    @property
    def paper(self) -> str:
        return self.header["paper"]

    @property
    def data(self) -> str:
        """The data set as the page names it, the same for all papers."""
        return {"ilsvrc": "imagenet"}.get(self.header["data"].lower(), self.header["data"])

    @property
    def is_short(self) -> bool:
        """Fewer epochs than the paper's, or not all training images: no reproduction of the paper's number."""
        fewer = self.result is not None and self.result["epochs"] < self.result["epochs_in_paper"]
        return fewer or bool(self.header["args"].get("train_size"))

    @property
    def identity(self) -> tuple:
        """The same for a run and its recorded copy."""
        return self.paper, *(json.dumps(self.header.get(key)) for key in ("started", "seed", "config"))

    @property
    def reproduces(self) -> str:
        """The original's command whose number this run is compared with, "" if there is none."""
        return str(self.header.get("reproduces") or "")


def run_name(header: dict, directory: str) -> str:
    """The directory's name, with the network's where that is not in it."""
    arch = str(header["args"].get("arch", ""))
    return directory if arch in directory else f"{arch}-{directory}"


def parse_lines(text: str) -> tuple[list[dict], str]:
    """The lines of a metrics.jsonl up to the first that cannot be read, and what is wrong with it ("" if nothing)."""
    lines, texts = [], text.splitlines()
    for number, line in enumerate(texts, 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError
        except ValueError:
            cut = number == len(texts)
            return lines, "its last line is cut short" if cut else f"line {number} is damaged, later ones are not used"
        lines.append(content)
    return lines, ""


def read_run(path: Path, name: str | None = None, recorded: bool = False) -> Run:
    """A finished or unfinished run from its metrics.jsonl or log. Raises ReportError if it is none of these papers'."""
    try:
        lines, problem = parse_lines(path.read_text(errors="replace"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    header = lines[0] if lines else {}
    if header.get("type") != "run" or header.get("paper") not in PAPERS:
        raise ReportError(f"{path} is damaged or not of these papers: its first line describes no run; repeat the run")
    for key, kind in (("args", dict), ("config", dict), ("command", str), ("data", str)):
        if not isinstance(header.get(key), kind):
            raise ReportError(f"{path} is damaged: its first line has no {key}; repeat the run")
    epochs = [line for line in lines if line.get("type") == "epoch" and _is_number(line, "epoch", "test_top1")]
    result = lines[-1] if lines[-1].get("type") == "result" else None
    if result is not None and not _is_number(result, "top1", "epochs", "epochs_in_paper"):
        result, problem = None, "its last line is no result"
    name = name or run_name(header, path.resolve().parent.name.encode(errors="replace").decode())
    return Run(name, header, epochs, result, path if recorded else path.parent, recorded, problem)


def _is_number(line, *keys):
    return all(isinstance(line.get(key), (int, float)) and math.isfinite(line[key]) for key in keys)


def find_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """All runs in and below the folders, each once, and one line per file or folder that is none."""
    runs, problems, seen = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder} does not exist: no runs there")
            continue
        for path in sorted(folder.rglob("metrics.jsonl")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(read_run(path))
            except ReportError as error:
                problems.append(str(error))
    return runs, problems


@dataclass(frozen=True)
class OpenJob:
    """A job of run_all that has begun and has not succeeded: it failed, was interrupted, or is still running."""

    paper: str
    log: Path
    last_line: str


def find_open_jobs(folders: list[Path]) -> list[OpenJob]:
    """Jobs of run_all below the folders with a log and no mark of success."""
    jobs = []
    for folder in folders:
        for log in sorted(folder.rglob("*.log")) if folder.is_dir() else ():
            papers = [part for part in log.resolve().parts if part in PAPERS]
            own_log_of_a_run = (log.parent / "metrics.jsonl").exists()
            if papers and not own_log_of_a_run and not log.with_suffix(".done").exists():
                lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
                jobs.append(OpenJob(papers[-1], log, lines[-1] if lines else ""))
    return jobs


def read_results(folder: Path) -> list[dict]:
    """Rows of a paper's results.csv, [] if there is none. Raises ReportError, naming the line, if it is damaged."""
    return _read_table(folder / "results.csv", COLUMNS, NUMBERS)


def read_published(folder: Path) -> list[dict]:
    """Rows of a paper's published.csv, [] if there is none. Raises ReportError if it is damaged."""
    return _read_table(folder / "published.csv", PUBLISHED_COLUMNS, ())


def _read_table(path, columns, numbers):
    name = f"{path.parent.name}/{path.name}"
    advice = "restore it from the repository"
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{name} cannot be read ({error}); {advice}") from None
    if tuple(reader.fieldnames or ()) != columns:
        raise ReportError(f"{name} is damaged: its first line is not the names of the columns; {advice}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ReportError(f"{name} is damaged: row {number} has not {len(columns)} cells; {advice}")
        for column in numbers:
            try:
                float(row[column])
            except ValueError:
                raise ReportError(
                    f"{name} is damaged: {column} of row {number} is {row[column]!r}, not a number; {advice}"
                ) from None
    return rows


def recorded_runs(folder: Path) -> list[Run]:
    """The runs that a paper's results.csv records, from their logs. Raises ReportError if a file is damaged."""
    runs = []
    for row in read_results(folder):
        name = re.sub(r"-[^-]+-seed\d+-\d+epochs$", "", Path(row["log"]).stem)
        run = read_run(folder / row["log"], name, recorded=True)
        if run.result is None or f"{run.result['top1']}" != row["top1"]:
            raise ReportError(f"{folder.name}/{row['log']} and results.csv disagree; restore both from the repository")
        runs.append(run)
    return runs
