"""Every configuration key with its meaning and unit, at the paper's values.

Variants import this file and override a few keys; a command line overrides any key: --config.train.batch_size=512.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, batch order, k-means starts and dropout
    config.precision = "float32"  # float32 | tensorfloat32 | bfloat16: of matrix products; parameters are float32
    config.encoder_chunk_size = 0  # rows on a device that pass the encoder at once, to save memory; 0: all of them
    config.data = data()
    config.model = model()
    config.loss = loss()
    config.views = views()
    config.augmentation = augmentation()
    config.clustering = clustering()
    config.optimizer = optimizer()
    config.schedule = schedule()
    config.train = train()
    config.online_probe = online_probe()
    config.checkpoint = checkpoint()
    config.evaluation = evaluation()
    config.downstream = downstream()
    config.sweep = sweep()
    return config.lock()


def data() -> ConfigDict:
    """Which data set, and where its rows are kept."""
    data = ConfigDict()
    data.path = ""  # folder of a built data set, DATA_DIR/NAME/VERSION
    data.modalities = ()  # those to train on; empty: all of the data set; linear evaluation takes its checkpoint's
    data.train_split = "train"  # split to train on
    data.validation_split = "validation"  # split that chooses the best epoch (downstream)
    data.test_split = "test"  # split that is scored (downstream); empty: none is
    data.test_paths = ()  # folders of other data sets, whose data.test_split a classifier is scored on as well
    data.standardize = "none"  # none | split (zero mean, unit deviation) | person; linear evaluation: as its checkpoint
    data.person_modalities = ()  # standardised by person, the others by the split; empty: all but text
    data.person_floor = 0.1  # added to the variance of a person's clips, in variances of the split
    data.person_shrinkage = 2.0  # number of clips with which the split counts beside a person's own
    data.variants = "random"  # random (one of the stored variants of an example at each visit) | first
    data.tier = "auto"  # auto | device | host | shards: where the rows are kept
    data.device_table_gib = 16.0  # auto: a split up to this size, GiB, is kept on every device
    data.host_table_gib = 64.0  # auto: a split up to this size, GiB, is kept in host memory
    data.host_cache_gib = 0.25  # tables from this size on, GiB, are memory-mapped files beside the shards, made once
    data.feed_gib = 0.25  # host and shards tiers: rows sent to the devices at once, GiB; at least one step's
    data.storage_dtype = "float32"  # float32 | bfloat16: of rows on the device; bfloat16 rounds L_Rec's targets too
    data.verify = "hash"  # hash | size: how files are checked against the manifest before a run
    return data


def model() -> ConfigDict:
    """Sizes and kinds of the networks."""
    model = ConfigDict()
    model.representation_head = "gated"  # gated (paper) | linear (one Linear, no relu)
    model.bottleneck = ("audio",)  # modalities whose gated unit works at the input's size
    model.representation_dim = 4096  # R, units, a multiple of 8; linear evaluation takes all sizes from its checkpoint
    model.projection_dim = 512  # P, units
    model.reconstruction_dim = 1024  # H, hidden units of a decoder
    model.projection_sharing = "shared"  # shared (authors' code) | separate (paper)
    model.projection_relu = True  # relu after the projection's last Linear (authors' code)
    model.decoder_relu = False  # relu after the decoder's last Linear (authors' code: True)
    model.norm_momentum = 0.9  # share of BatchNorm's running averages kept at a step
    model.norm_epsilon = 1e-5  # added to BatchNorm's variance
    return model


def loss() -> ConfigDict:
    """Terms of the objective."""
    loss = ConfigDict()
    loss.contrastive_weight = 1.0  # of L_MMS; 0 leaves the term and its networks out
    loss.clustering_weight = 1.0  # of L_Clu; likewise
    loss.reconstruction_weight = 1.0  # of L_Rec; likewise
    loss.instance_weight = 0.0  # of L_NCE between two views of one modality; likewise
    loss.instance_modality = "video"  # the modality whose views L_NCE tells apart
    loss.instance_temperature = 0.07  # tau in L_NCE
    loss.fusion_weight = 0.0  # of L_Fus between two passes with other features or modalities hidden; likewise
    loss.fusion_temperature = 0.07  # tau in L_Fus
    loss.reduction = "sum"  # sum (paper) | mean (authors' code: of the weighted terms)
    loss.contrastive_pairs = "all"  # all | circle (authors' code for more than three modalities)
    loss.contrastive_margin = 1e-3  # delta in L_MMS
    loss.clustering_margin = 1e-3  # delta in L_Clu
    loss.margin_in_denominator = False  # subtract delta in L_Clu's denominator too (authors' code: True)
    loss.neighbours = 0  # a modality of an example may come from one of so many nearest neighbours; 0: never
    loss.neighbour_probability = 0.5  # that it does, for each modality by itself
    loss.neighbours_of_others = True  # no neighbour is of the same person (group)
    loss.neighbour_space = "raw"  # raw (features) | representation (of the network in training; raw until a refresh)
    loss.neighbour_refresh_epochs = 10  # epochs from one look at the representations to the next
    loss.soft_targets = 0.0  # temperature: examples of similar raw features are positives in L_MMS, by weight; 0: none
    loss.target_neighbours = 0  # likewise, so many nearest rows of the batch share half of the target; 0: none
    loss.clustering_target = "joint"  # joint (the fused vector) | individual (each modality, summed)
    return loss


def views() -> ConfigDict:
    """How L_NCE's two views are made where no variants are stored."""
    views = ConfigDict()
    views.mask_rate = 0.2  # share of features replaced by their mean over the training split, to make a view
    views.noise = 0.2  # standard deviation of Gaussian noise, in standard deviations of each feature
    return views


def augmentation() -> ConfigDict:
    """Change a batch before the networks see it, while pretraining."""
    augmentation = ConfigDict()
    augmentation.feature_dropout = 0.0  # share of input features set to zero; the others are divided by what is left
    augmentation.modality_dropout = 0.0  # share of modalities of examples that are absent for a step; one always stays
    augmentation.mixup = 0.0  # alpha: examples are mixed with another one, with a share from Beta(alpha, alpha); 0: not
    return augmentation


def clustering() -> ConfigDict:
    """k-means over the queue and the batch."""
    clustering = ConfigDict()
    clustering.num_clusters = 8  # K, number of centroids
    clustering.start_epoch = 12  # first epoch, counted from 0, whose objective has L_Clu
    clustering.queue_batches = 4  # batches of fused vectors kept, fewer than an epoch has; L_Clu counts once it is full
    clustering.queue_reset = "epoch"  # epoch (emptied at each epoch's start) | never
    clustering.initialisation = "random"  # random | kmeans++ | warm (from the last step's centroids)
    clustering.metric = "cosine"  # cosine | euclidean
    clustering.max_iterations = 100  # Lloyd iterations per step, at most
    clustering.tolerance = 1e-4  # stop once the squared shifts of the centroids sum to this
    clustering.refit_every_steps = 1  # full-queue steps from one k-means to the next; centroids stay in between
    clustering.gather_limit_mib = 64  # MiB of queue and batch beyond which several devices share the work of k-means
    return clustering


def optimizer() -> ConfigDict:
    """AdamW or SGD."""
    optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | sgd
    optimizer.learning_rate = 9e-5  # peak rate
    optimizer.weight_decay = 3.2e-4  # decoupled, on all trained parameters
    optimizer.b1 = 0.9  # decay of the first moment
    optimizer.b2 = 0.999  # decay of the second moment
    optimizer.shard = False  # moments and update are split over the devices; the same numbers in less memory of each
    optimizer.eps = 1e-8  # added to the root of the second moment
    return optimizer


def schedule() -> ConfigDict:
    """Learning rate: linear warm-up, then cosine annealing with warm restarts."""
    schedule = ConfigDict()
    schedule.warmup_epochs = 5  # epochs of linear warm-up
    schedule.warmup_start = 0.1  # share of the peak rate in the first epoch
    schedule.period_epochs = 20  # length of the first cosine period (T_0)
    schedule.period_multiplier = 2  # each period is so many times as long as the last (T_mult)
    schedule.minimum = 1e-6  # rate at the end of a period (eta_min)
    schedule.granularity = "epoch"  # epoch (constant within one, authors' code) | step
    return schedule


def train() -> ConfigDict:
    """Batches, epochs, log."""
    train = ConfigDict()
    train.batch_size = 4096  # examples per step over all devices; a multiple of the number of devices
    train.num_epochs = 100  # passes over the training split; its last incomplete batch is dropped
    train.steps_per_dispatch = 50  # steps that run on the device between two looks from the host, at most
    train.log_every_steps = 1  # a line in metrics.jsonl every so many steps
    train.max_bad_steps = 3  # steps in a row whose loss or gradient is not finite that are skipped before the run ends
    train.max_loss_ratio = 0.0  # a loss so many times the mean of the 50 steps before it is bad as well; 0: never
    train.tensorboard = False  # write the same to WORKDIR/tensorboard too; needs the extra 'tensorboard'
    train.tracker = ""  # wandb | mlflow: send the same there too, as their own variables say (WANDB_*, MLFLOW_*)
    return train


def online_probe() -> ConfigDict:
    """Probes of the representations while pretraining; they change nothing in it."""
    online_probe = ConfigDict()
    online_probe.every_epochs = 0  # epochs between two probes; 0: none
    online_probe.path = ""  # folder of a labelled data set with the run's modalities; empty: data.path
    online_probe.neighbours = 20  # k of the k nearest neighbours, by cosine
    online_probe.learning_rates = (1e-3, 1e-2)  # of the linear classifiers; the best on the validation split is logged
    online_probe.num_epochs = 20  # of the linear classifiers
    online_probe.health = True  # measure rank, alignment, recall and clusters at checkpoints, without labels
    return online_probe


def checkpoint() -> ConfigDict:
    """Which checkpoints are saved and kept."""
    checkpoint = ConfigDict()
    checkpoint.every_epochs = 1  # epochs between two checkpoints; the last epoch always has one
    checkpoint.keep_newest = 2  # newest checkpoints kept
    checkpoint.keep_best = 1  # kept besides: the best ones
    checkpoint.max_failures = 3  # saves in a row that may fail before the run ends
    checkpoint.best_by = "loss"  # loss (mean training loss since clustering joined) | probe (the linear online probe)
    return checkpoint


def evaluation() -> ConfigDict:
    """Which vectors a network hands on to probes, classifiers, embeddings; those of a checkpoint are set by its own run."""
    evaluation = ConfigDict()
    evaluation.vectors = "representation"  # | pre_activation | both | projection | with_raw; see method/model.py
    evaluation.smoothing_neighbours = 0  # vectors are averaged with so many nearest training rows; 0: with none
    evaluation.smoothing_share = 0.5  # share of the neighbours in the average
    evaluation.c_times_dim = 0.0  # probes: C of logistic regression times the size of the vectors; 0: C is 1
    evaluation.self_training = ()  # studies' probes: shares of the other rows that are trained on as predicted, by rounds
    evaluation.transductive = False  # rows of a split that is scored are neighbours of each other too
    return evaluation


def downstream() -> ConfigDict:
    """Training of a classifier on a pretrained network."""
    downstream = ConfigDict()
    downstream.protocol = "linear_evaluation"  # | fine_tuning | supervised (random F) | untrained (kept) | raw_features
    downstream.target = ""  # name of a further target to predict; empty: the main label
    downstream.checkpoint = ""  # workdir of the pretraining run (linear evaluation, fine-tuning)
    downstream.evaluation = "checkpoint"  # | own: whose section evaluation chooses and smooths the vectors
    downstream.checkpoint_step = "newest"  # newest | best | a step number
    downstream.modalities = ()  # whose representations are joined; empty: all of the model's
    downstream.fusion = "concat"  # concat (paper) | mean: how the representations of the modalities are joined
    downstream.encoder_rate = 1.0  # learning rate of F as a share of optimizer.learning_rate (fine-tuning, supervised)
    downstream.early_stopping_epochs = 0  # stop after so many epochs without a lower validation loss; 0: never
    downstream.labels_per_class = 0  # train on so many random labels of each class; 0: on all
    downstream.label_draw = 0  # which random draw of them
    downstream.num_folds = 0  # cut data.train_split into so many folds; 0: the stored splits
    downstream.fold_by = "group"  # group (person) | example (stratified by label, shuffled by seed; persons are mixed)
    downstream.fold = -1  # which fold is the test split, the one before validates; -1: each in turn
    downstream.dropout_rate = 0.5  # share of representation units set to zero while training
    downstream.class_weights = "inverse_frequency"  # inverse_frequency | none
    downstream.threshold = 0.5  # probability above which a label of a multi-label task is predicted
    return downstream


def sweep() -> ConfigDict:
    """Linear evaluations trained together; an empty list: the value of the run."""
    sweep = ConfigDict()
    sweep.learning_rates = ()  # of the classifier, chosen from by the validation split; empty: the run's own value
    sweep.weight_decays = ()  # likewise
    sweep.seeds = ()  # of initialisation, batch order and dropout
    sweep.labels_per_class = ()  # numbers of labels; 0: all
    sweep.label_draws = ()  # random draws of them
    return sweep
