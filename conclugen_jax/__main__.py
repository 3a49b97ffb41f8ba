"""``python -m conclugen_jax`` is the command ``conclugen``."""

from conclugen_jax.commands.main import main

if __name__ == "__main__":
    main()
