"""The tree that the authors' code reads: ``processed/DATASET/features/...`` with annotations in YAML."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from conclugen_jax.data.cells import Table, short
from conclugen_jax.data.corpora import Corpus, dropped
from conclugen_jax.data.features import Combined, FolderFeatures
from conclugen_jax.data.files import entries, open_regular, stand_in
from conclugen_jax.data.labels import from_names
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES, Features
from conclugen_jax.errors import ConclugenError

MODALITIES = {"video": ("frames_2d", "frames_3d"), "audio": ("audio_spectrograms",), "text": ("texts",)}
"""modality -> kinds of folders whose vectors make it up."""

SENTIMENTS = {"": "", "-1": "negative", "0": "neutral", "1": "positive"}
"""Published number -> class."""

DEEPEST = 20
"""Levels of the annotations, at most; the published ones have five."""

FOLDER = re.compile(r"(?P<kind>frames_2d|frames_3d|audio_spectrograms|texts)(_\d+)?(_cropped)?(_\d+)?(_aug)?")


def open_authors(request: Request) -> Found:
    """Open ``request.source``, the folder that holds ``features/``.

    Training clips may be stored in several variants (``..._aug/aug1``, ``aug2``, ...). The other splits are in ``aug1`` only.
    """
    corpus, source = request.corpus, request.source
    if corpus is None:
        raise ConclugenError("format 'authors' needs --dataset=CORPUS; the files do not say which it is")
    folders = _folders(source / "features")
    features: dict[str, Features] = {}
    for modality, kinds in MODALITIES.items():
        present = [folders[kind] for kind in kinds if kind in folders]
        if present and len(present) < len(kinds):
            raise ConclugenError(f"{source}: {modality!r} needs {' and '.join(kinds)}, one is missing in features/")
        if present:
            stored = [_variants(folder) for folder in present]  # vectors of the same clip and variant are one vector
            if len(set(map(len, stored))) > 1:
                some = " and ".join(map(str, present))
                raise ConclugenError(f"{some} have different numbers of variants; complete them")
            features[modality] = Combined(list(zip(*stored, strict=True)))
    if not features:
        raise ConclugenError(f"{source}: no frames_2d..., audio_spectrograms... or texts... in features/")
    if corpus.named is not None:  # the names say as much as the annotations, at a hundredth of the time
        return Found(features, columns=from_names(request, features))
    cropped = any("_cropped" in folder.name for folder in folders.values())
    names = sorted(("annotations_cropped.yaml", "annotations.yaml"), key=lambda name: ("cropped" in name) != cropped)
    file = next((source / name for name in names if (source / name).is_file()), None)
    if file is None:
        raise ConclugenError(f"{source}: neither {names[0]} nor {names[1]}; put it beside features/")
    return Found(features, table=_read_annotations(file, corpus), label_files=[file])


def _folders(root: Path) -> dict[str, Path]:
    """Return kind -> its folder. Features beside augmented ones of their kind are raw material."""
    found: dict[str, list[Path]] = {}
    for path in (p for p in entries(root) if p.is_dir()):
        if match := FOLDER.fullmatch(path.name):
            found.setdefault(match["kind"], []).append(path)
    for kind, some in found.items():
        found[kind] = best = [path for path in some if path.name.endswith("_aug")] or some
        if len(best) > 1:
            some = ", ".join(p.name for p in best)
            raise ConclugenError(f"{root}: {some} are all {kind}; leave one, or name it with --modality NAME=PATH")
    return {kind: best for kind, (best,) in found.items()}


def _variants(folder: Path) -> list[FolderFeatures]:
    """Open the variants ``aug1``, ``aug2``, ... in a folder, or the folder itself where there are none."""
    paths = [p for p in entries(folder) if re.fullmatch(r"aug\d+", p.name)] or [folder]
    return [FolderFeatures(p, how="") for p in sorted(paths, key=lambda p: (len(p.name), p.name))]


def _read_annotations(path: Path, corpus: Corpus) -> Table:
    """Return utterances as a table of a corpus has them, a column for each emotion where there are several."""
    names = {"multi": corpus.label.names, "single": ("emotion",), "value": ()}[corpus.label.kind]
    rows: list[dict[str, str]] = []
    where: list[str] = []
    for name, utterances in _load_yaml(path).items():
        if name not in SPLIT_NAMES or not isinstance(utterances, Mapping):
            found = f"{name!r} with a {type(utterances).__name__}"
            raise ConclugenError(f"{path}: {found}, expected splits that map ids to fields")
        for key, fields in utterances.items():
            place = f"{path}: {name}/{key}"
            if not isinstance(fields, Mapping):
                raise ConclugenError(f"{place}: a {type(fields).__name__}, expected fields such as emotions")
            if key in dropped(corpus, SPLIT_NAMES[name]):
                continue
            emotions = fields.get("emotions", "")
            emotions = emotions if isinstance(emotions, list) else [emotions] * (corpus.label.kind == "single")
            if len(emotions) != len(names):
                raise ConclugenError(f"{place}: {len(emotions)} emotions, expected {len(names)}: {', '.join(names)}")
            group = fields.get("video") or fields.get("person_id") or ""
            row = {"id": key, "split": name, "group": group, "sentiment": fields.get("sentiment", "")}
            rows.append(row | dict(zip(names, emotions, strict=True)))
            where.append(place)
            for field, cell in rows[-1].items():
                if not isinstance(cell, str):
                    raise ConclugenError(f"{place}: {field} is {short(cell)}, expected text or a number")
    columns = {field: [row[field] for row in rows] for field in ("id", "split", "group", "sentiment", *names)}
    if "sentiment" in corpus.targets and corpus.targets["sentiment"].kind == "single":
        columns["sentiment"] = [SENTIMENTS.get(cell, f"{cell} (not -1, 0 or 1)") for cell in columns["sentiment"]]
    return Table(path, columns, where, keys=columns["id"])


def _load_yaml(path: Path) -> dict[str, Any]:
    """Read YAML whose scalars stay text, since YAML takes the id 100178_1 for a number. Nothing in the file is executed.

    The tree is built from the parser's events: PyYAML's constructor crashes on deeply nested lists, accepts a repeated
    key, and is seven times slower.
    """
    tree = None
    if found := stand_in(path):
        raise ConclugenError(f"{path}: {found}")
    try:
        with open_regular(path) as file:
            events = yaml.parse(file, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if tree is not None:
                        raise ValueError(f"a second document{event.start_mark}")
                    tree = _node(next(events), events, {}, DEEPEST)
    except (OSError, yaml.YAMLError, ValueError) as e:  # UnicodeDecodeError is a ValueError
        reason = " ".join(str(e).split())[:200]
        raise ConclugenError(f"{path}: cannot be read as YAML ({reason}); correct the file") from e
    if not isinstance(tree, dict):
        raise ConclugenError(f"{path}: a {type(tree).__name__}, expected splits that map ids to fields")
    return tree


def _node(event: Any, events: Iterator[Any], anchors: dict[str, Any], levels: int) -> Any:
    """Return the text, list or mapping that begins with an event; the parser guarantees that what begins also ends."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise ValueError(f"alias {event.anchor[:100]!r} of nothing{event.start_mark}")
        return anchors[event.anchor]
    if not levels:
        raise ValueError(f"more than {DEEPEST} levels{event.start_mark}")
    if isinstance(event, yaml.ScalarEvent):
        node = event.value
    elif isinstance(event, yaml.SequenceStartEvent):
        node = []
        while not isinstance(inner := next(events), yaml.SequenceEndEvent):
            node.append(_node(inner, events, anchors, levels - 1))
    else:
        node = {}
        while not isinstance(inner := next(events), yaml.MappingEndEvent):
            key = _node(inner, events, anchors, levels - 1)
            if not isinstance(key, str) or key in node:
                fault = f"{key[:100]!r} appears twice" if isinstance(key, str) else f"a {type(key).__name__} as key"
                raise ValueError(f"{fault}{inner.start_mark}")
            node[key] = _node(next(events), events, anchors, levels - 1)
    if event.anchor is not None:
        anchors[event.anchor] = node
    return node
