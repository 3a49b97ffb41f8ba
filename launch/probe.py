"""Short for ``conclugen probe``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
