"""From video files to feature vectors: frozen backbones, decoding, and what puts them together."""
