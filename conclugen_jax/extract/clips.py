"""Find clips, in the unpacked folders of published corpora and in a user's own folders."""

import collections
import dataclasses
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath

from conclugen_jax.data import row_splits
from conclugen_jax.data.cells import Table, number, read_csv
from conclugen_jax.data.files import MEDIA, PICTURES, spelled
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.companions import NO_WORDS, WRONG_LETTERS, Companions, is_full_name, note
from conclugen_jax.extract.media import subtitles
from conclugen_jax.extract.utterance import Utterance

MAX_NAME = 240  # bytes of a name at most: a file of vectors has that name and an ending


def find(
    dataset: str, source: Path, *, labels: tuple[Path, ...] = (), listing: Table | None = None, cut: bool = False
) -> list[Utterance]:
    """Return the utterances in a folder, sorted by place.

    Args:
      dataset: a key of :data:`LAYOUTS`; others mean any clips: ``[train|validation|test/]...`` with subtitles beside them.
      source: folder.
      labels: tables; where they have columns ``start`` and ``end`` (or ``start_time`` and ``end_time``) and ``video``, their
        rows are the utterances, and a column ``text`` says what is said.
      listing: rows of :func:`conclugen_jax.extract.listings.metadata`, each of which is an utterance.
      cut: make an utterance of each line of the subtitles.

    Raises:
      ConclugenError: no clips, names of another form or too long, two clips of one name, or clips beside folders of splits.
    """
    if not source.is_dir():
        raise ConclugenError(f"{source}: no such folder; name the folder of the clips with --source")
    tables = [row_splits.by_file_name(table) for table in map(read_csv, labels) if _interval_columns(table)]
    tables, _ = row_splits.as_written(tables)
    if tables and cut:
        raise ConclugenError(f"{tables[0].path}: has intervals, and --cut takes those of subtitles; leave one out")
    beside = Companions()
    if tables:
        found = _from_tables(tables, source, beside, folds=dataset in LAYOUTS)
    else:
        whole = LAYOUTS.get(dataset, _any)(source) if listing is None else _from_listing(listing, source, beside)
        found = [each for u in whole for each in beside.with_words(u, cut=cut)]
    if not found:
        raise ConclugenError(
            f"{source}: no clips found ({', '.join(MEDIA[:4])}, ...); see docs/how-to/extract_clips.md"
        )
    known = tables or [listing] * (listing is not None)
    loose, others = (next((u for u in found if bool(u.split) is split), None) for split in (False, True))
    if loose and others and not (known and all("split" in table.columns for table in known)):
        raise ConclugenError(f"{loose.path}: is in no folder of a split, but others are in {others.split}; move it")
    places: dict[str, Utterance] = {}
    for u in (dataclasses.replace(u, key=unicodedata.normalize("NFC", u.key)) for u in found):
        length = len(u.key.encode(errors="replace"))
        if not 0 < length <= MAX_NAME or not u.key.isprintable() or set("/\\") & set(u.key) or u.key in (".", ".."):
            expected = f"printable text of 1 to {MAX_NAME} bytes without / and \\"
            raise ConclugenError(f"{u.path!a}: its name {u.key[:40]!a} is not {expected}; rename it")
        if (other := places.setdefault(u.place, u)) is not u:
            way_out = "give each row an id of its own" if tables else "rename one of them"
            raise ConclugenError(f"{u.path}: its name {u.place!r} is also that of {other.path}; {way_out}")
    return [places[place] for place in sorted(places)]


def media_files(folder: Path, endings: tuple[str, ...] = MEDIA) -> Iterator[Path]:
    """Yield files below a folder, in order. Linked folders are entered, each once."""
    entered: set[str] = set()

    def refuse(e: OSError) -> None:
        raise ConclugenError(f"{e.filename}: this folder cannot be read ({e.strerror}); allow it or move it") from e

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        real = os.path.realpath(root)
        if real in entered:  # a link to a folder that is here anyway, or around it
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(root) / n for n in sorted(names) if not n.startswith(".") and n.lower().endswith(endings))


def split_and_parts(source: Path, path: Path) -> tuple[str, list[str]]:
    """Return the split that folders in a clip's path without ending name, ``""`` for none, and its other parts."""
    *folders, name = _parts(path.relative_to(source))
    splits = {SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES}
    if len(splits) > 1:
        raise ConclugenError(f"{path}: its folders say {' and '.join(sorted(splits))}; rename one of them")
    return "".join(splits), [*(folder for folder in folders if folder.lower() not in SPLIT_NAMES), name]


def _parts(path: PurePath) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)


class _Clips:
    """The clips below a folder, found by a cell with a path, or the end of one, with or without ending."""

    def __init__(self, source: Path):
        self._top = _parts(source.absolute())
        self._parts = {path: _parts(path.relative_to(source)) for path in media_files(source)}
        self._by_end = functools.cache(self._ends)

    def _ends(self, num_folders: int) -> Mapping[tuple[str, ...], Sequence[Path]]:
        """Return the clips by the end of their path, with or without ending: so many folders, and the name."""
        found = collections.defaultdict(list)
        for path, (*folders, name) in self._parts.items():
            above = (*self._top, *folders)
            if num_folders <= len(above):
                for each in {name, PurePosixPath(name).stem}:
                    found[*above[len(above) - num_folders :], each].append(path)
        return found

    def find(self, written: str) -> list[Path]:
        """Return the clips that a cell may mean, only those with pictures where it does not say the ending.

        Its folders are those of the clip. Only an ending of films or sound counts as one, and the clip may have another. The
        whole path below the source goes before paths that end in the same way.
        """
        path = PurePosixPath(*_parts(PurePosixPath(written.replace("\\", "/"))))
        for asked in (path, path.with_suffix("")) if path.suffix.lower() in MEDIA else (path,):
            ends = self._by_end(len(asked.parts) - 1).get(asked.parts, [])
            whole = [p for p in ends if len(self._parts[p]) == len(asked.parts)]
            if found := whole or ends:
                return [p for p in found if p.suffix.lower() in PICTURES] or found
        return []


def _interval_columns(table: Table) -> tuple[str, str, str] | None:
    kinds = ("video", "start_time", "end_time"), ("video", "start", "end"), ("clip", "start", "end")
    return next((columns for columns in kinds if set(columns) <= set(table.columns)), None)


def _from_tables(tables: list[Table], source: Path, beside: Companions, *, folds: bool) -> list[Utterance]:
    """Return the rows of tables. Without a column ``id`` a row is called VIDEO_NUMBER, as in the label tables of CMU-MOSEI.

    With ``folds`` the corpus says the splits, and folders do not.
    """
    clips, found, missing, counts = _Clips(source), [], [], {}
    for table in tables:
        video, start, end = _interval_columns(table)
        mark = table.mark(start, end)
        for where, row in table:
            name = row[video].strip()
            if not Path(name).name:
                raise ConclugenError(f"{where}: {video} is {name!r}; write the name of a clip")
            number_of = counts[name] = counts.get(name, -1) + 1
            said, paths = row_splits.named(row.get("split", "").strip()), clips.find(name)
            splits = {p: "" if folds else split_and_parts(source, p.with_suffix(""))[0] for p in paths}
            paths = [p for p in paths if said and splits[p] == said] or paths
            key = row["id"].strip() if "id" in table.columns else f"{name.replace('/', '_')}_{number_of}"
            if not paths:
                missing.append(Utterance(key, "", name, problem=f"{where}: video {name!r} is not there"))
                continue
            if len(paths) > 1:
                way_out = "write its path in the row, with its ending"
                raise ConclugenError(f"{where}: video {name!r} is {paths[0]} or {paths[1]}; {way_out}")
            times = [number(row[column], f"{where}: {column}", (0, 1e6), mark) for column in (start, end)]
            if times[0] >= times[1]:
                raise ConclugenError(f"{where}: ends at {times[1]:g} s and starts at {times[0]:g} s; correct the row")
            words = " ".join(row["text"].split()) if "text" in table.columns else None
            split = splits[paths[0]]
            if split and said not in ("", split):
                fault = f"split {said!r}, but video {name!r} is in the folder of {split}"
                raise ConclugenError(f"{where}: {fault}; correct the row, or move the file")
            u = Utterance(key, split, str(paths[0]), *times, words or None, sound=beside.sound(paths[0]))
            found += beside.with_words(u)
    if missing and not found:
        raise ConclugenError(f"{tables[0].path}: none of its {len(counts)} videos exists, such as {min(counts)!r}")
    return found + _somewhere(missing, found, tables)


def _somewhere(missing: list[Utterance], found: list[Utterance], tables: list[Table]) -> list[Utterance]:
    """Return missing utterances, assigned to a split that others are in if only folders define the splits."""
    splits = {u.split for u in found}
    if "" in splits or all("split" in table.columns for table in tables):
        return missing
    return [dataclasses.replace(u, split=next(s for s in SPLIT_NAMES.values() if s in splits)) for u in missing]


def _from_listing(table: Table, source: Path, beside: Companions) -> list[Utterance]:
    """Return the files of a listing, whose keys are paths below the source; missing files become problems."""
    found, missing, above = [], [], {}
    for where, key, (written,) in zip(table.where, table.columns["id"], table.keys, strict=True):
        path = spelled(source / written)
        split, _ = split_and_parts(source, path.with_suffix(""))
        if (other := above.setdefault((split, key), where)) != where:
            raise ConclugenError(f"{where}: {key!r} is the id of {other}, too; leave one out, or add a column 'id'")
        if os.path.isfile(path):  # also of a name that no file can have
            found.append(Utterance(key, split, str(path), sound=beside.sound(path)))
        else:
            missing.append(Utterance(key, split, str(path), problem=f"{where}: file {written!r} is not there"))
    if missing and not found:
        raise ConclugenError(f"{missing[0].problem}, nor is any other of the {len(missing)} listed files")
    return found + missing


def _any(source: Path) -> Iterator[Utterance]:
    """Find any clips: a key is the path within the split without ending, with '_' for '/'. Sound beside pictures is theirs."""
    groups: dict[Path, list[Path]] = {}
    for path in media_files(source):
        name = path.with_suffix("")
        groups.setdefault(name.with_suffix("") if is_full_name(path) else name, []).append(path)
    for name, paths in groups.items():
        split, parts = split_and_parts(source, name)
        key, seen = "_".join(parts), [p for p in paths if p.suffix.lower() in PICTURES]
        if len(seen) == 1 and len(paths) == 2:
            yield Utterance(key, split, str(seen[0]), sound=str(next(p for p in paths if p != seen[0])))
        else:
            yield from (Utterance(key, split, str(path)) for path in paths)


def _voxceleb2(source: Path) -> Iterator[Utterance]:
    """``[dev/]mp4/IDENTITY/YOUTUBE/CLIP.mp4``; sound in ``aac/IDENTITY/YOUTUBE/CLIP.m4a``. The test set is skipped."""
    for path in media_files(source, PICTURES):
        parts = path.relative_to(source).with_suffix("").parts
        if len(parts) < 3 or "test" in parts[:-3]:
            continue
        root, _, rest = str(path.parent).rpartition(f"{os.sep}mp4{os.sep}")
        beside = Path(root, "aac", rest, f"{path.stem}.m4a")
        sound = str(beside) if root and beside.is_file() else ""
        yield Utterance("_".join(parts[-3:]), "", str(path), sound=sound)


def _caer(source: Path) -> Iterator[Utterance]:
    """``train|validation|test/CLASS/FILE.avi``."""
    for path in media_files(source, PICTURES):
        split, parts = split_and_parts(source, path.with_suffix(""))
        if not split or len(parts) < 2:
            raise ConclugenError(f"{path}: expected train|validation|test/CLASS/FILE.avi below {source}")
        yield Utterance("_".join(parts[-2:]), split, str(path))


def _meld(source: Path) -> Iterator[Utterance]:
    """``train_splits``, ``dev_splits_complete``, ``output_repeated_splits_test`` with ``diaN_uttM.mp4``; words in tables."""
    words = {}
    for path in sorted(source.glob("*_sent_emo.csv")):
        for _, row in read_csv(path):
            if {"Utterance", "Dialogue_ID", "Utterance_ID"} <= row.keys():
                key = f"dia{row['Dialogue_ID'].strip()}_utt{row['Utterance_ID'].strip()}"
                words[_meld_split(path.stem), key] = " ".join(row["Utterance"].split())
    for path in media_files(source, PICTURES):
        if not re.fullmatch(r"dia\d+_utt\d+", path.stem):  # the test folder holds final_videos_... as well
            continue
        split = _meld_split("/".join(path.relative_to(source).parts[:-1]))
        if not split:
            raise ConclugenError(
                f"{path}: its folders do not say whether it is of train, dev or test, or say two of them"
            )
        yield Utterance(path.stem, split, str(path), text=words.get((split, path.stem)))


def _meld_split(name: str) -> str:
    found = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES}
    return "".join(found) if len(found) == 1 else ""


def _mosei(source: Path) -> Iterator[Utterance]:
    """Segments ``.../Segmented/Combined/VIDEO_N.mp4``; words in ``.../Transcript/Segmented/Combined/VIDEO.txt``."""
    words, unread = {}, {}
    for path in sorted(source.rglob("Transcript/Segmented/Combined/*.txt")):
        remarks: list[str] = []
        try:
            lines = subtitles.read_text(path, remarks).splitlines()
        except ConclugenError as e:  # costs the words of one video
            unread[path.stem] = None, note(NO_WORDS, [str(e)])
            continue
        for cells in (line.split("___") for line in lines):
            if len(cells) >= 5:
                words[f"{cells[0]}_{cells[1]}"] = " ".join(cells[4].split()), note(WRONG_LETTERS, remarks)
    for path in media_files(source, PICTURES):
        if "Full" not in path.relative_to(source).parts:
            unknown = unread.get(path.stem.rpartition("_")[0], (None, ()))
            text, notes = words.get(path.stem, unknown)
            yield Utterance(path.stem, "", str(path), text=text, notes=notes)


def _ravdess(source: Path) -> Iterator[Utterance]:
    """``Actor_NN/01-01-EMOTION-...-ACTOR.mp4``: speech with pictures and sound; the two sentences are known."""
    sentences = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
    for path in media_files(source, PICTURES):
        if not re.fullmatch(r"\d\d(-\d\d){6}", path.stem):
            raise ConclugenError(f"{path}: no name like 01-01-06-01-02-01-12.mp4")
        if path.stem.startswith("01-01-"):
            yield Utterance(path.stem, "", str(path), text=sentences.get(path.stem[12:14]))


LAYOUTS: dict[str, Callable[[Path], Iterator[Utterance]]] = dict.fromkeys(("cmu_mosei", "cmu_mosi"), _mosei)
LAYOUTS |= {"voxceleb2": _voxceleb2, "caer": _caer, "meld": _meld, "ravdess": _ravdess}
"""Data set -> function that finds its clips."""
