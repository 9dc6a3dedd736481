"""Size of the key/value cache against that of the same model with full attention in every layer.

Twice: by formula, and as the bytes of the tensors that a real cache allocates for so many tokens. The two must agree to
the byte. Weights are not needed.

    bytes per column of a layer = 2 (key and value) * key/value heads * head_dim * bytes per element
    columns = the context in a full layer, min(context, sliding_window) in a sliding one
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from gptoss_dist.evaluation.options import KvCacheOptions
from gptoss_dist.evaluation.results import RESULT, Result, print_table, publish, results_folder, subject_of
from gptoss_dist.model.config import FULL, SLIDING, ModelConfig
from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.ops.precision import DTYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
LENGTHS = (4096, 16384, 65536, 131072)
"""Context lengths if none are given."""


def evaluate(options: KvCacheOptions) -> None:
    """Print the table and publish it.

    Raises:
        ValueError: There is no such architecture, or a length is not positive or beyond its positions.
    """
    config = ModelConfig.from_yaml(options.model)
    positions = config.max_position_embeddings
    lengths = options.lengths or [n for n in LENGTHS if n <= positions] or [positions]
    for tokens in lengths:
        if not 0 < tokens <= positions:
            raise ValueError(
                f"lengths={tokens} must be positive, and at most max_position_embeddings={positions} of {options.model}"
            )
    subject = subject_of(options.model)
    with results_folder(options, "kv-cache", subject) as folder:
        rows = [row(config, tokens, options.batch_size, DTYPES[options.precision]) for tokens in lengths]
        print_table([_readable(one) for one in rows])
        names = ("bytes", "ratio")
        metrics = {f"eval/kv_cache/{name}_{one['tokens']}": float(one[name]) for one in rows for name in names}
        settings = asdict(options) | {"lengths": lengths}
        result = Result("kv-cache", settings, rows, metrics, {"architecture": config.to_dict()})
        draw = {"kv_cache": lambda figure: _draw(figure, rows)}
        publish(result, subject, folder, figures=draw, mlflow=options.mlflow)
        print(f"{folder / RESULT}")


def row(config: ModelConfig, tokens: int, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the sizes at one context length, in bytes.

    Raises:
        RuntimeError: A cache does not hold what the formula says.
    """
    all_full = dataclasses.replace(config, layer_types=[FULL] * config.num_hidden_layers)
    sizes = {}
    for name, architecture in (("bytes", config), ("full_bytes", all_full)):
        sizes[name] = analytic(architecture, tokens, batch_size, dtype)
        held = measured(architecture, tokens, batch_size, dtype)
        if held != sizes[name]:
            raise RuntimeError(f"a cache of {tokens} tokens holds {held} bytes, and should {sizes[name]}")
        sizes[f"measured_{name}"] = held
    return {"tokens": tokens, **sizes, "ratio": sizes["full_bytes"] / sizes["bytes"]}


def analytic(config: ModelConfig, tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of a cache by formula."""
    per_column = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    columns = (min(tokens, config.sliding_window) if kind == SLIDING else tokens for kind in config.attention_types)
    return batch_size * per_column * sum(columns)


def measured(config: ModelConfig, tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of the storages that a cache for so many tokens allocates.

    They are allocated on the CPU, and never written: the system gives no memory for them.
    """
    cache = KVCache(config, capacity=tokens)
    cache.allocate(batch_size, dtype, torch.device("cpu"))
    storages = {}
    for layer in cache.layers:
        for buffer in layer.buffers or ():
            storages[buffer.untyped_storage().data_ptr()] = buffer.untyped_storage().nbytes()
    held = sum(storages.values())
    assert held == cache.nbytes()
    return held


def _readable(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": one["tokens"],
        "cache MiB": f"{one['bytes'] / MIB:,.3f}",
        "measured": f"{one['measured_bytes'] / MIB:,.3f}",
        "all full MiB": f"{one['full_bytes'] / MIB:,.3f}",
        "measured full": f"{one['measured_full_bytes'] / MIB:,.3f}",
        "ratio": f"{one['ratio']:.2f}x",
    }


def _draw(figure: Figure, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    tokens = [one["tokens"] for one in rows]
    for name, label in (("full_bytes", "all layers full"), ("bytes", "this architecture")):
        axes.plot(tokens, [one[name] / MIB for one in rows], marker="o", label=label)
        axes.plot(tokens, [one[f"measured_{name}"] / MIB for one in rows], "kx", label=f"{label}, measured")
    for one in rows:
        axes.annotate(f"{one['ratio']:.2f}x", (one["tokens"], one["bytes"] / MIB), (0, -14), textcoords="offset points")
    axes.margins(x=0.08, y=0.1)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="key/value cache, MiB")
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.legend()
