"""What pretraining may do beyond the paper, all at once: one device as eight, resumed runs, members under vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.method import model as model_lib, train_state
from conclugen_jax.runs import config as config_lib
from conclugen_jax.train import optimizer, parallel
from tests.helpers import assert_same_bits, tiny_config
from tests.test_persons import Talk

ALL = {
    "model__representation_head": "linear",
    "augmentation__feature_dropout": 0.3,
    "augmentation__modality_dropout": 0.3,
    "augmentation__mixup": 0.5,
    "loss__fusion_weight": 0.5,
    "evaluation__vectors": "both",
    "clustering__start_epoch": 0,
}
DIMS = {"video": 24, "audio": 16, "text": 12}


def made(config, axis_name=None):
    """Return the step, a state with a full queue, and a batch in which some rows lack text."""
    config_lib.check_objective(config)
    rng, model = np.random.default_rng(0), model_lib.from_config(config, DIMS, axis_name)
    make, schedule = optimizer.from_config(config, 100)
    variables = model_lib.initial_variables(model, jax.random.key(0), None)
    state = train_state.create(variables, make, jax.random.key(1), queue_length=16, num_clusters=4)
    queue = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    state = state.replace(step=jnp.int32(1), queue=queue, queue_batches=jnp.int32(1))
    present = {"video": np.ones(16, bool), "audio": np.ones(16, bool), "text": np.arange(16) % 3 > 0}
    features = {m: rng.normal(size=(16, d)).astype(np.float32) for m, d in DIMS.items()}
    how = {"model": model, "optimizer": make, "schedule": schedule, "config": config, "axis_name": axis_name}
    step = functools.partial(pretrain.pretrain_step, **how, steps_per_epoch=100, cluster=True)
    return step, state, {"features": features, "present": present}


def test_one_device_trains_as_eight():
    config = tiny_config(**ALL, loss__soft_targets=0.2)
    step, state, batch = made(config)
    alone, metrics = jax.jit(step)(state, batch)
    step, *_ = made(config, parallel.AXIS)
    split = parallel.split_rows(batch, 8)
    several, of_several = jax.pmap(step, axis_name=parallel.AXIS, in_axes=(None, 0))(state, split)
    for name, x in metrics.items():
        np.testing.assert_allclose(of_several[name], np.full(8, x), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(several.queue[3], alone.queue, rtol=1e-4, atol=1e-5)
    assert metrics["gradient_norm"] > 0


def test_members_under_vmap_train_as_each_alone():
    step, state, batch = made(tiny_config(**ALL, loss__target_neighbours=3))
    states = [state.replace(rng=jax.random.key(i)) for i in range(2)]
    batches = [batch, jax.tree.map(lambda x: x[::-1].copy(), batch)]
    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (states, batches))
    together, metrics = jax.jit(jax.vmap(step))(*stacked)
    for i, member in enumerate(zip(states, batches, strict=True)):
        alone, of_alone = jax.jit(step)(*member)
        for name, x in of_alone.items():
            np.testing.assert_allclose(metrics[name][i], x, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(together.queue[i], alone.queue, rtol=1e-4, atol=1e-5)
    assert abs(metrics["loss"][0] - metrics["loss"][1]) > 1e-3


def test_a_run_resumes_bit_for_bit(tmp_path):
    def stop(epoch, *_):
        if epoch == 0:
            raise KeyboardInterrupt

    folder = builders.build(Talk(missing=0.3), tmp_path / "data")
    config = tiny_config(folder, **ALL, loss__target_neighbours=3, train__num_epochs=2)
    whole = pretrain.pretrain(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, tmp_path / "cut", on_epoch=stop)
    assert_same_bits(pretrain.pretrain(config, tmp_path / "cut"), whole)
