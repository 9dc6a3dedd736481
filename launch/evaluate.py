#!/usr/bin/env python
"""Measure what a model can do, and what it costs to use it.

Size of the cache:  python launch/evaluate.py kv-cache --model configs/model/gptoss_502m.yaml
Long contexts:      python launch/evaluate.py passkey --checkpoint runs/passkey_tiny --lengths 256 1024
Prediction of text: python launch/evaluate.py perplexity --checkpoint runs/quickstart
Tasks of lm-eval:   python launch/evaluate.py lm-eval --checkpoint runs/quickstart --tasks NAME --include tasks/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, run_verb
from gptoss_dist.distributed import launchers
from gptoss_dist.evaluation import options


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    launchers.set_program("evaluate.py")
    if argv is None:  # of the deepspeed command, which puts an option first
        sys.argv[1:] = launchers.without_local_rank(sys.argv[1:])
    verbs = {
        "kv-cache": (options.KvCacheOptions, _kv_cache),
        "passkey": (options.PasskeyOptions, _passkey),
        "perplexity": (options.PerplexityOptions, _perplexity),
        "lm-eval": (options.HarnessOptions, _lm_eval),
    }
    return run_verb(Program("evaluate.py", prefix="evaluate.py", failed=2), verbs, argv, description=__doc__)


def _kv_cache(options: options.KvCacheOptions) -> None:
    from gptoss_dist.evaluation.kv_cache_size import evaluate

    evaluate(options)


def _passkey(options: options.PasskeyOptions) -> None:
    from gptoss_dist.evaluation.retrieval.passkey import evaluate

    evaluate(options)


def _perplexity(options: options.PerplexityOptions) -> None:
    from gptoss_dist.evaluation.perplexity import evaluate

    evaluate(options)


def _lm_eval(options: options.HarnessOptions) -> None:
    from gptoss_dist.evaluation.harness.command import evaluate

    evaluate(options)


if __name__ == "__main__":
    sys.exit(main())
