"""Numbers and times as people read them, the same in notes, reports and on the terminal."""

from __future__ import annotations

import math
import time


def amount(number: float) -> str:
    """Return a number of things with at most three digits, such as `9.7M`, `20.9B` or `131k`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def si(value: float) -> str:
    """Return a number with three digits and the prefix of a unit that follows, such as `131 k` or `4.2 P`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} "
    power = min(len(_PREFIXES) - 1, max(0, math.floor(math.log10(abs(value)) / 3)))
    if abs(float(f"{value / 1000**power:.3g}")) >= 1000 and power < len(_PREFIXES) - 1:
        power += 1
    return f"{value / 1000**power:.3g} {_PREFIXES[power]}"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def moment(when: float) -> str:
    """Return a date and a time of this machine's clock; `when` is in seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def clock(when: float) -> str:
    """Return a time as people say it: with its date if that is not today's."""
    local, today = time.localtime(when), time.localtime()
    return time.strftime("%H:%M:%S", local) if local[:3] == today[:3] else moment(when)


def duration(seconds: float) -> str:
    """Return a length of time such as `42 s`, `5 min`, `3 h 20 min` or `2 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, hours = round(whole / 60), whole // 3600
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {whole % 3600 // 60} min"
    return f"{hours // 24} d {hours % 24} h"


def in_hours(hours: float) -> str:
    """Return hours as a number that others are compared with, such as `0.50` or `1,234`."""
    return f"{hours:.2f}" if hours < 100 else f"{hours:,.0f}"
