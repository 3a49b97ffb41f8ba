"""Short for ``conclugen embed``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
