"""The frozen backbones as Flax modules, and their published weights."""
