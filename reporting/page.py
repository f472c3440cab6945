"""The page: sections as HTML. Whatever comes from runs is escaped."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

PAPER_NAMES = {
    "shiftresnet": ("ShiftResNet", "3x3 convolutions become zero-FLOP shifts between 1x1 convolutions"),
    "deepshift": ("DeepShift", "multiplications become bitwise shifts and sign flips"),
    "s3": ("S3", "weights become sign-sparse-shift codes of 3 bits"),
    "shared_bases": ("Shared filter bases", "layers share the bases that their filters are combinations of"),
    "epsilon_resnet": ("epsilon-ResNet", "training shows which residual blocks are unneeded, compression removes them"),
}


@dataclass(frozen=True)
class Html:
    """Text that is markup already."""

    text: str


def text(value) -> str:
    """Any value as HTML: Html as it is, all else escaped."""
    return value.text if isinstance(value, Html) else escape(str(value))


def element(name: str, *content, **attributes) -> Html:
    """<name attributes>content</name>; content that is not Html is escaped. class_ and colour -> class, --color."""
    style = f' style="--color: var(--c{attributes.pop("colour")})"' if "colour" in attributes else ""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value
    )
    return Html(f"<{name}{given}{style}>{''.join(map(text, content))}</{name}>")


def table(columns: list, rows: list[list], caption: str = "") -> Html:
    """A table that scrolls in its own box. columns: names; a name that starts with # is a column of numbers."""
    kinds = ["number" if str(name).startswith("#") else "" for name in columns]
    head = [element("th", str(name).lstrip("#"), class_=kind) for name, kind in zip(columns, kinds, strict=True)]
    body = []
    for row in rows:
        cells = (element("td", cell, class_=kind or _kind(cell)) for cell, kind in zip(row, kinds, strict=True))
        body.append(element("tr", *cells))
    parts = [element("caption", caption)] if caption else []
    parts += [element("thead", element("tr", *head)), element("tbody", *body)]
    return element(
        "div", element("table", *parts), class_="scroll", tabindex="0", role="region", aria_label=caption or "table"
    )


def _kind(cell):
    return "word" if not isinstance(cell, Html) and len(str(cell)) < 60 else ""


def items(lines: list) -> Html:
    return element("ul", *(element("li", line) for line in lines))


def command(line: str) -> Html:
    return element("code", line)


def joined(*parts) -> Html:
    """Parts one after the other, as one."""
    return Html("".join(map(text, parts)))


def key(index: int, name: str) -> Html:
    """A name with its colour."""
    return element("span", element("span", class_="key", colour=index), name, class_="paper")


def figures(plots: list) -> Html:
    """Plots side by side as far as there is room, with links to their files."""
    return element("div", *map(_figure, plots), class_="plots")


def _figure(plot):
    links = [f'<a href="plots/{escape(name)}">{name.rpartition(".")[2].upper()}</a>' for name in plot.files]
    return element("figure", element("b", plot.title), Html(plot.svg), element("figcaption", Html(" · ".join(links))))


def page(title: str, subtitle: Html, sections: list[tuple[str, str, Html]], footer: Html) -> str:
    """The whole document. sections: (id, heading, content)."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    links = (element("a", heading, href=f"#{name}") for name, heading, _ in sections)
    body = (element("section", element("h2", heading), content, id=name) for name, heading, content in sections)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>',
            f"<style>\n{style}</style></head>",
            "<body>",
            element("header", element("h1", title), element("p", subtitle, class_="soft"), element("nav", *links)).text,
            element("main", *body).text,
            element("footer", element("p", footer, class_="soft")).text,
            "</body></html>\n",
        ]
    )
