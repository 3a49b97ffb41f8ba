"""Make sixteen clips of 3 s at 25 frames a second, with their words beside them, for ``benchmarks.extraction``.

Their faces and voices are those of four clips of the GRID corpus, of a woman and of a man, which are not part of this project:
the folder of real data has them (``CONCLUGEN_SHARED``, else ``shared`` beside the repository).
"""

import os
from pathlib import Path

import av
import numpy as np

SOURCE = Path(os.environ.get("CONCLUGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "clips"
SAID = {
    "bbaf2n": "bin blue at f two now",
    "brbk7n": "bin red by k seven now",
    "lbax4n": "lay blue at x four now",
    "swiz3n": "set white in z three now",
}
SIZES = ((640, 480), (1280, 720))
WOMAN, MAN = ("silent_audio.mp4", (640, 360)), ("face_then_none.mov", (960, 540))
SECONDS, RATE = 3.0, 25


def make(folder: Path, source: Path = SOURCE) -> list[Path]:
    """Write the clips into a folder, unless they are there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i, (name, words) in enumerate(SAID.items()):
        films = [(f"{name}.mpg", None), (f"{name}_large.mp4", (f"{name}.mpg", 0.0, SIZES[i % 2]))]
        films += [(f"woman{k}.mp4", (WOMAN[0], SECONDS * k, WOMAN[1])) for k in range(6) if k % 4 == i]
        films += [(f"man{k}.mp4", (MAN[0], 0.5 * k, MAN[1])) for k in range(2) if k == i]
        for film, how in films:
            path = folder / film
            if not path.exists():
                path.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")
                content = (source / f"{name}.mpg").read_bytes() if how is None else b""
                path.write_bytes(content) if content else _write(
                    path, source / f"{name}.mpg", source / how[0], *how[1:]
                )
            made.append(path)
    return sorted(made)


def _write(path: Path, speech: Path, film: Path, start: float, size: tuple[int, int]) -> None:
    """Write a clip of the pictures of one file from a time on, and the sound of another."""
    with av.open(str(film)) as file:
        shown = list(file.decode(video=0))
    times = np.array([frame.time - shown[0].time for frame in shown])
    rows = np.searchsorted(times, start + np.arange(round(SECONDS * RATE)) / RATE + 1e-6, side="right") - 1
    with av.open(str(speech)) as file:
        heard = [frame.to_ndarray().mean(axis=0) / 2**15 for frame in file.decode(audio=0)]  # 16 bits
        rate = file.streams.audio[0].rate
    sound = np.concatenate(heard).astype(np.float32)
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("libx264", rate=RATE), file.add_stream("aac", rate=rate, layout="mono")
        (video.width, video.height), video.pix_fmt = size, "yuv420p"
        for row in rows:
            pixels = shown[row].reformat(*size, format="yuv420p").to_ndarray()
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
        frame.sample_rate = rate
        file.mux([*video.encode(None), *audio.encode(frame), *audio.encode(None)])
