"""The documentation site builds without a warning, its links lead somewhere, and it loads nothing from elsewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers import ROOT

pytest.importorskip("myst_nb", reason="needs the extra 'docs'")
DOCS = ROOT / "docs"
GENERATED = {"_build", "commands", "configuration.md"}
PAGES = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "launch").rglob("*.md")]
PAGES = sorted(path for path in PAGES if not GENERATED & set(path.parts))


class Page(HTMLParser):
    """What a page links to, what it loads, and where in it one can link to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Collect a tag's addresses and its name."""
        found = dict(attrs)
        self.anchors.add(found.get("id") or found.get("name"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag != "a":
            self.loaded += [found[key] for key in ("src", "href") if found.get(key)]


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "CONCLUGEN_TUTORIALS": "off"},
    )
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in tmp_path.rglob("*.html")}
    assert len(pages) > 50
    for path, page in pages.items():
        assert not [address for address in page.loaded if urlsplit(address).netloc], path.name
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:  # of another site
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path.name, link)
            assert not parts.fragment or unquote(parts.fragment) in pages[target].anchors, (path.name, link)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_page_is_short_enough(path):
    assert path.read_text(encoding="utf-8").count("\n") <= (150 if path.name == "README.md" else 300)
