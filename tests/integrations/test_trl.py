"""mmfast.integrations.trl on live DPO trainers: the same losses, metrics and parameters as TRL alone; and back."""

import copy
import inspect
from contextlib import nullcontext

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
trl_utils = pytest.importorskip("trl.trainer.utils")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<image>",
    *["what", "is", "this", "a", "red", "blue", "cube", "ball", "no", "yes", "two", "three", "small", "big"],
]
VOCABULARY = 37
LLAMA = {**tiny.LLAMA, "vocab_size": VOCABULARY}
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
FUSED = hasattr(trl_utils, "FusedCausalLMOutput")  # TRL 1.15 and later
later = pytest.mark.skipif(not FUSED, reason="TRL 1.15 and later")
earlier = pytest.mark.skipif(FUSED, reason="TRL 1.14 and earlier")


def build(cls, config, **changes):
    return tiny.redraw(cls(config(**{**LLAMA, "model_type": config.model_type, **changes})))


def llava():
    vision = {**tiny.VISION, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(vision_config=vision, text_config=dict(LLAMA), image_token_id=4)
    return tiny.redraw(tf.LlavaForConditionalGeneration(config))


def processor():
    square = {"height": 28, "width": 28}
    images = getattr(tf, "CLIPImageProcessorPil", tf.CLIPImageProcessor)(size=square, crop_size=square)
    return tf.LlavaProcessor(
        images, word_tokenizer(WORDS), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def pairs(images: bool) -> "datasets.Dataset":
    """Answers of one to five words, so that no two rows end together."""
    chosen = ["a red cube", "two", "a small blue ball", "yes", "no a big cube", "three"]
    rejected = ["no", "a big red ball yes", "three small", "a cube", "two", "a blue ball no"]
    rows = {"prompt": [("<image> " if images else "") + "what is this", "is this a cube"] * 3, "chosen": chosen, "rejected": rejected}
    rows.update({side: [f" {answer}" for answer in rows[side]] for side in ("chosen", "rejected")})
    if images:
        rows["prompt"] = [prompt if "<image>" in prompt else f"<image> {prompt}" for prompt in rows["prompt"]]
        rows["images"] = [[Image.new("RGB", (28, 28), (40 * i, 200 - 30 * i, 90))] for i in range(6)]
    return datasets.Dataset.from_dict(rows)


def make(folder, kind="text", model=None, ref=True, peft_config=None, compute_metrics=None, **config):
    images = kind == "llava"
    model = model or (llava() if images else build(tf.LlamaForCausalLM, tf.LlamaConfig))
    reference = None
    if ref:  # not the policy itself, or every log-ratio would start at 0
        reference = copy.deepcopy(model)
        with torch.no_grad():
            reference.get_output_embeddings().weight.mul_(1.3)
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "learning_rate": 0.1, "optim": "sgd", "bf16": False,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_length": None,
    }  # fmt: skip
    args = trl.DPOConfig(str(folder), **{**defaults, **config})
    data = pairs(images)
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=data, eval_dataset=data, peft_config=peft_config, compute_metrics=compute_metrics,
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
            assert entry[key] == pytest.approx(value, abs=tolerance, rel=tolerance, nan_ok=True), f"{key} at step {expected.get('step')}"
    for name, p in want_parameters.items():
        assert (parameters[name] - p).abs().max() <= tolerance, f"{name} off by {(parameters[name] - p).abs().max():.1e}"


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """How many rows with a label each call of linear_logp had."""
    counts = []

    def counted(hidden, weight, labels, *args, **kwargs):
        counts.append(int((labels != -100).sum()))
        return stock(hidden, weight, labels, *args, **kwargs)

    stock = integration.linear_logp
    monkeypatch.setattr(integration, "linear_logp", counted)
    return counts


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
RUNS = {
    "text": {},
    "llava": {"kind": "llava"},
    "text, LoRA": {"ref": False, "lora": LORA},
    "llava, LoRA": {"kind": "llava", "ref": False, "lora": LORA},
    "text, trained head beside LoRA": {"ref": False, "lora": {**LORA, "modules_to_save": ["lm_head"]}},
    "text, reference in advance": {"precompute_ref_log_probs": True},
    "text, accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "text, no checkpointing": {"gradient_checkpointing": False},
    "text, cut": {"max_length": 4},
    "text, weighted losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "text, WPO": {"use_weighting": True},
    "text, LD-DPO": {"ld_alpha": 0.5},
    "head with a bias": {"model": lambda: build(tf.PhiForCausalLM, tf.PhiConfig)},
    "tied head": {"model": lambda: build(tf.LlamaForCausalLM, tf.LlamaConfig, tie_word_embeddings=True)},
    "softcap": {"model": lambda: build(tf.Gemma2ForCausalLM, tf.Gemma2Config, head_dim=8, final_logit_softcapping=2.0)},
    "scaled logits": {"model": lambda: build(tf.CohereForCausalLM, tf.CohereConfig, logit_scale=0.5)},
}
AFTER_THE_HEAD = ("softcap", "scaled logits")


@pytest.mark.parametrize("name", [n for n in RUNS if FUSED or n not in AFTER_THE_HEAD])
def test_a_run_is_the_same(name, tmp_path, rows):
    options = dict(RUNS[name])
    lora, model = options.pop("lora", None), options.pop("model", None)
    runs = []
    for patched in (False, True):
        torch.manual_seed(0)
        trainer = make(tmp_path, model=model and model(), peft_config=lora and peft.LoraConfig(**lora), **options)
        if patched:
            assert integration.patch(trainer) is trainer
        runs.append(train(trainer))
        assert bool(rows) == patched
    assert_same(runs[1], runs[0])


def batch_of(trainer) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss(name, tmp_path):
    if name not in inspect.getsource(trl.DPOTrainer):
        pytest.skip(f"TRL {trl.__version__} has no {name} loss")
    trainer = make(tmp_path, loss_type=[name], label_smoothing=0.1, per_device_train_batch_size=3)
    batch = batch_of(trainer)
    want, want_gradients = loss_and_gradients(trainer, batch)
    got, gradients = loss_and_gradients(integration.patch(trainer), batch)
    assert got.item() == pytest.approx(want.item(), abs=1e-5, rel=1e-5)
    assert gradients.keys() == want_gradients.keys()
    assert max(g.abs().max() for g in want_gradients.values()) > 1e-4
    for parameter, gradient in want_gradients.items():
        assert (gradients[parameter] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), parameter


@pytest.mark.parametrize("kind", ["text", "llava"])
def test_only_scored_rows_reach_the_head(kind, tmp_path, rows):
    """Image, prompt and padding cost nothing, and no op makes the logits of a batch."""

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.update(tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    made = set()
    trainer = integration.patch(make(tmp_path, kind))
    batch = batch_of(trainer)
    with Shapes():
        trainer.compute_loss(trainer.model, batch).backward()
    scored = int(batch["completion_mask"][:, 1:].sum())
    assert rows == [scored, scored]
    length = batch["input_ids"].shape[1]
    assert scored < 4 * (length - 1)
    assert not [s for s in made if s[-1:] == (VOCABULARY,) and torch.Size(s).numel() >= 4 * (length - 1) * VOCABULARY]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_output_of_the_kernel(softcap, scale):
    """Against the formula, in the order of TRL's own function."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 16), (37, 16), (37,)))
    labels = torch.tensor([0, 36, -100, 5, 5, 17])
    z = (hidden @ weight.T + bias) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
    labels[3] = z[3].argmax()
    p, scored = z.softmax(-1), labels != -100
    want = (
        z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0], -(p * p.log()).sum(-1), (p * p).sum(-1).log(), z.mean(-1),
        z.argmax(-1) == labels,
    )  # fmt: skip
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    got = integration._Kernel.apply(hidden, weight, bias, labels, 0.7, 8, softcap, scale, ("log_probs", *names))
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one[scored], expected[scored], atol=1e-5, rtol=1e-5)
    assert got[0][2] == 0
    for i, name in enumerate(names, 1):
        alone = integration._Kernel.apply(hidden, weight, bias, labels, 0.7, 8, softcap, scale, ("log_probs", name))
        assert [one is not None for one in alone] == [True, *(name == other for other in names)]
        assert torch.equal(alone[i], got[i])


def state_of(trainer) -> list:
    """Everything that patch may touch."""
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    held = [vars(m).get("forward") for model in models for m in model.modules()]
    code = [f.__code__ for model in models for f in integration._fused_forwards(model)]
    return [held, code, {k: v for k, v in vars(trainer).items() if k in integration._METHODS}]


@pytest.mark.parametrize("bf16", [False, True])
def test_restore(bf16, tmp_path, rows):
    trainer = make(tmp_path, bf16=bf16)
    stock = state_of(trainer)
    integration.patch(trainer)
    patched = state_of(trainer)
    assert patched != stock
    integration.patch(trainer)
    assert state_of(trainer) == patched
    assert state_of(integration.restore(trainer)) == stock
    assert state_of(integration.restore(trainer)) == stock
    integration.patch(trainer)
    trainer.train()  # under bf16 accelerate wraps the policy's forward now
    assert rows
    rows.clear()
    integration.restore(trainer)
    trainer.evaluate()
    assert not rows
    integration.patch(trainer)
    trainer.evaluate()
    assert rows


def test_bf16(tmp_path):
    """Products in bf16 by autocast: losses agree to its rounding."""
    runs = [train(integration.patch(make(tmp_path, bf16=True)) if patched else make(tmp_path, bf16=True)) for patched in (False, True)]
    for got, want in zip(runs[1][0], runs[0][0], strict=True):
        for key in want.keys() & {"loss", "eval_loss", "rewards/margins", "entropy", "logits/chosen"}:
            assert got[key] == pytest.approx(want[key], abs=2e-2), key


def test_generate_forward_and_metrics_on_logits(tmp_path, rows):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer = make(tmp_path, compute_metrics=metrics)
    ids = tiny.ids(2, 5, low=5, high=19)
    want = trainer.model.generate(ids, max_new_tokens=4, do_sample=False), trainer.model(ids).logits
    trainer.evaluate()
    integration.patch(trainer)
    assert torch.equal(trainer.model.generate(ids, max_new_tokens=4, do_sample=False), want[0])
    assert torch.equal(trainer.model(ids).logits, want[1])
    assert not rows
    trainer.evaluate()
    assert seen[1].shape[-1] == VOCABULARY
    assert abs(seen[1] - seen[0]).max() == 0


def test_what_is_said(tmp_path, capsys):
    def said(**options):
        trainer = make(tmp_path, **options)
        capsys.readouterr()
        integration.patch(trainer)
        return capsys.readouterr().out.splitlines()

    assert said() == [
        "mmfast: policy LlamaForCausalLM -> linear_logp",
        "mmfast: reference LlamaForCausalLM -> linear_logp",
        "mmfast: loss and metrics left to TRL",
    ]
    assert said(ref=False, peft_config=peft.LoraConfig(**LORA))[1] == "mmfast: reference is the policy, its adapter switched by TRL"
    assert "mmfast: reference left alone: computed in advance" in said(precompute_ref_log_probs=True)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a TRL DPOTrainer, got Linear"):
        integration.patch(torch.nn.Linear(2, 2))
    trainer = make(tmp_path)
    stock = state_of(trainer)
    trainer.model.set_output_embeddings(torch.nn.Sequential(trainer.model.lm_head))
    with pytest.raises(ValueError, match="the policy cannot be patched: its head is a Sequential"):
        integration.patch(trainer)
    trainer.model.set_output_embeddings(trainer.model.lm_head[0])
    assert state_of(trainer) == stock

    class Other(type(trainer)):
        def _compute_loss(self, model, inputs, return_outputs):
            return model(inputs["input_ids"]).logits.sum()

        def compute_ref_log_probs(self, model, inputs):
            return None

        _compute_ref_log_probs = compute_ref_log_probs

    trainer.__class__ = Other
    with nullcontext() if FUSED else pytest.raises(TypeError, match="Other computes log-probabilities in an unknown way"):
        integration.patch(trainer)


@earlier
def test_what_is_refused_before_1_15(tmp_path):
    for name in AFTER_THE_HEAD:
        with pytest.raises(ValueError, match=r"changes its logits after the head \(.*\); TRL 1.15"):
            integration.patch(make(tmp_path, model=RUNS[name]["model"]()))
    lora = peft.LoraConfig(**{**LORA, "target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match=r"its head is a Linear, expected a torch.nn.Linear of floating-point weights"):
        integration.patch(make(tmp_path, ref=False, peft_config=lora))
    trainer = make(tmp_path)
    trainer.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel"):
        integration.patch(trainer)
