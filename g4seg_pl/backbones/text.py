"""Prompts as token ids, and the places of a name among them."""

import re

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import CLIPTokenizer

from g4seg_pl.types import ConfigurationError


def tokenise(tokenizer: CLIPTokenizer, prompt: str, length: int) -> Int[Tensor, " l"]:
    """Return a prompt's token ids, padded to the length that the text encoder reads.

    Raises:
        ConfigurationError: the prompt has more tokens.
    """
    tokens = tokenizer(prompt, padding="max_length", max_length=length)["input_ids"]
    if len(tokens) > length:
        message = f"prompt {prompt!r} has {len(tokens)} tokens; the model reads {length}"
        raise ConfigurationError(message)
    return torch.tensor(tokens)


def mark_tokens(
    tokenizer: CLIPTokenizer, prompt: str, name: str, start: int, length: int
) -> Bool[Tensor, " l"]:
    """Mark the tokens of the first ``name`` in ``prompt`` at or after character ``start``.

    A token that holds punctuation of the name and of what stands beside it is the name's too.

    Args:
        tokenizer: whose tokens are meant.
        prompt: the whole text.
        name: a class name; it may span several tokens.
        start: where to begin; at a word's beginning.
        length: how many tokens the text encoder reads.

    Raises:
        ConfigurationError: the name is empty or not in the prompt, or the prompt is too long.
    """
    ids = tokenise(tokenizer, prompt, length).tolist()
    wanted = _words(tokenizer, name)
    first = 1 + len(_words(tokenizer, prompt[:start]))
    mask = torch.zeros(length, dtype=torch.bool)
    for place in range(first, length - len(wanted) + 1):
        if wanted and ids[place : place + len(wanted)] == wanted:
            mask[place : place + len(wanted)] = True
            return mask
    if wanted and (held := _holding(tokenizer, prompt, name, start)):
        mask[held] = True
        return mask
    message = f"class name {name!r} is not in the prompt {prompt[start:]!r}; name it there"
    raise ConfigurationError(message)


def _holding(tokenizer: CLIPTokenizer, prompt: str, name: str, start: int) -> list[int]:
    """Places of the tokens that hold a name's characters, and perhaps punctuation beside it.

    CLIP makes one word of punctuation in a row: behind "wall (brick" a template's full stop is of
    the same token as the bracket, which the name by itself has not.
    """
    found = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)").search(prompt, start)
    if found is None or not tokenizer.is_fast:
        return []
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    begin, end = found.span()
    return [place for place, (left, right) in enumerate(spans) if left < end and right > begin]


def _words(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
