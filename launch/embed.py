"""Short for ``conclugen_jax.commands.embed``."""

from conclugen_jax.commands import app, embed

if __name__ == "__main__":
    app.run(embed.main)
