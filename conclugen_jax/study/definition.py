"""Check the definition of a study and list its runs, each after the runs it depends on."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError, did_you_mean
from conclugen_jax.evaluate.baselines import BASELINES
from conclugen_jax.pretrain import together
from conclugen_jax.runs.config import FROZEN, PRETRAINED, PROTOCOLS
from conclugen_jax.runs.configuration_files import check_types, defaults, flatten

BEST = "best_baseline"
"""Name of the baseline with the best score for each number of labels."""
PROBE = "probe"
"""Protocol of logistic regressions by one rule, see ``evaluate/probe_run.py``: of methods and of all baselines."""
ALL = (*PROTOCOLS, PROBE)
SWEPT = (*FROZEN, PROBE)
"""Protocols whose labels and draws are one run each (a sweep)."""
ALONE = tuple(protocol for protocol in PROTOCOLS if protocol not in PRETRAINED)
"""Protocols that need no pretraining; in tables each is a method of its own, as each of ``BASELINES`` is."""
TITLES = {name: name.replace("_", " ") for name in ALONE} | {name: one.title for name, one in BASELINES.items()}
KEYS = {
    *("name", "pretraining_path", "methods", "datasets", "seeds", "labels", "label_draws", "training_draws"),
    *("num_folds", "jobs", "job_gib", "reference", "order", "baselines", "test_data"),
}


class Run(NamedTuple):
    """One workdir of a study."""

    path: str  # below the study's folder
    config: ConfigDict  # with data.path, seed and downstream.checkpoint filled in
    protocol: str  # of a downstream run, one of ``ALL``, or "pretraining"
    dataset: str  # its name in the study; empty for pretraining
    method: str  # its name in the study
    seed: int


def check(study: ConfigDict) -> None:
    """Refuse a definition that cannot be run; the message names the key and what is expected."""
    for fault in _faults(study):
        raise ConclugenError(f"config.{fault}")


def _faults(study: ConfigDict) -> Iterator[str]:
    for key in sorted(KEYS ^ set(study.keys())):
        yield f"{key}: {'missing' if key in KEYS else 'unknown'}; a study has the keys of configs/study_demo.py"
    paths = [study.pretraining_path, *(dataset.path for dataset in study.datasets.values() if "path" in dataset)]
    folded = [part in path for part in ("{fold}", "{shuffle}") for path in paths]
    if not (study.num_folds >= 3 and all(folded)) and (study.num_folds or any(folded)):
        yield f"num_folds is {study.num_folds}; expected 3 or more and {{fold}} and {{shuffle}} in all paths, or neither"
    for name in study.baselines:
        if name not in BASELINES or study.baselines.count(name) > 1:
            yield f"baselines has {name!r}; name some of {', '.join(BASELINES)}, each once, as in --config.baselines=raw"
    for name in study.test_data:
        if name not in study.datasets or study.test_data.count(name) > 1 or len(study.datasets) == 1:
            known = f"of several data sets of the study ({', '.join(study.datasets.keys())})"
            yield f"test_data has {name!r}; name some {known}, each once, as in --config.test_data=A,B"
    if not 0 < study.job_gib < float("inf") or study.jobs < 0:
        yield f"job_gib is {study.job_gib} and jobs {study.jobs}; GiB must be above 0, jobs 0 (automatic) or more"
    for name, method in study.methods.items():
        own = {"title", "modalities", "uses" if "uses" in method else "pretraining"}
        if name in (*ALL, *BASELINES, BEST) or set(method.keys()) - {"evaluation"} != own:
            keys = ", ".join(sorted(method.keys()))
            rule = "a method has title, modalities, pretraining or uses, and no protocol's or baseline's name"
            yield f"methods.{name} has the keys {keys}; {rule} ({', '.join((*ALL, *BASELINES))})"
        if "uses" in method and "pretraining" not in study.methods.get(method.uses, ()):
            yield f"methods.{name}.uses is {method.uses!r}; name a method that is pretrained itself"
        evaluation = {f"methods.{name}.evaluation": method.get("evaluation", {})}
        check_types(evaluation)
        for key in (key.removeprefix(f"methods.{name}.") for key, _ in flatten(evaluation)):
            if key == "evaluation.c_times_dim":
                yield f"methods.{name}.{key}: all vectors are probed by one rule; set it in the protocol 'probe'"
            if key not in defaults():
                yield f"methods.{name}.{key} is no key of a configuration{did_you_mean(key, defaults())}"
    for name, dataset in study.datasets.items():
        if set(dataset.keys()) != {"path", "protocols"}:
            yield f"datasets.{name} has the keys {', '.join(sorted(dataset.keys()))}; a data set has path and protocols"
        for protocol in sorted(set(dataset.protocols.keys()) - set(ALL)):
            yield f"datasets.{name}.protocols has {protocol!r}; there are {', '.join(ALL)}"
        for protocol in (p for p, config in dataset.protocols.items() if config.data.test_paths):
            yield f"datasets.{name}.protocols.{protocol}.data.test_paths: name data sets of the study as config.test_data"
        target_of(dataset)
    asked = sorted({protocol for dataset in study.datasets.values() for protocol in dataset.protocols})
    lists = dict.fromkeys((f"labels.{protocol}" for protocol in asked), ())
    lists |= {f"labels.{protocol}": n for protocol, n in study.labels.items()} | {"seeds": study.seeds}
    for key, numbers in lists.items():
        whole = all(isinstance(n, int) and n >= 0 for n in numbers)
        if not numbers or len(set(numbers)) != len(numbers) or not whole:
            yield f'{key} is {tuple(numbers)}; name one or more whole numbers, each once, as in --config.{key}="(0,5)"'
    if sorted(study.order) != sorted(study.methods.keys()):
        yield f"order is {tuple(study.order)}; it must name every method once: {', '.join(study.methods.keys())}"
    named = sorted({*study.methods.keys(), *TITLES})
    if study.reference not in named:
        yield f"reference is {study.reference!r}; name one of {', '.join(named)}"
    if not 1 <= study.training_draws <= study.label_draws:
        why = f"at most label_draws ({study.label_draws}), so that runs are compared on the same labels"
        yield f"training_draws is {study.training_draws}; it must be at least 1 and {why}"


def target_of(settings: ConfigDict) -> str:
    """Return the target that the protocols of a data set predict; empty: its main label. Several are refused."""
    targets = sorted({config.downstream.target for config in settings.protocols.values()})
    if len(targets) > 1:
        raise ConclugenError(
            f"the protocols of {settings.path} predict different targets ({', '.join(map(repr, targets))}; '' is the main "
            "label); name the data set once for each in config.datasets"
        )
    return targets[0] if targets else ""


def chains(study: ConfigDict) -> Iterator[list[Run]]:
    """Yield runs in the order of their dependence, those of one method and seed together: pretraining first, if any."""
    for seed in study.seeds:
        for name in study.order:
            if "uses" in study.methods[name]:
                continue
            config = _filled(study, study.methods[name].pretraining, study.pretraining_path, seed)
            chain = [Run(f"pretraining/{name}/seed_{seed}", config, "pretraining", "", name, seed)]
            for user, method in study.methods.items():
                if name in (user, method.get("uses")):
                    chain += _downstream(study, user, (*PRETRAINED, PROBE), method.modalities, seed, chain[0].path)
                    for run in chain[1:] if "evaluation" in method else ():
                        if run.method == user:
                            run.config.downstream.evaluation = "own"
                            run.config.evaluation.update(method.evaluation)
            yield chain
        found = [list(_downstream(study, protocol, (protocol,), (), seed, "")) for protocol in ALONE]
        found += [list(_downstream(study, name, (PROBE,), (), seed, "")) for name in study.baselines]
        yield from filter(None, found)


def cohorts(waiting: Iterable[list[Run]]) -> list[list[list[Run]]]:
    """Group chains that one process works through: pretrainings that are trained together, the probes of one baseline."""

    def key(chain: list[Run]) -> str | None:
        first = chain[0]
        if first.protocol == "pretraining":
            return together.kind(first.config)
        return f"{first.dataset}/{first.method}" if first.protocol == PROBE else None

    groups: dict[str, list[list[Run]]] = {}
    for i, chain in enumerate(waiting):
        found = key(chain)
        groups.setdefault(f"alone {i}" if found is None else found, []).append(chain)
    return list(groups.values())


def _downstream(
    study: ConfigDict, method: str, protocols: tuple[str, ...], modalities: Any, seed: int, pretraining: str
) -> Iterator[Run]:
    """Yield the downstream runs of one method and seed by some protocols on all data sets."""
    draws = range(seed * study.label_draws, (seed + 1) * study.label_draws)
    for dataset, settings in study.datasets.items():
        for protocol in (protocol for protocol in settings.protocols if protocol in protocols):
            config = _filled(study, settings.protocols[protocol], settings.path, seed)
            config.downstream.protocol, config.downstream.checkpoint = protocol, pretraining
            if protocol == PROBE:
                if method == "raw_smoothed" and not config.evaluation.smoothing_neighbours:
                    continue  # it would be "raw"
                _as_probe(config, method)
            config.sweep.seeds = ()  # the study's are runs of their own
            others = (study.datasets[name].path for name in study.test_data if name != dataset)
            config.data.test_paths = tuple(path_of(study, path, seed) for path in others)
            if modalities:
                config.downstream.modalities = tuple(modalities)
            path, labels = f"{protocol}/{dataset}/{method}/seed_{seed}", tuple(study.labels[protocol])
            if protocol in SWEPT:
                config.sweep.labels_per_class, config.sweep.label_draws = labels, tuple(draws)
                yield Run(path, config, protocol, dataset, method, seed)
                continue
            for number in labels:
                for draw in draws[: study.training_draws if number else 1]:
                    one = config.copy_and_resolve_references()
                    one.downstream.labels_per_class, one.downstream.label_draw = number, draw
                    name = f"labels_{number}_draw_{draw}" if number else "labels_all"
                    yield Run(f"{path}/{name}", one, protocol, dataset, method, seed)


def _as_probe(config: ConfigDict, method: str) -> None:
    """Set up a configuration to probe the vectors of a method or baseline."""
    config.downstream.protocol, config.data.variants = "linear_evaluation", "first"
    if method in BASELINES:
        config.downstream.protocol = BASELINES[method].protocol
        config.evaluation.smoothing_neighbours *= BASELINES[method].smoothed


def path_of(study: ConfigDict, path: str, seed: int) -> str:
    """Return the data set of a seed: with folds, seed s has fold s modulo their number of a shuffle, counted from 1."""
    if not study.num_folds:
        return path
    shuffle, fold = divmod(seed, study.num_folds)
    return path.replace("{fold}", str(fold)).replace("{shuffle}", str(shuffle + 1))


def _filled(study: ConfigDict, config: ConfigDict, path: str, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.path, config.seed = path_of(study, path, seed), seed
    return config
