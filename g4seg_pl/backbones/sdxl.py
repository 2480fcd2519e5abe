"""SDXL as a Generator: two text encoders, a pooled text vector and the picture's size."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from g4seg_pl.backbones.kinds import Kind
from g4seg_pl.backbones.loading import Components, ComponentsXL
from g4seg_pl.backbones.stable_diffusion import Conditions, Residuals, StableDiffusion
from g4seg_pl.backbones.text import mark_tokens, tokenise
from g4seg_pl.core.injection import Injection
from g4seg_pl.types import ConfigurationError


class StableDiffusionXL(StableDiffusion):
    """The parts of one SDXL base model, frozen, as submodules.

    SDXL's U-Net is told a pooled vector of the prompt beside its tokens. ``embed`` packs that
    vector, padded with zeros, into one more row behind the tokens, and ``denoise`` takes it apart
    again. So an embedding stays one tensor that says everything about its prompt: whoever caches,
    stacks, moves or cuts it by prompt need not know of pooling. (Vectors kept here by prompt
    would not be found again: ``denoise`` is given tensors, not prompts.) The row's place in a
    token mask is always unmarked.

    The size that the U-Net is told is that of the latents in pixels, uncropped, as diffusers'
    pipeline does by default.
    """

    _kind: Kind = "sdxl"

    def __init__(self, components: Components, embedded_guidance: float = 0.0) -> None:
        """Take loaded parts; they are frozen, set to evaluation and laid out channels last.

        Args:
            components: as ``load_components`` returns them for SDXL.
            embedded_guidance: w of an LCM; 0 is no guidance.

        Raises:
            ConfigurationError: these are not SDXL's parts, the pooled vector is wider than a
                token, or the model is not made for square latents.
        """
        if not isinstance(components, ComponentsXL):
            message = "these are parts of Stable Diffusion 1.x or 2.x; use StableDiffusion"
            raise ConfigurationError(message)
        super().__init__(components, embedded_guidance)
        self.text_encoder_2 = components.text_encoder_2
        self.tokenizer_2 = components.tokenizer_2
        self.zero_empty_prompt = components.zero_empty_prompt
        self._pooled_size = int(components.text_encoder_2.config.projection_dim)
        width = int(components.unet.config.cross_attention_dim)
        if self._pooled_size > width:
            message = (
                f"text_encoder_2/config.json: projection_dim {self._pooled_size} is above the "
                f"unet's cross_attention_dim {width}; give a base model of SDXL"
            )
            raise ConfigurationError(message)
        self.eval().requires_grad_(requires_grad=False)

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Return both encoders' last hidden states but one, side by side, and the pooled row.

        Where the model was trained so, the empty prompt is all zeros.

        Returns:
            one row of tokens more than the encoders read.

        Raises:
            ConfigurationError: a prompt has more tokens than the model reads.
        """
        first = self.text_encoder(self._ids(self.tokenizer, prompts), output_hidden_states=True)
        second = self.text_encoder_2(
            self._ids(self.tokenizer_2, prompts), output_hidden_states=True
        )
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = functional.pad(second.text_embeds, (0, tokens.shape[-1] - self._pooled_size))
        packed = torch.cat([tokens, pooled[:, None]], dim=1)
        said = torch.tensor([bool(prompt) or not self.zero_empty_prompt for prompt in prompts])
        return packed * said.to(packed)[:, None, None]

    def token_mask(self, prompt: str, name: str, start: int = 0) -> Bool[Tensor, " l"]:
        """Mark where either tokenizer puts the first ``name`` at or after character ``start``.

        A key of cross-attention is computed from both encoders' vectors of one position, so a
        position belongs to the name if either's does; SDXL's own tokenizers agree.

        Args:
            prompt: as given to ``embed``.
            name: a class name; it may span several tokens.
            start: where to begin; at a word's beginning.

        Raises:
            ConfigurationError: the name is empty or not in the prompt.
        """
        first, second = (
            mark_tokens(tokenizer, prompt, name, start, self._length)
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        return functional.pad(first | second, (0, 1))

    def denoise(
        self,
        noisy: Float[Tensor, "b c h w"],
        timestep: int,
        embeddings: Float[Tensor, "b l d"],
        injection: Injection | None = None,
        *,
        checkpointing: bool = False,
        residuals: Residuals | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the raw output of one U-Net pass, in the dtype of ``noisy``.

        Args:
            noisy: z_t, of any height and width.
            timestep: t.
            embeddings: one prompt a row, as ``embed`` returns them.
            injection: masks and tokens of the same rows.
            checkpointing: see ``StableDiffusion.denoise``.
            residuals: of a ControlNet.
        """
        if injection is not None:
            injection = replace(injection, tokens=injection.tokens[..., :-1])
        return super().denoise(
            noisy,
            timestep,
            embeddings,
            injection,
            checkpointing=checkpointing,
            residuals=residuals,
        )

    def conditions(
        self, noisy: Float[Tensor, "b c h w"], embeddings: Float[Tensor, "b l d"]
    ) -> Conditions:
        """Return tokens, pooled vector and size of each row.

        Args:
            noisy: z_t.
            embeddings: as ``embed`` returns them.
        """
        packed = embeddings.to(self._number_format)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = factor * noisy.shape[2], factor * noisy.shape[3]
        # Float32 whatever the weights: bfloat16 has no 1028.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        added = {
            "text_embeds": packed[:, -1, : self._pooled_size],
            "time_ids": sizes.to(noisy.device).expand(len(noisy), -1),
        }
        return Conditions(packed[:, :-1], added)

    def _ids(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
        ids = torch.stack([tokenise(tokenizer, prompt, self._length) for prompt in prompts])
        return ids.to(self.alphas_cumprod.device)
