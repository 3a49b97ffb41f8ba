"""The pretraining step in PyTorch, the peer of the benchmarks; needs torch and fast-pytorch-kmeans.

Written for this comparison after the published description: same networks, same three losses, k-means over a full
queue at every step, AdamW. Answers requests as benchmarks/sides.py describes; run with that folder on its path.
"""

import json
import sys
import time

import sides
import torch
from fast_pytorch_kmeans import KMeans
from torch import nn
from torch.nn import functional

NUM_CLUSTERS, PROJECTION_DIM, MARGIN = 8, 512, 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

    def __init__(self, dims: dict[str, int], r: int, reconstruction_dim: int):
        super().__init__()
        self.heads = nn.ModuleDict(
            {m: nn.Sequential(Gated(d, d), nn.Linear(d, r)) if m == "audio" else Gated(d, r) for m, d in dims.items()}
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
                m: nn.Sequential(nn.Linear(r, reconstruction_dim), nn.ReLU(), nn.Linear(reconstruction_dim, d))
                for m, d in dims.items()
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
    similarity = a @ b.T - MARGIN * torch.eye(len(a), device=a.device)
    target = torch.arange(len(a), device=a.device)
    return functional.cross_entropy(similarity, target) + functional.cross_entropy(similarity.T, target)


class Trainer:
    """Steps on random features, two batches in turn."""

    def __init__(
        self, *, batch: int, dims: dict[str, int], representation_dim: int, reconstruction_dim: int, **options
    ):
        torch.manual_seed(0)
        # Autocast leaves the similarities, on which it is not asked to work, to the rate of float32: TF32 is fair there.
        torch.set_float32_matmul_precision("high" if options.get("precision") == "bfloat16" else "highest")
        self.batch, self.names, self.bfloat16 = batch, list(dims), options.get("precision") == "bfloat16"
        self.network = Network(dims, representation_dim, reconstruction_dim).to(DEVICE)
        self.forward = torch.compile(self.network) if options.get("compiled") else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=9e-5, weight_decay=3.2e-4)
        self.kmeans = KMeans(NUM_CLUSTERS, mode="cosine")
        self.queue = torch.randn(4 * batch, NUM_CLUSTERS, device=DEVICE)
        self.batches = [{m: torch.randn(batch, d, device=DEVICE).relu() for m, d in dims.items()} for _ in range(2)]

    def step(self, i: int) -> None:
        x, names, batch = self.batches[i % 2], self.names, self.batch
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bfloat16):
            projections, logits, decoded = self.forward(x)
        projections, logits, decoded = ({m: v.float() for m, v in d.items()} for d in (projections, logits, decoded))
        loss = sum(contrast(projections[m], projections[k]) for j, m in enumerate(names) for k in names[j + 1 :])
        fused = torch.stack(list(logits.values())).mean(0)
        own = self.kmeans.fit_predict(torch.cat((self.queue, fused.detach())))[-batch:]
        self.queue = torch.cat((fused.detach(), self.queue[:-batch]))
        similarity = fused @ self.kmeans.centroids.T
        loss = loss + (similarity.logsumexp(1) - similarity.gather(1, own[:, None])[:, 0] + MARGIN).mean()
        loss = loss + sum(functional.mse_loss(decoded[m], x[m]) for m in names)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


_trainer: tuple[str, Trainer] | None = None


def time_steps(steps: int, **options) -> dict:
    """Seconds of a step, mean over consecutive ones."""
    global _trainer
    key = json.dumps(options)
    if _trainer is None or _trainer[0] != key:
        _trainer = None
        _trainer = key, Trainer(**options)
    _synchronize()
    start = time.perf_counter()
    for i in range(steps):
        _trainer[1].step(i)
    _synchronize()
    return {"seconds": (time.perf_counter() - start) / steps, **memory()}


def time_matmul(rows: int = 4096, repeats: int = 3, precision: str = "float32") -> dict:
    """Rate of a plain product [rows, 4096] x [4096, 4096]."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    p, q = torch.randn(rows, 4096, device=DEVICE, dtype=dtype), torch.randn(4096, 4096, device=DEVICE, dtype=dtype)
    _ = p @ q
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        _ = p @ q
    _synchronize()
    return {"gflops": repeats * 2 * rows * 4096**2 / (time.perf_counter() - start) / 1e9}


def memory() -> dict:
    """Highest memory of the GPU so far, GiB, if there is one."""
    return {"device_gib": torch.cuda.max_memory_allocated() / 2**30} if DEVICE == "cuda" else {}


def versions() -> dict:
    """What ran where."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {"framework": f"torch {torch.__version__}", "device": device, "python": sys.version.split()[0]}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    answers = {"step": time_steps, "matmul": time_matmul, "versions": versions}
    sides.serve(answers | {"peak": sides.peak, "forget_peak": sides.forget_peak})
