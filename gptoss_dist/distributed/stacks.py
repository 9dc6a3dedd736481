"""Where the threads of a process are: of this one, and of another one on the same machine that does not answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch

from gptoss_dist.distributed.launcher_watch import started

_ROOT = str(Path(__file__).resolve().parents[2])
_PY_SPY_TIMEOUT_S = 15.0


def place(thread: int) -> str:
    """Return the innermost line of this project that a thread of this process is in, as `file:line in function`.

    Args:
        thread: The thread's `ident`.
    """
    for code, line in _walk(sys._current_frames().get(thread)):
        if code.co_filename.startswith(_ROOT) and "site-packages" not in code.co_filename:
            return f"{os.path.relpath(code.co_filename, _ROOT)}:{line} in {code.co_name}"
    return "code that is not this project's"


def of_this_process() -> str:
    """Return the Python stacks of all threads, the main thread first, innermost call first.

    No file of source code is read for it, which might lie on the disk that hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    lines = []
    for thread, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        lines.append(f"Thread {thread} ({names.get(thread, 'not made by Python')}):")
        lines += [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in _walk(frame)]
    return "\n".join(lines) + "\n"


def _walk(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back


def of_another_process(process: int) -> str:
    """Return what can be learned of another process on this machine: its stacks by py-spy, else what the kernel knows.

    py-spy reads the memory of the process, which need not run for it. It needs leave: root, or the same user where
    /proc/sys/kernel/yama/ptrace_scope is 0.
    """
    return _by_py_spy(process) + _by_kernel(process)


def _by_py_spy(process: int) -> str:
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed, which would show the Python stacks (pip install py-spy)\n"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(process)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PY_SPY_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}\n"
    return done.stdout + (f"py-spy: {done.stderr.strip()}\n" if done.returncode else "")


def _by_kernel(process: int) -> str:
    texts = []
    for name in ("status", "wchan", "stack"):
        try:
            text = Path(f"/proc/{process}/{name}").read_text(errors="replace")
        except OSError as error:
            text = f"{error.strerror}\n"
        texts.append(f"/proc/{process}/{name}:\n{text.rstrip()}\n")
    return "\n" + "\n".join(texts)


def flight_recorder() -> bytes | None:
    """Return the last collectives that NCCL's flight recorder has seen, as JSON; None where there is no NCCL.

    Torch keeps the last 2000; the variable TORCH_FR_BUFFER_SIZE changes that, and 0 switches it off.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None or not torch.cuda.is_available():
        return None
    text = dump()
    return text if isinstance(text, bytes) else str(text).encode()


def is_alive(process: int, since: str) -> bool:
    """Return whether a process of this machine that started at `since` has not ended."""
    return started(process) == since
