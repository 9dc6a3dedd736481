"""Byte-pair tokenizers by name or by rank file, on tiktoken's engine; see `load_tokenizer`."""

import hashlib
import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import tiktoken

from data_pipeline.fast import fast_encoder
from data_pipeline.vocabulary import SHA256, find_ranks, format_ranks, parse_ranks, write_file_atomically

END_OF_TEXT = "<|endoftext|>"
HARMONY_SPECIALS = (
    "<|startoftext|>",
    END_OF_TEXT,
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

# How text is cut into words before byte pairs are merged, as published with each vocabulary. `cl100k` and `gpt2` are
# written as tiktoken 0.14 has them. Meta's LLaMA-3 pattern is the original form of cl100k's; the two differ after a
# line break at the end of a text.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "o200k": "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION + "?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTION + "?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "bytes": r"(?s:.{1,256})",
}


def faster(pattern: str) -> str:
    """A pattern that cuts every text as `pattern` does, and makes tiktoken's engine, fancy-regex, 1.2 (o200k) to 2
    (cl100k) times as fast on source code.

    That engine runs a slow interpreter over a pattern with a look-ahead, and hands alternatives that need none to a
    fast automaton, but one at a time. Brackets around them make them one, which is tried once. Possessive quantifiers
    need the interpreter too; in PATTERNS, where alone this is done, nothing after one can match what it gave back, so
    that ordinary ones match the same.
    """
    easy, hard, rest = pattern.partition(r"|\s+(?!\S)|")
    if not hard or pattern not in PATTERNS.values():
        return pattern
    easy = re.sub(r"(?<=[?*+])\+|(?<=\d})\+", "", easy)
    return f"(?:{easy}){hard}{rest}"


_PROBE = "Word's 123 ,;\t\n \r\n\0\x7f \u00e9\u4e2d\u0301\U0001f600 "
_LLAMA3_RANKS = 128_000
_FILE_NAME = "tokenizer.gptoss.json"
_RANKS_FILE_NAME = "tokenizer.tiktoken"
_FORMAT = "gptoss_dist tokenizer"


class Tokenizer:
    """Text to token ids and back, exactly.

    name: for people; what makes two tokenizers the same is `sha256`, of pattern, ranks, special tokens, end of text.
    ranks: {token bytes: id}; must hold the 256 single bytes. pattern: regular expression that cuts text into words.
    special_tokens: {text: id}, never produced from text by `encode`. eot_token: the special token that ends a document.
    irregular: counts of documents that `encode` had to treat: "split" (a run too long for the regular expression
        engine; no token crosses the cuts) and "repaired" (lone surrogates, which are not Unicode text, became U+FFFD).
    engine: of `encode_documents`. rank_file: the ranks as bytes of a tiktoken rank file.
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
        self._fast = None
        self.ranks = ranks
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=faster(pattern), mergeable_ranks=ranks, special_tokens=self.special_tokens
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
        """Token ids of `text`, int32 [n]. Text that looks like a special token is encoded as ordinary text."""
        try:
            return self._encode_once(text)
        except UnicodeEncodeError:
            self.irregular["repaired"] += 1
            return self.encode(repaired(text))
        except ValueError:
            self.irregular["split"] += 1
            return np.concatenate(self._encode_halves(text))

    def load_engine(self) -> None:
        """Builds what `engine` names, which `encode_documents` would do at its first call; forked processes share it.
        Raises ValueError as that does.
        """
        if self._fast is None:
            self._fast = fast_encoder(self) if self.engine != "tiktoken" else False

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, each with its end-of-text token, in `dtype` [n]; and the number of ids
        of each, int32 [len(texts)].

        `engine` does the work: "tiktoken", "gigatoken" (the extra `fast`), or "auto", which is gigatoken where it is
        installed and encodes a set of trial texts alike. The ids are the same. Raises ValueError when gigatoken is
        asked for and cannot be used.
        """
        self.load_engine()
        if self._fast:
            return self._fast.encode_documents(texts, dtype)
        end = np.array([self.eot_id], np.uint32)
        parts, lengths = [], []
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
        """Text of token ids (array, tensor or list); bytes that are not UTF-8 become U+FFFD. Raises ValueError for an
        id without a token.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        """As `decode`, without assuming that the ids end at a character boundary."""
        try:
            return self._encoding.decode_bytes(np.asarray(ids).ravel().tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(f"tokenizer {self.name} (n_vocab {self.n_vocab}) cannot decode: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.gptoss.json, and tokenizer.tiktoken with the ranks, into `directory`."""
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
        write_file_atomically(Path(directory) / _FILE_NAME, text.encode())

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """The tokenizer saved in `directory`. Raises ValueError, naming the file, when it is missing, damaged or
        altered.
        """
        path = Path(directory) / _FILE_NAME
        try:
            saved = json.loads(path.read_text("utf-8"))
            if saved["format"] != _FORMAT or saved["version"] != 1:
                raise ValueError(f"format {saved['format']!r} version {saved['version']!r} is not known")
            ranks_path = path.with_name(Path(saved["ranks_file"]).name)
            ranks = parse_ranks(ranks_path.read_bytes(), str(ranks_path))
            tokenizer = cls(saved["name"], ranks, saved["pattern"], saved["special_tokens"], saved["eot_token"])
            if tokenizer.sha256 != saved["sha256"]:
                raise ValueError("its content does not match its own SHA-256")
        except OSError as error:
            raise ValueError(f"no tokenizer in {directory}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged tokenizer: {error}") from error
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
    """Unicode text instead of one with surrogates: lone ones become U+FFFD, and halves of a pair that belong together
    the character they mean.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def load_tokenizer(
    name_or_path: str | Path,
    *,
    pattern: str | None = None,
    vocab_file: str | Path | None = None,
    vocab_size: int | None = None,
    download: bool = True,
) -> Tokenizer:
    """A tokenizer by name, from a directory it was saved in, or from a tiktoken rank file.

    name_or_path: `builtin` (4,096 byte pairs trained on Python's standard library, and the Harmony specials), `bytes`,
        `o200k_harmony` (gpt-oss), `o200k_base`, `cl100k_base`, `gpt2`; a directory written by `Tokenizer.save`; or a
        rank file such as LLaMA-3's `tokenizer.model` (recognised by its 128,000 ranks: its pattern and its 256 special
        tokens are known, n_vocab 128,256).
    pattern: for another rank file, a regular expression or one of PATTERNS; its special tokens are then Harmony's,
        after the last rank.
    vocab_file: where the published rank file of an OpenAI name is, instead of searching; see `vocabulary.find_ranks`.
    vocab_size: leave out the last merges so that n_vocab, special tokens included, is exactly this. Most ids stay what
        they are; the special tokens move.
    download: whether a published vocabulary that is nowhere on this machine may be downloaded.

    Raises ValueError with the remedy when the name is unknown or the vocabulary cannot be found or read.
    """
    name = str(name_or_path)
    if name in _PUBLISHED:
        ranks_name, pattern_name, eot_token, special_tokens = _PUBLISHED[name]
        ranks = parse_ranks(find_ranks(ranks_name, vocab_file=vocab_file, download=download), ranks_name)
        tokenizer = Tokenizer(name, ranks, PATTERNS[pattern_name], special_tokens, eot_token)
    elif name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        tokenizer = Tokenizer(name, ranks, PATTERNS["bytes"], _after(ranks, HARMONY_SPECIALS))
    elif name == "builtin":
        data = (resources.files("data_pipeline") / "builtin.tiktoken").read_bytes()
        ranks = parse_ranks(data, "builtin.tiktoken")
        tokenizer = Tokenizer(name, ranks, PATTERNS["o200k"], _after(ranks, HARMONY_SPECIALS))
    elif Path(name).is_dir():
        tokenizer = Tokenizer.load(name)
    elif Path(name).is_file():
        tokenizer = _from_rank_file(Path(name), pattern)
    else:
        known = ", ".join(["builtin", "bytes", *_PUBLISHED])
        raise ValueError(f"tokenizer {name!r} is neither a known name ({known}) nor a file or directory")
    return tokenizer if vocab_size is None else _shortened(tokenizer, vocab_size)


def _from_rank_file(path: Path, pattern: str | None) -> Tokenizer:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    ranks = parse_ranks(data, str(path))
    published = {digest: name for name, digest in SHA256.items()}.get(hashlib.sha256(data).hexdigest())
    if pattern is None and published:
        return load_tokenizer("gpt2" if published == "r50k_base" else published, vocab_file=path)
    if len(ranks) == _LLAMA3_RANKS:
        pattern = PATTERNS.get(pattern or "llama3", pattern)
        return Tokenizer(path.name, ranks, pattern, _after(ranks, _llama3_specials()), "<|end_of_text|>")
    if pattern is None:
        raise ValueError(
            f"{path}: the pattern of this vocabulary of {len(ranks)} ranks is not known; pass pattern, one of "
            f"{', '.join(PATTERNS)} or a regular expression"
        )
    return Tokenizer(path.name, ranks, PATTERNS.get(pattern, pattern), _after(ranks, HARMONY_SPECIALS))


def _shortened(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    keep = vocab_size - len(tokenizer.special_tokens)
    if keep < 256 or vocab_size > tokenizer.n_vocab:
        raise ValueError(
            f"vocab_size {vocab_size}: tokenizer {tokenizer.name} can have {256 + len(tokenizer.special_tokens)} to "
            f"{tokenizer.n_vocab} ids"
        )
    ranks = {token: rank for token, rank in tokenizer.ranks.items() if rank < keep}
    specials = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    special_tokens = {token: keep + i for i, token in enumerate(specials)}
    return Tokenizer(f"{tokenizer.name}-{vocab_size}", ranks, tokenizer.pattern, special_tokens, tokenizer.eot_token)


def _after(ranks: dict[bytes, int], specials: tuple[str, ...]) -> dict[str, int]:
    return {token: i for i, token in enumerate(specials, max(ranks.values()) + 1)}


def _llama3_specials() -> tuple[str, ...]:
    """Meta's 256 (LLaMA-3.1 renames some of the reserved ones). The document end is `<|end_of_text|>`; `<|eot_id|>`
    ends a chat turn.
    """
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    header = ("<|start_header_id|>", "<|end_header_id|>")
    return ("<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], *header, reserved[4], "<|eot_id|>", *reserved[5:])


def _harmony_specials() -> dict[str, int]:
    named = {
        "<|startoftext|>": 199998,
        END_OF_TEXT: 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
        "<|endofprompt|>": 200018,
    }
    taken = set(named.values())
    return named | {f"<|reserved_{i}|>": i for i in range(200_000, 201_088) if i not in taken}


_FIM_SPECIALS = {
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# name: published ranks, pattern, token that ends a document, special tokens; from tiktoken's openai_public.py
_PUBLISHED = {
    "o200k_harmony": ("o200k_base", "o200k", END_OF_TEXT, _harmony_specials()),
    "o200k_base": ("o200k_base", "o200k", END_OF_TEXT, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "cl100k_base": ("cl100k_base", "cl100k", END_OF_TEXT, {END_OF_TEXT: 100257} | _FIM_SPECIALS),
    "gpt2": ("r50k_base", "gpt2", END_OF_TEXT, {END_OF_TEXT: 50256}),
}
