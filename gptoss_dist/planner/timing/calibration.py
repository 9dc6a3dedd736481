"""What one machine was measured to do, as a file: `configs/hardware/NAME.yaml`.

    name: my-node
    device: cpu
    ...
    products:                     # FLOP/s of matrix products
      float32:                    # by dtype, then by the smallest of the three dimensions,
        64:
          sizes: [128, 512]       # then by the geometric mean of the other two
          values: [3.1e10, 4.4e10]

Between measured sizes a rate is interpolated in logarithms of both, beyond them it stays what it was at the last one.
`calibrate` (`calibrate.py`) writes such a file, and it can be edited.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import convert, parse_yaml, read_text
from gptoss_dist.planner.flops import visible_pairs
from gptoss_dist.planner.timing.kinds import Kind, elements, kind_of, moved_bytes
from gptoss_dist.planner.tracing.recorder import Operator

REMEDY = "measure anew with `python launch/plan.py calibrate`"


@dataclass(frozen=True)
class Curve:
    """A rate by size."""

    sizes: list[float]
    """Ascending."""
    values: list[float]
    """One for each size, in units per second."""

    def at(self, size: float) -> float:
        """Return the rate at a size, interpolated in logarithms of both."""
        return _interpolate(self.sizes, self.values, size)


Curves = dict[int, Curve]
"""Curves by a second size."""


def _at(curves: Curves, first: float, second: float) -> float:
    """Return the rate at two sizes, the first of which chooses between curves."""
    firsts = sorted(curves)
    return _interpolate(firsts, [curves[key].at(second) for key in firsts], first)


def _interpolate(sizes: list, values: list[float], size: float) -> float:
    if size <= sizes[0] or len(sizes) == 1:
        return values[0]
    if size >= sizes[-1]:
        return values[-1]
    index = bisect.bisect_right(sizes, size)
    low, high = math.log(sizes[index - 1]), math.log(sizes[index])
    part = (math.log(size) - low) / (high - low)
    return math.exp((1 - part) * math.log(values[index - 1]) + part * math.log(values[index]))


@dataclass(frozen=True)
class Attention:
    """FLOP/s of attention over the visible pairs, by head dimension and then by tokens of a sequence."""

    forward: Curves
    backward: Curves
    windowed_forward: Curves
    """With a window of 128 keys."""
    windowed_backward: Curves


@dataclass(frozen=True)
class Calibration:
    """Measured rates of one machine; a `Hardware` of `prices.py`."""

    name: str
    device: str
    """`cpu`, or the GPU's name by its driver."""
    date: str
    torch_version: str
    threads: int
    """CPU threads of one process."""
    operator_s: float
    """Seconds of the host for each operator that has a kernel, Python's and autograd's share included."""
    sync_s: float
    """Seconds of the host to read a value from the device."""
    products: dict[str, Curves]
    """FLOP/s by dtype, by the smallest dimension, by the geometric mean of the others."""
    grouped: dict[str, Curve]
    """FLOP/s of the experts' products in one call, by dtype and rows of an expert; CPUs make a call for each expert."""
    attention: dict[str, Attention]
    """By dtype."""
    memory: Curve
    """Bytes/s of elementwise operators, by the bytes that they read and write."""
    rows: Curve
    """Bytes/s of a gather of rows, by the bytes that it reads and writes."""
    exponentials: Curve
    """Numbers/s of `exp` and the like, by how many there are."""
    sorts: Curve
    """Numbers/s of a stable sort, by how many there are."""
    optimizer: Curve
    """Bytes/s of fused AdamW, by the bytes that it reads and writes."""
    collectives: dict[str, Curve] = field(default_factory=dict)
    """Bytes/s that each of two processes sends, by bytes and by kind, such as `all-gather`."""
    network: float = 0.85
    """Share of the network's rate that collectives reach; not measured."""

    def __post_init__(self) -> None:
        for path, curve in _curves(dataclasses.asdict(self)):
            sizes, values = curve["sizes"], curve["values"]
            if len(sizes) != len(values) or not sizes or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"{path}.sizes={sizes} must ascend, one for each of {len(values)} values; {REMEDY}")
            if min([*sizes, *values]) <= 0:
                raise ValueError(f"{path} must have sizes and values above 0; {REMEDY}")
        if not self.products or not self.attention:
            raise ValueError(f"products and attention must have a dtype each; {REMEDY}")
        if min(self.operator_s, self.sync_s) < 0 or self.threads < 1:
            raise ValueError(f"operator_s and sync_s must be at least 0, threads at least 1; {REMEDY}")

    @property
    def runs_ahead(self) -> bool:
        """Whether the host issues operators before the device runs them."""
        return self.device != "cpu"

    @property
    def launch_s(self) -> float:
        """Seconds of the host per operator that has a kernel."""
        return self.operator_s

    @property
    def host_sync_s(self) -> float:
        """Seconds that the host takes to notice that the device is done."""
        return self.sync_s

    @property
    def network_share(self) -> float:
        """Share of the network's rate that collectives reach."""
        return self.network

    def compute_s(self, operator: Operator) -> float:
        """Return the device's seconds for an operator that is no collective."""
        kind = kind_of(operator)
        if kind is Kind.NOTHING:
            return 0.0
        return self._work_s(operator, kind) + (0.0 if self.runs_ahead else self.operator_s)

    def link_s(self, kind: str, sent: float, processes: int) -> float:
        """Return the seconds of a collective within a node."""
        if processes < 2 or not sent:
            return 0.0
        curve = self.collectives.get(kind) or self.collectives.get("all-gather")
        if curve is None:
            raise ValueError(f"collectives.{kind} of hardware {self.name!r} was not measured; {REMEDY}")
        return sent / curve.at(sent)

    def _work_s(self, operator: Operator, kind: Kind) -> float:
        moved = moved_bytes(operator)
        if kind in (Kind.ATTENTION_FORWARD, Kind.ATTENTION_BACKWARD):
            return operator.flops / self._attention(operator, kind)
        if kind is Kind.MATRIX:
            return max(operator.flops / self._products(operator), moved / self.memory.at(moved))
        if kind is Kind.GROUPED:
            rows, groups = operator.shapes[0][0], max(1, operator.shapes[-1][0])
            curve = _of_dtype(self.grouped, operator.dtype) if self.grouped else None
            rate = curve.at(rows / groups) if curve else self._products(operator)
            return operator.flops / rate
        if kind is Kind.EXPONENTIAL:
            return (count := elements(operator)) / self.exponentials.at(count)
        if kind is Kind.SORT:
            return (count := elements(operator)) / self.sorts.at(count)
        curve = {Kind.GATHER: self.rows, Kind.OPTIMIZER: self.optimizer}.get(kind, self.memory)
        return moved / curve.at(moved) if moved else 0.0

    def _products(self, operator: Operator) -> float:
        matrices = [shape[-2:] for shape in operator.shapes if len(shape) >= 2][-2:]
        if operator.name.startswith("aten.mm.out"):  # (a, b, out)
            matrices = [shape[-2:] for shape in operator.shapes[:2]]
        smallest, *others = sorted((matrices[0][0], matrices[0][1], matrices[1][1]))
        return _at(_of_dtype(self.products, operator.dtype), max(1, smallest), max(1, math.prod(others)) ** 0.5)

    def _attention(self, operator: Operator, kind: Kind) -> float:
        forward = kind is Kind.ATTENTION_FORWARD
        B, T, H, D = operator.shapes[0]
        pairs = operator.flops / ((4 if forward else 10) * B * H * D)
        rates = _of_dtype(self.attention, operator.dtype)
        if pairs < 0.99 * visible_pairs(T):
            curves = rates.windowed_forward if forward else rates.windowed_backward
        else:
            curves = rates.forward if forward else rates.backward
        return _at(curves, D, T)


def _of_dtype(rates: dict, dtype: torch.dtype | None):
    """Return what was measured for a dtype; float32 stands in for one that was not, as products do on such CPUs."""
    name = str(dtype).removeprefix("torch.")
    return rates.get(name) or rates.get("float32") or next(iter(rates.values()))


def _curves(value, path: str = ""):
    if isinstance(value, dict) and set(value) == {"sizes", "values"}:
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _curves(part, f"{path}.{key}" if path else str(key))


def read_calibration(path: str | Path) -> Calibration:
    """Read a file of `configs/hardware`.

    Raises:
        ValueError: It cannot be read, or a value is wrong; one line that names file, key and value.
    """
    try:
        return convert(parse_yaml(read_text(path), path), Calibration, path, finite=True, remedy=REMEDY)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a file that `read_calibration` reads; its folder is made."""
    values = _rounded(dataclasses.asdict(calibration))
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)
    text = f"# Measured by `calibrate`; docs/planning_time.md says what and how.\n{text}"
    write_file_atomically(Path(path), text.encode())


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
