"""Memory of a step with the update on every device as a whole, and split: python -m benchmarks.split_update [--devices=2,4,8]

Programs of pretraining at paper sizes (float32, batch 512) are compiled for so many virtual devices and asked what they take;
nothing is trained. Prints GiB of one device: moments of the optimizer, all arguments, temporaries, and both together.
"""

import argparse
import functools
import json
import os

BATCH = 512


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="2,4,8")
    counts = [int(x) for x in parser.parse_args().devices.split(",")]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(counts)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    for count in counts:
        for split in (False, True):
            print(json.dumps({"devices": count, "split": split, **_gib(count, split)}), flush=True)


def _gib(count: int, split: bool) -> dict[str, float]:
    import jax
    import numpy as np

    from benchmarks import step as sizes
    from conclugen_jax import pretrain
    from conclugen_jax.data.batches import HostTable
    from conclugen_jax.method import model as model_lib, train_state
    from conclugen_jax.train import feed, optimizer, parallel
    from configs import conclugen

    config, dims, devices = conclugen.get_config(), sizes.PAPER["dims"], jax.devices()[:count]
    config.optimizer.shard, config.train.batch_size = split, BATCH
    columns = {"features": {m: np.zeros((BATCH, d), np.float32) for m, d in dims.items()}}
    columns |= {"present": {m: np.ones(BATCH, bool) for m in dims}, "label": np.zeros(BATCH, np.int32)}
    batches = feed.Feed(HostTable(columns, np.arange(BATCH), tier="device"), config, devices)
    model = model_lib.from_config(config, dims, parallel.AXIS)
    make, schedule = optimizer.from_config(config, steps_per_epoch=10)

    def start() -> train_state.TrainState:
        variables, queue = model_lib.initial_variables(model, jax.random.key(0), None), {"queue_length": 4 * BATCH}
        clusters = config.clustering.num_clusters
        return train_state.create(variables, make, jax.random.key(1), **queue, num_clusters=clusters)

    state = jax.eval_shape(start)
    axes = parallel.axes(state, config, devices)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, -(-x.size // count)), x.dtype) if axes is not None and x.ndim else x

    state = state.replace(opt_state=jax.tree.map(placed, state.opt_state))
    options = {"model": model, "optimizer": make, "schedule": schedule, "config": config, "axis_name": parallel.AXIS}
    step = functools.partial(pretrain.pretrain_step, **options, steps_per_epoch=10, cluster=True)
    position = dict.fromkeys(("seed", "epoch", "first_step", "num_steps"), jax.ShapeDtypeStruct((count,), np.int32))
    with jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]):
        program = batches.program(step, axes).lower(state, batches.table, position, None).compile()
    found = program.memory_analysis()
    own = count if axes is not None else 1
    moments = sum(x.size * 4 / (own if x.ndim else 1) for x in jax.tree.leaves(state.opt_state))
    sizes_of = {"moments": moments, "arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}
    sizes_of["together"] = sizes_of["arguments"] + sizes_of["temporaries"]
    return {name: round(x / 2**30, 3) for name, x in sizes_of.items()}


if __name__ == "__main__":
    main()
