"""Run a notebook's code cells in this process, as IPython would, and print their outputs as JSON: run_notebook.py FILE."""

import base64
import json
import sys
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output


def main(path: str) -> None:
    """One list of outputs a cell: mime type -> content; what was printed is text/plain."""
    shell = InteractiveShell.instance()
    outputs = []
    for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        with capture_output() as captured:
            result = shell.run_cell("".join(cell["source"]), store_history=True)
        result.raise_error()
        shown = [output.data for output in captured.outputs]
        if result.result is not None:
            shown.append(shell.display_formatter.format(result.result)[0])
        shown = [{kind: text_of(x) for kind, x in data.items()} for data in shown]
        outputs.append([*shown, {"text/plain": captured.stdout}, {"stderr": captured.stderr}])
    print(json.dumps(outputs))


def text_of(content: object) -> str:
    """Return an output as a notebook's file holds it."""
    return base64.b64encode(content).decode() if isinstance(content, bytes) else str(content)


if __name__ == "__main__":
    main(sys.argv[1])
