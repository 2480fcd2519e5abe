"""The words of the embedded world: a CLIP tokenizer in which every word is one token."""

import json
from functools import lru_cache
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from g4seg_pl.world.scenes import CLASS_NAMES

CONTEXT_LENGTH = 16
TEXT_WIDTH = 128
_PROMPT_WORDS = (
    "a",
    "photo",
    "of",
    "and",
    "the",
    "picture",
    "clean",
    "origami",
    "ground",
    "sky",
)


def _words() -> tuple[str, ...]:
    names = " ".join(CLASS_NAMES).split()
    return tuple(dict.fromkeys((*_PROMPT_WORDS, *names, "background")))


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and configuration so that ``CLIPTokenizer`` loads them.

    Unknown words fall into letters, as in CLIP's own byte-pair encoding.
    """
    letters = [chr(code) for code in range(33, 127)]
    merges: dict[tuple[str, str], None] = {}
    for word in _words():
        # From the right, so that pieces ending a word never take part in another word's start.
        tail = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges[(letter, tail)] = None
            tail = letter + tail
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(m) for m in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder with fresh weights, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class CaptionTokens:
    """Token ids of captions, remembered: there are few different captions."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = lru_cache(maxsize=None)(self._ids)

    def _ids(self, caption: str) -> tuple[int, ...]:
        return tuple(
            self.tokenizer(caption, padding="max_length", max_length=CONTEXT_LENGTH)["input_ids"]
        )
