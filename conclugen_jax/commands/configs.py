"""List the named configurations, print one, or write one out to edit.

conclugen configs                              all names, each with what it is
conclugen configs small                        the file of one
conclugen configs small --output=mine.py       a copy to edit; then: conclugen pretrain --config=mine.py

--config takes a name from this list or the path of a file.
"""

from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import configuration_files
from conclugen_jax.system import files

command = app.Command(words="the name of a configuration")
FLAGS = command.flags
command.string("output", None, "File to write the configuration to; must not exist yet")


def main() -> None:
    """List, print or write."""
    names = configuration_files.names()
    if not command.words:
        if FLAGS.output:
            raise ConclugenError(f"--output={FLAGS.output} without a name; there are {', '.join(names)}")
        width = max(map(len, names))
        for name, line in names.items():
            print(f"{name:{width}}  {line}")
        return
    name, *more = command.words
    name = name.replace("-", "_")
    if more or name not in names:
        raise ConclugenError(f"{(more or [name])[0]!r} is not a name of a configuration; there are {', '.join(names)}")
    text = (configuration_files.FOLDER / f"{name}.py").read_text(encoding="utf-8")
    if not FLAGS.output:
        print(text, end="")
        return
    if Path(FLAGS.output).exists():
        raise ConclugenError(f"--output={FLAGS.output}: exists already; choose another file")
    files.write_atomically(Path(FLAGS.output), text, place="--output")
    print(f"saved as {FLAGS.output}; use it with --config={FLAGS.output}")
