"""Clips per second from video files to vectors, beside the same pipeline in PyTorch.

    python -m benchmarks.extraction --clips=FOLDER --torch-python=PATH_TO_A_PYTHON_WITH_TORCH
    python -m benchmarks.extraction --clips=FOLDER --precision=bfloat16 --batch-items=256 --repeats=40   # on a GPU
    python -m benchmarks.extraction --clips=FOLDER --make --backbones=ready

``--make`` writes the clips (see ``benchmarks.spoken_clips``). ``--backbones=ready``: the ready backbones that are installed,
clips per second of two ways that take turns, with words of files beside the clips and with words that are recognised, and the
share of each part in the work of all processes; faces are cropped as ``conclugen extract`` does.

Without it:

ResNet-152 at 1 frame per second, ResNet3D-101 at 16, ResDAVEnet and a DistilRoBERTa of random weights; whole frames of 180 x
180, no face detection and no speech recognition. Both sides decode in one process beside the one that computes, and see each
clip ``--repeats`` times. The sides take turns; medians. What the clips wait for, decoding or the device, is printed, and the
share of the rate of a plain matrix product that the networks reach.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import spoken_clips

TEXT = {"vocabulary": 50265, "width": 768, "num_layers": 6, "num_heads": 12, "hidden_dim": 3072, "max_positions": 514}
TEXT |= {"first_position": 2, "num_types": 1, "activation": "gelu", "epsilon": 1e-12}
TOKENS = 12

PEER = """
import json, sys, time
import numpy as np, torch, torchvision, transformers
from conclugen_jax.extract.media import decoding, mel
from PIL import Image
from tests.parity.references import IMAGENET, KINETICS, ResDAVEnet, ResNet3D

def resize(frame, size):
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))

class Clips(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        clip = decoding.decode(self.paths[i])
        frames = [resize(f, (180, 180)) for f in clip.frames]
        seconds = np.arange(0, clip.times[-1] + 1e-6, 1) + 1e-6
        one = np.stack([frames[j] for j in np.searchsorted(clip.times, seconds, side="right") - 1])
        rest = len(frames) % 16
        frames = frames[:-rest] if 0 < rest < 8 and len(frames) > 16 else frames + frames[-1:] * (-rest % 16)
        sound = mel.published(clip.sound) if clip.sound is not None else np.zeros((0, 40), np.float32)
        return one, np.stack(frames).reshape(-1, 16, 180, 180, 3), sound

def normalised(x, mean, std):
    return ((torch.from_numpy(x).float() / 255 - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, 1)

if __name__ == "__main__":
    paths, tokens = sys.argv[2:], int(sys.argv[1])
    torch.manual_seed(0)
    pictures = torchvision.models.resnet152(weights=None).eval()
    pictures.fc = torch.nn.Identity()
    motion, ears = ResNet3D(101).eval(), ResDAVEnet((128, 128, 256, 512, 1024)).eval()
    config = transformers.RobertaConfig(num_hidden_layers=6, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    reader = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    ids = torch.arange(5, 5 + tokens)[None]
    def run(loader):
        count = 0
        for one, windows, sound in loader:
            pictures(normalised(one, *IMAGENET)).mean(0)
            pairs = np.array_split(windows, -(-len(windows) // 2))
            torch.cat([motion.features(normalised(w, *KINETICS)) for w in pairs]).mean(0)
            if len(sound):
                ears.features(torch.from_numpy(sound.T[None, None].copy())).mean(0)
            reader(input_ids=ids).last_hidden_state.mean(1)
            count += 1
        return count
    with torch.inference_mode():
        loader = lambda paths: torch.utils.data.DataLoader(Clips(paths), batch_size=None, num_workers=1, collate_fn=tuple)
        run(loader(paths[: len(set(paths))]))
        start = time.perf_counter()
        count = run(loader(paths))
        took = time.perf_counter() - start
        a = torch.ones(2000, 2000)
        rates = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            rates.append(16e9 / (time.perf_counter() - start))
    print(json.dumps({"clips_per_second": count / took, "matmul": max(rates)}))
"""


def backbones(options):
    """The four networks with random weights, and the operations of one call of each."""
    import jax

    from conclugen_jax.extract import backbones as lib
    from conclugen_jax.extract.networks import davenet, resnet, text_encoder
    from conclugen_jax.extract.networks.weights import Weights

    modules = {
        "resnet152": (resnet.ResNet(152, *lib.IMAGENET), (np.zeros((1, 180, 180, 3), np.uint8),), {}),
        "resnet3d101": (resnet.ResNet(101, *lib.KINETICS), (np.zeros((1, 16, 180, 180, 3), np.uint8),), {}),
        "resdavenet": (
            davenet.ResDAVEnet(davenet.WIDTHS["published"], 40),
            (np.zeros((1, 64, 40), np.float32), np.array([64])),
            {"widths": list(davenet.WIDTHS["published"]), "kernel_mels": 40},
        ),
    }
    found = []
    for name, (module, example, facts) in modules.items():
        params = jax.jit(module.init)(jax.random.key(0), *example)["params"]
        found.append(lib.create(Weights(name, facts, params, "", {}, Path()), options))
    text = text_encoder.TextEncoder(text_encoder.Options(**TEXT))
    ids = np.arange(5, 5 + TOKENS, dtype=np.int32)[None]
    params = jax.jit(text.init)(jax.random.key(0), ids, np.ones_like(ids, bool))
    prepare = functools.partial(_words, ids=ids)
    found.append(
        lib.Backbone("text", "text", 768, prepare, jax.jit(functools.partial(text.apply, params)), batch_size=1)
    )
    return found


def _words(clip, view, *, ids):
    return ids, np.ones_like(ids, bool)


def ours(paths: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Clips per second of our pipeline, and what it waited for."""
    import jax
    import jax.numpy as jnp

    from conclugen_jax.extract import preparation
    from conclugen_jax.extract.backbones import Options
    from conclugen_jax.extract.utterance import Utterance
    from conclugen_jax.extract.vectors import keep_freed_memory

    keep_freed_memory()  # as conclugen extract does
    networks = backbones(Options(precision=args.precision, batch_items=args.batch_items))
    how = preparation.recipe(networks)

    jobs = [(Utterance(f"{i}", "", path, text="words"), 1) for i, path in enumerate(paths)]
    rate, clock = _measured(jobs, len(set(paths)), networks, how, args.num_workers)
    a, rates = jnp.ones((8192 if jax.default_backend() == "gpu" else 2000,) * 2, args.precision), []
    product = jax.jit(jnp.matmul)
    for _ in range(6):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        rates.append(2 * len(a) ** 3 / (time.perf_counter() - start))
    result = {"clips_per_second": rate, "matmul": max(rates), "host_seconds": clock.host}
    result |= {"device_seconds": clock.device, "device": jax.devices()[0].device_kind}
    for b in networks[:2]:
        shape = (b.batch_size, 180, 180, 3) if b.name == "resnet152" else (b.batch_size, 16, 180, 180, 3)
        x = jnp.zeros(shape, jnp.uint8)
        b.vectors(x).block_until_ready()
        start = time.perf_counter()
        for _ in range(3):
            out = b.vectors(x)
        out.block_until_ready()
        seconds = (time.perf_counter() - start) / 3
        operations = OPERATIONS[b.name] * b.batch_size
        result[b.name] = {
            "seconds_per_item": seconds / b.batch_size,
            "share_of_matmul": operations / seconds / max(rates),
        }
    return result


def _measured(jobs: list, first: int, networks: list, how: Any, num_workers: int) -> tuple[float, Any]:
    """Return clips per second, start of the processes included, and what the time went into, after some jobs that compile."""
    from conclugen_jax.extract import preparation
    from conclugen_jax.extract.vectors import Clock, vectors

    for part in (jobs[:first], jobs):
        clock, start = Clock(), time.perf_counter()
        results = list(vectors(preparation.prepared(part, how, num_workers), networks, clock))
        rate = len(results) / (time.perf_counter() - start)
        assert not any(each.failure for each, _ in results), [each.failure for each, _ in results if each.failure]
    return rate, clock


def ready_set(paths: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Clips per second of the ready backbones, and the share of each part in the work."""
    from conclugen_jax.extract import backbones as lib, preparation, ready
    from conclugen_jax.extract.networks import mtcnn
    from conclugen_jax.extract.utterance import Utterance
    from conclugen_jax.extract.vectors import COMPILING, keep_freed_memory

    keep_freed_memory()
    networks = lib.load(lib.Networks(own=tuple(ready.chosen()[0])))
    how = preparation.recipe(networks, faces=str(mtcnn.WEIGHTS), recogniser=ready.SPEECH if args.recognise else "")
    words = {path: None if args.recognise else Path(path).with_suffix(".txt").read_text() for path in set(paths)}
    jobs = [(Utterance(f"{i}", "", path, text=words[path]), 1) for i, path in enumerate(paths)]
    rate, clock = _measured(jobs, 2, networks, how, args.num_workers)
    parts = {name: seconds for name, seconds in clock.parts.items() if name != COMPILING}  # read from the cache
    return {"clips_per_second": rate, "parts": {k: x / sum(parts.values()) for k, x in parts.items()}}


def turns_of_ready(paths: list[str], args: argparse.Namespace) -> None:
    """Let the two ways to get words take turns, and print medians."""
    from conclugen_jax.extract import ready

    there, absent = ready.chosen()
    print(f"{', '.join(there)}; not installed: {', '.join(absent) or 'none'}")
    ways = {"words beside the clips": []}
    if ready.SPEECH in there and importlib.util.find_spec("faster_whisper"):
        ways["words recognised"] = ["--recognise"]
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for turn in range(1, args.turns + 1):
        for way, flags in ways.items():
            found[way].append(_json([sys.executable, "-m", "benchmarks.extraction", *sys.argv[1:], "--alone", *flags]))
            print(f"  turn {turn}, {way}: {found[way][-1]['clips_per_second']:.2f} clips/s", flush=True)
    print(
        f"{len(set(paths))} clips, each {args.repeats} times, {args.turns} turns, {args.num_workers} processes, medians:"
    )
    for way, results in found.items():
        rates = [each["clips_per_second"] for each in results]
        print(f"  {way}: {statistics.median(rates):.2f} clips/s ({min(rates):.2f} to {max(rates):.2f})")
        shares = {
            part: statistics.median(each["parts"].get(part, 0) for each in results) for part in results[0]["parts"]
        }
        print("    " + ", ".join(f"{k} {x:.0%}" for k, x in sorted(shares.items(), key=lambda pair: -pair[1])))


OPERATIONS = {"resnet152": 1.65e10, "resnet3d101": 7.56e10}
"""Of one frame and of one window of 16 frames at 180 x 180: two for each multiplication of a convolution."""


def main() -> None:
    """Let the sides take turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of clips, at best of the same few seconds")
    parser.add_argument(
        "--torch-python", default="", help="a Python with torch, torchvision, transformers, av, pillow, scipy"
    )
    parser.add_argument("--repeats", type=int, default=3, help="times that each clip is read in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-items", type=int, default=32)
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode; default: 1, of the ready set: one a core"
    )
    parser.add_argument("--backbones", default="", choices=("", "ready"), help="ready: those that are installed")
    parser.add_argument("--make", action="store_true", help="write the clips, unless they are there")
    parser.add_argument("--recognise", action="store_true", help="with --alone: recognise words")
    parser.add_argument("--alone", action="store_true", help="one turn of ours, as JSON")
    args = parser.parse_args()
    if args.num_workers is None:
        args.num_workers = os.cpu_count() or 1 if args.backbones else 1
    if args.make:
        spoken_clips.make(args.clips)
    names = sorted(str(p) for p in args.clips.iterdir() if p.suffix in (".mpg", ".mp4", ".mov", ".avi", ".mkv"))
    paths = names * args.repeats
    if args.alone:
        print(json.dumps((ready_set if args.backbones else ours)(paths, args)))
        return
    if args.backbones:
        turns_of_ready(paths, args)
        return
    found: dict[str, list[dict]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "peer.py"
        script.write_text(PEER)
        for _ in range(args.turns):
            found["ours"].append(_json([sys.executable, "-m", "benchmarks.extraction", *sys.argv[1:], "--alone"]))
            if args.torch_python:
                found["torch"].append(_json([args.torch_python, str(script), str(TOKENS), *paths]))
    medians = {
        side: {k: statistics.median(r[k] for r in results) for k in ("clips_per_second", "matmul")}
        for side, results in found.items()
        if results
    }
    print(f"{len(names)} clips, each {args.repeats} times, {args.turns} turns, medians:")
    for side, numbers in medians.items():
        print(
            f"  {side}: {numbers['clips_per_second']:.3f} clips/s; matmul {numbers['matmul'] / 1e9:.0f} G operations/s"
        )
    if "torch" in medians:
        ratios = [a["clips_per_second"] / b["clips_per_second"] for a, b in zip(*found.values(), strict=True)]
        print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    last = found["ours"][-1]
    waited, computed = last["host_seconds"], last["device_seconds"]
    bound = "decoding" if waited > computed else "the device"
    print(f"  on {last['device']} bound by {bound}: {waited:.1f} s of decoding waited for, {computed:.1f} s computed")
    for name in OPERATIONS:
        seconds, share = last[name]["seconds_per_item"], last[name]["share_of_matmul"]
        print(f"  {name}: {1000 * seconds:.1f} ms an item, {share:.0%} of the product's rate")


def _json(command: list[str]) -> dict:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
