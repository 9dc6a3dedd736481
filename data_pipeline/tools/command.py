"""End the commands of this package alike: with 0, or with 1 and one line `error: ...` on stderr for each problem."""

import os
import sys
from collections.abc import Callable


def run(action: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Return the exit code after `action`, which reports problems by ValueError or OSError.

    Args:
        action: What the command does.
        interrupted: What is printed after Ctrl-C.
    """
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: not an error, but Python would complain again on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
