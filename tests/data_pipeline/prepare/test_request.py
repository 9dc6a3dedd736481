"""What `prepare` is asked for: code only where allowed, options only where they mean something, nothing secret kept."""

import functools
import http.server
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline import Manifest
from data_pipeline.prepare.allowed_code import import_from_allowed
from tests.support.prepared import documents_of, run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30)))
    return path


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Modules of a user, one of which has the name of a built-in one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("my_rules", "my_package", "my_package.inner"):
        sys.modules.pop(name, None)  # that of another test
    folder = tmp_path / "code"
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_rules.py").write_text(
        "import functools, operator, subprocess\nfrom os import system\nfrom subprocess import run\n"
        "def odd(text): return len(text) % 2 == 1\n"
        "keep = functools.partial(operator.contains, 'abc')\nclass Call:\n    def __call__(self, text): return True\n"
        "call = Call()\nnumber = 3\n"
    )
    (folder / "my_package/__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "my_package/inner.py").write_text("def keep(text): return True\n")
    (folder / "posix.py").write_text("def system(text): return True\n")
    return folder


@pytest.mark.parametrize(
    ("name", "allowed", "message"),
    [
        ("os:system", [], r"os.py may not be run; if you trust it, allow it with --allow-code /.*os.py$"),
        ("subprocess:run", ["."], "subprocess.py may not be run"),
        ("builtins:eval", ["."], "there is no module 'builtins' that may be imported; write FUNCTION into"),
        ("posix:system", ["."], "the function is from module 'posix'"),
        ("my_rules:odd", [], "there is no module 'my_rules'"),
        ("my_rules:odd", ["my_package"], "there is no module 'my_rules'"),
        ("my_rules:system", ["my_rules.py"], "the function is from module 'posix', not from 'my_rules'"),
        ("my_rules:run", ["."], "the function is from module 'subprocess'"),
        ("my_rules:subprocess.run", ["."], "expected MODULE:FUNCTION"),
        ("my_rules:number", ["."], "number is not a function"),
        ("my_package.inner:keep", ["my_package/inner.py", "my_rules.py"], "__init__.py may not be run"),
        ("my_rules:odd", ["nowhere"], "--allow-code .*nowhere: no such file or folder"),
        ("my_rules", ["."], "expected MODULE:FUNCTION"),
        ("..my_rules:odd", ["."], "there is no module"),
    ],
)
def test_code_runs_only_from_files_that_are_allowed(code, tmp_path, name, allowed, message):
    with pytest.raises(ValueError, match=message):
        import_from_allowed([name], [str(code / path) for path in allowed])
    assert not (tmp_path / "ran").exists(), "not even a package on the way ran"


def test_allowed_code_is_found_by_its_path(code, tmp_path):
    import_from_allowed(["my_rules:odd", "my_rules:keep", "my_rules:call"], [str(code / "my_rules.py")])
    import_from_allowed(["my_package.inner:keep"], [str(code)])
    assert (tmp_path / "ran").exists()


def test_a_recipe_cannot_allow_its_own_code(code, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    options = ("--config", recipe, "--output", tmp_path / "data", "--validation-fraction", 0)
    wanted = f"sources: [{text}]\nfilter: ['my_rules:odd']\n"
    for key in ("allow-code", "allow_code"):
        recipe.write_text(wanted + f"{key}: [{code}]\n")
        for more in ((), ("--allow-code", code)):
            exit_code, _, err = run(*options, *more, capsys=capsys)
            assert exit_code == 2 and "--allow-code: may stand on the command line only" in err
    recipe.write_text(wanted)
    exit_code, _, err = run(*options, capsys=capsys)
    assert exit_code == 2 and "there is no module 'my_rules'" in err and err.count("\n") == 1
    assert run(*options, "--allow-code", code / "my_rules.py") == 0
    assert documents_of(tmp_path / "data", "train") == [f"document {i}" for i in range(10, 30)], "of odd length"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["TEXT", "--split", "train"],
            "--split: is about Hugging Face datasets, and no source holds any; leave it out",
        ),
        (["synthetic", "--revision", "x"], "--revision: is about Hugging Face datasets"),
        (["synthetic", "--text-column", "body"], "--text-column: is about records with columns"),
        (["synthetic", "TEXT", "--ids-column", "x"], "--ids-column: source 'synthetic' holds texts, not token ids"),
        (["TEXT", "--ids-column", "x", "--normalization", "NFC"], "--normalization: is about texts, and --ids-column"),
        (["TEXT", "--allow-code", "."], "--allow-code: means nothing without --filter"),
        (["TEXT", "--vocab-file", "x"], "vocab_file x: is one of o200k_harmony"),
        (["TEXT", "--pattern", "gpt2"], "pattern 'gpt2': is for rank files, and 'builtin' has its own; leave it out"),
        (["TEXT", "--workers", "100000"], "workers=100000 must be in [1, 1024]"),
        (["~no-such-user-here/x"], "'~no-such-user-here/x': Could not determine home directory"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, text, capsys, arguments, message):
    arguments = [text if word == "TEXT" else word for word in arguments]
    exit_code, _, err = run(*arguments, "--output", tmp_path / "data", capsys=capsys)
    assert exit_code == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_numbers_in_recipes(tmp_path, text, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{text}]\nvalidation-fraction: 5e-1\n")
    assert run("--config", recipe, "--output", tmp_path / "a") == 0
    assert run(text, "--validation-fraction", "0.5", "--output", tmp_path / "b") == 0
    assert Manifest.read(tmp_path / "a").content_sha256 == Manifest.read(tmp_path / "b").content_sha256
    recipe.write_text("sources: []\n")
    assert run("--config", recipe, "--output", tmp_path / "c", capsys=capsys)[2].startswith("error: sources: there are")


def test_what_is_left_out_is_said(tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "README.md", "b.csv", "c.csv"):
        (folder / name).write_text(name)
    _, out, _ = run(folder, "--output", tmp_path / "data", capsys=capsys)
    assert "corpus: 1 file at" in out and "\n  left out: 2 .csv, 1 cards (README, LICENSE and the like)\n" in out


def test_an_output_inside_its_source_does_not_become_a_part_of_it(tmp_path, text, capsys, monkeypatch):
    options = (tmp_path, "--output", tmp_path / "inside/data", "--validation-fraction", 0)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.prepare.pipeline.assemble_splits", killed)
    assert run(*options) == 130 and (tmp_path / "inside/data.preparing/unfinished.txt").exists()
    monkeypatch.undo()
    code, out, _ = run(*options, capsys=capsys)
    assert (
        code == 0 and "continuing: 1 of 1 parts" in out and len(documents_of(tmp_path / "inside/data", "train")) == 30
    )
    assert "already prepared" in run(*options, capsys=capsys)[1]


def test_no_secret_of_a_url_is_kept_or_printed(tmp_path, text, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (tmp_path / "bad.jsonl").write_text('{\n{"text": "x"}\n')
    serve = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://ann:SECRET1@127.0.0.1:{server.server_port}"
        query = "X-Amz-Signature=SECRET2&token=SECRET3"
        options = ("--max-malformed", 0.9, "--output", tmp_path / "out")
        done = run(f"{address}/text.jsonl?{query}", f"{address}/bad.jsonl?{query}", *options, capsys=capsys)
        assert done[0] == 0 and "text.jsonl?X-Amz-Signature=***&token=***: 1 file at http://***@" in done[1]
        again = run(f"{address}/text.jsonl?{query}", *options, capsys=capsys)
        failed = run(f"{address}/bad.jsonl?{query}", "--output", tmp_path / "bad", capsys=capsys)
        missing = run(f"{address}/none.jsonl?{query}", "--output", tmp_path / "none", capsys=capsys)
        server.shutdown()
    for code, _, err in (again, failed, missing):
        assert code == 2 and err.count("\n") == 1
    texts = [text for _, *printed in (done, again, failed, missing) for text in printed]
    left = [path for name in ("out", "bad.preparing") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {"manifest.json", "prepare.json", "malformed.log"} <= {path.name for path in left}
    texts += [path.read_bytes().decode("latin-1") for path in left]
    assert not [text for text in texts if "SECRET" in text]


def test_terminals_get_escapes_as_text(tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"in\x1b[31m\xff\n")
    odd.mkdir()
    (odd / "a\x07.jsonl").write_text('{"text": 3}\n' + json.dumps({"text": "x"}) + '\n{"\x1b]0;": 1}\n')
    code, out, err = run(odd, "--output", tmp_path / "a", capsys=capsys)
    assert code == 2 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\udc80-\udcff]", out + err)
    assert err.count("\n") == 1 and r"in\x1b[31m\udcff\x0a/a\x07.jsonl, line 1: column 'text' holds int" in err
    code, out, _ = run(odd, "--max-malformed", 0.9, "--output", tmp_path / "b", capsys=capsys)
    assert code == 0 and "\x1b" not in out
    left = "".join(path.read_text("latin-1") for path in (tmp_path / "b").iterdir())
    assert "\x1b" not in left and Path(tmp_path / "b/malformed.log").read_text().count("\n") == 2
