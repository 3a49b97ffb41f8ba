"""From clips to features to predictions, an optional extra. Uses ``evaluate`` and below; only commands use it."""
