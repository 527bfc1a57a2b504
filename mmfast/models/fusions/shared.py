"""Pictures as tokens of the language model's own vocabulary. Letters: B batch, T tokens, M images, N tokens an image, D width."""

from torch import Tensor, nn

from mmfast.models.fusions.prefix import run_decoder, slots


class SharedTokensFusion(nn.Module):
    """The i-th placeholder of the batch, read row by row, becomes the i-th token of its pictures; from there on they are tokens like any
    other, with the language model's own embeddings (Chameleon, arXiv:2405.09818, section 2.1)."""

    def tokens(self, input_ids: Tensor, image_ids: Tensor | None, image_token: int) -> Tensor:
        """input_ids [B, T], image_ids [M, N] or None -> ids [B, T] without placeholders."""
        if image_ids is None:
            return input_ids
        return input_ids.masked_scatter(slots(input_ids, image_ids, image_token), image_ids.to(input_ids.dtype))

    def forward(
        self, language: nn.Module, input_ids: Tensor, image_embeds: Tensor | None, image_token: int, **kwargs
    ) -> tuple[Tensor, object]:
        """As for ``PrefixFusion``, with image_embeds the pictures' token ids [M, N]."""
        ids = self.tokens(input_ids, image_embeds, image_token)
        return run_decoder(language, language.get_input_embeddings()(ids), **kwargs)

    def carry(self, input_ids: Tensor, image_embeds: Tensor | None, image_token: int) -> None:
        """What steps after this one need of the images: nothing, they are in the key/value cache."""
