"""Placeholder tokens that a model's configuration names, under the names that transformers uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.method.modality import Modality, ModalityMap

#: In this order, so that a token that stands for both pictures and video is video either way.
KINDS = {"image": Modality.VIDEO, "video": Modality.VIDEO, "audio": Modality.AUDIO}


def label_placeholders(config: Any, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
    """The modality of every token of ``[batch, tokens]`` placeholders.

    Args:
        config: of the model.
        attention_mask: ``[batch, tokens]``, 0 where padded; of a longer mask the last columns count.
    """
    labels = torch.zeros_like(input_ids)
    for kind, modality in KINDS.items():
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                labels = labels.masked_fill(input_ids == token, modality)
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, Modality.PADDING)
    return ModalityMap(labels)
