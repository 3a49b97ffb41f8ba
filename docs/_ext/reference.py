"""Pages written at each build: every command from its flags, every configuration key from ``configs/base.py``."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from sphinx.application import Sphinx

from conclugen_jax.commands import app as commands
from conclugen_jax.commands.names import GROUPS
from conclugen_jax.runs import config as config_lib, configuration_files

TYPES = {
    "int": "whole number",
    "float": "number",
    "string": "text",
    "bool": "switch",
    "comma separated list of strings": "list",
}


def write(app: Sphinx) -> None:
    """Write the pages below ``reference/``, those alone whose text changed."""
    folder = Path(app.srcdir, "reference")
    pages = {folder / "configuration.md": configuration()}
    index = ["# Commands", "", "`conclugen COMMAND --help` prints the same text in a terminal.", ""]
    for group, names in GROUPS.items():
        index += [f"## {group}", "", "| command | what it does |", "|---|---|"]
        index += [f"| [`{name}`]({name}.md) | {line} |" for name, line in names.items()] + [""]
        pages |= {folder / "commands" / f"{name}.md": command(name) for name in names}
    names = [name for group in GROUPS.values() for name in group]
    index += ["```{toctree}", ":hidden:", "", *names, "```", ""]
    pages[folder / "commands" / "index.md"] = "\n".join(index)
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def command(name: str) -> str:
    """Return the page of a command: its docstring, and a table of its flags."""
    module = commands.load(name)
    lines = [f"# conclugen {name}", "", *_paragraphs(inspect.cleandoc(module.__doc__)), "", "## Flags", ""]
    described = module.command.described()
    own = {flag: text for flag, text in described.items() if not flag.startswith("config.")}
    if own:
        lines += ["| flag | value | meaning |", "|---|---|---|"]
        lines += [f"| `--{flag}` | {_value(module, flag)} | {_cell(text)} |" for flag, text in own.items()]
    else:
        lines += ["It has none."]
    if len(own) < len(described):
        lines += [
            "",
            "Any [configuration key](../configuration.md) can be changed as well: `--config.SECTION.KEY=VALUE`.",
        ]
    return "\n".join([*lines, ""])


def configuration() -> str:
    """Return the page of all configuration keys, a table for each section."""
    tree = ast.parse((configuration_files.FOLDER / "base.py").read_text(encoding="utf-8"))
    docs = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    sections: dict[str, list[str]] = {}
    for line in configuration_files.described_keys():
        key, default, meaning = re.fullmatch(r"config\.(\S+) = (.*?)  # (.*)", line).groups()
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"| `{name}` | `{default}` | {_allowed(key)} | {_cell(meaning)} |")
    lines = [
        "# Configuration keys",
        "",
        "Every key of `configs/base.py`, with the paper's value as its default. A command line changes any of them, such as",
        "`--config.train.batch_size=512`; a list is written as `--config.data.modalities=video,text`.",
    ]
    for section, rows in sections.items():
        lines += ["", f"## {section or 'Top level'}", "", docs.get(section) or "Keys that belong to no section.", ""]
        lines += ["| key | default | allowed | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([*lines, ""])


def _allowed(key: str) -> str:
    """Return the values that a key may have."""
    value = configuration_files.defaults()[key]
    if key in config_lib.CHOICES:
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in config_lib.CHOICES[key])
    if isinstance(value, bool):
        return "`True`, `False`"
    if isinstance(value, (int, float)):
        least, most = config_lib.RANGES.get(key, config_lib.NOT_NEGATIVE)
        return f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
    if isinstance(value, tuple):
        return "list of numbers" if key in configuration_files.LISTS else "list of names"
    return "text"


def _value(module, flag: str) -> str:
    """Return the type of a flag's value, and its default."""
    if flag not in module.command.flags:  # of the configuration
        key = module.command.short.get(flag)
        return f"as [`{key}`](../configuration.md#{key.partition('.')[0]})" if key else "name or file"
    found = module.command.flags[flag]
    kind = TYPES.get(found.flag_type(), found.flag_type())
    if isinstance(found.parser, flags.EnumParser):
        kind = ", ".join(f"`{x}`" if x else "empty" for x in found.parser.enum_values)
    default = found.default
    return kind if default in (None, "", [], False) else f"{kind}; default `{_plain(default)}`"


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(text: str) -> str:
    """Escape what Markdown would take for markup in the cell of a table."""
    return re.sub(r"([|<*_\[\]~$`])", r"\\\1", text)


def _paragraphs(doc: str) -> Iterator[str]:
    """Yield the lines of a command's docstring as Markdown: lines of a shell become a block, the rest text."""
    for paragraph in doc.split("\n\n"):
        lines = paragraph.splitlines()
        if lines[0].startswith(("conclugen ", "python ", "    ", "  ")):
            yield from ("```", *lines, "```", "")
        else:
            yield from (*(_cell(line) for line in lines), "")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
