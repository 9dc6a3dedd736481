"""Load the model of train_tiny.py in transformers, and compare its logits with ours.

    sh launch/install.sh --extras test      # brings transformers
    python examples/train_tiny.py           # once
    python examples/load_in_transformers.py

Parameters have the names and shapes of `GptOssForCausalLM`, so an export copies tensors from file to file, without a
table of names and without building a model. Beside the weights it writes `config.json`, the tokenizer in the files that
`AutoTokenizer` reads, and the settings of generation. On a command line it is
`python launch/convert.py export runs/tiny --output FOLDER`; float32 is chosen here because bfloat16, its default,
would round the weights that are to be compared.
"""

import argparse
import sys

import torch

import gptoss_dist
from gptoss_dist import checkpoint

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError:
    sys.exit("load_in_transformers.py: transformers is not installed; sh launch/install.sh --extras test brings it")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="load_in_transformers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/tiny", help="folder of the run (runs/tiny)")
    parser.add_argument("--output", default="runs/tiny-export", help="folder to create (runs/tiny-export)")
    parser.add_argument("--prompt", default="The ", help="text to continue")
    arguments = parser.parse_args(argv)

    try:
        ours = gptoss_dist.load_pretrained(arguments.run)
        checkpoint.export(checkpoint.open_pretrained(arguments.run), arguments.output, "hf", dtype=torch.float32)
    except ValueError as error:
        sys.exit(f"load_in_transformers.py: {error}")
    theirs = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)

    ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max()
    print(f"largest difference of the logits: {difference:.1e}")
    print(tokenizer.decode(theirs.generate(ids, max_new_tokens=40, do_sample=False)[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
