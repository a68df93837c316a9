"""The step that writes a token: against transformers, and whether a CUDA graph can hold it."""

import pytest
import torch
from conftest import count_host_reads, make_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import rlhf.engine.decoding
from rlhf.engine.attention import _attend_by_products, _attend_fused
from rlhf.engine.base import base_facts
from rlhf.engine.decoder import Decoder, MergedLayers, lay_out
from rlhf.engine.decoding import Decoding, invert, row_bucket, sample_tokens
from rlhf.engine.generation import Response, _uniforms, generate, prepare, stream
from rlhf.engine.graphs import Graphs
from rlhf.engine.loading import load_base
from rlhf.engine.roles import REFERENCE, SharedBase

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = {"base": [], "policy": ["sft", "policy"]}
CPU = torch.device("cpu")


def with_adapters(model):
    """An `sft` adapter on all layers, a `policy` on the upper half."""
    torch.manual_seed(0)
    layers = model.config.num_hidden_layers
    peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS), adapter_name="sft"
    )
    upper = list(range(layers // 2, layers))
    peft.add_adapter(
        "policy", LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, layers_to_transform=upper)
    )
    for name, weight in peft.named_parameters():
        if "lora_" in name and not weight.is_meta:
            torch.nn.init.normal_(weight, std=0.05)
    peft.base_model.set_adapter(["sft", "policy"])
    return peft.eval()


def decoder_of(peft) -> Decoder:
    decoder = Decoder(peft.get_base_model())
    decoder.stack(ROLES)
    return decoder


def random_prompts(count: int, vocabulary: int, longest: int = 40) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=random).sort().values.tolist()
    return [torch.randint(3, vocabulary, (n,), generator=random).tolist() for n in lengths]


def begin(
    decoder, prompts, new, temperature=0.7, lag=0, role="policy", layers=None, graphs=None
) -> Decoding:
    draws = torch.stack([_uniforms((7, i), new) for i in range(len(prompts))])
    longest = max(map(len, prompts))
    layers = decoder.layers if layers is None else layers
    decoding = Decoding(
        decoder, role, layers, len(prompts), longest, new, temperature, graphs or Graphs(False), lag
    )
    with torch.no_grad():
        decoding.read(prompts, draws, 100)
    return decoding


# ---------------------------------------------------------------- against a plain reference


@pytest.fixture(scope="module", params=["tied", "untied", "one key head"])
def peft(request, tiny_model):
    if request.param == "tied":
        return with_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    torch.manual_seed(3)
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 1 if request.param == "one key head" else 4,
    }
    config = LlamaConfig(
        vocab_size=300,  # no multiple of the blocks that are summed
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **heads,
    )
    return with_adapters(LlamaForCausalLM(config))


def check_against_reference(peft, monkeypatch, prompts, new, temperature, merged, form):
    """Teacher-forced: logits within 1e-5 of their scale, tokens those of the reference's CDF."""
    seen = []

    def watched(logits, temperature, draws):
        seen.append(logits.clone())
        return sample_tokens(logits, temperature, draws)

    monkeypatch.setattr(rlhf.engine.decoding, "sample_tokens", watched)
    decoder = decoder_of(peft)
    layers = MergedLayers(decoder, "policy", 2).layers if merged else None
    decoding = begin(decoder, prompts, new, temperature, layers=layers)
    places = []
    logits = [[] for _ in prompts]
    written = {}
    for row, token, _ in stream(decoding, form):
        if len(places) < len(seen):  # this step's rows, before any of them leaves
            places.append(decoding.places.tolist())
            for line, place in enumerate(places[-1]):
                if place < len(prompts):
                    logits[place].append(seen[-1][line])
        written.setdefault(row, []).append(token)
    assert sorted(written) == list(range(len(prompts)))

    odd = tokens = 0
    for i, prompt in enumerate(prompts):
        ids = written[i]
        tokens += len(ids)
        with torch.no_grad():
            expected = peft(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        ours = torch.stack(logits[i][: len(ids)])
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
        if temperature == 0:
            best = expected.topk(2).values
            odd += (
                ((expected.argmax(-1) != torch.tensor(ids)) & (best[:, 0] - best[:, 1] > 1e-5))
                .sum()
                .item()
            )
            continue
        cdf = torch.softmax(expected.double() / temperature, -1).cumsum(-1)
        draws = _uniforms((7, i), new)[: len(ids)]
        low = (
            torch.cat([torch.zeros(len(ids), 1), cdf], 1)
            .gather(1, torch.tensor(ids)[:, None])
            .squeeze(1)
        )
        high = cdf.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert ((low - 1e-6 <= draws) & (draws <= high + 1e-6)).all()
        odd += ((draws < low) | (draws >= high)).sum().item()
    assert odd <= tokens / 1000
    return tokens


@pytest.mark.parametrize("merged", [False, True], ids=["adapters", "merged"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_step_against_transformers(peft, monkeypatch, form, temperature, merged):
    form.eos_token_id = 5
    form.stop_text = None  # rare: rows end late and apart, so the shape shrinks
    prompts = random_prompts(13, 290, 40)  # across the border of the first width
    assert check_against_reference(peft, monkeypatch, prompts, 24, temperature, merged, form) > 100


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_step_against_transformers_on_200_prompts(peft, monkeypatch, form, temperature):
    form.eos_token_id = 5
    form.stop_text = None
    prompts = random_prompts(200, 290, 120)
    assert check_against_reference(peft, monkeypatch, prompts, 40, temperature, False, form) > 4000


def test_both_ways_to_attend_are_the_same():
    torch.manual_seed(0)
    query = torch.randn(3, 6, 8)
    key = torch.randn(3, 2, 5, 8)
    value = torch.randn(3, 2, 5, 8)
    mask = torch.zeros(3, 1, 1, 5)
    mask[1, ..., 2:] = -torch.inf
    plain = torch.empty(3, 6, 8)
    for row in range(3):
        for head in range(6):
            weights = (key[row, head // 3] @ query[row, head] * 0.3 + mask[row, 0, 0]).softmax(-1)
            plain[row, head] = weights @ value[row, head // 3]
    for attend in (_attend_by_products, _attend_fused):
        torch.testing.assert_close(attend(query, key, value, mask, 0.3), plain.flatten(1))


@pytest.mark.parametrize("lag", [1, 3, 30])
def test_looking_late_changes_nothing(tiny_model, form, lag):
    """A response may end, by EOS or by a stop text, long before the CPU sees it."""
    decoder = decoder_of(
        with_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    )
    prompts = random_prompts(11, 290)
    whole = {
        row: response for row, _, response in stream(begin(decoder, prompts, 20), form) if response
    }
    common = max(whole[0].ids, key=whole[0].ids.count)
    form.eos_token_id = common
    form.stop_text = form.tokenizer.decode(whole[1].ids[3:5])
    at_once = list(stream(begin(decoder, prompts, 20), form))
    late = list(stream(begin(decoder, prompts, 20, lag=lag), form))
    assert {response.ended_by for *_, response in at_once if response} >= {"eos", "stop_text"}
    assert late == at_once


def test_a_stream_gives_each_token_and_at_the_end_the_response(shared_base, form):
    shared = shared_base
    prompt = form.prompt_ids((("user", "Hi"),))
    (response,) = generate(shared, "reference", form, [prompt], 6, 1.0, [3], 1)
    from rlhf.engine.generation import start

    events = list(stream(start(shared, "reference", [prompt], [3], 6, 1.0), form))
    assert [token for _, token, _ in events] == response.ids
    assert [end for *_, end in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1][2] == Response(response.ids, response.text_ids, response.ended_by)


@pytest.fixture
def shared_base(trained, tiny_model):
    base = base_facts(str(tiny_model), None, load_in_4bit=False)
    return SharedBase(
        load_base(base, torch.float32, pad_token_id=0), str(trained.sft), torch.float32
    )


def test_the_log_probability_of_each_sampled_token(shared_base, form):
    prompts = [form.prompt_ids((("user", text),)) for text in ("Hi", "What is it, and why?", "x")]
    for temperature in (0.7, 1.0):
        for prompt, response in zip(
            prompts,
            generate(shared_base, "reference", form, prompts, 9, temperature, [1, 2, 3], 2),
            strict=True,
        ):
            texts = lay_out([prompt + response.ids], CPU)
            hidden = shared_base.upper(shared_base.lower(texts), texts, "reference")[
                len(prompt) - 1 : -1
            ]
            logits = hidden @ shared_base.lm_head_weight().T / temperature
            expected = (
                logits.log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None]).squeeze(1)
            )
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)
    assert all(
        r.logprobs == ()
        for r in generate(shared_base, "reference", form, prompts, 4, 0, [0] * 3, 3)
    )


# ---------------------------------------------------------------- merged weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_summed_in_float32_and_rounded_once(tiny_model, dtype):
    """A policy change below half a bfloat16 step still arrives where it meets another rest."""
    peft = with_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype))
    for name, weight in peft.named_parameters():
        if ".policy." in name:
            torch.nn.init.normal_(weight, std=1e-3)
    decoder = decoder_of(peft)
    twin = decoder.layers[-1].merged()
    exact = differs = 0
    for linear, merged in zip(decoder.layers[-1].maps, twin.maps, strict=True):
        before = linear.weight.clone()
        merged.write("policy")
        whole = linear.weight.double()
        for piece in linear.stacks["policy"].pieces:
            whole[piece.rows] += piece.scaling * piece.b.double() @ piece.a.double()
        torch.testing.assert_close(
            merged.weight, whole.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-3
        )
        exact += (merged.weight == whole.to(dtype)).float().mean().item() / 4
        differs += (merged.weight - linear.weight).abs().max().item() > 0
        address = merged.weight.data_ptr()
        merged.write("policy")
        assert merged.weight.data_ptr() == address and torch.equal(linear.weight, before)
    assert differs == 4 and (dtype == torch.float32 or exact > 0.999)


def test_a_merged_role_follows_its_policy(shared_base, form):
    shared_base.add_role("policy", 4, 8, 2)
    shared_base.merge("policy")
    prompts = [form.prompt_ids((("user", text),)) for text in ("Hi", "Why?", "x")]

    def answers(role):
        return [r.ids for r in generate(shared_base, role, form, prompts, 12, 0, [0] * 3, 3)]

    before = answers("policy")
    assert before == answers("reference")
    with torch.no_grad():
        for weight in shared_base.parameters("policy"):
            weight.normal_(std=0.3)
    shared_base.restack()
    assert answers("policy") == before  # not merged anew yet
    shared_base.merge("policy")
    merged = answers("policy")
    shared_base.merged = None
    assert merged == answers("policy") != before


def test_only_layers_that_train_are_merged_again(shared_base, monkeypatch):
    shared_base.add_role("policy", 4, 8, 2)
    shared_base.merge("policy")
    written = []
    monkeypatch.setattr(
        "rlhf.engine.linear_maps.MergedMap.write", lambda self, role: written.append(self)
    )
    shared_base.merge("policy")
    assert written == [linear for layer in shared_base.merged.layers[2:] for linear in layer.maps]


# ---------------------------------------------------------------- could it be captured?


class Operations(TorchDispatchMode):
    """Counts what is dispatched and is no view."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(
            out.alias_info and not out.alias_info.is_write for out in function._schema.returns
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("weights", "most"), [("merged", 32), ("adapters", 42), ("nf4", 56)])
def test_operations_of_a_layer_and_step(tmp_path, weights, most):
    counts = []
    for layers in (2, 4):
        model = make_model(tmp_path / f"{layers}", hidden_size=64, layers=layers)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        options = {"quantization_config": nf4} if weights == "nf4" else {}
        decoder = decoder_of(
            with_adapters(
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **options)
            )
        )
        through = MergedLayers(decoder, "policy", 1).layers if weights == "merged" else None
        decoding = begin(decoder, random_prompts(8, 290), 8, layers=through)
        with torch.no_grad(), Operations() as operations:
            decoding.step()
        counts.append(operations.count)
    assert (counts[1] - counts[0]) / 2 <= most


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_step_reads_nothing_on_the_cpu(tiny_model, temperature):
    decoder = decoder_of(
        with_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    )
    decoding = begin(decoder, random_prompts(5, 290), 8, temperature)
    with torch.no_grad(), count_host_reads() as reads:
        decoding.step()
    assert reads == []


@pytest.mark.parametrize("merged", [False, True])
def test_a_step_runs_on_tensors_without_values(merged):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        peft = with_adapters(LlamaForCausalLM(config))
        decoder = decoder_of(peft.to("meta"))
        layers = MergedLayers(decoder, "policy", 1).layers if merged else decoder.layers
        decoding = Decoding(decoder, "policy", layers, 5, 11, 8, 0.7, Graphs(False), 0)
        with torch.no_grad():
            decoding.read_and_sample()
    assert decoding.tokens.is_meta and decoding.tokens.shape == (8,)


class ReplayedGraphs(Graphs):
    """Graphs on a CPU: the second time the function runs on the very tensors it read then."""

    def __init__(self):
        super().__init__(enabled=True)
        self.replays = 0

    def clear(self):
        self.captured.clear()
        self.seen.clear()

    def capture(self, function):
        with Addresses() as first:
            function()
        return Replay(self, function, first.read)

    def run(self, shape, function):
        if shape in self.captured:
            self.captured[shape].function = function
            self.captured[shape].replay()
        elif shape not in self.seen:
            self.seen.add(shape)
            function()
        else:
            self.captured[shape] = self.capture(function)


class Replay:
    def __init__(self, graphs, function, read):
        self.graphs = graphs
        self.function = function
        self.read = read

    def replay(self):
        with Addresses() as now:
            self.function()
        assert now.read == self.read, "a tensor has moved since it was captured"
        self.graphs.replays += 1


class Addresses(TorchDispatchMode):
    """The addresses that a function reads and did not make itself, in order."""

    def __init__(self):
        super().__init__()
        self.read = []
        self.made = set()
        self.held = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        for tensor in flat:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.made
            ):
                self.read.append(tensor.data_ptr())
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.read
            ):
                self.made.add(tensor.untyped_storage().data_ptr())
                self.held.append(tensor)  # so that no address comes twice
        return out


def test_what_a_graph_reads_stays_where_it_is(shared_base, form):
    """All of it within a rollout; weights also across a step, a merge and a state."""
    shared = shared_base
    shared.add_role("policy", 4, 8, 2)
    shared.train("policy")
    optimizer = torch.optim.AdamW(shared.parameters("policy"), lr=1e-2, fused=True)
    shared.decoder.follow(optimizer)
    shared.graphs = ReplayedGraphs()
    form.eos_token_id = -1
    form.stop_text = None
    prompts = [form.prompt_ids((("user", text),)) for text in ("Hi", "Why?", "x")]
    state = {name: weight.clone() for name, weight in shared.trained_weights().items()}

    def weights():
        stacks = [
            s for layer in shared.decoder.layers for m in layer.maps for s in m.stacks.values() if s
        ]
        merged = (
            [m.weight for layer in shared.merged.layers for m in layer.maps]
            if shared.merged
            else []
        )
        return [(s.a.data_ptr(), s.b.data_ptr()) for s in stacks] + [
            weight.data_ptr() for weight in merged
        ]

    for merge in (False, True):
        if merge:
            shared.merge("policy")
        before = weights()
        for write in (optimizer.step, lambda: shared.load_trained(state)):
            for weight in shared.parameters("policy"):
                weight.grad = torch.ones_like(weight)
            write()
            if merge:
                shared.merge("policy")
            generate(shared, "policy", form, prompts, 8, 1.0, [1, 2, 3], 3)
            assert weights() == before
            assert not shared.graphs.captured  # gone with the keys and values
    assert shared.graphs.replays == 2 * 2 * 5  # of 7 steps one runs as it is, and one is captured


def test_what_is_kept_serves_the_next_rollouts(shared_base, form, monkeypatch):
    """One graph over updates, a merge and shorter rollouts says what is said without it."""
    shared = shared_base
    shared.add_role("policy", 4, 8, 2)
    shared.train("policy")
    shared.merge("policy")
    optimizer = torch.optim.AdamW(shared.parameters("policy"), lr=1e-2, fused=True)
    shared.decoder.follow(optimizer)
    form.eos_token_id = -1
    form.stop_text = None
    prompts = [
        form.prompt_ids((("user", text),))
        for text in ("Hi", "Why?", "x", "How come that it is so?", "No.")
    ]
    plain = Graphs(False)
    replayed = ReplayedGraphs()
    # as on a card
    monkeypatch.setattr(Decoding, "looked_at", property(lambda decoding: decoding.width))
    longest = max(map(len, prompts))
    kept = Decoding(
        shared.decoder, "policy", shared.merged.layers, 5, longest, 8, 1.0, replayed, lag=2
    )

    def both(count, temperature=1.0):
        said = []
        for decoding, graphs in ((kept, replayed), (None, plain)):
            shared.decoding = decoding
            shared.graphs = graphs
            seeds = list(range(count))
            said.append(generate(shared, "policy", form, prompts[:count], 8, temperature, seeds, 5))
        return said

    for count in (5, 3, 5, 1):
        for weight in shared.parameters("policy"):
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        shared.merge("policy")
        with_graph, without = both(count)
        assert [r.ids for r in with_graph] == [r.ids for r in without]
        for ours, theirs in zip(with_graph, without, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    # one ran, one was captured
    assert len(replayed.captured) == 1 and replayed.replays == 4 * 7 - 2
    both(5, temperature=0.5)
    assert not replayed.captured  # of another temperature: all graphs go at once
    assert kept.keys[0].isfinite().all() and shared.decoding is None


def test_what_is_kept_goes_when_memory_runs_out(shared_base, form, monkeypatch):
    shared = shared_base
    read = Decoding.read
    asked = []
    prompts = [form.prompt_ids((("user", text),)) for text in ("Hi", "Why?", "x")]
    shared.decoding = prepare(shared, REFERENCE, 3, max(map(len, prompts)), 4, 1.0)

    def full(decoding, prompts, *args):
        asked.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        read(decoding, prompts, *args)

    monkeypatch.setattr(Decoding, "read", full)
    assert len(generate(shared, REFERENCE, form, prompts, 4, 1.0, [1, 2, 3], 3)) == 3
    assert asked == [3, 2, 1] and shared.decoding is None


def test_a_shape_runs_then_is_captured_then_is_replayed_and_a_failure_is_the_last(
    monkeypatch, capsys
):
    graph = type("Graph", (), {"replay": lambda self: calls.append("replay")})()
    calls = []
    graphs = Graphs(True)
    monkeypatch.setattr(graphs, "capture", lambda function: calls.append("capture") or graph)
    for _ in range(4):
        graphs.run("a", lambda: calls.append("run"))
    assert calls == ["run", "capture", "replay", "replay", "replay"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.cpu.Stream())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: calls.append("stream"))
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda _: None, raising=False)
    graphs.clear()
    graphs.run("a", lambda: calls.append("run"))
    assert calls[5:] == ["run"]

    class Broken:
        def __init__(self):
            raise RuntimeError("no capture\nhere")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    graphs = Graphs(True)
    calls = []
    for _ in range(4):
        graphs.run("a", lambda: calls.append("run"))
    assert calls == ["run", "stream", "run", "run", "run"] and not graphs.enabled

    class Full:
        def __init__(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Full)
    graphs = Graphs(True)
    graphs.run("a", lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("a", lambda: None)
    assert graphs.enabled  # half the rows may be captured yet

    class FullThenBroken:
        def __init__(self):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FullThenBroken)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        graphs.run("a", lambda: None)

    class FullWhenLaunched:
        def replay(self):
            raise torch.AcceleratorError("CUDA error: out of memory\nCompile with ...")

    graphs.captured["a"] = FullWhenLaunched()
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA error: out of memory$"):
        graphs.run("a", lambda: None)
    assert graphs.enabled
    said = capsys.readouterr().out
    assert said.count("without CUDA graphs") == 1 and "--no-cuda-graphs" in said


# ---------------------------------------------------------------- shapes


def test_a_policy_that_is_not_finite_ends_in_numbers_that_say_so():
    tokens, logprobs = sample_tokens(
        torch.full((2, 300), torch.nan), 1.0, torch.tensor([0.0, 0.9]).double()
    )
    assert logprobs.isnan().all() and ((tokens >= 0) & (tokens < 300)).all()


def test_shapes_come_from_a_short_list():
    assert [row_bucket(n, on_card=False) for n in (1, 2, 3, 4, 5, 13, 40)] == [
        1,
        2,
        4,
        4,
        8,
        16,
        40,
    ]
    assert [row_bucket(n, on_card=True) for n in (1, 8, 9, 64)] == [8, 8, 16, 64]


def test_a_draw_never_meets_a_part_that_adds_nothing():
    cdf = torch.tensor([[0.0, 0.25, 0.25, 0.75, 0.75]], dtype=torch.float64)
    for draw, place, rest in (
        (0.0, 1, 0.0),
        (0.25, 3, 0.0),
        (0.5, 3, 0.25),
        (0.75, 3, 0.5),
        (2.0, 3, 0.5),
    ):
        found, into = invert(cdf, torch.tensor([[draw]], dtype=torch.float64))
        assert found.item() == place and into.item() == pytest.approx(rest)
