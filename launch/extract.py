"""Short for ``conclugen extract``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
