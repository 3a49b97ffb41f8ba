"""The pretraining step in eager PyTorch, the peer of benchmarks/step.py; needs torch and fast-pytorch-kmeans.

Written for this comparison after the published description: same networks, same three losses, k-means over a full
queue at every step, AdamW. Prints one line of JSON.
"""

import argparse
import json
import statistics
import time

import torch
from fast_pytorch_kmeans import KMeans
from torch import nn
from torch.nn import functional

DIMS = {"video": 4096, "audio": 1024, "text": 768}
NUM_CLUSTERS, PROJECTION_DIM, RECONSTRUCTION_DIM, MARGIN = 8, 512, 1024, 1e-3


class Gated(nn.Module):
    """relu(fc1) -> y * sigmoid(gate y) -> relu(fc2)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc1, self.gate, self.fc2 = (nn.Linear(i, outputs) for i in (inputs, outputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.fc1(x))
        return functional.relu(self.fc2(y * torch.sigmoid(self.gate(y))))


class Network(nn.Module):
    """All heads of the method; audio works at its own size first."""

    def __init__(self, r: int):
        super().__init__()
        self.heads = nn.ModuleDict(
            {m: nn.Sequential(Gated(d, d), nn.Linear(d, r)) if m == "audio" else Gated(d, r) for m, d in DIMS.items()}
        )
        self.projection = nn.Sequential(
            nn.Linear(r, r // 8),
            nn.BatchNorm1d(r // 8),
            nn.ReLU(),
            nn.Linear(r // 8, PROJECTION_DIM),
            nn.ReLU(),
        )
        self.clustering = nn.Linear(PROJECTION_DIM, NUM_CLUSTERS, bias=False)
        self.decoders = nn.ModuleDict(
            {
                m: nn.Sequential(nn.Linear(r, RECONSTRUCTION_DIM), nn.ReLU(), nn.Linear(RECONSTRUCTION_DIM, d))
                for m, d in DIMS.items()
            }
        )

    def forward(self, x: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
        r = {m: head(x[m]) for m, head in self.heads.items()}
        p = {m: self.projection(v) for m, v in r.items()}
        logits = {m: self.clustering(v) for m, v in p.items()}
        return (
            {m: functional.normalize(v) for m, v in p.items()},
            logits,
            {m: d(r[m]) for m, d in self.decoders.items()},
        )


def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Masked margin softmax, both directions."""
    similarity = a @ b.T - MARGIN * torch.eye(len(a))
    target = torch.arange(len(a))
    return functional.cross_entropy(similarity, target) + functional.cross_entropy(similarity.T, target)


def main() -> None:
    """Time steps after a first one that does not count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--representation-dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    torch.manual_seed(0)
    network = Network(a.representation_dim)
    forward = torch.compile(network) if a.compile else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=9e-5, weight_decay=3.2e-4)
    kmeans = KMeans(NUM_CLUSTERS, mode="cosine")
    queue = torch.randn(4 * a.batch, NUM_CLUSTERS)
    batches = [{m: torch.randn(a.batch, d).relu() for m, d in DIMS.items()} for _ in range(2)]
    names, times = list(DIMS), []
    for i in range(a.steps + 1):
        start = time.perf_counter()
        x = batches[i % 2]
        projections, logits, decoded = forward(x)
        loss = sum(contrast(projections[m], projections[k]) for j, m in enumerate(names) for k in names[j + 1 :])
        fused = torch.stack(list(logits.values())).mean(0)
        own = kmeans.fit_predict(torch.cat((queue, fused.detach())))[-a.batch :]
        queue = torch.cat((fused.detach(), queue[: -a.batch]))
        similarity = fused @ kmeans.centroids.T
        loss = loss + (similarity.logsumexp(1) - similarity.gather(1, own[:, None])[:, 0] + MARGIN).mean()
        loss = loss + sum(functional.mse_loss(decoded[m], x[m]) for m in names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    p, q = torch.randn(4096, 4096), torch.randn(4096, 4096)
    _ = p @ q
    start = time.perf_counter()
    for _ in range(3):
        _ = p @ q
    gflops = 3 * 2 * 4096**3 / (time.perf_counter() - start) / 1e9
    line = {
        "framework": f"torch {torch.__version__}",
        "compiled": a.compile,
        "seconds_per_step_median": statistics.median(times[1:]),
        "matmul_gflops": gflops,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
