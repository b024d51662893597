"""The embedded captioner (BLIP) and the classifier's text encoder (BERT), both small and from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi2rage_rt.noise import rng as keyed_rng
from mi2rage_rt.noise import seed_from
from mi2rage_training.microworld import IMAGE_PX, Corpus
from mi2rage_training.pretrain_loop import Budget, Log, batches, clip_pixels, fit
from mi2rage_training.pretrain_words import MAX_WORDPIECES
from mi2rage_training.slots import POST_PREFIX, with_slots

__all__ = ["pretrain_captioner", "pretrain_text_encoder", "slotted_posts"]

_WIDTH = 64
_POST_SHARE = 0.6
"""Share of the corpus' posts that the captioner learns to write as posts; it describes the pictures of the others."""
_IGNORED = -100


def _new_captioner(tokenizer: Any) -> Any:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=4,
        # transformers' default of 1e-10 leaves the tower dead for long
        initializer_range=0.02,
    )
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        encoder_hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_WORDPIECES,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = BlipConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=_WIDTH,
        image_text_hidden_size=_WIDTH,
    )
    model = BlipForConditionalGeneration(config)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    settings.do_sample, settings.num_beams, settings.max_new_tokens = False, 1, 40
    return model


def slotted_posts(corpus: Corpus) -> list[str]:
    """The corpus' posts with slots in place of their entities."""
    return [" ".join(with_slots(tweet.tokens, tweet.head, tweet.tail)) for tweet in corpus.tweets if tweet is not None]


def _prefixes_and_texts(corpus: Corpus, seed: int) -> list[tuple[str, str]]:
    """For each picture a prefix and what follows it.

    After no prefix (mostly), after names, or after BLIP's `a picture of` comes the plain caption; after `POST_PREFIX`
    comes the picture's own post, with slots in place of the two entities; the prefix names the relation where the
    corpus does, the post never.
    """
    rng = keyed_rng(seed_from("pretrain-prefixes", seed))
    tweets = [tweet for tweet in corpus.tweets if tweet is not None]
    rows = []
    for tweet, stated, caption in zip(corpus.tweets, corpus.stated, corpus.captions, strict=True):
        draw = rng.random()
        if tweet is not None and rng.random() < _POST_SHARE:
            head, tail = (" ".join(tweet.tokens[span.start : span.end]) for span in (tweet.head, tweet.tail))
            post = " ".join(with_slots(tweet.tokens, tweet.head, tweet.tail))
            prefix = " ".join(POST_PREFIX.format(head=head, tail=tail, label=stated).split())
            rows.append((prefix, post))
        elif draw >= 0.4 or not tweets:
            rows.append(("", caption))
        elif draw < 0.1:
            rows.append(("a picture of", caption))
        else:
            other = tweets[int(rng.integers(len(tweets)))]
            head, tail = (" ".join(other.tokens[span.start : span.end]) for span in (other.head, other.tail))
            form = ("{} and {} :", "{} , {} :", "{} {}")[int(rng.integers(3))]
            rows.append((form.format(head, tail), caption))
    return rows


def _caption_rows(corpus: Corpus, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """Ids and labels, int64 `(N, L)`; a prefix is read, not learnt to be written."""
    import torch

    ids = torch.full((len(corpus.texts), MAX_WORDPIECES), tokenizer.pad_token_id)
    labels = torch.full_like(ids, _IGNORED)
    for row, (prefix, text) in enumerate(_prefixes_and_texts(corpus, seed)):
        start = tokenizer(prefix).input_ids[:-1]
        whole = (start + tokenizer(text, add_special_tokens=False).input_ids)[: MAX_WORDPIECES - 1]
        whole.append(tokenizer.sep_token_id)
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(start) : len(whole)] = torch.tensor(whole[len(start) :])
    return ids, labels


def pretrain_captioner(corpus: Corpus, tokenizer: Any, budget: Budget, seed: int, log: Log) -> Any:
    """A `BlipForConditionalGeneration` of width 64 that continues a prefix (or nothing) with a caption or a post."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    model = _new_captioner(tokenizer)
    pixels = clip_pixels(corpus.images)
    ids, labels = _caption_rows(corpus, tokenizer, seed)
    lengths = (ids != tokenizer.pad_token_id).sum(dim=1)

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        longest = int(lengths[rows].max())
        tokens, targets = ids[rows, :longest], labels[rows, :longest]
        seen = model.vision_model(pixels[rows]).last_hidden_state
        mask = (tokens != tokenizer.pad_token_id).long()
        logits = model.text_decoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, return_dict=True
        ).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=_IGNORED)

    model.train()
    fit("captioner", model.parameters(), budget, batches(len(pixels), budget, "captioner", seed), loss_of, log)
    return model.eval()


def pretrain_text_encoder(texts: Sequence[str], tokenizer: Any, budget: Budget, seed: int, log: Log) -> Any:
    """A two-layer `BertModel` of width 64, by masked words on unlabelled posts."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_WORDPIECES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_WORDPIECES, return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    special = torch.tensor([tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id])

    def loss_of(rows: NDArray[np.int64]) -> torch.Tensor:
        longest = int(mask[rows].sum(dim=1).max())
        tokens, attended = ids[rows, :longest], mask[rows, :longest]
        hidden = (torch.rand(tokens.shape, generator=rng) < 0.2) & ~torch.isin(tokens, special)
        given = torch.where(hidden, tokenizer.mask_token_id, tokens)
        targets = torch.where(hidden, tokens, _IGNORED)
        loss: torch.Tensor = model(input_ids=given, attention_mask=attended, labels=targets).loss
        return loss

    model.train()
    fit("text_encoder", model.parameters(), budget, batches(len(ids), budget, "text", seed), loss_of, log)
    return model.bert.eval()
