"""Configuration files: found by name or path, loaded once, and overridden key by key."""

import ast
import functools
import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl.flags import ArgumentParser, BooleanParser, FloatParser, IntegerParser
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError, did_you_mean, place_of, reason
from conclugen_jax.system import environment

PACKAGE = Path(__file__).parents[1]
FOLDER = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
"""The shipped configurations: inside an installed package, or at the top of a checkout."""
KINDS = {bool: BooleanParser(), int: IntegerParser(), float: FloatParser(), str: ArgumentParser()}
"""Type of a key -> what reads its value on a command line; tuples: :func:`_tuple`."""
LISTS = {
    "sweep.learning_rates": "optimizer.learning_rate",
    "sweep.weight_decays": "optimizer.weight_decay",
    "sweep.seeds": "seed",
    "sweep.labels_per_class": "downstream.labels_per_class",
    "sweep.label_draws": "downstream.label_draw",
    "online_probe.learning_rates": "optimizer.learning_rate",
    "evaluation.self_training": "evaluation.smoothing_share",
}
"""Key of a list of numbers -> key of one such number; other lists are of words."""
LISTS_OF_STUDY = {"seeds": "seed", "labels.*": "downstream.labels_per_class"}
OF_STUDY = {
    **dict.fromkeys(("methods", "methods.*", "methods.*.pretraining", "methods.*.evaluation", "labels"), ConfigDict()),
    **dict.fromkeys(("datasets", "datasets.*", "datasets.*.protocols", "datasets.*.protocols.*"), ConfigDict()),
    **dict.fromkeys(("methods.*.title", "methods.*.uses", "datasets.*.path"), ""),
    **dict.fromkeys(("methods.*.modalities", "labels.*"), ()),
}
"""Keys of studies, besides those of ``configs/study_base.py`` -> a value of their type; ``*``: any name."""
EVALUATION_OF_STUDY = re.compile(r"methods\.[^.]+\.(?=evaluation\.)")
RUN_OF_STUDY = re.compile(r"(methods\.[^.]+\.pretraining|datasets\.[^.]+\.protocols\.[^.]+)\.")


def names() -> dict[str, str]:
    """Return the shipped configurations: name -> first line of their docstring."""
    files = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def find(given: str) -> tuple[Path, tuple[str, ...]]:
    """Return the file of a configuration that is given by name or path, and the arguments of its ``get_config``.

    There is one in ``NAME:ARGUMENT``. Others are refused, with the names there are.
    """
    path = Path(given)
    if path.is_file():
        return path, ()
    given, _, argument = given.partition(":")
    path = Path(given)
    named = FOLDER / f"{given.replace('-', '_')}.py"
    if path.name == given and named.is_file():
        return named, (argument,) * bool(argument)
    hint = f"{did_you_mean(given, names())} (there are {', '.join(names())}: conclugen configs)"
    raise ConclugenError(f"--config={given}: no such file, nor a name of a configuration{hint}")


def load(given: str, *, of_run: bool) -> ConfigDict:
    """Load a configuration by name or path, locked, of a run or of a study.

    The keys of a run, and of each run in a study, must be exactly those of ``configs/base.py``.
    """
    path, arguments = find(given)
    make_importable()
    try:
        config = runpy.run_path(str(path))["get_config"](*arguments)
        keys = set(dict(flatten(config)))
    except ConclugenError as e:
        raise ConclugenError(f"--config={given}: {e}") from e
    except (Exception, SystemExit) as e:  # whatever the user's code raises
        if sentence := environment.fault(e):
            raise ConclugenError(sentence) from e
        if key := re.match(r"""(?s)\W*(?:Key )?["'\\]+(\w+)["'\\](.*(is locked|Did you mean)|["']$)""", str(e)):
            hint = did_you_mean(key[1], {part for key in defaults() for part in key.split(".")})
            raise ConclugenError(f"--config={given}: {key[1]} is not a configuration key{hint} ({place_of(e)})") from e
        raise ConclugenError(
            f"--config={given}: cannot be loaded ({type(e).__name__}: {reason(e)}); it must define get_config(), see "
            "configs/demo.py"
        ) from e
    starts = {""} if of_run else {found[0] for key in keys if (found := RUN_OF_STUDY.match(key))}
    wrong = []
    for start in sorted(starts):
        own = {key.removeprefix(start) for key in keys if key.startswith(start)}
        wrong += [f"lacks config.{start}{key}" for key in sorted(defaults().keys() - own)]
        wrong += [f"has config.{start}{key}, unknown to configs/base.py" for key in sorted(own - defaults().keys())]
    if wrong:
        raise ConclugenError(f"--config={given}: {wrong[0]}; start from configs/base.py and override its keys")
    check_types(config, f"--config={given}: ")
    return config.lock()


def base() -> ConfigDict:
    """Return the configuration with every key of a run, at its default."""
    make_importable()
    return importlib.import_module("configs.base").get_config()


@functools.cache
def defaults() -> dict[str, Any]:
    """Return the default of every key of a run."""
    return dict(flatten(base()))


@functools.cache
def _defaults_of_study() -> dict[str, Any]:
    make_importable()
    return dict(flatten(importlib.import_module("configs.study_base").get_config())) | OF_STUDY


def check_types(config: Mapping[str, Any] | ConfigDict, where: str = "") -> None:
    """Refuse values of another type than their key's default has; ``where``, such as ``FILE: ``, begins the sentence."""
    for key, value in flatten(config):
        name, known = EVALUATION_OF_STUDY.sub("", RUN_OF_STUDY.sub("", key)), defaults()
        if name not in known:
            name, known = re.sub(r"(^methods|^datasets|^labels|\.protocols)\.[^.]+", r"\1.*", key), _defaults_of_study()
        default, one = known.get(name), defaults().get((LISTS | LISTS_OF_STUDY).get(name), "")
        right = _is_like(value, default) and (not isinstance(value, tuple) or all(_is_like(x, one) for x in value))
        if name in known and not right:
            kind = f"tuple of {type(one).__name__}" if isinstance(default, tuple) else type(default).__name__
            kind, such = ("a section", "") if hasattr(default, "items") else (kind, f" (such as {default!r})")
            raise ConclugenError(f"{where}config.{key} is {value!r}, expected {kind}{such}")


def _is_like(value: Any, default: Any) -> bool:
    kinds = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def make_importable() -> None:
    """Let configuration files import the shipped ones as ``from configs import base``, wherever these are installed."""
    if "configs" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "configs", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules["configs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["configs"])


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set ``SECTION.KEY`` to a value as it stands on a command line; refuse unknown keys and values of another type."""
    known = dict(flatten(config))
    if key not in known:
        hint = f"{did_you_mean(key, known, 'config.')} (all keys: --help)"
        raise ConclugenError(f"config.{key} is not a configuration key{hint}")
    default = known[key]
    try:
        value = _tuple(text) if isinstance(default, tuple) else KINDS[type(default)].parse(text)
    except ValueError as e:
        kind = type(default).__name__
        raise ConclugenError(f"config.{key}={text}: expected a value like {default!r} ({kind})") from e
    check_types({key: value})
    config.update_from_flattened_dict({key: value})


def _tuple(text: str) -> tuple:
    """Read ``video,text``, ``video``, ``1e-3,1e-2`` or a tuple of Python."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(word for word in (part.strip() for part in text.strip("()[] ").split(",")) if word)
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def flatten(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything that is no section."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def described_keys() -> list[str]:
    """Return the lines of ``configs/base.py`` that set a key: ``config.SECTION.KEY = DEFAULT  # meaning``."""
    text = (FOLDER / "base.py").read_text(encoding="utf-8")
    lines = re.findall(r"^ +(?:config\.)?(\w+(?:\.\w+)? = .* # .*)", text, re.MULTILINE)
    return [f"config.{line}" for line in lines]
