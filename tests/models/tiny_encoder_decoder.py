"""`VisionEncoderDecoderModel` captioners of transformers' classes in about 0.1 M parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tests.models.tiny_captioner import MAX_NEW_TOKENS, PIXELS, random_images
from tests.models.vocabularies import WORDS, bert_vocabulary, save_bert_tokenizer

POSITIONS = 32
_SWIN_PIXELS = 32
"""Swin cuts its image into windows: 24 px would not do."""


def build_encoder_decoder(folder: Path, encoder: str = "vit", decoder: str = "gpt2", *, seed: int = 0) -> Path:
    """Write a random captioner; encoder and decoder by transformers' model types."""
    import torch
    from transformers import GenerationConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    ids = _save_tokenizer(folder, decoder)
    vision = _encoder_config(encoder)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, _decoder_config(decoder, ids))
    model = VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():  # so that some captions end before the limit
        model.decoder.get_input_embeddings().weight[ids["eos_token_id"]] *= 5.0 if decoder == "roberta" else 3.0
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def check_encoder_decoder(folder: Path) -> None:
    """Captions must differ between images, hold several different words, and not all run to the limit."""
    from mi2rage_training.pytorch_captioner import TorchCaptioner

    captioner = TorchCaptioner.from_folder(folder, device="cpu")
    ids = captioner.generate_ids(list(random_images(8)), [captioner.prompt_ids("")] * 8)
    assert len({tuple(row) for row in ids}) >= 4, ids
    assert max(len(set(row)) for row in ids) >= 3, ids
    assert min(map(len, ids)) < MAX_NEW_TOKENS, ids


def _encoder_config(kind: str) -> Any:
    import transformers

    if kind == "swin":
        return transformers.SwinConfig(
            image_size=_SWIN_PIXELS,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            initializer_range=0.2,
        )
    config = {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig, "beit": transformers.BeitConfig}[kind]
    return config(
        hidden_size=48,  # not the decoder's: a projection stands between
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=PIXELS,
        patch_size=8,
        initializer_range=0.2,
    )


def _decoder_config(kind: str, ids: dict[str, int]) -> Any:
    import transformers

    if kind == "gpt2":
        return transformers.GPT2Config(
            n_positions=POSITIONS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            add_cross_attention=True,
            is_decoder=True,
            initializer_range=0.5,  # the usual 0.02 makes every caption the same token over and over
            **ids,
        )
    if kind == "trocr":
        return transformers.TrOCRConfig(
            max_position_embeddings=POSITIONS,
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            cross_attention_hidden_size=32,
            init_std=0.5,
            **ids,
        )
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    return config(
        max_position_embeddings=POSITIONS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        add_cross_attention=True,
        is_decoder=True,
        initializer_range=0.5,
        **ids,
    )


def _save_tokenizer(folder: Path, decoder: str) -> dict[str, int]:
    """BERT's word pieces, or GPT-2's and RoBERTa's bytes; the ids that the model's configuration has to have."""
    if decoder == "bert":
        save_bert_tokenizer(folder)
        ids = bert_vocabulary()
        return {
            "vocab_size": len(ids),
            "bos_token_id": ids["[CLS]"],
            "eos_token_id": ids["[SEP]"],
            "pad_token_id": ids["[PAD]"],
        }
    # nlpconnect's GPT-2 has one id for the start, the end and the padding; RoBERTa's pads with 1.
    specials = ["<|endoftext|>"] if decoder == "gpt2" else ["<s>", "<pad>", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad_id, eos_id = (0, 0) if decoder == "gpt2" else (1, 2)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": 0,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
