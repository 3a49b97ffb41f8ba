"""Command-line entry points: thin mains that parse flags and call the package."""

import signal

# Until a launcher runs, Ctrl-C ends the process without a traceback: importing JAX takes seconds.
signal.signal(signal.SIGINT, signal.SIG_DFL)
