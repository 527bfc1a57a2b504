"""The stage that trains an image tokenizer: pictures through codes and back, with a critic where the stage asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmfast.data.supervised import Shapes
from mmfast.losses import adaptive_weight, code_counts, code_perplexity, code_usage, critic_loss, generator_loss, reconstruction
from mmfast.nn import VQGAN, PatchCritic
from mmfast.spec import Stage

from .checkpoint import RunError
from .loop import Objective

if TYPE_CHECKING:
    from .loop import Options
    from .session import Session

PROBED = 32  # pictures that are measured now and then, so few that it costs little beside the training


class _Critic(nn.Module):
    """The critic and how many micro-batches it has seen, which is saved with it."""

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.net = PatchCritic(channels, layers)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def judge(self, pixels: Tensor) -> Tensor:
        """A judgement whose gradient reaches the pixels and not the critic."""
        held = {name: p.detach() for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, held, (pixels,))


def tokenizer_of(session: Session) -> VQGAN:
    vq = getattr(session.model.encoder, "vision", None)
    if not isinstance(vq, VQGAN):
        raise RunError(
            f"{session.system.name}: objective tokenizer trains an encoder of kind Vqgan, and this one is a {type(session.system.encoder).__name__}"
        )
    return vq


def tokenizer_stage(session: Session, stage: Stage, options: Options) -> Objective:
    """``L = reconstruction + codebook + adversarial lambda generator``, and the critic's own loss beside it (VQGAN, arXiv:2012.09841).

    One optimiser moves both players by the gradients of the same weights, where VQGAN's code lets the critic answer to the tokenizer's new ones:
    what is drawn reaches the critic without its graph, and the critic reaches the tokenizer's loss without its weights. The critic's
    BatchNorm takes a micro-batch's statistics and a moving-average codebook moves with every micro-batch; these two (and nothing else) see
    how a step was cut.
    """
    vq, terms, accumulate = tokenizer_of(session), stage.drawing, stage.optim.accumulate
    if tuple(stage.train) != ("encoder",):
        raise RunError(f"{stage.name}: objective tokenizer trains the encoder alone; say train=('encoder',)")
    if (session.system.image.mean, session.system.image.std) != ((0.5,) * 3,) * 2:
        raise RunError(f"{session.system.name}: a tokenizer's pixels are -1 .. 1; set image.mean and image.std to 0.5 each")
    if options.compute.checkpointing:
        raise RunError(f"{stage.name}: the tokenizer does not recompute activations; leave compute.checkpointing off and lower optim.batch")
    if terms.adversarial and options.place.sharded:
        raise RunError(f"{stage.name}: the adaptive weight needs whole weights; train with a critic under --compute.parallel ddp")
    if terms.perceptual and session.perceptual is None and options.place.main and not options.quiet:
        print(
            f"{stage.name}: drawing.perceptual is {terms.perceptual:g} and there is no module for it (Session.perceptual); it trains without"
        )
    torch.manual_seed(session.seed)
    critic = _Critic(terms.critic_channels, terms.critic_layers).to(session.place.device) if terms.adversarial else None
    if session.perceptual is not None:
        session.perceptual.to(session.place.device).requires_grad_(False).eval()

    def step(batch: dict[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        pixels = session.pixels(batch["pictures"])
        share = (len(pixels) / totals[0]).float()  # means over the step's pictures
        drawn, ids, codebook = vq(pixels)
        rec = reconstruction(drawn, pixels, error=terms.error, perceptual=session.perceptual, perceptual_weight=terms.perceptual).mean()
        loss = rec + terms.codebook * codebook
        measures = {"loss/reconstruction": rec.detach(), "loss/codebook": codebook.detach()}
        if critic is not None:
            on = critic.seen >= terms.critic_after * accumulate
            critic.seen += 1
            gan, weight = generator_loss(critic.judge(drawn)), rec.new_zeros(())
            if on:
                weight = adaptive_weight(rec, gan, vq.decoder.conv_out.weight, scale=terms.adversarial)
            judged = critic_loss(critic.net(pixels), critic.net(drawn.detach()))
            loss = loss + weight * gan + on * judged  # times 0 until then, so that all ranks have all gradients
            measures |= {"loss/generator": gan.detach(), "loss/critic": judged.detach(), "critic_weight": weight}
        return loss * share, {**{k: v * share for k, v in measures.items()}, "tokens": ids.numel()}

    return Objective(step, session.model, **({"critic": critic} if critic is not None else {}))


def make_probe(session: Session, pictures) -> Callable[[int], dict[str, float]]:
    """``probe(step)``: what the tokenizer makes of held-out scenes of the shapes world, or of the first pictures of other data."""
    shown = _held_out(session, pictures.source, PROBED)
    return lambda step: measure(session, shown)


def _held_out(session: Session, source, count: int) -> Tensor:
    if isinstance(source, Shapes):
        return torch.from_numpy(session.world.render(session.world.scenes("eval", count)))
    return source.load_pictures(torch.arange(min(count, source.picture_count)))


def measure_all(session: Session, stage: Stage, count: int) -> dict[str, float]:
    """What is measured of a trained tokenizer, beside the mean picture of what it was trained on."""
    source = session.source(stage.data, stage.template, stage.max_length)
    parts = torch.arange(source.picture_count).split(250)
    mean = sum(source.load_pictures(ids).float().sum(0) for ids in parts) / source.picture_count
    return measure(session, _held_out(session, source, count), mean=mean)


@torch.no_grad()
def measure(session: Session, pictures: Tensor, *, mean: Tensor | None = None, batch: int = 64) -> dict[str, float]:
    """Errors of the reconstruction of uint8 ``pictures [M, H, W, 3]`` (values -1 .. 1) and how the codebook is used on them.

    Args:
        mean: ``[H, W, 3]`` of 0 .. 255, the mean picture of the training data: also measure it as an answer to every picture.
    """
    vq, place = tokenizer_of(session), session.place
    session.model.eval()
    counts, sums = torch.zeros(vq.codes, dtype=torch.long, device=place.device), dict.fromkeys(("l1", "l2", "mean_l1", "mean_l2"), 0.0)
    constant = None if mean is None else session.pixels(mean[None]).to(place.device)
    for part in pictures.split(batch):
        pixels = session.pixels(part)
        ids = vq.tokenise(pixels)
        counts += code_counts(ids, vq.codes)
        answers = {"": vq.draw(ids, grid=(pixels.shape[2] // vq.patch, pixels.shape[3] // vq.patch))}
        if constant is not None:
            answers["mean_"] = constant.expand_as(pixels)
        for name, drawn in answers.items():
            for error in ("l1", "l2"):
                sums[name + error] += reconstruction(drawn, pixels, error=error).sum().item()
    kept = [k for k in sums if constant is not None or not k.startswith("mean_")]
    measured = {f"reconstruction/{k}": sums[k] / max(len(pictures), 1) for k in kept}
    return measured | {"codebook/usage": code_usage(counts).item(), "codebook/perplexity": code_perplexity(counts).item()}
