"""The networks of face-api by face-api itself, under node.

python -m tests.parity.face_api PACKAGE writes tests/parity/face_api.npz, which the tests compare with. PACKAGE is the unpacked
npm package: npm pack @vladmandic/face-api@1.7.15, then tar -xzf vladmandic-face-api-1.7.15.tgz gives the folder package.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.parity import seeded

HERE = Path(__file__).parent
FILE = HERE / "face_api.npz"


def run(package, pictures):
    """Return network -> {features [n, 256], outputs [n, 7 or 136]} of uint8 pictures [n, 112, 112, 3]."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(pictures.tobytes())
        file.flush()
        command = ["node", "--no-warnings", HERE / "face_api.mjs", package, file.name]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return {
        network: {part: np.array(x, np.float32) for part, x in parts.items()}
        for network, parts in json.loads(printed).items()
    }


if __name__ == "__main__":
    found = run(sys.argv[1], seeded.faces())
    np.savez_compressed(FILE, **{f"{n} {part}": x for n, parts in found.items() for part, x in parts.items()})
