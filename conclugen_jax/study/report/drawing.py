"""A figure as matplotlib draws it, made fit to stand in a page: inline SVG, colours by name, texts on hover.

Colours are names that ``page.css`` gives a value, one on light and one on dark ground.
"""

import html
import io
import re
import unicodedata
import warnings
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 360
NUM_STYLES = 10
LETTER = 6.5
"""Mean width of a character of the usual size, generous."""

_METADATA = ("Creator", "Date", "Format", "Type")
_NAMES = (
    *(f"k{i}" for i in range(NUM_STYLES)),
    *("ink", "soft", "rule", "grid", "card", "heat", "deep", "layer-a", "layer-b"),
)
"""Colours of page.css."""


def colour(name: str) -> str:
    """Return a colour that stands for a name until the figure is saved."""
    return f"#c0de{_NAMES.index(name):02x}"


_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "lines.scale_dashes": False,
    "figure.dpi": 72,
    "font.size": 11,
    "text.color": colour("ink"),
    "axes.labelcolor": colour("soft"),
    "axes.labelsize": 11,
    "axes.edgecolor": colour("grid"),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": colour("grid"),
    "xtick.color": colour("grid"),
    "ytick.color": colour("grid"),
    "xtick.labelcolor": colour("soft"),
    "ytick.labelcolor": colour("soft"),
    "ytick.major.size": 0,
}
styled = matplotlib.rc_context(_STYLE)


class Drawing:
    """A figure with places in units from its top left corner, and the texts that its parts show on hover."""

    def __init__(self, height: float, width: float = WIDTH):
        self._width, self._height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72))
        self._parts: dict[str, tuple[str, str]] = {}

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Add axes between four edges."""
        place = left / WIDTH, 1 - bottom / self._height, (right - left) / WIDTH, (bottom - top) / self._height
        return self.figure.add_axes(place)

    def word(self, x: float, y: float, text: str, tone: str = "soft", **style: Any) -> Artist:
        """Add a text whose baseline is at a place."""
        return self.figure.text(x / self._width, 1 - y / self._height, text, color=colour(tone), **style)

    def hint(self, artist: Artist, text: str, kind: str = "part") -> None:
        """Show a text while the pointer is over an artist; ``kind`` is its class in page.css."""
        name = f"part{len(self._parts)}"
        artist.set_gid(name)
        self._parts[name] = text, kind

    def svg(self, title: str, kind: str = "figure") -> str:
        """Return the figure as SVG that stands in a page: no ids but those it refers to, no style beyond itself."""
        file = io.StringIO()
        with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": f"{kind} {title}"}):
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a reader's fonts may have it
            self.figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
        drawn = file.getvalue().split("</style>\n </defs>", 1)[1]
        drawn = re.sub("<[^>]+>", self._in_page, drawn)
        drawn = re.sub(r"(<g[^>]*)>((?:\s*<use [^>]*/>)+)", _styled_together, drawn)
        role = f'role="img" aria-label="{html.escape(title)}"' if title else 'aria-hidden="true"'
        return f'<svg class="{kind}" viewBox="0 0 {self._width} {self._height:.0f}" {role}>{drawn}'

    def _in_page(self, tag: re.Match) -> str:
        """Return a tag of matplotlib's with our colours and hints, without fonts, unused ids and long numbers."""
        text = re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0].replace("xlink:href", "href"))
        text = re.sub(r"#c0de(..)", lambda colour: f"var(--{_NAMES[int(colour[1], 16)]})", text)
        text = re.sub(r" font-family: [^;]*;", "", text)
        name = re.search(r' id="([^"]*)"', text)
        if name and name[1] in self._parts:
            hint, kind = self._parts[name[1]]
            return f'<g class="{kind}"><title>{html.escape(hint)}</title>'
        return text if name is None or re.search(r"[0-9a-f]{10}$", name[1]) else text.replace(name[0], "")


def _styled_together(group: re.Match) -> str:
    """Give a group of markers the style that each of them has."""
    style = re.search(r' style="[^"]*"', group[2])[0]
    return f"{group[1]}{style}>{group[2].replace(style, '')}"


def printable(text: str) -> str:
    """Return a text without what a page cannot hold: control characters and halves of characters."""
    kept = "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)
    return kept.encode("utf-8", "replace").decode("utf-8")


def letters_of(name: str) -> int:
    """Return the width of a text in letters; Chinese, Japanese and Korean characters are two wide."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name)


def shortened(name: str, letters: int) -> str:
    """Return a text at most so many letters wide, the last one an ellipsis where some are left out."""
    name = printable(name)
    if letters_of(name) <= letters:
        return name
    while letters_of(name) >= letters:
        name = name[:-1]
    return f"{name}…"
