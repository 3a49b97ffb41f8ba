"""Tables from a feature file of MMSA or MMSA-FET: python -m launch.convert_mmsa --trust-pickle --source=FILE --output=FOLDER

The file is a pickle, a format that can carry programs. This command reads it as data and runs nothing in it; it
wants to be told all the same that you know where the file comes from. docs/datasets/mmsa.md says what is written.
"""

import signal
import sys

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.data.importers import mmsa
from conclugen_jax.errors import ConclugenError

TRUST_PICKLE = flags.DEFINE_bool(
    "trust_pickle", False, "The file comes from where you think it does (also --trust-pickle)"
)
SOURCE = flags.DEFINE_string("source", None, "Pickle file of MMSA or MMSA-FET")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the tables; must not be there yet")
MODALITIES = flags.DEFINE_list(
    "modalities", None, f"Which of {','.join(mmsa.MODALITIES)}; all that the file holds if not given"
)


def main() -> None:
    """Convert and say what was converted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder is removed on the way out
    source, output = app.required("source"), app.required("output")
    if not TRUST_PICKLE.value:
        raise ConclugenError(
            f"{source} is a pickle, a format that can carry programs, and was not opened; if you know where it comes "
            "from, add --trust-pickle (nothing in it will be run)"
        )
    facts = mmsa.convert(source, output, modalities=MODALITIES.value)
    counts = ", ".join(f"{split} {n}" for split, n in facts["splits"].items())
    print(f"{output}: {counts} clips")
    for m, known in facts["modalities"].items():
        notes = [f"{known['clips']} vectors of {known['dim']} numbers"]
        if known["clips_without"]:
            notes.append(f"{known['clips_without']} clips without")
        if known["minus_infinity_set_to_0"]:
            notes.append(f"{known['minus_infinity_set_to_0']} values of -inf set to 0")
        if known["clips_with_content_outside_their_length"]:
            notes.append(
                f"{known['clips_with_content_outside_their_length']} clips with content outside their length, averaged "
                "over their steps that are not all zero"
            )
        if known["type_in_file"] != "float32":
            notes.append(f"{known['type_in_file']} in the file, float32 now")
        print(f"  {m}: {'; '.join(notes)}")


def _with_underscores(argument: str) -> str:
    """A flag with dashes in its name as absl knows it."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


if __name__ == "__main__":
    sys.argv[1:] = map(_with_underscores, sys.argv[1:])
    app.run(main)
