"""Every configuration file: it loads, holds what its method says, and trains for two steps at a tiny size."""

import runpy
from pathlib import Path

import jax
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.evaluate import downstream
from conclugen_jax.runs import config as config_lib
from conclugen_jax.study import definition as study_runs
from tests.helpers import Faces

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(p for p in FOLDER.glob("*.py") if p.stem not in ("base", "__init__", "demo") and "study" not in p.stem)
DEVICES = jax.devices()[:1]
SMALL = {
    "model.representation_dim": 32,
    "model.projection_dim": 16,
    "model.reconstruction_dim": 12,
    "clustering.num_clusters": 4,
    "clustering.start_epoch": 0,
    "clustering.queue_batches": 1,
    "train.batch_size": 16,
    "train.num_epochs": 1,
}


def load(path):
    return runpy.run_path(str(path))["get_config"]()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((32, 16, 16)), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    config = load(FOLDER / "conclugen.py")
    config.update_from_flattened_dict(SMALL | {"data.path": str(data)})
    folder = tmp_path_factory.mktemp("runs") / "conclugen"
    pretrain.pretrain(config, folder, devices=DEVICES)
    return folder


QUICK = ("conclugen", "instance_cont", "linear_evaluation")
EACH = [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in FILES]


@pytest.mark.parametrize("path", EACH)
def test_two_steps_at_a_tiny_size(path, data, pretrained, tmp_path):
    config = load(path)
    config.update_from_flattened_dict(SMALL | {"data.path": str(data)})
    if "conclugen downstream" in path.read_text():
        config.downstream.checkpoint = str(pretrained) if path.stem != "supervised" else ""
        result = downstream.downstream(config, tmp_path / "run", devices=DEVICES)
        assert result["protocol"] == path.stem
    else:
        assert int(pretrain.pretrain(config, tmp_path / "run", devices=DEVICES).step) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_opens_with_its_command_cost_and_score(path):
    text = path.read_text()
    assert f" --config={path.stem} " in text
    for word in ("Time:", "Score:", "not measured"):
        assert word in text


def test_methods_are_those_of_the_paper():
    """Objective, rates and modalities of each method."""
    found = {}
    for path in FILES:
        if "conclugen pretrain" in path.read_text():
            config = load(path)
            weights = config.loss
            names = ("contrastive", "clustering", "reconstruction", "instance")
            terms = "+".join(name for name in names if weights[f"{name}_weight"])
            rates = config.optimizer.learning_rate, config.optimizer.weight_decay
            found[path.stem] = terms, *rates, config.data.modalities
            config.data.path = "somewhere"
            config_lib.check(config)
    every = ()
    # The method at other rates.
    assert found.pop("small") == ("contrastive+clustering", 1e-3, 3.2e-4, every)
    assert found.pop("conclu_neighbours") == ("contrastive+clustering", 1e-3, 3.2e-4, every)
    assert found == {
        "conclugen": ("contrastive+clustering+reconstruction", 9e-5, 3.2e-4, every),
        "conclu": ("contrastive+clustering", 9e-5, 3.2e-4, every),
        "congen": ("contrastive+reconstruction", 3.6e-4, 3.2e-4, every),
        "multi_cont": ("contrastive", 3.6e-4, 3.2e-4, every),
        "multi_cont_without_text": ("contrastive", 3.6e-4, 3.2e-4, ("video", "audio")),
        "multi_cont_without_audio": ("contrastive", 3.6e-4, 3.2e-4, ("video", "text")),
        "instance_cont": ("instance", 3.6e-4, 3.2e-4, ("video",)),
        "generative": ("reconstruction", 3.6e-4, 3.2e-4, every),
    }


def test_seeds_of_the_small_study_are_trained_together():
    waiting = study_runs.cohorts(study_runs.chains(load(FOLDER / "study_demo.py")))
    sizes = {c[0][0].method: len(c) for c in waiting if c[0][0].protocol == "pretraining"}
    assert sizes.pop("instance_cont") == 1  # its program holds statistics of the data
    assert len(sizes) == 7
    assert set(sizes.values()) == {5}


@pytest.mark.parametrize("name", ["study_demo", "study_ravdess", "study_paper"])
def test_studies_can_be_run_and_hold_the_methods_of_the_paper(name):
    definition = load(FOLDER / f"{name}.py")
    study_runs.check(definition)
    chains = list(study_runs.chains(definition))
    for run in (run for chain in chains for run in chain):
        config_lib.check(run.config)
        config_lib.check_objective(run.config)
        config_lib.check_downstream(run.config)
    assert len({run.path for chain in chains for run in chain}) == sum(map(len, chains))
    methods = {"conclugen", "conclu", "congen", "multi_cont", "instance_cont", "generative", "conclugen_vision"}
    if name != "study_ravdess":  # two modalities
        methods |= {"multi_cont_without_text", "multi_cont_without_audio"}
    assert set(definition.order) == methods


def test_the_study_of_the_paper_has_its_rates():
    """Section 4 of the paper: pretraining by method, classifiers by data set."""
    definition = load(FOLDER / "study_paper.py")
    for name, method in definition.methods.items():
        if "uses" not in method:
            expected = load(FOLDER / f"{name}.py")
            expected.data.modalities = expected.data.modalities or ("video", "audio", "text")
            assert method.pretraining == expected, name
    rates = {
        name: {(c.optimizer.learning_rate, c.optimizer.weight_decay) for c in dataset.protocols.values()}
        for name, dataset in definition.datasets.items()
    }
    assert rates == {"cmu_mosei": {(9.96e-3, 7e-5)}, "meld": {(9.67e-3, 4e-5)}, "caer": {(6.1e-3, 8.216e-2)}}
