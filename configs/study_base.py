"""Every key of a study with its meaning, and the paper's methods as parts of one.

A study file starts from here: it names data sets with their protocols and adds methods. A method's ``pretraining`` and a
data set's protocols are whole configurations of runs (``configs/base.py``), whose ``data.path``, ``seed`` and
``downstream.checkpoint`` the study fills in.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from conclugen_jax.evaluate.baselines import BASELINES

METHODS = {
    "conclugen": ("ConCluGen", ("contrastive", "clustering", "reconstruction")),
    "conclu": ("ConClu", ("contrastive", "clustering")),
    "congen": ("ConGen", ("contrastive", "reconstruction")),
    "multi_cont": ("Multi-Cont", ("contrastive",)),
    "instance_cont": ("Instance-Cont", ("instance",)),
    "generative": ("Generative", ("reconstruction",)),
    "multi_cont_without_text": ("Multi-Cont w/o {text}", ("contrastive",)),
    "multi_cont_without_audio": ("Multi-Cont w/o {audio}", ("contrastive",)),
}
"""Name -> title and terms of the objective, in the order of the paper's tables."""


def get_config() -> ConfigDict:
    study = ConfigDict()
    study.name = "study"
    study.pretraining_path = ""  # folder of the data set that all methods are pretrained on
    study.seeds = (0, 1, 2, 3, 4)  # of pretraining and classifiers; the units of every interval
    study.label_draws = 5  # random draws of few labels for each seed, in linear evaluation
    study.training_draws = 1  # how many of them fine-tuning and the supervised baseline see
    study.labels = ConfigDict(  # protocol -> labels per class; 0: all
        {
            "linear_evaluation": (0,),
            "raw_features": (0,),
            "supervised": (0,),
            "untrained": (0,),
            "fine_tuning": (0,),
            "probe": (0,),
        }
    )
    study.baselines = tuple(BASELINES)  # what the protocol probe compares methods with
    study.test_data = ()  # data sets of the study, by name, on which the classifiers of the others are scored as well
    study.num_folds = 0  # {fold} and {shuffle} in paths are those of seed s: s modulo num_folds, s / num_folds + 1
    study.jobs = 0  # runs side by side; 0: as many as there are processors and as memory allows
    study.job_gib = 2.0  # memory that a run takes at most, GiB
    study.reference = "conclugen"  # the method that the others are compared with
    study.methods = ConfigDict()  # name -> title, modalities (downstream; () for all), pretraining or uses (another's)
    study.order = ()  # of the methods in tables
    study.datasets = ConfigDict()  # name -> path, and protocols: name -> configuration
    return study


def probe(config: ConfigDict) -> ConfigDict:
    """Probes of all vectors and baselines by one rule, with the data and sizes of a run."""
    config = config.copy_and_resolve_references()
    config.evaluation.c_times_dim = 30.0
    return config


def add_methods(study: ConfigDict, config_of: Callable[[str], ConfigDict], modalities: dict[str, str]) -> None:
    """Add the paper's methods, as far as the modalities that they need are there.

    Args:
      study: gets ``methods`` and ``order``.
      config_of: name of a method -> configuration with sizes, rates and schedule; its objective and modalities are set here.
      modalities: ``video``, ``audio`` and, if there is one, ``text`` -> names in the data.
    """
    for name, (title, terms) in METHODS.items():
        used = dict(modalities)
        if "_without_" in name:
            if len(modalities) < 3:
                continue
            del used[name.rsplit("_", 1)[1]]
        if name == "instance_cont":
            used = {"video": modalities["video"]}
        config = config_of(name)
        for term in ("contrastive", "clustering", "reconstruction", "instance"):
            config.loss[f"{term}_weight"] = float(term in terms)
        config.loss.instance_modality = modalities["video"]
        config.data.modalities = tuple(used.values())
        study.methods[name] = ConfigDict({"title": title.format(**modalities), "modalities": (), "pretraining": config})
    vision = {"title": f"ConCluGen/({modalities['video']})", "uses": "conclugen", "modalities": (modalities["video"],)}
    study.methods.conclugen_vision = ConfigDict(vision)
    study.order = (*(name for name in METHODS if name in study.methods), "conclugen_vision")
