"""A page about runs; records of finished runs, and the READMEs' result tables and curves from the records.

    python report.py [DIR ...]            # report/index.html about the runs below DIR (default: runs/) and the records
    python report.py --latency            # also times each network on this machine
    python report.py --record RUN_DIR     # RUN_DIR holds the metrics.jsonl of a finished run
    python report.py --readmes            # write tables and curves again from <paper>/results.csv and logs

Nobody types a result: it is read from the run's own log, which is copied to <paper>/logs/. Tables stand between
`<!-- results -->` and `<!-- /results -->` in <paper>/README.md.
"""

import argparse
import csv
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there with PYTHONSAFEPATH

from reporting import records
from reporting.figures import pyplot
from reporting.records import COLUMNS, OTHER_TABLES, PAPERS, ReportError

ROOT = Path(__file__).resolve().parent
START, END = "<!-- results -->", "<!-- /results -->"


def read_run(run_dir: Path) -> tuple[dict, list[dict], dict]:
    """Header, epochs and result of a finished run. Raises ReportError if it is not one."""
    path = run_dir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        types = [line["type"] for line in lines]
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; give the directory of a training run") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ReportError(f"{path} is damaged; go on with the run (--resume) or repeat it") from None
    if not types or types[0] != "run" or types[-1] != "result":
        raise ReportError(f"{path} has no result: the run is not finished; go on with --resume")
    if lines[0].get("paper") not in PAPERS:
        raise ReportError(f"{path} is of none of these papers: {', '.join(PAPERS)}")
    return lines[0], [line for line in lines if line["type"] == "epoch"], lines[-1]


def published_top1(paper: str, command: str | None) -> str:
    """Published top-1 accuracy in percent of the original's command, '' if there is none."""
    if command is None:
        return ""
    for row in records.read_published(ROOT / paper):
        same = row["command"].removeprefix("python3 ").removeprefix("python ") == command
        if same and not any(word in row["table"] for word in OTHER_TABLES):
            if row["metric"] in ("top1_acc_percent", "top1"):
                return row["value"]
            if row["metric"] == "top1_error_percent":
                return f"{100 - float(row['value']):g}"
            if row["metric"] in ("top1_error", "val_error"):  # fractions
                return f"{100 - 100 * float(row['value']):g}"
    return ""


def without_paths(header: dict) -> dict:
    """The header as it may be published: where this machine keeps its files is nobody's business."""
    args = {name: value for name, value in header["args"].items() if not _is_outside(value)}
    words = shlex.split(header["command"])
    words = [re.sub(r"^(--[\w-]+=)?/.*", r"\1DIR", word) for word in words]
    return {**header, "args": args, "command": shlex.join(words)}


def _is_outside(value) -> bool:
    return isinstance(value, str) and value.startswith("/")


def record(run_dir: Path) -> Path:
    """Add a finished run to its paper's results.csv and copy its log. Returns the log's path."""
    header, epochs, result = read_run(run_dir)
    try:
        header, paper = without_paths(header), header["paper"]
        name = records.run_name(header, run_dir.resolve().name)
        name += f"-{header['args']['dataset']}-seed{header['seed']}-{result['epochs']}epochs"
        log = ROOT / paper / "logs" / f"{name}.jsonl"
        row = _row_of(header, result, str(log.relative_to(ROOT / paper)))
    except KeyError as key:
        raise ReportError(f"{run_dir / 'metrics.jsonl'} is damaged: it has no {key}; repeat the run") from None
    if not header["commit"] or header["commit"].endswith("-dirty"):
        raise ReportError(
            f"{run_dir / 'metrics.jsonl'} is of a work tree that no commit holds ({header['commit']}): "
            "nobody could run it again; commit, and repeat the run"
        )
    rows = read_results(paper)
    if any(known["log"] == row["log"] for known in rows):
        raise ReportError(f"{paper}/{row['log']} is recorded already; remove its line and log first to record another")
    log.parent.mkdir(exist_ok=True)
    kept = {key: value for key, value in result.items() if key not in ("type", "checkpoint")}
    log.write_text("".join(json.dumps(line) + "\n" for line in (header, *epochs, {"type": "result", **kept})))
    path = ROOT / paper / "results.csv"
    with open(path.with_name(path.name + ".part"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(file.name, path)
    return log


def _row_of(header, result, log_name):
    """The row of results.csv."""
    return {
        **{key: result[key] for key in ("epochs", "epochs_in_paper", "top1", "best_top1", "best_epoch")},
        **{key: header[key] for key in ("command", "reproduces", "seed", "params", "macs", "hardware", "commit")},
        "script": shlex.split(header["command"])[1],
        "dataset": header["data"],
        "top1_paper": published_top1(header["paper"], header["reproduces"]),
        "seconds": round(result["seconds"]),
        "versions": " ".join(f"{package} {version}" for package, version in header["versions"].items()),
        "log": log_name,
    }


def read_results(paper: str) -> list[dict]:
    """Recorded runs of a paper, [] if there are none. Raises ReportError if its results.csv is damaged."""
    return records.read_results(ROOT / paper)


def shortened(command: str) -> str:
    """The command without the flags that decide no result: where files are, and what is printed."""
    name = r"--(?:output-dir|data-dir|log-interval|print-freq|print_freq|print-weights)"
    return re.sub(rf" (?:--auto-resume|{name}(?:=\S+| [^-\s]\S*))(?= |$)", "", command)


def without_seed(command: str) -> str:
    return re.sub(r" --seed[= ]\d+", "", command)


def groups_of_seeds(rows: list[dict]) -> list[list[dict]]:
    """Rows that differ in the seed only, together."""
    groups = {}
    for row in rows:
        groups.setdefault((without_seed(row["command"]), row["dataset"], row["epochs"]), []).append(row)
    return list(groups.values())


def mean_and_deviation(rows: list[dict], column: str) -> str:
    """Mean of a column in percent; of several rows also the standard deviation and their number."""
    values = [float(row[column]) for row in rows]
    text = f"{statistics.fmean(values):.2f}"
    return f"{text}%" if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2f}% (n = {len(values)})"


def table_row(rows: list[dict]) -> str:
    """Runs that differ in the seed only, as a line of the table."""
    row = rows[0]
    epochs = f"{row['epochs']} / {row['epochs_in_paper']}"
    if int(row["epochs"]) < int(row["epochs_in_paper"]) or "--train-size" in row["command"]:
        epochs = f"**short:** {epochs}"
    minutes = statistics.fmean(float(row["seconds"]) for row in rows) / 60
    best = mean_and_deviation(rows, "best_top1") + (f" ({row['best_epoch']})" if len(rows) == 1 else "")
    logs = " ".join(f"[{'log' if len(rows) == 1 else one['seed']}]({one['log']})" for one in rows)
    logs += "²" * any(one["commit"].endswith("-dirty") for one in rows)
    command = row["command"] if len(rows) == 1 else without_seed(row["command"])
    cells = (f"`{shortened(command)}`", row["dataset"], f"{row['top1_paper']}%" if row["top1_paper"] else "none",
             mean_and_deviation(rows, "top1"), best, epochs, f"{minutes:.0f} min, {row['hardware']}", logs)  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def results_table(paper: str) -> str:
    """Recorded runs as a Markdown table: the paper's number, ours, epochs run of epochs in the paper."""
    rows = read_results(paper)
    if not rows:
        return "No run is recorded yet."
    lines = [
        "| command | data | paper | here, last | here, best¹ | epochs run / in paper | time, hardware | log |",
        "|---|---|---|---|---|---|---|---|",
        *map(table_row, groups_of_seeds(rows)),
        "",
        "¹ top-1 accuracy of the epoch that is best on the test set, as the paper reports it; counted from 0.",
    ]
    if len(groups_of_seeds(rows)) < len(rows):
        lines[-1] += " Several seeds: mean ± standard deviation."
    if any(row["commit"].endswith("-dirty") for row in rows):  # recorded before such runs were refused
        lines[-1] += " ² Of a work tree with changes that were not committed: the commit in the log does not hold them."
    return "\n".join(lines)


def readme_with_table(paper: str) -> str:
    """The paper's README with its table written anew. Raises ReportError if the markers are missing."""
    text = (ROOT / paper / "README.md").read_text()
    if START not in text or END not in text:
        raise ReportError(f"{paper}/README.md has no {START} … {END} markers")
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{results_table(paper)}\n{END}{rest.split(END, 1)[1]}"


def read_epochs(paper: str, row: dict) -> list[dict]:
    try:
        lines = [json.loads(line) for line in (ROOT / paper / row["log"]).read_text().splitlines()]
    except (OSError, ValueError):
        raise ReportError(f"{paper}/{row['log']} is missing or damaged; restore it from the repository") from None
    return [line for line in lines if line["type"] == "epoch"]


def curve_label(row: dict, groups: list[list[dict]]) -> str:
    """Name of a run in a legend: its directory; the data set too where the runs have several."""
    name = re.sub(r"-[^-]+-seed\d+-\d+epochs$", "", Path(row["log"]).stem)
    several = len({group[0]["dataset"] for group in groups}) > 1
    return f"{name}, {row['dataset']}" if several else name


def plot_curves(paper: str) -> Path | None:
    """Test error over epochs of the recorded runs, as <paper>/plots/curves.{png,svg}; None without runs."""
    rows = read_results(paper)
    if not rows:
        return None
    plt = pyplot(svg_hashsalt="curves")  # the same file from the same records
    figure, (error_axes, loss_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    groups = groups_of_seeds(rows)
    for index, group in enumerate(groups):
        epochs = list(zip(*(read_epochs(paper, row) for row in group), strict=True))  # the same epoch of each seed
        numbers = [same[0]["epoch"] + 1 for same in epochs]
        style = {"color": f"C{index % 10}"}
        if len(numbers) <= 30:  # more of them are a caterpillar
            style |= {"marker": "os^D"[index // 10 % 4], "markersize": 3}
        label = curve_label(group[0], groups)
        mean = {key: [statistics.fmean(line[key] for line in same) for same in epochs]
                for key in ("test_top1", "train_loss", "test_loss")}  # fmt: skip
        error_axes.plot(numbers, [100 - value for value in mean["test_top1"]], label=label, **style)
        loss_axes.plot(numbers, mean["train_loss"], **style)
        loss_axes.plot(numbers, mean["test_loss"], "--", **style)
    loss_axes.plot([], [], color="grey", label="training")
    loss_axes.plot([], [], "--", color="grey", label="test")
    error_axes.set(title="Test error", xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, None))
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    loss_axes.legend(fontsize=8, frameon=False)
    figure.legend(
        *error_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    for axes in (error_axes, loss_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    folder = ROOT / paper / "plots"
    folder.mkdir(exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"curves.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)
    return folder / "curves.png"


def write_readmes():
    for paper in PAPERS:
        if (ROOT / paper / "README.md").exists():
            (ROOT / paper / "README.md").write_text(readme_with_table(paper))
            plot_curves(paper)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="DIR", help="where runs are (default: runs)")
    parser.add_argument(
        "--output-dir", default="report", type=Path, metavar="DIR", help="of the page (default: %(default)s)"
    )
    parser.add_argument("--latency", action="store_true", help="measure each run's network: seconds for each")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--record", nargs="+", type=Path, metavar="RUN_DIR", help="record finished runs, then --readmes"
    )
    action.add_argument("--readmes", action="store_true", help="write the tables and curves of all READMEs")
    return parser


def write_page(args) -> int:
    """The page; exit status 1 if the repository's own records are damaged, which the page shows."""
    from reporting.build import build

    for folder in args.runs:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ReportError(f"{folder} {what}; give a folder in which runs are")
    try:
        path, damages = build(ROOT, args.runs or [Path("runs")], args.output_dir, args.latency)
    except OSError as error:
        raise ReportError(f"cannot write {error.filename}: {error.strerror}; choose another --output-dir") from None
    except ModuleNotFoundError as error:
        raise ReportError(f"no module {error.name}: install the packages of requirements.txt") from None
    print(f"report: {path}")
    for line in damages:
        print(f"error: {line}", file=sys.stderr)
    return 1 if damages else 0


def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.record or args.readmes) and (args.runs or args.latency):
        parser.error("--record and --readmes write no page: give them without DIR and --latency")
    try:
        if not (args.record or args.readmes):
            return write_page(args)
        for run_dir in args.record or ():
            print(f"recorded {record(run_dir).relative_to(ROOT)}")
        write_readmes()
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
