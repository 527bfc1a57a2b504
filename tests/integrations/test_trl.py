"""mmfast.integrations.trl on live DPO trainers: the same losses, metrics and parameters as TRL alone; and back."""

import copy
import types

import pytest
import torch
import transformers as tf
from integrations import tiny
from PIL import Image

from mmfast.integrations import trl as integration
from mmfast.models.tokenizer import word_tokenizer

trl = pytest.importorskip("trl", reason="needs trl and datasets")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS = "<pad> <bos> <eos> <unk> <image> what is this a red blue cube ball no yes two three small big".split()
LLAMA = {**tiny.LLAMA, "vocab_size": 37}
LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm".split()
)
FUSED = hasattr(__import__("trl.trainer.utils", fromlist=["x"]), "add_fused_lm_head")  # TRL 1.15 and later
later = pytest.mark.skipif(not FUSED, reason="TRL 1.15 and later")
earlier = pytest.mark.skipif(FUSED, reason="TRL 1.14 and earlier")


def text_model(**changes):
    return tiny.redraw(tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, **changes})))


def llava():
    vision = {**tiny.VISION, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(vision_config=vision, text_config=dict(LLAMA), image_token_id=4)
    return tiny.redraw(tf.LlavaForConditionalGeneration(config))


def processor():
    square = {"height": 28, "width": 28}
    images = tf.CLIPImageProcessorPil(size=square, crop_size=square)
    return tf.LlavaProcessor(
        images, word_tokenizer(WORDS), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def pairs(images: bool) -> "datasets.Dataset":
    """Answers of one to five words, so that no two rows end together."""
    chosen = ["a red cube", "two", "a small blue ball", "yes", "no a big cube", "three"]
    rejected = ["no", "a big red ball yes", "three small", "a cube", "two", "a blue ball no"]
    rows = {"prompt": [("<image> " if images else "") + "what is this", "is this a cube"] * 3, "chosen": chosen, "rejected": rejected}
    if images:
        rows["prompt"] = [prompt if "<image>" in prompt else f"<image> {prompt}" for prompt in rows["prompt"]]
        rows["images"] = [[Image.new("RGB", (28, 28), (40 * i, 200 - 30 * i, 90))] for i in range(6)]
    return datasets.Dataset.from_dict(rows)


def make(folder, kind="text", model=None, ref=True, peft_config=None, **config):
    images = kind == "llava"
    model = model or (llava() if images else text_model())
    reference = None
    if ref:  # not the policy itself, or every log-ratio would start at 0
        reference = copy.deepcopy(model)
        with torch.no_grad():
            reference.get_output_embeddings().weight.mul_(1.3)
    args = trl.DPOConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, per_device_eval_batch_size=3, learning_rate=0.1, optim="sgd", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=config.pop("bf16", False), disable_tqdm=True, max_length=None,
        **config,
    )  # fmt: skip
    data = pairs(images)
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=data, eval_dataset=data, peft_config=peft_config,
        processing_class=processor() if images else word_tokenizer(WORDS),
    )  # fmt: skip


def train(trainer):
    """What a run says and leaves: its log without clocks, and the trained parameters. SGD: Adam makes whole steps of rounding errors."""
    trainer.train()
    trainer.evaluate()
    clocks = ("runtime", "per_second", "flos", "epoch")
    log = [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]
    return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(got, want, tolerance=1e-5):
    (log, parameters), (want_log, want_parameters) = got, want
    assert len(log) == len(want_log)
    for entry, expected in zip(log, want_log, strict=True):
        assert entry.keys() == expected.keys()
        for key, value in expected.items():
            assert entry[key] == pytest.approx(value, abs=tolerance, rel=tolerance), f"{key} at step {expected.get('step')}"
    for name, p in want_parameters.items():
        assert (parameters[name] - p).abs().max() <= tolerance, f"{name} off by {(parameters[name] - p).abs().max():.1e}"


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """How many rows each call of linear_logp had."""
    counts = []

    def counted(hidden, *args, **kwargs):
        counts.append(len(hidden))
        return stock(hidden, *args, **kwargs)

    stock = integration.linear_logp
    monkeypatch.setattr(integration, "linear_logp", counted)
    return counts


LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
RUNS = {
    "text": {},
    "llava": {"kind": "llava"},
    "text, LoRA": {"ref": False, "peft_config": LORA},
    "llava, LoRA": {"kind": "llava", "ref": False, "peft_config": LORA},
    "text, trained head beside LoRA": {"ref": False, "peft_config": {**LORA, "modules_to_save": ["lm_head"]}},
    "text, reference in advance": {"precompute_ref_log_probs": True},
    "text, accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "text, no checkpointing": {"gradient_checkpointing": False},
    "text, weighted losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "text, WPO": {"use_weighting": True},
    "text, LD-DPO": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(name, tmp_path, rows, capsys):
    options = dict(RUNS[name])
    peft_config = options.pop("peft_config", None)
    log, parameters = [], []
    for patched in (False, True):
        torch.manual_seed(0)
        trainer = make(tmp_path, **options, peft_config=peft_config and peft.LoraConfig(**peft_config))
        capsys.readouterr()
        if patched:
            assert integration.patch(trainer) is trainer
            said = capsys.readouterr().out
            rows.clear()
        log.append(train(trainer))
    assert rows, "linear_logp never ran"
    assert "mmfast: policy" in said
    assert_same(log[1], log[0])
