"""Trains a class-conditional diffusion model from easy to hard under differential privacy.

    accelerate launch examples/train_dp_curriculum.py --config examples/configs/digits-demo.yaml --output_dir out

Every field of the configuration is also a flag: `--help` lists them. `dp-curriculum train` does the same in one
process; this script is what `accelerate launch` needs.
"""

import sys

from dp_curriculum.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
