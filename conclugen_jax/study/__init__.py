"""Many runs: studies, hyper-parameter searches, and their report. Uses ``pretrain``, ``evaluate`` and the rooms below."""
