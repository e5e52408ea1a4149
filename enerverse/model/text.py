"""Instruction embeddings: a self-contained default, and CLIP or T5 through `transformers` as an option."""

from __future__ import annotations

import itertools
import re
import zlib
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from enerverse.model.component import Component


class HashedTextEncoder(Component):
    """Words and word pairs hashed into a table of learned vectors, averaged. Needs no download and no
    vocabulary."""

    @register_to_config
    def __init__(self, width: int = 128, buckets: int = 1024):
        super().__init__()
        self.buckets, self.width = buckets, width
        self.table = nn.EmbeddingBag(buckets, width, mode="mean")

    def tokenize(self, text: str) -> list[int]:
        """Bucket of every word and of every pair of neighbouring words, in order."""
        words = re.findall(r"[a-z0-9]+", text.lower()) or [""]
        pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
        return [zlib.crc32(item.encode()) % self.buckets for item in words + pairs]

    def forward(self, texts: list[str]) -> Tensor:
        """[len(texts), width]."""
        tokens = [self.tokenize(text) for text in texts]
        offsets = torch.tensor([0] + [len(row) for row in tokens[:-1]]).cumsum(0)
        flat = torch.tensor([token for row in tokens for token in row])
        device = self.table.weight.device
        return self.table(flat.to(device), offsets.to(device))


class PretrainedTextEncoder(Component):
    """A frozen CLIP or T5 text encoder and a trained linear map of its mean token.

    The paper's text names T5 in section 3 and CLIP in appendix A; either fits here. `model` is a local folder
    or a hub name understood by `transformers`; the frozen weights are not written into checkpoints.
    """

    @register_to_config
    def __init__(self, width: int = 128, model: str = "google-t5/t5-small"):
        super().__init__()
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(model)
        config = getattr(config, "text_config", config)
        if config.model_type not in ("clip", "clip_text_model", "t5"):
            raise ValueError(
                f"model: expected a CLIP or T5 text encoder, got model type {config.model_type!r}; "
                "choose another folder"
            )
        self._kind = config.model_type
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        # A tuple keeps the frozen encoder out of the module tree, hence out of checkpoints and optimisers.
        self._frozen: tuple[Any, ...] = ()
        self.project = nn.Linear(config.d_model if self._kind == "t5" else config.hidden_size, width)

    def _frozen_encoder(self) -> Any:
        """The encoder, loaded when first used: diffusers builds a network it loads without any memory."""
        if not self._frozen:
            from transformers import CLIPTextModel, T5EncoderModel

            family: Any = T5EncoderModel if self._kind == "t5" else CLIPTextModel
            self._frozen = (family.from_pretrained(self.config.model).eval().requires_grad_(False),)
        return self._frozen[0].to(self.project.weight.device)

    def forward(self, texts: list[str]) -> Tensor:
        """[len(texts), width]."""
        encoder = self._frozen_encoder()
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(
            self.project.weight.device
        )
        with torch.no_grad():
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return self.project((hidden * mask).sum(1) / mask.sum(1))
