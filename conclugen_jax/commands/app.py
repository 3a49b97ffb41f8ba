"""Shared by all commands: flags and configuration of a command line, ``--help``, tables, errors and exit codes.

A module of a command has ``command``, its :class:`Command`, and ``main()``, which does the work once the command line is
parsed and may return an exit code. It imports what needs JAX in ``main``, so that ``--help`` and a mistake in the flags take no
seconds. Each command has flags of its own, so a process may run any number of commands.
"""

import contextlib
import copy
import difflib
import functools
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from conclugen_jax.commands.names import COMMANDS, HELP, find
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.runs import configuration_files
from conclugen_jax.system import environment, processes, signals

# Short flag -> key of the configuration of pretraining; other commands add to it.
OF_PRETRAINING = {"data": "data.path", "batch_size": "train.batch_size"}
MIN_WIDTH = 40  # columns that texts are wrapped to at least
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # module -> the package that holds it, if named otherwise


class Command:
    """The flags of a command and, once :meth:`parse` was called, what a command line gave.

    Args:
      config: ``run`` or ``study``: what kind of configuration it takes, by ``--config``; empty: none.
      default: configuration to use if none is given.
      short: short flags -> key of the configuration.
      words: description of the arguments that are not flags; empty if the command takes none.
      refuse: flag of a similar command -> why this one does not take it.
      jax: whether it needs JAX.

    Attributes:
      flags: values of the flags, ``flags.NAME``; ``words``: the arguments that are no flags.
      config, config_name: the configuration, and its file's name without the ending.
      config_arguments: the arguments that give the configuration again, with its overrides; ``config_given``: the one
      that was named, empty: none; ``changes``: the overrides, keys with their values as text.
    """

    def __init__(
        self,
        *,
        config: str = "",
        default: str = "",
        short: Mapping[str, str] | None = None,
        words: str = "",
        refuse: Mapping[str, str] | None = None,
        jax: bool = True,
    ):
        self.flags = flags.FlagValues()
        self.flags.set_gnu_getopt()
        self.short, self._takes_words, self._kind, self._refused = dict(short or {}), words, config, dict(refuse or {})
        self.jax, self._default = jax, default
        self.words: list[str] = []
        self.config: ConfigDict | None = None
        self.config_name, self.config_arguments, self.config_given = "", [], ""
        self.changes: list[tuple[str, str]] = []
        for kind in ("string", "integer", "float", "bool", "enum", "list", "multi_string"):
            setattr(self, kind, functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=self.flags))

    def borrow(self, other: "Command", **helps: str) -> None:
        """Also accept flags of another command; ``NAME=HELP``, where an empty help keeps the text of that command."""
        for name, text in helps.items():
            flag = copy.deepcopy(other.flags[name])
            flag.help = text or flag.help
            flags.DEFINE_flag(flag, self.flags)

    def distribute(self) -> None:
        """Take the flags of a command that several processes may share; it calls :meth:`join` first."""
        self.enum(
            "distributed",
            "off",
            ["off", "auto"],
            "auto: join the other processes that the cluster or JAX_* variables name",
        )
        wait = "Seconds for all processes to start, and until a silent one counts as gone"
        self.float("distributed_timeout", 60.0, wait, lower_bound=1, upper_bound=86400)

    def join(self) -> None:
        """Join the other processes, if the flags say so; say it if variables name some and the flags do not."""
        if self.flags.distributed == "auto":
            processes.start(self.flags.distributed_timeout)
        elif (count := os.environ.get(processes.COUNT, "1")) != "1":
            fact = f"{processes.COUNT}={count} is ignored: this process works alone, without --distributed=auto"
            print(f"warning: {fact}", file=sys.stderr)

    def required(self, name: str) -> Any:
        """Return the value of a flag that must be given."""
        value = self.flags[name].value
        if value in (None, ""):
            raise ConclugenError(f"--{name} is missing; see --help")
        return value

    def values(self, *names: str) -> dict[str, Any]:
        """Return some flags as keyword arguments of the same names."""
        return {name: self.flags[name].value for name in names}

    def parse(self, argv: Sequence[str]) -> None:
        """Read a command line without the name of the command."""
        for name in self.flags:
            self.flags[name].unparse()
        rest, settings = self._split(argv)
        try:
            self.words = self.flags(["conclugen", *rest])[1:]
        except flags.UnrecognizedFlagError as e:
            near = difflib.get_close_matches(e.flagname, self.described(), n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise ConclugenError(f"Unknown command line flag {e.flagname!r}; {hint}") from e
        except (flags.Error, ValueError) as e:
            raise ConclugenError(f"{reason(e)}; see --help") from e
        for name in self.flags:
            values = self.flags[name].value
            if isinstance(values, list) and (twice := [x for i, x in enumerate(values) if x in values[:i]]):
                raise ConclugenError(f"--{name}: {twice[0]!r} is there twice; name it once")
        if self.words and not self._takes_words:
            raise ConclugenError(f"{self.words[0]!r} is not a flag; write --flag=value, see --help")
        if self._kind:
            self._configure(settings)

    def help(self, name: str, doc: str, argv: Sequence[str] = ()) -> str:
        """Return the page that ``conclugen NAME --help`` prints, with the values of a configuration that is given."""
        described = self.described()
        _, settings = self._split([arg for arg in argv if arg not in HELP])
        if self._kind == "run" and "" in dict(settings):
            self._configure(settings)
            usual = dict(configuration_files.flatten(configuration_files.base()))
            for key, value in configuration_files.flatten(self.config):
                if value != usual[key]:
                    meaning = described[f"config.{key}"].partition("  # ")[2]
                    described[f"config.{key}"] = f"{value!r}  # {meaning}"
        keys = {flag: text for flag, text in described.items() if flag.startswith("config.")}
        own = [f"  --{flag}  {text}" for flag, text in described.items() if flag not in keys]
        lines = [f"conclugen {name}: {doc.strip()}", "", "Flags:", *own]
        if keys:
            lines += [
                "",
                "Configuration keys with their defaults; override one with --config.SECTION.KEY=VALUE, a list as",
                "--config.data.modalities=video,text:",
                "",
                *(f"  {key} = {text}" for key, text in keys.items()),
            ]
        return "\n".join(lines)

    def described(self) -> dict[str, str]:
        """Return all flags, those of the configuration as ``config.KEY``: flag -> its help."""
        found = {flag: self.flags[flag].help for flag in self.flags}
        if self._kind:
            found = {"config": "Name of a configuration (conclugen configs), or file that defines get_config()"} | found
        found |= {short: f"Short for --config.{key}" for short, key in self.short.items()}
        if self._kind == "run":
            found |= dict(line.split(" = ", 1) for line in configuration_files.described_keys())
        return found

    def _split(self, argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Split a command line into flags and words, and what sets the configuration: (key, value), the key of a file empty.

        ``--num-views=10`` becomes ``--num_views=10``, where there is such a flag. Flags of similar commands are refused, and
        a list that is there twice: the last one alone would count.
        """
        rest, settings, seen, unread = [], [], set(), list(argv)
        while unread:
            arg = unread.pop(0)
            if arg == "--":  # what follows are names
                return [*rest, arg, *unread], settings
            if not arg.startswith("-"):
                rest.append(arg)
                continue
            name, equals, value = arg.lstrip("-").partition("=")
            known = name.replace("-", "_")
            if {known, known.removeprefix("no")} & {*self.flags, *self.short}:
                name, arg = known, f"--{known}{equals}{value}"
            if name in self._refused:
                raise ConclugenError(f"--{name} {self._refused[name]}")
            if name in seen and name in self.flags and isinstance(self.flags[name].parser, flags.ListParser):
                raise ConclugenError(f"--{name} is there twice; write it once, several values as --{name}=A,B")
            seen.add(name)
            if not self._kind or not (name in self.short or name.partition(".")[0] == "config"):
                rest.append(arg)
                continue
            if not equals:  # the value follows; a switch may be without
                value = unread.pop(0) if unread and not unread[0].startswith("--") else "true"
            settings.append((self.short.get(name, name.removeprefix("config").removeprefix(".")), value))
        return rest, settings

    def _configure(self, settings: Sequence[tuple[str, str]]) -> None:
        given = dict(settings).get("", self._default)
        if not given:
            raise ConclugenError("--config is missing; name a configuration, such as --config=demo (conclugen configs)")
        self.config = configuration_files.load(given, of_run=self._kind == "run")
        path, arguments = configuration_files.find(given)
        self.config_name = "_".join((path.stem, *arguments))
        self.config_given, self.changes = dict(settings).get("", ""), [(key, value) for key, value in settings if key]
        for key, value in self.changes:
            configuration_files.override(self.config, key, value)
        self.config_arguments = [f"--config={given}", *(f"--config.{key}={value}" for key, value in self.changes)]


def choose_engine(command: Command) -> None:
    """Give a command the flags that say where its processes run."""
    where = "local: processes of this machine (default); ray: of a Ray cluster"
    command.enum("engine", "local", ("local", "ray"), where)
    address = "HOST:PORT of the head of a Ray cluster, or auto; default: one node is started on this machine"
    command.string("ray_address", None, address)


@contextlib.contextmanager
def engine(command: Command) -> Iterator[Any]:
    """Provide the engine that the flags of :func:`choose_engine` name."""
    name, address = command.flags.engine, command.flags.ray_address
    if address and name == "local":
        raise ConclugenError(f"--ray_address={address} is for --engine=ray; add that, or leave the address out")
    from conclugen_jax.system import engines  # late, as most commands need none

    if name == "local":
        environment.refuse_missing_devices()
        yield engines.Engine()
        return
    from conclugen_jax.system import on_ray

    with on_ray.connected(address) as ray:
        yield ray


def refuse_downstream(name: str) -> None:
    """Refuse the name of a configuration that is for ``conclugen downstream``, where pretraining is asked for."""
    if name in ("linear_evaluation", "fine_tuning", "supervised"):
        way_out = "name a method, such as --config=conclugen, or run conclugen downstream"
        raise ConclugenError(f"--config={name} trains classifiers, it has nothing of pretraining; {way_out}")


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], *, wide: int = 0, **titles: str) -> None:
    """Print a table, with an optional ``title`` and ``caption``; one column is ``wide``: it has text and may be wrapped."""
    from rich.cells import cell_len
    from rich.table import Table

    table, rows = Table(**titles), list(rows)
    for i, name in enumerate(columns):
        width = max(cell_len(row[i]) for row in ((name,) * len(columns), *rows))
        look = {"overflow": "fold"} if i == wide else {"no_wrap": True, "justify": "right", "min_width": width}
        table.add_column(name, **look)
    for row in rows:
        table.add_row(*row)
    draw(table)


def draw(*parts: Any) -> None:
    """Print tables and texts of ``rich``, wider than a narrow terminal where they would be cut off."""
    from rich.console import Console

    console = Console(highlight=False)
    least = max(Console(width=1000).measure(part).minimum for part in parts)
    console.width = max(console.width, least, MIN_WIDTH)
    for part in parts:
        console.print(part)


def run(name: str, argv: Sequence[str]) -> NoReturn:
    """Run a command as this process, and end with its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is not None:  # which it is where a shell closed it
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what the terminal's encoding lacks
    sys.exit(call(name, argv))


def call(name: str, argv: Sequence[str] = ()) -> int:
    """Run a command in this process, any number of times; return its exit code, see :func:`guarded`."""

    def work() -> int | None:
        module = load(name)
        if HELP & set(argv):
            return print(
                module.command.help(name, module.__doc__ or COMMANDS[find(name)], argv)
            )  # no docstrings: python -OO
        environment.prepare(with_jax=module.command.jax)
        module.command.parse(argv)
        for note in environment.changes():
            print(f"warning: {note}", file=sys.stderr)
        return module.main()

    return guarded(work, name)


def guarded(work: Callable[[], int | None], name: str = "this command") -> int:
    """Call a function, and turn what it raises into one sentence on standard error and an exit code.

    The exit code is 2 for a mistake of the user, and 128 + its number for a signal. If one of several processes of a run
    fails, all end. Other errors are raised.
    """
    try:
        code = work() or 0
        processes.leave()
        return code
    except signals.Interrupted as e:
        processes.leave()
        return e.code
    except SystemExit as e:
        return e.code
    except ModuleNotFoundError as e:
        if not e.name or e.name.startswith("conclugen_jax"):
            raise
        return _fail(f"{name} needs {e.name}, which is not installed; {_way_to(e.name, name)}")
    except ConclugenError as e:
        return _fail(e)
    except BrokenPipeError:  # the reader has ended, as in ``conclugen COMMAND | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        return _fail(f"{e.filename or 'input or output'}: {e.strerror or e}")
    except KeyboardInterrupt:
        processes.fail("interrupted", 130)
        return 130
    except Exception as e:
        if sentence := environment.fault(e):
            return _fail(sentence)
        # by name, so that commands that need no JAX do not load it
        if type(e).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(e):
            return _fail(f"out of memory ({reason(e)}); lower config.train.batch_size or the sizes in config.model")
        if processes.several():
            time.sleep(2)  # where another process is the cause, its sentence comes and ends this one
            traceback.print_exc()
            processes.fail(f"{type(e).__name__}: {reason(e)}", 1)
        raise


def load(name: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"conclugen_jax.commands.{find(name)}")


def _way_to(module: str, command: str) -> str:
    """Return how to install a package: by the extra that includes it, first the one named like the command."""
    package = module.partition(".")[0]
    package = DISTRIBUTIONS.get(package, package.replace("_", "-"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        lines = "\n".join(metadata.requires("conclugen_jax") or [])
        extras = re.findall(rf"(?im)^{re.escape(package)}(?![\w-]).*extra == ['\"]([\w-]+)", lines)
        if extras:
            return f"pip install 'conclugen_jax[{command if command in extras else extras[0]}]'"
    return f"pip install {package}"


def _fail(message: object) -> int:
    processes.fail(str(message), 2)
    print(f"error: {message}", file=sys.stderr)
    return 2
