"""The text of a sample while it grows, and where a stop text ends it.

Tokens end anywhere: within a character, and within a stop text. Bytes are compared, since in UTF-8 a text is found
where it is and nowhere else, and a piece is shown when no stop text can begin in it any more:

    stop text "##"    tokens  "ab#"  "#c"
    shown                     "ab"         (the end: the text is "ab", and its ids are those of the first token)
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from data_pipeline import Tokenizer


class GrowingText:
    """Text of one sample.

    Args:
        tokenizer: What the ids mean.
        stop_texts: Texts that end the sample and do not belong to it, in UTF-8; none is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[bytes] = ()) -> None:
        self.tokenizer, self.stop_texts = tokenizer, stop_texts
        self.longest_stop = max(map(len, stop_texts), default=1)
        self.bytes = bytearray()
        self.starts: list[int] = []
        """Where each token begins in `bytes`."""
        self._shown = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> bool:
        """Add a token; return whether it completes a stop text, before which the text then ends."""
        searched = max(len(self.bytes) - self.longest_stop + 1, 0)
        self.starts.append(len(self.bytes))
        self.bytes += self.tokenizer.decode_bytes([token])
        found = [at for stop in self.stop_texts if (at := self.bytes.find(stop, searched)) >= 0]
        if found:
            del self.bytes[min(found) :]
            self.starts = [start for start in self.starts if start < len(self.bytes)]
        return bool(found)

    @property
    def tokens(self) -> int:
        """How many of the tokens have a part in the text."""
        return len(self.starts)

    def news(self, *, final: bool = False) -> str:
        """Return what can be shown now and was not shown before, in whole characters.

        Args:
            final: Nothing follows, so that nothing is held back.
        """
        end = len(self.bytes) - (0 if final else self._beginning_of_a_stop())
        piece, self._shown = bytes(self.bytes[self._shown : end]), max(end, self._shown)
        return self._decoder.decode(piece, final)

    def _beginning_of_a_stop(self) -> int:
        """Return how many of the last bytes may be the beginning of a stop text."""
        tail = bytes(self.bytes[-self.longest_stop + 1 :]) if self.longest_stop > 1 else b""
        lengths = range(len(tail), 0, -1)
        return next((n for n in lengths if any(stop.startswith(tail[-n:]) for stop in self.stop_texts)), 0)

    def __str__(self) -> str:
        return self.bytes.decode("utf-8", "replace")
