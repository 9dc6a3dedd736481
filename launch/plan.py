#!/usr/bin/env python
"""Say what a run will need before it runs: memory, traffic, step time, cost; and find the best layout.

    python launch/plan.py --config configs/pretrain_502m_a100.yaml --gpus 1 --gpu a100-80gb
    python launch/plan.py --config configs/pretrain_20b_h100x64.yaml --gpus 64 --gpu h100-80gb --interconnect ib-400
    python launch/plan.py --config configs/pretrain_20b_h100x64.yaml --gpus 64 --gpu h100-80gb --search
    python launch/plan.py calibrate --name this_machine
    python launch/plan.py operators --model configs/model/gptoss_20b.yaml --gpu h100-80gb
    python launch/plan.py published

All options that are not of this command are those of launch/train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VERBS = ("calibrate", "operators", "published")


def main(argv: list[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    from data_pipeline.command_line import MISTAKE, Program
    from data_pipeline.command_line.mistakes import in_words, is_explained
    from gptoss_dist.planner import verbs
    from gptoss_dist.planner.command import plan_run
    from gptoss_dist.train.objectives import next_token_prediction

    if argv and argv[0] in VERBS:
        return getattr(verbs, argv[0])(argv[1:], next_token_prediction)
    try:
        return plan_run(argv, next_token_prediction)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_explained(error):
            raise
        Program("plan.py", prefix="plan.py").report(in_words(error))
        return MISTAKE


if __name__ == "__main__":
    from data_pipeline.command_line.process import accept_any_text

    accept_any_text(restart=True)
    sys.exit(main(sys.argv[1:]))
