"""Command-line entry points: thin mains that parse flags and call the package."""
