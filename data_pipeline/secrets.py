"""What must not leave the process as text: passwords, tokens and signatures in URLs.

    https://ann:secret@host/a.jsonl?X-Amz-Signature=abc&part=3    becomes
    https://***@host/a.jsonl?X-Amz-Signature=***&part=***

A URL is a source of text, or where a tracking server is. It is used as it was given, and `without_secrets` is called
where it becomes text for people or for a file. No list of names of secrets is complete, so every value of a query is
hidden; their names stay, that a person recognises the URL.
"""

import re

_HIDDEN = "***"

# Quotation marks end a URL inside a sentence, but not those in a password, after which there is an @.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>(?:[^\s'\"<>`]|['\"<>`](?=[^\s'\"<>`]*@))+)")
# USER:PASSWORD@ or TOKEN@. SQLAlchemy takes a password with a slash in it, so one is looked for beyond the first slash
# where the text after the colon is no port.
_USER = re.compile(r"^(?:[^/?#]*|[^/?#:@]*:(?!\d*(?:[/?#]|$))[^?#]*|[^/?#:@]*:(?!\d*(?:[/?#]|$))[^@]*)@")
# The address of a bucket has no port, and the secret key before it may begin with a slash.
_KEYS = re.compile(r"^[^/?#:@]*:[^@]*@")
_BUCKETS = ("s3", "s3a", "gs", "gcs")
_VALUE = re.compile(r"=(?!\*\*\*)[^&;#]*")
_QUERY = re.compile(r"(?<=[\w/])\?(?=[\w.-]+=)[^\s'\"<>`]*")
"""The query of a URL without its host, as libraries print it: `url: /path?token=abc`."""
_WEB = ("http", "https")
_SENTENCE = ".,:;!)"  # what follows a URL in a sentence


def without_secrets(text: str) -> str:
    """Return a text in which the URLs have no user names, passwords, and values of queries and fragments.

    Args:
        text: A URL, several of them as fsspec chains them (`zip://a.txt::https://...`), or a sentence that holds some.
    """
    text = _URL.sub(_hidden, text) if "://" in text else text
    return _QUERY.sub(lambda query: _VALUE.sub(f"={_HIDDEN}", query[0]), text)


def has_hidden(url: str | None) -> bool:
    """Return whether `without_secrets` has hidden something in a URL, so that it leads nowhere."""
    return url is not None and _HIDDEN in url


def _hidden(url: re.Match) -> str:
    # A chain of fsspec is several URLs; each hides its own.
    rest = url["rest"].rstrip(_SENTENCE)
    parts = rest.split("::")
    first = f"{url['scheme']}://{_without(parts[0], url['scheme'])}"
    return "::".join([first, *(without_secrets(part) for part in parts[1:])]) + url["rest"][len(rest) :]


def _without(rest: str, scheme: str) -> str:
    user = _KEYS if scheme.lower() in _BUCKETS and _KEYS.match(rest) else _USER
    rest = user.sub(f"{_HIDDEN}@", rest)
    address, mark, parameters = _cut_at_query(rest)
    if "=" in parameters:
        parameters = _VALUE.sub(f"={_HIDDEN}", parameters)
    elif mark and parameters and scheme.lower().startswith(_WEB):  # elsewhere `?` is a wildcard
        parameters = _HIDDEN
    return f"{address}{mark}{parameters}"


def _cut_at_query(rest: str) -> tuple[str, str, str]:
    found = re.search(r"[?#]", rest)
    return (rest[: found.start()], found[0], rest[found.end() :]) if found else (rest, "", "")
