"""A trained model with its tokenizer: text in, text out."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import torch

from data_pipeline import Tokenizer
from gptoss_dist.checkpoint import open_pretrained
from gptoss_dist.model.generate import generate
from gptoss_dist.model.transformer import GptOss


class Session:
    """A model, its tokenizer and a random state, which are kept between prompts; and the folder that they are from."""

    def __init__(self, model: GptOss, tokenizer: Tokenizer, folder: Path | None = None) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.generator = torch.Generator()

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Session:
        """Load the newest checkpoint under `path`, or an exported model, in float32 on CPU and bfloat16 on CUDA.

        Raises:
            ValueError: There is no such device, no intact checkpoint, it does not fit, or there is no tokenizer of ours
                beside it.
        """
        target = find_device(device)
        pretrained = open_pretrained(path)
        model = pretrained.build(torch.bfloat16 if target.type == "cuda" else torch.float32, target)
        return cls(model, Tokenizer.load(pretrained.folder), pretrained.folder)

    def seed(self, seed: int) -> None:
        """Restart the random generator."""
        self.generator.manual_seed(seed)

    def write(self, prompt: str, *, on_text: Callable[[str], None] | None = None, **settings) -> str:
        """Continue `prompt`; an empty one starts a document.

        Args:
            prompt: The text to continue.
            on_text: Called with pieces of text as they are written, cut at whole characters.
            **settings: Those of `generate`.
        """
        ids = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.eot_id]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def stream(next_B: torch.Tensor) -> None:
            if on_text is not None and next_B[0] != self.tokenizer.eot_id:
                on_text(decoder.decode(self.tokenizer.decode_bytes([int(next_B[0])])))

        device = self.model.lm_head.weight.device
        output = generate(
            self.model,
            torch.tensor([ids], device=device),
            eos_id=self.tokenizer.eot_id,
            vocab_size=self.tokenizer.n_vocab,
            generator=self.generator,
            on_token=stream,
            **settings,
        )
        new = output[0, len(ids) :].tolist()
        return self.tokenizer.decode(new[: new.index(self.tokenizer.eot_id)] if self.tokenizer.eot_id in new else new)


def find_device(name: str | None) -> torch.device:
    """Return the device that a user names; None is CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not known; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: torch finds {torch.cuda.device_count()} GPUs here; give another, or cpu")
    return device
