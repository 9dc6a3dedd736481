"""What a run does every so many steps, beside training."""

from __future__ import annotations

import logging

import torch

from data_pipeline import MixtureDataset
from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.model.generate import generate

log = logging.getLogger(__name__)


def write_samples(config: Config, ranks: Ranks, engine, dataset: MixtureDataset, report, step: int) -> None:
    """All ranks generate the same text in step, since each holds only a part of the weights."""
    texts, tokenizer, settings = [], dataset.tokenizer, config.sampling
    for index, prompt in enumerate(settings.prompts):
        ids = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]], device=ranks.device)
        # Compiled blocks would be compiled anew for the cache, the prompt and one token, until the compiler gives up.
        with torch.compiler.set_stance("force_eager"):
            output = generate(
                engine.model,
                ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                vocab_size=tokenizer.n_vocab,
                generator=torch.Generator().manual_seed(config.run.seed + index),
            )
        texts.append(tokenizer.decode(output[0].tolist()))
    if report:
        report.samples(step, texts)
