"""Figures as SVG text for the page, and as PNG and SVG files beside it.

On the page, colours become CSS variables and text takes the page's font, so that one figure is readable in light and
dark; the files have a white background.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

from reporting.figures import pyplot

PALETTE = ("#0b5fa5", "#b3510f", "#1c7a3e", "#8a2d8f", "#b3202c", "#0b7a75", "#7a6a00", "#5a6270")  # --c0 to --c7
INK, GRID, PAPER = "#1d2228", "#d5d9de", "#fffffe"  # --ink, --grid, --paper
BACKGROUND = "#ffffff"  # of the files; none on the page
MARKERS = "os^Dv"
WIDTH = 5.0  # inches; at 72 units each about as wide as a phone, so that text keeps its size there
PLOT_HEIGHT = 3.1  # inches, without the legend
RUNS_PER_FIGURE = 8
OFFSETS = [(radius * x, radius * y) for radius in (10, 19) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))] + [
    (x, y) for x in (9, -9) for y in (9, -9)
]  # of a number from its point


@dataclass(frozen=True)
class Plot:
    """A figure on the page: title and description in words, the SVG element, the names of its files."""

    title: str
    alt: str
    svg: str
    files: tuple[str, str]


class Plotter:
    """Draws into `folder`; raises OSError if it cannot be written."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def curves(self, name: str, title: str, runs: list, series: list[tuple[str, str, str]], label: str) -> Plot:
        """Curves over epochs. series: (key of the epoch lines, line style, what the style means)."""
        figure, axes = _figure(len(runs) + (len(series) if len(series) > 1 else 0))
        for index, run in enumerate(runs):
            color = PALETTE[index % len(PALETTE)]
            for key, style, _ in series:
                known = [line for line in run.epochs if isinstance(line.get(key), (int, float))]
                axes.plot([line["epoch"] + 1 for line in known], [line[key] for line in known], style, color=color,
                          marker="o", markersize=3, linewidth=1.4,
                          label=_plain_text(run.name) if key == series[0][0] else None)  # fmt: skip
        for _, style, meaning in series if len(series) > 1 else ():
            axes.plot([], [], style, color=INK, linewidth=1.2, label=meaning)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, ncols=1)
        alt = f"{title}: {label} over epochs of {', '.join(run.name for run in runs)}."
        return self._finish(figure, name, title, alt)

    def scatter(self, name: str, title: str, points: list, axis: tuple[str, str], numbered: bool) -> Plot:
        """Accuracy over a cost on a logarithmic axis, 0 at its left end.

        points: (cost, accuracy, number, index of the paper, its name, filled, plain). Plain networks are grey.
        axis: (label, unit or "").
        """
        entries = sorted({(7, "plain networks", "o") if plain else (paper, paper_name, MARKERS[paper])
                          for *_, paper, paper_name, _, plain in points})  # fmt: skip
        figure, axes = _figure(-(-len(entries) // 3))
        positive = [point[0] for point in points if point[0] > 0]
        zero = min(positive, default=1) / 4
        places = [(point[0] or zero, *point[1:3]) for point in points]
        for (x, y, _), (_, _, _, paper, _, filled, plain) in zip(places, points, strict=True):
            color = PALETTE[7 if plain else paper]
            axes.plot(x, y, MARKERS[paper], color=color, markerfacecolor=color if filled else PAPER, markersize=6,
                      markeredgewidth=1.4)  # fmt: skip
        for color, label, marker in entries:
            axes.plot([], [], marker, color=PALETTE[color], markersize=6, label=label)
        axes.set(xscale="log", xlabel=axis[0], ylabel="test accuracy, top-1 (%)")
        axes.margins(0.12)
        _label_decades(axes, axis[1], zero if len(positive) < len(points) else None)
        _legend(figure, ncols=3)
        if numbered:
            _number_points(axes, places)
        values = ", ".join(f"{number}: {y:.1f}% at {x:.4g}" for x, y, number, *_ in points)
        return self._finish(figure, name, title, f"{title}: top-1 accuracy over {axis[0]}. {values}.")

    def _finish(self, figure, name, title, alt) -> Plot:
        import matplotlib

        files = f"{name}.svg", f"{name}.png"
        options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}
        with matplotlib.rc_context(options):
            figure.savefig(self.folder / files[0], metadata={"Date": None}, facecolor=BACKGROUND)
            figure.savefig(self.folder / files[1], dpi=150, facecolor=BACKGROUND)
        svg = themed((self.folder / files[0]).read_text(encoding="utf-8"), name, alt)
        return Plot(title, alt, svg, files)


def _figure(legend_lines):
    """An empty figure with room for its legend below. Fixed margins: layout engines take most of the drawing's time."""
    pyplot()  # with matplotlib's own settings
    from matplotlib.figure import Figure

    legend = 0.1 + 0.17 * legend_lines
    height = PLOT_HEIGHT + legend
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.62 / WIDTH, (0.48 + legend) / height, 1 - 0.72 / WIDTH, 1 - (0.58 + legend) / height))
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3, which="major")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9.5)
    return figure, axes


def _legend(figure, ncols):
    figure.legend(loc="lower left", bbox_to_anchor=(0.02, 0), ncols=ncols, fontsize=9, frameon=False, labelcolor=INK,
                  columnspacing=1.2, handletextpad=0.4, borderpad=0.2, labelspacing=0.3)  # fmt: skip


def _label_decades(axes, unit, zero):
    """Numbers with a prefix at 1, 2 and 5 of each decade, where there is room. zero: where 0 stands, or None."""
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

    low, high = axes.get_xlim()
    formatter = EngFormatter(unit, sep="\N{NO-BREAK SPACE}" if unit else "")
    locator = LogLocator(subs=(1, 2, 5) if high / low < 400 else (1,))
    ticks = [x for x in locator.tick_values(low, high) if low <= x <= high and (zero is None or x > 2 * zero)]
    axes.xaxis.set_major_locator(FixedLocator(ticks if zero is None else [zero, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: "0" if x == zero else formatter(x))
    if zero is not None:
        axes.axvline(2 * zero, color=INK, linewidth=0.8, linestyle=":")


def _number_points(axes, points):
    """Write each number beside its point, where it covers neither a point nor another number."""
    scale = axes.figure.dpi / 72
    pixels = [tuple(pixel / scale) for pixel in axes.transData.transform([(x, y) for x, y, _ in points])]
    taken = list(pixels)
    for (x, y, number), (px, py) in zip(points, pixels, strict=True):
        distances = {  # to the nearest point or number, in units of what a number covers
            place: min(((px + place[0] - tx) / 10) ** 2 + ((py + place[1] - ty) / 8) ** 2 for tx, ty in taken)
            for place in OFFSETS
        }
        free = [place for place, distance in distances.items() if distance >= 0.9]
        place = free[0] if free else max(distances, key=distances.get)
        taken.append((px + place[0], py + place[1]))
        axes.annotate(str(number), (x, y), place, textcoords="offset points", fontsize=8.5, color=INK, ha="center",
                      va="center")  # fmt: skip


def _plain_text(name):
    """A name that matplotlib neither sets as a formula nor hides."""
    return name.replace("$", r"\$") if not name.startswith("_") else " " + name.replace("$", r"\$")


def themed(svg: str, name: str, alt: str) -> str:
    """An SVG file of matplotlib as an element of the page: its colours, its font, ids of its own, described."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for variable, color in [
        *((f"c{n}", c) for n, c in enumerate(PALETTE)),
        ("ink", INK),
        ("grid", GRID),
        ("paper", PAPER),
    ]:
        svg = svg.replace(color, f"var(--{variable})")
    return svg.replace(BACKGROUND, "none")
