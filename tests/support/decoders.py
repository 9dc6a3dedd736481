"""A small model that decodes: its window is passed within a few tokens, and its logits differ enough for one choice."""

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import initialize

WINDOW = 8


def small_decoder(layers: int) -> GptOss:
    """Return the model, ready for inference."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        initializer_range=0.3,
    )
    model = GptOss(config)
    initialize(model, seed=0)
    return model.eval()
