"""The values that configuration keys may have, whatever the data."""

from conclugen_jax.method import clustering

PROTOCOLS = (
    "linear_evaluation",
    "fine_tuning",
    "supervised",
    "raw_features",
)  # of downstream runs, as tables list them
FROZEN = ("linear_evaluation", "raw_features")  # these train the classifier alone; the others train the encoder too
PRETRAINED = ("linear_evaluation", "fine_tuning")  # protocols that start from a pretraining run; the others need none
OPTIMIZERS = ("adamw", "sgd")

CHOICES = {
    "precision": ("float32", "tensorfloat32", "bfloat16"),
    "data.tier": ("auto", "device", "host", "shards"),
    "data.variants": ("random", "first"),
    "data.storage_dtype": ("float32", "bfloat16"),
    "data.verify": ("hash", "size"),
    "train.tracker": ("", "wandb", "mlflow"),
    "model.projection_sharing": ("shared", "separate"),
    "loss.reduction": ("sum", "mean"),
    "loss.contrastive_pairs": ("all", "circle"),
    "loss.clustering_target": ("joint", "individual"),
    "clustering.queue_reset": ("epoch", "never"),
    "clustering.initialisation": clustering.INITIALISATIONS,
    "clustering.metric": clustering.METRICS,
    "checkpoint.best_by": ("loss", "probe"),
    "optimizer.name": OPTIMIZERS,
    "schedule.granularity": ("epoch", "step"),
    "downstream.protocol": PROTOCOLS,
    "downstream.fusion": ("concat", "mean"),
    "downstream.class_weights": ("inverse_frequency", "none"),
}
"""Key -> values that it may have."""

NOT_NEGATIVE = (0, None)  # least and most value of a number; ``None``: no bound
RANGES = {
    "seed": (0, 2**31 - 1),
    "encoder_chunk_size": (0, 2**24),
    "model.representation_dim": (8, 2**20),
    "model.projection_dim": (1, 2**20),
    "model.reconstruction_dim": (1, 2**20),
    "model.norm_momentum": (0, 1),
    "model.norm_epsilon": (1e-12, 1),
    "loss.instance_temperature": (1e-6, 1e6),
    "views.mask_rate": (0, 1),
    "views.noise": (0, 1e6),
    "loss.contrastive_margin": (0, 10),
    "loss.clustering_margin": (0, 10),
    "clustering.num_clusters": (2, 2**20),
    "clustering.start_epoch": (0, 10**6),
    "clustering.queue_batches": (0, 10**4),
    "clustering.max_iterations": (1, 10**6),
    "clustering.refit_every_steps": (1, 10**9),
    "optimizer.learning_rate": (0, 1e3),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.eps": (1e-16, None),
    "schedule.warmup_epochs": (0, 10**6),
    "schedule.warmup_start": (0, 1),
    "schedule.period_epochs": (1, 10**6),
    "schedule.period_multiplier": (1, 1000),
    "train.batch_size": (2, 2**24),
    "train.num_epochs": (1, 10**6),
    "train.steps_per_dispatch": (1, 10**5),
    "train.log_every_steps": (1, 10**9),
    "train.max_bad_steps": (0, 10**6),
    "checkpoint.every_epochs": (1, 10**6),
    "checkpoint.max_failures": (1, 10**6),
    "checkpoint.keep_newest": (1, 10**6),
    "checkpoint.keep_best": (0, 10**6),
    "online_probe.every_epochs": (0, 10**6),
    "online_probe.neighbours": (1, 10**6),
    "online_probe.num_epochs": (1, 10**6),
    "downstream.dropout_rate": (0, 0.999),
    "downstream.threshold": (0, 1),
    "downstream.encoder_rate": (0, 1e6),
    "downstream.early_stopping_epochs": (0, 10**6),
    "downstream.labels_per_class": (0, 10**9),
    "downstream.label_draw": (0, 2**31 - 1),
    "downstream.num_folds": (0, 10**4),
    "downstream.fold": (-1, 10**4),
}
"""Key -> least and most value, both included; other numbers must not be negative."""

LISTS = {
    "sweep.learning_rates": "optimizer.learning_rate",
    "sweep.weight_decays": "optimizer.weight_decay",
    "sweep.seeds": "seed",
    "sweep.labels_per_class": "downstream.labels_per_class",
    "sweep.label_draws": "downstream.label_draw",
    "online_probe.learning_rates": "optimizer.learning_rate",
}
"""Key of a list -> key of one such value."""
