"""A process that has imported the project and forks each run from itself: starting one takes milliseconds, not seconds.

    python -m tests.support.forks MODULE...

Each line of JSON on its stdin is answered by one on its stdout:

- A run, {"script", "arguments", "environment", "cwd", "processes", "folder"}: as many processes with torchrun's
  variables, whose output goes to FOLDER/RANK.stdout and .stderr. Answer: their ids.
- {"wait": ids}: answer: their exit codes, when all have ended. As with torchrun, the others are ended when one fails.
"""

import faulthandler
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(job: dict, rank: int, port: int) -> int:
    """Fork one process of the run; returns its id."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in ((1, "stdout"), (2, "stderr")):
            path = os.path.join(job["folder"], f"{rank}.{stream}")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        faulthandler.enable()
        os.environ.clear()
        os.environ.update(job["environment"])
        if job["processes"] > 1:
            size = str(job["processes"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        os.chdir(job["cwd"])
        sys.argv = [job["script"], *job["arguments"]]
        sys.path.insert(0, os.path.dirname(job["script"]))
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(processes: list[int], codes: dict[int, int]) -> list[int]:
    """Exit codes in the order of `processes`; when one is not 0, the rest are ended.

    codes: of all processes that have ended; extended.
    """
    while True:
        living = [process for process in processes if process not in codes]
        if any(codes.get(process) for process in processes):
            time.sleep(0.1)  # torchrun looks every 0.1 s
            for process in living:
                os.kill(process, signal.SIGTERM)
        if not living:
            return [codes[process] for process in processes]
        process, status = os.waitpid(-1, 0)
        codes[process] = os.waitstatus_to_exitcode(status)


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    from gptoss_dist.parallel.megablocks_compat import load_megablocks

    load_megablocks()
    print("ready", flush=True)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = wait(job["wait"], codes)
        else:
            port = free_port()
            answer = [start(job, rank, port) for rank in range(job["processes"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
