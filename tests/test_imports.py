"""Rooms use only what they may, data knows no JAX, the method no files, and the package no configuration file."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "conclugen_jax"
ROOMS = [
    *("errors", "system", "data", "method", "runs", "train", "evaluate", "pretrain", "study", "extract"),
    *("pipeline", "commands"),
]
"""A room uses rooms that stand before it, and of those only the ones that MAY names."""
MAY = {
    "errors": set(),
    "system": {"errors"},
    "data": {"errors", "system"},
    "method": {"errors"},
    "runs": {"errors", "system", "data", "method"},
    "train": {"errors", "system", "data", "method", "runs"},
    "evaluate": {"errors", "system", "data", "method", "runs", "train"},
    "pretrain": {"errors", "system", "data", "method", "runs", "train", "evaluate"},
    "study": {"errors", "system", "data", "method", "runs", "train", "evaluate", "pretrain"},
    "extract": {"errors", "system", "data", "runs", "evaluate"},
    "pipeline": set(ROOMS[:-2]),
    "commands": set(ROOMS),
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"))


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module):
    """Of ``conclugen_jax.data.shards`` it is ``data``; of a module of others ``None``."""
    parts = module.split(".")
    return parts[1] if parts[0] == "conclugen_jax" and len(parts) > 1 else None


def imports(path):
    """Full names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_rooms_are_ordered():
    assert list(MAY) == ROOMS
    assert {name_of(path).split(".")[0] for path in MODULES} == set(ROOMS)
    for i, room in enumerate(ROOMS):
        assert room == "commands" or MAY[room] <= set(ROOMS[:i])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_uses_what_it_may(path):
    room = name_of(path).split(".")[0]
    for module in imports(path):
        other = room_of(module)
        if other in ROOMS:
            assert other == room or other in MAY[room], f"{name_of(path)} imports {module}"


def test_no_circles():
    used = {name_of(path).removesuffix(".__init__"): set() for path in MODULES}
    for path in MODULES:
        own = name_of(path).removesuffix(".__init__")
        if path.name != "__init__.py":
            used[own] = {m.removeprefix("conclugen_jax.") for m in imports(path)} & set(used) - {own}
    while free := {name for name, others in used.items() if not others}:
        used = {name: others - free for name, others in used.items() if name not in free}
    assert not used, f"circle among {sorted(used)}"


def test_boundaries():
    for path in MODULES:
        own, roots = name_of(path), {module.split(".")[0] for module in imports(path)}
        assert not roots & {"launch", "tests", "tensorflow", "clu"}, own
        assert "configs" not in roots, f"{own}: the package never imports a configuration file"
        if own.startswith("data."):
            assert not roots & {"jax", "flax", "optax", "orbax"}, own
        if own in ("method.losses", "method.clustering", "method.similarity", "evaluate.metrics"):
            assert "flax" not in roots, own
        if own.startswith("method."):
            assert not roots & {"pathlib", "os", "io", "json"}, f"{own}: the method knows no files"
        if own != "train.parallel":
            assert "pmap" not in path.read_text(), f"{own}: pmap belongs to train/parallel.py"


def test_every_library_is_declared():
    """A library that comes along with another in the environment of the tests may be missing in a user's."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    optional = [x for name, x in project["optional-dependencies"].items() if name not in ("test", "parity")]
    declared = {re.split(r"[^\w.-]", line)[0] for line in itertools.chain(project["dependencies"], *optional)}
    declared = {name.lower().replace("-", "_") for name in declared}
    found = metadata.packages_distributions()
    for path in MODULES:
        for root in {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"conclugen_jax"}:
            names = {name.lower().replace("-", "_") for name in found.get(root, [root])}
            assert names & declared or root == "sqlalchemy", f"{name_of(path)}: {root} is not declared"  # Optuna's own


def test_reading_data_loads_neither_jax_nor_tensorflow():
    code = (
        "import sys; import conclugen_jax.data.batches, conclugen_jax.data.digits\n"
        "sys.exit(', '.join({'jax', 'flax', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
