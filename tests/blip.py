"""Tiny random checkpoints of transformers' BLIP-2 family."""

import torch

WORDS, IMAGE = 37, 59  # of the Q-Former; the place of a picture among the language model's 60


def sizes(*, pad, size=28, tower=24, language="opt", **q):
    """The three parts' configurations; ``q`` is the Q-Former's own."""
    vision = dict(
        hidden_size=tower, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=size, patch_size=14,
        initializer_range=0.2,
    )  # fmt: skip
    q = dict(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=tower,
        cross_attention_frequency=2, initializer_range=0.2, **q,
    )  # fmt: skip
    words = dict(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=pad, bos_token_id=2, eos_token_id=2
    )
    if language == "opt":
        words |= dict(model_type="opt", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3)
    elif language in ("t5", "flan"):  # T5's first release scales what its head reads, FlanT5 has gates
        words |= dict(model_type="t5", num_decoder_layers=2, d_kv=8, d_ff=32, decoder_start_token_id=pad)
        words |= dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu") if language == "flan" else {}
    else:
        words |= dict(model_type="llama", intermediate_size=32, num_key_value_heads=1, initializer_range=0.3)
    return dict(vision_config=vision, qformer_config=q, text_config=words, initializer_range=0.2)


def drawn(kind, config, seed=0):
    """Queries are created as zeros, norms as ones and biases as zeros: all are drawn anew, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    if config.text_config.model_type == "t5" and not config.text_config.scale_decoder_outputs:
        head = model.language_model.lm_head  # transformers ties it to the embeddings, until it reads one that has its own
        head.weight = torch.nn.Parameter(0.3 * torch.randn_like(head.weight))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "query_tokens" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def saved(model, path):
    model.save_pretrained(path)
    return path


def shapes(case):
    return {name: case[name] for name in ("size", "queries") if name in case}
