"""One run on disk: its folder, configuration, checkpoints and trackers. Uses ``data``, ``method`` and ``system``."""
