"""Token ids and labels of conversations, checked on a tokenizer that spells: its ids are code points, so every expectation can be read."""

import re
from dataclasses import replace

import pytest
import torch

from mmfast.data import chat
from mmfast.data.formats import Record

BOS, EOS, IMAGE = 1, 2, 3


class Speller:
    bos_token_id, eos_token_id, is_fast = BOS, EOS, True

    def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
        assert not add_special_tokens or text == "a"  # which is how it is asked whether it begins a text by itself
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def encode(template, turns, tokens=2, **kwargs):
    return chat.encode(Speller(), template, turns, image_tokens=tokens, image_token=IMAGE, **kwargs)


def read(ids):
    return "".join({BOS: "<s>", EOS: "</s>", IMAGE: "@"}.get(i) or chr(i) for i in ids)


def scored(ids, labels):
    assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
    return read([i for i, label in zip(ids, labels, strict=True) if label != -100])


TURNS = [("<image>\nHi", "Hello"), ("Who?", "Me.")]


def test_llava_s_forms_as_published():
    """Whole texts and what of them is learnt, character by character."""
    user, human = (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
        f"the {who}'s questions."
        for who in ("user", "human")
    )
    tags = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language.The visual content will be provided with the following "
        "format: <Image>visual content</Image>."
    )
    llama_2 = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the "
        "user with a variety of tasks using natural language."
    )
    mpt = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    two = "{} USER: {} ASSISTANT: Hello</s>USER: Who? ASSISTANT: Me.</s>"
    hashes = "{}\n\n### Human: {}\n### Assistant: Hello\n### Human: Who?\n### Assistant: Me.\n### "
    shown, tagged = "@@\nHi", "<Image>@@</Image>\nHi"
    learnt_v0 = "### ### Assistant: Hello\n### ### Assistant: Me.\n### "
    for template, text, learnt in (
        ("vicuna_v1", "<s>" + two.format(user, shown), "Hello</s>Me.</s>"),
        ("llava_v1", "<s>" + two.format(human, shown), "Hello</s>Me.</s>"),
        ("llava_v1_mmtag", "<s>" + two.format(tags, tagged), "Hello</s>Me.</s>"),
        ("llava_v0", "<s>" + hashes.format(human, shown), learnt_v0),
        ("llava_v0_mmtag", "<s>" + hashes.format(tags, tagged), learnt_v0),
        (
            "llava_llama_2",
            f"<s>[INST] <<SYS>>\n{llama_2}\n<</SYS>>\n\n@@\nHi [/INST] Hello </s><s>[INST] Who? [/INST] Me. </s>",
            "Hello </s>Me. </s>",
        ),
        (
            "mpt",
            f"<|im_start|>system\n{mpt}<|im_end|><|im_start|>user\n@@\nHi<|im_end|><|im_start|>assistant\nHello<|im_end|>"
            "<|im_start|>user\nWho?<|im_end|><|im_start|>assistant\nMe.<|im_end|>",
            "Hello<|im_end|>Me.<|im_end|>",
        ),
    ):
        ids, labels = encode(template, TURNS)
        assert (read(ids), scored(ids, labels)) == (text, learnt), template
        prompt, _ = encode(template, [*TURNS[:1], ("Who?", None)])
        assert read(prompt) == text[: text.index("Me.")].rstrip(" "), template
        begins = "<s>" if text.startswith("<s>") else ""
        assert read(chat.encode_document(Speller(), "a", image_tokens=2, image_token=IMAGE, template=template)[0]) == f"{begins}a</s>"
        last, labels = encode(template, TURNS, last_alone=True)
        assert (last, scored(last, labels)) == (ids, learnt[learnt.index("Me.") :]), template


def legacy_llama():
    """A tokenizer as LLaMA's first: a space before every text, spaces are part of the words behind them, ### is one piece by itself and two
    behind a line end; its words are those of the test."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    said = [chat.TEMPLATES["vicuna_v1"].system + " USER: Hi. ASSISTANT: Hello there!", "USER: Who is it? ASSISTANT: Me.", "\nHi."] * 4
    inner.pre_tokenizer = pre_tokenizers.Split(
        Regex("\u2581?[A-Za-z]+|\u2581?#+|\u2581?[^A-Za-z\u2581]"), "isolated"
    )  # no piece is of two words
    said += [chat.TEMPLATES["alpaca"].system + " ### Instruction:\nAdd.\n\n ### Response:Hello there!"] * 4
    for name in PUBLISHED:
        said += [chat.TEMPLATES[name].system + " ### Human Assistant"] * 4
    said += ["\n##"] * 99 + ["[INST] [/INST] <<SYS>> <</SYS>> <Image></Image>"]
    inner.train_from_iterator(said, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    inner.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


PLACE = -200  # a picture's, in the release: no piece of any tokenizer


class Release:
    """LLaVA's released arithmetic over a tokenizer that puts its beginning token, if it has one, before every text."""

    def __init__(self, tokenizer, begins=True):
        self.tokenizer, self.begins = tokenizer, begins

    def __call__(self, text):
        """Pieces between pictures by themselves, a picture as one place; the beginning token once. Special tokens in a text split it."""
        ids = [BOS] * self.begins
        for i, piece in enumerate(text.split("<image>")):
            ids += [PLACE] * (i > 0)
            for part in re.split("(<s>|</s>)", piece):
                ids += {"<s>": [BOS], "</s>": [EOS], "": []}.get(part) or (
                    [] if not part else self.tokenizer(part, add_special_tokens=False)["input_ids"]
                )
        return ids

    def rounds(self, text, rounds, asked, more):
        """Of each of ``rounds`` the question, up to ``asked``, is hidden: as many labels as it has tokens by itself. ``more``: tokens behind a round
        that are not in it, where no beginning token is counted in their place."""
        ids = self(text)
        labels, at = list(ids), int(self.begins)
        labels[:at] = [-100] * at
        for said in rounds:
            question, _ = said.split(asked)
            hidden = len(self(question + asked)) - 2 * self.begins  # the beginning token, and the space that the answer takes
            labels[at : at + hidden] = [-100] * hidden
            at += len(self(said)) + more
        assert at == len(ids)  # otherwise the sample would be thrown away
        return ids, labels


def published_v1(release, system, turns):
    text = f"{system} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)
    return release.rounds(text, text.split("</s>")[:-1], " ASSISTANT: ", more=0)


def published_llama_2(release, system, turns):
    turns = [(f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    text = "".join(f"<s>[INST] {q} [/INST] {a} </s>" for q, a in turns).removeprefix("<s>")
    return release.rounds(text, text.split("</s>")[:-1], "[/INST] ", more=0)


def published_mpt(release, system, turns):
    """As of v1.0.1: no beginning token; a round's end is counted with it. The first round has the system's words."""
    text = f"<|im_start|>system\n{system}<|im_end|>"
    text += "".join(f"<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n{a}<|im_end|>" for q, a in turns)
    pieces = text.split("<|im_end|>")[:-1]
    rounds = ["<|im_end|>".join(pieces[:3])] + ["<|im_end|>".join(pieces[i : i + 2]) for i in range(3, len(pieces), 2)]
    return release.rounds(text, rounds, "<|im_end|><|im_start|>assistant\n", more=1)


def published_v0(release, system, turns):
    """The header is hidden, and of every question all but its first two tokens; lengths are those of the sentences by themselves."""
    said = [text for q, a in turns for text in (f"### Human: {q}\n", f"### Assistant: {a}\n")]
    ids = release(f"{system}\n\n" + "".join(said) + "### ")
    labels, at = list(ids), len(release(f"{system}\n\n"))
    labels[:at] = [-100] * at
    for i, sentence in enumerate(said):
        length = len(release(sentence))
        if i % 2 == 0:
            labels[at + 2 : at + length] = [-100] * (length - 2)
        at += length
    assert len(ids) - at == 3, "what is left is the last mark: two pieces of it and a space"
    return ids, labels


PUBLISHED = {
    "vicuna_v1": published_v1, "llava_v1": published_v1, "llava_v1_mmtag": published_v1, "llava_llama_2": published_llama_2,
    "llava_v0": published_v0, "llava_v0_mmtag": published_v0,
}  # fmt: skip
SPOKEN = [[("<image>\nHi.", "Hello there!")], [("<image>\nHi.", "Hello there!"), ("Who is it?", "Me.")]]


@pytest.mark.parametrize("turns", SPOKEN)
@pytest.mark.parametrize("template", PUBLISHED)
def test_token_for_token(template, turns):
    """A tokenizer that puts a space before every text gives what the published code gives, which encodes a conversation at once."""
    tokenizer = legacy_llama()
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(chat.encode(tokenizer, template, turns, image_tokens=0, image_token=PLACE)[0])
    assert tokenizer.tokenize("###") == ["\u2581###"]
    assert tokenizer.tokenize("\n###")[-2:] == ["##", "#"]
    ids, labels = chat.encode(tokenizer, template, turns, image_tokens=1, image_token=PLACE)
    tagged = [(q.replace("<image>", "<Image><image></Image>") if "mmtag" in template else q, a) for q, a in turns]
    assert (ids, labels) == PUBLISHED[template](Release(tokenizer), chat.TEMPLATES[template].system, tagged)
    wide, wide_labels = chat.encode(tokenizer, template, turns, image_tokens=256, image_token=PLACE)
    assert [i for i, x in enumerate(wide) if x == PLACE] == [i for i in range(len(wide)) if wide[i] == PLACE and wide_labels[i] == -100]
    assert wide.count(PLACE) == 256
    prompt, _ = chat.encode(tokenizer, template, [*turns[:-1], (turns[-1][0], None)], image_tokens=1, image_token=PLACE)
    assert tokenizer.convert_ids_to_tokens(prompt[-1]).endswith((":", "]"))  # what follows brings its own space
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] == ids[len(prompt)]  # and is learnt
    only = chat.Encoder(tokenizer, template, 1, PLACE, 0).answer(Record(0, "#0", turns=tuple(turns)), "Me.")
    assert only[1] == [-100] * len(prompt) + only[0][len(prompt) :]


@pytest.mark.parametrize("turns", SPOKEN)
def test_mpt_token_for_token(turns):
    """A byte-pair tokenizer as MPT's, which has a beginning token and puts it nowhere; the tokens around turns are its own."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator(
        [chat.TEMPLATES["mpt"].system + "\nHi. Hello there! Who is it? Me."] * 4,
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )  # fmt: skip
    inner.add_special_tokens([AddedToken(f"<|im_{word}|>", special=True, normalized=False) for word in ("start", "end")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    ids, labels = chat.encode(tokenizer, "mpt", turns, image_tokens=1, image_token=PLACE)
    assert (ids, labels) == published_mpt(Release(tokenizer, begins=False), chat.TEMPLATES["mpt"].system, turns)
    assert chat.last_token(tokenizer, "mpt") == tokenizer.convert_tokens_to_ids("<|im_end|>") == ids[-1] != tokenizer.eos_token_id
    # What is cut is cut: no end is put in its place.
    assert chat.encode(tokenizer, "mpt", turns, image_tokens=1, image_token=PLACE, max_length=len(ids) - 2) == (ids[:-2], labels[:-2])


def test_a_text_behind_a_word():
    """LLaMA's first tokenizer puts a space before what stands alone: that would be the first token of any text."""
    tokenizer = legacy_llama()
    alone, behind = tokenizer("!", add_special_tokens=False)["input_ids"], chat.behind_a_word(tokenizer, "!")
    assert tokenizer.convert_ids_to_tokens(behind) == ["!"]
    assert alone != behind
    assert chat.behind_a_word(tokenizer, "") == []


def test_alpaca_token_for_token():
    """The answer stands at the colon, with no space between."""
    tokenizer = legacy_llama()
    ids, labels = chat.encode(tokenizer, "alpaca", [("Add.", "Hello there!")], image_tokens=1, image_token=IMAGE)
    text = chat.TEMPLATES["alpaca"].system + "### Instruction:\nAdd.\n\n### Response:Hello there!"
    assert ids == [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    learnt = tokenizer.convert_ids_to_tokens([i for i in labels if i != -100])
    assert "".join(learnt).endswith("Hello\u2581there!</s>")
    assert not learnt[0].startswith("\u2581")


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand():
    class Slow(Speller):
        is_fast = False

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    ids, labels = chat.encode(Slow(), "vicuna_v1", TURNS, image_tokens=2, image_token=IMAGE)
    assert (ids, labels) == encode("vicuna_v1", TURNS)


def test_llama_adapters_choices_go_on_behind_the_colon():
    """``Answer: The answer is (A)``, in bytes with the space, in SentencePiece as ever; LLaVA's question ends its line, and its answer begins one."""
    from mmfast.data.formats import parse
    from tests.made import tokenizer as made

    row = {"question": "Which?", "choices": ["x", "y"], "answer": 0}
    for kind, choices, space in (("prepend", "llama_adapter", ""), ("bytes", "llava", ""), ("bytes", "llama_adapter", " ")):
        tokenizer = made(kind)
        encode = chat.Encoder(tokenizer, "bare", image_tokens=1, image_token=99_999, pad_token=0)
        record = parse(row, 0, root="", choices=choices)
        _, labels = encode.record(record)
        said = tokenizer(space + record.turns[0][1], add_special_tokens=False)["input_ids"]
        assert [label for label in labels if label != -100] == [*said, tokenizer.eos_token_id]
    alpaca = replace(encode, template="alpaca")
    assert alpaca.record(record) == alpaca(record.turns), "a template with words of its own there knows what stands between"


def test_pairs_are_stripped_where_chunks_are():
    """As documents are, and as OpenFlamingo reads LAION's captions."""
    for template, begin in (("flamingo", "<s>"), ("open_flamingo", "")):
        ids, labels = encode(template, [("<image>", " a cat\n")])
        assert (read(ids), scored(ids, labels)) == (f"{begin}@@a cat<|endofchunk|></s>", "a cat<|endofchunk|></s>")
    assert read(encode("frozen", [("<image>", " a cat\n")])[0]) == "<s>@@ a cat\n</s>"


def test_alpaca_as_published():
    """Two preambles, by whether the record has an input; the answer follows the colon with nothing between."""
    ids, labels = encode("alpaca", [("Add.", "3")])
    assert read(ids) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:3</s>"
    )
    assert scored(ids, labels) == "3</s>"
    ids, labels = encode("alpaca", [("Add.\n\n### Input:\n1 2", "3")])
    assert read(ids) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3</s>"
    )
    assert scored(ids, labels) == "3</s>"
    assert read(encode("alpaca", [("Add.", "3")], system="S")[0]).startswith("<s>S### Inst")


def test_plain_drops_the_question_and_scores_caption_and_newline():
    ids, labels = encode("plain", [("Describe it. <image>", "A cat.")], tokens=3)
    assert read(ids) == "<s>@@@A cat.\n"
    assert scored(ids, labels) == "A cat.\n"


def test_bare_packs_turns_and_ends_once():
    ids, labels = encode("bare", [("<image> a?", "y"), ("b?", "n")])
    assert read(ids) == "<s>@@ a?yb?n</s>"
    assert scored(ids, labels) == "yn</s>"


def test_an_open_prompt_is_the_conversation_up_to_the_answer():
    for template, ending in (("vicuna_v1", "USER: Who? ASSISTANT:"), ("bare", "HelloWho?")):
        prompt, labels = encode(template, [*TURNS[:1], ("Who?", None)])
        whole, _ = encode(template, TURNS)
        assert whole[: len(prompt)] == prompt
        assert read(prompt).endswith(ending)
        assert labels[-4:] == [-100] * 4


def test_truncation_counts_image_tokens_and_never_cuts_them():
    ids, labels = encode("bare", [("<image>q", "answer")], tokens=4)
    assert len(ids) == 1 + 4 + 1 + 6 + 1
    short, short_labels = encode("bare", [("<image>q", "answer")], tokens=4, max_length=8)
    assert (short, short_labels) == (ids[:8], labels[:8])
    with pytest.raises(ValueError, match=r"nothing to learn is left after the cut at max_length=4; the whole has 13 tokens"):
        encode("bare", [("<image>q", "answer")], tokens=4, max_length=4)
    with pytest.raises(ValueError, match=r"the prompt has 6 tokens with its pictures, more than max_length=5"):
        encode("bare", [("<image>q", None)], tokens=4, max_length=5)
    # A picture that would be torn goes whole: 4 of its 4 places, then 3 of the next one's.
    two = [("<image>", "a"), ("<image>", "b")]
    assert read(encode("bare", two, tokens=4, max_length=9)[0]) == "<s>@@@@a"
    assert read(encode("bare", two, tokens=4, max_length=10)[0]) == "<s>@@@@a@@@@"


def test_documents_are_supervised_but_for_their_pictures():
    ids, labels = chat.encode_document(Speller(), "a<image>bc", image_tokens=2, image_token=IMAGE)
    assert read(ids) == "<s>a@@bc</s>"
    assert scored(ids, labels) == "abc</s>"


def test_a_system_message_of_ones_own():
    ids, _ = encode("vicuna_v1", TURNS[1:], system="Be brief.")
    assert read(ids) == "<s>Be brief. USER: Who? ASSISTANT: Me.</s>"
    ids, _ = encode("bare", [("q", "a")], system="")
    assert read(ids) == "<s>qa</s>"


def test_a_tokenizer_without_a_first_token():
    class Plain(Speller):
        bos_token_id = None

    assert read(chat.encode(Plain(), "bare", [("q", "a")], image_tokens=2, image_token=IMAGE)[0]) == "qa</s>"


def test_places_of_a_picture_leave_448_of_1024():
    """A picture of 336 pixels at 14 a patch takes 576; the rest of the text falls away."""
    ids, _ = encode("bare", [("<image>q", "a" * 2000)], tokens=576, max_length=1024)
    assert len(ids) == 1024
    assert sum(i != IMAGE for i in ids) == 448


def test_unknown_template():
    with pytest.raises(ValueError, match=r"unknown template 'vicuna'.*'vicuna_v1'"):
        encode("vicuna", TURNS)


def test_rows_give_the_narrowest_batch():
    rows = chat.Rows([([1, 5, 6], [-100, 5, 6]), ([1, 7], [-100, 7]), ([1, 2, 3, 4], [-100] * 4)], pad_token=0)
    ids, labels, lengths = rows.batch(torch.tensor([1, 0]))
    assert lengths.tolist() == [2, 3]
    assert ids.tolist() == [[1, 7, 0], [1, 5, 6]]
    assert labels.tolist() == [[-100, 7, -100], [-100, 5, 6]]
    both, both_labels, _ = chat.stack([(ids, labels, lengths), rows.batch(torch.tensor([2]))], pad_token=0)
    assert both.tolist() == [[1, 7, 0, 0], [1, 5, 6, 0], [1, 2, 3, 4]]
    assert both_labels[0].tolist() == [-100, 7, -100, -100]


def test_packing_lays_rows_end_to_end():
    ids, labels, lengths = torch.tensor([[1, 7, 0], [1, 5, 6]]), torch.tensor([[-100, 7, -100], [1, 5, 6]]), torch.tensor([2, 3])
    packed = chat.lay_out(ids, labels, lengths, packing=True)
    assert packed["input_ids"].tolist() == [[1, 7, 1, 5, 6]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert packed["rows"].tolist() == [[0, 0, 1, 1, 1]]
    assert packed["labels"].tolist() == [[-100, 7, -100, 5, 6]], "nothing may be predicted across the border of two rows"
    padded = chat.lay_out(ids, labels, lengths, packing=False)
    assert "position_ids" not in padded
    assert padded["rows"].tolist() == [[0] * 3, [1] * 3]


def test_idefics_borders_are_shared_by_adjacent_pictures():
    """<fake><image><fake> for one, <fake><image><fake><image><fake> for two; borders that differ are each picture's own."""
    fake = ord("#")
    turns = [("<image><image>What? <image>", "Red"), ("And?", "No")]
    ids, labels = encode("idefics", turns, tokens=1, borders=(fake, fake))
    assert read(ids) == (
        "<s>User:#@#@#What?#@#<end_of_utterance>\nAssistant:Red<end_of_utterance>\nUser: And?<end_of_utterance>\nAssistant:No<end_of_utterance>\n"
    )
    assert scored(ids, labels) == "Red<end_of_utterance>\nNo<end_of_utterance>\n"
    short, short_labels = encode("idefics", turns, tokens=1, borders=(fake, fake), max_length=len(ids) - 20)
    assert len(short) == len(ids) - 20
    assert (read(short[-1:]), short_labels[-1]) == ("</s>", short[-1])  # an answer that is cut ends all the same
    short, short_labels = encode("idefics", turns, tokens=1, borders=(fake, fake), max_length=len(ids) - 30)
    assert (short, short_labels) == (ids[:-30], labels[:-30])  # a question that is cut teaches no end
    with pytest.raises(ValueError, match="nothing to learn is left after the cut at max_length=9"):
        encode("idefics", turns, tokens=1, borders=(fake, fake), max_length=9)
    assert read(encode("bare", [("<image><image>", "a")], tokens=1, borders=(ord("("), ord(")")))[0]) == "<s>(@)(@)a</s>"
    # A picture that is cut goes whole, and leaves the border that the one before it ends with.
    cut, _ = chat.encode_document(Speller(), "ab<image><image>", image_tokens=1, image_token=IMAGE, max_length=7, borders=(fake, fake))
    assert read(cut) == "<s>ab#@#"


E = "<E>"  # what closes a chunk, spelt


def document(template, text, monkeypatch, **kwargs):
    form = chat.TEMPLATES[template]
    monkeypatch.setitem(chat.TEMPLATES, template, replace(form, chunk=E, after=E))
    return chat.encode_document(Speller(), text, image_tokens=1, image_token=IMAGE, template=template, **kwargs)


CHUNKS = [
    # Before every picture but the first, and at the end; no space beside either token.
    ("intro <image> a b <image>c", "<s>intro@a b<E>@c<E></s>", "introa b<E>c<E></s>", "a b<E>c<E>"),
    # A document that has them is left as it is.
    ("<image>Output: red<E> <image>Output: blue<E>", "<s>@Output: red<E>@Output: blue<E></s>", "Output: red<E>Output: blue<E></s>", "Output: red<E>Output: blue<E>"),
    # What follows a chunk's end is said of no picture.
    ("<image>seen<E> unseen <image>again", "<s>@seen<E>unseen<E>@again<E></s>", "seen<E>unseen<E>again<E></s>", "seen<E>again<E>"),
    # Examples without their pictures come before.
    ("Output: a<E> Output: b<E> <image>Output: c", "<s>Output: a<E> Output: b<E>@Output: c<E></s>", "Output: a<E> Output: b<E>Output: c<E></s>", "Output: c<E>"),
    ("words alone", "<s>words alone<E></s>", "words alone<E></s>", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "whole", "flamingo", "open_flamingo"), CHUNKS)
def test_documents_of_chunks(text, whole, flamingo, open_flamingo, monkeypatch):
    """Flamingo masks pictures alone; OpenFlamingo also what precedes the first and what lies between a chunk's end and the next picture."""
    for template, expected in (("flamingo", flamingo), ("open_flamingo", open_flamingo)):
        if not expected:
            with pytest.raises(
                chat.LeftOut, match="no picture in the first 2048 tokens, and the template open_flamingo learns what is said of"
            ):
                document(template, text, monkeypatch)
            continue
        ids, labels = document(template, text, monkeypatch)
        assert read(ids) == (whole if template == "flamingo" else whole.removeprefix("<s>"))
        assert scored(ids, labels) == expected


class Beginner(Speller):
    """One that puts the beginning token before a text by itself, as LLaMA's."""

    def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
        told = super().__call__(text, False, return_offsets_mapping)
        return {"input_ids": [BOS, *told["input_ids"]]} if add_special_tokens else told


def test_open_flamingo_begins_as_its_tokenizer_does():
    """GPT-NeoX's beginning token is its end token, which nothing puts before a text; OPT's stands there and is the end token as well."""
    pair, sizes = [("<image>", "a cat")], dict(image_tokens=1, image_token=IMAGE)
    neox, opt = (type("", (kind,), {"bos_token_id": EOS})() for kind in (Speller, Speller))
    opt.__class__.__call__ = lambda self, text, add_special_tokens: {"input_ids": [*[EOS] * add_special_tokens, *map(ord, text)]}
    for tokenizer, first in ((Speller(), ""), (Beginner(), "<s>"), (neox, ""), (opt, "</s>")):
        assert read(chat.encode(tokenizer, "open_flamingo", pair, **sizes)[0]) == first + "@a cat<|endofchunk|></s>"
        ids, labels = chat.encode_document(tokenizer, "<image>a", template="open_flamingo", **sizes)
        assert read(ids) == first + "@a<|endofchunk|></s>"
        assert labels[: len(ids) - 16] == [-100] * (len(ids) - 16)
    assert read(chat.encode(neox, "flamingo", pair, **sizes)[0]) == "</s>@a cat<|endofchunk|></s>"


def test_a_pair_of_flamingo():
    ids, labels = encode("flamingo", [("<image>", "a cat")], tokens=1)
    assert read(ids) == "<s>@a cat<|endofchunk|></s>"
    assert scored(ids, labels) == "a cat<|endofchunk|></s>"
    assert encode("open_flamingo", [("<image>", "a cat")], tokens=1) == (ids[1:], labels[1:])


def test_blip2_s_soft_prompt_comes_before_the_beginning_token():
    """OPT's beginning token is learnt from the last visual place, the line's end ends a caption, and survives the cut."""
    turns = [("<image>\nwhat the recipe asks", "a dog")]
    ids, labels = encode("blip2", turns)
    assert read(ids) == "@@<s>a dog\n"
    assert scored(ids, labels) == "<s>a dog\n"
    open_ids, _ = encode("blip2", [("<image>", None)])
    assert read(open_ids) == "@@<s>"
    ids, labels = encode("blip2", turns, max_length=5)
    assert read(ids) == "@@<s>a\n"
    # With a prompt neither it nor the token before it is learnt.
    ids, labels = encode("blip2_prompt", [("<image>a photo of ", "a dog")])
    assert read(ids) == "@@<s>a photo of a dog\n"
    assert scored(ids, labels) == " a dog\n"
    assert read(encode("blip2_prompt", [("<image>a photo of", None)])[0]) == "@@<s>a photo of"
    assert chat.end_token(Speller(), "\n") == ord("\n")
    assert chat.end_token(Speller(), "two tokens") == chat.end_token(Speller()) == EOS


def test_an_encoder_s_text_ends_and_a_beginning_is_read():
    """T5 has no beginning token here either: what is read ends with an end token, or is a beginning of the text, drawn by the text."""

    class T5(Speller):
        bos_token_id = None

    def t5(template, turns, **kwargs):
        return chat.encode(T5(), template, turns, image_tokens=2, image_token=IMAGE, **kwargs)

    ids, labels = t5("blip2_t5_vqa", [("<image>Who?", "a dog")])
    assert read(ids) == "@@Question: Who? Answer:</s> a dog</s>"
    assert scored(ids, labels) == " a dog</s>"
    assert t5("blip2_t5_vqa", [("<image>Who?", None)])[0] == ids[: ids.index(EOS) + 1]
    assert read(t5("blip2_t5_caption", [("<image>whatever", "a dog")])[0]) == "@@a photo of</s> a dog</s>"
    assert read(t5("blip2_t5_prompt", [("<image>", "a dog")])[0]) == "@@</s>a dog</s>"
    assert read(t5("blip2_t5_prompt", [("<image>Hi", "a"), ("So", "b")])[0]) == "@@Hi aSo</s> b</s>"

    told = {scored(*t5("blip2_t5", [("<image>whatever", f"a dog {i:02}")])) for i in range(60)}
    assert {text[-4:] for text in told} == {"</s>"}
    lengths = {len(text.removesuffix("</s>")) for text in told}
    assert lengths == set(range(9)), "from all of it to the end token alone"
    ids, labels = t5("blip2_t5", [("<image>", "a dog")])
    assert read(ids) == "@@a dog</s>"
    assert t5("blip2_t5", [("<image>", "a dog")]) == (ids, labels)
    assert read(t5("blip2_t5", [("<image>", None)])[0]) == "@@"
    _, labels = chat.encode_document(T5(), "<image>a dog", image_tokens=2, image_token=IMAGE, template="blip2_t5")
    assert labels == t5("blip2_t5", [("<image>", "a dog")])[1]


def test_a_text_side_reads_answers_alone():
    class Whole(Speller):
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    side = chat.TextSide(Whole(), first=BOS, last=EOS, decode=9, pad_token=0, max_length=6)
    ids, labels = side([("<image>\nHi", "abc")])
    assert (ids, labels) == ([-1, BOS, *map(ord, "abc"), EOS], [-100, BOS, *map(ord, "abc"), EOS])
    assert side([("<image>", "abcdefgh")])[0] == [-1, BOS, *map(ord, "abcd"), EOS], "the last token survives the cut"
    texts, mask = side.texts(["ab", "a"])
    assert texts.tolist() == [[BOS, 97, 98, EOS], [BOS, 97, EOS, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
