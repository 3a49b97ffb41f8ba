"""Short for ``conclugen_jax.commands.pretrain``."""

from conclugen_jax.commands import app, pretrain

if __name__ == "__main__":
    app.run(pretrain.main)
