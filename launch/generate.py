#!/usr/bin/env python
"""Write text with a trained model.

Once:         python launch/generate.py --checkpoint runs/quickstart --prompt "def "
Interactive:  python launch/generate.py --checkpoint runs/quickstart
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss_dist.inference.interactive import REPL_HELP, repl


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__.strip().splitlines()[0], epilog="Interactive: " + REPL_HELP
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a run's folder, a checkpoint, or a model that convert.py exported"
    )
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated; without it: interactive")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="sample from the k most likely tokens; 0: all (50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from this much probability (0.95)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (128)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (0)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    from gptoss_dist.inference.session import Session

    try:
        session = Session.load(arguments.checkpoint, device=arguments.device)
        settings = {
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "max_new_tokens": arguments.max_new_tokens,
        }
        session.seed(arguments.seed)
        if arguments.prompt is None:
            return repl(session, settings)
        for prompt in arguments.prompt:
            print(prompt, end="", flush=True)
            session.write(prompt, on_text=lambda text: print(text, end="", flush=True), **settings)
            print()
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
