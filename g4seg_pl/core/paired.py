"""Scores of candidate masks under common noise, and how sure their differences are."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor


class Paired(ABC):
    """Scores of every candidate, mask and pass, in which candidates share each pass's noise."""

    @abstractmethod
    def paired(self, reference: int) -> Float[Tensor, "k m n"]:
        """Return every candidate's score less the reference's, pass by pass; lower is better."""

    def difference(self, reference: int = 0) -> Float[Tensor, "k m"]:
        """Return the mean of ``paired`` over passes; negative explains the image better."""
        return self.paired(reference).mean(-1)

    def standard_error(self, reference: int = 0) -> Float[Tensor, "k m"]:
        """Return the standard error of ``difference``; not a number with a single pass."""
        paired = self.paired(reference)
        count = int(paired.shape[-1])
        if count == 1:
            return torch.full_like(paired[..., 0], torch.nan)
        return paired.std(-1) / math.sqrt(count)
