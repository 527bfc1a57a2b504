"""Our BLIP-2 is the published one: parity with transformers' two classes on tiny random checkpoints, both ways; LAVIS's files; sizes."""

from dataclasses import replace

import pytest
import torch
from blip import IMAGE, WORDS, drawn, saved, shapes, sizes
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mmfast import spec
from mmfast.models import Matcher, build, captions, from_pretrained, load_lavis, rank, save_lavis
from mmfast.models.build import queries
from mmfast.models.lavis import lavis_state, load_lavis_state

PAD = 1


def config(*, text=False, queries=4, placeholder=IMAGE, **choices):
    parts = sizes(pad=PAD, use_qformer_text_input=text, **choices)
    return Blip2Config(**parts, num_query_tokens=queries, image_token_index=placeholder, image_text_hidden_size=8)


def stock(kind=Blip2ForConditionalGeneration, *, seed=0, **choices):
    return drawn(kind, config(**choices), seed)


def batch(queries=4, size=28, seed=0, pad="right"):
    """Two captions of unlike length behind a picture each."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 55, (9,), generator=g).tolist()
    rows = [[IMAGE] * queries + [2, *words[:6]], [IMAGE] * queries + [2, *words[6:]]]
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(r)) for r in rows]
    ids = torch.tensor([r + f if pad == "right" else f + r for r, f in zip(rows, fill, strict=True)])
    return {
        "input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(2, 3, size, size, generator=g),
        "labels": ids.masked_fill((ids == IMAGE) | (ids == PAD), -100),
    }  # fmt: skip


CASES = [{}, {"seed": 7}, {"size": 42, "queries": 3, "seed": 3}, {"tower": 36}, {"language": "llama"}, {"text": True}]


@pytest.mark.parametrize("case", CASES, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()) or "opt")
@pytest.mark.parametrize("pad", ["right", "left"])
def test_logits_and_loss_equal_the_stock_class(case, pad, tmp_path):
    theirs = stock(**case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(**shapes(case), pad=pad, seed=case.get("seed", 0))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = theirs(**inputs)
        got = ours(**inputs)
    assert want.logits[real].std() > 0.2, "a checkpoint that says nothing proves nothing"
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES[:5], ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()) or "opt")
@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_equal_the_stock_class(case, beams, tmp_path):
    theirs = stock(**case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(**shapes(case), pad="left", seed=3)
    inputs.pop("labels")
    want = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=2, num_beams=beams)
    got = ours.generate(**inputs, end=2, max_new_tokens=12, beams=beams)
    assert got.tolist() == want[:, -got.shape[1] :].tolist()
    assert len(set(got.flatten().tolist())) > 3 - (beams > 1)


def test_the_way_back_loads_in_the_stock_class(tmp_path):
    for i, case in enumerate(CASES):
        ours = from_pretrained(saved(stock(**case), tmp_path / f"a{i}"))
        ours.save_pretrained(tmp_path / f"b{i}")
        theirs, inputs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / f"b{i}").eval(), batch(**shapes(case))
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(theirs(**inputs).logits[real], ours(**inputs).logits[real], atol=1e-5, rtol=0)


def test_a_changed_weight_is_seen(tmp_path):
    """The parity test can fail: each part moves the logits."""
    theirs, inputs = stock(), batch()
    saved(theirs, tmp_path)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = theirs(**inputs).logits[real]
    for name in (
        "encoder.vision.encoder.layers.1.self_attn.qkv.bias", "connector.ln_vision.bias", "connector.query_tokens", "connector.qformer.layernorm.bias",
        "connector.qformer.encoder.layer.2.crossattention.attention.value.weight", "connector.projection.bias",
    ):  # fmt: skip
        ours = from_pretrained(tmp_path)
        with torch.no_grad():
            p = ours.get_parameter(name)
            p.add_(0.1 * torch.randn_like(p))
            assert (ours(**inputs).logits[real] - want).abs().max() > 1e-4, name
    ours = from_pretrained(tmp_path)
    with torch.no_grad():  # the tower's own last norm is not read: the connector's is
        ours.encoder.vision.post_layernorm.bias.add_(1)
        torch.testing.assert_close(ours(**inputs).logits[real], want, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- retrieval


def texts(rows=2, seed=0, places=4):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (rows,), generator=g)
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(1, WORDS, (rows, 7), generator=g) * mask
    places = torch.full((rows, places), WORDS - 1)
    return torch.cat([places, ids], 1), torch.cat([torch.ones_like(places), mask], 1)


@pytest.mark.parametrize("placeholder", [WORDS, None])
@pytest.mark.parametrize("case", [{}, {"seed": 7}, {"size": 42}, {"tower": 36}], ids=str)
def test_scores_equal_the_stock_class(case, placeholder, tmp_path):
    theirs = stock(Blip2ForImageTextRetrieval, text=True, placeholder=placeholder, **case)
    ours = from_pretrained(saved(theirs, tmp_path / "a"))
    assert isinstance(ours, Matcher)
    ours.save_pretrained(tmp_path / "b")
    back = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "b").eval()
    assert (back.config.image_token_index is None) == (placeholder is None)
    size = case.get("size", 28)
    for rows, pictures, matching in ((2, 2, True), (5, 5, True), (3, 5, False), (1, 1, False), (1, 3, False)):
        pixels = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(rows))
        ids, mask = texts(rows, seed=rows, places=4 if placeholder else 0)
        with torch.no_grad():
            want = theirs(pixels, ids, mask, use_image_text_matching_head=matching)
            for model in (ours, back):
                got = model(pixels, ids, mask, use_image_text_matching_head=matching)
                for name in ("logits_per_image", "logits_per_text", "image_embeds"):
                    torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-5, rtol=0)
                if not matching:
                    torch.testing.assert_close(got.text_embeds, want.text_embeds, atol=1e-5, rtol=0)
        assert want.logits_per_image.shape == ((rows, 2) if matching else (pictures, rows))
        assert rows == 1 or want.logits_per_image.std() > 0.02


def test_ranking_puts_the_best_of_the_contrast_in_the_order_of_both(tmp_path):
    ours = from_pretrained(saved(stock(Blip2ForImageTextRetrieval, text=True), tmp_path))
    pixels, (ids, mask) = torch.randn(6, 3, 28, 28), texts(5, places=0)
    with torch.no_grad():
        cosine = ours(pixels, torch.cat([torch.ones(5, 4).long(), ids], 1), torch.cat([torch.ones(5, 4).long(), mask], 1)).logits_per_image
        states = ours.encoder(pixels)
        yes = torch.stack([ours.connector.match(ours.connector.normed(states[[i] * 5]), ids, mask)[:, 1] for i in range(6)])
    plain = rank(ours.connector, states, ids, mask, top=0)
    torch.testing.assert_close(plain[0], cosine, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain[1], cosine.T, atol=1e-5, rtol=0)
    whole = rank(ours.connector, states, ids, mask, top=128)
    assert torch.equal(whole[0].argsort(1), (cosine + yes).argsort(1))
    assert torch.equal(whole[1].argsort(1), (cosine + yes).T.argsort(1))
    for top in (0, 2, 128):  # pictures that come a few at a time
        of_all, of_some = (rank(ours.connector, seen, ids, mask, top=top, batch=3) for seen in (states, lambda: states.split(4)))
        torch.testing.assert_close(of_some, of_all, atol=1e-4, rtol=1e-6)
    some = rank(ours.connector, states, ids, mask, top=2, batch=3)[0].argsort(1, descending=True)
    by_contrast = cosine.argsort(1, descending=True)
    for i in range(6):
        two = by_contrast[i, :2]
        assert some[i, :2].tolist() == two[(cosine + yes)[i, two].argsort(descending=True)].tolist()
        assert some[i, 2:].tolist() == by_contrast[i, 2:].tolist()


@pytest.mark.parametrize("level", [4.0, -20.0])
def test_scores_that_are_ranked_anew_are_what_they_say_and_none_are_equal(tmp_path, monkeypatch, level):
    """Logits that differ in their sixth digit; and logits so low that the others must be lowered to come after."""
    ours = from_pretrained(saved(stock(Blip2ForImageTextRetrieval, text=True), tmp_path))
    states, (ids, mask) = ours.encoder(torch.randn(6, 3, 28, 28)), texts(40, places=0)
    yes = iter(level + torch.arange(2 * 46 * 5) * 1e-5)

    def match(image, *_):
        return torch.tensor([[0.0, float(next(yes))] for _ in image])

    monkeypatch.setattr(ours.connector, "match", match)
    cosine = rank(ours.connector, states, ids, mask, top=0)
    for turned, scores in enumerate(rank(ours.connector, states, ids, mask, top=5, batch=7)):
        told = cosine[turned].double()
        best = told.topk(5).indices
        first = sum(len(c) * 5 for c in cosine[:turned])
        logits = (level + torch.arange(first, first + len(told) * 5) * 1e-5).double().view(-1, 5)
        assert torch.equal(scores.gather(1, best), told.gather(1, best) + logits)
        for row, plain, own in zip(scores, told, best, strict=True):
            others = torch.tensor([i for i in plain.argsort(descending=True).tolist() if i not in own.tolist()], dtype=torch.long)
            assert row.argsort(descending=True)[5:].tolist() == others.tolist()
            assert (level < 0) or torch.equal(row[others], plain[others])


# -------------------------------------------------------------------------------------------- behaviour, without weights

SYSTEM = spec.System(
    "test",
    encoder=spec.Eva(weights=None, width=24, depth=2, heads=3, ffn=48, patch=14, size=28),
    connector=spec.QFormer(tokens=4, width=32, depth=3, heads=4, ffn=64, vocab=37, positions=64, shared=8),
    language=spec.LanguageModel(weights=None, vocab=60, width=16, depth=2, heads=2, kv_heads=2, ffn=32),
    image=spec.Fixed(size=28),
)


def connector():
    torch.manual_seed(0)
    made = build(SYSTEM).connector.eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    image, (ids, mask) = made.normed(torch.randn(3, 5, 24)), texts(3, places=0)
    return made, image, ids, mask


@torch.no_grad()
def test_what_sees_what_in_the_three_passes():
    made, image, ids, mask = connector()
    other = image.flip(0)
    # Text alone knows no image, queries alone no text: neither is an argument. What is cached of the queries is all that captioning sees.
    first = made.read(image)
    logits, _ = made.continued(first.cache, ids, mask)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % WORDS
    moved = (
        (made.continued(first.cache, changed, torch.ones_like(mask))[0] - made.continued(first.cache, ids, torch.ones_like(mask))[0])
        .abs()
        .amax((0, 2))
    )
    assert (moved[:3] == 0).all()
    assert (moved[3:] > 1e-3).all()
    assert ((made.continued(made.read(other).cache, ids, mask)[0] - logits).abs().amax((1, 2))[[0, 2]] > 1e-3).all()
    # Matching changes with either.
    matched = made.match(image, ids, mask)
    assert ((made.match(other, ids, mask) - matched).abs().amax(1)[[0, 2]] > 1e-3).all()
    assert ((made.match(image, ids.flip(0), mask.flip(0)) - matched).abs().amax(1)[[0, 2]] > 1e-3).all()
    # Padding is not read.
    padded = torch.where(mask == 0, 9, ids)
    torch.testing.assert_close(made.match(image, padded, mask), matched, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.texts(padded, mask), made.texts(ids, mask), atol=1e-6, rtol=0)


@torch.no_grad()
def test_its_own_captions_are_those_of_one_pass_at_a_time():
    made, _, _, _ = connector()
    states = torch.randn(3, 5, 24)
    said = captions(made, states, first=36, last=2, max_new_tokens=6)
    rows = torch.full((3, 1), 36)
    for _ in range(said.shape[1]):
        logits, _ = made.continued(made.read(made.normed(states)).cache, rows)
        rows = torch.cat([rows, logits[:, -1:].argmax(-1)], 1)
    for got, want in zip(said.tolist(), rows[:, 1:].tolist(), strict=True):
        stop = want.index(2) + 1 if 2 in want else len(want)
        assert got[:stop] == want[:stop]
        assert set(got[stop:]) <= {2}
    assert len(set(said.flatten().tolist())) > 2


def test_the_queries_feed_forward_starts_as_the_text_s():
    layer = build(SYSTEM).connector.qformer.encoder["layer"][0]
    assert torch.equal(layer.intermediate_query["dense"].weight, layer.intermediate["dense"].weight)
    assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)


def test_an_instruction_changes_what_the_language_model_sees():
    made, _, ids, mask = connector()
    states = torch.randn(3, 5, 24)
    with torch.no_grad():
        asked = made(states, ids, mask)
        assert asked.shape == (3, 4, 16)
        assert ((made(states, ids.flip(0), mask.flip(0)) - asked).abs().amax((1, 2))[[0, 2]] > 1e-3).all()


# ------------------------------------------------------------------------------------------------------ LAVIS's files


@pytest.mark.parametrize("projection", ["opt_proj", "llm_proj"])
def test_lavis_s_names_there_and_back(projection, tmp_path):
    torch.manual_seed(0)
    one, two = build(SYSTEM), build(SYSTEM)
    with torch.no_grad():
        for layer in one.encoder.blocks:
            layer.self_attn.qkv.bias.normal_()[24:48].zero_()  # no bias of keys there
    save_lavis(one, tmp_path / "a.pth", projection)
    held = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    for name in (
        "visual_encoder.blocks.1.attn.q_bias", "visual_encoder.pos_embed", "ln_vision.weight", "Qformer.bert.embeddings.LayerNorm.bias",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight", "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight",
        "Qformer.bert.encoder.layer.1.attention.output.LayerNorm.weight", "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.transform.LayerNorm.bias", "temp", f"{projection}.weight",
    ):  # fmt: skip
        assert name in held
    load_lavis(two, tmp_path / "a.pth")
    assert two.connector.ln_vision.eps == 1e-5
    one.connector.ln_vision.eps = 1e-5
    for name, value in one.connector.state_dict().items():
        assert torch.equal(two.connector.state_dict()[name], value), name
    states = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(two.connector(two.encoder(states)), one.connector(one.encoder(states)))


def test_a_second_stage_s_model_takes_a_first_stage_s_file():
    one, two = build(SYSTEM), build(replace(SYSTEM, connector=replace(SYSTEM.connector, text=False, vocab=0)))
    load_lavis_state(two, lavis_state(one))
    one.connector.ln_vision.eps = 1e-5
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        one.eval(), two.eval()
        assert torch.equal(two.connector(two.encoder(pixels)), one.connector(one.encoder(pixels)))


def test_what_lavis_s_files_may_not_hold():
    model = build(SYSTEM)
    with pytest.raises(ValueError, match=r"here: query_tokens: expected \[1, 4, 32\], got \[1, 5, 32\]"):
        load_lavis_state(model, {"query_tokens": torch.zeros(1, 5, 32)}, "here")
    with pytest.raises(ValueError, match=r"checkpoint holds visual_encoder\.fc\.weight, which is no part of BLIP-2"):
        load_lavis_state(model, {"visual_encoder.fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="its connector is a Linear; LAVIS's files hold a QFormer"):
        lavis_state(build(replace(SYSTEM, connector=spec.Linear())))


# ----------------------------------------------------------------------------------------------------------------- sizes


def count(parameters):
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def test_published_sizes():
    """Spec of the published models, on no memory."""
    opt = spec.LanguageModel(family="opt", weights=None, vocab=50272, width=2560, depth=32, heads=32, ffn=10240, tied=True)
    system = spec.System("g", encoder=spec.Eva(weights=None), connector=spec.QFormer(), language=opt)
    with torch.device("meta"):
        model = build(system)
        large = build(replace(system, encoder=spec.Clip(weights=None, keep_class_token=True))).connector
    tower, made = list(model.encoder.parameters()), model.connector
    assert count(tower) == 985_952_256
    # LAVIS's trunk has no bias of keys and no norm of its own behind the last block.
    assert count(tower) - 39 * 1408 - 2 * 1408 == 985_894_528
    assert count([*made.qformer.parameters(), *made.cls.parameters(), made.cls_bias]) == 186_282_811
    assert count([*large.qformer.parameters(), *large.cls.parameters(), large.cls_bias]) == 182_743_867
    heads = [p for part in (made.vision_proj, made.text_proj, made.itm_head) for p in part.parameters()]
    assert count([*heads, made.temp]) == 395_267
    assert made.query_tokens.numel() == 24_576
    assert count(model.train_only(("queries",))) == 186_705_470
    assert count(p for p in made.qformer.parameters() if p.requires_grad) == 185_660_160
    assert count(model.train_only(("connector",))) == 107_133_696
    assert count(p for p in made.qformer.parameters() if p.requires_grad) == 105_137_664
    assert count(made.projection.parameters()) == 1_968_640


@pytest.mark.parametrize("init", [0.02, 0.125])
def test_it_starts_as_wide_as_the_recipe_says(init):
    """Queries and maps; the projection as in transformers' class whatever that is."""
    from mmfast.spec import QFormer

    connector = queries(QFormer(weights=None, tokens=64, width=64, depth=2, heads=4, ffn=128, vocab=50, init=init), 48, 80)
    key = connector.qformer.encoder["layer"][0].attention["attention"]["key"].weight
    assert [float(w.std()) for w in (connector.query_tokens, key)] == pytest.approx([init, init], rel=0.1)
    assert float(connector.projection.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not connector.projection.bias.any()


def test_gradients_reach_exactly_what_a_stage_trains():
    torch.manual_seed(0)
    model = build(replace(SYSTEM, connector=replace(SYSTEM.connector, dropout=0.0)))
    trained = {id(p) for p in model.train_only(("connector",))}
    ids = torch.tensor([[58, 58, 58, 58, 2, 7, 8]])
    model.image_token = 58
    model(ids, pixel_values=torch.randn(1, 3, 28, 28), labels=ids).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {id(model.get_parameter(name)) for name in reached} == trained
    assert not any(
        word in name for name in reached for word in ("_proj.", "itm_head", "temp", "cls", "word_", "position_", "intermediate.dense")
    )
    with pytest.raises(ValueError, match="unknown part 'queries'"):
        build(replace(SYSTEM, connector=spec.Linear())).train_only(("queries",))


# ------------------------------------------------------------------------------------------------------------------ BERT


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny random BERT and its lower-casing tokenizer. Its type embedding is 0, as a Q-Former has none."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "red", "circle", "and", "blue", "square", ".", "##s"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    made = BertForMaskedLM(
        BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40,
            initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
        made.bert.embeddings.token_type_embeddings.weight.zero_()
    made.save_pretrained(folder)
    return folder, made


def test_a_q_former_begins_as_its_bert(bert):
    folder, theirs = bert
    from mmfast.models.pretrained import text_side

    made = build(replace(SYSTEM, connector=spec.QFormer(tokens=4, weights=str(folder)))).eval()
    choice, connector = made.system.connector, made.connector
    assert (choice.width, choice.depth, choice.heads, choice.ffn, choice.positions, choice.vocab) == (32, 3, 4, 48, 40, 14)
    side = text_side(made.system, None)
    assert (side.first, side.last, side.decode, side.pad_token) == (2, 3, 13, 0)
    ids, mask = side.texts(["A red CIRCLE.", "blue squares and a red circle."])
    assert ids[0].tolist() == [2, 5, 6, 7, 11, 3, 0, 0, 0, 0]
    with torch.no_grad():
        want = theirs.bert(ids, attention_mask=mask).last_hidden_state
        got = connector.qformer(text=ids, text_mask=mask).text
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
        # Its masked-word head, over the same states.
        hidden = connector.cls["norm"](torch.nn.functional.gelu(connector.cls["transform"](want)))
        logits = hidden @ connector.qformer.embeddings["word_embeddings"].weight.T + connector.cls_bias
        torch.testing.assert_close(logits[..., :13], theirs.cls(want), atol=1e-5, rtol=0)
    layer, own = connector.qformer.encoder["layer"][2], theirs.bert.encoder.layer[2]
    assert torch.equal(layer.intermediate_query["dense"].weight, own.intermediate.dense.weight)
    assert torch.equal(layer.output_query.LayerNorm.bias, own.output.LayerNorm.bias)


def test_what_a_q_former_cannot_begin_with(bert, tmp_path):
    from mmfast.models.pretrained import text_side

    with pytest.raises(ValueError, match=r"connector\.vocab is 37, and the tokenizer of these words comes with connector\.weights"):
        text_side(SYSTEM, None)
    with pytest.raises(ValueError, match="objective queries needs a connector QFormer with text"):
        text_side(replace(SYSTEM, connector=spec.Linear()), None)
    stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'blip-2', a Q-Former starts from a bert"):
        build(replace(SYSTEM, connector=spec.QFormer(weights=str(tmp_path))))


def test_a_tower_comes_out_of_a_whole_blip_2(tmp_path):
    theirs = stock()
    theirs.save_pretrained(tmp_path)
    made = build(replace(SYSTEM, encoder=spec.Eva(weights=str(tmp_path))))
    assert made.system.encoder.width == 24
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(made.encoder(pixels), want, atol=1e-6, rtol=0)
