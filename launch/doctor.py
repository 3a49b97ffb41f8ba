"""Short for ``conclugen doctor``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
