"""gigatoken, an optional second engine for many documents: the same ids as tiktoken, several times as fast.

The package is https://pypi.org/project/gigatoken/ (MIT). It knows OpenAI's patterns only.
"""

import logging
import re
import tempfile
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

PATTERN_NAMES = ("o200k", "cl100k", "gpt2")
# Runs of white space from about a million characters on are cut by `Tokenizer.encode`, because tiktoken fails there.
_LONG_RUN = re.compile(r"\s{100000}")
_TRIALS = (
    "",
    "Hello, world! It's 12345 o'clock; we'LL see.",
    "def f(x):\n\treturn {'a': x**2}  # note\n\n\n    if x>=10: pass\r\n",
    "\u00e9\u4e2d\u0301\U0001f600 \u00df\u01c5 \u200b\ufeff\0\x7f",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u3053\u3093 \u0627\u0644",
    "   leading, trailing   \n \n  \t\t x",
    "<|endoftext|> <|start|>user CamelCaseWords ALLCAPS'S don'T 1_000,000.00 http://a.b/c?d=e&f",
)


def fast_encoder(tokenizer):
    """Return a FastEncoder, or False where `tokenizer.engine` is "auto" and gigatoken cannot be used.

    Raises:
        ValueError: `tokenizer.engine` is "gigatoken", which cannot be used.
    """
    try:
        return FastEncoder(tokenizer)
    except (ImportError, LookupError, ValueError) as error:
        if tokenizer.engine == "gigatoken":
            raise ValueError(
                f"engine gigatoken cannot be used: {error}; install the extra `fast`, or choose --engine tiktoken"
            ) from error
        if isinstance(error, ValueError):
            logger.warning("gigatoken is not used: %s", error)
        return False


class FastEncoder:
    """gigatoken's encoder of a tokenizer, which was compared with the tokenizer on a set of trial texts.

    Raises:
        ImportError: gigatoken is not installed.
        LookupError: It does not know the pattern.
        ValueError: It does not encode like the tokenizer.
    """

    def __init__(self, tokenizer):
        import gigatoken

        from data_pipeline.tokenizer.patterns import PATTERNS

        names = [name for name in PATTERN_NAMES if PATTERNS[name] == tokenizer.pattern]
        if not names:
            raise LookupError(f"it does not know the pattern of tokenizer {tokenizer.name}")
        self._tokenizer = tokenizer
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(tokenizer.rank_file)
            self._encoder = gigatoken.Tokenizer.from_tiktoken(str(path), pretokenizer=names[0], special_tokens={})
        for text in _TRIALS:
            if not np.array_equal(self._encode([text])[0], tokenizer.encode(text)):
                raise ValueError(f"it encodes {text!r} otherwise than tiktoken")

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Do as `Tokenizer.encode_documents`."""
        # What tiktoken would refuse is treated in one place, and alike.
        irregular = [i for i, text in enumerate(texts) if len(text) >= 100_000 and _LONG_RUN.search(text)]
        try:
            flat, lengths = self._encode([text if i not in irregular else "" for i, text in enumerate(texts)])
        except (TypeError, UnicodeEncodeError):  # lone surrogates in one of them
            irregular = list(range(len(texts)))
            flat, lengths = np.empty(0, np.uint32), np.zeros(len(texts), np.int64)
        tokens = {i: self._tokenizer.encode(texts[i]) for i in irregular}
        out_lengths = lengths + 1
        for i, ids in tokens.items():
            out_lengths[i] = len(ids) + 1
        ends = np.cumsum(out_lengths)
        out = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
        is_text = np.ones(len(out), bool)
        is_text[ends - 1] = False
        out[ends - 1] = self._tokenizer.eot_id
        for i, ids in tokens.items():
            place = slice(int(ends[i]) - 1 - len(ids), int(ends[i]) - 1)
            out[place] = ids
            is_text[place] = False
        out[is_text] = flat
        return out, out_lengths.astype(np.int32)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._encoder.encode_batch(texts, parallel=False)
        offsets = np.asarray(encoded.layout.offsets.data)
        return np.asarray(encoded.layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
