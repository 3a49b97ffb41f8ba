"""A Ray cluster of a head and two nodes with one processor each; prints its address and the processes of nodes, one a line.

Each line of standard input adds a node; at its end the cluster ends.
"""

import os
import sys

from ray.cluster_utils import Cluster

from conclugen_jax.system.on_ray import OBJECTS


def add(cluster):
    node = cluster.add_node(num_cpus=1, memory=2 * 2**30, object_store_memory=OBJECTS)
    print(node.all_processes["raylet"][0].process.pid, flush=True)


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECTS})
    print(cluster.address, flush=True)
    add(cluster)
    add(cluster)
    for _ in sys.stdin:
        add(cluster)
    cluster.shutdown()
