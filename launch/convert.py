#!/usr/bin/env python
"""Look into checkpoints, and write models that other tools load.

What is in it:     python launch/convert.py inspect runs/quickstart
Is it whole:       python launch/convert.py verify runs/quickstart
For transformers:  python launch/convert.py export runs/quickstart --output my-model
As published:      python launch/convert.py export runs/quickstart --output my-model --mxfp4
And in MLflow:     python launch/convert.py export runs/quickstart --output my-model --register my-model
From one layout to the other:
                   python launch/convert.py export hf:FOLDER --output NEW --format openai
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, option, positional, print_line, ranged, run_verb


@dataclass
class SourceOptions:
    """A model."""

    source: str = positional("SOURCE")
    """hf:FOLDER, openai:FOLDER (or only FOLDER, if it has a config.json), or the folder of a run or checkpoint."""


@dataclass
class InspectOptions(SourceOptions):
    """List step, settings, tensors, shapes and sizes, and the tensors with values that are not finite."""

    read_values: bool = True
    """Look at the values, which reads everything."""


@dataclass
class VerifyOptions:
    """Hash every file of every checkpoint, or of an exported model, anew and compare."""

    source: str = positional("SOURCE")
    """The folder of a run or of a checkpoint, or an exported model with its SHA256SUMS."""


@dataclass
class ModelOptions(SourceOptions):
    """Print the architecture, as a file for --model."""


@dataclass
class ExportOptions(SourceOptions):
    """Write a model for other tools."""

    output: str = option()
    """Folder to create."""
    format: Literal["hf", "openai", "safetensors"] = "hf"
    """transformers' and vLLM's layout; OpenAI's own, whose code reads it with --mxfp4 only; or the bare weights, which
    any variant can be written as."""
    mxfp4: bool = False
    """Write the experts' weights in 4 bits, as published."""
    search: bool = False
    """With --mxfp4: take the best of three scales, which is slower."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of what is not packed."""
    license: str | None = None
    """The licence that the model card names, such as apache-2.0; by default that of SOURCE's card, or unknown."""
    verify: bool = True
    """Hash the files of SOURCE first, if it carries checksums."""
    max_file_gb: float = ranged(5.0, at_least=1e-6, at_most=1e6)
    """Largest file, in 10^9 bytes."""
    register: str | None = None
    """Register the export in MLflow as a version of the model of this name. Its files stay where they are, and the
    version's tag `path` says where."""
    upload: bool = False
    """With --register: send the files to MLflow's artifacts too."""
    uri: str | None = None
    """With --register: where MLflow is; null is $MLFLOW_TRACKING_URI, then where SOURCE's run was tracked."""

    def __post_init__(self) -> None:
        if self.search and not self.mxfp4:
            raise ValueError("--search chooses the scales of --mxfp4, which is not given")
        if self.mxfp4 and self.format == "safetensors":
            raise ValueError("--mxfp4 needs --format hf or openai; plain safetensors hold plain numbers")
        if (self.upload or self.uri) and not self.register:
            raise ValueError("--upload and --uri are about --register NAME, which is not given")
        if self.register is not None and (not self.register.strip() or set("/:.%\"'") & set(self.register)):
            raise ValueError(f"register={self.register!r} is no name that MLflow takes; use letters, digits, - and _")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    verbs = {
        "inspect": (InspectOptions, _inspect),
        "verify": (VerifyOptions, _verify),
        "model": (ModelOptions, _model),
        "export": (ExportOptions, _export),
    }
    return run_verb(Program("convert.py", prefix="convert.py", failed=2), verbs, argv, description=__doc__)


def _inspect(options: InspectOptions) -> None:
    from gptoss_dist.checkpoint.formats.inspect import describe

    print_line(describe(options.source, values=options.read_values))


def _verify(options: VerifyOptions) -> int:
    from gptoss_dist.checkpoint import candidates, verify
    from gptoss_dist.checkpoint.formats.checksums import FILE, altered_files, has_checksums

    format, _, folder = options.source.rpartition(":")
    if has_checksums(folder):
        problems = altered_files(folder)
        print_line(f"{folder}: {'; '.join(problems) or 'intact'}")
        return 1 if problems else 0
    if format in ("hf", "openai") or (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} carries no {FILE}: there is nothing to compare its files with")
    wrong = 0
    for checkpoint in candidates(options.source):
        problems = verify(checkpoint)
        print_line(f"{checkpoint}: {'; '.join(problems) or 'intact'}")
        wrong += bool(problems)
    return 1 if wrong else 0


def _model(options: ModelOptions) -> None:
    import yaml

    from gptoss_dist.checkpoint.formats.pretrained import open_pretrained

    print(yaml.safe_dump(open_pretrained(options.source, verify=False).config.to_dict(), sort_keys=False), end="")


def _export(options: ExportOptions) -> None:
    import torch

    from gptoss_dist.checkpoint.formats.export import export
    from gptoss_dist.checkpoint.formats.pretrained import open_pretrained

    losses = export(
        open_pretrained(options.source, message=print_line, verify=options.verify),
        options.output,
        options.format,
        dtype=getattr(torch, options.dtype),
        pack=options.mxfp4,
        search=options.search,
        file_bytes=int(options.max_file_gb * 1e9),
        license=options.license,
        message=print_line,
    )
    for name, loss in losses.items():
        print_line(f"{name}: relative error {loss:.4f}")
    print(f"done: {options.output}")
    if options.register:
        from gptoss_dist.tracking.delivery.registry import register_export

        folder = options.source.rpartition(":")[2]
        print(register_export(options.register, options.output, folder, uri=options.uri, upload=options.upload))


if __name__ == "__main__":
    sys.exit(main())
