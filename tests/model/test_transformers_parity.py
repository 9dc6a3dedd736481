"""The model against transformers' GPT-OSS: same names, same logits, same gradients."""

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.config import RopeScaling

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
}


def build_pair(seed: int = 0, tie: bool = False):
    """The same random weights in both, large enough that clamps, sinks and routing matter."""
    theirs = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, tie_word_embeddings=tie, attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 1 else 0.25))
    ours = GptOss(ModelConfig(**SIZES, tie_word_embeddings=tie))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_logits_and_every_gradient(T):
    ours, theirs = build_pair()
    ids = torch.randint(0, SIZES["vocab_size"], (2, T), generator=torch.Generator().manual_seed(T))
    b = theirs(ids, use_cache=False).logits
    direction = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
    b.backward(direction)
    expected = dict(theirs.named_parameters())
    for backend in ("auto", "reference"):
        for layer in ours.model.layers:
            layer.self_attn.backend = backend
        ours.zero_grad()
        a = ours(ids)
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
        a.backward(direction)
        for name, p in ours.named_parameters():
            reference = expected[name].grad
            assert reference.abs().max() > 0 or T == 1, name
            assert (p.grad - reference).abs().max() <= 1e-4 * reference.abs().max().clamp(min=1e-3), name


def test_loss_and_tied_gradients():
    ours, theirs = build_pair(tie=True)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 65), generator=torch.Generator().manual_seed(0))
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[0, :10] = -100
    loss, auxiliary = ours.loss(inputs, labels)
    output = theirs(inputs, use_cache=False, output_router_logits=True)
    logits = output.logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.backward()
    expected = dict(theirs.named_parameters())
    assert sum(1 for _ in ours.parameters()) == len(expected)
    for name, p in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        assert (p.grad - expected[name].grad).abs().max() <= 1e-4 * scale, name

    # transformers pools all layers into one product and does not divide by k: compare layer by layer.
    balance = [
        transformers.models.gpt_oss.modeling_gpt_oss.load_balancing_loss_func((layer,), 6, 3) / 3
        for layer in output.router_logits
    ]
    torch.testing.assert_close(auxiliary["aux"], torch.stack(balance).mean(), rtol=1e-5, atol=1e-6)
    z = torch.stack([layer.logsumexp(-1).square().mean() for layer in output.router_logits]).mean()
    torch.testing.assert_close(auxiliary["z"], z, rtol=1e-5, atol=1e-6)


def test_rope_facts():
    """The numbers of the OpenAI reference implementation for GPT-OSS."""
    from gptoss_dist.model.rope import inverse_frequencies

    inverse, factor = inverse_frequencies(ModelConfig(), "full_attention")
    assert factor == pytest.approx(1.3465735902799727, rel=1e-12)
    expected = {0: 1.0, 8: 0.0508133, 12: 0.00679496, 17: 1.293187e-4, 31: 3.023511e-7}
    for index, value in expected.items():
        assert inverse[index].item() == pytest.approx(value, rel=1e-5)
    pruned = ModelConfig(head_dim=96, rope_pruned_fraction=0.25, rope_scaling=RopeScaling())
    assert (inverse_frequencies(pruned, "full_attention")[0] == 0).sum() == 12
    assert (inverse_frequencies(pruned, "sliding_attention")[0] == 0).sum() == 0
