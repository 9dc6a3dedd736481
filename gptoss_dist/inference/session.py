"""A trained model with its tokenizer: text in, text out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data_pipeline import Tokenizer
from data_pipeline.tokenizer.harmony import stop_ids
from gptoss_dist.checkpoint import UnknownStopIds, carried_stop_ids, open_pretrained
from gptoss_dist.inference.compiled import Compile
from gptoss_dist.inference.generation import Completion, complete
from gptoss_dist.model.generate import fixed_room
from gptoss_dist.model.sampling import Sampling
from gptoss_dist.model.transformer import GptOss

log = logging.getLogger(__name__)


class Session:
    """A model, its tokenizer and a random state, which are kept between prompts; and the folder that they are from.

    It counts the tokens that it writes, so that the decoding step is compiled once so many are asked for that it pays.

    Args:
        model: The model.
        tokenizer: What its ids mean.
        folder: Where both are from.
        more_stop_ids: Ids that end a text, besides those of the tokenizer: the end of a document and Harmony's stops.
    """

    def __init__(
        self, model: GptOss, tokenizer: Tokenizer, folder: Path | None = None, more_stop_ids: Sequence[int] = ()
    ) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.stop_ids = [*stop_ids(tokenizer), *more_stop_ids]
        self.generator = torch.Generator()
        self._steps: Counter[tuple[int, int]] = Counter()
        """Decoding steps so far, by samples at once and the room of a cache."""

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Session:
        """Load the newest checkpoint under `path`, or an exported model, in float32 on CPU and bfloat16 on CUDA.

        The ids that end a text in a generation_config.json beside it do so here too.

        Raises:
            ValueError: There is no such device, no intact checkpoint, it does not fit, there is no tokenizer of ours
                beside it, or its generation_config.json is damaged.
        """
        target = find_device(device)
        pretrained = open_pretrained(path)
        model = pretrained.build(torch.bfloat16 if target.type == "cuda" else torch.float32, target)
        tokenizer = Tokenizer.load(pretrained.folder)
        try:
            carried = carried_stop_ids(pretrained.folder, tokenizer.n_vocab)
        except UnknownStopIds as error:
            log.warning("%s: no text ends at ids of its generation_config.json: %s", pretrained.folder, error)
            carried = []
        return cls(model, tokenizer, pretrained.folder, carried)

    def seed(self, seed: int) -> None:
        """Restart the random generator, from which samples without a seed of their own get one."""
        self.generator.manual_seed(seed)

    def write(
        self, prompt: str, *, on_text: Callable[[str], None] | None = None, max_new_tokens: int, **settings
    ) -> str:
        """Continue `prompt` once; an empty one starts a document.

        Args:
            prompt: The text to continue.
            on_text: Called with pieces of text as they are written, cut at whole characters.
            max_new_tokens: How many tokens to write at most.
            **settings: Those of `samples`.

        Returns:
            What was written, without the prompt.
        """
        show = None if on_text is None else lambda _, piece: on_text(piece)
        ((one,),) = self.samples([prompt], on_text=show, max_new_tokens=max_new_tokens, **settings)
        assert one.text is not None
        return one.text

    def samples(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        n: int = 1,
        stop: str | Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        compile: Compile = "auto",
        **sampling,
    ) -> list[list[Completion]]:
        """Continue each prompt n times, all in one batch, up to a stop id, a stop text, or `max_new_tokens`.

        Args:
            prompts: Texts to continue; an empty one starts a document.
            max_new_tokens: How many tokens to write at most.
            n: Samples of each prompt.
            stop: A text, or several, that end a sample, and do not belong to it.
            seeds: One of each sample, those of the first prompt first; by default the session's generator draws them.
            logprobs: Whether to return log-probabilities.
            on_text: Called with the number of a sample and pieces of its text as they are written.
            compile: Whether to compile the decoding step; `auto` does once it pays, earlier texts of the session
                included (`compiled.py`).
            **sampling: Those of `Sampling`.

        Raises:
            ValueError: A setting is out of range, `prompts` is one text, logits are nan, or the step cannot be compiled
                and `compile` is true.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is a text, whose characters would each be a prompt; give a list of texts")
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts) * n,), generator=self.generator).tolist()
        ids = [self.tokenizer.encode(prompt).tolist() or [self.tokenizer.eot_id] for prompt in prompts]
        shape = len(prompts) * n, fixed_room(max(map(len, ids), default=0) + max_new_tokens)
        found = complete(
            self.model,
            ids,
            Sampling(**sampling),
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            stop_texts=[stop] if isinstance(stop, str) else stop,
            tokenizer=self.tokenizer,
            n=n,
            seeds=seeds,
            logprobs=logprobs,
            on_text=on_text,
            compile=compile,
            earlier_steps=self._steps[shape],
        )
        self._steps[shape] += max((len(one.ids) for samples in found for one in samples), default=0)
        return found


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
