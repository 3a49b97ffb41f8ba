"""The notebooks as pages: run on the demo and on eleven made clips, once, unless ``CONCLUGEN_TUTORIALS=off``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "docs" / "_build" / "tutorials"
PLACES = {
    "CONCLUGEN_WORKDIR": SCRATCH / "demo" / "conclugen",
    "CONCLUGEN_WORKDIRS": f"{SCRATCH / 'demo' / 'conclugen'},{SCRATCH / 'demo' / 'conclu_neighbours'}",
    "CONCLUGEN_CLIPS": SCRATCH / "clips",
    "CONCLUGEN_NEW": SCRATCH / "clips" / "clip10.mkv",
    "CONCLUGEN_OUT": SCRATCH / "first_hour",
    "PYTHONPATH": ROOT,
}
log = logging.getLogger(__name__)


def write(app: Sphinx) -> None:
    """Write the notebooks into ``tutorials/``: with their outputs, or without any where none are wanted."""
    folder, wanted = Path(app.srcdir, "tutorials"), os.environ.get("CONCLUGEN_TUTORIALS") != "off"
    folder.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, kept = folder / path.name, SCRATCH / path.name
        if wanted and not (kept.is_file() and kept.stat().st_mtime > path.stat().st_mtime):
            prepare()
            log.info("running %s", path.name)
            kept.write_text(json.dumps(executed(path)), encoding="utf-8")
        text = (kept if wanted else path).read_text(encoding="utf-8")
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def prepare() -> None:
    """Make what the notebooks read: the runs of the demo, and clips."""
    if not (SCRATCH / "demo" / "recommended.md").is_file():
        run("-m", "conclugen_jax", "demo", f"--folder={SCRATCH / 'demo'}")
    if not (SCRATCH / "clips").is_dir():
        run("-m", "tests.clips", str(SCRATCH / "clips"))


def executed(path: Path) -> dict:
    """Return a notebook with the outputs of its cells."""
    book = json.loads(path.read_text(encoding="utf-8"))
    found = iter(json.loads(run(str(ROOT / "tests" / "run_notebook.py"), str(path)).splitlines()[-1]))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            *shown, printed, _ = next(found)
            text = re.sub(r"Out\[\d+\]: .*", "", printed["text/plain"], flags=re.DOTALL)  # a result, which is shown
            stream = {"output_type": "stream", "name": "stdout", "text": text}
            results = [{"output_type": "display_data", "metadata": {}, "data": data} for data in shown]
            cell["outputs"] = [stream] * bool(stream["text"]) + results
    return book


def run(*arguments: str) -> str:
    """Run Python on the processor, and return what it prints."""
    env = {"JAX_PLATFORMS": "cpu", **os.environ, **{key: str(value) for key, value in PLACES.items()}}
    command = [sys.executable, *arguments]
    printed = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed.replace(f"{SCRATCH}/", "")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
