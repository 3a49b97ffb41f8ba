"""What a clip holds: frames, sound, words, spectrograms."""
