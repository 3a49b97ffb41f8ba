"""Convert published weights of a frozen network to a folder that extract reads.

conclugen convert_weights --network=resnet152 --source=resnet152-f82ba261.pth --output=weights/resnet152
conclugen convert_weights --network=resnet3d101 --source=resnet3d101_kinetics-8d4c9d63.pth --output=weights/resnet3d101
conclugen convert_weights --network=resdavenet --source=best_audio_model.pth --output=weights/resdavenet
conclugen convert_weights --network=text --source=FOLDER_OF_HUGGING_FACE --output=weights/text

Nothing in the files is executed. The command uses every tensor, skips those known to be of no use here, and refuses
unknown ones by name.
"""

from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.extract.networks import weights

command = app.Command()
FLAGS = command.flags
command.string("network", None, f"Which network: {', '.join(weights.NETWORKS)}")
command.string("source", None, "File (.pth, .safetensors), or folder for text and mtcnn")
command.string("output", None, "Folder to make")
command.string("entry", "", "Entry of the file that holds the tensors, if it has several; dots lead inwards")
command.string("attribution", "", "Author and licence of the weights; kept with them")


def main() -> None:
    """Convert the weights, and list the tensors that were skipped."""
    network, source, output = (command.required(name) for name in ("network", "source", "output"))
    left_out = weights.convert(network, Path(source), Path(output), entry=FLAGS.entry, attribution=FLAGS.attribution)
    print(f"{output}: {network}, SHA-256 {weights.load(output).sha256}")
    if left_out:
        print(f"not needed and dropped: {', '.join(left_out)}")
