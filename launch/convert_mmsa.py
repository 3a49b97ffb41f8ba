"""Short for ``conclugen convert_mmsa``."""

import launch

if __name__ == "__main__":
    launch.run(__file__)
