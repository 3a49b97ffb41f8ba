"""What representations are worth: probes, linear evaluation, fine-tuning, embeddings, exports. Uses ``train`` and below."""
