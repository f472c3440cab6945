"""Everything read, counted, plotted and put on the page."""

import os
import subprocess
import time
from pathlib import Path

from reporting import compare, costs, page, records, sections, words
from reporting.page import element, items, joined
from reporting.plots import Plotter
from reporting.records import PAPERS, ReportError


def build(root: Path, folders: list[Path], output: Path, with_latency: bool, say=print) -> tuple[Path, list[str]]:
    """Write output/index.html and output/plots/. Returns the page's path and one line per damaged file of the records.

    root: of the repository. folders: where runs are. say: for progress. Raises OSError if output cannot be written.
    """
    papers, notices, damages = read_papers(root, folders)
    plotter, measured = Plotter(output / "plots"), compare.Measured(say)
    runs = [run for paper in papers for run in paper.all_runs]
    points, problems = compare.points_of_runs(runs, measured, with_latency)
    printed, more = compare.published_points(
        {paper.name: paper.published for paper in papers if paper.is_there}, measured
    )
    notices += [*damages, *problems, *more]
    tables = (joined(element("h3", sections.name_of(paper.name)), sections.tables_of(paper, measured))
              for paper in papers)  # fmt: skip
    parts = [
        ("status", "Status", joined(_notice(notices), sections.status(papers))),
        ("methods", "Five methods on common axes", sections.methods(points, printed, plotter, with_latency)),
        ("curves", "Training curves", sections.curves(papers, plotter)),
        ("published", "Published tables", joined(element("p", words.PUBLISHED), *tables)),
        ("counting", "What is counted", sections.notes(costs.machine())),
    ]
    where = ", ".join(str(folder) for folder in folders)
    subtitle = joined(f"{len(runs)} runs: those below {where} and those recorded in the repository. ",
                      f"Written {time.strftime('%Y-%m-%d %H:%M')}, commit {_commit(root)}.")  # fmt: skip
    footer = joined("Made by ", page.command("python report.py"), "; every figure is also in plots/ as SVG and PNG.")
    document = page.page("Efficient ConvNets: five papers, reproduced", subtitle, parts, footer)
    return _write(output / "index.html", document), damages


def read_papers(root: Path, folders: list[Path]) -> tuple[list[sections.Paper], list[str], list[str]]:
    """(papers, what is wrong with runs, what is wrong with the repository's records), the last two a line each."""
    runs, notices = records.find_runs(folders)
    jobs, damages, papers = records.find_open_jobs(folders), [], []
    for name in PAPERS:
        folder = root / name
        paper = sections.Paper(name, folder.is_dir(), [run for run in runs if run.paper == name],
                               open_jobs=[job for job in jobs if job.paper == name],
                               scripts=sections.scripts_of(folder))  # fmt: skip
        for attribute, read in (("recorded", records.recorded_runs), ("published", records.read_published)):
            try:
                setattr(paper, attribute, read(folder))
            except ReportError as error:
                damages.append(str(error))
        papers.append(paper)
    notices += [f"{run.source / 'metrics.jsonl'}: {run.problem}" for run in runs if run.problem]
    return papers, notices, damages


def _notice(lines):
    return element("div", "What could not be read:", items(lines), class_="notice") if lines else ""


def _commit(root):
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _write(path, document):
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(document, encoding="utf-8")
    os.replace(temporary, path)
    return path
