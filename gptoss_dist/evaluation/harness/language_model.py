"""What the harness sees of a model: it asks for log-likelihoods and texts. This module needs `lm_eval`.

The harness believes that there is one process; `team.py` shares its requests out. Its conventions are those of its own
`hf` model: an end-of-text token stands before a text without a context, requests that are too long lose their
beginning, and what is written ends at the first stop.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_pipeline import Tokenizer
from data_pipeline.tokenizer.harmony import stop_ids
from gptoss_dist.evaluation.continuing import Continuation, ContinuationSettings
from gptoss_dist.evaluation.harness.chat import encoder, render, require_template
from gptoss_dist.evaluation.harness.generation_kwargs import read
from gptoss_dist.evaluation.scoring import Request, Score


class Worker(Protocol):
    """What scores and writes: a `Team`, or what hands its requests to one."""

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request."""

    def continue_prompts(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Return the new tokens of each prompt."""


class HarnessModel(TemplateLM):
    """A model of this project as one of the harness's.

    Args:
        worker: What does the work.
        tokenizer: The model's.
        max_length: Tokens that the model may see.
        template: Its chat template, if it has one.
    """

    def __init__(self, worker: Worker, tokenizer: Tokenizer, *, max_length: int, template: str | None = None) -> None:
        super().__init__()
        self.worker, self.ours, self.max_length, self.template = worker, tokenizer, max_length, template
        self._encode = encoder(tokenizer)
        self._specials = frozenset(tokenizer.special_tokens.values())
        self._seeds = itertools.count()

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.ours.eot_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells caches of prompts by."""
        template = hashlib.sha256((self.template or "").encode()).hexdigest()[:8]
        return f"{self.ours.name}-{self.ours.sha256[:8]}-{template}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; nothing is put before it."""
        return self._encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that prompts are put into, for the record."""
        return self.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as the text of a prompt.

        Raises:
            ValueError: The model has no chat template, or it refuses the messages.
        """
        template = require_template(self.template, self.ours, "chat")
        return render(template, chat_history, end_of_text=self.ours.eot_token, begin_answer=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        Raises:
            ValueError: A continuation has no token, or more than the model may see; the harness's own `hf` model
                stops at either with an `AssertionError`.
        """
        pairs = [self._pair(*request.args) for request in requests]
        for request, (_, continuation) in zip(requests, pairs):
            self._check(request, continuation)
        return self._loglikelihood_tokens([(request.args, *pair) for request, pair in zip(requests, pairs)])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of what follows it, as `TemplateLM.loglikelihood` makes them."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation)
        begins_so = ids[:1] == [self.prefix_token_id]
        return (ids[:1], ids[1:]) if begins_so else ([self.prefix_token_id], ids)

    def _check(self, request: Instance, continuation: list[int]) -> None:
        """Check that a continuation can be scored.

        Raises:
            ValueError: It cannot.
        """
        context, text = request.args
        whose = f"document {request.doc_id} of task {request.task_name}: the answer {text[:40]!r}"
        if not continuation:
            raise ValueError(
                f"{whose} adds no token to its prompt, which ends in {context[-40:]!r}, so that it cannot be scored; "
                "give it a text that is not empty, set apart from the prompt by a space (target_delimiter)"
            )
        if len(continuation) > self.max_length:
            raise ValueError(
                f"{whose} has {len(continuation):,} tokens, and the model may see max_length={self.max_length:,}; "
                "shorten it, or leave the document out"
            )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self.worker.score([self._request(c, t) for _, c, t in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        return Request((context + continuation)[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, in windows side by side of `max_length` tokens."""
        parts: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(parts)
            parts += [self._request(*make_disjoint_window(window)) for window in windows]
            counts.append(len(parts) - before)
        scores = iter(self.worker.score(parts))
        return [sum(score.log_likelihood for score in itertools.islice(scores, count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes behind each prompt, up to its stops."""
        asked = [self._continuation(request) for request in requests]
        written = self.worker.continue_prompts([continuation for continuation, _ in asked])
        return [self._text(ids, stops) for ids, (_, stops) in zip(written, asked)]

    def _continuation(self, request: Instance) -> tuple[Continuation, list[str]]:
        """Return what is asked of the model, and the texts at which the answer is cut."""
        context, given = request.args
        wanted = read(given, str(request.task_name))
        stops = handle_stop_sequences(list(wanted.stops), eos=self.ours.eot_token)
        new = wanted.max_new_tokens
        most = self.max_length - new
        if most < 1:
            raise ValueError(
                f"task {request.task_name}: generation_kwargs: max_gen_toks={new} leaves no room for a prompt within "
                f"max_length={self.max_length}; give less"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        settings = ContinuationSettings(
            max_new_tokens=new,
            stop_ids=tuple(stop_ids(self.ours)),
            stop_texts=tuple(stop for stop in stops if stop),
            sampling=wanted.sampling,
        )
        return Continuation(ids[-most:], settings, next(self._seeds)), stops

    def _text(self, ids: list[int], stops: list[str]) -> str:
        ends = frozenset(stop_ids(self.ours))
        kept = itertools.takewhile(lambda id_: id_ not in ends, ids)
        text = self.ours.decode([id_ for id_ in kept if id_ not in self._specials])
        return postprocess_generated_text(text, stops, None)
