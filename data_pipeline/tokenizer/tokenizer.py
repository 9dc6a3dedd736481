"""Byte-pair tokenizers on tiktoken's engine; see `published.load_tokenizer` for those with a name."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import tiktoken

from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import Count, read_bytes, read_json
from data_pipeline.tokenizer.gigatoken_engine import fast_encoder
from data_pipeline.tokenizer.patterns import for_fancy_regex
from data_pipeline.tokenizer.rank_files import MOST_ID, MOST_RANK_BYTES, format_ranks, parse_ranks

END_OF_TEXT = "<|endoftext|>"
_PROBE = "Word's 123 ,;\t\n \r\n\0\x7f \u00e9\u4e2d\u0301\U0001f600 "
FILE_NAME = "tokenizer.gptoss.json"
_RANKS_FILE_NAME = "tokenizer.tiktoken"
_FORMAT = "gptoss_dist tokenizer"


class _Saved(msgspec.Struct):
    """What `Tokenizer.save` writes."""

    format: str
    version: int
    name: str
    n_vocab: Count
    pattern: str
    special_tokens: dict[str, Annotated[int, msgspec.Meta(ge=0, le=MOST_ID)]]
    eot_token: str
    ranks_file: str
    sha256: str


class Tokenizer:
    """Text to token ids and back, exactly.

    Args:
        name: What people call it.
        ranks: Ids by token bytes; the 256 single bytes must be among them.
        pattern: The regular expression that cuts text into words.
        special_tokens: Ids by text, which `encode` never produces from text.
        eot_token: The special token that ends a document.

    Attributes:
        sha256: What makes two tokenizers the same: a hash of pattern, ranks, special tokens and end of text.
        n_vocab: One more than the largest id.
        eot_id: The id of `eot_token`.
        irregular: Counts of documents that `encode` had to treat: "split" (a run too long for the regular expression
            engine; no token crosses the cuts) and "repaired" (lone surrogates, which are not Unicode text, became
            U+FFFD).
        engine: What does the work of `encode_documents`: "tiktoken", "gigatoken" or "auto".
        rank_file: The ranks as bytes of a tiktoken rank file.

    Raises:
        ValueError: The pattern is not accepted, or leaves out some characters.
    """

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        pattern: str,
        special_tokens: dict[str, int],
        eot_token: str = END_OF_TEXT,
    ):
        self.name = name
        self.pattern = pattern
        self.special_tokens = dict(special_tokens)
        self.eot_token = eot_token
        self.eot_id = self.special_tokens[eot_token]
        self.n_vocab = max(max(ranks.values()), max(self.special_tokens.values())) + 1
        self.irregular: Counter[str] = Counter()
        self.engine = "auto"
        self._fast: Any = None  # False: tiktoken does the work
        self.ranks = ranks
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=for_fancy_regex(pattern), mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except ValueError as error:
            raise ValueError(f"tokenizer {name}: pattern {pattern!r} is not accepted: {error}") from error
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(f"tokenizer {name}: pattern {pattern!r} leaves out some characters, so text would be lost")
        self.rank_file = format_ranks(ranks)
        ranks_sha256 = hashlib.sha256(self.rank_file).hexdigest()
        identity = [pattern, ranks_sha256, sorted(self.special_tokens.items()), eot_token]
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text`, int32 [n]; what looks like a special token is encoded as ordinary text."""
        try:
            return self._encode_once(text)
        except UnicodeEncodeError:
            self.irregular["repaired"] += 1
            return self.encode(repaired(text))
        except ValueError:
            self.irregular["split"] += 1
            return np.concatenate(self._encode_halves(text))

    def load_engine(self) -> None:
        """Build what `engine` names, which `encode_documents` would do at its first call; forked processes share it.

        Raises:
            ValueError: "gigatoken" is asked for and cannot be used.
        """
        if self._fast is None:
            self._fast = fast_encoder(self) if self.engine != "tiktoken" else False

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Encode many texts, each followed by its end-of-text token.

        `engine` does the work: "tiktoken", "gigatoken" (the extra `fast`), or "auto", which is gigatoken where it is
        installed and encodes a set of trial texts alike. The ids are the same.

        Args:
            texts: The texts.
            dtype: The type of the ids.

        Returns:
            The ids of all texts, one after the other, in `dtype` [n], and the number of ids of each text, its
            end-of-text token included, int32 [len(texts)].

        Raises:
            ValueError: "gigatoken" is asked for and cannot be used.
        """
        self.load_engine()
        if self._fast:
            return self._fast.encode_documents(texts, dtype)
        end = np.array([self.eot_id], np.uint32)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        for text in texts:
            try:
                tokens = self._encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # also UnicodeEncodeError
                tokens = self.encode(text)
            parts += (tokens, end)
            lengths.append(len(tokens) + 1)
        tokens = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        # Ids are below 2^31: for 4 bytes another view of them will do.
        tokens = tokens.view(dtype) if dtype.itemsize == tokens.itemsize else tokens.astype(dtype)
        return tokens, np.array(lengths, np.int32)

    def decode(self, ids) -> str:
        """Return the text of token ids (array, tensor or list); bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id has no token.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        """Return the bytes of token ids, which need not end at a character boundary; errors are those of `decode`."""
        try:
            return self._encoding.decode_bytes(np.asarray(ids).ravel().tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(f"tokenizer {self.name} (n_vocab {self.n_vocab}) cannot decode: {error}") from error

    def ids_without_token(self, vocab_size: int) -> np.ndarray:
        """Return the ids below `vocab_size` that have no token, int64 in ascending order.

        Published vocabularies have some below their largest id, and a model may have more rows than its tokenizer ids.

        Args:
            vocab_size: How many ids a model knows.
        """
        is_unused = np.ones(vocab_size, bool)
        for ids in (self.ranks.values(), self.special_tokens.values()):
            found = np.fromiter(ids, np.int64, len(ids))
            is_unused[found[found < vocab_size]] = False
        return np.flatnonzero(is_unused)

    def description(self) -> dict[str, Any]:
        """Return what a dataset's manifest says of its tokenizer; another tokenizer has another description."""
        return {"name": self.name, "sha256": self.sha256, "n_vocab": self.n_vocab, "eot_id": self.eot_id}

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.gptoss.json, and tokenizer.tiktoken with the ranks, into `directory`."""
        description = {
            "format": _FORMAT,
            "version": 1,
            "name": self.name,
            "n_vocab": self.n_vocab,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "eot_token": self.eot_token,
            "ranks_file": _RANKS_FILE_NAME,
            "sha256": self.sha256,
        }
        write_file_atomically(Path(directory) / _RANKS_FILE_NAME, self.rank_file)
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        write_file_atomically(Path(directory) / FILE_NAME, text.encode())

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Return the tokenizer saved in `directory`.

        Raises:
            ValueError: It is missing, damaged or altered; the message names the file.
        """
        path = Path(directory) / FILE_NAME
        try:
            saved = read_json(path, _Saved)
            if saved.format != _FORMAT or saved.version != 1:
                raise ValueError(f"format {saved.format!r} version {saved.version!r} is not known")
            ranks_path = path.with_name(Path(saved.ranks_file).name)
            ranks = parse_ranks(read_bytes(ranks_path, most=MOST_RANK_BYTES), str(ranks_path))
            tokenizer = cls(saved.name, ranks, saved.pattern, saved.special_tokens, saved.eot_token)
            if (tokenizer.n_vocab, tokenizer.sha256) != (saved.n_vocab, saved.sha256):
                raise ValueError("its content does not match its own n_vocab and SHA-256")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if isinstance(error.__cause__, OSError):
                raise ValueError(f"no tokenizer in {directory}: {error}") from error
            raise ValueError(f"{path}: damaged tokenizer: {str(error).removeprefix(f'{path}: ')}") from error
        return tokenizer

    def _encode_once(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def _encode_halves(self, text: str) -> list[np.ndarray]:
        middle = len(text) // 2
        parts = []
        for half in (text[:middle], text[middle:]):
            try:
                parts.append(self._encode_once(half))
            except ValueError:
                if len(half) < 1024:
                    raise
                parts += self._encode_halves(half)
        return parts


def repaired(text: str) -> str:
    """Return Unicode text instead of text with surrogates.

    Lone surrogates become U+FFFD, and two halves that belong together become the character that they mean.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
