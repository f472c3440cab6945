"""Plots of a training run: error, learning rate and closed blocks over epochs,
and a strip chart of every block's state.

    python epsilon_resnet/plot.py train_log.cifar10-e_2.5-n_18
    python epsilon_resnet/plot.py epsilon_resnet/logs/*.jsonl --output-dir epsilon_resnet/plots

Reads metrics.jsonl (a run's folder or a recorded log) and writes
<name>-curves.png and <name>-blocks.png beside it or in --output-dir. A block's
state is the moving average of "its gate was closed": 1 after about 238 closed
training batches in a row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import flags
from epsilon_resnet.engine import run_script
from epsilon_resnet.figures import pyplot
from epsilon_resnet.models import config_from_dict
from epsilon_resnet.runs import RunError, read_metrics


def build_parser():
    parser = flags.new_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with a metrics.jsonl, or a recorded log")
    parser.add_argument("--output-dir", metavar="DIR", help="where plots go (default: beside what is read)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """(header, epochs) of a run. Raises RunError if there is none, or no epoch is finished."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    lines = read_metrics(file)
    epochs = [line for line in lines if line.get("type") == "epoch"]
    if not epochs or lines[0].get("paper") != "epsilon_resnet":
        raise RunError(f"{file} is no log of a run of this paper with finished epochs")
    return lines[0], epochs


def plot_curves(header: dict, epochs: list[dict], target: Path):
    """Error, learning rate and closed blocks over epochs, one panel each, as PNG."""
    plt = pyplot()
    numbers = [line["epoch"] + 1 for line in epochs]
    figure, panels = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for name, style in (("test", "o-"), ("train", ".--")):
        errors = [100 - line[f"{name}_top1"] for line in epochs]
        panels[0].plot(numbers, errors, style, markersize=3, label=name)
    panels[0].set(ylabel="top-1 error (%)", ylim=(0, None), title=title(header))
    panels[0].legend(frameon=False)
    panels[1].step(numbers, [line["lr"] for line in epochs], where="mid", color="C2")
    panels[1].set(ylabel="learning rate", yscale="log")
    if "closed_blocks" in epochs[0]:
        panels[2].step(numbers, [line["closed_blocks"] for line in epochs], where="mid", color="C3", label="count")
        panels[2].plot(numbers, [line["discarded_cnt"] for line in epochs], ":", color="C3", label="moving average")
        panels[2].set(ylim=(0, len(config_from_dict(header["config"]).block_names)))
        panels[2].legend(frameon=False)
    panels[2].set(ylabel="closed blocks", xlabel="epoch")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def plot_blocks(header: dict, epochs: list[dict], target: Path):
    """Strip chart: one row per block, one column per epoch, dark where the gate is closed, as PNG."""
    plt = pyplot()
    names = config_from_dict(header["config"]).block_names
    states = [list(column) for column in zip(*(line["is_discarded"] for line in epochs), strict=True)]
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.12 * max(len(names), 12)), layout="constrained")
    extent = (epochs[0]["epoch"] + 0.5, epochs[-1]["epoch"] + 1.5, len(names) - 0.5, -0.5)
    image = axes.imshow(states, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="none", extent=extent)
    axes.set(xlabel="epoch", title=title(header))
    axes.xaxis.get_major_locator().set_params(integer=True)
    step = max(1, len(names) // 30)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    figure.colorbar(image, label="gate closed (moving average)", pad=0.01)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def title(header: dict) -> str:
    """Network, threshold and data of a run."""
    config, args = config_from_dict(header["config"]), header["args"]
    size = f"n = {config.size} ({config.layers} layers)" if config.arch == "cifar" else f"depth {config.size}"
    gates = f", epsilon {args['epsilon']:g}" if config.gated else ", no gates"
    return f"{header['data']}, {size}{gates}"


def main(argv=None):
    args = build_parser().parse_args(argv)
    for path in map(Path, args.runs):
        header, epochs = read_run(path)
        folder = Path(args.output_dir) if args.output_dir else path if path.is_dir() else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        name = path.resolve().name if path.is_dir() else path.stem
        plots = {"curves": plot_curves}
        if "is_discarded" in epochs[0]:
            plots["blocks"] = plot_blocks
        for kind, plot in plots.items():
            target = folder / f"{name}-{kind}.png"
            plot(header, epochs, target)
            print(target)


if __name__ == "__main__":
    sys.exit(run_script(main))
