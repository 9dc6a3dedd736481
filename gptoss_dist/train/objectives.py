"""What a model is trained for: an argument of the engine, so that another objective needs no other loop."""

from __future__ import annotations

from torch import Tensor, nn

from gptoss_dist.model.transformer import LossSums


def next_token_prediction(model: nn.Module, batch: dict[str, Tensor]) -> LossSums:
    """Return the sums of the loss of predicting each label from the tokens up to its place.

    Args:
        model: A `GptOss`, or an engine's wrapper around one.
        batch: `input_ids` [B, T]; `labels` [B, T], the token after each input, -100 where none is predicted; and,
            where attention is to stay within documents, `document_ids` [B, T].
    """
    return model(batch["input_ids"], batch["labels"], document_ids_BT=batch.get("document_ids"))
