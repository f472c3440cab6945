"""Record finished runs and write the READMEs' result tables and curves from the records.

    python report.py --record RUN_DIR     # RUN_DIR holds the metrics.jsonl of a finished run
    python report.py --readmes            # write tables and curves again from <paper>/results.csv and logs

Nobody types a result: it is read from the run's own log, which is copied to <paper>/logs/. Tables stand between
`<!-- results -->` and `<!-- /results -->` in <paper>/README.md.
"""

import argparse
import csv
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
COLUMNS = (
    "script", "command", "reproduces", "dataset", "epochs", "epochs_in_paper", "seed", "top1", "best_top1",
    "best_epoch", "top1_paper", "params", "macs", "seconds", "hardware", "versions", "commit", "log",
)  # fmt: skip
START, END = "<!-- results -->", "<!-- /results -->"
OTHER_TABLES = ("superseded", "read by eye", "first README")  # of published.csv


class ReportError(Exception):
    """One line for the user."""


def read_run(run_dir: Path) -> tuple[dict, list[dict], dict]:
    """Header, epochs and result of a finished run. Raises ReportError if it is not one."""
    path = run_dir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; give the directory of a training run") from None
    except json.JSONDecodeError:
        raise ReportError(f"{path} is damaged; go on with the run (--resume) or repeat it") from None
    if not lines or lines[0].get("type") != "run" or lines[-1].get("type") != "result":
        raise ReportError(f"{path} has no result: the run is not finished; go on with --resume")
    return lines[0], [line for line in lines if line["type"] == "epoch"], lines[-1]


def published_top1(paper: str, command: str | None) -> str:
    """Published top-1 accuracy in percent of the original's command, '' if there is none."""
    if command is None:
        return ""
    with open(ROOT / paper / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
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
    header, paper = without_paths(header), header["paper"]
    arch = header["args"].get("arch", "")
    name = run_dir.resolve().name
    name = name if arch in name else f"{arch}-{name}"
    name += f"-{header['args']['dataset']}-seed{header['seed']}-{result['epochs']}epochs"
    log = ROOT / paper / "logs" / f"{name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    rows = read_results(paper)
    log_name = str(log.relative_to(ROOT / paper))
    if any(row["log"] == log_name for row in rows):
        raise ReportError(f"{paper}/{log_name} is recorded already; remove its line and log first to record another")
    kept = {key: value for key, value in result.items() if key not in ("type", "checkpoint")}
    log.write_text("".join(json.dumps(line) + "\n" for line in (header, *epochs, {"type": "result", **kept})))
    versions = " ".join(f"{package} {version}" for package, version in header["versions"].items())
    row = {
        **{key: result[key] for key in ("epochs", "epochs_in_paper", "top1", "best_top1", "best_epoch")},
        **{key: header[key] for key in ("command", "reproduces", "seed", "params", "macs", "hardware", "commit")},
        "script": shlex.split(header["command"])[1],
        "dataset": header["data"],
        "top1_paper": published_top1(paper, header["reproduces"]),
        "seconds": round(result["seconds"]),
        "versions": versions,
        "log": log_name,
    }
    with open(ROOT / paper / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    return log


def read_results(paper: str) -> list[dict]:
    """Recorded runs of a paper, [] if there are none."""
    path = ROOT / paper / "results.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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
    command = row["command"] if len(rows) == 1 else without_seed(row["command"])
    cells = (f"`{command}`", row["dataset"], f"{row['top1_paper']}%" if row["top1_paper"] else "none",
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
    return "\n".join(lines)


def readme_with_table(paper: str) -> str:
    """The paper's README with its table written anew. Raises ReportError if the markers are missing."""
    text = (ROOT / paper / "README.md").read_text()
    if START not in text or END not in text:
        raise ReportError(f"{paper}/README.md has no {START} … {END} markers")
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{results_table(paper)}\n{END}{rest.split(END, 1)[1]}"


def read_epochs(paper: str, row: dict) -> list[dict]:
    lines = [json.loads(line) for line in (ROOT / paper / row["log"]).read_text().splitlines()]
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
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same file from the same records
    import matplotlib.pyplot as plt

    figure, (error_axes, loss_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    groups = groups_of_seeds(rows)
    for index, group in enumerate(groups):
        epochs = list(zip(*(read_epochs(paper, row) for row in group), strict=True))  # the same epoch of each seed
        numbers = [same[0]["epoch"] + 1 for same in epochs]
        style = {"color": f"C{index % 10}", "marker": "os^D"[index // 10 % 4], "markersize": 3}
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
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--record", nargs="+", type=Path, metavar="RUN_DIR", help="record finished runs, then --readmes"
    )
    action.add_argument("--readmes", action="store_true", help="write the tables and curves of all READMEs")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    try:
        for run_dir in args.record or ():
            print(f"recorded {record(run_dir).relative_to(ROOT)}")
        write_readmes()
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
