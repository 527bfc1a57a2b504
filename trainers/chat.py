"""Talking to a trained model: one question, or a conversation in a terminal, with the words appearing as they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from mmfast.data import images as pictures
from mmfast.data.chat import TEMPLATES, last_token
from mmfast.models.generate import text_pieces
from mmfast.spec import BUILT_IN, System, nearest

from .checkpoint import RunError

COMMANDS = {"/image": "/image FILE  show a picture with the next question", "/reset": "/reset  begin anew", "/quit": "/quit  leave"}


def joint(system: System) -> str:
    """What stands between a picture and its question: a space in the built-in data sets, a line end in LLaVA's records."""
    last = system.stages[-1].data if system.stages else None
    return " " if last is not None and getattr(last, "path", None) is None and last.name in BUILT_IN else "\n"


def question(system: System, prompt: str, count: int) -> str:
    """A prompt with a place for each of its pictures: where it says ``<image>`` itself, else in front."""
    places = prompt.count("<image>")
    if places not in (0, count):
        raise RunError(f"the prompt has {places} <image> places for {count} pictures")
    return prompt if places or not count else "<image>" * count + joint(system) + prompt


def chat(
    session,
    images: Sequence[str | Path],
    prompt: str,
    *,
    template: str,
    history: Sequence[tuple[str, str]] = (),
    earlier: Sequence[str | Path] = (),
    max_new_tokens: int = 256,
    beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat: int = 0,
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], object] | None = None,
) -> str:
    """The model's answer to a prompt about some pictures: text, up to where it would begin a picture of its own.

    Args:
        images: files shown with this prompt.
        history: turns before it, questions as ``question`` made them; ``earlier``: the files these showed, in order.
        beams, length_penalty, no_repeat, repetition_penalty, temperature, top_p: as for ``mmfast.models.generate``; with beams none is drawn.
        stream: called with each piece of text as soon as it is final; of beams all comes at the end.

    Raises:
        RunError, ValueError: an unreadable picture, or a prompt longer than the model's context.
    """
    system, model, tokenizer = session.system, session.model, session.tokenizer
    if prompt.replace("<image>", "").strip() and not TEMPLATES[template].keep_question:
        raise RunError(
            f"template {template} shows pictures without words, so {prompt!r} would not be read; show them alone, with --prompt ''"
        )
    asked = question(system, prompt, len(images))
    ids, _ = session.encoder(template, 1 << 30)([*history, (asked, None)])  # nothing is cut: what does not fit is told
    context = model.system.language.context
    if len(ids) >= context:
        raise RunError(f"the conversation takes {len(ids)} places of the model's {context}, so no answer fits; ask less or begin anew")
    device = next(model.parameters()).device
    shown = [pictures.load(path, pictures.asked(system.image)) for path in (*earlier, *images)]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    prompt = torch.tensor([ids], device=device)
    seen = {"pixel_values": session.pixels(torch.from_numpy(np.stack(shown)).to(device)), **session.beside(prompt)} if shown else {}
    options = dict(
        end=last_token(tokenizer, template), stops=model.stops, max_new_tokens=min(max_new_tokens, context - len(ids)), no_repeat=no_repeat,
        repetition_penalty=repetition_penalty, **seen,
    )  # fmt: skip
    if beams > 1:
        tokens = model.generate(prompt, beams=beams, length_penalty=length_penalty, **options).unbind(1)
    else:
        tokens = model.steps(prompt, temperature=temperature, top_p=top_p, generator=generator, **options)
    said = []
    try:
        for (piece,) in text_pieces(tokenizer, tokens, TEMPLATES[template].stop):
            if piece:
                said.append(piece)
                if stream is not None:
                    stream(piece)
    finally:
        model.train(was_training)
    return "".join(said)


def converse(
    session,
    lines: Iterable[str],
    write: Callable[[str], object],
    *,
    template: str,
    images: Sequence[str | Path] = (),
    **options,
) -> list[tuple[str, str]]:
    """A conversation: a line is a question or a command; answers go to ``write`` piece by piece. Returns its turns.

    What cannot be done is one sentence, and the conversation goes on as if it had not been asked. Ctrl-C ends an answer.
    """
    turns: list[tuple[str, str]] = []
    earlier, waiting = [], [*images]
    for line in lines:
        line = line.strip()
        word, _, rest = line.partition(" ")
        try:
            if not line and (TEMPLATES[template].keep_question or not waiting):  # else pictures are shown alone
                continue
            if word == "/quit":
                break
            if word == "/reset":
                turns, earlier, waiting = [], [], []
                write("the conversation begins anew\n")
            elif word == "/image":
                if not rest:
                    raise RunError("/image needs a file")
                pictures.load(rest.strip(), pictures.asked(session.system.image))  # told now, not with the question
                waiting.append(rest.strip())
                write(f"{len(waiting)} picture{'s' * (len(waiting) > 1)} for the next question\n")
            elif word.startswith("/") and word[1:].isalpha():
                raise RunError(f"unknown command {word}{nearest(word, COMMANDS)}; there are: {'; '.join(COMMANDS.values())}")
            else:
                said: list[str] = []

                def tell(piece: str) -> None:
                    said.append(piece)
                    write(piece)

                asked = question(session.system, line, len(waiting))
                try:
                    chat(session, waiting, line, template=template, history=turns, earlier=earlier, stream=tell, **options)
                except KeyboardInterrupt:
                    if not said:
                        raise RunError("interrupted before the first word") from None
                write("\n")
                turns.append((asked, "".join(said)))
                earlier, waiting = [*earlier, *waiting], []
        except (RunError, ValueError) as error:
            write(f"{error}\n")
    return turns


def read_lines(prompt: str = "> ") -> Iterable[str]:
    """What is typed, until the input ends or Ctrl-C."""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
