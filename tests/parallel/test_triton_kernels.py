"""megablocks' own Triton kernels, without a GPU: run by Triton's interpreter, and compiled for GPUs that are not here.

Each test is a process of its own, because Triton looks at TRITON_INTERPRET when a kernel is defined.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def run(script: str, **variables: str) -> str:
    """What `script` prints, where of Triton's variables exactly `variables` are set."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ------------------------------------------------------------------------------------------- interpreted, float32 only


def test_row_movement_equals_its_torch_twins():
    script = """
        import importlib.util, logging, sys
        import torch
        from gptoss_dist.parallel import megablocks_compat as compat
        logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
        print("compiled" if importlib.util.find_spec("megablocks_ops") else "missing")
        kernels = compat.load_megablocks().kernels
        compat.load_megablocks()
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            kernel.configs = kernel.configs[:1]  # choosing between several would ask for a GPU
        tokens, experts, top_k, width = 12, 4, 2, 80  # a whole block of 64 columns, and one that is cut
        chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).flatten().int()
        bin_ids, indices = (t.int() for t in torch.sort(chosen, stable=True))
        bins = torch.bincount(chosen, minlength=experts).cumsum(0).int()
        x, grad, y = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(tokens * top_k, width)
        weights = torch.rand(tokens * top_k)
        for name, *args in (
            ("gather", x, indices, bin_ids, None, bins, top_k),
            ("gather", x, indices, bin_ids, weights, bins, top_k),
            ("scatter", y, indices, bin_ids, None, bins, top_k),
            ("scatter", y, indices, bin_ids, weights, bins, top_k),
            ("scatter_wgrad", y, grad, indices, bin_ids, bins, top_k),
        ):
            triton_result = getattr(kernels, name).__wrapped__(*args)
            torch.testing.assert_close(getattr(compat, name)(*args), triton_result, rtol=1e-5, atol=1e-5)
            print(name, "agrees")
    """
    output = run(script, TRITON_INTERPRET="1")
    assert output.count("agrees") == 5
    # What stands in for the compiled module is said, and said once.
    assert output.count("its torch equivalent is used") == (1 if output.startswith("missing") else 0)


def test_a_whole_layer_equals_transformers():
    """Router, dispatch by the Triton kernels, experts; one expert receives no token. Output and every gradient."""
    pytest.importorskip("transformers")
    script = """
        import json
        import torch
        from torch import nn
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
        from gptoss_dist.model.config import ModelConfig
        from gptoss_dist.model.moe import MoE
        from gptoss_dist.parallel.experts import DroplessExperts, megablocks

        kernels, launches = megablocks.kernels, []
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            def launch(*args, name=kernel.fn.__name__, run=kernel.run, **kwargs):
                launches.append([name, kwargs.get("A_TO_B"), kwargs.get("SCALE")])
                return run(*args, **kwargs)
            kernel.configs, kernel.run = kernel.configs[:1], launch
        for name in ("gather", "scatter", "scatter_wgrad"):
            setattr(kernels, name, getattr(kernels, name).__wrapped__)  # Triton's, which CPU tensors would not get

        T, D, K = 24, 80, 2
        sizes = dict(hidden_size=D, intermediate_size=32, num_local_experts=4, num_experts_per_tok=K)
        config = GptOssConfig(**sizes)
        config._experts_implementation = "eager"
        for seed in range(3):
            torch.manual_seed(seed)
            reference, ours = GptOssMLP(config), MoE(ModelConfig(**sizes))
            for parameter in reference.parameters():
                nn.init.normal_(parameter, std=0.3)  # the clamps act on one value in a hundred
            reference.router.bias.data[2] = -100.0  # expert 2 receives no token
            ours.load_state_dict(reference.state_dict())
            ours.experts = DroplessExperts(ours.experts, K)
            x_BTD, grad_BTD = torch.randn(2, 1, T, D)
            results = []
            for block in (ours, reference):
                x = x_BTD.clone().requires_grad_()
                y = block(x)[0]
                y.backward(grad_BTD)
                results.append(dict(y=y.detach(), x=x.grad, **{n: p.grad for n, p in block.named_parameters()}))
            for name, expected in results[1].items():
                error = (results[0][name] - expected).abs().max() / expected.abs().max()
                print(json.dumps([f"{name}, seed {seed}", error.item()]))
            receives = [bool(g.any()) for g in results[0]["experts.gate_up_proj"]]
            assert receives == [True, True, False, True], receives
        print(json.dumps(launches))
    """
    *errors, launches = map(json.loads, run(script, TRITON_INTERPRET="1").splitlines())
    assert len(errors) == 3 * 8
    for name, error in errors:
        assert error <= 1e-6, f"{name}: {error:.2e}"
    assert launches == 3 * [
        # forward: to the experts; back, times the router's weights
        ["_padded_copy", True, False],
        ["_padded_copy", False, True],
        # backward: the gradient to the experts, times the weights; that of the weights; back
        ["_padded_copy", True, True],
        ["_padded_copy_wgrad", None, None],
        ["_padded_copy", False, False],
    ]


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("architecture", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
def test_kernels_compile_for_each_architecture(tmp_path, architecture):
    """At the sizes of GPT-OSS, with the smallest and the largest block that upstream lets the autotuner choose from."""
    script = """
        import json, os, sys
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from gptoss_dist.parallel.megablocks_compat import load_megablocks

        try:
            triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell
        except RuntimeError as error:
            print(json.dumps(str(error)))
            sys.exit()
        kernels = load_megablocks().kernels
        gathers, scatters = (
            [(kernels._padded_copy, dict(A_TO_B=to_b, SCALE=s)) for s in (True, False)] for to_b in (True, False)
        )
        wgrad = (kernels._padded_copy_wgrad, {})
        cases = [("bf16", "bf16", 4, *kernel) for kernel in (*gathers, *scatters, wgrad)]
        cases += [("bf16", "bf16", 1, *kernel) for kernel in (*gathers, wgrad)]  # to a scatter, TOP_K means nothing
        # The router's weights in fp32, and everything in fp32.
        cases += [("bf16", "fp32", 4, *scatters[0]), ("fp32", "fp32", 4, *scatters[0])]
        architecture = int(os.environ["ARCHITECTURE"])
        for rows, weights, top_k, kernel, flags in cases:
            types = dict.fromkeys(("a", "b", "x", "grad", "wgrad"), f"*{rows}") | {"weights": f"*{weights}"}
            for config in (kernel.configs[0], kernel.configs[-1]):
                constants = dict(NUM_COLUMNS=2880, TOP_K=top_k, **flags, **config.kwargs)
                if flags.get("SCALE") is False:
                    constants["weights"] = None
                names = kernel.fn.arg_names
                source = ASTSource(
                    kernel.fn,
                    {n: "constexpr" if n in constants else types.get(n, "*i32") for n in names},
                    constants,
                    # as at run time, where torch aligns what it allocates
                    {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
                )
                options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
                compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
                case = f"{kernel.fn.__name__} {rows} {weights} {constants}"
                cubin = compiled.asm["cubin"]
                print(json.dumps([case, compiled.asm["ptx"], len(cubin), cubin[:4].hex()]))
    """
    output = run(script, TRITON_CACHE_DIR=str(tmp_path), ARCHITECTURE=str(architecture))
    results = [json.loads(line) for line in output.splitlines()]
    if len(results) == 1:
        pytest.skip(f"triton cannot compile for NVIDIA GPUs here: {results[0]}")
    assert len(results) == 10 * 2
    for case, ptx, size, magic in results:
        (target,) = re.findall(r"^\.target (\S+)", ptx, re.MULTILINE)
        assert target.rstrip("a") == f"sm_{architecture}", case
        assert size > 1000 and bytes.fromhex(magic) == b"\x7fELF", case
    # Every case is a program of its own: what is asked for reaches the compiler.
    assert len({ptx for _, ptx, _, _ in results}) == len(results)
