"""Turn sound into log-Mel spectrograms, with the two front ends that ResDAVEnet was used with."""

import functools

import numpy as np

from conclugen_jax.extract.media.clip import SAMPLE_RATE


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Convert Hz to the Mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, logarithmic above."""
    hz = np.asarray(hz, np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Invert :func:`hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))


@functools.cache
def filters(sample_rate: int, n_fft: int, n_mels: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return triangular filters of equal area.

    Returns:
      float32 [n_mels, n_fft / 2 + 1].
    """
    edges = mel_to_hz(np.linspace(hz_to_mel(low_hz), hz_to_mel(high_hz), n_mels + 2))
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * area[:, None]).astype(np.float32)


@functools.cache
def window(name: str, length: int) -> np.ndarray:
    """Return a periodic window of SciPy, [length]."""
    from scipy import signal  # takes half a second, needed for sound only

    return signal.get_window(name, length)


def power(sound: np.ndarray, n_fft: int, hop: int, window: np.ndarray, mode: str) -> np.ndarray:
    """Return squared magnitudes of the Fourier transform of windows centred at multiples of ``hop``.

    Args:
      sound: [samples].
      n_fft: length of the transform.
      hop: samples from one window to the next.
      window: [n_fft].
      mode: what lies beyond the ends: ``reflect`` or ``constant`` (zeros).

    Returns:
      float32 [frames, n_fft / 2 + 1]; there are 1 + samples // hop frames.
    """
    half = n_fft // 2
    if mode == "reflect" and len(sound) <= half:
        mode = "constant"  # nothing to reflect
    padded = np.pad(sound, half, mode=mode)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: 1 + len(sound) // hop]
    return np.abs(np.fft.rfft(frames * window, axis=1)).astype(np.float32) ** 2


def published(sound: np.ndarray) -> np.ndarray:
    """Return the spectrogram that the published ResDAVEnet takes.

    16 kHz, mean removed, pre-emphasis 0.97, Hamming windows of 25 ms every 10 ms, 40 Mel bands from 20 Hz, in dB below
    the greatest value, down to -80.

    Args:
      sound: float [samples] at 16 kHz.

    Returns:
      float32 [frames, 40].
    """
    sound = np.asarray(sound, np.float64)
    sound = sound - sound.mean()
    sound = np.append(sound[:1], sound[1:] - 0.97 * sound[:-1])
    n_fft = SAMPLE_RATE * 25 // 1000
    spectrum = power(sound, n_fft, SAMPLE_RATE // 100, window("hamming", n_fft), "reflect")
    bands = spectrum @ filters(SAMPLE_RATE, n_fft, 40, 20.0, SAMPLE_RATE / 2).T
    return _decibels(bands)


def _decibels(bands: np.ndarray, floor: float = 1e-10, span: float = 80.0) -> np.ndarray:
    decibels = 10 * np.log10(np.maximum(bands, floor))
    decibels -= 10 * np.log10(max(float(bands.max()), floor))
    return np.maximum(decibels, decibels.max() - span).astype(np.float32)


def authors(sound: np.ndarray) -> np.ndarray:
    """Return the spectrogram of the authors' configuration, which reads 16 kHz sound as if it had 22,050 Hz.

    Hann windows of 2048 samples every 160, 128 Mel bands up to 11,025 Hz, power scaled from 0 to 1 over the clip.

    Args:
      sound: float [samples] at 16 kHz.

    Returns:
      float32 [frames, 128].
    """
    sound = np.asarray(sound, np.float64)
    spectrum = power(sound, 2048, 160, window("hann", 2048), "constant")
    bands = spectrum @ filters(22_050, 2048, 128, 0.0, 22_050 / 2).T
    low, high = bands.min(), bands.max()
    return ((bands - low) / max(high - low, np.finfo(np.float32).tiny)).astype(np.float32)


FRONT_ENDS = {"published": (published, 40), "authors": (authors, 128)}
"""Name -> (function, number of Mel bands)."""
