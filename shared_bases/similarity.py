"""How similar the shared basis filters of a trained network are to each other.

    python shared_bases/similarity.py checkpoint/FILE.pth --output=similarity.png

Prints, for each group of layers, the mean and largest absolute cosine between
two different shared filters, and between a shared filter and the layers' own
filters; and draws the cosines between shared filters. 0: orthogonal, 1: the
same direction. The model and its ranks are found from the file.
"""

import argparse
import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from shared_bases import engine
from shared_bases.checkpoints import existing_path, network_of, read_checkpoint
from shared_bases.figures import pyplot
from shared_bases.regulariser import basis_matrices, own_bases
from shared_bases.runs import RunError


@dataclass(frozen=True)
class GroupSimilarity:
    """Absolute cosines of one group's filters; None where there are none to compare.

    filters, own_filters: numbers of shared and own filters. weights: numbers per filter. mean, largest: between
    different shared filters. own_mean: between a shared and an own filter. norm_mean: mean length of shared filters.
    """

    group: int
    filters: int
    weights: int
    mean: float
    largest: float
    norm_mean: float
    own_filters: int
    own_mean: float | None


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Absolute cosines between the rows of (n, d) and (m, d), as float64 (n, m)."""
    first, second = (nn.functional.normalize(matrix.double(), dim=1) for matrix in (first, second))
    return (first @ second.T).abs()


def shared_and_own(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """For each group its shared filters as rows, and its own filters as rows where they see the same channels."""
    shared = basis_matrices(model)
    own = [[basis.weight.detach().flatten(1) for basis in bases] for bases in own_bases(model)]
    if len(own) != len(shared):
        own = [[] for _ in shared]
    pairs = []
    for matrix, weights in zip(shared, own, strict=True):
        fitting = [weight for weight in weights if weight.shape[1] == matrix.shape[1]]
        pairs.append((matrix, torch.cat(fitting) if fitting else None))
    return pairs


def group_similarity(group: int, shared: Tensor, own: Tensor | None) -> GroupSimilarity:
    """Statistics of one group. shared: (n, d), n > 0. own: (m, d) or None."""
    between = cosines(shared, shared).fill_diagonal_(0)
    pairs = max(1, len(shared) * (len(shared) - 1))
    return GroupSimilarity(
        group=group,
        filters=len(shared),
        weights=shared.shape[1],
        mean=float(between.sum() / pairs),
        largest=float(between.max()),
        norm_mean=float(shared.double().norm(dim=1).mean()),
        own_filters=0 if own is None else len(own),
        own_mean=None if own is None else float(cosines(shared, own).mean()),
    )


def print_table(groups: list[GroupSimilarity]):
    print("| group | shared filters | weights each | mean cosine | largest | mean length | own filters | with own |")
    print("|---|---|---|---|---|---|---|---|")
    for row in groups:
        own = "" if row.own_mean is None else f"{row.own_mean:.4f}"
        print(
            f"| {row.group} | {row.filters} | {row.weights} | {row.mean:.4f} | {row.largest:.4f} | {row.norm_mean:.4f} "
            f"| {row.own_filters or ''} | {own} |"
        )


def draw(matrices: list[Tensor], groups: list[GroupSimilarity], title: str, path: str):
    """Absolute cosines between the shared filters of each group, one panel per group."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(3.2 * len(matrices) + 1, 3.6), layout="constrained", squeeze=False
    )
    largest = max(max(row.largest for row in groups), 1e-6)
    for axes, matrix, row in zip(panels[0], matrices, groups, strict=True):
        image = axes.imshow(cosines(matrix, matrix).fill_diagonal_(0).numpy(), cmap="viridis", vmin=0, vmax=largest)
        axes.set(title=f"group {row.group}: mean {row.mean:.4f}", xlabel="filter", ylabel="filter")
    figure.colorbar(image, ax=panels[0].tolist(), label="absolute cosine (diagonal left out)")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; choose another --output") from None
    finally:
        plt.close(figure)


def write_csv(path: str, groups: list[GroupSimilarity]):
    try:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, asdict(groups[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in groups)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose another --csv") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a .pth file of this repository or of the original")
    parser.add_argument("--output", metavar="FILE", help="picture to write (.png, .svg or .pdf; default: none)")
    parser.add_argument("--csv", metavar="FILE", help="table to write, with all digits (default: none)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv=None) -> list[GroupSimilarity]:
    args = build_parser().parse_args(argv)
    found = read_checkpoint(existing_path(args.checkpoint))
    config, pairs = found["config"], shared_and_own(network_of(found))
    if not pairs:
        raise RunError(f"{args.checkpoint} holds {config.text()}, which has no shared filters to compare")
    groups = [group_similarity(number, *pair) for number, pair in enumerate(pairs, 1)]
    measured = "" if found["acc"] is None else f", {found['acc']:.2f}% at epoch {found['epoch']}"
    title = f"{config.text()} ({config.dataset}{measured})"
    print(title)
    print_table(groups)
    if args.output:
        draw([shared for shared, _ in pairs], groups, title, args.output)
    if args.csv:
        write_csv(args.csv, groups)
    return groups


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
