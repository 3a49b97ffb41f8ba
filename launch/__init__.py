"""``python -m launch.NAME`` is ``conclugen NAME``, from a checkout."""

import sys

from conclugen_jax.commands.main import main


def run(file: str) -> None:
    """Run the command that a file is named after."""
    sys.argv.insert(1, file.rpartition("/")[2].removesuffix(".py"))
    main()
