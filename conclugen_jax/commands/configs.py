"""List the named configurations, print one, or write one out to edit.

conclugen configs                              all names, each with what it is
conclugen configs small                        the file of one
conclugen configs small --output=mine.py       a copy to edit; then: conclugen pretrain --config=mine.py

--config takes a name from this list or the path of a file.
"""

from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import configuration_files
from conclugen_jax.system import files

command = app.Command(words="the name of a configuration", jax=False)
FLAGS = command.flags
command.string("output", None, "File to write the configuration to; must not exist yet")


def main() -> None:
    """List, print or write."""
    names, output, words = configuration_files.names(), FLAGS.output, [w.replace("-", "_") for w in command.words]
    wrong = [word for word in words[:1] if word not in names] + words[1:]
    if wrong or (output and not words):
        fact = f"{wrong[0]!r} is not a name of a configuration" if wrong else f"--output={output} without a name"
        raise ConclugenError(f"{fact}; there are {', '.join(names)}")
    if output and Path(output).exists():
        raise ConclugenError(f"--output={output}: exists already; choose another file")
    if not words:
        width = max(map(len, names))
        print("\n".join(f"{name:{width}}  {line}" for name, line in names.items()))
        return
    text = (configuration_files.FOLDER / f"{words[0]}.py").read_text(encoding="utf-8")
    if not output:
        print(text, end="")
        return
    files.write_atomically(Path(output), text, place="--output")
    print(f"saved as {output}; use it with --config={output}")
