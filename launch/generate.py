#!/usr/bin/env python
"""Write text with a trained model.

Once:         python launch/generate.py --checkpoint runs/quickstart --prompt "def "
Interactive:  python launch/generate.py --checkpoint runs/quickstart
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, check_ranges, option, print_line, ranged, ranged_like, run
from data_pipeline.printable import printable
from gptoss_dist.model.sampling import Sampling


@dataclass
class GenerateOptions:
    """Write text with a trained model."""

    checkpoint: str = option()
    """A run's folder, a checkpoint, or a model that convert.py exported."""
    prompt: list[str] = option(default_factory=list, metavar="PROMPT", may_be_empty=True)
    """Text to continue; may be repeated. Without one the program is interactive."""
    temperature: float = ranged_like(Sampling, "temperature", 0.8)
    """0 always takes the most likely token."""
    top_k: int = ranged_like(Sampling, "top_k", 50)
    """Sample from the k most likely tokens; 0 is all."""
    top_p: float = ranged_like(Sampling, "top_p", 0.95)
    """Sample from this much probability."""
    min_p: float = ranged_like(Sampling, "min_p", 0.0)
    """Sample from tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = ranged_like(Sampling, "repetition_penalty", 1.0)
    """More than 1 makes tokens that are in the text already less likely."""
    max_new_tokens: int = ranged(128, at_least=1, at_most=1_000_000_000)
    """Tokens to write at most."""
    stop: list[str] = option(default_factory=list, metavar="TEXT")
    """Stop before this text; may be repeated. The end of a document, answer or call always stops."""
    samples: int = ranged(1, at_least=1)
    """How many texts to write for each prompt."""
    logprobs: bool = False
    """Print each token with its log-probability below the text (only with prompts)."""
    seed: int = 0
    """The same seed writes the same text."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the decoding step: true from the first text on, auto once so much is written that it pays."""
    device: str | None = None
    """cpu or cuda; null is cuda where there is one."""


INTERACTIVE = (
    ":t TEMPERATURE   :k TOP_K   :p TOP_P   :m MIN_P   :r REPETITION_PENALTY   :n NEW_TOKENS   :q quit; "
    "anything else is a prompt"
)
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop", "compile")
"""What each text is written with."""


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for; return the exit code."""
    program = Program("generate.py", prefix="generate.py", failed=2, epilog="Interactive: " + INTERACTIVE)
    return run(program, GenerateOptions, _generate, argv)


def _generate(options: GenerateOptions) -> int:
    # With torch, which takes seconds, and in which Ctrl-C is heard too.
    from gptoss_dist.inference.interactive import repl
    from gptoss_dist.inference.session import Session

    if not options.prompt and (options.samples > 1 or options.logprobs):
        raise ValueError("--samples and --logprobs are for prompts on the command line; add --prompt TEXT")
    session = Session.load(options.checkpoint, device=options.device)
    settings = {name: value for name, value in asdict(options).items() if name in SETTINGS}
    session.seed(options.seed)
    if options.compile is True:
        print_line("the decoding step is compiled before the first text, which takes a minute or so", file=sys.stderr)
    if not options.prompt:
        return repl(session, settings, lambda changed: check_ranges(replace(options, **changed)), INTERACTIVE)
    for prompt in options.prompt:
        _write(session, prompt, options, settings)
    return 0


def _write(session, prompt: str, options: GenerateOptions, settings: dict) -> None:
    """Print the samples of a prompt: one as it is written, several when all are finished."""
    streams = options.samples == 1

    def show(_: int, text: str) -> None:
        print(printable(text, lines=True), end="", flush=True)

    if streams:
        print(prompt, end="", flush=True)
    on_text = show if streams else None
    try:
        (found,) = session.samples([prompt], n=options.samples, logprobs=options.logprobs, on_text=on_text, **settings)
    except (ValueError, KeyboardInterrupt):
        print(end="\n" if streams else "", flush=True)  # what is wrong then stands on a line of its own
        raise
    for number, one in enumerate(found, 1):
        if not streams:
            print(f"--- {number} of {options.samples}")
            print(prompt, end="")
            show(number, one.text)
        print()
        for token, logprob in zip(one.ids, one.logprobs or ()):
            print(f"{token:>8} {logprob:>9.4f}  {session.tokenizer.decode([token])!r}")


if __name__ == "__main__":
    sys.exit(main())
