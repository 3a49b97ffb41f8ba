"""``python -m launch.NAME`` runs the command of that name."""
