"""Imports go one way, data knows no JAX, numerics know no Flax, and the package never imports a configuration file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "conclugen_jax"
ORDER = [
    {"errors", "types", "locks", "signals"},
    {"processes", "data.sources", "data.pooling", "data.wire", "data.files"},
    {"data.digits", "data.manifest", "data.corpora", "data.index", "data.parquet", "data.pickles", "data.cells"},
    {"data.features", "data.folders", "data.combined"},
    {"data.annotations", "data.place", "data.mmsa", "data.records", "data.tallies"},
    {"data.csd"},
    {"data.workers", "data.findings", "data.requests", "data.joined"},
    {"data.tables", "data.authors", "data.corpus_csd"},
    {"data.formats"},
    {"data.builders"},
    {"data.shards", "data.scan"},
    {"data.host_table", "data.inspection", "data.inspection_view"},
    {"data.batches"},
    {"parallel"},
    {"similarity", "optimizer", "views"},
    {"losses"},
    {"clustering", "metrics", "progress", "trackers"},
    {"model", "config"},
    {"train_state", "seals", "workdir"},
    {"checkpoint", "loop", "objective", "task"},
    {"memory", "sharded_update", "recorder"},
    {"probe", "feed"},
    {"encoder", "splits", "classifier", "notebook"},
    {"grid"},
    {"online_probe"},
    {"pretrain", "downstream"},
    {"doctor"},
    {"embedding", "exchange", "sweep", "search_space"},
    {
        "extract.media",
        "extract.convolution",
        "extract.text_encoder",
        "extract.mtcnn",
        "extract.subtitles",
        "extract.torch_files",
    },
    {"extract.resnet", "extract.davenet", "extract.mel", "extract.faces", "extract.augmentation", "extract.speech"},
    {"extract.clips", "extract.conversion"},
    {"extract.weights"},
    {"extract.backbones"},
    {"extract.allocation", "extract.averages", "extract.preparation", "extract.store"},
    {"extract.workers"},
    {"extract.extraction"},
    {"extract.prediction"},
    {"extract.tables", "extract.timeline"},
    {"search", "study_results"},
    {"study_runs"},
    {"study_work"},
    {"study"},
    {"report_svg", "report_published", "report_study"},
    {"report_map", "report_page", "report_tables"},
    {"report_figures"},
    {"report"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_way(path):
    own = name_of(path)
    assert own in LEVEL, f"{own}: give it a place in the order of imports"
    for module in imports(path):
        other = module.removeprefix("conclugen_jax.")
        if other in LEVEL and module != other:
            assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_boundaries():
    for path in MODULES:
        own, roots = name_of(path), {module.split(".")[0] for module in imports(path)}
        assert not roots & {"configs", "launch", "tests", "tensorflow", "pickle", "clu"}, own
        if own.startswith("data."):
            assert not roots & {"jax", "flax", "optax", "orbax"}, own
        if not own.startswith("extract."):
            assert not any("extract" in module.split(".") for module in imports(path)), f"{own}: extraction is an extra"
        if own in ("losses", "clustering", "metrics"):
            assert "flax" not in roots, own
        if own != "parallel":
            assert "pmap" not in path.read_text(), f"{own}: pmap belongs to parallel.py"


def test_reading_data_loads_neither_jax_nor_tensorflow():
    code = (
        "import sys; import conclugen_jax.data.batches, conclugen_jax.data.digits\n"
        "sys.exit(', '.join({'jax', 'flax', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
