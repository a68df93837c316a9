"""Any tokenizer, any template: prompt and answer have the whole text's tokens, or a refusal."""

import json
import re
from pathlib import Path

import pytest
import trl
from conftest import BOS, EOS, PAD, make_model, make_tokenizer, read_demo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from rlhf.data.format import PromptFormat, tokenize_pairs, tokenize_prompt
from rlhf.data.rows import BadRow, Pair
from rlhf.engine.tokenizers import check_vocabulary, load_tokenizer
from rlhf.runs.errors import UserError

TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")
)
ONE = (("user", "Why is grass green?"),)
THREE = (*ONE, ("assistant", "Chlorophyll is."), ("user", "And moss, “too”?"))
WITH_SYSTEM = (("system", "Answer in one sentence."), *ONE)
ANSWER = "It holds the same pigment: (a) chlorophyll,\nand 2 more."


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


# ---------------------------------------------------------------- kinds of tokenizers


def sentencepiece_like():
    """BPE over texts with U+2581 for a space, and bytes for what it has no piece for."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    texts = [row["prompt"] + row["chosen"] for row in read_demo("train")]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    built = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    built.add_special_tokens(special[:3])
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", built.token_to_id("<s>"))]
    )
    return built


def save(built, folder, tokenizer_class="PreTrainedTokenizerFast", **config):
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": tokenizer_class,
    }
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))


def byte_level(folder):
    make_tokenizer().save_pretrained(folder)


def byte_level_without_bos(folder):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(folder)


def byte_level_with_a_space_before(folder):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(folder)


def llama_2(folder):
    save(sentencepiece_like(), folder, "LlamaTokenizer", legacy=True, add_bos_token=True)


def prepended(folder):
    built = sentencepiece_like()
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    save(built, folder)


def metaspace_first(folder):
    built = sentencepiece_like()
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    save(built, folder)


KINDS = (
    byte_level,
    byte_level_without_bos,
    byte_level_with_a_space_before,
    llama_2,
    prepended,
    metaspace_first,
)


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind.__name__)
        kind(folders[kind])
    return folders


def saved_by(form, folder):
    form.tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- our own format


@pytest.mark.parametrize("kind", KINDS)
def test_hh_is_the_tokens_of_the_whole_text(kinds, kind, tmp_path):
    form = PromptFormat("hh", load_tokenizer(str(kinds[kind])))
    form.check()
    plain = AutoTokenizer.from_pretrained(kinds[kind])
    saved = saved_by(form, tmp_path / "saved")
    bos = plain.bos_token_id
    for turns in (ONE, THREE, WITH_SYSTEM):
        prompt = form.prompt_ids(turns)
        answer = form.response_ids(ANSWER)
        text = form.prompt_text(turns) + " " + ANSWER
        assert prompt + answer == plain(text)["input_ids"]
        assert prompt.count(bos) == (kind is not byte_level_without_bos)
        assert (
            saved.apply_chat_template(
                messages(turns), add_generation_prompt=True, return_dict=False
            )
            == prompt
        )
        assert form.decode(answer) == ANSWER
    again = PromptFormat("hh", load_tokenizer(str(tmp_path / "saved")))
    assert again.prompt_ids(THREE) + again.response_ids(ANSWER) == form.prompt_ids(
        THREE
    ) + form.response_ids(ANSWER)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_goes_on_gets_no_space(kinds, kind):
    form = PromptFormat("hh", load_tokenizer(str(kinds[kind])))
    start = form.whole_ids("So it")
    decode = form.tokenizer.decode
    assert (
        decode(start + form.encode("self is."), skip_special_tokens=True).lstrip()
        == "So itself is."
    )
    assert decode(start + form.encode(" is."), skip_special_tokens=True).lstrip() == "So it is."


texts = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)


@pytest.mark.parametrize("name", ["hh", "model"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(question=texts, answer=texts)
def test_any_pair_is_the_tokens_of_its_whole_text_or_dropped(kinds, kind, name, question, answer):
    tokenizer = load_tokenizer(str(kinds[kind]))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% "
        "endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    form = PromptFormat(name, tokenizer)
    form.checked = True  # that is another test's
    pairs = [Pair((("user", question),), answer, answer + "!"), Pair(ONE, "Because.", "No.")]
    bos = (
        AutoTokenizer.from_pretrained(kinds[kind]).bos_token
        if name == "hh" and form.bos_ids
        else ""
    )
    for tokens in tokenize_pairs(pairs, form, 400, "pairs"):
        text = bos + form.prompt_text(tokens.pair.turns) + form.response_text(tokens.pair.chosen)
        if name == "model" or not form.bos_ids:
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            whole = tokenizer(text.removeprefix(bos))["input_ids"]
        assert tokens.prompt_ids + tokens.chosen_ids == [*whole, tokenizer.eos_token_id]


def begins_with(tokenizer, template):
    """Have a tokenizer write these special tokens around a text."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (PAD, BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )


@pytest.mark.parametrize(
    ("template", "bos", "says"),
    [
        (f"{BOS} $A", None, "begins a text with '<bos>', but its bos_token is None"),
        (f"{BOS} $A", PAD, "begins a text with '<bos>', but its bos_token is '<pad>'"),
        (f"{BOS} {PAD} $A", BOS, "begins a text with '<bos><pad>', but its bos_token is '<bos>'"),
    ],
)
def test_a_prompt_never_loses_what_the_tokenizer_puts_first(tokenizer, template, bos, says):
    begins_with(tokenizer, template)
    tokenizer.bos_token = bos
    with pytest.raises(UserError, match=says) as error:
        PromptFormat("hh", tokenizer).check()
    assert "\n" not in str(error.value)


def test_what_the_tokenizer_puts_last_is_no_beginning(tokenizer):
    """Even if it is the token that would be BOS."""
    begins_with(tokenizer, f"$A {EOS}")
    tokenizer.bos_token = EOS
    form = PromptFormat("hh", tokenizer)
    form.check()
    assert form.bos_ids == []
    begins_with(tokenizer, f"{BOS} $A {EOS}")
    tokenizer.bos_token = BOS
    form = PromptFormat("hh", tokenizer)
    form.check()
    assert form.bos_ids == form.prompt_ids(ONE)[:1] == [tokenizer.bos_token_id]


def test_a_tokenizer_that_joins_prompt_and_answer_loses_the_row_and_says_so(tokenizer, capsys):
    """`](` is one token of it; an answer starting with the bracket could not follow its prompt."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("](", normalized=False)])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    pairs = [Pair(ONE, "(a) It is.", "No."), Pair(ONE, "It is.", "No.")]
    kept = tokenize_pairs(pairs, PromptFormat("model", tokenizer), 200, "train")
    assert [tokens.pair for tokens in kept] == pairs[1:]
    assert (
        "1 a token would span the end of the prompt and the start of the answer"
        in capsys.readouterr().out
    )


# ---------------------------------------------------------------- the base's template


def with_template(folder, template):
    """A tokenizer that has every special token that a template writes."""
    tokenizer = load_tokenizer(str(folder))
    written = re.findall(
        r"<[a-z_]+\|>|<\|[a-z_]+>|<\|[^|>'\"]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>", template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(written))})
    tokenizer.chat_template = template
    return tokenizer


def assert_right_or_refused(folder, template, scratch):
    """The identities, beside what template and tokenizer make of dialogues; True if accepted."""
    plain = with_template(folder, template)
    try:
        form = PromptFormat("model", with_template(folder, template))
        form.check()
    except UserError as error:
        assert str(error).startswith("--prompt-format model: ") and "\n" not in str(error)
        return False
    saved = saved_by(form, scratch / "saved")
    for turns in (ONE, THREE, WITH_SYSTEM):
        try:
            (tokens,) = tokenize_pairs([Pair(turns, ANSWER, "No.")], form, 9000, "pairs")
        except UserError as dropped:
            assert re.search("1 (the base's chat template|a token would span)", str(dropped))
            continue
        prompt = tokens.prompt_ids
        ids = tokens.prompt_ids + tokens.chosen_ids
        rendered = form.prompt_text(turns)
        assert all(text in rendered for _, text in turns)
        assert (
            saved.apply_chat_template(
                messages(turns), add_generation_prompt=True, return_dict=False
            )
            == prompt
        )
        assert prompt[:2] != [plain.bos_token_id] * 2
        whole = [*messages(turns), {"role": "assistant", "content": ANSWER}]
        text = saved.apply_chat_template(whole, tokenize=False)
        assert plain(text, add_special_tokens=False)["input_ids"][: len(ids)] == ids
        end = plain.convert_ids_to_tokens(form.eos_token_id)
        assert text[text.rindex(ANSWER) + len(ANSWER) :].lstrip().startswith(end)
        assert form.decode(ids[len(prompt) : -1]) == ANSWER
    return True


@pytest.mark.parametrize("number", range(len(TEMPLATES)), ids=[path.stem for path in TEMPLATES])
def test_a_known_template_is_right_or_refused(kinds, number, tmp_path):
    kind = KINDS[number % len(KINDS)]
    assert_right_or_refused(kinds[kind], TEMPLATES[number].read_text(encoding="utf-8"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", KINDS)
def test_a_known_template_is_right_or_refused_with_any_tokenizer(kinds, kind, path, tmp_path):
    assert_right_or_refused(kinds[kind], path.read_text(encoding="utf-8"), tmp_path)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("llama3_2", True),
        ("qwen2_5", True),
        ("qwen3", True),
        ("gemma", True),
        ("phi3", True),
        ("glm4moe", False),
    ]
    + [
        ("smolvlm", False),
        ("llava_next", False),
        ("deepseek_r1_distill", False),
        ("gptoss", False),
    ],
)
def test_which_templates_are_accepted(kinds, name, accepted, tmp_path):
    template = next(path for path in TEMPLATES if path.stem == name).read_text(encoding="utf-8")
    assert assert_right_or_refused(kinds[byte_level], template, tmp_path) == accepted


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_takes_a_plain_template(kinds, kind, tmp_path):
    """Also one that puts a space before an answer's end, and special tokens within a prompt."""
    template = (
        "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content }} {{ eos_token "
        "}}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"
    assert assert_right_or_refused(kinds[kind], template, tmp_path)


@st.composite
def templates(draw):
    """A chat template of features that bases' templates have."""
    often = st.booleans() | st.just(True)  # the feature that most templates have
    bos = (
        "{{ bos_token }}"
        if draw(often)
        else draw(st.sampled_from(["", "{{ bos_token + bos_token }}"]))
    )
    date = draw(
        st.sampled_from(["", "{{ strftime_now('%d %b %Y') }}\n", "{{ date_string or 'today' }}\n"])
    )
    system = draw(st.sampled_from(["keep", "drop", "raise"]))
    plain = draw(st.sampled_from(["m.content", "m.content | trim", "m['content']"]))
    content = (
        plain if draw(often) else draw(st.sampled_from(["m.content[0].text", "m.content | upper"]))
    )
    start = draw(st.sampled_from(["[{{ m.role }}]", "<|h|>{{ m.role }}\n", "<|{{ m.role }}|>"]))
    space = draw(st.sampled_from(["", " ", "\n\n"]))
    token = draw(st.sampled_from(["{{ eos_token }}", " {{ eos_token }}", "<|e|>\n", "<|e|>"]))
    end = token if draw(often) else draw(st.sampled_from(["[end]", ""]))
    usual = start.replace("{{ m.role }}", "assistant") + space
    cue = usual if draw(often) else draw(st.sampled_from([usual.rstrip(), "", "<think>\n"]))
    written = f"{start}{space}{{{{ {content} }}}}{end}"
    if draw(st.booleans()):
        written = (
            "{% if m.role == 'assistant' %}{% generation %}" + written + "{% endgeneration %}"
            "{% else %}" + written + "{% endif %}"
        )
    refuse = "{{ raise_exception('no system') }}"
    if system != "keep":
        written = (
            "{% if m.role == 'system' %}"
            + (refuse if system == "raise" else "")
            + "{% else %}"
            + written
        )
        written += "{% endif %}"
    return (
        bos + date + "{% for m in messages %}" + written + "{% endfor %}"
        "{% if add_generation_prompt %}" + cue + "{% endif %}"
    )


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(template=templates(), kind=st.sampled_from(KINDS))
def test_any_template_is_right_or_refused(kinds, tmp_path_factory, template, kind):
    assert_right_or_refused(kinds[kind], template, tmp_path_factory.mktemp("template"))


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
CUE = "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PLAIN, "puts '[assistant]' before an answer but not at the end of a prompt"),
        (
            PLAIN.replace("m.content", "m.content[0].text") + CUE,
            "it wants content as a list of parts",
        ),
        (
            PLAIN.replace("{{ eos_token }}", "</e>") + CUE,
            "ends an answer with '</e>', which is no special token",
        ),
        (PLAIN.replace("{{ eos_token }}", "") + CUE, "ends an answer with nothing"),
        (PLAIN.replace("{{ eos_token }}", PAD) + CUE, "is also the token to pad with"),
        (
            PLAIN + CUE.replace("]{", "]<think>{"),
            "starts an answer with '[assistant]<think>' only when",
        ),
        ("{{ bos_token }}" * 2 + PLAIN + CUE, "BOS twice"),
        ("{{ bos_token }}", "leaves out what the user says"),
        ("{% for m in messages %}", "refuses it"),
        (PLAIN.replace("messages", "messages[-1:]") + CUE, "leaves out earlier turns"),
        ({"rag": PLAIN, "tool_use": PLAIN}, "the chat templates rag, tool_use and no default"),
    ],
)
def test_a_template_is_refused_for_what_is_wrong_with_it(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        tokenize_prompt(ONE, PromptFormat("model", tokenizer), 100)
    assert "use --prompt-format hh" in str(error.value) and "\n" not in str(error.value)


def test_an_answer_ends_as_the_template_ends_it(kinds, capsys):
    template = PLAIN.replace("{{ eos_token }}", "<|turn_end|>\n") + CUE
    form = PromptFormat("model", with_template(kinds[byte_level], template))
    (tokens,) = tokenize_pairs([Pair(ONE, "It is.", "No.")], form, 100, "train")
    for ids in (tokens.chosen_ids, tokens.rejected_ids):
        assert form.tokenizer.convert_ids_to_tokens(ids[-1]) == "<|turn_end|>"
    assert capsys.readouterr().out.count("An answer ends with <|turn_end|>") == 1
    tokenize_pairs([Pair(ONE, "It is.", "No.")], form, 100, "test")
    assert "An answer ends" not in capsys.readouterr().out


def test_a_row_whose_text_the_template_loses_is_dropped_and_counted(tokenizer, capsys):
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ "
        "m.content.split('</think>')[-1] }}"
        "{{ eos_token }}{% endfor %}" + CUE
    )
    form = PromptFormat("model", tokenizer)
    thought = (*ONE, ("assistant", "Hm.</think>So."), ("user", "And?"))
    pairs = [Pair(turns, "It is.", "No.") for turns in (ONE, WITH_SYSTEM, thought)]
    assert [tokens.pair for tokens in tokenize_pairs(pairs, form, 200, "train")] == pairs[:1]
    said = capsys.readouterr().out
    assert "1 the base's chat template leaves out or changes the system's text" in said
    assert "1 the base's chat template leaves out or changes the assistant's text" in said


def test_an_answer_that_the_template_would_write_differently_is_dropped(tokenizer, capsys):
    """Some templates give each answer an empty thought, unless it has one of its own."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ "
        "m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "{{ eos_token }}{% endfor %}" + CUE
    )
    form = PromptFormat("model", tokenizer)
    pairs = [Pair(ONE, "It is.", "No."), Pair(ONE, "Hm.</think>It is.", "No.")]
    assert [tokens.pair for tokens in tokenize_pairs(pairs, form, 200, "train")] == pairs[:1]
    assert "1 the base's chat template writes this answer differently" in capsys.readouterr().out


def test_an_answer_that_spells_its_end_is_dropped_and_counted(form, capsys):
    pairs = [
        Pair(ONE, f"It is.{EOS}", "No."),
        Pair(ONE, "It is.", f"No.{EOS} x"),
        Pair(ONE, "It is.", "No."),
    ]
    assert [tokens.pair for tokens in tokenize_pairs(pairs, form, 200, "train")] == pairs[2:]
    assert (
        "dropped 2 (2 answer that spells a special token, such as <eos>)" in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match=r"no row of train can be used: dropped 2 \(2 answer that spells .*<eos>\)"
    ):
        tokenize_pairs(pairs[:2], form, 200, "train")


# ---------------------------------------------------------------- the tokenizer itself


def spare(folder, pad=None, template=None, **special):
    """A byte-level tokenizer with these special tokens in the place of PAD, BOS and EOS."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in zip((PAD, BOS, EOS), special.pop("tokens"), strict=True):
        text = text.replace(json.dumps(old), json.dumps(new))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template,
        "pad_token": pad,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_any_special_token_that_nothing_writes_pads(tmp_path):
    end = "<|end_of_file|>"
    tokens = ("<|a_pad|>", "<|other|>", end)
    folder = spare(tmp_path, tokens=tokens, eos_token=end, bos_token=end, unk_token=end)
    assert load_tokenizer(folder).pad_token == "<|a_pad|>"
    folder = spare(
        tmp_path, pad=end, tokens=("<|b|>", "<|a|>", end), eos_token=end, bos_token="<|b|>"
    )
    assert load_tokenizer(folder).pad_token == "<|a|>"
    folder = spare(
        tmp_path, tokens=("<|b|>", "<|a|>", end), eos_token=end, template="<|b|>{{ messages }}"
    )
    assert load_tokenizer(folder).pad_token == "<|a|>"
    folder = spare(
        tmp_path, tokens=("<|b|>", "<|a|>", end), eos_token=end, template="<|b|><|a|>{{ messages }}"
    )
    with pytest.raises(UserError, match="has no token to pad with but EOS"):
        load_tokenizer(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    folder = make_model(tmp_path / "model")
    base = {"model": str(folder), "revision": None}
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<filler_{n}>" for n in range(448 - len(tokenizer))])
    check_vocabulary(tokenizer, base)
    tokenizer.add_tokens(["<beyond>"])
    with pytest.raises(
        UserError,
        match=r"1 tokens more than .* embeddings \(448; the first is '<beyond>', id 448\)",
    ):
        check_vocabulary(tokenizer, base)


def test_a_tokenizer_without_tokenizer_json_is_refused(form):
    class Slow:
        pad_token_id = 0
        eos_token = EOS
        bos_token_id = None
        added_tokens_decoder = {}

        def __call__(self, text, **_):
            return {"input_ids": []}

    with pytest.raises(UserError, match="has no tokenizer.json"):
        PromptFormat("hh", Slow())


# ---------------------------------------------------------------- cutting


def test_cutting_a_long_dialogue_takes_time_linear_in_its_length(form, monkeypatch):
    """Counted in characters that are tokenised, as a clock would depend on the machine."""
    seen = []
    whole_ids = PromptFormat.whole_ids
    monkeypatch.setattr(
        PromptFormat,
        "whole_ids",
        lambda self, text: seen.append(len(text)) or whole_ids(self, text),
    )
    form.check()
    for count in (10, 1000):
        turns = (
            ("system", "Be kind."),
            *(("user", f"Question {n}?") for n in range(count)),
            ("user", "Well?"),
        )
        seen.clear()
        ids = tokenize_prompt(turns, form, 60)
        assert form.tokenizer.decode(ids).endswith("\n\nHuman: Well?\n\nAssistant:")
        length = len(form.prompt_text(turns))
        assert sum(seen) < length + 1500


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), limit=st.integers(10, 150))
def test_a_cut_keeps_as_many_turns_as_fit(form, lengths, limit):
    turns = tuple(("user", "a" * length) for length in lengths)
    fitting = [
        turns[start:] for start in range(len(turns)) if len(form.prompt_ids(turns[start:])) <= limit
    ]
    if fitting:
        assert tokenize_prompt(turns, form, limit) == form.prompt_ids(fitting[0])
    else:
        with pytest.raises(BadRow, match="prompt too long"):
            tokenize_prompt(turns, form, limit)
