"""What a type checker says of programs that use the public names."""

import re
import subprocess
import sys

import pytest

PROGRAM = """
import jax
import numpy as np
from conclugen_jax import ConCluGen, clustering, downstream, losses, model, notebook, optimizer, pretrain, probe, run

rows = jax.numpy.ones((4, 8))
reveal_type(losses.masked_margin_softmax(rows, rows, valid=rows[:, 0] > 0))
estimator = ConCluGen(random_state=1).fit({"video": np.ones((4, 8))}, groups=[1, 1, 2, 2])
reveal_type(estimator.transform({"video": np.ones((4, 8))}))
reveal_type(run("clips", "folder", quick=True))
ConCluGen(random_stat=1)
run("clips", "folder", quick="yes", num_fold=3)
losses.info_nce(rows)
"""


@pytest.mark.slow
def test_types_of_public_names_are_known_and_mistakes_are_found(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--follow-imports=silent", "--ignore-missing-imports", f"--cache-dir={tmp_path}", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "program.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert re.findall(r"py:(\d+): note: Revealed type is \"([\w.]+)", said) == [
        ("7", "jax._src.basearray.Array"),
        ("9", "numpy.ndarray"),
        ("10", "tuple"),
    ]
    assert "fallback=conclugen_jax.pipeline.run.Outcome" in said
    assert re.findall(r"py:(\d+): error: .*\[([\w-]+)\]", said) == [
        ("11", "call-arg"),
        ("12", "call-arg"),
        ("12", "arg-type"),
        ("13", "call-arg"),
        ("13", "call-arg"),
    ]
