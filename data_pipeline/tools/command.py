"""How the tools of this package end: 0, or one line `error: ...` on stderr per problem and 1."""

import os
import sys
from collections.abc import Callable


def run(action: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Exit code after `action`, which reports problems by ValueError or OSError. interrupted: said after Ctrl-C."""
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
