"""Settings that are chosen from data of any shape are never refused afterwards, and each has its reason."""

import numpy as np
import pytest

from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import plan, rules
from conclugen_jax.pipeline.rules import Facts
from conclugen_jax.runs import config as config_lib, configuration_files
from conclugen_jax.study import definition
from tests.helpers import Faces


def facts(rows, modalities=("video", "audio", "text"), missing=0.0, **more):
    present = {m: rows - int(missing * rows) * (i > 0) for i, m in enumerate(modalities)}
    classes = more.pop("classes", 4)
    counts = {f"class {i}": rows // classes for i in range(classes)} if classes else {}
    kind = more.pop("kind", "single" if classes else "none")
    return Facts(rows, present, dict.fromkeys(modalities, 30), kind=kind, counts=counts, **more)


def persons(rows, number, explained=0.0):
    return {"with_person": rows, "persons": number, "clips": rows / number, "explained": explained}


SHAPES = {
    "four rows": facts(4),
    "six rows": facts(6),
    "ten rows": facts(10),
    "30 clips": facts(30, **persons(30, 5)),
    "two modalities": facts(300, ("video", "audio")),
    "one modality": facts(300, ("video",)),
    "100,000 rows": facts(100_000, **persons(100_000, 500)),
    "a million rows": facts(1_000_000),
    "one class": facts(120, classes=1),
    "no labels": facts(400, classes=0),
    "no groups": facts(200),
    "one person": facts(200, **persons(200, 1)),
    "half of a modality missing": facts(240, missing=0.5, **persons(240, 8)),
    "a modality of two rows": facts(240, missing=0.99),
    "60 classes": facts(600, classes=60),
    "numbers": facts(200, kind="value", classes=0),
    "persons that are the answer": facts(200, **persons(200, 20, explained=0.6)),
    "a clip a person": facts(200, **persons(200, 200)),
    "one label of several kinds": Facts(90, {"video": 90}, {"video": 30}, kind="multi", counts={"smiles": 40}),
    "splits of other names": facts(90)._replace(splits=("train", "extra")),
}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_settings_are_never_refused(shape, quick, slow, devices):
    known = SHAPES[shape]
    if known.rows < 2 * devices:
        return
    kept, _ = rules.modalities(known)
    known = known._replace(present={m: known.present[m] for m in kept}, dims=dict.fromkeys(kept, 30))
    settings = rules.settings(known, quick=quick, num_devices=devices, slow=slow)
    assert all(one.reason for one in settings)
    assert len({one.key for one in settings}) == len(settings)
    config = plan.configured(settings, {"data.path": "data"}, [], plan.START)
    config_lib.check(config)
    config_lib.check_objective(config)
    config_lib.check_batches(config, num_examples=known.rows, num_devices=devices)
    config_lib.check_clustering(config, num_examples=known.rows, num_devices=devices)
    an_epoch = known.rows // config.train.batch_size
    steps = config.train.num_epochs * an_epoch
    assert steps <= max(rules.QUICK_MOST if quick else rules.MOST_STEPS, 2 * an_epoch)
    assert steps >= (rules.QUICK_STEPS if quick else rules.STEPS)
    if rules.is_labelled(known):
        scheme = rules.scheme(known, quick=quick)
        assert scheme.labels
        config.data.path = plan.fold_name("mine", scheme) if scheme.num_folds else "data"
        definition.check(plan.study(config, scheme, known, "mine"))


def chosen(known, **how):
    return {one.key: one.value for one in rules.settings(known, **how)}


def test_settings_follow_from_what_the_data_are():
    assert chosen(SHAPES["30 clips"])["train.batch_size"] == 10
    assert chosen(facts(960))["train.batch_size"] == 320  # as the method was judged on RAVDESS
    assert chosen(facts(960))["train.num_epochs"] == 80
    assert chosen(SHAPES["two modalities"], num_devices=8)["train.batch_size"] == 96
    many = SHAPES["100,000 rows"]
    assert chosen(many)["train.batch_size"] == 512
    assert (chosen(many)["loss.neighbours"], chosen(many, slow=False)["loss.neighbours"]) == (0, 5)
    assert chosen(many)["augmentation.feature_dropout"] == 0.3
    assert chosen(many)["train.num_epochs"] == 20
    assert chosen(SHAPES["60 classes"])["clustering.num_clusters"] == 60
    alone = chosen(SHAPES["one modality"])
    assert (alone["loss.contrastive_weight"], alone["loss.instance_weight"]) == (0, 1)
    by = "data.standardize"
    assert chosen(SHAPES["no groups"])[by] == chosen(SHAPES["persons that are the answer"])[by] == "split"
    assert chosen(SHAPES["a clip a person"])[by] == "split"
    assert chosen(SHAPES["half of a modality missing"])[by] == "person"


def test_rows_are_scored_as_the_data_allow():
    by_person = rules.scheme(SHAPES["30 clips"])
    assert (by_person.num_folds, by_person.fold_by, by_person.seeds) == (5, "group", (0, 1, 2, 3, 4))
    assert by_person.labels == (2, 0)  # 7 of each class
    assert rules.scheme(SHAPES["no groups"]).fold_by == "example"
    some = SHAPES["30 clips"]._replace(with_person=29)
    assert "1 of 30 rows have no person" in rules.scheme(some).reason
    split = rules.scheme(facts(300)._replace(splits=("train", "test")))
    assert (split.num_folds, split.seeds, split.labels) == (0, (0, 1, 2), (2, 5, 20, 0))
    assert split.reason == "trained on 'train' and scored on 'test', as the data are split; seeds: 3"
    quick = rules.scheme(facts(300), quick=True)
    assert (quick.seeds, quick.labels) == ((0,), (2, 0))
    assert rules.scheme(SHAPES["100,000 rows"]).num_folds == 3
    assert not rules.is_labelled(SHAPES["one class"])
    assert rules.is_labelled(SHAPES["numbers"])
    several = SHAPES["one label of several kinds"]
    assert rules.is_labelled(several)
    assert not rules.is_labelled(several._replace(counts={"smiles": 90}))


@pytest.mark.parametrize(
    ("splits", "scored", "chosen_by"),
    [
        (("train", "validation", "test"), "test", "validation"),
        (("train", "test"), "test", "train"),
        (("train", "validation"), "validation", "train"),
        (("train", "extra", "validation"), "validation", "train"),
        (("train", "extra"), "extra", "train"),
        (("validation", "test"), "test", "validation"),
        (("test", "extra"), "extra", "test"),
        (("test",), "test", "train"),  # whose folds have these splits
    ],
)
def test_rows_that_are_scored_are_not_those_of_training_nor_of_a_choice(splits, scored, chosen_by):
    known = facts(300)._replace(splits=splits)
    scheme = rules.scheme(known)
    assert bool(scheme.num_folds) == (len(splits) == 1)
    trained = splits[0] if len(splits) > 1 else "train"
    assert rules.training_split(splits) == splits[0]
    data = {"data.path": "data{fold}{shuffle}", "data.train_split": trained}
    config = plan.configured(rules.settings(known), data, [], plan.START)
    protocols = plan.study(config, scheme, known, "mine").datasets.mine.protocols
    for name, by in (("linear_evaluation", chosen_by), ("probe", trained)):
        about = protocols[name].data
        assert (about.train_split, about.validation_split, about.test_split) == (trained, by, scored), name


def test_reasons_have_the_numbers_of_the_training_rows():
    def reason(key, known):
        (one,) = (one for one in rules.settings(known) if one.key == key)
        return one.reason

    by = "data.standardize"
    assert reason(by, SHAPES["one person"]) == "there is one person"
    assert reason(by, SHAPES["no groups"]) == "0 of 200 rows say which person they are of"
    assert reason(by, SHAPES["a clip a person"]) == "200 persons with 1 clips each (median), which are too few"
    assert "explain 60% of the label" in reason(by, SHAPES["persons that are the answer"])
    assert reason("train.batch_size", facts(300)) == "a third of the 300 training rows, at least 2, at most 512"


def test_rare_modalities_are_left_out():
    assert rules.modalities(SHAPES["a modality of two rows"]) == (
        ["video"],
        ["audio is dropped: 3 of 240 rows have it", "text is dropped: 3 of 240 rows have it"],
    )
    assert rules.modalities(SHAPES["half of a modality missing"]) == (["video", "audio", "text"], [])


def test_too_few_rows_are_refused():
    with pytest.raises(ConclugenError, match=r"^3 training rows, which are too few to learn from; pretraining needs 4"):
        rules.settings(facts(3))


def test_facts_are_those_of_the_training_rows(tmp_path):
    dataset = shards.open_dataset(builders.build(Faces(), tmp_path))
    known, manifest = rules.facts(dataset), dataset.manifest
    stream = shards.ShardStream(dataset, "train", list(manifest.modalities))
    groups = stream.names(np.arange(stream.num_examples))[1]
    assert known.rows == stream.num_examples == manifest.splits["train"]["num_examples"]
    assert known.persons == len(set(groups) - {""})
    assert sum(known.counts.values()) == known.rows
    assert known.present == manifest.splits["train"]["present"]
    assert known.splits[0] == "train"


def test_fewer_epochs_of_a_user_begin_clustering_earlier():
    settings = rules.settings(facts(300))
    made = plan.configured(settings, {"data.path": "d"}, [("train.num_epochs", "2")], plan.START)
    assert made.clustering.start_epoch == 0
    config_lib.check_clustering(made, num_examples=300)


def test_the_saved_configuration_is_the_one_that_was_chosen(tmp_path):
    settings = rules.settings(facts(300))
    made = plan.configured(settings, {"data.path": "d"}, [("train.num_epochs", "7"), ("seed", "3")], plan.START)
    path = tmp_path / "config.py"
    path.write_text(plan.written(settings, made, "mine"))
    again = configuration_files.load(str(path), of_run=True)
    assert again.to_dict() == made.to_dict()
    assert (again.train.num_epochs, again.seed) == (7, 3)
    text = path.read_text()
    assert "# a third of the 300 training rows" in text
    assert "80 epochs" not in text


def test_the_file_of_the_configuration_says_where_it_comes_from():
    known = facts(30)
    settings, data = rules.settings(known), {"data.path": "data"}
    chosen_ones = plan.written(settings, plan.configured(settings, data, [], plan.START), "mine")
    assert chosen_ones.startswith(
        '"""Settings of mine, chosen from its data; they start from those of conclu_neighbours."""'
    )
    given = plan.written([], plan.configured([], data, [], "conclugen"), "mine")
    assert given.startswith(
        '"""Settings of mine, as they were given; what follows differs from those of conclu_neighbours."""'
    )
    assert "neighbours = 0" in given


def test_limits_of_rules():
    def scheme(number):
        found = rules.scheme(facts(60, **persons(60, number)))
        return found.num_folds, found.fold_by

    assert [scheme(n) for n in (2, 3, 4, 9)] == [(5, "example"), (3, "group"), (4, "group"), (5, "group")]
    assert chosen(facts(30))["clustering.num_clusters"] == 7  # a quarter of three batches of ten
    assert chosen(SHAPES["one person"])["loss.neighbours_of_others"] is False
    assert "loss.neighbours_of_others" not in chosen(SHAPES["no groups"])
    unlabelled = {n: facts(10 * n, classes=0, **persons(10 * n, 10))._replace(explained=None) for n in (9, 10)}
    assert [chosen(x)["data.standardize"] for x in unlabelled.values()] == ["split", "person"]
    assert [chosen(facts(n))["evaluation.smoothing_neighbours"] for n in (90, 900)] == [9, 20]
    assert rules.modalities(facts(240)._replace(present={"a": 240, "b": 12, "c": 11}))[0] == ["a", "b"]
    assert chosen(facts(960))["schedule.warmup_epochs"] == 7  # a twelfth of 80
    assert rules.scheme(facts(4_000_000)).labels == (2, 5, 20)  # all of them take too long
    assert rules.scheme(facts(4_000_000, classes=0, kind="value")).labels == (0,)


@pytest.mark.parametrize("quick", [False, True])
def test_the_study_and_the_classifier_for_use(quick):
    known = facts(300, **persons(300, 6))
    changes = [("model.representation_dim", "24")]
    config = plan.configured(rules.settings(known), {"data.path": "d"}, changes, plan.START)
    folds = rules.scheme(known, quick=quick)
    study = plan.study(config, folds, known, "mine", quick=quick)
    assert ("principal_components" in study.baselines) != quick
    assert "principal_components" not in plan.study(config, folds, known._replace(rows=30_001), "mine").baselines
    assert study.label_draws == (3 if quick else 5)
    assert tuple(study.labels.probe) == folds.labels
    assert study.num_folds == 5
    whole, one = plan.model(config, folds, known)
    assert (whole.path, one.config.downstream.checkpoint, one.config.data.test_split) == (plan.WHOLE, plan.WHOLE, "")
    assert one.config.model.representation_dim == 24
    (one,) = plan.model(config, rules.Scheme(0, "group", (0, 1), (0,), ""), known._replace(splits=("train", "test")))
    assert (one.config.downstream.checkpoint, one.config.data.test_split) == ("pretraining/pretrained/seed_0", "test")
    assert [run.path for run in plan.model(config, None, known)] == [plan.WHOLE]
    many = plan.classifier(config, folds, known._replace(rows=128_000))
    assert many.train.num_epochs == 20  # of a thousand steps each


def test_a_first_look_at_many_rows_trains_its_classifiers_briefly():
    known = facts(100_000)
    config, scheme = plan.configured(rules.settings(known), {}, [], plan.START), rules.scheme(known)
    found = {}
    for quick in (False, True):
        (*_, last) = plan.model(config, scheme, known, quick=quick)
        scored = plan.study(config, scheme, known, "mine", quick=quick).datasets.mine.protocols.linear_evaluation
        assert last.config.train == scored.train
        found[quick] = last.config.train.num_epochs * (known.rows // last.config.train.batch_size)
    assert (found[True], found[False]) == (5 * 781, 25 * 781)
