"""FROMAGe's stage: its losses row by row from the formulas, neighbours that are one row, the norm of [RET]'s row, and its exam."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from mmfast.trainers import captions, retrieval, supervised
from mmfast.trainers.captions import recall
from mmfast.trainers.checkpoint import Run, RunError
from mmfast.trainers.loop import Options
from mmfast.trainers.recipes.architectures.fromage import RECIPE
from torch.nn import functional as F

from mmfast.data import supervised as data
from mmfast.models import tiny

TINY = tiny(RECIPE)
PAIRS = TINY.stages[-1]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "Shapes", partial(data.Shapes, count=24))


def opened(tokens=1, layers=(-1,), **stage):
    torch.manual_seed(0)
    fusion = replace(TINY.fusion, layers=layers)
    system = replace(TINY, connector=replace(TINY.connector, tokens=tokens), fusion=fusion, stages=(replace(PAIRS, **stage),))
    session = supervised.Session(system, seed=0)
    session.let_train(PAIRS.train, None)
    return session, session.source(system.stages[0].data, PAIRS.template, system.stages[0].max_length)


def projected(model, states):
    """What a text's last token becomes in the shared space, from all hidden states that transformers gives out."""
    maps = zip(model.system.fusion.layers, model.fusion.text_hidden_fcs, strict=True)
    return sum(F.linear(states[layer][0, -1], each[0].weight, each[0].bias) for layer, each in maps)


def by_hand(session, batch, pairs):
    """The three losses, each row on its own through the language model, padding and all helpers left out."""
    model, lm = session.model, session.model.language
    embed, k = lm.get_input_embeddings(), session.system.image_tokens
    ret = session.tokenizer.convert_tokens_to_ids("[RET]")
    texts = [[i for i in row.tolist() if i not in (session.image_token, session.tokenizer.pad_token_id)] for row in batch["input_ids"]]
    assert all(t[0] == session.tokenizer.bos_token_id and t[-1] == ret for t in texts)
    tower = model.encoder.vision(session.pixels(session.source(PAIRS.data, PAIRS.template, 64).load_pictures(batch["picture_ids"])))
    pooled = tower.pooler_output[batch["image_rows"]]
    prefix = model.connector.linear(pooled).view(len(texts), k, -1)

    def row(i):
        """Embeddings and targets of [picture, text], targets -100 on the picture and from [RET] on."""
        ids = torch.tensor(texts[i][:-1])
        return torch.cat([prefix[i], embed(ids)]), torch.cat([torch.full((k,), -100), ids])

    caption, scored = 0.0, 0
    for group in pairs:
        embeds, labels = (torch.cat(parts) for parts in zip(*map(row, group), strict=True))
        logits = lm(inputs_embeds=embeds[None]).logits[0]
        caption += F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        scored += int((labels[1:] != -100).sum())
    text, words, t = 0.0, 0, []
    for ids in texts:
        out = lm(torch.tensor([ids]), output_hidden_states=True)
        text += F.cross_entropy(out.logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        words += len(ids) - 1
        t.append(projected(model, out.hidden_states))
    t, u = torch.stack(t), model.fusion.visual_fc(pooled)
    t, u = t / t.norm(dim=1, keepdim=True), model.fusion.logit_scale.exp() * u / u.norm(dim=1, keepdim=True)
    own = torch.arange(len(t))
    return caption / scored, text / words, (F.cross_entropy(u @ t.T, own) + F.cross_entropy(t @ u.T, own)) / 2


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("coin", "pairs"), [(0.9, [(0,), (1,), (2,), (3,), (4,)]), (0.1, [(0, 1), (2, 3), (4,)])])
@pytest.mark.parametrize(("cached", "layers"), [(True, (-1,)), (False, (-1,)), (True, (1, -1)), (True, (3, 0, -2))])
def test_losses_row_by_row(monkeypatch, tokens, coin, pairs, cached, layers):
    session, source = opened(tokens, layers)
    states = session.states_of(source) if cached else None
    source.with_pictures = not cached
    batch = source.batch(torch.tensor([3, 8, 20, 5, 11]))
    objective = retrieval.retrieval_objective(session, states)
    monkeypatch.setattr(torch, "rand", lambda *a: torch.tensor(coin))
    loss, told = objective(batch, batch["counts"])
    want = by_hand(session, batch, pairs)
    got = [told[f"loss/{name}"] for name in ("caption", "text", "contrast")]
    torch.testing.assert_close(torch.stack(got), torch.stack(want).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, sum(want), atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(loss, [p for p in session.model.parameters() if p.requires_grad])
    wants = torch.autograd.grad(sum(by_hand(session, batch, pairs)), [p for p in session.model.parameters() if p.requires_grad])
    for g, w in zip(grads, wants, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_texts_are_compared_by_the_states_of_their_layers():
    """Texts of several lengths, as exams compare them, with a picture in each."""
    session, _ = opened(layers=(1, -1))
    model = session.model.eval()
    pictures = torch.randn(3, session.system.encoder.tokens, session.system.encoder.width)
    texts = [[session.image_token, *range(5, 5 + n), session.tokenizer.convert_tokens_to_ids("[RET]")] for n in (3, 5, 3)]
    got = captions.scores(session, texts, pictures, [[0], [1], [2]])
    embed, seen = model.language.get_input_embeddings(), model.connector.linear(model.connector.pooled(pictures))
    lines = [torch.cat([image[None], embed(torch.tensor(ids[1:]))])[None] for image, ids in zip(seen, texts, strict=True)]
    t = torch.stack([projected(model, model.language(inputs_embeds=line, output_hidden_states=True).hidden_states) for line in lines])
    u = model.fusion.visual_fc(model.connector.pooled(pictures))
    torch.testing.assert_close(got, F.normalize(t, dim=-1) @ F.normalize(u, dim=-1).T, atol=1e-5, rtol=1e-5)


def test_recomputed_blocks_give_the_same_gradients_of_inner_layers():
    session, source = opened(layers=(0, 1, -1))
    batch, wanted = source.batch(torch.arange(5)), [p for p in session.model.parameters() if p.requires_grad]
    grads = []
    for recompute in (False, True):
        if recompute:
            session.model.checkpoint_activations()
        torch.manual_seed(1)
        loss, _ = retrieval.retrieval_objective(session, session.states_of(source))(batch, batch["counts"])
        grads.append(torch.autograd.grad(loss, wanted))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(block._forward_pre_hooks for block in session.model.blocks), "a block is listened to while it is read, and no longer"


def test_the_contrast_has_a_weight_and_sees_a_micro_batch(monkeypatch):
    session, source = opened()
    states = session.states_of(source)
    monkeypatch.setattr(torch, "rand", lambda *a: torch.tensor(0.9))
    batch, halves = source.batch(torch.arange(8)), [source.batch(torch.arange(4)), source.batch(torch.arange(4, 8))]
    objective = retrieval.retrieval_objective(session, states, 0.0)
    whole, told = objective(batch, batch["counts"])
    torch.testing.assert_close(whole, told["loss/caption"] + told["loss/text"])
    cut = [objective(half, batch["counts"]) for half in halves]
    torch.testing.assert_close(cut[0][0] + cut[1][0], whole, atol=1e-5, rtol=1e-5)  # what is no contrast does not depend on the cut
    alone = [objective(half, half["counts"])[1]["loss/contrast"] for half in halves]
    share = halves[0]["counts"][0] / batch["counts"][0]
    got = cut[0][1]["loss/contrast"] + cut[1][1]["loss/contrast"]
    assert got.item() == pytest.approx((share * alone[0] + (1 - share) * alone[1]).item(), abs=1e-5)


def test_long_captions_end_with_the_token_all_the_same():
    session, source = opened(max_length=14)
    ret, batch = session.tokenizer.convert_tokens_to_ids("[RET]"), source.batch(torch.arange(24))
    assert batch["input_ids"].shape[1] == 14
    last = (batch["labels"] != -100).long().sum(1)
    assert (batch["input_ids"][torch.arange(24), last + 1] == ret).all()
    assert (batch["labels"][torch.arange(24), last + 1] == ret).all()
    whole = session.world.caption(session.world.scenes("train", 1)[0]).text
    words = session.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == [session.image_token, session.tokenizer.bos_token_id, *words[:11], ret]


def test_what_learns_and_the_norm_of_the_row(tmp_path):
    session, _ = opened(optim=replace(PAIRS.optim, steps=3, batch=8, warmup=0))
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    supervised.train_system(session.system, Run(tmp_path / "run"), options=Options(quiet=True), session=session)
    row = session.model.new_tokens[0]
    table = "language.model.decoder.embed_tokens.weight"
    moved = {n for n, p in session.model.named_parameters() if not torch.equal(p, before[n])}
    fusion = {f"fusion.{n}" for n, _ in session.model.fusion.named_parameters()}
    assert moved == {"connector.linear.weight", "connector.linear.bias", table, *fusion}
    after = session.model.language.get_input_embeddings().weight.detach()
    assert torch.equal(after[:row], before[table][:row]), "only the row of [RET] learns"
    assert after[row].norm().item() == pytest.approx(after[:row].norm(dim=1).mean().item(), rel=1e-5)
    turned = F.cosine_similarity(after[row], before[table][row], dim=0)
    assert turned < 0.9999, "it learns a direction"


def test_without_the_rule_the_norm_is_free(tmp_path):
    session, _ = opened(optim=replace(PAIRS.optim, steps=3, batch=8, warmup=0, level_new=False))
    supervised.train_system(session.system, Run(tmp_path / "run"), options=Options(quiet=True), session=session)
    table = session.model.language.get_input_embeddings().weight.detach()
    assert table[-1].norm().item() != pytest.approx(table[:-1].norm(dim=1).mean().item(), rel=1e-3)


def test_other_records_are_refused():
    session, _ = opened()
    source = session.source(replace(PAIRS.data, name="shapes"), "bare")  # the picture stands behind the beginning token
    with pytest.raises(RunError, match="objective retrieval reads pictures with one caption each, in template fromage"):
        retrieval.retrieval_objective(session, None)(source.batch(torch.arange(4)), torch.ones(2))


def test_recall_counts_equals_fairly():
    scores = torch.tensor([[3.0, 1, 2], [1.0, 2, 3], [5.0, 5, 5]])
    told = recall(scores, at=(1, 2, 3))
    assert told["retrieval/recall@1"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert told["retrieval/recall@2"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert told["retrieval/recall@3"] == 1
    assert told["retrieval/chance@1"] == pytest.approx(1 / 3)
    assert recall(torch.zeros(50, 50))["retrieval/recall@1"] == pytest.approx(1 / 50)


def test_half_precision_keeps_the_contrast_in_fp32():
    session, source = opened()
    batch, objective = source.batch(torch.arange(8)), retrieval.retrieval_objective(session, session.states_of(source))
    with torch.no_grad():
        session.model.fusion.logit_scale.fill_(6.0)  # a scale of 403, where bf16 tells cosines apart by whole units
        whole = objective(batch, batch["counts"])[1]["loss/contrast"]
        for owner, name in ((session.model, "hidden"), (session.model.fusion, "pictures"), (session.model.fusion, "texts")):
            setattr(owner, name, partial(_in_fp32, getattr(owner, name)))
        with torch.autocast("cpu", torch.bfloat16):
            half = objective(batch, batch["counts"])[1]["loss/contrast"]
    assert half.item() == pytest.approx(whole.item(), rel=1e-4)


def _in_fp32(function, *args, **kwargs):
    with torch.autocast("cpu", enabled=False):
        return function(*args, **kwargs)
