"""The page around a report: one HTML file that needs nothing else, for screens of any width, light or dark, and paper.

A section is a list of blocks; ``page.html.j2`` says how each looks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from conclugen_jax.study.report import charts, drawing
from conclugen_jax.study.report.tables import Table

TEMPLATE = "page.html.j2"


class Text(NamedTuple):
    """A paragraph; ``note``: in small print."""

    kind = "text"
    sentence: str
    note: bool = False


class Heading(NamedTuple):
    """A heading within a section."""

    kind = "heading"
    title: str


class Figures(NamedTuple):
    """(caption or nothing, SVG of :mod:`charts`) side by side, as many as fit."""

    kind = "figures"
    drawn: Sequence[tuple[str, str]]


class Legend(NamedTuple):
    """(name, style) with a sample of the style each."""

    kind = "legend"
    entries: Sequence[tuple[str, int]]


class Columns(NamedTuple):
    """Lists of blocks, as many in a row as fit."""

    kind = "columns"
    parts: Sequence[Sequence[Any]]


class Folded(NamedTuple):
    """Text that is shown on demand."""

    kind = "folded"
    summary: str
    content: str


Block = Text | Heading | Figures | Legend | Columns | Folded | Table


def render(title: str, lead: Sequence[str], warnings: Sequence[str], sections: dict[str, Sequence[Block]]) -> str:
    """Return the whole file.

    Args:
      title: of the page.
      lead: lines under the title.
      warnings: sentences.
      sections: title -> its blocks.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        title=title, lead=lead, warnings=warnings, sections=sections, swatch=charts.swatch
    )
    return drawing.printable(page)
