"""The sections of the page, from runs, points and published rows."""

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from reporting import costs, page, published, words
from reporting.compare import AXES, Measured, Point, by_data
from reporting.page import Html, command, element, figures, items, joined, table
from reporting.plots import RUNS_PER_FIGURE, Plotter
from reporting.records import EMBEDDED, PAPERS, OpenJob, ReportError, Run

DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "mnist": "MNIST", "svhn": "SVHN"}
METRIC_NAMES = {
    "top1": "top-1 (%)", "top1_acc_percent": "top-1 (%)", "top1_error_percent": "top-1 error (%)",
    "top1_error": "top-1 error", "val_error": "error", "val_error_percent": "error (%)", "top5": "top-5 (%)",
    "top5_error_percent": "top-5 error (%)", "top5_error": "top-5 error", "params_millions": "parameters (M)",
    "params_million": "parameters (M)", "flops_giga": "FLOPs (G)",
}  # fmt: skip
LONG_TABLE = 40  # lines; longer ones start closed


@dataclass
class Paper:
    """What is known of one paper. runs: found in the given folders; recorded: of results.csv."""

    name: str
    is_there: bool
    runs: list[Run] = field(default_factory=list)
    recorded: list[Run] = field(default_factory=list)
    published: list[dict] = field(default_factory=list)
    open_jobs: list[OpenJob] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    @property
    def all_runs(self) -> list[Run]:
        """Recorded runs, from their directories where those were found, and the other runs found."""
        found, recorded = {run.identity: run for run in self.runs}, {run.identity: run for run in self.recorded}
        known = [replace(found[key], recorded=True) if key in found else run for key, run in recorded.items()]
        runs = [*known, *(run for run in self.runs if run.identity not in recorded)]
        names = Counter((run.name, run.data) for run in runs)
        for index, run in enumerate(runs):
            if names[run.name, run.data] > 1:
                runs[index] = replace(run, name=f"{run.name}, seed {run.header.get('seed')}")
        return runs


def name_of(paper: str) -> str:
    return page.PAPER_NAMES[paper][0]


def data_name(data: str) -> str:
    return "digits" if data == EMBEDDED else DATA_NAMES.get(data, data)


def status(papers: list[Paper]) -> Html:
    """A card for each paper, then all runs."""
    cards = element("div", *map(_card, papers), class_="cards")
    rows = [_run_row(run) for paper in papers for run in paper.all_runs]
    columns = ["paper", "run", "data", "#top-1, last (%)", "#best¹ (%)", "epochs run / in paper", "#minutes", "state",
               "on"]  # fmt: skip
    caption = "All runs. ¹ best epoch on the test set, as the papers report it"
    return joined(cards, table(columns, rows, caption) if rows else element("p", "No run was found or recorded."))


def _card(paper):
    title, what = page.PAPER_NAMES[paper.name]
    finished = sum(run.result is not None for run in paper.runs)
    total, full, short = published.progress(paper.published, paper.all_runs)
    numbers = [("runs found", f"{finished} finished, {len(paper.runs) - finished} unfinished"),
               ("recorded", f"{len(paper.recorded)} in {paper.name}/results.csv"),
               ("published", f"{full} of {total} commands run to the end, {short} short")]  # fmt: skip
    terms = [element(kind, cell) for pair in numbers for kind, cell in zip(("dt", "dd"), pair, strict=True)]
    missing = _missing(paper, total > full)
    return element("div", element("h3", title), element("p", what, class_="soft"), element("dl", *terms),
                   items(missing) if missing else "", class_="card", colour=PAPERS.index(paper.name))  # fmt: skip


def _missing(paper, has_open_rows):
    """What is not there yet, and the command that makes it."""
    if not paper.is_there:
        return [f"the directory {paper.name}/ is not in this checkout"]
    lines, only = [], f"bash run_all.sh --only {paper.name}"
    unfinished = [run for run in paper.runs if run.result is None]
    if not any(run.result is not None for run in paper.runs):
        lines.append(joined("no finished run in the given folders: ", command(only)))
    if unfinished:
        names = ", ".join(f"{run.name} ({len(run.epochs)} epochs)" for run in unfinished)
        lines.append(joined(f"unfinished: {names}; what began it goes on with it, such as ", command(only)))
    for job in paper.open_jobs:
        lines.append(f"not succeeded yet: {job.log.stem}; its log ends with “{job.last_line[:160]}”")
    if not paper.recorded:
        lines.append(joined("no recorded run: ", command("python report.py --record RUN_DIR")))
    if has_open_rows:
        sweeps = [command(f"bash {paper.name}/{name}") for name in paper.scripts]
        lines.append(joined("the paper's own schedule: ", command(f"{only} --data-dir DIR --full"), *sweeps))
    return lines


def _run_row(run):
    result = run.result or {}
    epochs = f"{result['epochs']} / {result['epochs_in_paper']}" if result else f"{len(run.epochs)} so far"
    state = "unfinished" if not result else "short" if run.is_short else "full length"
    best = f"{result['best_top1']:.2f}" if isinstance(result.get("best_top1"), (int, float)) else ""
    minutes = f"{result['seconds'] / 60:.1f}" if isinstance(result.get("seconds"), (int, float)) else ""
    return [
        page.key(PAPERS.index(run.paper), name_of(run.paper)), run.name, data_name(run.data),
        f"{result['top1']:.2f}" if result else "", best, epochs, minutes,
        state + (", recorded" if run.recorded else "") + (f"; {run.problem}" if run.problem else ""),
        str(run.header.get("hardware", "")),
    ]  # fmt: skip


def methods(measured: list[Point], printed: list[Point], plotter: Plotter, has_latency: bool) -> Html:
    """The five methods on common axes: runs of each data set, then the papers' own accuracies."""
    parts = [element("p", words.METHODS)]
    for data, group in by_data(measured).items():
        parts += [element("h3", f"Runs on {data_name(data)}"),
                  element("p", words.ON_DIGITS if data == EMBEDDED else words.ON_REAL_DATA),
                  _figures(data, "runs", group, plotter),
                  _points_table(group, "The numbers are those in the figures")]  # fmt: skip
    if not measured:
        parts.append(element("p", "No run has finished yet: ", command("bash run_all.sh")))
    elif has_latency:
        parts.append(element("p", words.LOAD.format(load=costs.load() or "unknown")))
    else:
        parts.append(element("p", "Latency is not measured. To measure it on this machine, seconds for each network: ",
                             command("python report.py --latency")))  # fmt: skip
    for data, group in by_data(printed).items():
        if len({point.paper for point in group}) > 1:
            parts += [element("h3", f"Published accuracies on {data_name(data)}"), element("p", words.AS_PUBLISHED),
                      _figures(data, "published", group, plotter),
                      element("details", element("summary", f"The {len(group)} networks"),
                              _points_table(group, ""))]  # fmt: skip
    return joined(*parts)


def _figures(data, kind, group, plotter):
    plots = []
    for axis, title, *label in AXES:
        points = [(point.value(axis), point.top1, number, PAPERS.index(point.paper), name_of(point.paper),
                   not point.is_short, point.is_plain) for number, point in enumerate(group, 1)
                  if point.value(axis) is not None]  # fmt: skip
        if points:
            name = f"{kind}-{_file_name(data)}-{axis}"
            plots.append(plotter.scatter(name, title, points, tuple(label), numbered=kind == "runs"))
    return figures(plots)


def _file_name(data):
    return re.sub(r"\W+", "-", data).strip("-")[:60]


def _points_table(group, caption):
    columns = ["#no.", "paper", "network", "#top-1 (%)", "#parameters", "#multiply-adds", "#multiplications", "#shifts",
               "#kB", "#energy (µJ)", "#latency (ms)", "epochs run / in paper", "run"]  # fmt: skip
    rows = []
    for number, point in enumerate(group, 1):
        cost = point.costs
        rows.append([number, page.key(PAPERS.index(point.paper), name_of(point.paper)), point.label,
                     f"{point.top1:.2f}", f"{cost.params:,}", f"{cost.macs:,}", f"{cost.multiplications:,}",
                     f"{cost.shifts:,}", f"{cost.bits / 8e3:,.1f}", f"{cost.microjoules:,.1f}",
                     "" if point.latency_ms is None else f"{point.latency_ms:.2f}", point.epochs,
                     point.run])  # fmt: skip
    used = [index for index in range(len(columns)) if any(row[index] != "" for row in rows)]
    return table([columns[index] for index in used], [[row[index] for index in used] for row in rows], caption)


def curves(papers: list[Paper], plotter: Plotter) -> Html:
    """Test error and losses of all runs, by paper and data set."""
    parts = []
    for paper in papers:
        groups = {}
        for run in paper.all_runs:
            if run.epochs:
                groups.setdefault(run.data, []).append(run)
        for data, runs in sorted(groups.items()):
            title = f"{name_of(paper.name)}, {data_name(data)}"
            parts += [element("h3", title), figures(_curves(paper.name, title, runs, plotter))]
    return joined(*parts) if parts else element("p", "No run has an epoch yet: ", command("bash run_all.sh"))


def _curves(paper, title, runs, plotter):
    plots = []
    for start in range(0, len(runs), RUNS_PER_FIGURE):
        part = runs[start : start + RUNS_PER_FIGURE]
        name = f"curves-{paper}-{_file_name(runs[0].data)}-{start // RUNS_PER_FIGURE}"
        plots.append(plotter.curves(f"{name}-accuracy", "Test accuracy", part, [("test_top1", "-", "")], "top-1 (%)"))
        series = [("train_loss", "-", "training"), ("test_loss", "--", "test")]
        plots.append(plotter.curves(f"{name}-loss", "Loss", part, series, "cross entropy (nats)"))
    return plots


def tables_of(paper: Paper, measured: Measured) -> Html:
    """The paper's published tables with our numbers beside them."""

    def params(row):
        config = published.config_of(paper.name, row) if paper.is_there else None
        try:
            return None if config is None else measured.costs(paper.name, config)[1].params
        except ReportError:  # named at the top of the page
            return None

    found = published.tables(paper.published, paper.all_runs, params)
    if not found:
        return element("p", f"{paper.name}/published.csv is missing or has no rows.")
    return joined(*map(_published_table, found))


def _published_table(printed):
    columns, rows = ["network", "method", "setting"], []
    for metric in printed.metrics:
        name = METRIC_NAMES.get(metric, metric.replace("_", " "))
        columns.append(f"#{name}")
        if _has_ours(printed, metric):
            columns.append(f"#{name}, here")
    for line in printed.lines:
        row = [line.model, line.method, line.setting]
        for metric in printed.metrics:
            row.append(line.published.get(metric, ""))
            if _has_ours(printed, metric):
                row.append(_ours(line, metric))
        rows.append([*row, command(line.command) if line.command else ""])
    repeated = sum(bool(line.runs) for line in printed.lines)
    summary = f"{printed.title} ({printed.dataset}): {len(rows)} rows, {repeated} with a run here"
    content = table([*columns, "command of the original"], rows, "")
    opened = {} if len(rows) > LONG_TABLE and not repeated else {"open": "open"}
    return element("details", element("summary", summary), content, **opened)


def _has_ours(printed, metric):
    return metric in published.ACCURACIES or any(line.ours.get(metric) for line in printed.lines)


def _ours(line, metric):
    if metric not in line.published:
        return ""
    if not line.ours.get(metric):
        return element("span", "not run" if metric in published.ACCURACIES else "", class_="soft")
    note = ""
    if metric in published.ACCURACIES:
        note = element("small", f" ({'; '.join(sorted(set(map(_length, line.runs))))})")
    return joined(element("span", _mean(line.ours[metric]), class_="ours"), note)


def _mean(texts):
    """One number as it is; of several their mean, standard deviation and number, with as many decimals."""
    if len(texts) == 1:
        return texts[0]
    decimals, values = len(texts[0].partition(".")[2]), [float(text) for text in texts]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f} (n = {len(values)})"


def _length(run):
    return f"short: {run.result['epochs']} of {run.result['epochs_in_paper']} epochs" if run.is_short else "full length"


def notes(machine: str) -> Html:
    """What is counted, and what is not."""
    cost = costs.PICOJOULES
    text = words.COUNTED.format(
        float_mac=cost["float multiplication"] + cost["float addition"],
        shift_add=cost["shift"] + cost["integer addition"],
        machine=machine,
        repeats=costs.REPEATS,
        warm_up=costs.WARM_UP,
    )
    paragraphs = re.split(r"\n(?=[A-Z][a-z]+:)", text)
    rows = [[operation, f"{value:g}"] for operation, value in cost.items()]
    return joined(items(paragraphs), table(["operation on 32 bits", "#energy (pJ)"], rows, words.SOURCES))


def scripts_of(folder: Path) -> list[str]:
    """The paper's sweeps."""
    return sorted(path.name for path in folder.glob("*.sh") if path.name.startswith(("sweep_", "run_"))
                  and path.name not in ("run_common.sh", "run_svnh.sh"))  # fmt: skip
