"""Build a data set's shards: python -m launch.build_dataset --dataset=digits --data_dir=DATA

The files go to DATA/NAME/VERSION; that folder is what --config.data.path names. Building what is there already, from
the same examples, writes nothing.
"""

from absl import flags

from conclugen_jax.data import builders, digits
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from launch import app

SOURCES = {"digits": digits.Digits}

DATASET = flags.DEFINE_string("dataset", None, f"Which data set: {', '.join(SOURCES)}")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds the data sets; made if needed")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a data set that is there already")


def main() -> None:
    """Build and say what was built."""
    name = app.required("dataset")
    if name not in SOURCES:
        raise ConclugenError(f"--dataset={name} is unknown; there are {', '.join(SOURCES)}")
    folder = builders.build(SOURCES[name](), app.required("data_dir"), overwrite=OVERWRITE.value)
    manifest = manifest_lib.read(folder)
    counts = ", ".join(f"{split} {facts['num_examples']}" for split, facts in manifest.splits.items())
    sizes = ", ".join(f"{m} {dim}" for m, dim in manifest.modalities.items())
    print(f"{folder}: {counts} examples; modalities {sizes}; {len(manifest.label.names)} classes")


if __name__ == "__main__":
    app.run(main)
