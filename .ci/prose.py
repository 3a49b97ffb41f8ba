"""Find words that the project does not use in its texts; ``make lint`` runs it. Exit code 1 if there are any."""

import re
import subprocess
import sys
from pathlib import Path

WORDS = {
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix, repair",
    r"whoever": "the one who, or name who",
    r"in vain": "without success",
    r"(go|goes|going|went) on(?! to)": "continue, resume",
    r"comes? along": "say what happens",
    r"at hand": "available, or say who has it",
    r"for ever": "forever, always",
    r"hence": "so",
    r"(is|are) told": "report, say who tells whom",
    r"nobody": "say who does not",
    r"but for": "except for",
    r"what becomes? of|becomes of": "say what happens to it",
    r"by choice": "optionally",
    r"(leave|leaves|leaving|left) out": "skip, drop, omit",
    r"(utilise|utilize|leverage)[sd]?": "use",
    r"simply|obviously|of course": "nothing",
    r"in order to": "to",
}
"""Regular expression -> what to write instead."""
BANNED = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)
TEXTS = ("*.md", "*.py", "*.ipynb", "*.yaml", "Makefile")
EXEMPT = ("tests/", ".ci/prose.py", "CHANGELOG.md")  # quotations, this table, and the past


def main() -> int:
    """Print each place, and what to write there."""
    listed = subprocess.run(["git", "ls-files", "-z", *TEXTS], capture_output=True, text=True, check=True).stdout
    found = 0
    for name in filter(None, listed.split("\0")):
        if name.startswith(EXEMPT):
            continue
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
            for word in BANNED.finditer(line):
                instead = next(text for each, text in WORDS.items() if re.fullmatch(each, word[0], re.IGNORECASE))
                print(f"{name}:{number}: {word[0]!r}; better: {instead}")
                found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
