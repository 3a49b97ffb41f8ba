"""Published weights of a frozen network -> a folder that launch.extract reads.

python -m launch.convert_weights --network=resnet152 --source=resnet152-f82ba261.pth --output=weights/resnet152
python -m launch.convert_weights --network=resnet3d101 --source=resnet3d101_kinetics-8d4c9d63.pth --output=weights/resnet3d101
python -m launch.convert_weights --network=resdavenet --source=best_audio_model.pth --output=weights/resdavenet
python -m launch.convert_weights --network=text --source=FOLDER_OF_HUGGING_FACE --output=weights/text

Nothing in the files is executed. Every tensor is used, known to be of no use here, or refused by its name.
"""

from pathlib import Path

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.extract.networks import weights

NETWORK = flags.DEFINE_string("network", None, f"Which network: {', '.join(weights.NETWORKS)}")
SOURCE = flags.DEFINE_string("source", None, "File (.pth, .safetensors), or folder for text and mtcnn")
OUTPUT = flags.DEFINE_string("output", None, "Folder to make")
ENTRY = flags.DEFINE_string(
    "entry", "", "Which entry of the file holds the tensors, where it has several; dots lead inwards"
)
ATTRIBUTION = flags.DEFINE_string("attribution", "", "Whose weights they are and under which licence; kept with them")


def main() -> None:
    """Convert, and say what was left out."""
    network, source, output = (app.required(name) for name in ("network", "source", "output"))
    left_out = weights.convert(network, Path(source), Path(output), entry=ENTRY.value, attribution=ATTRIBUTION.value)
    print(f"{output}: {network}, SHA-256 {weights.load(output).sha256}")
    if left_out:
        print(f"not needed and left out: {', '.join(left_out)}")


if __name__ == "__main__":
    app.run(main)
