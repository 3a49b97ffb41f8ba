"""Small backbones for tests: they need no weights, and their vectors say which frames, sound and words they saw."""

import numpy as np

from conclugen_jax.extract.backbones import Backbone


def _frames(clip, view):
    frames = clip.at_rate(2.0)
    if not frames:
        return None
    items = np.stack([np.array([f[:, : f.shape[1] // 4].mean(), f.mean(), 0.0], np.float32) for f in frames])
    items[:, 2] = 0 if view is None else view.generator("video").random()
    return (items,)


def pictures():
    """[grey of the left quarter, mean, the view's number]."""
    return Backbone("pictures", "video", 3, _frames, lambda x: x, rate=4.0, batch_size=4, provenance={"version": 1})


def _sound(clip, view):
    if clip.sound is None:
        return None
    return (np.array([[np.abs(clip.sound).max(), len(clip.sound) / 16_000]], np.float32),)


def loudness():
    """[peak, seconds]."""
    return Backbone("loudness", "audio", 2, _sound, lambda x: x)


def _words(clip, view):
    if not clip.text:
        return None
    return (np.array([[len(clip.text.split()), len(clip.text)]], np.float32),)


def words():
    """[words, letters]."""
    return Backbone("words", "text", 2, _words, lambda x: x)


def _crash(clip, view):
    import os

    if clip.text and "crash" in clip.text:
        os._exit(11)
    return _words(clip, view)


def crashing():
    """Ends its process at a word."""
    return Backbone("words", "text", 2, _crash, lambda x: x)


def not_finite():
    """Vectors that are no numbers."""
    return Backbone("bad", "text", 2, _words, lambda x: x * np.nan)


def not_finite_for_one():
    """Vectors that are no numbers where one word is said."""
    return Backbone("words", "text", 2, _words, lambda x: np.where(x[:, :1] == 1, np.inf, x))


def _brightness(clip, view):
    return (np.array([[frame.mean()] for frame in clip.at_rate(2.0)], np.float32),) if clip.frames else None


def brightness():
    """[mean of the pictures], of a modality that only it knows."""
    return Backbone("brightness", "light", 1, _brightness, lambda x: x, rate=2.0)


def peak():
    """[peak, seconds], of a modality that only it knows."""
    return Backbone("peak", "noise", 2, _sound, lambda x: x)


def words_of_another_version():
    """As :func:`words`, but for what it says of itself."""
    return Backbone("words", "text", 2, _words, lambda x: x, provenance={"version": 2})


def other_size():
    """Vectors of another size than it says."""
    return Backbone("other", "text", 3, _words, lambda x: x)


def _oops(clip, view):
    if clip.text and "oops" in clip.text:
        raise KeyError("oops")
    return _words(clip, view)


def failing_to_prepare():
    """Its first function raises at a word."""
    return Backbone("words", "text", 2, _oops, lambda x: x)


def _oops_until_mended(clip, view):
    import os

    return (_words if os.environ.get("MENDED") else _oops)(clip, view)


def failing_at_first():
    """Its first function raises at a word until something outside is mended."""
    return Backbone("words", "text", 2, _oops_until_mended, lambda x: x)


def failing():
    """Its second function raises."""
    return Backbone("words", "text", 2, _words, lambda x: np.concatenate([x, x[:, :, None]]))


def raising():
    """No backbone is made."""
    raise RuntimeError("not today")


def _long_enough(clip, view):
    return _frames(clip, view) if len(clip.frames) > 1 else None


def movement():
    """Joined with :func:`pictures`; a clip of one frame has none."""
    return Backbone("movement", "video", 3, _long_enough, lambda x: x, rate=4.0)


def _odd(clip, view):
    kinds = {"empty": (np.zeros((0, 2), np.float32),), "uneven": (np.zeros((2, 2)), np.zeros((3, 2))), "list": [1, 2]}
    return kinds.get(clip.text, _words(clip, view))


def odd_items():
    """What its first function gives at some words are no items."""
    return Backbone("words", "text", 2, _odd, lambda *x: x[0])


def leaving() -> Backbone:
    """End the process instead of making a backbone."""
    raise SystemExit(0)


def nested() -> Backbone:
    """Make a backbone whose ``prepare`` other processes cannot import."""
    return Backbone("nested", "video", 1, lambda clip, view: None, np.asarray)
