"""Go on with the run of train_tiny.py on two processes, with the experts of each layer divided between them.

    python examples/train_tiny.py    # once
    torchrun --standalone --nproc_per_node 2 examples/resume_on_another_layout.py

A checkpoint says of each tensor where its parts belong in the whole, and nothing of the processes that wrote them; so
any number of processes reads it, under any layout and either engine. The order of the data is a function of how many
samples were consumed, so that no sample is repeated or left out. Two settings are the reader's task. The samples of a
step should stay as many as they were: twice the processes, half of `micro_batch_size`. And `parallel` says what is
divided: here each process keeps two of the four experts, and tokens travel to them. Losses go on as they would have in
one process, up to the rounding of sums that are added in another order.
"""

import argparse
import sys
from pathlib import Path

from gptoss_dist.config import load_config
from gptoss_dist.distributed.processes import shut_down
from gptoss_dist.train.loop import run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="resume_on_another_layout.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/tiny", help="folder of the run (runs/tiny)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps in all, those done included (150)")
    arguments = parser.parse_args(argv)
    config = load_config(
        Path(arguments.run, "config.yaml"),  # what the run was trained with, to the last setting
        overrides={
            "resume": "auto",
            "train.steps": arguments.steps,
            "train.micro_batch_size": 4,  # it was 8 in one process
            "parallel.expert_parallel": 2,
        },
    )
    shut_down(run(config))


if __name__ == "__main__":
    main(sys.argv[1:])
