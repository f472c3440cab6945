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
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
COLUMNS = (
    "script", "command", "reproduces", "dataset", "epochs", "epochs_in_paper", "seed", "top1", "best_top1",
    "best_epoch", "top1_paper", "params", "macs", "seconds", "hardware", "versions", "commit", "log",
)  # fmt: skip
START, END = "<!-- results -->", "<!-- /results -->"
PATH_FLAGS = ("data_dir", "output_dir")


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
    """Published top-1 of the original's command, '' if there is none."""
    if command is None:
        return ""
    with open(ROOT / paper / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
            if (
                row["command"] == f"python {command}"
                and row["metric"] == "top1_acc_percent"
                and "README" in row["table"]
            ):
                return row["value"]
    return ""


def without_paths(header: dict) -> dict:
    """The header as it may be published: where this machine keeps its files is nobody's business."""
    args = {name: value for name, value in header["args"].items() if name not in PATH_FLAGS}
    command = re.sub(r"(--(?:data-?dir|output-dir))[= ]\S+", r"\1 DIR", header["command"])
    return {**header, "args": args, "command": command}


def record(run_dir: Path) -> Path:
    """Add a finished run to its paper's results.csv and copy its log. Returns the log's path."""
    header, epochs, result = read_run(run_dir)
    header, paper = without_paths(header), header["paper"]
    name = run_dir.resolve().name + f"-{header['args']['dataset']}-seed{header['seed']}-{result['epochs']}epochs"
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
        "script": header["command"].split()[1],
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


def results_table(paper: str) -> str:
    """Recorded runs as a Markdown table: the paper's number, ours, epochs run of epochs in the paper."""
    rows = read_results(paper)
    if not rows:
        return "No run is recorded yet."
    lines = [
        "| command | data | paper | here, last | here, best¹ | epochs run / in paper | time, hardware | log |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        epochs = f"{row['epochs']} / {row['epochs_in_paper']}"
        if int(row["epochs"]) < int(row["epochs_in_paper"]):
            epochs = f"**short:** {epochs}"
        paper_top1 = f"{row['top1_paper']}%" if row["top1_paper"] else "none"
        minutes = f"{float(row['seconds']) / 60:.0f} min, {row['hardware']}"
        best = f"{float(row['best_top1']):.2f}% ({row['best_epoch']})"
        cells = (f"`{row['command']}`", row["dataset"], paper_top1, f"{float(row['top1']):.2f}%", best, epochs, minutes,
                 f"[log]({row['log']})")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "¹ top-1 accuracy of the epoch that is best on the test set, as the paper reports it; counted from 0.",
    ]
    return "\n".join(lines)


def readme_with_table(paper: str) -> str:
    """The paper's README with its table written anew. Raises ReportError if the markers are missing."""
    text = (ROOT / paper / "README.md").read_text()
    if START not in text or END not in text:
        raise ReportError(f"{paper}/README.md has no {START} … {END} markers")
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{results_table(paper)}\n{END}{rest.split(END, 1)[1]}"


def plot_curves(paper: str) -> Path | None:
    """Test error over epochs of the recorded runs, as <paper>/plots/curves.{png,svg}; None without runs."""
    rows = read_results(paper)
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (error_axes, loss_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, row in enumerate(rows):
        lines = [json.loads(line) for line in (ROOT / paper / row["log"]).read_text().splitlines()]
        epochs = [line for line in lines if line["type"] == "epoch"]
        numbers = [line["epoch"] + 1 for line in epochs]
        style = {"color": f"C{index}", "marker": "o", "markersize": 3}
        label = Path(row["log"]).stem.split("-")[0].replace("_", ", expansion ", 1)
        error_axes.plot(
            numbers, [100 - line["test_top1"] for line in epochs], label=f"{label}, {row['dataset']}", **style
        )
        loss_axes.plot(numbers, [line["train_loss"] for line in epochs], label=f"{label}, training", **style)
        loss_axes.plot(numbers, [line["test_loss"] for line in epochs], "--", label=f"{label}, test", **style)
    error_axes.set(title="Test error", xlabel="epoch", ylabel="top-1 error (%)", ylim=(0, None))
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="cross entropy (nats)", ylim=(0, None))
    for axes in (error_axes, loss_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
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
