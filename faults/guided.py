"""Outside files, changed so that ever more of their readers' code is reached (libFuzzer, through atheris).

    pip install atheris
    python -m faults.guided subtitles --seconds=300
    python -m faults.guided manifest --run=runs/demo/conclugen

Kinds are those of ``faults.fuzz``. Ends with 0 if every input was read or refused in one sentence; otherwise with the
traceback and a file of the input.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["conclugen_jax"]):
    from conclugen_jax.errors import ConclugenError
    from faults import fuzz


def main() -> None:
    """Fuzz one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=fuzz.KINDS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/conclugen"), help="a run, for kinds of its files")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="conclugen_guided-"))
    (folder / "corpus").mkdir()
    file = fuzz.target(args.kind, folder, args.run)
    (folder / "corpus" / "valid").write_bytes(file.valid)
    count = 0

    def one(content: bytes) -> None:
        nonlocal count
        count += 1
        if count % 500 == 0:
            file.renew()
        file.path.write_bytes(content)
        try:
            file.read()
        except ConclugenError as e:
            if "\n" in str(e):
                raise AssertionError(f"several lines: {e}") from e

    limits = [
        f"-max_total_time={args.seconds}",
        f"-seed={args.seed}",
        "-rss_limit_mb=4096",
        "-timeout=30",
        "-max_len=65536",
    ]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(folder / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
