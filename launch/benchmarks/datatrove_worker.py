#!/usr/bin/env python
"""Tokenize a folder of .jsonl files with datatrove, and print how long it took; `peer.py` starts this.

It imports nothing of this project, so that datatrove may be in an environment of its own.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.tokenization import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("corpus", "tokenizer", "eos", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    load_tokenizer(arguments.tokenizer)
    loading = time.perf_counter() - start
    output = Path(arguments.output)
    tokens = DocumentTokenizer(
        str(output / "tokens"),
        arguments.tokenizer,
        eos_token=arguments.eos,
        batch_size=arguments.batch,
        shuffle_documents=False,
    )
    executor = LocalPipelineExecutor(
        [JsonlReader(arguments.corpus), tokens],
        tasks=arguments.workers,
        workers=arguments.workers,
        logging_dir=str(output / "logs"),
        start_method="fork",  # the fastest
    )
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    executor.run()
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    digest, count = hashlib.sha256(), 0
    for path in sorted((output / "tokens").glob("*.ds")):
        digest.update(path.read_bytes())
        count += int(path.with_name(f"{path.name}.metadata").read_text(encoding="utf-8").splitlines()[1])
    # Each worker loads the tokenizer, at the same time: that is not counted for anybody.
    found = {"seconds": seconds - loading, "cpu": cpu - arguments.workers * loading}
    print(json.dumps({"tokens": count, "digest": digest.hexdigest(), **found}))


if __name__ == "__main__":
    main()
