"""Passwords, tokens and signatures of URLs do not become text; what is no secret stays as it is."""

import pytest

from data_pipeline.printable import shown
from data_pipeline.secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:S@h/a.jsonl?X-Amz-Signature=S&part=S", "https://***@h/a.jsonl?X-Amz-Signature=***&part=***"),
        ("exceeded with url: /a/b?token=S/api&x=S (Caused by", "exceeded with url: /a/b?token=***&x=*** (Caused by"),
        ("postgresql://u:S/S@host/db", "postgresql://***@host/db"),
        ("postgresql://u:S@S@host:5432/db?sslmode=S", "postgresql://***@host:5432/db?sslmode=***"),
        ("mysql+pymysql://u:S?S#S@host/db", "mysql+pymysql://***@host/db"),
        ("redis://:S@host:6379/0", "redis://***@host:6379/0"),
        ("s3://S:S/S+S@bucket/x", "s3://***@bucket/x"),
        ("a::s3://S:/S@bucket/*.jsonl", "a::s3://***@bucket/*.jsonl"),
        ("gs://S:7/S@bucket/x", "gs://***@bucket/x"),
        ("https://S@github.com/x", "https://***@github.com/x"),
        ("HTTPS://u:S'S@host", "HTTPS://***@host"),
        ("https://h/x?S", "https://h/x?***"),
        ("https://h/x?sig=S=S==&b;c=S", "https://h/x?sig=***&b;c=***"),
        ("https://h/x#access_token=S", "https://h/x#access_token=***"),
        ("zip://a.txt::https://u:S@h/x.zip?sig=S", "zip://a.txt::https://***@h/x.zip?sig=***"),
        (
            "no 'https://u:S@h/x?sig=S' or url=\"http://h/?t=S\".",
            "no 'https://***@h/x?sig=***' or url=\"http://h/?t=***\".",
        ),
        ("https://u:S@h/x: cannot be read", "https://***@h/x: cannot be read"),
        ("(https://h/x?sig=S), line 3", "(https://h/x?sig=***), line 3"),
    ],
)
def test_secrets_of_urls_are_hidden(text, shown):
    assert "S" not in shown.removeprefix("HTTPS").replace("Signature", "")
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown, "what is hidden stays as it is"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data/part-?.jsonl",
        "s3://bucket/part-?.jsonl",
        "s3://bucket/path@v2/x",
        "s3://bucket/path@v2/x:y@z",
        "hf://datasets/a/b@main/x.parquet",
        "http://host:8080/path@v2/x",
        "https://host:443, or file:///a/b, and mail a@b.c",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


def test_a_name_is_shown_in_one_line_without_secrets():
    assert shown("https://u:pw@h/a\n\x1b[31m") == r"https://***@h/a\x0a\x1b[31m"
