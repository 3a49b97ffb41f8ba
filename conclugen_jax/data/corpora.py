"""Facts of each published corpus: classes in the order of its data, groups, splits, what to drop."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from conclugen_jax.data.sources import LabelSpec


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A published corpus."""

    description: str  # one sentence
    licence: str  # of the data
    label: LabelSpec  # names are in the order of their index in the published files
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """"label" or a target -> least and greatest number in published files, before a label is made 0 or 1."""
    label_names: Mapping[str, int] = dataclasses.field(default_factory=dict)  # other names of classes -> index
    splits: tuple[str, ...] = ("train", "validation", "test")  # that it comes with; empty if it has none
    named: Callable[[str], tuple[int | None, str] | None] | None = None
    """Returns label (or None) and group by an utterance's name, None for a name of another form than ``example``."""
    example: str = ""
    names_repeat: bool = False  # the same names stand for other utterances in other splits: ids get the split in front
    shared_groups: bool = False  # groups are in several splits by design
    drop: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)  # split -> names of broken utterances
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Split (or "all") -> number of examples: of the authors' copy (faces cropped), or of the standard folds."""


CAER_CLASSES = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")


def _voxceleb2(name: str) -> tuple[None, str] | None:
    match = re.fullmatch(r"(id\d+)_.+_\d+", name)
    return match and (None, match[1])


def _caer(name: str) -> tuple[int, str] | None:
    match = re.fullmatch(r"(Anger|Angry|Disgust|Fear|Happy|Neutral|Sad|Surprise)_.*", name)
    return match and (CAER_CLASSES.index(match[1].lower().replace("angry", "anger")), "")


def _ravdess(name: str) -> tuple[int, str] | None:
    match = re.fullmatch(r"\d\d-\d\d-0([1-8])(?:-\d\d){3}-(\d\d)", name)
    return match and (int(match[1]) - 1, f"actor{match[2]}")


CORPORA: dict[str, Corpus] = {
    "voxceleb2": Corpus(
        description="VoxCeleb2: utterances of celebrities in interviews, for pretraining; no labels.",
        licence="CC BY 4.0 (metadata); the videos belong to their owners; Chung, Nagrani and Zisserman, Interspeech 2018",
        label=LabelSpec("none"),
        splits=("train",),
        named=_voxceleb2,
        example="id00012_21Uxsk56VDQ_00001",
        expected={"train": 534_616},
    ),
    "caer": Corpus(
        description="CAER: clips of TV shows with the emotion of the person shown.",
        licence="for research, on request; Lee et al., ICCV 2019",
        label=LabelSpec("single", CAER_CLASSES),
        label_names={"angry": 0},
        named=_caer,
        example="Anger_0001",
        expected={"all": 13_175},
    ),
    "meld": Corpus(
        description="MELD: utterances of the TV series Friends with emotion and sentiment.",
        licence="GPL-3.0; Poria et al., ACL 2019",
        label=LabelSpec("single", ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")),
        targets={"sentiment": LabelSpec("single", ("negative", "neutral", "positive"))},
        names_repeat=True,
        shared_groups=True,  # the same actors throughout
        drop={"train": frozenset({"dia110_utt7", "dia125_utt3"}), "validation": frozenset({"dia110_utt7"})},
        expected={"all": 13_302},
    ),
    "cmu_mosei": Corpus(
        description="CMU-MOSEI: opinion videos, cut into segments, with six emotions and sentiment.",
        licence="for research; Bagher Zadeh et al., ACL 2018; the videos belong to their owners",
        # in the order of the published label files; the authors' configuration swaps Fear and Surprise
        label=LabelSpec("multi", ("happiness", "sadness", "anger", "surprise", "disgust", "fear")),
        targets={"sentiment": LabelSpec("value")},
        ranges={"label": (0, 3), "sentiment": (-3, 3)},
        drop={"": frozenset({"9cxlcpbmrH0_6", "2cwNG0YuwtQ_6"})},
        expected={"all": 22_853},
    ),
    "cmu_mosi": Corpus(
        description="CMU-MOSI: opinion videos, cut into segments, with sentiment from -3 to 3.",
        licence="for research; Zadeh et al., IEEE Intelligent Systems 2016; the videos belong to their owners",
        label=LabelSpec("value"),
        ranges={"label": (-3, 3)},
        expected={"all": 2_199},
    ),
    "ravdess": Corpus(
        description="RAVDESS: 24 actors speak two sentences with eight emotions.",
        licence="CC BY-NC-SA 4.0; Livingstone and Russo, PLoS ONE 2018",
        label=LabelSpec("single", ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")),
        splits=(),
        named=_ravdess,
        example="01-01-06-01-02-01-12",
        expected={"all": 1_440},
    ),
}


def expected_counts(corpus: Corpus | None, counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return split (or "all") -> number ``expected`` and ``found``, from the number of examples of each split."""
    if corpus is None:
        return {}
    return {
        split: {"expected": n, "found": sum(m for name, m in counts.items() if split in ("all", name))}
        for split, n in corpus.expected.items()
    }


def dropped(corpus: Corpus, split: str) -> frozenset[str]:
    """Return the names of a split's utterances to drop."""
    return corpus.drop.get(split, frozenset()) | corpus.drop.get("", frozenset())
