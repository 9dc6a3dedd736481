#!/usr/bin/env python
"""Look into checkpoints, and write models that other tools load.

What is in it:     python launch/convert.py inspect runs/quickstart
Is it whole:       python launch/convert.py verify runs/quickstart
For transformers:  python launch/convert.py export runs/quickstart --output my-model
As published:      python launch/convert.py export runs/quickstart --output my-model --mxfp4
From one layout to the other:
                   python launch/convert.py export hf:FOLDER --output NEW --format openai
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WHERE = "hf:FOLDER, openai:FOLDER (or only FOLDER, if it has a config.json), or the folder of a run or checkpoint"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    inspect = verbs.add_parser("inspect", help="list step, settings, tensors, shapes and sizes")
    inspect.add_argument("source", help=WHERE)
    verify = verbs.add_parser("verify", help="hash every file of every checkpoint anew and compare")
    verify.add_argument("source", help="the folder of a run or of a checkpoint")
    model = verbs.add_parser("model", help="print the architecture, as a file for --model")
    model.add_argument("source", help=WHERE)
    export = verbs.add_parser("export", help="write a model for other tools")
    export.add_argument("source", help=WHERE)
    export.add_argument("--output", required=True, help="folder to create")
    export.add_argument(
        "--format", choices=("hf", "openai", "safetensors"), default="hf",
        help="transformers' and vLLM's layout; OpenAI's own; or the bare weights, which any variant can be written as",
    )  # fmt: skip
    export.add_argument("--mxfp4", action="store_true", help="the experts' weights in 4 bits, as published")
    export.add_argument("--search", action="store_true", help="with --mxfp4: the best of three scales, which is slower")
    export.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is not packed")
    export.add_argument("--no-verify", action="store_true", help="do not hash a training checkpoint's files first")
    export.add_argument("--max-file-gb", type=float, default=5.0, help="largest file, in 10^9 bytes")
    arguments = parser.parse_args(argv)
    try:
        code = {"inspect": _inspect, "verify": _verify, "model": _model, "export": _export}[arguments.verb](arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2


def _inspect(arguments: argparse.Namespace) -> int:
    from gptoss_dist.checkpoint.formats.inspect import describe

    print(describe(arguments.source))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from gptoss_dist.checkpoint import candidates, verify

    wrong = 0
    for checkpoint in candidates(arguments.source):
        problems = verify(checkpoint)
        print(f"{checkpoint}: {'; '.join(problems) or 'intact'}")
        wrong += bool(problems)
    return 1 if wrong else 0


def _model(arguments: argparse.Namespace) -> int:
    import yaml

    from gptoss_dist.checkpoint.formats.pretrained import open_pretrained

    print(yaml.safe_dump(open_pretrained(arguments.source, verify=False).config.to_dict(), sort_keys=False), end="")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from gptoss_dist.checkpoint.formats.export import export
    from gptoss_dist.checkpoint.formats.pretrained import open_pretrained

    losses = export(
        open_pretrained(arguments.source, message=print, verify=not arguments.no_verify),
        arguments.output,
        arguments.format,
        dtype=getattr(torch, arguments.dtype),
        pack=arguments.mxfp4,
        search=arguments.search,
        file_bytes=int(arguments.max_file_gb * 1e9),
        message=print,
    )
    for name, loss in losses.items():
        print(f"{name}: relative error {loss:.4f}")
    print(f"done: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
