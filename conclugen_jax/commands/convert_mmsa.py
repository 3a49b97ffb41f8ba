"""Convert a feature file of MMSA or MMSA-FET to tables.

conclugen convert_mmsa --trust-pickle --source=FILE --output=FOLDER

The file is a pickle, a format that can carry programs. This command reads it as data and runs nothing in it, but asks you
to confirm that you know where the file comes from. docs/reference/datasets/mmsa.md says what is written.
"""

from conclugen_jax.commands import app
from conclugen_jax.data.importers import mmsa
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import signals

command = app.Command(jax=False)
FLAGS = command.flags
command.bool("trust_pickle", False, "You know where the file comes from (also --trust-pickle)")
command.string("source", None, "Pickle file of MMSA or MMSA-FET")
command.string("output", None, "Folder for the tables; must not exist yet")
command.list("modalities", None, f"Which of {','.join(mmsa.MODALITIES)}; default: all in the file")


@signals.ending_at_once()
def main() -> None:
    """Convert the file and report on it."""
    source, output = command.required("source"), command.required("output")
    if not FLAGS.trust_pickle:
        way_out = "if you know where it comes from, add --trust-pickle (nothing in it will be run)"
        raise ConclugenError(f"{source} is a pickle, a format that can carry programs, and was not opened; {way_out}")
    facts = mmsa.convert(source, output, modalities=FLAGS.modalities)
    counts = ", ".join(f"{split} {n}" for split, n in facts["splits"].items())
    print(f"{output}: {counts} clips")
    for m, known in facts["modalities"].items():
        outside = known["clips_with_content_outside_their_length"]
        notes = {
            f"{known['clips']} vectors of {known['dim']} numbers": True,
            f"{known['clips_without']} clips without": known["clips_without"],
            f"{known['minus_infinity_set_to_0']} values of -inf set to 0": known["minus_infinity_set_to_0"],
            f"{outside} clips with content outside their length, averaged over their steps that are not all zero": outside,
            f"{known['type_in_file']} in the file, float32 now": known["type_in_file"] != "float32",
        }
        print(f"  {m}: {'; '.join(note for note, applies in notes.items() if applies)}")
