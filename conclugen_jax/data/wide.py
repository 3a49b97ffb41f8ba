"""Read tables with one column per feature, as openSMILE, OpenFace, WEKA and pandas write them: csv and ARFF.

A table holds rows of many clips, named by one of its columns, or rows of one clip, named by its file. Which columns are
features is read from the header and the first row, see :func:`roles`.
"""

import csv
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv, types

from conclugen_jax.data.files import MEDIA, MOST_TEXT, STILLS, as_text, read_whole
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError, reason

ENDINGS = (".csv", ".tsv", ".arff")

KEYS = ("id", "name", "file", "filename", "file_name", "clip", "utterance")
"""Names of columns that name the clip of a row."""

FRAMES = ("frame", "timestamp", "frameindex", "frametime", "framelength", "start", "end", "time")
"""Names of columns that say when a row is, so that it is a frame of its clip."""

FACES, SUCCESS, CONFIDENCE = ("face_id", "face"), "success", "confidence"
"""Names of columns of OpenFace: whose face it is, whether it was found, and how sure that is."""

LABELS = ("split", "group", "speaker", "label", "labels", "class", "emotion", "sentiment")
"""Names of columns that are no features either."""

SHOWN = 8  # names of columns in a message

FEW = 8
"""Columns of numbers, at most, that could as well be ratings; a file of fewer is taken for features only if it is named."""

MISSING = (
    "",
    "?",
    "na",
    "n/a",
    "null",
    "none",
    "nan",
    "-nan",
    "nan(ind)",
    "-nan(ind)",
    "-nan(snan)",
    "1.#qnan",
    "-1.#ind",
)
_NULLS = sorted(
    {
        before + text
        for name in MISSING
        for text in (name, name.upper(), name.capitalize(), "NaN", "N/A")
        for before in ("", " ")
    }
)
_INDEX = re.compile(r"|unnamed: \d+|__index_level_\d+__")  # how pandas calls columns without a name, in lower case
_KINDS = {True: pa.float64(), False: pa.string(), None: pa.null()}
_OF_FRAMES = (*FACES, SUCCESS, CONFIDENCE)
_ATTRIBUTE = re.compile(r"""@attribute\s+('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S+)\s+(\S.*)""", re.IGNORECASE)
_NUMERIC = ("numeric", "real", "integer")


@dataclasses.dataclass(frozen=True)
class Head:
    """The facts that the first lines of a text file show."""

    names: list[str]  # of the columns, without spaces around them
    numeric: list[bool | None]  # whether a column holds numbers; None where the first row does not say
    begin: int  # bytes before the first row
    delimiter: str = ","
    quote: str = '"'
    decimal_point: str = "."
    arff: bool = False


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which columns mean what: places in the header, -1 where there is none."""

    features: list[int]
    key: int  # which names clips
    others: list[int]  # which are used for nothing
    tool: bool  # the header is one of a tool that writes features


@dataclasses.dataclass(frozen=True)
class Frames:
    """Rows of a table."""

    names: Sequence[str]  # of the features
    x: np.ndarray  # float32 [rows, features]
    key: str  # the column that names clips, "" if there is none
    keys: Sequence[str] | None  # of each row, the name of its clip
    timed: bool  # rows are frames, also where a clip has one row
    labels: Mapping[str, Sequence[str]]  # columns of labels, as text
    columns: Mapping[str, np.ndarray]  # further numbers of each row: success, confidence and face, where there are any
    others: Sequence[str]  # names of the columns that are not used
    num_empty: int = 0  # rows of empty cells that were skipped


def head(path: Path, content: bytes) -> Head:
    """Read the header of a table and, to see what its columns hold, its first row."""
    return _arff_head(path, content) if path.suffix.lower() == ".arff" else _csv_head(path, content)


def _lines(content: bytes) -> list[tuple[str, int]]:
    """Return the first lines that are not blank, and where the next one begins."""
    lines, end = [], 0
    while len(lines) < 3 and end < len(content):
        begin, end = end, (content.find(b"\n", end) + 1) or len(content)
        if line := content[begin:end].strip():
            lines.append((line.decode("utf-8-sig" if not begin else "utf-8", "replace"), end))
    return lines


def _csv_head(path: Path, content: bytes) -> Head:
    lines, said = _lines(content), ""
    if lines and lines[0][0].lower().startswith("sep="):
        said, lines = lines[0][0][4:5], lines[1:]
    if not lines or b"\0" in content[:4096]:
        raise ConclugenError(f"{path}: no text in UTF-8 with a header and rows; save it as csv in UTF-8")
    (header, begin), (row, _) = (*lines, ("", 0))[:2]
    delimiter = said or max(",;\t", key=header.count)
    quote = "'" if "'" in row and '"' not in row else '"'
    try:
        names, cells = (
            [c.strip() for c in next(csv.reader([x], delimiter=delimiter, quotechar=quote))]
            for x in (header, row or header)
        )
    except (csv.Error, StopIteration) as e:
        raise ConclugenError(f"{path}: no csv ({reason(e)}); correct its first lines") from e
    names = [name.strip("'\"") for name in names]
    decimal_point = "," if delimiter != "," and any(re.fullmatch(r"[-+]?\d+,\d+", cell) for cell in cells) else "."
    if not row:
        cells = [""] * len(names)
    numeric = [None if c.lower() in MISSING else is_number(c.replace(decimal_point, ".")) for c in cells]
    if all(map(is_number, names)):  # as numpy.savetxt writes it
        begin, names = 0, list(map(str, range(len(names))))
    elif found := next((name for name in names if is_number(name) and re.search(r"\d\D", name)), None):
        fault = f"its first line holds numbers such as {found!r}, not names"
        raise ConclugenError(f"{path}: {fault}; write the table with its header")
    numeric += [None] * (len(names) - len(numeric))
    return Head(names, numeric, begin, delimiter, quote, decimal_point)


def _arff_head(path: Path, content: bytes) -> Head:
    names, numeric, end = [], [], 0
    while end < len(content):
        begin, end = end, (content.find(b"\n", end) + 1) or len(content)
        line = content[begin:end].decode(errors="replace").strip()
        if match := _ATTRIBUTE.fullmatch(line):
            names.append(match[1].strip("'\""))
            numeric.append(match[2].strip().lower() in _NUMERIC)
        elif line.lower().startswith("@data"):
            some = content[end : end + 4096]
            return Head(names, numeric, end, quote='"' if b'"' in some and b"'" not in some else "'", arff=True)
    raise ConclugenError(f"{path}: no @data below lines @attribute NAME TYPE; is it an ARFF file, and complete?")


def is_number(text: str) -> bool:
    """Return whether a text spells a number, which may be infinite."""
    try:
        return "_" not in text and not math.isnan(float(text))
    except ValueError:
        return False


def roles(names: Sequence[str], numeric: Sequence[bool | None], apart: Sequence[str] = ()) -> Roles:
    """Return which columns are features: columns of numbers, except those with other known names.

    The clip of a row is named by the first column with a name in :data:`KEYS`, else by a first column of text. ``apart``
    are further names, in lower case, of columns that are no features.
    """
    lower, is_text = [name.lower() for name in names], [known is False for known in numeric]
    key = next((i for i, name in enumerate(lower) if name in KEYS), -1)
    if key < 0:  # a column of text: the index of pandas, else the first one
        key = next((i for i, name in enumerate(lower) if _INDEX.fullmatch(name) and is_text[i]), -1)
        key = 0 if key < 0 and is_text[:1] == [True] else key
    known = {*FRAMES, *FACES, SUCCESS, CONFIDENCE, *LABELS, *apart}
    features = [
        i
        for i, name in enumerate(lower)
        if numeric[i] and i != key and name not in known and not _INDEX.fullmatch(name)
    ]
    signs = {"frametime"}, {"frameindex"}, {"file", "start", "end"}, {SUCCESS, CONFIDENCE}, {"face", CONFIDENCE}
    tool = any(sign <= set(lower) for sign in signs)
    used = {*features, key, *(i for i, name in enumerate(lower) if name in (*FACES, SUCCESS, CONFIDENCE))}
    return Roles(features, key, [i for i in range(len(names)) if i not in used], tool)


def holds_features(path: Path) -> bool:
    """Return whether a file of text is, by its first lines, a table of features rather than of labels or words."""
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            found = head(path, file.read(2**22))
    except (ConclugenError, OSError):
        return False
    of = roles(found.names, found.numeric)
    if of.tool:  # a column of features may begin with an empty cell, or the file have no rows
        of = roles(found.names, [known is not False for known in found.numeric])
    names = [found.names[i] for i in of.features]
    labelled = any(name.lower() in LABELS for name in found.names)
    plain = not labelled and (len(names) > FEW or all(name[-1:].isdigit() for name in names))
    return bool(names) and (found.arff or of.tool or plain)


def read(path: Path, apart: Sequence[str] = (), features: Sequence[str] = ()) -> Frames:
    """Read a table of csv or ARFF; see :func:`frames`."""
    content = read_whole(path, MOST_TEXT)
    found = head(path, content)
    twice = [name for name, n in Counter(filter(None, found.names)).items() if n > 1]
    if twice:
        raise ConclugenError(f"{path}: column {twice[0]!r} appears twice; each needs a name of its own")
    delimiter = found.delimiter.encode()
    no_row = re.compile(rb"(?m)^[ \t]*%.*$" if found.arff else rb"(?m)^[%s \t\r]+$" % re.escape(delimiter))
    num_empty = 0 if found.arff else sum(delimiter in row for row in no_row.findall(content, found.begin))
    content = content[: found.begin] + no_row.sub(b"", content[found.begin :])
    places = [str(i) for i in range(len(found.names))]
    kinds = {str(i): _KINDS[known] for i, known in enumerate(found.numeric) if known is not None}
    texts = {roles(found.names, found.numeric, apart).key, *_labels(found.names, apart)}
    kinds |= dict.fromkeys(map(str, texts - {-1}), pa.string())
    if not content[found.begin :].strip():  # no rows
        empty = {known: pa.chunked_array([], kind) for known, kind in _KINDS.items()}
        return frames(path, found.names, [empty[known] for known in found.numeric], apart, features)
    try:
        table = arrow_csv.read_csv(
            pa.py_buffer(memoryview(content)[found.begin :]),
            arrow_csv.ReadOptions(
                use_threads=False, block_size=min(max(2**20, len(content)), 2**27), column_names=places
            ),
            arrow_csv.ParseOptions(delimiter=found.delimiter, quote_char=found.quote),
            arrow_csv.ConvertOptions(column_types=kinds, null_values=_NULLS, decimal_point=found.decimal_point),
        )
    except (pa.ArrowException, ValueError) as e:
        why = re.sub(r"CSV column #(\d+)", lambda m: f"column {found.names[int(m[1])]!r}", reason(e, 300))
        raise ConclugenError(f"{path}: cannot be read as a table ({why}); correct the file") from e
    return dataclasses.replace(frames(path, found.names, table.columns, apart, features), num_empty=num_empty)


def frames(
    path: Path,
    names: Sequence[str],
    columns: Sequence[pa.ChunkedArray],
    apart: Sequence[str] = (),
    features: Sequence[str] = (),
) -> Frames:
    """Return the rows of a table.

    Args:
      path: the file, for messages.
      names: of the columns.
      columns: their values; what is neither number nor text is not used.
      apart: names of columns that are no features.
      features: names of those that are, instead of all others of numbers.
    """
    numeric = [any(f(c.type) for f in (types.is_integer, types.is_floating, types.is_boolean)) for c in columns]
    of = roles(names, numeric, apart)
    if of.tool:  # a column of features may be empty
        of = roles(names, [n or types.is_null(c.type) for n, c in zip(numeric, columns, strict=True)], apart)
    chosen = [names.index(name) if name in names else -1 for name in features] or of.features
    if not chosen or -1 in chosen:
        missing = (
            f"column {features[chosen.index(-1)]!r}" if chosen else "column of numbers beside those of names and times"
        )
        raise ConclugenError(f"{path}: no {missing}; it has {', '.join(names)[:300]}")
    x = np.empty((len(columns[0]), len(chosen)), np.float32)
    with np.errstate(over="ignore"):  # infinite then, and refused as that
        for place, i in enumerate(chosen):
            x[:, place] = _numbers(path, names[i], columns[i])
    lower, key, keys = [name.lower() for name in names], "", None
    if of.key >= 0:
        key = names[of.key]
        keys = [text.strip().strip("'\"") for text in _texts(path, key, columns[of.key])]
        keys = keys if key.lower() == "id" else clip_names(keys)
    further = {name: _numbers(path, name, columns[lower.index(name)]) for name in _OF_FRAMES if name in lower}
    labels = {names[i]: _texts(path, names[i], columns[i]) for i in _labels(names, apart) if i != of.key}
    others = [names[i] for i in of.others if names[i] not in labels]
    return Frames([names[i] for i in chosen], x, key, keys, bool({*lower} & {*FRAMES}), labels, further, others)


def _texts(path: Path, name: str, column: pa.ChunkedArray) -> list[str]:
    try:
        return as_text(column.to_pylist(), f"{path}, {name}")
    except (pa.ArrowException, ValueError) as e:
        raise ConclugenError(f"{path}: column {name!r} is no text in UTF-8 ({reason(e)}); write it again") from e


def _labels(names: Sequence[str], apart: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(names) if name.lower() in {*LABELS, *apart}]


def _numbers(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    try:
        return column.cast(pa.float64()).to_numpy()
    except (pa.ArrowException, ValueError) as e:
        raise ConclugenError(f"{path}: column {name!r} cannot be read as numbers ({reason(e)}); correct it") from e


def describe(of: Frames, clips: str) -> str:
    """Return a sentence on how a table was read and which columns are not used."""
    names = [name for name in of.others if name]  # the index of pandas has none
    others = f"; not features: {', '.join(names[:SHOWN])}{' ...' * (len(names) > SHOWN)}" if names else ""
    named = f"{of.names[0]} to {of.names[-1]}" if len(of.names) > 1 else of.names[0]
    empty = f"; rows of empty cells that are skipped: {of.num_empty:,}" if of.num_empty else ""
    return f"{len(of.names)} column{'s' * (len(of.names) > 1)} ({named}), {clips}{others}{empty}"


def usable(of: Frames, rows: np.ndarray | slice, *, framewise: bool) -> tuple[np.ndarray, Counter[str]]:
    """Return the frames of a clip to use, float32 [n, features], and the number of skipped frames by reason.

    The function skips frames in which OpenFace found no face (``success`` is 0), frames with NaN, and frames of other faces
    than the most frequent one (of several such, the one with the greatest confidence). A row that is not a frame is skipped
    only if all of its values are missing.
    """
    x, reasons = of.x[rows], Counter[str]()
    if not framewise:
        return x[~np.isnan(x).all(axis=1)], reasons
    further = {name: values[rows] for name, values in of.columns.items()}
    good = further.get(SUCCESS, np.ones(len(x))) == 1
    whole = ~np.isnan(x).any(axis=1)
    reasons.update({"success=0": int((~good).sum()), "NaN": int((good & ~whole).sum())})
    good &= whole
    faces = np.nan_to_num(next((further[name] for name in FACES if name in further), np.zeros(len(x))), nan=-1)
    if good.any():
        confidence = further.get(CONFIDENCE, np.zeros(len(x)))
        groups = {face: good & (faces == face) for face in np.unique(faces[good]).tolist()}
        best = max(groups.values(), key=lambda rows: (rows.sum(), confidence[rows].mean()))
        reasons["another_face"] = int((good & ~best).sum())
        good = best
    return x[good], +reasons


def clip_names(names: Sequence[str]) -> list[str]:
    """Return the names of clips that paths of files name, such as those in the columns of openSMILE.

    A name is that of the file without folder and ending of media. It keeps the folder of a split in front, and all folders
    in which the files differ where names repeat without them.
    """
    files = [name.replace("\\", "/") for name in names]
    files = [os.path.splitext(name)[0] if name.lower().endswith((*MEDIA, *STILLS)) else name for name in files]
    every = list(dict.fromkeys(files))
    root = os.path.commonpath(map(os.path.dirname, every)) if len({f.startswith("/") for f in every}) == 1 else ""
    inner = {file: os.path.relpath(file, root) if root else file for file in every}
    short = {file: "/".join(_with_split(name.split("/"))) for file, name in inner.items()}
    if len(set(short.values())) < len(every):
        short = inner
    return [short[file] for file in files]


def _with_split(parts: list[str]) -> list[str]:
    return parts[-2:] if len(parts) > 1 and parts[-2].lower() in SPLIT_NAMES else parts[-1:]
