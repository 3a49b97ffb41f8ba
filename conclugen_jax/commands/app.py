"""What every launcher shares: flags with helpful errors, --help with all configuration keys, exit codes."""

import difflib
import runpy
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import processes, signals

FLAGS = flags.FLAGS
_of_run = True
_positional: list[str] | None = None
_borrowed: dict[str, str] = {}
BASE_CONFIG = Path(__file__).parents[2] / "configs" / "base.py"


def define_config(*, of_run: bool = True) -> None:
    """The flag --config=FILE, whose keys --config.KEY=VALUE override.

    Args:
      of_run: it is the configuration of a run, with the keys of ``configs/base.py``; else it declares its own keys.
    """
    global _of_run
    _of_run = of_run
    config_flags.DEFINE_config_file(
        "config", None, "Configuration file; override a key with --config.SECTION.KEY=VALUE", lock_config=True
    )


def define_positional() -> list[str]:
    """The arguments that are no flags, in a list that is filled when the command line is read; else they are refused."""
    global _positional
    _positional = []
    return _positional


def borrow(**meanings: str) -> None:
    """Flags of another launcher that this one takes as well: what --help says of each, empty for what that one says."""
    _borrowed.update(meanings)


def run(main: Callable[[], None]) -> None:
    """Parse flags and call ``main``.

    A mistake of the user ends in one sentence on standard error and exit code 2; --help explains everything and
    exits with 0. Of several processes all end with the one that fails.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is not None:  # which it is where a shell closed it
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what the terminal's encoding lacks
    try:
        if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
            print(_help(main))
            return
        _parse(sys.argv)
        main()
        processes.leave()
    except signals.Interrupted:
        processes.leave()
        raise
    except ConclugenError as e:
        _fail(e)
    except OSError as e:
        _fail(f"{e.filename or 'input or output'}: {e.strerror or e}")
    except KeyboardInterrupt:
        processes.fail("interrupted", 130)
        sys.exit(130)
    except Exception as e:
        # by name, so that launchers that need no JAX do not load it
        if type(e).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(e):
            if processes.several():
                time.sleep(2)  # where another process is the cause, its sentence comes and ends this one
                traceback.print_exc()
                processes.fail(f"{type(e).__name__}: {_first_line(e)}", 1)
            raise
        _fail(f"out of memory ({_first_line(e)}); lower config.train.batch_size or the sizes in config.model")


def required(name: str) -> str:
    """Value of a flag that must be given."""
    value = FLAGS[name].value
    if value in (None, ""):
        raise ConclugenError(f"--{name} is missing; see --help")
    return value


def config():
    """The configuration with the command line's overrides."""
    if FLAGS["config"].value is None:
        raise ConclugenError("--config is missing; name a configuration file such as --config=configs/demo.py")
    return FLAGS.config


def _underscored(arg: str) -> str:
    """``--num-views=10`` as ``--num_views=10``, where there is such a flag."""
    name, equals, value = arg.partition("=")
    known = name.startswith("--") and name[2:].replace("-", "_") in FLAGS
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if known else arg


def _refuse_repeated(argv: list[str]) -> None:
    """A flag that takes a list would silently keep the last one."""
    names = Counter(arg[2:].partition("=")[0] for arg in argv if arg.startswith("--"))
    for name, n in names.items():
        if n > 1 and name in FLAGS and isinstance(FLAGS[name].parser, flags.ListParser):
            raise ConclugenError(f"--{name} is there {n} times; write it once, several values as --{name}=A,B")


def _parse(argv: list[str]) -> None:
    end = argv.index("--") if "--" in argv else len(argv)  # what follows are names
    argv = [*map(_underscored, argv[:end]), *argv[end:]]
    _refuse_repeated(argv[:end])
    path = _config_path(argv)
    if path is not None and not Path(path).is_file():
        raise ConclugenError(f"--config={path}: no such file; name a configuration file such as configs/demo.py")
    if path is not None and "config" in FLAGS:
        _load(argv)
    elif any(arg.startswith("--config.") for arg in argv) and "config" in FLAGS:
        raise ConclugenError("--config is missing; name a configuration file such as --config=configs/demo.py")
    try:
        rest = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as e:
        raise ConclugenError(f"{_first_line(e)}; see --help") from e
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as e:
        if path is None:
            raise ConclugenError(f"{_first_line(e)}; see --help") from e
        raise ConclugenError(_explain_override(argv, e)) from e
    if _positional is not None:
        _positional.extend(rest)
    elif rest:
        raise ConclugenError(f"{rest[0]!r} is not a flag; write --flag=value, see --help")


def _config_path(argv: list[str]) -> str | None:
    """Value of --config on a command line, if it is there."""
    path = None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            path = value if equals else following
    return path


def _explain_override(argv: list[str], error: Exception) -> str:
    """Which --config.KEY of the command line is to blame for an exception of ml_collections, and what it should be."""
    known = dict(_keys(_load(argv)))
    for arg in argv:
        key, _, value = arg.lstrip("-").partition("=")
        if not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"config.{key} is not a configuration key{hint} (all keys: --help)"
        if repr(value) in str(error) or value in str(error) or key in str(error):
            return f"config.{key}={value}: expected a value like {known[key]!r} ({type(known[key]).__name__})"
    return f"the command line cannot be used ({_first_line(error)}); see --help"


def _load(argv: list[str]):
    """The configuration of the file that a command line names, without overrides."""
    path = _config_path(argv)
    if path is None:
        raise ConclugenError("--config is missing; name a configuration file such as --config=configs/demo.py")
    try:
        config = runpy.run_path(path)["get_config"]()
        keys = set(dict(_keys(config)))
        known = set(dict(_keys(runpy.run_path(str(BASE_CONFIG))["get_config"]()))) if _of_run else keys
    except (Exception, SystemExit) as e:
        raise ConclugenError(
            f"--config={path}: cannot be loaded ({type(e).__name__}: {_first_line(e)}); it must define get_config(), see "
            "configs/demo.py"
        ) from e
    if keys != known:
        wrong = [f"lacks config.{k}" for k in sorted(known - keys)] + [
            f"has config.{k}, unknown to configs/base.py" for k in keys - known
        ]
        raise ConclugenError(f"--config={path}: {wrong[0]}; start from configs/base.py and override its keys")
    return config


def _keys(config, prefix: str = ""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _help(main: Callable[[], None]) -> str:
    module = sys.modules[main.__module__]
    lines = [module.__doc__.strip(), "", "Flags:"]
    own = FLAGS.get_flags_for_module(module) + (
        FLAGS.get_flags_for_module(sys.modules[__name__]) if "config" in FLAGS else []
    )
    lines += [f"  --{name}  {meaning or FLAGS[name].help}" for name, meaning in _borrowed.items()]
    lines += [f"  --{flag.name}  {flag.help}" for flag in own]
    if "config" in FLAGS and _of_run:
        body = BASE_CONFIG.read_text(encoding="utf-8").split("config = ConfigDict()\n")[1].split("return")[0]
        keys = [line.strip() for line in body.splitlines() if "#" in line]
        lines += [
            "",
            "Configuration keys with their defaults; override one with --config.SECTION.KEY=VALUE, a tuple as",
        ]
        lines += ["--config.data.modalities=\"('video','text')\":", ""]
        lines += [f"  {'' if key.startswith('config.') else 'config.'}{key}" for key in keys]
    return "\n".join(lines)


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fail(message: object) -> None:
    processes.fail(str(message), 2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
