"""The fork server: it imports the project once and forks every run from itself.

    python -m tests.support.fork_server MODULE...

To import torch and the project takes seconds, and to fork a process that has imported them takes milliseconds. The
server answers each line of JSON on its stdin by one line on its stdout:

- {"script", "arguments", "environment", "cwd", "processes", "folder"} starts a run of that many processes, with
  torchrun's variables. The output of each process goes to FOLDER/RANK.stdout and FOLDER/RANK.stderr. The answer is the
  list of their process ids.
- {"wait": ids} waits for these processes. As under torchrun, the others are ended when one fails. The answer is the
  list of their exit codes.

tests/support/ranks.py is the client.
"""

import faulthandler
import gc
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
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(job: dict, rank: int, port: int) -> int:
    """Fork one process of the run and return its id; in that process, run the script and exit.

    Args:
        job: The run, as the module describes it.
        port: Where the processes of the run meet.
    """
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
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=size,
                LOCAL_WORLD_SIZE=size,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
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
    """Wait for processes and return their exit codes; when one of them fails, end the others.

    Args:
        processes: Ids of processes that `start` returned.
        codes: The exit codes of all processes that have ended so far; this function adds to it.

    Returns:
        The exit codes, in the order of `processes`.
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
    """Import the modules that the command line names, say "ready", and answer until stdin ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import torch

    from gptoss_dist.parallel.megablocks_compat import load_megablocks
    from gptoss_dist.planner.hardware import peak_flops

    load_megablocks()
    peak_flops("cpu", torch.float32)  # every run would measure it; one thread leaves no pool of OpenMP behind
    gc.collect()
    gc.freeze()  # every run would look through all that was imported, again and again
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
