"""Short for ``conclugen_jax.commands.report``."""

from conclugen_jax.commands import app, report

if __name__ == "__main__":
    app.run(report.main)
