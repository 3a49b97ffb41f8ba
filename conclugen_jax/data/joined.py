"""Join a source from two halves: annotations say which examples there are, features are found by their keys."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import open_regular
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, DatasetSpec, Example, Features, take
from conclugen_jax.errors import ConclugenError

HASHED_BYTES = 2**24  # of a label file that are read at a time; it may be the file of all features


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some rows of a split, light enough to be sent to another process."""

    spec: DatasetSpec
    annotations: Annotations
    features: Mapping[str, Features]
    places: Mapping[str, Any]

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples; a modality without features is absent."""
        rows, targets = self.annotations, self.spec.targets
        for i, name in enumerate(rows.ids):
            vectors, replaced, left_out = {}, {}, {}
            for modality, places in self.places.items():
                features = self.features[modality]
                before, gone = getattr(features, "replaced", 0), Counter(getattr(features, "left_out", ()))
                x = None if places[i] is None else features.read(places[i])
                reasons = Counter(getattr(features, "left_out", ())) - gone
                left_out |= {f"{modality} {reason}": n for reason, n in reasons.items()}
                if x is not None:
                    vectors[modality] = x
                    replaced[modality] = getattr(features, "replaced", 0) - before
            label = None if rows.label is None else rows.label[i].tolist()
            known = {}
            for target, column in rows.targets.items():
                x = column[i].item()
                if x >= 0 or (targets[target].kind == "value" and not math.isnan(x)):
                    known[target] = x
            yield Example(name, vectors, label, rows.groups[i], known, replaced, left_out)


@dataclasses.dataclass
class JoinedSource:
    """A source of annotated features: a PartedSource, in the order of the annotations."""

    spec: DatasetSpec
    annotations: Mapping[str, Annotations]  # of each split of the spec
    features: Mapping[str, Features]  # of each modality of the spec
    label_files: Sequence[Path] = ()  # that the annotations were read from
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # where all this came from, for the manifest
    identity: str = ""  # the fingerprint; else it is made of the files
    beside: Sequence[Path] = ()  # files to be copied into the folder of the data set
    opened: str = ""  # fingerprint of the files when they were opened, if it was taken

    def num_examples(self, split: str) -> int:
        """Return the number of examples of a split."""
        return len(self.annotations[split].ids)

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split in order."""
        return iter(self.part(split, 0, self.num_examples(split)))

    def part(self, split: str, start: int, stop: int) -> Piece:
        """Return the examples ``start`` to ``stop`` of a split, which another process may read."""
        rows = take(self.annotations[split], np.arange(start, stop))
        places = {m: features.locate(split, rows.keys) for m, features in self.features.items()}
        return Piece(self.spec, dataclasses.replace(rows, keys=()), self.features, places)

    def provenance(self) -> Mapping[str, Any]:
        """Return where the examples come from, for the manifest."""
        return self.facts

    def folders(self) -> set[str]:
        """Return the folders of all files that are read."""
        files = itertools.chain(self.label_files, *(features.files() for features in self.features.values()))
        return {os.path.dirname(path) for path in files}

    def fingerprint(self) -> str:
        """Return the identity, or a hash of options, content of label files, and name, size and time of feature files."""
        if self.identity:
            return self.identity
        found, _ = self.stamp()
        if self.opened not in ("", found):
            raise ConclugenError(f"data set {self.spec.name!r}: the source changed while it was read; build again")
        return found

    def stamp(self) -> tuple[str, float]:
        """Return the fingerprint of the files now, and when one of them last changed, in seconds since 1970."""
        others = ("path", "modalities", "passed_over", "notes", "alike")  # files may be moved, beside what is not used
        facts = {key: value for key, value in self.facts.items() if key not in others}
        digest = hashlib.sha256(json.dumps([facts, repr(self.spec)], sort_keys=True).encode())
        changed = 0.0
        for path in self.label_files:
            with open_regular(path) as file:
                changed = max(changed, os.fstat(file.fileno()).st_ctime)
                while part := file.read(HASHED_BYTES):
                    digest.update(part)
        for modality, features in self.features.items():
            digest.update(f"\0{modality}\0".encode())
            for path in features.files():
                try:
                    found = os.stat(path)
                except OSError as e:
                    raise ConclugenError(f"{path}: disappeared during the build ({e.strerror}); build again") from e
                changed = max(changed, found.st_ctime)
                folder, name = os.path.basename(os.path.dirname(path)), os.path.basename(path)
                split = SPLIT_NAMES.get(folder.lower(), "")
                digest.update(os.fsencode(f"{split}/{name}\0{found.st_size}\0{found.st_mtime_ns}\0"))
        return digest.hexdigest(), changed
