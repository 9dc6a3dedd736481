"""Errors of stores: which of them may pass, and what a person can do about the others.

Each library raises its own kinds, and s3fs, gcsfs and fsspec translate some of them and leave others. They are told
apart by the HTTP status that they carry, by Python's own kinds, and by the names of their classes, so that no library
has to be imported for it.
"""

import errno
import ssl
from collections.abc import Iterator

from data_pipeline.printable import first_line
from data_pipeline.secrets import without_secrets

_STATUS_MAY_PASS = {408, 425, 429}
_STATUS_CHANGED = 412
# Of these names, in the classes that an error is derived from, the first are botocore's, then aiohttp's, httpx's,
# http.client's and Azure's.
_NAMES_MAY_PASS = {
    "HTTPClientError",
    "ConnectionError",
    "ResponseParserError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "ClientError",
    "TransportError",
    "HTTPException",
    "ServiceRequestError",
    "ServiceResponseError",
}
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ImportError,
    ValueError,
    ssl.SSLCertVerificationError,
)
_PERMANENT_NUMBERS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true reads a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud; FSSPEC_GS_TOKEN=anon reads a public bucket",
    "hf": "set HF_TOKEN",
}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_SAME_AS = {"s3a": "s3", "gcs": "gs"}


class StoreError(OSError):
    """A store cannot be looked at or read; the message has the reason and the remedy."""


class ChangedError(StoreError):
    """A file is not what it was when it was found."""


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed when it is repeated."""
    if isinstance(error, StoreError):
        return False
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return may_pass(error.__cause__)  # fsspec's http calls everything so
    status = _status(error)
    if status is not None:
        return status in _STATUS_MAY_PASS or status >= 500
    if isinstance(error, _PERMANENT) or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _chain(error)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_NUMBERS
    return isinstance(error, EOFError) or bool(_names(error) & _NAMES_MAY_PASS)


def answer_may_pass(error: BaseException) -> bool:
    """Return whether a server has answered that it cannot do now what it may do later."""
    return _status(error) is not None and may_pass(error)


def has_changed(error: BaseException) -> bool:
    """Return whether an error means that the file is not the one that was opened."""
    return "FileExpired" in _names(error) or _status(error) == _STATUS_CHANGED


def explained(error: BaseException, url: str) -> str:
    """Return an error of a store in one line without secrets: what it is, and what to do."""
    if isinstance(error, StoreError):
        return without_secrets(str(error))
    protocol = url.partition("://")[0].rpartition("::")[2]
    shown = error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        shown = error.__cause__
    remedy = _remedy(shown, _SAME_AS.get(protocol, protocol))
    return without_secrets(first_line(shown)) + (f"; {remedy}" if remedy else "")


def _remedy(error: BaseException, protocol: str) -> str:
    status, names = _status(error), _names(error)
    credentials = _CREDENTIALS.get(protocol, "")
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol)
        extra = " (sh launch/install.sh --extras s3)" if package == "s3fs" else ""
        return f"install {package}{extra}" if package else "install the package that it names"
    if names & {"NoCredentialsError", "ProfileNotFound", "PartialCredentialsError", "CredentialRetrievalError"}:
        return credentials
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"check that these credentials may list and read there{f': {credentials}' if credentials else ''}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "check the name" + (" of the bucket, and the rest of the path" if protocol in _PACKAGES else "")
    if protocol == "s3" and isinstance(error, ValueError) and "endpoint" in str(error):
        return "AWS_ENDPOINT_URL is such as https://store.example.org:9000"
    if may_pass(error) and (status is None or status < 400):
        return "check the network" + (", and AWS_ENDPOINT_URL where the store is not Amazon's" * (protocol == "s3"))
    return ""


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, or what it was translated from."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(cause, "status", None) or getattr(cause, "status_code", None)
            status = status or getattr(response, "status_code", None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
