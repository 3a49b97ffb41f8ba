"""Turn sound into log-Mel spectrograms, with the two front ends that ResDAVEnet was used with."""

import functools

import numpy as np

from conclugen_jax.extract.media.clip import SAMPLE_RATE


def _mel(hz: float) -> float:
    """Convert Hz to the Mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


@functools.cache
def _filters(sample_rate: int, n_fft: int, n_mels: int, low_hz: float) -> np.ndarray:
    """Return triangular filters of equal area up to half of the sample rate, float32 [n_fft / 2 + 1, n_mels]."""
    mel = np.linspace(_mel(low_hz), _mel(sample_rate / 2), n_mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))  # back in Hz
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return (np.maximum(0, np.minimum(rising, falling)) * area[:, None]).astype(np.float32).T


@functools.cache
def _window(name: str, length: int) -> np.ndarray:
    from scipy import signal  # takes half a second, needed for sound only

    return signal.get_window(name, length)


def _power(sound: np.ndarray, n_fft: int, window: str, mode: str) -> np.ndarray:
    """Return squared magnitudes of the Fourier transform of windows of ``n_fft`` samples centred at multiples of 10 ms.

    ``mode`` is the padding beyond the ends: ``reflect`` or ``constant`` (zeros). float32 [1 + samples // 160, n_fft / 2 + 1].
    """
    half, hop = n_fft // 2, SAMPLE_RATE // 100
    padded = np.pad(sound, half, mode=mode if len(sound) > half else "constant")  # else there is nothing to reflect
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: 1 + len(sound) // hop]
    return np.abs(np.fft.rfft(frames * _window(window, n_fft), axis=1)).astype(np.float32) ** 2


def published(sound: np.ndarray) -> np.ndarray:
    """Return the spectrogram that the published ResDAVEnet takes, float32 [frames, 40], of float [samples] at 16 kHz.

    Mean removed, pre-emphasis 0.97, Hamming windows of 25 ms every 10 ms, 40 Mel bands from 20 Hz, in dB below the greatest
    value, down to -80.
    """
    sound = np.asarray(sound, np.float64)
    sound = sound - sound.mean()
    sound = np.append(sound[:1], sound[1:] - 0.97 * sound[:-1])
    bands = _power(sound, 400, "hamming", "reflect") @ _filters(SAMPLE_RATE, 400, 40, 20.0)
    decibels = 10 * np.log10(np.maximum(bands, 1e-10))
    decibels -= 10 * np.log10(max(float(bands.max()), 1e-10))
    return np.maximum(decibels, decibels.max() - 80.0).astype(np.float32)


def authors(sound: np.ndarray) -> np.ndarray:
    """Return the spectrogram of the authors' configuration, float32 [frames, 128], of float [samples] at 16 kHz.

    It reads the sound as if it had 22,050 Hz: Hann windows of 2048 samples every 160, 128 Mel bands up to 11,025 Hz, power
    scaled from 0 to 1 over the clip.
    """
    bands = _power(np.asarray(sound, np.float64), 2048, "hann", "constant") @ _filters(22_050, 2048, 128, 0.0)
    low, high = bands.min(), bands.max()
    return ((bands - low) / max(high - low, np.finfo(np.float32).tiny)).astype(np.float32)


def whisper(sound: np.ndarray, frames: int) -> np.ndarray:
    """Return the spectrogram that Whisper takes, float32 [frames, 80], of float [samples] at 16 kHz, silence behind it.

    Hann windows of 25 ms every 10 ms, 80 Mel bands, logarithm to base 10, down to 8 below the greatest value, scaled to about
    -1 to 1 (``log_mel_spectrogram`` of Whisper).
    """
    hop = SAMPLE_RATE // 100
    silence = min(400, frames * hop - len(sound))  # in which the last window that hears anything ends
    bands = _power(np.pad(sound, (0, silence)), 400, "hann", "reflect") @ _filters(SAMPLE_RATE, 400, 80, 0.0)
    heard = min(frames, (len(sound) + 200) // hop + 1)
    x = np.full((frames, 80), 1e-10, np.float32)
    x[:heard] = np.maximum(bands[:heard], 1e-10)
    x = np.log10(x)
    return ((np.maximum(x, x.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


FRONT_ENDS = {"published": (published, 40), "authors": (authors, 128)}  # name -> (function, number of Mel bands)
