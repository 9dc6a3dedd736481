"""What `launch/prove_gpu.sh` proves: a table of items in the order of their value, each with its own time limit.

Every item is a process of its own. It says what it finds as it goes (`findings.py`), so that a stopped one leaves what
it had found by then. This file needs the standard library only.
"""

from dataclasses import dataclass

CHECKS = "launch.benchmarks.prove_gpu.checks"


@dataclass(frozen=True)
class Item:
    """One thing to prove."""

    name: str
    """The name in the report, for `--only`, and of its log."""
    what: str
    """One line for a reader of the report."""
    words: tuple[str, ...]
    """The command line behind the name of the Python program."""
    limit_s: float
    """Its processes are killed after these seconds."""
    least_s: float = 10.0
    """With less time left than this it is not started."""


def _item(name: str, what: str, module: str, limit_s: float, least_s: float) -> Item:
    return Item(name, what, ("-m", f"{CHECKS}.{module}", name), limit_s, least_s)


ITEMS = (
    _item("gpu-tests", "the tests marked `gpu`", "gpu_tests", 150, 30),
    _item("attention", "flash sink attention against the reference, at the sizes of 20B and 502M", "kernels", 60, 15),
    _item("grouped-gemm", "grouped GEMMs of the experts against the loop, empty experts too", "kernels", 60, 15),
    _item("quickstart", "prepare, train, validate, save and generate, as the quickstart does", "runs", 120, 30),
    _item("502m", "502M step time, tokens/s, MFU, memory, kernel table; not compiled", "steps", 75, 25),
    _item("502m-compiled", "the same under torch.compile", "steps", 120, 40),
    _item("20b-slice", "two layers of gpt-oss-20b: step time, MFU, memory, kernel table", "steps", 120, 45),
    _item(
        "resume", "a checkpoint gives back every bit, and a resumed run goes on as if nothing had been", "runs", 120, 40
    ),
    _item("zero-2", "DeepSpeed ZeRO-2 trains as FSDP2 does", "runs", 90, 25),
    _item("syncs", "host synchronisations per training step, by stack", "syncs", 75, 25),
    _item("variants", "compiled, replayed in CUDA graphs, compiled with documents of any length", "runs", 120, 30),
)
