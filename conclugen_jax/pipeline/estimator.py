"""ConCluGen as a scikit-learn transformer: ``fit`` pretrains on rows in memory, ``transform`` returns representations."""

import functools
import io
import shutil
import signal
import tarfile
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from conclugen_jax import pretrain
from conclugen_jax.data import batches, builders, manifest as manifest_lib, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank as bank_lib, embedding
from conclugen_jax.pipeline import plan, rows as rows_lib, rules
from conclugen_jax.pipeline.rows import InputError
from conclugen_jax.runs import config as config_lib, workdir as workdir_lib
from conclugen_jax.system import files, progress, signals

AUTO = "auto"
KEYS = {
    "num_epochs": "train.num_epochs",
    "batch_size": "train.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "representation_dim": "model.representation_dim",
    "num_clusters": "clustering.num_clusters",
    "neighbours": "loss.neighbours",
    "smoothing_neighbours": "evaluation.smoothing_neighbours",
    "standardize": "data.standardize",
}
"""Maps each parameter to its key of the configuration."""
COLUMNS = "columns.json"
"""File in the folder of a run that maps modalities to columns of the rows."""
DATA = Path("data", rows_lib.NAME, rows_lib.VERSION)
"""Path of the data set, below the folder of a run."""
BATCH_ROWS = 1024  # as those of ``conclugen embed``


class ConCluGen(TransformerMixin, BaseEstimator):
    """Learn representations of rows of several modalities, without labels.

    ``X`` may be a dict that maps each modality to an array [n, dim]; a data frame (pandas, Polars) whose columns are named
    ``MODALITY_0``, ``MODALITY_1``, ..., or have the modality as first level; or an array [n, dims] with ``columns``. An array
    without ``columns`` is one modality. If all values of a modality are NaN in a row, the row lacks that modality.

    Args:
      config: ``auto`` chooses settings from the rows, as ``conclugen run`` does. Otherwise the name or file of a configuration,
        or a ConfigDict. If there are too few rows or epochs, ``fit`` lowers the batch size, the number of clusters and the
        epoch at which clustering starts, except where you set them. A single modality is contrasted with itself, in two views.
      num_epochs, batch_size, learning_rate, representation_dim, num_clusters, neighbours, smoothing_neighbours, standardize:
        keys of the configuration (:data:`KEYS`); ``None`` keeps the value of ``config``.
      overrides: values of further keys, such as ``{"loss.reconstruction_weight": 1.0}``.
      columns: maps each modality to the names or positions of its columns.
      random_state: seed of the run; a ``RandomState`` or ``None`` draws a seed.
      workdir: folder that keeps the run and lets ``fit`` resume it; ``None`` uses a temporary folder, which is deleted
        together with the estimator.
      verbose: whether to show progress.

    Attributes:
      run_: folder of the run, for ``conclugen embed`` and other commands.
      columns_: maps each modality to the positions of its columns.
      n_features_in_: number of columns seen during ``fit``.
      feature_names_in_: names of these columns; only if all names are strings.
    """

    def __init__(
        self,
        config: Any = AUTO,
        *,
        num_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        representation_dim: int | None = None,
        num_clusters: int | None = None,
        neighbours: int | None = None,
        smoothing_neighbours: int | None = None,
        standardize: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        random_state: Any = 0,
        workdir: str | Path | None = None,
        verbose: bool = False,
    ):
        self.config = config
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.representation_dim = representation_dim
        self.num_clusters = num_clusters
        self.neighbours = neighbours
        self.smoothing_neighbours = smoothing_neighbours
        self.standardize = standardize
        self.overrides = overrides
        self.columns = columns
        self.random_state = random_state
        self.workdir = workdir
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, groups: Sequence[Any] | None = None) -> "ConCluGen":
        """Pretrain on the rows, on the first device.

        Args:
          X: rows; see the class.
          y: ignored.
          groups: the person of each row [n]. Rows of one person are never neighbours of each other. With
            ``standardize="person"`` they are standardised together.

        Returns:
          The fitted estimator.

        Raises:
          ConclugenError: the rows or settings cannot be used, or ``workdir`` holds a run on other rows.
        """
        matrix = self._matrix(X, fresh=True)
        groups = rows_lib.group_names(groups, len(matrix))
        source = rows_lib.Rows(*rows_lib.by_modality(matrix, self.columns_), groups)
        scratch = _Scratch() if self.workdir is None else None
        folder = scratch.path if scratch else Path(self.workdir).absolute()
        data = folder / DATA
        if data.exists() and manifest_lib.read(data).source.get("fingerprint") != source.fingerprint():
            raise InputError(
                f"{folder}: holds a run on other rows; name another workdir, or pass None for cross-validation"
            )
        with progress.hidden(not self.verbose):
            builders.build(source, data.parents[1])
            config = self._configured(data)
            try:
                pretrain.pretrain(config, folder, devices=jax.local_devices()[:1])
            except signals.Interrupted as e:
                raise (KeyboardInterrupt if e.code == 128 + signal.SIGINT else e) from None
        names = getattr(self, "feature_names_in_", None)
        stored = {"columns": {m: at.tolist() for m, at in self.columns_.items()}, "n": self.n_features_in_}
        files.write_json(folder / COLUMNS, stored | {"names": None if names is None else names.tolist()})
        self.run_, self._scratch = str(folder), scratch
        return self

    def fit_transform(self, X: Any, y: Any = None, *, groups: Sequence[Any] | None = None) -> np.ndarray:
        """Pretrain on the rows and return their representations, float32 [n, dims]."""
        return self.fit(X, groups=groups).transform(X, groups=groups)

    def transform(self, X: Any, groups: Sequence[Any] | None = None) -> np.ndarray:
        """Return the representations of rows.

        With ``smoothing_neighbours``, each vector is averaged with its nearest training rows. A training row never counts as
        its own neighbour.

        Args:
          X: rows, with the modalities and columns seen during :meth:`fit`.
          groups: the person of each row [n], for runs that standardise by person. A person who is not in the training rows is
            standardised by the statistics of the rows passed here.

        Returns:
          float32 [n, dims]: the vectors of all modalities, in the order of their names; zeros where a modality is absent.
        """
        check_is_fitted(self)
        matrix = self._matrix(X, fresh=False)
        run, names = self._opened(), rows_lib.group_names(groups, len(matrix))
        columns = {m: self.columns_[m] for m in run.network.modalities}
        features, present = rows_lib.by_modality(matrix, columns)
        keys = rows_lib.keys(features, present, _persons(run.network, names))
        own = np.array([run.known.get(key, bank_lib.NONE) for key in keys], np.int64)
        if persons := run.network.persons:
            if groups is None:
                warnings.warn("no groups: transform standardises rows by the split, not by person", stacklevel=2)
            features = persons.applied(features, present, names, data=persons.data)
        found = []
        for at, count in batches.evaluation_batches(np.arange(len(own)), BATCH_ROWS):
            of = ({m: x[at] for m, x in table.items()} for table in (features, present))
            found.append(run.compute(*of, own[at])["fused"][:count])
        return np.concatenate(found)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names ``MODALITY_0``, ``MODALITY_1``, ... of the columns that :meth:`transform` returns."""
        check_is_fitted(self)
        if input_features is not None and len(input_features) != self.n_features_in_:
            raise InputError("input_features should have length equal to number of features")
        sizes = self._opened().network.model.vector_dims
        return np.array([f"{m}_{i}" for m in sorted(sizes) for i in range(sizes[m])], object)

    def save(self, folder: str | Path) -> None:
        """Copy the folder of the run, with its data, to a new folder, which :meth:`load` and the commands read."""
        check_is_fitted(self)
        folder = Path(folder).absolute()
        if folder.exists():
            raise ConclugenError(f"{folder}: already exists; name a new folder")
        shutil.copytree(self.run_, folder)
        config = workdir_lib.read_config(folder)
        config.data.path = str(folder / DATA)
        files.write_atomically(folder / workdir_lib.CONFIG, config_lib.to_json(config))

    @classmethod
    def load(cls, folder: str | Path) -> "ConCluGen":
        """Return a fitted estimator from the folder of a run that :meth:`save` or ``conclugen pretrain`` wrote."""
        folder = Path(folder).absolute()
        found = cls(config=workdir_lib.read_config(folder), workdir=str(folder))
        dims = {m: workdir_lib.read_data(folder).modalities[m] for m in found.config.data.modalities}
        ends = np.cumsum([0, *dims.values()])
        stored = {"columns": {m: range(a, a + dims[m]) for m, a in zip(dims, ends, strict=False)}, "n": int(ends[-1])}
        if (path := folder / COLUMNS).exists():
            stored = files.read_json(path, dict[str, Any], way_out="save the estimator again")
        found.columns_ = {m: np.array(at, np.int64) for m, at in stored["columns"].items()}
        found.n_features_in_, found.run_ = stored["n"], str(folder)
        if stored.get("names"):
            found.feature_names_in_ = np.array(stored["names"], object)
        return found

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if scratch := vars(self).get("_scratch"):
            self.run_ = str(scratch.path)

    def _opened(self) -> "_Opened":
        return _opened(self.run_, (Path(self.run_) / workdir_lib.CONFIG).stat().st_mtime_ns)

    def _matrix(self, X: Any, *, fresh: bool) -> np.ndarray:
        """Return rows side by side, float32 [n, features]; a ``fresh`` estimator learns their columns, others compare."""
        least = {"ensure_min_samples": (rules.FEWEST if self.config == AUTO else 2) if fresh else 1}
        how = {"dtype": np.float32, "ensure_all_finite": "allow-nan", **least}
        if not isinstance(X, Mapping) or sparse.issparse(X):  # some sparse matrices are dicts
            matrix = validate_data(self, X, reset=fresh, **how)
            if fresh:
                names = list(X.columns) if hasattr(X, "columns") else list(range(matrix.shape[1]))
                self.columns_ = rows_lib.columns_of(names, self.columns)
            return matrix
        parts = {m: check_array(x, input_name=m, **how) for m, x in X.items()}
        if len({len(x) for x in parts.values()}) != 1:
            sizes = ", ".join(f"{m} {len(x)}" for m, x in parts.items()) or "no modality"
            raise InputError(f"X has {sizes} rows; pass equally many for each modality, NaN where it is absent")
        if fresh:
            ends = np.cumsum([0, *(x.shape[1] for x in parts.values())])
            self.columns_ = {m: np.arange(a, b) for m, a, b in zip(parts, ends, ends[1:], strict=False)}
            self.n_features_in_ = int(ends[-1])
            vars(self).pop("feature_names_in_", None)
        matrix = np.full((len(next(iter(parts.values()))), self.n_features_in_), np.nan, np.float32)
        for m, x in parts.items():
            if (expected := len(self.columns_.get(m, ()))) != x.shape[1]:
                raise InputError(
                    f"{m} has {x.shape[1]} features, but ConCluGen is expecting {expected} features as input"
                )
            matrix[:, self.columns_[m]] = x
        return matrix

    def _configured(self, data: Path) -> ConfigDict:
        """Return the configuration for a data set."""
        given = {KEYS[name]: value for name in KEYS if (value := getattr(self, name)) is not None}
        seed = self.random_state
        seed = seed if isinstance(seed, (int, np.integer)) else check_random_state(seed).randint(2**31 - 1)
        given = {"seed": int(seed), **given, **(self.overrides or {})}
        changes = [(key, str(value)) for key, value in given.items()]
        known, settings, start = rules.facts(shards.open_dataset(data, verify="size")), [], self.config
        if self.config == AUTO:
            kept, _ = rules.modalities(known)
            known = known._replace(**{name: {m: getattr(known, name)[m] for m in kept} for name in ("present", "dims")})
            slow = jax.local_devices()[0].platform == "cpu"
            settings, start = rules.settings(known, slow=slow), plan.START
        start = start if isinstance(start, ConfigDict) else str(start)
        config = plan.configured(settings, {"data.path": str(data), "data.train_split": "train"}, changes, start)
        if self.config == AUTO and "data.standardize" not in given:
            config.data.standardize = "split"  # a pipeline may pass groups to fit, but not to transform
        config = config_lib.with_modalities(config, known.dims)
        _suit(config, given, known.rows)
        if config.evaluation.transductive:
            raise ConclugenError(
                "config.evaluation.transductive is True, but transform uses no other rows; set it to False"
            )
        return config


def _suit(config: ConfigDict, given: Mapping[str, Any], num_rows: int) -> None:
    """Lower settings that few rows or epochs do not allow, unless ``given``; contrast two views of a single modality."""

    def change(key: str, value: Any) -> None:
        if key not in given:
            config.update_from_flattened_dict({key: value})

    section, names = config.clustering, config.data.modalities
    if len(names) == 1 and config.loss.contrastive_weight:
        change("loss.contrastive_weight", 0.0)
        change("loss.instance_weight", 1.0)
        change("loss.instance_modality", names[0])
        change("loss.neighbours", 0)
    steps = section.queue_batches + 1 if config.loss.clustering_weight and section.queue_reset == "epoch" else 1
    if config.train.batch_size > num_rows // steps:
        change("train.batch_size", max(2, num_rows // steps))
    if section.num_clusters > (points := (section.queue_batches + 1) * config.train.batch_size):
        change("clustering.num_clusters", max(2, points // 4))


class _Scratch:
    """A temporary folder, deleted together with this object; pickling includes its files."""

    def __init__(self, content: bytes = b""):
        self.path = Path(tempfile.mkdtemp(prefix="conclugen_"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        if content:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(self.path, filter="data")

    def __reduce__(self):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(self.path, ".")
        return _Scratch, (buffer.getvalue(),)


class _Opened(NamedTuple):
    """A run that is ready to represent rows."""

    network: embedding.Network
    compute: embedding.Computing
    known: Mapping[bytes, int]  # hash of a training row -> its row in the banks; empty without smoothing


@functools.lru_cache(maxsize=2)
def _opened(folder: str, _changed: int) -> _Opened:
    network = embedding.load(folder)
    if (own := Path(folder) / DATA).exists():  # the configuration names another path if the folder was moved
        network.config.data.path = str(own)
    compute, known = embedding.Computing(network, network.modalities, "concat"), {}
    if network.evaluation.smoothing_neighbours:
        dataset = shards.open_dataset(network.config.data.path, verify="size")
        stream = shards.ShardStream(dataset, network.config.data.train_split, network.modalities)
        places = compute.places(stream, dataset.manifest.fingerprint())
        for at in reversed(np.array_split(np.arange(stream.num_examples), -(-stream.num_examples // BATCH_ROWS))):
            read, groups = stream.rows(at), stream.names(at)[1]
            of = rows_lib.keys(read["features"], read["present"], _persons(network, groups.tolist()))
            known |= dict(zip(reversed(of), reversed(places[at].tolist()), strict=True))  # the first of equal rows
    return _Opened(network, compute, known)


def _persons(network: embedding.Network, groups: Sequence[str]) -> Sequence[str]:
    """Return the groups if rows are standardised by person, since equal rows of two persons then differ; else empty names."""
    return groups if network.persons else [""] * len(groups)
