"""The content of a clip: frames, sound, words, spectrograms."""
