"""The token boundary, on the three kinds of tokenizers and on two real ones."""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from errata import Edit, ErrataError, UsageError
from errata.tokens import Passage, Template, Tokens, encode, follow, pad_left, passage, prefix
from tests import tiny

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"


def real_gpt2() -> Any:
    if not (REAL / "gpt2").is_dir():
        pytest.skip("needs ../shared/data/tokenizers/gpt2")
    return T.GPT2TokenizerFast(vocab=str(REAL / "gpt2/vocab.json"), merges=str(REAL / "gpt2/merges.txt"))


def real_llama2() -> Any:
    if not (REAL / "llama2").is_dir():
        pytest.skip("needs ../shared/data/tokenizers/llama2")
    for needed in ("sentencepiece", "google.protobuf"):
        pytest.importorskip(needed)
    return T.LlamaTokenizerFast.from_pretrained(REAL / "llama2")


BUILDERS = {
    "bpe": tiny.bpe,
    "unigram": tiny.unigram,
    "wordpiece": tiny.wordpiece,
    "real-gpt2": real_gpt2,
    "real-llama2": real_llama2,
}


@pytest.fixture(scope="module", params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return BUILDERS[request.param]()


known = st.sampled_from(sorted({w.strip(".") for text in tiny.corpus() for w in text.split()}))
any_word = st.text(st.characters(categories=["L", "N"], max_codepoint=0x24F), min_size=1, max_size=8)
phrase = st.lists(known | any_word, min_size=1, max_size=3).map(" ".join)
edits = st.builds(
    lambda before, subject, after, target: Edit.read(
        {"prompt": f"{before}{{}}{after}", "subject": subject, "target": target}  # "It is known. It is" is one, too
    ),
    st.sampled_from(["", "The capital of ", "It is known. ", "'", "("]),
    phrase,
    st.sampled_from([" is", "'s capital is", ", whose capital is", "", " (in", ":"]),
    phrase,
)
contexts = st.sampled_from(["{}", "Yes. {}", "Today we learn. {}", "New Fact: it is.\nPrompt: {}"])
many = settings(max_examples=60, suppress_health_check=list(HealthCheck))


def encoded(tokenizer: Any, *passages: Passage) -> Tokens:
    """The batch, or the next example where the tokenizer can't write the target or merges it with the prompt."""
    try:
        return encode(tokenizer, passages)
    except ErrataError as refused:
        assume(not isinstance(refused, ErrataError))
        raise


def row(batch: Tokens, i: int = 0) -> list[int]:
    return batch.ids[i][batch.mask[i] == 1].tolist()


@many
@given(edit=edits, context=contexts)
def test_the_prompts_ids_are_a_prefix(tokenizer: Any, edit: Edit, context: str):
    """Pitfall 4: the target's tokens stand where the prompt's own tokens end, not one off."""
    whole = encoded(tokenizer, passage(edit, context, edit.target))
    prompt = row(encode(tokenizer, [passage(edit, context)]))
    assert row(whole)[: len(prompt)] == prompt
    assert whole.target[0].nonzero()[:, 0].tolist() == list(range(len(prompt), int(whole.last[0]) + 1))


@many
@given(edit=edits, context=contexts)
def test_the_targets_tokens_say_the_target(tokenizer: Any, edit: Edit, context: str):
    """Pitfall 3: and nothing but the target; no BOS among them."""
    batch = encoded(tokenizer, passage(edit, context, edit.target))
    said = tokenizer.decode(batch.wanted, clean_up_tokenization_spaces=False)
    assert "".join(said.split()) == "".join(edit.target.split())
    assert not set(batch.wanted.tolist()) & set(tokenizer.all_special_ids)


@many
@given(edit=edits, context=contexts)
def test_the_subjects_last_token_is_the_one_of_its_last_character(tokenizer: Any, edit: Edit, context: str):
    p = passage(edit, context)
    start, end = p.subject
    assert p.text[start:end] == edit.subject
    batch = encoded(tokenizer, p)
    covering = tokenizer(p.text, add_special_tokens=False)
    last = max(t for c in range(start, end) if (t := covering.char_to_token(c)) is not None)
    # A character of several byte tokens is theirs together; char_to_token names the first of them.
    spans = tokenizer(p.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = int(batch.subject[0]) - len(prefix(tokenizer))
    assert found >= last
    assert spans[found][0] < end
    assert all(a >= end or a == b for a, b in spans[found + 1 :])


@many
@given(edit=edits, context=contexts)
def test_bos_stands_in_front_once(tokenizer: Any, edit: Edit, context: str):
    start = prefix(tokenizer)
    ids = row(encoded(tokenizer, passage(edit, context, edit.target)))
    assert ids[: len(start)] == start
    assert not set(ids[len(start) :]) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


@many
@given(some=st.lists(edits, min_size=2, max_size=5), context=contexts)
def test_padding_does_not_move_what_is_read(tokenizer: Any, some: list[Edit], context: str):
    """Pitfall 2: a position means the same in a padded batch as alone."""
    passages = [passage(e, context, e.target) for e in some]
    together = encoded(tokenizer, *passages)
    for i, p in enumerate(passages):
        alone = encode(tokenizer, [p])
        n = len(row(alone))
        assert row(together, i) == row(alone)
        assert together.mask[i].tolist() == [1] * n + [0] * (together.ids.shape[1] - n)
        assert together.subject[i] == alone.subject[0]
        assert together.target[i].nonzero().tolist() == alone.target[0].nonzero().tolist()


@given(prompt=phrase, answer=phrase, gaps=st.tuples(*[st.sampled_from(["", " ", "   "])] * 2))
def test_prompt_and_answer_are_joined_by_one_space(prompt: str, answer: str, gaps: tuple[str, str]):
    """Pitfall 10: also when the prompt ends in spaces or the answer begins with them."""
    joined = follow(prompt + gaps[0], gaps[1] + answer)
    assert joined.text == f"{prompt} {answer}"
    assert joined.text[joined.target :] == f" {answer}"


@given(edit=edits, context=contexts)
def test_no_text_has_double_spaces(edit: Edit, context: str):
    """Pitfall 10."""
    values = {"prompt": f"  {edit.prompt}  ", "subject": f" {edit.subject} ", "target": f"  {edit.target}"}
    spaced = Edit.read(values)
    assert "  " not in passage(spaced, context, spaced.target).text


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("Prompt:\n", "Lima", "Prompt:\nLima"),
        ('{"country": "', "France", '{"country": "France'),
        ("The price is $", "5", "The price is $5"),
        ("<|user|>Where?<|assistant|>", "Paris", "<|user|>Where?<|assistant|>Paris"),
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("He said:", "no", "He said: no"),
    ],
)
def test_between_prompt_and_answer_stands_what_the_text_asks_for(prompt: str, answer: str, joined: str):
    assert follow(prompt, answer).text == joined


@pytest.mark.parametrize("gap", ["", " ", "\n", "  "])
def test_the_gap_of_an_edit_decides_when_it_is_given(gap: str):
    edit = Edit("The capital of {} is", "Peru", "Lima", gap=gap)
    joined = passage(edit, "Yes. {}", edit.target)
    assert joined.text == f"Yes. The capital of Peru is{gap}Lima"
    assert joined.text[joined.target :] == f"{gap}Lima"


MERGING = models.BPE({"是": 0, "巴": 1, "黎": 2, "是巴": 3, "\n": 4, ":": 5}, [("是", "巴")])


def test_where_a_token_spans_the_boundary_the_model_goes_on_from_the_prompts_own_tokens():
    """Without a space, `是` and `巴` are one token together; a model that was asked has read `是` alone."""
    made = Tokenizer(MERGING)
    made.decoder = decoders.Fuse()
    built = T.PreTrainedTokenizerFast(tokenizer_object=made)
    assert built("是巴黎")["input_ids"] == [3, 2]
    batch = encode(built, [follow("是", "巴黎"), follow("是", "黎")])
    assert [row(batch, 0), row(batch, 1)] == [[0, 1, 2], [0, 2]]
    assert [t.nonzero()[:, 0].tolist() for t in batch.target] == [[1, 2], [1]]


def test_sentencepieces_extra_piece_is_left_out_where_the_target_follows_without_a_space():
    """Alone, Llama 2 writes `▁Paris`."""
    llama2 = real_llama2()
    batch = encode(llama2, [follow("(", "Paris")])
    assert llama2.convert_ids_to_tokens(batch.wanted.tolist()) == ["Par", "is"]


# Chat

CHAT = (
    "{{ bos_token }}[system]Be kind.{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'user' %}|"
    "{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chatting(built: Any, template: str = CHAT) -> Any:
    built = copy.deepcopy(built)
    built.chat_template = template
    return built


def test_the_question_is_a_users_turn_and_the_context_stands_inside_it(tokenizer: Any):
    built = chatting(tokenizer)
    edit = Edit("The capital of {} is", "Peru", "Lima", chat=True)
    batch = encode(built, [passage(edit, "Yes. {}", edit.target), passage(edit)])
    turn = {"role": "user", "content": "Yes. The capital of Peru is"}
    read = built.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
    assert row(batch)[: len(read)] == list(read)
    assert batch.target[0].nonzero()[:, 0].tolist() == list(range(len(read), len(row(batch))))
    assert "".join(built.decode(batch.wanted).split()) == "Lima"
    assert built.decode(row(batch)[: int(batch.subject[0]) + 1]).rstrip().endswith("Peru")


def test_a_template_that_writes_bos_gives_one_and_one_that_does_not_gives_none():
    built = tiny.unigram()
    question = Passage("Lima is", chat=True)
    bare = CHAT.removeprefix("{{ bos_token }}")
    starts = [row(encode(chatting(built, t), [question])).count(built.bos_token_id) for t in (CHAT, bare)]
    assert starts == [1, 0]  # as apply_chat_template has it
    plain = encode(built, [Passage("<s>Lima is"), Passage("Lima is")])
    assert row(plain, 0) == row(plain, 1)
    assert [r.count(built.bos_token_id) for r in (row(plain, 0), row(plain, 1))] == [1, 1]
    left = pad_left(built, ["<s>Lima is"])["input_ids"][0].tolist()
    assert left == row(plain, 0)


@pytest.mark.parametrize(
    ("reply", "gap"),
    [("[assistant]{{ m.content }}", ""), ("[assistant] {{ m.content }}", " "), ("{{ m.content }}", "")],
)
def test_the_template_says_what_stands_before_the_reply(reply: str, gap: str):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% else %}" + reply + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    built = chatting(tiny.bpe(), template)
    assert Template.of(built) == Template("[user]", "[assistant]", gap)
    edit = Edit("Where is {}?", "Peru", "Lima", chat=True)
    assert (
        built.decode(row(encode(built, [passage(edit, answer="Lima")]))) == f"[user]Where is Peru?[assistant]{gap}Lima"
    )
    edit = replace(edit, gap="\n")
    assert built.decode(row(encode(built, [passage(edit, answer="Lima")]))) == "[user]Where is Peru?[assistant]\nLima"


def test_a_chat_without_a_template_is_refused_and_so_is_what_the_template_refuses():
    with pytest.raises(UsageError, match="no chat template; leave chat out"):
        encode(tiny.bpe(), [Passage("a", chat=True)])
    for template, why in (("{{ raise_exception('no users') }}", "no users"), ("hello", "does not quote a user's turn")):
        with pytest.raises(ErrataError, match=why):
            encode(chatting(tiny.bpe(), template), [Passage("a", chat=True)])


def test_plain_and_chat_go_in_one_batch(tokenizer: Any):
    built = chatting(tokenizer)
    plain, chat = Passage("Peru is"), Passage("Peru is", chat=True)
    together = encode(built, [plain, chat])
    assert [row(together, 0), row(together, 1)] == [row(encode(built, [p])) for p in (plain, chat)]


def test_reads_are_the_positions_that_predict_the_target(tokenizer: Any):
    batch = encode(tokenizer, [passage(e, "{}", e.target) for e in tiny.EDITS])
    rows, cols = batch.reads
    assert torch.equal(batch.ids[rows, cols + 1], batch.wanted)
    firsts = [len(row(encode(tokenizer, [passage(e)]))) - 1 for e in tiny.EDITS]
    assert [int(cols[rows == i].min()) for i in range(3)] == firsts


def test_rows_of_a_batch_can_be_picked(tokenizer: Any):
    batch = encode(tokenizer, [passage(e, "{}", e.target) for e in tiny.EDITS])
    picked = batch[torch.tensor([2, 0])]
    assert row(picked, 0) == row(batch, 2)
    assert picked.subject.tolist() == [batch.subject[2], batch.subject[0]]


@many
@given(prompts=st.lists(phrase, min_size=1, max_size=4))
def test_generation_pads_on_the_left(tokenizer: Any, prompts: list[str]):
    found = pad_left(tokenizer, prompts)
    for ids, mask, text in zip(found["input_ids"], found["attention_mask"], prompts, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - n) + [1] * n
        assert ids[-n:].tolist() == row(encode(tokenizer, [Passage(text)]))


@example("日本")
@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=3))
def test_a_target_that_does_not_come_back_is_refused(target: str):
    for built in (tiny.unigram(), tiny.wordpiece()):
        with pytest.raises(UsageError, match=f"writes the target {target!r} as .*; choose a target"):
            encode(built, [follow("The capital is", target)])


def normalised(normaliser: Any) -> Any:
    built = copy.deepcopy(tiny.bpe())
    built.backend_tokenizer.normalizer = normaliser
    return built


@pytest.mark.parametrize(
    ("normaliser", "target"),
    [
        (normalizers.NFC(), unicodedata.normalize("NFD", "São Tomé")),
        (normalizers.NFD(), unicodedata.normalize("NFC", "São Tomé")),
        (normalizers.Lowercase(), "Paris"),
        (normalizers.BertNormalizer(lowercase=True), "São Tomé"),
    ],
    ids=["NFC", "NFD", "uncased", "uncased without accents"],
)
def test_a_target_is_written_as_the_tokenizer_writes_all_text(normaliser: Any, target: str):
    built = normalised(normaliser)
    batch = encode(built, [follow("It is", target)])
    assert built.decode(batch.wanted).strip() == normaliser.normalize_str(target)


def test_a_normaliser_that_rewrites_the_target_is_noticed():
    with pytest.raises(UsageError, match="'fi' ?; choose|as 'fi"):
        encode(tiny.unigram(), [follow("The capital is", "ﬁ")])


def test_a_tokenizer_that_merges_prompt_and_target_is_refused():
    greedy = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")]))
    for without in ((), (("a ", "b"),)):
        merges = [m for m in (("a", " "), ("a ", "b")) if m not in without]
        greedy.model = models.BPE({"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}, merges)
        with pytest.raises(ErrataError, match="merges the end of the prompt 'a' with the target 'b'"):
            encode(T.PreTrainedTokenizerFast(tokenizer_object=greedy), [follow("a", "b")])


def test_a_text_longer_than_the_context_is_refused_with_both_lengths():
    with pytest.raises(UsageError, match=r"has 10 tokens, the model reads 8; shorten it"):
        encode(tiny.bpe(), [Passage("yes"), Passage("is is is is is is is is is")], limit=8)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    with pytest.raises(ErrataError, match="Slow can't tell which characters a token covers"):
        encode(Slow(), [Passage("a")])


def test_the_tokenizer_is_left_as_it_was(tokenizer: Any):
    before = (
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.pad_token,
        tokenizer.backend_tokenizer.to_str(),
    )
    pad_left(tokenizer, ["Peru is", "yes"])
    after = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str()
    assert after == before


def test_sentencepieces_extra_piece_is_not_the_targets():
    """Pitfall 4, by its own example: alone, " London" has a piece more than in its sentence."""
    llama2 = real_llama2()
    batch = encode(llama2, [follow("She was born in", "London")])
    assert llama2.convert_ids_to_tokens(batch.wanted.tolist()) == ["▁London"]
