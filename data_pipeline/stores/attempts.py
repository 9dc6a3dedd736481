"""How often and how long something that failed is tried again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.stores.errors import ChangedError, StoreError, explained, has_changed, may_pass

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """When to give up."""

    tries: int
    """The most tries without progress."""
    seconds: float
    """The longest time without progress after which one more try is begun."""


LOOKING = Patience(tries=5, seconds=30)
"""For the first look at a store: a wrong address looks like a network that is down."""
READING = Patience(tries=8, seconds=180)
"""For what has been seen to be there."""
ONCE = Patience(tries=1, seconds=0)


class Attempts:
    """A count of the failures since something last went well."""

    def __init__(self, url: str, patience: Patience):
        self._url, self._patience, self._failures = url, patience, 0
        self.begin()

    def begin(self) -> None:
        """Count the time from here, unless something has failed: what the caller did before is no time of failing."""
        if not self._failures:
            self._since = time.monotonic()

    def succeed(self) -> None:
        """Forget the failures: something went well."""
        self._failures = 0

    def fail(self, error: Exception) -> None:
        """Wait after a failure until it is time to try again; each time about twice as long.

        Raises:
            StoreError: Trying again is of no use, or was often enough.
        """
        if isinstance(error, StoreError):
            raise error
        if has_changed(error):
            raise ChangedError(changed_text()) from error
        if not may_pass(error):
            raise StoreError(explained(error, self._url)) from error
        self._failures += 1
        seconds = time.monotonic() - self._since
        if self._failures >= self._patience.tries or seconds > self._patience.seconds:
            times = f"{self._failures} {'try' if self._failures == 1 else 'tries'} in {seconds:.0f} s"
            raise StoreError(f"{explained(error, self._url)} ({times}); the same command continues") from error
        # Many processes that were refused at once had better not come back at once.
        pause = min(_FIRST_PAUSE * 2 ** (self._failures - 1), _LONGEST_PAUSE)
        time.sleep(pause * random.uniform(0.5, 1))


def changed_text(here: str = "") -> str:
    """Return a message that a file has changed, or on the machine called `here` is not the one that was found."""
    other, everywhere = (f", or is another file on {here}", ", the same on every machine") if here else ("", "")
    remedy = f"leave inputs as they are while they are read{everywhere}, and start again"
    return f"was changed since it was found{other}; {remedy}"


def repeat(url: str, action: Callable[[], Result], patience: Patience = LOOKING) -> Result:
    """Return what an action returns, as soon as it does not fail.

    Raises:
        StoreError: Trying again is of no use, or was often enough.
    """
    attempts = Attempts(url, patience)
    while True:
        try:
            return action()
        except Exception as error:  # each store raises its own kinds
            attempts.fail(error)
