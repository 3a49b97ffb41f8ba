"""What representations are worth: probes, linear evaluation, fine-tuning, weights to share. Uses ``train`` and below."""
