"""Train the tiny model in a plain loop of torch, without this project's engines, settings or runs.

    python examples/train_tiny.py       # makes the dataset, data/tiny
    python examples/train_by_hand.py

The model is an `nn.Module` and the loader is an iterator: use them in whatever loop you have. `model.loss` gives the
mean loss per token in nats, and beside it the two terms that keep the experts busy, which you weigh yourself. Labels
are shifted already: `labels[:, t]` is the token after `input_ids[:, t]`, and -100 carries no loss.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml

from data_pipeline import BatchLoader, open_dataset
from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import initialize


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train_by_hand.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/tiny", help="a prepared dataset (data/tiny)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    arguments = parser.parse_args(argv)

    settings = yaml.safe_load((Path(__file__).with_name("tiny.yaml")).read_text())
    model = GptOss(ModelConfig.from_dict(settings["model"]))
    initialize(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    try:
        dataset = open_dataset(arguments.data, seq_len=64, seed=0)
    except ValueError as error:
        sys.exit(f"train_by_hand.py: {error}")
    with BatchLoader(dataset, micro_batch_size=8) as loader:
        for step in range(1, arguments.steps + 1):
            (batch,) = next(loader)  # one micro-batch: nothing is accumulated
            loss, auxiliary = model.loss(batch["input_ids"], batch["labels"])
            (loss + 0.01 * auxiliary["aux"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 or step % 20 == 0 or step == arguments.steps:
                print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
