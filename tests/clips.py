"""Clips made for tests: every frame says its number in its grey level, and the sound is a tone."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def image(number, height=48, width=64):
    """Left half: grey of the frame's number; right half: a gradient that tells sides apart."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = 4 * (number % 60)
    picture[:, width // 2 :, 0] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return picture


def number_of(frame):
    """Which frame it is, from its grey."""
    height, width = frame.shape[:2]
    return round(float(frame[height // 4 : -height // 4, width // 8 : width * 3 // 8].mean()) / 4)


def write(
    path,
    times,
    *,
    height=48,
    width=64,
    sound=None,
    sound_start=0.0,
    codec="ffv1",
    images=None,
    aspect=None,
    rate=25,
    gop=None,
    b_frames=None,
):
    """Write a clip.

    Args:
      path: its ending says the container.
      times: of the frames, in seconds; empty for sound alone.
      sound: float [samples] at 16 kHz.
      images: of the frames, else numbered ones.
      aspect: of the pixels.
      gop: frames from one key frame to the next.
      b_frames: in a row that are made of later ones as well.
    """
    with av.open(str(path), "w") as container:
        streams = []
        if len(times):
            video = container.add_stream(codec, rate=rate)
            video.width, video.height = width, height
            video.pix_fmt = "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
            if gop is not None:
                video.gop_size, video.bit_rate = gop, 4_000_000
                video.codec_context.time_base = Fraction(1, rate)  # MPEG-1 knows no other
            if b_frames is not None:
                video.codec_context.max_b_frames = b_frames
            if aspect is not None:
                video.codec_context.sample_aspect_ratio = aspect
            streams.append(video)
        if sound is not None:
            heard = container.add_stream(
                "pcm_s16le" if path.suffix in (".mkv", ".wav", ".avi", ".mov") else "aac", rate=16_000
            )
            heard.layout = "mono"
            streams.append(heard)
        for i, time in enumerate(times):
            picture = image(i, height, width) if images is None else images[i]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        if sound is not None:
            samples = (np.clip(sound, -1, 1) * 32767).astype(np.int16)
            start = round(sound_start * 16_000)
            for i in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, i : i + 1024], format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16_000, start + i, Fraction(1, 16_000)
                container.mux(heard.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def tone(seconds, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * 16_000)) / 16_000)).astype(np.float32)


def steady(seconds, rate=25.0):
    """Times of a constant rate."""
    return np.arange(round(seconds * rate)) / rate


def videos(folder):
    """Write clips into split folders and return the folder; grey levels tell them apart, some lack sound or words."""
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        (folder / split).mkdir()
        for i in range(count):
            path = folder / split / f"{split}{i}.mkv"
            pictures = [image(10 * i + 5)] * 50
            sound = None if i == 1 else 0.5 * tone(2.0)
            write(path, steady(2.0), images=pictures, sound=sound)
            if i != 2:
                path.with_suffix(".txt").write_text("one two three " * (i + 1))
    return folder


def write_smiles(folder):
    """Write clips of 1 s of one photograph, dark or bright, with ten lines of labels; the eleventh clip has none."""
    smile, rows = np.asarray(Image.open(Path(__file__).parent / "parity" / "smile.jpg")), []
    folder.mkdir(exist_ok=True)
    for i in range(11):
        picture = (smile * (0.6 if i % 2 else 1.0 - i / 100)).astype(np.uint8)
        about = {"height": len(picture), "width": picture.shape[1], "images": [picture] * 8, "rate": 8}
        write(folder / f"clip{i:02d}.mkv", steady(1, 8), **about)
        rows.append(f"clip{i:02d},person{i % 5},{('bright', 'dark')[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(["id,group,emotion", *rows[:10]]))


if __name__ == "__main__":
    write_smiles(Path(sys.argv[1]))
