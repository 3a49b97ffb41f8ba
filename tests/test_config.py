"""Configurations: every file loads, every key is used and documented, impossible values are refused with the reason."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import model
from conclugen_jax.runs import config as config_lib, workdir
from conclugen_jax.train import optimizer
from configs import base
from tests.helpers import tiny_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__" and not p.stem.startswith("study")
)


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_is_locked_and_possible(name):
    config = load(name)
    assert config.is_locked
    config.data.path = "somewhere"
    config_lib.check(config)
    config_lib.check_objective(config)
    assert {k for k, _ in config_lib.flatten(config.to_dict())} == {
        k for k, _ in config_lib.flatten(base.get_config().to_dict())
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_opens_with_its_command(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert name == "base" or re.search(r"^Command:", doc, re.MULTILINE), doc


def test_paper_scale_values():
    config = load("conclugen")
    expected = {
        "model.representation_dim": 4096,
        "model.projection_dim": 512,
        "model.reconstruction_dim": 1024,
        "clustering.num_clusters": 8,
        "clustering.start_epoch": 12,
        "clustering.queue_batches": 4,
        "clustering.max_iterations": 100,
        "clustering.tolerance": 1e-4,
        "loss.contrastive_margin": 1e-3,
        "loss.clustering_margin": 1e-3,
        "loss.reduction": "sum",
        "loss.margin_in_denominator": False,
        "model.projection_sharing": "shared",
        "model.projection_relu": True,
        "model.decoder_relu": False,
        "optimizer.learning_rate": 9e-5,
        "optimizer.weight_decay": 3.2e-4,
        "schedule.warmup_epochs": 5,
        "schedule.period_epochs": 20,
        "schedule.period_multiplier": 2,
        "schedule.minimum": 1e-6,
        "train.batch_size": 4096,
    }
    flat = dict(config_lib.flatten(config.to_dict()))
    assert {k: flat[k] for k in expected} == expected


def used_keys(source):
    """Keys that a file reads, as ``SECTION.KEY``: by chains ``config.SECTION.KEY`` and by names for ``config.SECTION``."""
    tree, sections = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            names, values = node.targets[0], node.value
            names = names.elts if isinstance(names, ast.Tuple) else [names]
            values = values.elts if isinstance(values, ast.Tuple) else [values]
            for name, value in zip(names, values, strict=False):
                if isinstance(value, ast.Attribute) and ast.unparse(value.value).endswith("config"):
                    sections.setdefault(ast.unparse(name), {ast.unparse(name)}).add(value.attr)
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            *_, owner, key = ast.unparse(node).split(".")
            used |= {f"{section}.{key}" for section in sections.get(owner, {owner})}
    return used


def test_every_key_is_read_by_code():
    files = [path for path in (ROOT / "conclugen_jax").rglob("*.py") if path.name != "config.py"]
    sources = [path.read_text() for path in files]
    used = set().union(*map(used_keys, sources))
    used |= {f"model.{name}" for name in model.SETTINGS}  # read by name: config.model[name]
    used |= {f"schedule.{name}" for name in inspect.signature(optimizer.learning_rate_schedule).parameters}
    # The names that a comprehension or loop reads: {name: config.SECTION[name] for name in ("NAME", ...)}.
    loops = re.findall(r"config\.(\w+)\[name\] for name in \(([^)]*)\)", "".join(sources))
    used |= {f"{section}.{name}" for section, names in loops for name in re.findall(r'"(\w+)"', names)}
    keys = dict(config_lib.flatten(base.get_config().to_dict()))
    whole = {f"{section}." for section in re.findall(r"in config\.(\w+)\.items\(\)", "".join(sources))}
    for key in keys:
        if key.endswith("_split") or key.startswith(tuple(whole)):
            continue  # getattr(config.data, f"{name}_split"), see the test below; or all keys of a section
        assert (key if "." in key else f"config.{key}") in used, f"config.{key} is read by no code"


def test_split_keys_are_read():
    text = (ROOT / "conclugen_jax" / "evaluate" / "splits.py").read_text()
    assert 'getattr(config.data, f"{name}_split")' in text
    assert {"train_split", "validation_split", "test_split"} <= set(base.get_config().data)


def test_every_key_has_its_meaning_beside_it():
    for line in (ROOT / "configs" / "base.py").read_text().splitlines():
        if re.match(r"\s+\w+(\.\w+)+ = (?!\w+\(\)$)", line):
            assert re.search(r"#\s\S.{5,}", line), line


IMPOSSIBLE = [
    ("precision", "float16", "'float32', 'tensorfloat32', 'bfloat16'"),
    ("loss.contrastive_weight", -1.0, "at least 0"),
    ("loss.clustering_weight", float("nan"), "at least 0"),
    ("optimizer.learning_rate", float("inf"), "between 0"),
    ("train.batch_size", 0, "between 2"),
    ("train.num_epochs", 0, "between 1"),
    ("clustering.num_clusters", 1, "between 2"),
    ("clustering.initialisation", "lucky", "'random', 'kmeans++', 'warm'"),
    ("downstream.dropout_rate", 1.0, "between 0 and 0.999"),
    ("model.representation_dim", 100, "multiple of 8"),
    ("data.modalities", ("video", "video"), "each once"),
    ("data.modalities", ("video,text",), "modalities=video,text"),
    ("train.num_epochs", 10**23, "between 1"),
    ("model.representation_dim", 8 * 10**12, "between 8"),
    ("data.path", "", "conclugen build makes one"),
    ("schedule.period_multiplier", 0, "between 1"),
    ("seed", -1, "between 0"),
    ("optimizer.learning_rate", None, "is None, expected float (such as 9e-05)"),
    ("train.batch_size", True, "is True, expected int (such as 4096)"),
    ("data.modalities", ("a", 3), "is ('a', 3), expected tuple of str (such as ())"),
]


@pytest.mark.parametrize(("key", "value", "message"), IMPOSSIBLE, ids=[f"{k}={v}" for k, v, _ in IMPOSSIBLE])
def test_impossible_values_are_refused_by_key(key, value, message):
    config = tiny_config("somewhere")
    config_lib.check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConclugenError, match=re.escape(message)) as e:
        config_lib.check(config)
    assert f"config.{key}" in str(e.value)


def test_every_choice_and_range_is_of_a_key():
    flat = dict(config_lib.flatten(base.get_config().to_dict()))
    numbers = {k for k, v in flat.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    assert set(config_lib.CHOICES) <= set(flat)
    unbounded = {key for key in numbers if re.search(r"_weight$|weight_decay$|_gib$|_mib$", key)}
    unbounded |= {"clustering.tolerance", "schedule.minimum", "train.max_loss_ratio"}
    assert set(config_lib.RANGES) | unbounded == numbers
    assert not set(config_lib.RANGES) & unbounded
    assert all(flat[k] in choices for k, choices in config_lib.CHOICES.items())


def test_objectives_that_train_nothing_are_refused():
    config = tiny_config(loss__contrastive_weight=0.0, loss__clustering_weight=0.0, loss__reconstruction_weight=0.0)
    with pytest.raises(ConclugenError, match="nothing to train"):
        config_lib.check_objective(config)
    config = tiny_config(data__modalities=("video",))
    with pytest.raises(ConclugenError, match="two modalities"):
        config_lib.check_objective(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"soft_targets": 0.2, "target_neighbours": 3},
            r"loss\.soft_targets is 0\.2, .*target_neighbours is 3: .*to 0",
        ),
        ({"fusion_weight": 1.0}, r"loss\.fusion_weight is 1\.0: .*set config\.augmentation\.feature_dropout or"),
        ({"fusion_weight": 1.0, "instance_weight": 2.0}, r"fusion_weight is 1\.0, .*instance_weight is 2\.0: .*to 0"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(changes, message):
    dropout = 0.1 * ("instance_weight" in changes)
    config = tiny_config(augmentation__feature_dropout=dropout, **{f"loss__{k}": v for k, v in changes.items()})
    with pytest.raises(ConclugenError, match=message):
        config_lib.check_objective(config)


def test_no_modalities_are_all_of_the_data_set():
    config = tiny_config(data__modalities=())
    config_lib.check_objective(config)  # which only the data set can contradict
    assert config_lib.with_modalities(config, {"a": 3, "b": 4}).data.modalities == ("a", "b")
    assert config.data.modalities == ()
    config.data.modalities = ("b",)
    assert config_lib.with_modalities(config, {"a": 3, "b": 4}).data.modalities == ("b",)


def test_batches_that_cannot_be_shared_or_filled_are_refused():
    config = tiny_config(train__batch_size=18)
    with pytest.raises(ConclugenError, match="8 devices cannot share equally; set it to 16 or 24"):
        config_lib.check_batches(config, num_examples=100, num_devices=8)
    with pytest.raises(
        ConclugenError, match="only 17 usable examples in that split; set the batch to at most 8, so that"
    ):
        config_lib.check_batches(config, num_examples=17, num_devices=2)
    config.loss.clustering_weight = 0.0
    with pytest.raises(ConclugenError, match=r"only 17 usable examples in that split; set the batch to at most 16$"):
        config_lib.check_batches(config, num_examples=17, num_devices=2)
    config_lib.check_batches(config, num_examples=18, num_devices=2)
    with pytest.raises(ConclugenError, match="3 usable examples cannot be shared by 4 devices; use fewer devices"):
        config_lib.check_batches(config, num_examples=3, num_devices=4)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("num_examples", [8, 12, 13, 17, 40])
@pytest.mark.parametrize("queue_batches", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [2, 7, 16, 100])
def test_the_batch_that_is_named_works_at_once(num_devices, num_examples, queue_batches, batch_size):
    """Also with the queue of clustering, which takes several steps an epoch."""

    def fault(config):
        counts = {"num_examples": num_examples, "num_devices": num_devices}
        try:
            config_lib.check_batches(config, **counts)
            config_lib.check_clustering(config, **counts)
        except ConclugenError as e:
            return str(e)

    sizes = {"clustering__queue_batches": queue_batches, "clustering__num_clusters": 4, "train__batch_size": batch_size}
    config = tiny_config(**sizes)
    message = fault(config) or ""
    if "set the batch to at most" in message or "config.train.batch_size to" in message:
        config.train.batch_size = int(re.search(r"(?:at most|batch_size to) (\d+)", message)[1])
        if "queue_reset to 'never'" in message:
            config.clustering.queue_reset = "never"
        assert fault(config) is None
    elif "cannot share equally" in message:
        for size in re.search("set it to (.*)", message)[1].split(" or "):
            config.train.batch_size = int(size)
            assert "cannot share" not in (fault(config) or "")
            assert "usable examples" not in (fault(config) or "")


def test_a_batch_that_is_too_large_names_what_the_queue_allows():
    config = tiny_config(train__batch_size=16, clustering__queue_batches=2)
    with pytest.raises(
        ConclugenError, match=r"only 12 usable .*; set the batch to at most 4, so that an epoch has 3 steps"
    ):
        config_lib.check_batches(config, num_examples=12, num_devices=1)


def test_clustering_that_can_never_count_is_refused():
    config = tiny_config(clustering__queue_batches=4)
    # 79 examples are 4 steps of 16, or 5 of 15.
    with pytest.raises(ConclugenError, match=r"4 steps, so .*batch_size to 15 or less, the queue lower or .*='never'"):
        config_lib.check_clustering(config, num_examples=79)
    config_lib.check_clustering(config, num_examples=80)
    config.clustering.num_clusters = 100
    # No batch that fits would give enough points: it is not proposed.
    with pytest.raises(ConclugenError, match=r"never count; set the queue lower or"):
        config_lib.check_clustering(config, num_examples=79)
    with pytest.raises(ConclugenError, match="80 points"):
        config_lib.check_clustering(config, num_examples=80)
    config.loss.clustering_weight = 0.0
    config_lib.check_clustering(config, num_examples=16)
    config = tiny_config(clustering__start_epoch=4)
    with pytest.raises(ConclugenError, match=r"start_epoch is 4, config\.train\.num_epochs is 4"):
        config_lib.check_clustering(config, num_examples=80)
    config = tiny_config(loss__contrastive_weight=0.0, loss__reconstruction_weight=0.0)
    with pytest.raises(ConclugenError, match="the only loss"):
        config_lib.check_clustering(config, num_examples=80)


def test_json_round_trip_keeps_types_and_is_data_only(tmp_path):
    config = tiny_config("path", data__modalities=("a", "b"))
    text = config_lib.to_json(config)
    again = config_lib.from_tree(json.loads(text), "config.json")
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.data.modalities, tuple)
    assert json.loads(text)["data"]["modalities"] == ["a", "b"]
    for bad in (
        "{",
        "[]",
        '{"model": 3}',
        "!!python/object/apply:os.system ['true']",
        '{"model": {"a.b": 1}, "data": {}}',
    ):
        (tmp_path / workdir.CONFIG).write_text(bad)
        with pytest.raises(ConclugenError, match=r"config\.json: not "):
            workdir.read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.norm_epsilon", None, "config.model.norm_epsilon is None, expected float (such as 1e-05)"),
        ("model.reconstruction_dim", 1.5, "config.model.reconstruction_dim is 1.5, expected int (such as 1024)"),
        ("data.modalities", [["a"]], "config.data.modalities is (('a',),), expected tuple of str (such as ())"),
        ("precision", "x", "config.precision is 'x'; it must be one of 'float32', "),
        ("model.reconstruction_dim", ..., "lacks config.model.reconstruction_dim; restore it"),
        ("loss", {}, "lacks config.loss.clustering_weight; restore it"),
        ("downstream", 3, "lacks config.downstream.checkpoint; restore it"),
    ],
)
def test_a_run_of_wrong_types_is_refused_by_key(key, value, message):
    tree = json.loads(config_lib.to_json(tiny_config()))
    section, _, name = key.rpartition(".")
    part = tree[section] if section else tree
    part[name] = value
    if value is ...:
        del part[name]
    with pytest.raises(ConclugenError, match=re.escape(f"RUN/config.json: {message}")):
        config_lib.from_tree(tree, "RUN/config.json")
    del tree["data"]["feed_gib"]  # which training alone reads: runs of versions without it stay of use
    part[name] = tiny_config()[key] if section else tiny_config().to_dict()[key]
    config_lib.from_tree(tree, "RUN/config.json")


def test_a_run_of_an_older_version_has_the_gated_head_and_nothing_hidden():
    tree = json.loads(config_lib.to_json(tiny_config()))
    del tree["model"]["representation_head"], tree["augmentation"]["modality_dropout"]
    assert config_lib.from_tree(tree, "RUN/config.json").to_dict() == tiny_config().to_dict()


def test_differences_name_every_changed_key():
    old, new = tiny_config("x"), tiny_config("x", train__batch_size=32, optimizer__learning_rate=0.5)
    assert config_lib.differences(old, old.copy_and_resolve_references()) == []
    assert config_lib.differences(old, new) == [
        "config.optimizer.learning_rate: 0.001 -> 0.5",
        "config.train.batch_size: 16 -> 32",
    ]
    assert config_lib.differences(ConfigDict({"a": 1}), ConfigDict({"b": 1})) == [
        "config.a: 1 -> (absent)",
        "config.b: (absent) -> 1",
    ]
