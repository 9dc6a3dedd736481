"""Tokenizers: exact round trips, nothing injected, and one clear line for every way a vocabulary can be wrong."""

import base64
import gzip
import hashlib
import json
import random
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data_pipeline import Tokenizer, load_tokenizer
from data_pipeline.corpora.sources import open_source
from data_pipeline.prepare.__main__ import main as prepare
from data_pipeline.tokenizer import rank_files as vocabulary
from data_pipeline.tokenizer.patterns import PATTERNS, for_fancy_regex
from data_pipeline.tools import train_bpe as bpe

NASTY = [
    "",
    " ",
    "\x00\x01\x7f\r\n\r \t\v\u2028\u0085",
    "naïve café — 你好，世界 שלום 🏳️‍🌈👩‍👩‍👧 e\u0301 \ufeff\ufffd\U0010ffff",
    "<|endoftext|><|start|>user<|message|>hi<|end|><|return|>",
    "x" * 3000 + "\n" * 3000 + "  trailing  \n  ",
    "def f(x):\n\treturn x**2  # 12345678901234567890\n",
]


@pytest.fixture(scope="module", params=["builtin", "bytes"])
def tokenizer(request):
    return load_tokenizer(request.param)


def test_round_trip_is_exact_and_injects_no_special_token(tokenizer):
    for text in NASTY:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and (ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.n_vocab)
        assert tokenizer.decode(ids) == text
        assert not np.isin(ids, list(tokenizer.special_tokens.values())).any()
    assert not tokenizer.irregular


def test_sizes_are_as_documented(tokenizer):
    assert tokenizer.n_vocab == {"builtin": 4105, "bytes": 265}[tokenizer.name]
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_a_million_spaces_and_lone_surrogates_are_counted_not_fatal():
    tokenizer = load_tokenizer("builtin")
    spaces = "a" + " " * 1_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode(spaces)) == spaces
    assert tokenizer.irregular == {"split": 1}
    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb 😀"
    assert tokenizer.irregular == {"split": 1, "repaired": 1}


@pytest.mark.heavy
@pytest.mark.parametrize("name", PATTERNS)
def test_the_faster_pattern_cuts_every_text_as_the_published_one_does(name):
    """Cases, digits, marks, line breaks and spaces of every kind in random order; and sources. Every pair of bytes is a
    token, with ranks in random order, so that words that are cut elsewhere are other tokens.
    """
    generator = random.Random(0)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    generator.shuffle(pairs)
    ranks = {token: rank for rank, token in enumerate([bytes([a]) for a in range(256)] + pairs)}
    published, ours = (
        tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": len(ranks)})
        for pattern in (PATTERNS[name], for_fancy_regex(PATTERNS[name]))
    )
    assert (ours._pat_str == published._pat_str) == (name == "bytes")
    kinds = "aBé中ǅʰ\u0301\u09031\u0663Ⅷſ\u212a'’$_./\0\x7f\u200d\ufeff😀 \t\n\r\x0b\x1c\x85\xa0\u2028\u3000"
    pieces = [*kinds, "  ", "\r\n", "'s", "'LL", "'ſ", "//"]
    texts = ["".join(generator.choices(pieces, k=generator.randint(1, 30))) for _ in range(10_000)]
    for text in [*texts, *list(open_source("pystdlib").documents())[:50]]:
        assert ours.encode_ordinary(text) == published.encode_ordinary(text), repr(text[:100])


def test_decoding_an_unknown_id_is_a_value_error(tokenizer):
    for bad in (tokenizer.n_vocab, -1, 2**40):
        with pytest.raises(ValueError, match="cannot decode"):
            tokenizer.decode([bad])


def test_the_builtin_vocabulary_compresses_and_never_changes(tokenizer):
    if tokenizer.name == "builtin":
        text = "import os\n\nfor name in sorted(os.listdir(path)):\n    print(name)\n"
        assert len(text) / len(tokenizer.encode(text)) > 2.5
        assert tokenizer.sha256.startswith("3a724e68e5b8d337"), "datasets prepared with `builtin` would be orphaned"


def test_save_and_load_keep_identity(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.sha256, loaded.n_vocab, loaded.eot_id) == (
        tokenizer.name,
        tokenizer.sha256,
        tokenizer.n_vocab,
        tokenizer.eot_id,
    )
    assert loaded.special_tokens == tokenizer.special_tokens
    assert np.array_equal(loaded.encode(NASTY[3]), tokenizer.encode(NASTY[3]))
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer.gptoss.json").unlink(), "no tokenizer in"),
        (lambda d: (d / "tokenizer.tiktoken").unlink(), "no tokenizer in"),
        (lambda d: (d / "tokenizer.gptoss.json").write_text('{"format": "gpt'), "tokenizer.gptoss.json: damaged"),
        (lambda d: _edit(d, lambda s: s.pop("pattern")), "damaged tokenizer: pattern is missing"),
        (lambda d: _edit(d, lambda s: s.update(version=9)), "version 9"),
        (lambda d: _edit(d, lambda s: s["special_tokens"].update({"<|end|>": 5000})), "SHA-256"),
        (lambda d: (d / "tokenizer.tiktoken").write_bytes(b"IQ== 0\n!!"), "tokenizer.tiktoken, line 2"),
    ],
)
def test_a_damaged_saved_tokenizer_is_one_clear_line(tmp_path, damage, message):
    load_tokenizer("bytes").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def _edit(directory, change):
    path = directory / "tokenizer.gptoss.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


# --- rank files ---------------------------------------------------------------------------------


def _rank_file(path, n_ranks):
    """All single bytes, then two-byte tokens and three-byte ones: enough to look like a vocabulary of any size."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [i.to_bytes(2, "big") for i in range(min(n_ranks - 256, 65536))]
    tokens += [b"\xff" + i.to_bytes(2, "big") for i in range(max(0, n_ranks - 256 - 65536))]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens[:n_ranks])))
    return path


def test_a_llama3_file_is_recognised_by_its_size(tmp_path):
    tokenizer = load_tokenizer(_rank_file(tmp_path / "tokenizer.model", 128_000))
    assert tokenizer.n_vocab == 128_256 and len(tokenizer.special_tokens) == 256
    assert tokenizer.pattern == PATTERNS["llama3"]
    assert tokenizer.special_tokens["<|begin_of_text|>"] == 128_000
    assert tokenizer.eot_id == tokenizer.special_tokens["<|end_of_text|>"] == 128_001
    assert tokenizer.special_tokens["<|start_header_id|>"] == 128_006
    assert tokenizer.special_tokens["<|eot_id|>"] == 128_009
    assert tokenizer.special_tokens["<|reserved_special_token_250|>"] == 128_255
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in NASTY)

    shortened = load_tokenizer(tmp_path / "tokenizer.model", vocab_size=128_000)
    assert shortened.n_vocab == 128_000 and shortened.eot_id == 127_745
    assert shortened.sha256 != tokenizer.sha256
    assert all(shortened.decode(shortened.encode(text)) == text for text in NASTY)
    with pytest.raises(ValueError, match="vocab_size 400"):
        load_tokenizer(tmp_path / "tokenizer.model", vocab_size=400)


def test_another_rank_file_needs_a_pattern_that_covers_all_text(tmp_path):
    path = _rank_file(tmp_path / "mine.tiktoken", 1000)
    with pytest.raises(ValueError, match=r"mine.tiktoken: the pattern of this vocabulary of 1000 ranks is not known"):
        load_tokenizer(path)
    assert load_tokenizer(path, pattern="gpt2").pattern == PATTERNS["gpt2"]
    assert load_tokenizer(path, pattern=r"(?s:.)").n_vocab == 1009
    with pytest.raises(ValueError, match="leaves out some characters"):
        load_tokenizer(path, pattern=r"\w+")
    with pytest.raises(ValueError, match="is not accepted"):
        load_tokenizer(path, pattern="(")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nnot a rank file\n", "line 2: not a tiktoken rank file"),
        (b"IQ== 0\n", "each of the 256 single bytes"),
        (b"IQ== 0\nIg== 0\n", "distinct"),
    ],
)
def test_bad_rank_files(tmp_path, content, message):
    (tmp_path / "bad.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "bad.tiktoken", pattern="gpt2")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'o300k' is neither a known name .*o200k_harmony"):
        load_tokenizer("o300k")


# --- published vocabularies ---------------------------------------------------------------------


def test_a_published_vocabulary_is_found_by_hash_wherever_it_is(tmp_path, monkeypatch):
    data = _rank_file(tmp_path / "plain", 300).read_bytes()
    monkeypatch.setitem(vocabulary.SHA256, "o200k_base", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ValueError) as error:
        vocabulary.find_ranks("o200k_base", download=False)
    assert str(tmp_path / "cache/gptoss_dist/o200k_base.tiktoken") in str(error.value)
    assert "pip install bpe-openai" in str(error.value) and "\n" not in str(error.value)

    # tiktoken would delete a cached file with the wrong content; we leave it alone and look further.
    cached = tmp_path / "cache/gptoss_dist/o200k_base.tiktoken"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"wrong")
    (tmp_path / "tiktoken").mkdir()
    (tmp_path / "tiktoken/fb374d419588a4632f3f557e76b4b70aebbca790").write_bytes(data)
    assert vocabulary.find_ranks("o200k_base", download=False) == data
    assert cached.read_bytes() == b"wrong"

    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("other/data.bin", b"x")
        archive.writestr("bpe_openai/data/o200k_base.tiktoken.gz", gzip.compress(data))
    assert vocabulary.main(["o200k_base", "--from", str(tmp_path / "some.whl")]) == 0
    assert cached.read_bytes() == data
    assert load_tokenizer("o200k_base", vocab_file=tmp_path / "plain").name == "o200k_base"
    with pytest.raises(ValueError, match="is not, and does not contain, the vocabulary cl100k_base"):
        load_tokenizer("cl100k_base", vocab_file=tmp_path / "plain")


def test_a_download_is_checked_and_stored_whole(tmp_path, monkeypatch):
    good = _rank_file(tmp_path / "plain", 300)
    monkeypatch.setitem(vocabulary.SHA256, "r50k_base", hashlib.sha256(good.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vocabulary, "_url", lambda name: (tmp_path / "served").as_uri())

    (tmp_path / "served").write_bytes(good.read_bytes()[:100])
    with pytest.raises(ValueError, match="another SHA-256"):
        vocabulary.find_ranks("r50k_base")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "served").write_bytes(good.read_bytes())
    vocabulary.find_ranks("r50k_base")
    assert [p.name for p in (tmp_path / "cache/gptoss_dist").iterdir()] == ["r50k_base.tiktoken"]


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("o200k_harmony", "tiktoken is great!", [83, 8251, 2488, 382, 2212, 0]),
        ("o200k_harmony", "hello world", [24912, 2375]),
        ("o200k_harmony", "お誕生日おめでとう", [8930, 9697, 243, 128225, 8930, 17693, 4344, 48669]),
        ("cl100k_base", "tiktoken is great!", [83, 1609, 5963, 374, 2294, 0]),
        ("gpt2", "hello world", [31373, 995]),
    ],
)
def test_known_ids_of_published_vocabularies(name, text, ids):
    try:
        tokenizer = load_tokenizer(name, download=False)
    except ValueError:
        pytest.skip(f"the vocabulary of {name} is not on this machine")
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    if name == "o200k_harmony":
        assert (tokenizer.n_vocab, tokenizer.eot_id) == (201088, 199999)
        assert tokenizer.special_tokens["<|return|>"] == 200002 and tokenizer.special_tokens["<|call|>"] == 200012


# --- training -----------------------------------------------------------------------------------


def test_training_merges_the_most_frequent_pair_with_fixed_ties():
    # "ab" occurs 3 times, "cd" and "xy" twice: the tie goes to the smaller bytes.
    ranks = bpe.train(["ab", "ab", "ab", "xy", "xy", "cd", "cd"], 259, pattern=r"\w+")
    assert {token: rank for token, rank in ranks.items() if rank >= 256} == {b"ab": 256, b"cd": 257, b"xy": 258}
    # "aaa": overlapping pairs merge from the left, and the same bytes are never two tokens.
    ranks = bpe.train(["aaaaaaa"], 300, pattern=r"\w+")
    assert len(set(ranks)) == len(ranks) and b"aa" in ranks and b"a" * 7 in ranks


def test_a_trained_file_is_deterministic_and_loads(tmp_path):
    for name in ("one", "two"):
        arguments = ["synthetic:documents=40", "--vocab-size", "400", "--output", str(tmp_path / name)]
        assert bpe.main(arguments) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one", pattern="o200k")
    text = "The river follows the bridge.\n"
    assert len(tokenizer.encode(text)) < len(text) / 3 and tokenizer.decode(tokenizer.encode(text)) == text
    assert bpe.main(["synthetic", "--vocab-size", "9", "--output", str(tmp_path / "three")]) == 2


def test_a_trained_vocabulary_says_how_it_is_used(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one and another one and another")
    assert bpe.main(["a.txt", "--vocab-size", "300"]) == 2  # it does not write over the built-in one
    assert "--output" in capfd.readouterr().err
    assert bpe.main(["a.txt", "--vocab-size", "300", "--output", "own.tiktoken"]) == 0
    *_, fewer, words = capfd.readouterr().out.splitlines()
    assert "fewer than the 300 that were asked for" in fewer
    line = shlex.split(words.partition("python -m data_pipeline.prepare ")[2].replace("SOURCE", "a.txt"))
    assert prepare([*line, "--validation-fraction", "0"]) == 0
    monkeypatch.undo()


def test_a_pattern_with_groups_trains_on_what_it_matches(tmp_path):
    """Like the same pattern without groups."""
    for name, pattern in (("none", r"\w+ ?|(?s:.)"), ("one", r"(\w+) ?|(?s:.)"), ("two", r"(\w+)( )?|(?s:.)")):
        options = ["--vocab-size", "300", "--pattern", pattern, "--output", str(tmp_path / name)]
        assert bpe.main(["synthetic:documents=9", *options]) == 0
        assert load_tokenizer(tmp_path / name, pattern=pattern).n_vocab == 309
        assert (tmp_path / name).read_bytes() == (tmp_path / "none").read_bytes()


def test_what_cannot_be_used_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("file").write_text("x")
    Path("a.txt").write_text("ab")
    remedy = "give --pattern one of o200k, cl100k, llama3, gpt2, bytes, or a regular expression that matches every "
    for options, message in (
        (
            ["--pattern", "[a-z]+"],
            rf"error: tokenizer out: pattern '\[a-z\]\+' leaves out some .*; {remedy}character, ",
        ),
        (["--pattern", r"\X"], f"error: tokenizer out: pattern '.*' is not accepted: .*; {remedy}"),
        (["--pattern", "("], rf"error: pattern '\(': missing \) .*; {remedy}"),
        (["--pattern", r"\w*|(?s:.)"], f"error: pattern '.*': matches the empty text, which is no word; {remedy}"),
        (["--output", "."], r"error: \.: is no file; name the file of ranks to write, such as ranks.tiktoken\n"),
        (["--output", "file/x"], "error: file/x: cannot be written, as .*/file is no folder that this user may write"),
        (["--output", "s3://bucket/x"], "error: output s3://bucket/x: is a URL; name a place on a file system"),
    ):
        assert bpe.main(["no-such-source.txt", "--output", "out", *options]) == 2  # which would be refused next
        err = capsys.readouterr().err
        assert re.match(message, err) and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "file"]
    assert bpe.main(["a.txt", "--vocab-size", "300", "--pattern", "[a-z]+|(?s:.)", "--output", "~/own"]) == 0
    out = capsys.readouterr().out
    assert "own: 257 ranks from " in out and "fewer than the 300 that were asked for: no pair is left to merge" in out
    assert load_tokenizer(tmp_path / "own", pattern="[a-z]+|(?s:.)").encode("ab").tolist() == [256]
