"""Memory of a device: the estimate, and the refusal of what does not fit."""

import functools

import jax
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.train import memory
from configs import base
from tests.helpers import Faces, tiny_config

DIMS = {"video": 4096, "audio": 1024, "text": 768}
PARAMETERS = 115_000_000


def paper(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return memory.estimate(config, DIMS, PARAMETERS, table_rows=145_000, num_devices=1), config


def test_estimate_at_the_paper_sizes():
    parts, _ = paper()
    # 145,000 rows of 5,888 numbers; parameters, gradients and two moments in float32.
    assert parts["table"] == pytest.approx(145_000 * 5888 * 4 / 2**30)
    assert parts["parameters"] == pytest.approx(PARAMETERS * 16 / 2**30)
    # Three matrices of 4,096 x 4,096 similarities are kept.
    assert parts["similarities"] == pytest.approx(3 * 4096**2 * 4 / 2**30)


def test_each_setting_saves_what_it_promises():
    before, _ = paper()
    assert paper(data__storage_dtype="bfloat16")[0]["table"] == before["table"] / 2
    assert paper(encoder_chunk_size=512)[0]["activations"] < 0.5 * before["activations"]
    assert paper(optimizer__name="sgd")[0]["parameters"] == before["parameters"] / 2
    assert paper(precision="bfloat16")[0]["activations"] < before["activations"]
    # Beyond the size up to which they are kept similarities do not grow any more.
    large, larger = (paper(train__batch_size=n)[0] for n in (2**15, 2**17))
    assert large["similarities"] == larger["similarities"]
    assert larger["activations"] == pytest.approx(4 * large["activations"])


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"train__batch_size": 65536}, "set config.encoder_chunk_size=1024"),
        ({"train__batch_size": 2**20, "encoder_chunk_size": 512}, "lower config.train.batch_size or use more devices"),
        ({"train__batch_size": 64}, "set config.data.tier=host"),
    ],
)
def test_the_way_out_is_the_setting_that_saves_most(changes, way_out):
    message = str(memory.too_large(*paper(**changes), "80 GiB are needed where 79 GiB are left"))
    assert message.endswith(way_out)
    assert f"config.train.batch_size={changes['train__batch_size']} does not fit" in message
    assert "table 3.18, parameters 1.71, activations" in message


def test_a_batch_that_does_not_fit_is_refused_before_the_first_step(tmp_path, monkeypatch):
    path = builders.build(Faces(), tmp_path / "data")
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(
        ConclugenError, match=r"batch_size=16 does not fit .* GiB are left; estimate in GiB: table 0.00"
    ):
        pretrain.pretrain(tiny_config(path), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_the_runtime_says_when_memory_ends_is_explained():
    explain = functools.partial(memory.too_large, *paper())
    message = r"does not fit .*RESOURCE_EXHAUSTED: 3 bytes.*set config"
    with pytest.raises(ConclugenError, match=message), memory.explained(explain):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(explain):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_memory_of_this_machine_is_known():
    found = memory.available(jax.devices()[0])
    assert found is None or 2**28 < found < 2**46
