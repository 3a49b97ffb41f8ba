"""The space of a search, and what makes its losses comparable."""

import math

import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import search_space
from tests.helpers import tiny_config


def changed(config, **changes):
    return search_space.with_overrides(config, {k.replace("__", "."): v for k, v in changes.items()})


def test_the_default_space_has_what_the_authors_searched_where_it_is_used():
    config = tiny_config("x", train__num_epochs=60, clustering__num_clusters=8)
    space = search_space.default(config, steps_per_epoch=5)
    assert set(space) == {
        "model.representation_dim",
        "model.projection_dim",
        "model.reconstruction_dim",
        "loss.clustering_weight",
        "loss.reconstruction_weight",
        "clustering.num_clusters",
        "clustering.queue_batches",
        "clustering.start_epoch",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }
    assert space["model.representation_dim"] == {"choices": [8, 16, 32, 64]}
    assert space["clustering.num_clusters"] == {"low": 4, "high": 32, "log": True}
    assert space["clustering.queue_batches"]["high"] == 4  # fewer than an epoch has steps
    for objective in search_space.OBJECTIVES:
        assert search_space.check(space, config, objective=objective, source="x").keys() == space.keys()
    generative = changed(config, loss__contrastive_weight=0.0, loss__clustering_weight=0.0)
    assert set(search_space.default(generative, steps_per_epoch=5)) == {
        "model.representation_dim",
        "model.reconstruction_dim",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "expected an object of configuration keys"),
        ({}, "expected an object of configuration keys"),
        ({"optimizer.rate": {"low": 1, "high": 2}}, r"optimizer\.rate is not a configuration key"),
        ({"optimizer.learning_rates": {"low": 1, "high": 2}}, r"did you mean optimizer\.learning_rate\?"),
        ({"optimizer.b1": {"choices": [0.9]}, "config.optimizer.b1": {"choices": [0.8]}}, "appears twice"),
        ({"train.num_epochs": {"low": 1, "high": 2}}, r"the same in all trials; .* set --config\.train\.num_epochs"),
        ({"data.path": {"choices": ["a", "b"]}}, "the same in all trials"),
        ({"model.bottleneck": {"choices": [["audio"]]}}, "is a list"),
        ({"optimizer.b1": 0.9}, r'is 0\.9; expected \{"low"'),
        ({"optimizer.b1": {"low": 0.1}}, "expected"),
        ({"optimizer.b1": {"choices": []}}, r'is {"choices": \[\]}; expected'),
        ({"optimizer.b1": {"choices": ["much"]}}, r'"much".*values like 0\.9, each once'),
        ({"optimizer.b1": {"choices": [0.5, 0.5]}}, "each once"),
        ({"optimizer.b1": {"low": 0.9, "high": 0.1}}, r'"high": 0\.1}; .*low less than high'),
        ({"optimizer.b1": {"low": 0, "high": 0.1, "log": True}}, "above 0 where log is true"),
        ({"optimizer.b1": {"low": 0.1, "high": 0.2, "log": "yes"}}, '"log": "yes"}; expected'),
        ({"optimizer.b1": {"low": 0.1, "high": 2}}, r"config\.optimizer\.b1 is 2\.0; it must be between"),
        ({"optimizer.b1": {"low": 0.1, "high": math.inf}}, "Infinity}; expected"),
        ({"clustering.num_clusters": {"low": 2.5, "high": 8}}, r"2\.5.* values like 4, each once"),
        ({"model.representation_dim": {"low": 16, "high": 32}}, "as choices"),
        ({"model.projection_relu": {"low": 0, "high": 1}}, "choices alone for words and switches"),
        ({"precision": {"choices": ["float8"]}}, "must be one of 'float32'"),
        (
            {"loss.instance_temperature": {"low": 0.01, "high": 1}},
            r"no effect, since config\.loss\.instance_weight is 0",
        ),
        ({"views.noise": {"low": 0.01, "high": 1}}, r"loss\.instance_weight is 0"),
        ({"loss.clustering_weight": {"choices": [0, 1]}}, "may be 0.*--objective=validation_probe"),
        ({"loss.contrastive_margin": {"low": 0.001, "high": 1}}, "changes what the loss measures"),
        ({"data.standardize": {"choices": ["none", "split"]}}, "changes what the loss measures"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(space, message):
    with pytest.raises(ConclugenError, match=message) as refused:
        search_space.check(space, tiny_config("x"), objective="pretraining_loss", source="my.json")
    assert str(refused.value).startswith("my.json")


def test_numbers_take_the_type_of_their_key_and_probes_may_search_more():
    space = {"config.optimizer.b1": {"low": 0, "high": 0.5}, "data.standardize": {"choices": ["none", "split"]}}
    checked = search_space.check(space, tiny_config("x"), objective="validation_probe", source="x")
    assert checked["optimizer.b1"] == {"low": 0.0, "high": 0.5, "log": False}
    assert isinstance(checked["optimizer.b1"]["low"], float)
    assert checked["data.standardize"] == {"choices": ["none", "split"]}


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "space.json").write_text("{'a'}")
    with pytest.raises(ConclugenError, match=r"space\.json: not valid JSON .* expected keys with"):
        search_space.read(tmp_path / "space.json")


def test_losses_are_compared_without_weights_and_at_one_scale():
    base = tiny_config("x")  # three modalities, batches of 16, 4 clusters
    means = {"loss": 99.0, "loss/contrastive": 12.0, "loss/clustering": 1.0, "loss/reconstruction": 3.0}
    assert search_space.comparable_loss(means, base, base) == 16.0  # Eq. 11
    weighted = changed(base, loss__contrastive_weight=7.0)
    assert search_space.comparable_loss(means, weighted, base) == 16.0
    other = changed(base, clustering__num_clusters=16, train__batch_size=256)
    # log 256 / log 16 = log 16 / log 4 = 2
    assert search_space.comparable_loss(means, other, base) == pytest.approx(12 / 2 + 1 / 2 + 3)
    del means["loss/clustering"]  # it has not joined yet
    assert search_space.comparable_loss(means, other, base) == pytest.approx(12 / 2 + math.log(4) + 3)
