#!/usr/bin/env python
"""Train a GPT-OSS model.

One process:    python launch/train.py --config configs/quickstart.yaml
Several:        torchrun --standalone --nproc_per_node 2 launch/train.py --config configs/quickstart.yaml
With ZeRO:      deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml
Only the plan:  python launch/train.py --config configs/pretrain_502m_a100.yaml --dry-run
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    try:
        return _train(argv)
    except KeyboardInterrupt:  # before there is something to save, or a second time
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print("train.py: interrupted; what was saved before stays", file=sys.stderr, flush=True)
        os._exit(130)


def _train(argv: list[str]) -> int:
    from data_pipeline.command_line.mistakes import in_words, is_explained
    from gptoss_dist.config import build_parser, check_named, parse_arguments
    from gptoss_dist.distributed import launcher_watch, launchers

    launchers.set_program("train.py")
    launcher_watch.end_with_launcher()
    parser = build_parser(prog="train.py", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print parameters, tokens, memory and layout, and exit")
    try:
        launchers.complete()
        argv = launchers.without_local_rank(argv)
        config, flags = parse_arguments(argv, parser)
        check_named(argv)
        if flags["dry_run"]:
            if int(os.environ.get("RANK", 0)) > 0:
                return 0
            from gptoss_dist.train.dry_run import describe

            plan, refusal = describe(config)
            print(plan, flush=True)
            if refusal is not None:
                raise ValueError(refusal)
            return 0
    except Exception as error:
        if not is_explained(error):
            raise
        launchers.report_error_once(in_words(error))
        return 2

    from gptoss_dist.distributed.processes import shut_down
    from gptoss_dist.train.loop import run

    return shut_down(run(config))


if __name__ == "__main__":
    from data_pipeline.command_line.process import accept_any_text

    accept_any_text(restart=True)
    sys.exit(main(sys.argv[1:]))
