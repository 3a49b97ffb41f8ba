"""What representations are worth: probes, linear evaluation, fine-tuning, embeddings, weights to share. Uses ``train`` and below."""
