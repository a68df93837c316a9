"""What a run will hold in memory, by owner, worked out before anything is loaded.

The largest moment of a run counts: for PPO that of the rollout, when the KV cache is full, or that
of a micro-batch's backward pass. Bytes are of tensors; a card needs some 0.5 GB more for the
driver's context, and an allocator's gaps. `benchmarks/llama_3b.py` counts the same owners while the
scripts run.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from rlhf.engine.card import Plan, Plans, Rollouts
from rlhf.engine.decoding import round_up
from rlhf.engine.logprobs import CPU_BLOCK, chunk_elements
from rlhf.runs.errors import UserError
from rlhf.runs.hub import hub_errors
from rlhf.runs.processes import num_processes

OWNERS = ("base", "merged copy", "adapters", "optimizer", "KV cache", "activations", "logits")
Bytes = dict[str, float]  # by owner


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder, how its base is stored and where it runs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    in_4bit: bool
    width: int  # bytes of a number in what the base computes in
    fused_attention: bool  # as on a GPU: no matrix of attention weights
    head_norms: bool = False  # of each head of q and k, as Qwen3 has

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Features in and out of a layer's seven linear maps."""
        h = self.hidden
        i = self.intermediate
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    def base(self) -> float:
        stored = self.layers * sum(i * o for i, o in self.linears) * self.width
        if self.in_4bit:
            q, k, v, o, gate, up, down = (i * o for i, o in self.linears)
            # Half a byte a number, and a scale for each 64: in float32 where maps are joined
            # (rlhf/engine/linear_maps.py), else one byte, and a float32 scale for each 256 scales.
            joined = q + k + v + gate + up
            alone = o + down
            stored = self.layers * (
                joined * (0.5 + 4 / 64) + alone * (0.5 + 1 / 64 + 4 / (64 * 256))
            )
        return stored + self.vocabulary * self.hidden * self.width * (1 if self.tied else 2)

    def merged(self) -> float:
        """A 16-bit copy of all linear maps, to sample from; embedding and LM head are shared."""
        return self.layers * sum(i * o for i, o in self.linears) * self.width

    def lora(self, rank: int, layers: int) -> int:
        """Weights of an adapter on `layers` layers (0: all)."""
        return rank * (layers or self.layers) * sum(i + o for i, o in self.linears)

    def kv_cache(self, rows: int, tokens: int) -> float:
        return rows * tokens * self.layers * 2 * self.kv_heads * self.head_dim * self.width

    def stacks(self, sft_rank: int, role_rank: int, role_layers: int, roles: int) -> float:
        """The pairs A, B that rlhf/engine/linear_maps.py makes of adapters, in the base's dtype.

        On the upper `role_layers` layers (0: all) each of the roles has a pair of its own, of one
        rank for all of them; on those below they share SFT's.
        """
        h = self.hidden
        i = self.intermediate
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        # Numbers of a layer, per rank.
        a_and_b = 3 * (h + q + 2 * kv) + (q + h) + 2 * (h + 2 * i) + (i + h)
        upper = role_layers or self.layers
        return (
            a_and_b
            * ((self.layers - upper) * sft_rank + upper * roles * (sft_rank + role_rank))
            * self.width
        )

    def backward(
        self,
        tokens: int,
        longest: int,
        layers: int,
        rank: int,
        checkpointing: bool,
        masked: bool = False,
    ) -> float:
        """The most held between forward and backward of a micro-batch, through `layers` (0: all).

        What a layer keeps is what rlhf/engine/layers.py keeps; checkpointed layers keep their
        input, and one is at work. `masked`: the attention has a mask of its own, as for pairs; a
        fused kernel then keeps k and v once for each query head.
        """
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        # Both norms' inputs, q, k, v, the attention's output (twice where a fused kernel keeps its
        # own), gate and up.
        k_and_v = 2 * (q if masked and self.fused_attention else kv)
        numbers = (
            2 * self.hidden
            + (3 if self.fused_attention else 2) * q
            + k_and_v
            + 2 * self.intermediate
            + 7 * rank
        )
        scales = 2
        if self.head_norms:  # q, k and v as they were before, and a scale of each head
            numbers += q + 2 * kv
            scales += self.heads + self.kv_heads
        kept = tokens * (numbers * self.width + 4 * scales)
        layers = layers or self.layers
        standing = (
            layers * tokens * self.hidden * self.width + kept if checkpointing else layers * kept
        )
        # The MLP's activation and output, and their gradients.
        mlp = 7 * tokens * self.intermediate * self.width
        return standing + max(mlp, self.attention(tokens, longest, 3)) + self.matrix()

    def forward(self, tokens: int, longest: int) -> float:
        """What one layer needs while it computes without gradients."""
        mlp = 3 * tokens * self.intermediate * self.width
        return max(mlp, self.attention(tokens, longest, 2)) + self.matrix()

    def attention(self, tokens: int, longest: int, matrices: int) -> float:
        """Its weights, where no fused kernel does without them."""
        return 0 if self.fused_attention else matrices * tokens * longest * self.heads * self.width

    def matrix(self) -> float:
        """The largest weight of a layer, gate and up joined, dequantised."""
        return 2 * self.hidden * self.intermediate * self.width if self.in_4bit else 0

    def logits(self, tokens: int) -> float:
        """Of `tokens` chosen tokens, in chunks; on a GPU also in float32, with their softmax."""
        elements = min(
            tokens * self.vocabulary, max(chunk_elements(self.fused_attention), self.vocabulary)
        )
        if self.fused_attention:
            return elements * (8 + self.width)
        return elements * self.width + 2 * CPU_BLOCK * self.vocabulary * 4


def read_shape(base: dict[str, Any], dtype: str, fused_attention: bool = True) -> Shape:
    """The shape of the base that `base_facts` names, in `dtype` ("auto" is 16 bit on a card).

    Raises:
        UserError: it is not a Llama-like decoder.
    """
    with hub_errors(base["model"], "model", "--base-model"):
        config = AutoConfig.from_pretrained(base["model"], revision=base["revision"])
    try:
        heads = config.num_attention_heads
        return Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            in_4bit=base["load_in_4bit"],
            width=4 if dtype == "fp32" else 2,
            fused_attention=fused_attention,
            head_norms=config.model_type == "qwen3",
        )
    except AttributeError as error:
        raise UserError(
            f"{base['model']} is not a Llama-like decoder ({error}): no memory plan for it"
        ) from None


# ---------------------------------------------------------------- the three phases


def plan_sft(shape: Shape, config: Any, longest: int, tokens: int) -> Bytes:
    """`longest`: tokens of the longest text; `tokens`: of a micro-batch."""
    weights = shape.lora(config.lora_rank, 0)
    tokens = at_most(tokens, config.batch_size // num_processes(), longest)
    kept = shape.backward(tokens, longest, 0, config.lora_rank, config.gradient_checkpointing)
    stacks = shape.stacks(config.lora_rank, 0, 0, 1)
    return trained(shape, weights, stacks, weights, kept) | {"logits": shape.logits(tokens)}


def plan_reward(shape: Shape, config: Any, sft_rank: int, longest: int, tokens: int) -> Bytes:
    """`longest`: tokens of the longest pair, prompt counted once; `tokens`: of a micro-batch."""
    weights = shape.lora(config.lora_rank, config.role_layers)
    tokens = at_most(tokens, config.batch_size // num_processes(), longest)
    rank = sft_rank + config.lora_rank
    kept = shape.backward(
        tokens, longest, config.role_layers, rank, config.gradient_checkpointing, masked=True
    )
    # SFT's and the reward model's
    stacks = shape.stacks(sft_rank, config.lora_rank, config.role_layers, 2)
    return trained(shape, shape.lora(sft_rank, 0) + weights, stacks, weights, kept)


def plan_ppo(
    shape: Shape,
    config: Any,
    sft_rank: int,
    reward_rank: int,
    reward_layers: int,
    longest: int,
    tokens: int,
    rollouts: Rollouts,
    gold: tuple[int, int] = (0, 1),
    processes: int = 1,
) -> Bytes:
    """The larger of a full rollout and of a micro-batch's backward pass.

    `longest`: tokens of the longest prompt; `tokens`: of a micro-batch; `gold`: rank and layers of
    the judge's adapter, rank 0 if there is none.
    """
    scorer = shape.lora(reward_rank, reward_layers)
    policy = shape.lora(config.lora_rank, config.role_layers)
    role_layers = max(config.role_layers or shape.layers, reward_layers or shape.layers)
    role_rank = max(config.lora_rank, reward_rank, gold[0])
    length = longest + config.response_length
    episodes = config.episodes_per_update // processes
    rows = round_up(min(rollouts.rows, episodes), 8)
    tokens = at_most(tokens, episodes // config.num_mini_batches, length)
    roles = 5 if gold[0] else 4  # SFT's, policy, value, reward
    stacks = shape.stacks(sft_rank, role_rank, role_layers, roles)
    adapters = shape.lora(sft_rank, 0) + 2 * scorer + policy + shape.lora(*gold)
    standing = trained(shape, adapters, stacks, scorer + policy, 0)
    standing |= {"merged copy": shape.merged() if rollouts.merged else 0}
    cache = {"KV cache": shape.kv_cache(rows, round_up(length, 64))}
    step = {
        "activations": shape.forward(rows, 1),
        # Logits (on a GPU in float32), the same over the temperature, and their softmax.
        "logits": rows * shape.vocabulary * ((4 if shape.fused_attention else shape.width) + 4 + 4),
    }
    prefill = {"activations": shape.forward(min(rows * longest, tokens), longest)}
    # Hidden states below the roles, kept for all epochs.
    lower = episodes * length * shape.hidden * shape.width
    rank = sft_rank + role_rank
    backward = {
        "activations": lower
        + shape.backward(tokens, length, role_layers, rank, config.gradient_checkpointing),
        "logits": shape.logits(tokens),
    }
    if rollouts.kept:  # a graph holds what its step needs
        moments = (cache, step, prefill), (cache, step, backward)
    else:
        moments = (cache, step), (cache, prefill), (backward,)
    plans = [
        {owner: sum(part.get(owner, 0) for part in (standing, *moment)) for owner in OWNERS}
        for moment in moments
    ]
    return max(plans, key=lambda plan: sum(plan.values()))


def at_most(tokens: int, rows: int, longest: int) -> int:
    """Tokens of a micro-batch: one text at least, and no more than a step has rows."""
    return min(max(tokens, longest), max(1, rows) * longest)


def trained(
    shape: Shape, adapters: int, stacks: float, trainable: int, activations: float
) -> Bytes:
    """Weights in float32, for the trained ones a gradient and Adam's moments, and the stacks."""
    return {
        "base": shape.base(),
        "adapters": 4 * adapters + stacks,
        "optimizer": 12 * trainable,
        "KV cache": 0,
        "activations": activations,
        "logits": 0,
    }


def episodes_of_a_process(episodes_per_update: int) -> int:
    return episodes_per_update // num_processes()


def ppo_plans(shape: Shape, config: Any, runs: dict[str, dict[str, Any]], longest: int) -> Plans:
    """The plans of `ppo_train.py` by its rollouts, from its checkpoints' run.json, by role."""
    adapters = {
        role: (run["hyperparameters"]["lora_rank"], run["hyperparameters"].get("role_layers", 0))
        for role, run in runs.items()
    }
    parents = adapters["sft"][0], *adapters["reward"]
    gold = adapters.get("gold", (0, 1))

    def plans(rollouts: Rollouts) -> Plan:
        return lambda tokens: plan_ppo(
            shape, config, *parents, longest, tokens, rollouts, gold, num_processes()
        )

    return plans
