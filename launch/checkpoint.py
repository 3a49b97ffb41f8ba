"""Short for ``conclugen checkpoint``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
