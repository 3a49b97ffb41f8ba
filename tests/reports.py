"""What tests of the report share: a study made by hand, with pretraining runs, and a page taken apart."""

import base64
import html.parser
import json

import jax
import numpy as np

from conclugen_jax import pretrain
from conclugen_jax.data import manifest
from tests.helpers import tiny_config

NASTY = "</td><script>alert(1)</script> | & \"quoted\" 'x' `*_[a](http://b.c)_*` \u202e\x00\ud800 \\"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Tags, tables (rows of cells, the lines of a cell in a list) and text of each section; tags must be balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.tables, self.sections, self.figures, self._open, self._section = [], [], {}, {}, [], ""
        self.scripts = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append([""])
        if tag == "span":
            self.tables[-1][-1][-1].append("")
        if tag == "svg" and "aria-label" in attributes:
            self.figures[attributes["aria-label"]] = []

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
            return
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1][-1] += data
        if "svg" in self._open and self.figures:
            self.figures[list(self.figures)[-1]].append(data)

    def row(self, name):
        """The first row whose first cell is that."""
        return next(r for t in self.tables for r in t if r[0][0] == name)


def unpacked(text):
    """Numbers as maps of a page hold them."""
    return np.frombuffer(base64.b64decode(text), "<u2")


def score(mean, std=None, low=None, high=None):
    return {"mean": mean, "std": std, "interval": None if low is None else [low, high]}


def cell(dataset, method, protocol, labels, seed, matrix, **changes):
    scores = {"accuracy": 0.5, "f1": 0.5, "precision": 0.5, "recall": 0.5}
    return {
        "dataset": dataset,
        "method": method,
        "protocol": protocol,
        "labels_per_class": labels,
        "seed": seed,
        "draws": 1,
        "status": "done",
        "error": None,
        "path": f"{protocol}/{dataset}/{method}/seed_{seed}/labels_{labels}",
        "scores": scores,
        "validation": {},
        "confusion_matrix": matrix,
        **changes,
    }


def summary(dataset, method, protocol, labels, n, **scores):
    return {
        "dataset": dataset,
        "method": method,
        "protocol": protocol,
        "labels_per_class": labels,
        "n": n,
        "scores": scores,
    }


def results(data):
    """A study of five data sets by hand: real faces, MELD and MOSEI with published numbers, and numbers to predict."""
    meld = ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"]
    mosei = ["Happiness", "Sadness", "Anger", "Fear", "Disgust", NASTY]
    nowhere = {"path": "/nowhere", "version": "1.0.0", "sha256": "0" * 64, "num_examples": {"train": 10, "test": 1234}}
    faces = {**nowhere, "path": str(data), "sha256": manifest.read(data).fingerprint()}
    seven = np.diag(np.arange(1, 8)) + np.eye(7, k=1, dtype=int)
    pair = [[[90, 10], [25, 75]]] * 6
    square = [[5, 1, 0, 0], [0, 0, 0, 0], [0, 0, 6, 0], [0, 0, 2, 4]]
    efficiency = [(2, 0.50), (20, 0.75), (0, 0.90)]
    return {
        "name": "faces & friends",
        "versions": {"python": "3.11.9", "jax": "0.10.2"},
        "definition": {"seeds": [0, 1], "comment": NASTY},
        "datasets": {
            "faces": {**faces, "name": "faces", "kind": "single", "classes": ["calm", "happy", "sad", "angry"]},
            "meld": {**nowhere, "name": "meld", "kind": "single", "classes": meld},
            "mosei": {**nowhere, "name": "cmu_mosei", "kind": "multi", "classes": mosei},
            "sentiment": {**nowhere, "name": "cmu_mosei", "kind": "value", "classes": []},
        },
        "methods": {
            "conclugen": {"title": "ConCluGen", "pretraining": "conclugen"},
            "generative": {"title": "Generative", "pretraining": "generative"},
            "vision": {"title": "ConCluGen/(vision)", "pretraining": "conclugen"},
            "raw_features": {"title": "raw features", "pretraining": None},
            "supervised": {"title": "supervised baseline", "pretraining": None},
        },
        "cells": [
            *(cell("faces", m, "linear_evaluation", k, 0, square) for m in ("conclugen", "generative") for k, _ in efficiency),
            cell("meld", "conclugen", "linear_evaluation", 0, 0, seven.tolist()),
            cell("meld", "conclugen", "linear_evaluation", 0, 1, seven.tolist()),
            cell("mosei", "conclugen", "linear_evaluation", 0, 0, pair),
            cell("sentiment", "conclugen", "linear_evaluation", 0, 0, None),
            cell("meld", "generative", "fine_tuning", 0, 0, None, status="failed", error=f"step 3: {NASTY}", scores=None),
            cell("meld", "generative", "fine_tuning", 0, 1, None, status="missing", scores=None),
        ],
        "summary": [
            *(
                summary("faces", "conclugen", "linear_evaluation", k, 2, accuracy=score(x, 0.01, x - 0.09, x + 0.09))
                for k, x in efficiency
            ),
            *(summary("faces", "generative", "linear_evaluation", k, 1, accuracy=score(x - 0.1)) for k, x in efficiency),
            summary("faces", "conclugen", "fine_tuning", 2, 2, accuracy=score(0.6, 0.01, 0.51, 0.69)),
            summary("meld", "supervised", "supervised", 0, 1, accuracy=score(0.55), f1=score(0.5)),
            summary("meld", "vision", "linear_evaluation", 0, 1, accuracy=score(0.3)),
            summary(
                "meld", "conclugen", "linear_evaluation", 0, 3,
                accuracy=score(0.5712, 0.0034, 0.5628, 0.5796), f1=score(0.531), precision=score(float("nan")),
            ),
            summary("meld", "conclugen", "fine_tuning", 0, 3, accuracy=score(0.6)),
            summary("mosei", "conclugen", "linear_evaluation", 0, 1, accuracy=score(0.61), recall=score(0.7)),
            summary(
                "sentiment", "conclugen", "linear_evaluation", 0, 1,
                accuracy_2=score(0.8), mae=score(0.654321), correlation=score(0.7),
            ),
        ],
        "comparisons": [
            comparison("generative", 0.0312, [0.01, 0.0524]),
            comparison("raw_features", -0.0204, [-0.0491, 0.0083]),
            comparison("supervised", 0.01, None, n=1),
            comparison("vision", -0.03, [-0.05, -0.01], n=2),
        ],
    }  # fmt: skip


def comparison(baseline, difference, interval, n=3):
    place = {"dataset": "faces", "protocol": "linear_evaluation", "labels_per_class": 2, "measure": "accuracy"}
    return {
        **place,
        "method": "conclugen",
        "baseline": baseline,
        "difference": difference,
        "interval": interval,
        "n": n,
    }


def make_study(folder, data):
    """A study's folder with two pretraining runs; only the first one clusters."""
    for name, changes in {
        "conclugen": {"clustering__start_epoch": 1},
        "generative": {"loss__contrastive_weight": 0.0, "loss__clustering_weight": 0.0},
    }.items():
        config = tiny_config(data, train__num_epochs=3, data__standardize="split", **changes)
        pretrain.pretrain(config, folder / "pretraining" / name / "seed_0", devices=jax.devices()[:1])
    probes = [
        {
            "step": 4 * k,
            "epoch": k,
            "knn/accuracy": 0.5 + k / 10,
            "clustering/nmi": k / 10,
            "cluster_sizes": [40 - k, 20 + k, 4],
        }
        for k in range(3)
    ]
    text = "".join(json.dumps({**p, "protocol": "k = 5, cosine"}) + "\n" for p in probes)
    (folder / "pretraining/conclugen/seed_0/probes.jsonl").write_text(text + '{"step": 12, "kn')
    (folder / "results.json").write_text(json.dumps(results(data)))
    return folder
