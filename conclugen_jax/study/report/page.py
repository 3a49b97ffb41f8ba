"""The page around a report: one HTML file that needs nothing else, for screens of any width, light or dark, and paper."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from conclugen_jax.study.report.charts import swatch, text

STYLE = Path(__file__).with_name("page.css")


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      name: its address in the page, and nothing else.
      title: heading.
      body: HTML.
    """

    name: str
    title: str
    body: str


def page(title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
      title: of the page, plain text.
      lead: HTML under the title.
      warnings: sentences, plain text.
      sections: in order.
    """
    style = STYLE.read_text(encoding="utf-8")
    contents = "".join(f'<li><a href="#{s.name}">{text(s.title)}</a></li>' for s in sections)
    body = "".join(f'<section id="{s.name}"><h2>{text(s.title)}</h2>{s.body}</section>' for s in sections)
    warned = "".join(f"<p><strong>Beware.</strong> {text(sentence)}</p>" for sentence in warnings)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a file may have smuggled in: nothing is loaded, no script runs.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>{lead}</header>\n"
        f"{f'<aside>{warned}</aside>' if warned else ''}<nav><ul>{contents}</ul></nav>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def paragraph(sentence: str, *, note: bool = False) -> str:
    """Plain text as a paragraph."""
    return f"<p{' class=note' if note else ''}>{text(sentence)}</p>"


def subtitle(title: str) -> str:
    """A heading within a section."""
    return f"<h3>{text(title)}</h3>"


def figures(captioned: Iterable[tuple[str, str]]) -> str:
    """(caption or nothing, SVG) side by side, as many as fit."""
    inner = "".join(
        f"<figure>{f'<figcaption>{text(c)}</figcaption>' if c else ''}{svg}</figure>" for c, svg in captioned
    )
    return f'<div class="figures">{inner}</div>'


def side_by_side(parts: Iterable[str]) -> str:
    """Pieces of HTML, as many in a row as fit."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def legend(entries: Iterable[tuple[str, int]], *, line: bool = True) -> str:
    """(name, style) with a sample of the style each."""
    inner = "".join(f"<li>{swatch(style, line=line)}{text(name)}</li>" for name, style in entries)
    return f'<ul class="legend">{inner}</ul>'


def folded(summary: str, content: str) -> str:
    """Plain text that is shown on demand."""
    return f"<details><summary>{text(summary)}</summary><pre tabindex=0>{text(content)}</pre></details>"
