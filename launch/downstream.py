"""Short for ``conclugen downstream``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
