"""A trained model in the stock Hugging Face layout: what ``AutoProcessor`` and the model's class load, and a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmfast.data import chat
from mmfast.data.images import asked
from mmfast.models.published import class_of, idefics, llava, save_pretrained
from mmfast.spec import Alignment, System, to_dict

from .chat import joint
from .checkpoint import RunError

# Most templates' conversations are tokenised piece by piece (mmfast.data.chat), a chat template makes one text. This character, of Unicode's private use area,
# marks the borders in that text; the exported tokenizer splits at it and drops it, so that the ids are the same.
BORDER = "\ue000"


def export(
    session, recipe: System | Alignment, out: str | Path, *, metrics: Mapping[str, Any] | None = None, push_to: str | None = None
) -> Path:
    """Writes a folder that the stock classes load with the same logits, tokens and pixels; adapters are folded in.

    It appears whole or not at all. ``push_to`` is a hub name (``owner/name``) to upload it to afterwards.

    Raises:
        RunError, ValueError: ``out`` is taken, or the stock class has no form for a choice of the system.
    """
    out, model, system = Path(out), session.model, session.model.system
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not empty; choose another --out")
    kind = class_of(system)
    if kind not in PROCESSORS:
        raise RunError(
            f"{system.name}: only the weights of a {kind.STOCK.__name__} are written (model.save_pretrained); with their processor those of "
            f"{', '.join(known.STOCK.__name__ for known in PROCESSORS)}"
        )
    template = recipe.template if isinstance(recipe, Alignment) else recipe.stages[-1].template
    processor = PROCESSORS[kind](session, template)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_pretrained(model, partial)
        processor.save_pretrained(partial)
        _finish_configs(session, template, partial)
        (partial / "README.md").write_text(model_card(session, recipe, metrics or {}, push_to or out.name))
        os.replace(partial, out)
    except OSError as error:
        raise RunError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if push_to is not None:
        push(out, push_to)
    return out


def push(folder: Path, name: str) -> None:
    """Uploads an exported folder to the hub, into a new or existing repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="mmfast export")
    except Exception as error:  # the network, the hub and its client each have their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{folder} is complete, but could not be uploaded to {name}: {first}") from error


def _finish_configs(session, template: str, folder: Path) -> None:
    from transformers import GenerationConfig

    t = session.tokenizer
    GenerationConfig(
        bos_token_id=t.bos_token_id, eos_token_id=chat.last_token(t, template), pad_token_id=t.pad_token_id, do_sample=False
    ).save_pretrained(folder)
    # Where parts are held in unlike precisions the config says fp32, in which nothing is lost.
    kinds = {p.dtype for p in session.model.parameters()}
    if len(kinds) > 1:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- the processor


def llava_processor(session, template: str):
    """A stock processor that makes of messages and pictures what the trainers made of them."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    system, skip = session.model.system, session.model.encoder.skip
    side, patches = system.image.size, (system.encoder.size // system.encoder.patch) ** 2
    fit = asked(system.image).fit
    if fit not in ("crop", "squash"):
        raise RunError(f"{system.name}: no stock processor pads pictures to a square; image.fit {fit} cannot be exported")
    square, crop = {"height": side, "width": side}, fit == "crop"
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side} if crop else square,
        do_center_crop=crop,
        crop_size=square,
        image_mean=list(system.image.mean),
        image_std=list(system.image.std),
    )
    processor = LlavaProcessor(
        pictures,
        stock_tokenizer(session.tokenizer),
        patch_size=system.encoder.patch,
        vision_feature_select_strategy="default" if skip else "full",
        num_additional_image_tokens=system.encoder.tokens - patches + skip,
        chat_template=chat_template(template, joint(system), begin=chat.TEMPLATES[template].begins(session.tokenizer)),
    )
    check_same_ids(session, processor, template)
    return processor


def idefics_processor(session, template: str):
    """A stock processor that makes of a prompt, texts and pictures in a list, what the trainers made of it. It has no chat template: the words of
    ``template`` are the prompt's own."""
    from transformers import IdeficsProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    system = session.model.system
    if (fit := asked(system.image).fit) != "squash":
        raise RunError(f"{system.name}: Idefics' processor resizes both sides of a picture; image.fit {fit} cannot be exported")
    if system.borders != (idefics.AROUND,) * 2:
        raise RunError(
            f"{system.name}: Idefics' processor puts {idefics.AROUND} around pictures; without it in fusion.around there is no export"
        )
    pictures = IdeficsImageProcessorPil(image_size=system.image.size, image_mean=list(system.image.mean), image_std=list(system.image.std))
    processor = IdeficsProcessor(pictures, stock_tokenizer(session.tokenizer), add_end_of_utterance_token=False)
    encode = session.encoder(template, 1 << 30)
    for question in (f"<image>{joint(system)}What is this?", "What  is\n<image> this, <image>?", "Hello"):
        _refuse_others(encode([(question, None)])[0], processor(text=[prompt_of(template, question)])["input_ids"][0].tolist(), question)
    return processor


def prompt_of(template: str, question: str, picture: Any = None) -> list[Any]:
    """A question with the template's words as Idefics' processor takes it; a black picture, or this one, at each ``<image>``."""
    form = chat.TEMPLATES[template]
    said, words = question.replace("<image>", form.picture), form.words("")
    asked = form.before + words + said if form.system_asked else words + form.mark + form.before + said
    texts = (asked + form.between + form.role).split("<image>")
    shown = picture or Image.new("RGB", (8, 8))
    return [item for i, text in enumerate(texts) for item in ((shown,) if i else ()) + ((text.strip(" "),) if text.strip(" ") else ())]


# Who reads what is exported, by class.
PROCESSORS = {llava: llava_processor, idefics: idefics_processor}


def stock_tokenizer(tokenizer):
    """The same tokenizer, splitting at ``BORDER`` and adding nothing of its own: the chat template says where a text begins."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise RunError(f"a {type(tokenizer).__name__} has no tokenizer.json, which the exported folder needs")
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"String": BORDER}, "behavior": "Removed", "invert": False}
    before = inner.get("pre_tokenizer")
    for part in _parts(before, "pretokenizers"):
        if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "always"  # every piece is the first of its own text
    inner["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *_parts(before, "pretokenizers")]}
    normal = _parts(inner.get("normalizer"), "normalizers")
    for part in [p for p in normal if p["type"] == "Prepend"]:  # it marks the beginning of a text; a border begins one
        normal.append({"type": "Replace", "pattern": {"String": BORDER}, "content": BORDER + part["prepend"]})
        inner["normalizer"] = {"type": "Sequence", "normalizers": normal}
    inner["post_processor"] = inner["truncation"] = inner["padding"] = None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = {name: str(value) for name in names if (value := getattr(tokenizer, name, None)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)), additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
        padding_side="left", **named,
    )  # fmt: skip


def _parts(step: dict | None, key: str) -> list[dict]:
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def chat_template(name: str, join: str, *, begin: bool = True) -> str:
    """A template of ``mmfast.data.chat`` in Jinja. A message's content is text, with ``<image>`` where pictures are, or parts. ``begin``: whether the
    beginning token comes first, for the tokenizers that have one."""
    form = chat.TEMPLATES[name]

    def q(text: str) -> str:
        return json.dumps(text)  # Jinja reads the same escapes

    end_each, keep, tight, whole = ("true" if flag else "false" for flag in (form.end_each, form.keep_question, form.tight, form.whole))
    words, between = form.words(""), form.between + form.role
    opening = between.rstrip(" ") if form.whole else between
    first, before = ("", form.before + words) if form.system_asked else (words, form.before)
    return (
        "{%- macro border(piece, text) -%}{{ " + q(BORDER) + " if not " + whole + " and piece and text and not piece.startswith('<image>') else '' }}{%- endmacro -%}"
        "{%- macro asked(text) -%}{%- for part in text.split('<image>') -%}"
        "{%- set part = part if loop.first or not " + tight + " else part.lstrip(' ') -%}{{- '' if loop.first else '<image>' -}}"
        "{{- part if loop.last or not " + tight + " else part.rstrip(' ') -}}{%- endfor -%}{%- endmacro -%}"
        + ("{{- bos_token or '' -}}" if begin else "") + "{{- " + q(first) + " -}}"
        # `open`: a question whose end still lacks what stands between it and the answer. `text`: the text so far ends in words.
        "{%- set ns = namespace(text=" + ("true" if first else "false") + ", open=none, said='') -%}"
        "{%- for message in messages -%}"
        "{%- set ns.said = '' -%}"
        "{%- if message.content is string -%}{%- set ns.said = message.content -%}"
        "{%- else -%}{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{%- set ns.said = ns.said + '<image>' -%}"
        "{%- if not loop.last and message.content[loop.index].type == 'text' -%}{%- set ns.said = ns.said + " + q(join) + " -%}{%- endif -%}"
        "{%- else -%}{%- set ns.said = ns.said + part.text -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- if message.role == 'user' and ns.open is none -%}"
        "{%- if not " + keep + " -%}{%- set ns.said = '<image>' * (ns.said.split('<image>')|length - 1) -%}{%- endif -%}"
        + ("{{- '' if loop.first else bos_token or '' -}}" if form.begin_each else "")
        + "{%- set ns.open = " + q(form.mark) + " + (" + q(before) + " if loop.first else " + q(form.before) + ") + ns.said.replace('<image>', " + q(form.picture) + ") -%}"
        "{%- if loop.last -%}{%- set piece = asked(ns.open + (" + q(opening) + " if add_generation_prompt else '')) -%}"
        "{{- border(piece, ns.text) -}}{{- piece -}}{%- endif -%}"
        "{%- elif message.role == 'assistant' and ns.open is not none -%}"
        "{%- set piece = asked(ns.open + " + q(between) + ") -%}{{- border(piece, ns.text) -}}{{- piece -}}"
        "{%- set ns.text = piece and not piece.endswith('<image>') or not piece and ns.text -%}"
        "{%- set piece = ns.said" + (".strip()" if form.chunk else "") + " + " + q(form.after) + " + (" + q(form.mark) + " if loop.last else '') -%}{{- border(piece, ns.text) -}}{{- piece -}}"
        "{%- set ns.text = piece and true or ns.text -%}{%- set ns.open = none -%}"
        "{%- if " + end_each + " or loop.last and " + ("false" if form.after else "true") + " -%}{{- eos_token -}}{%- set ns.text = false -%}{%- endif -%}"
        "{%- else -%}{{- raise_exception('messages must alternate user, assistant; the system text is the template\\'s own') -}}{%- endif -%}"
        "{%- endfor -%}"
    )  # fmt: skip


PROBES = (
    [("<image>{j}What is this?", None)],
    [("What  is\n<image> this, <image>?", "A naïve café — 東京, no. 3."), (" And then? ", " Yes")],
    [("<image>", "yes"), ("What colour is the\tcircle?", "It's red.\n"), ("Really", None)],
    [("Hello", "Hi")],
)


def messages_of(turns) -> list[dict[str, str]]:
    """Turns as the messages that a stock processor takes."""
    both = [(("user", question), ("assistant", answer)) for question, answer in turns]
    return [{"role": role, "content": text} for pair in both for role, text in pair if text is not None]


def check_same_ids(session, processor, template: str) -> None:
    """Refuses to export a tokenizer whose stock form reads a conversation otherwise than training did."""
    encode, once = session.encoder(template, 1 << 30), session.model.system.encoder.tokens
    for probe in PROBES:
        turns = [(question.replace("{j}", joint(session.model.system)), answer) for question, answer in probe]
        text = processor.apply_chat_template(messages_of(turns), tokenize=False, add_generation_prompt=turns[-1][1] is None)
        stock = processor.tokenizer(text.replace("<image>", "<image>" * once), add_special_tokens=False)["input_ids"]
        ours, _ = encode(turns)
        _refuse_others(ours, stock, turns[0][0])


def _refuse_others(ours: list[int], stock: list[int], question: str) -> None:
    if ours != stock:
        at = next((i for i, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b), min(len(ours), len(stock)))
        raise RunError(
            f"the tokenizer cannot be exported: the stock processor would read {question!r} otherwise than training did, from token {at} on"
        )


# ------------------------------------------------------------------------------------------------------------------ the card


def model_card(session, recipe: System | Alignment, metrics: Mapping[str, Any], name: str) -> str:
    """README.md: what it is, how to load it, how it was made, what was measured, and whose weights it started from."""
    system = session.model.system
    bases = [w for w in (system.weights, system.encoder.weights, system.language.weights) if w]
    trained, kind = session.model.trained, class_of(system)
    told = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["mmfast", kind.__name__.rpartition(".")[2]]}
    imports = ["from PIL import Image"] if kind is idefics else []
    template = recipe.template if isinstance(recipe, Alignment) else recipe.stages[-1].template
    stop = chat.TEMPLATES[template].stop  # an answer's end that is a text and no token
    ends = f", stop_strings=[{json.dumps(stop)}], tokenizer=processor.tokenizer" if stop else ""
    if kind is idefics:
        prompt = prompt_of(template, f"<image>{joint(system)}What is this?", "picture")
        words = ", ".join(item if item == "picture" else json.dumps(item) for item in prompt)
        asked = ['picture = Image.open("picture.png")', f"batch = processor(text=[[{words}]])"]
    else:
        asked = [
            'messages = [{"role": "user", "content": [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is this?"}]}]',
            'batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")',
        ]
    licences = {base: licence(base) for base in bases}
    hub = [base for base in bases if not _local(base)]
    if hub:
        told["base_model"] = hub
    if len(set(licences.values())) == 1 and None not in licences.values():
        told["license"] = next(iter(licences.values()))
    lines = [
        "---", yaml.safe_dump(told, sort_keys=False).strip(), "---", "", f"# {name.rpartition('/')[2]}", "",
        f"Trained with mmfast {_version()}, recipe `{recipe.name}`" + (f" ({recipe.paper})." if recipe.paper else "."),
        "", "```python", *imports, f"from transformers import AutoProcessor, {kind.STOCK.__name__}", "",
        f'model = {kind.STOCK.__name__}.from_pretrained("{name}")', f'processor = AutoProcessor.from_pretrained("{name}")', *asked,
        f"said = model.generate(**batch, max_new_tokens=64{ends})", 'print(processor.decode(said[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```", "",
    ]  # fmt: skip
    if metrics:
        lines += ["## Measured", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |" for key, value in metrics.items()]
        lines.append("")
    if bases:
        lines += ["## Weights it started from", ""]
        lines += [f"- {_shown(base)}: licence {licences[base] or 'not stated beside the weights; see their source'}" for base in bases]
        lines.append("")
    lines += ["## What was trained", "", f"{len(trained)} tensors" + (":" if trained else " at the time of export."), ""]
    lines += [f"- `{name}`" for name in summarise(trained)]
    lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump(_without_paths(to_dict(recipe)), sort_keys=False).strip(), "```", ""]
    return "\n".join(lines)


def summarise(names: list[str]) -> list[str]:
    """Names with their layer numbers as a star, each form once."""
    return list(dict.fromkeys(".".join("*" if word.isdigit() else word for word in name.split(".")) for name in names))


def licence(weights: str) -> str | None:
    """What the README beside some weights says in its front matter."""
    folder = Path(weights).expanduser()
    path = (folder.parent if weights.endswith(".gguf") else folder) / "README.md"
    try:
        _, front, _ = path.read_text().split("---", 2)
        return yaml.safe_load(front).get("license")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None


def _local(weights: str) -> bool:
    return weights.startswith(("package:", "/", ".", "~")) or Path(weights).exists()


def _shown(weights: str) -> str:
    """A hub name as it is, a path without the folders of the machine it lay on."""
    return Path(weights).name if _local(weights) and not weights.startswith("package:") else weights


def _without_paths(tree: Any) -> Any:
    if isinstance(tree, dict):
        private = ("weights", "path", "images")
        return {k: _shown(v) if k in private and isinstance(v, str) else _without_paths(v) for k, v in tree.items()}
    return [_without_paths(v) for v in tree] if isinstance(tree, list | tuple) else tree


def _version() -> str:
    try:
        return metadata.version("mmfast")
    except metadata.PackageNotFoundError:
        return "(from a checkout)"
