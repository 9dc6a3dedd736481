#!/usr/bin/env python
"""Write text with a trained model.

Once:         python launch/generate.py --checkpoint runs/quickstart --prompt "def "
Interactive:  python launch/generate.py --checkpoint runs/quickstart
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, check_ranges, option, ranged, run
from data_pipeline.printable import printable
from gptoss_dist.inference.interactive import REPL_HELP, repl


@dataclass
class GenerateOptions:
    """Write text with a trained model."""

    checkpoint: str = option()
    """A run's folder, a checkpoint, or a model that convert.py exported."""
    prompt: list[str] = option(default_factory=list, metavar="PROMPT", may_be_empty=True)
    """Text to continue; may be repeated. Without one the program is interactive."""
    temperature: float = ranged(0.8, at_least=0)
    """0 always takes the most likely token."""
    top_k: int = ranged(50, at_least=0)
    """Sample from the k most likely tokens; 0 is all."""
    top_p: float = ranged(0.95, above=0, at_most=1)
    """Sample from this much probability."""
    max_new_tokens: int = ranged(128, at_least=1)
    """Tokens to write at most."""
    seed: int = 0
    """The same seed writes the same text."""
    device: str | None = None
    """cpu or cuda; null is cuda where there is one."""


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for; return the exit code."""
    program = Program("generate.py", prefix="generate.py", failed=2, epilog="Interactive: " + REPL_HELP)
    return run(program, GenerateOptions, _generate, argv)


def _generate(options: GenerateOptions) -> int:
    from gptoss_dist.inference.session import Session

    session = Session.load(options.checkpoint, device=options.device)
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    session.seed(options.seed)
    if not options.prompt:
        return repl(session, settings, lambda changed: check_ranges(replace(options, **changed)))
    for prompt in options.prompt:
        print(prompt, end="", flush=True)
        session.write(prompt, on_text=lambda text: print(printable(text, lines=True), end="", flush=True), **settings)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
