"""Run one configuration, or a sweep: ``python main.py --help``."""

import sys

import hydra
from omegaconf import DictConfig

from cl_peft.launch import job, launch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run, resume or recognise; see cl_peft/experiment.py for the story."""
    return job(cfg)


if __name__ == "__main__":
    sys.exit(launch(main))
