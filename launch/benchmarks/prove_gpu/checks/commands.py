"""How an item runs a command of the project: as a process of its own, or of a rehearsal in a fork of this one.

A start of Python imports torch for seconds, and a rehearsal has more than ten of them. On a GPU nothing is forked: the
driver of the device does not survive it.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback

from launch.benchmarks.prove_gpu.findings import ROOT


def run_command(words: list[str], *, fork: bool) -> str:
    """Run a script, or `-m` and a module, with its arguments; what it prints goes to the item's log.

    Returns:
        What it wrote to its standard output.

    Raises:
        SystemExit: It failed.
    """
    print("$ python", *words, flush=True)
    if fork:
        code, output = _forked(words)
    else:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace")
        code, output = done.returncode, done.stdout
    print(output, flush=True)
    if code:
        name = words[1] if words[0] == "-m" else os.path.basename(words[0])
        raise SystemExit(f"{name} ended with exit code {code}; its error is above")
    return output


def _forked(words: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            _run_in_fork(words, output.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _run_in_fork(words: list[str], output: int) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        is_module = words[0] == "-m"
        sys.argv = words[1:] if is_module else words
        run = runpy.run_module if is_module else runpy.run_path
        run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if is_module else {}))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
