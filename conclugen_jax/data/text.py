"""Decode text files. UTF-8 and UTF-16 are recognised by their bytes; any other encoding is guessed, with a remark."""

import re
import unicodedata
from pathlib import Path

from conclugen_jax.errors import ConclugenError

_OTHERS = re.compile(rb"[\x80-\xff]{4}|\xc3[\x80-\xbf]")
"""Bytes that exclude Windows-1252: four non-ASCII letters in a row, as in Russian or Chinese, or the é of UTF-8."""


def decoded(content: bytes, path: Path) -> tuple[str, str]:
    """Return the text of a file, its accents composed, and a remark for the user if the encoding is a guess, else "".

    UTF-8 and, with its mark, UTF-16 are recognised. What is neither is read as Windows-1252 if it can be that.

    Raises:
      ConclugenError: another encoding, or no text.
    """
    encoding, remark, known = "utf-8-sig", "", "UTF-8"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding, known = "utf-16", "UTF-16, as its first bytes say"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as e:
        try:
            if encoding == "utf-16" or _OTHERS.search(content):
                raise
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            fault = f"not {known} (byte {e.start + 1}), and its encoding is unknown"
            raise ConclugenError(f"{path}: {fault}; save it in UTF-8") from e
        remark = "not in UTF-8, so read as Windows-1252: save it in UTF-8 if letters are wrong"
    if "\0" in text:
        raise ConclugenError(f"{path}: holds zero bytes, as UTF-16 without its mark does; save it in UTF-8")
    return unicodedata.normalize("NFC", text), remark
