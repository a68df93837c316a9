"""What a run will hold in memory, by owner, worked out before anything is loaded.

A plan is that of the run's largest moment. In PPO that is either the end of a rollout, when the KV
cache is full, or the backward pass of a micro-batch. Only tensors are counted; a card needs some
0.5 GB more for the driver's context and the allocator's gaps. `benchmarks/llama_3b.py` counts the
same owners while the scripts run.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from rlhf.engine.card import Rollouts
from rlhf.engine.decoding import round_up
from rlhf.engine.logprobs import CPU_BLOCK, chunk_elements
from rlhf.runs.device import device, has_flash_attention
from rlhf.runs.errors import UserError
from rlhf.runs.hub import hub_errors

OWNERS = ("base", "merged copy", "adapters", "optimizer", "KV cache", "activations", "logits")
Bytes = dict[str, float]  # by owner


@dataclass(frozen=True)
class Lora:
    """The size of an adapter."""

    rank: int
    layers: int = 0  # the upper ones, which have it; 0: all

    @classmethod
    def of(cls, run: dict[str, Any]) -> "Lora":
        """Of a checkpoint's own adapter, from its run.json."""
        flags = run["hyperparameters"]
        return cls(flags["lora_rank"], flags.get("role_layers", 0))


@dataclass(frozen=True)
class UpdateSizes:
    """One process's share of a PPO update."""

    episodes: int
    minibatches: int
    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response


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
    head_norms: bool = False  # each head of q and k has a norm, as in Qwen3
    # attention has no mask of its own; planned so where there is no card to ask
    flash_attention: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Features in and out of each of a layer's seven linear maps."""
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

    def lora(self, adapter: Lora) -> int:
        """The number of weights of an adapter."""
        return adapter.rank * (adapter.layers or self.layers) * sum(i + o for i, o in self.linears)

    def kv_cache(self, rows: int, tokens: int) -> float:
        return rows * tokens * self.layers * 2 * self.kv_heads * self.head_dim * self.width

    def stacks(self, sft_rank: int, role_rank: int, role_layers: int, roles: int) -> float:
        """The pairs A, B that rlhf/engine/linear_maps.py stacks from adapters, in the base's dtype.

        On the upper `role_layers` layers (0: all) each role has its own pair, all of one rank;
        below them all roles share SFT's.
        """
        h = self.hidden
        i = self.intermediate
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        # Numbers of a layer for each rank.
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
        """The most that is held between a micro-batch's forward and backward pass.

        A layer keeps what rlhf/engine/layers.py says. A checkpointed layer keeps its input only,
        except the one at work.

        Args:
            layers: that backward goes through; 0: all.
            masked: attention has a mask of its own, as for pairs. A fused kernel then keeps k and v
                once for each query head, as it does wherever flash attention is not to be had.
        """
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        # Both norms' inputs, q, k, v, the attention's output (twice where a fused kernel keeps its
        # own), gate and up.
        repeated = self.fused_attention and (masked or not self.flash_attention)
        k_and_v = 2 * (q if repeated else kv)
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
        """Attention weights; a fused kernel needs none."""
        return 0 if self.fused_attention else matrices * tokens * longest * self.heads * self.width

    def matrix(self) -> float:
        """The largest weight of a layer (gate and up joined) once it is dequantised."""
        return 2 * self.hidden * self.intermediate * self.width if self.in_4bit else 0

    def logits(self, tokens: int) -> float:
        """Logits of `tokens` tokens, a chunk at a time; on a GPU also in float32, and softmaxed."""
        elements = min(
            tokens * self.vocabulary, max(chunk_elements(self.fused_attention), self.vocabulary)
        )
        if self.fused_attention:
            return elements * (8 + self.width)
        return elements * self.width + 2 * CPU_BLOCK * self.vocabulary * 4


def read_shape(base: dict[str, Any], dtype: str, fused_attention: bool = True) -> Shape:
    """The shape of the base that `base_facts` names; `dtype` "auto" counts as 16 bit.

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
            flash_attention=dtype != "fp32"
            and (device().type != "cuda" or has_flash_attention(device())),
        )
    except AttributeError as error:
        raise UserError(
            f"{base['model']} is not a Llama-like decoder ({error}): no memory plan for it"
        ) from None


# ---------------------------------------------------------------- the three phases


def plan_sft(
    shape: Shape, adapter: Lora, rows: int, longest: int, checkpointing: bool, tokens: int
) -> Bytes:
    """The plan of SFT.

    Args:
        rows: of an optimizer step, in this process.
        longest: tokens of the longest text.
        tokens: of a micro-batch.
    """
    weights = shape.lora(adapter)
    tokens = at_most(tokens, rows, longest)
    kept = shape.backward(tokens, longest, 0, adapter.rank, checkpointing)
    stacks = shape.stacks(adapter.rank, 0, 0, 1)
    return trained(shape, weights, stacks, weights, kept) | {"logits": shape.logits(tokens)}


def plan_reward(
    shape: Shape, sft: Lora, own: Lora, rows: int, longest: int, checkpointing: bool, tokens: int
) -> Bytes:
    """The plan of a reward model.

    Args:
        rows: pairs of an optimizer step, in this process.
        longest: tokens of the longest pair, the prompt counted once.
        tokens: of a micro-batch.
    """
    weights = shape.lora(own)
    tokens = at_most(tokens, rows, longest)
    rank = sft.rank + own.rank
    kept = shape.backward(tokens, longest, own.layers, rank, checkpointing, masked=True)
    stacks = shape.stacks(sft.rank, own.rank, own.layers, 2)  # SFT's and the reward model's
    return trained(shape, shape.lora(sft) + weights, stacks, weights, kept)


def plan_ppo(
    shape: Shape,
    adapters: dict[str, Lora],
    update: UpdateSizes,
    checkpointing: bool,
    rollouts: Rollouts,
    tokens: int,
) -> Bytes:
    """The plan of PPO: the larger of a full rollout and a micro-batch's backward pass.

    Args:
        adapters: by role: sft, policy, reward, and gold if there is a judge. The value model's is
            like the reward model's.
        tokens: of a micro-batch.
    """
    longest = update.prompt + update.response
    tokens = at_most(tokens, update.episodes // update.minibatches, longest)
    roles = [adapter for role, adapter in adapters.items() if role != "sft"]
    role_rank = max(adapter.rank for adapter in roles)
    trainable = [adapters["policy"], adapters["reward"]]
    role_layers = max(adapter.layers or shape.layers for adapter in trainable)
    standing = standing_in_ppo(shape, adapters, role_rank, role_layers) | {
        "merged copy": shape.merged() if rollouts.merged else 0
    }
    rows = round_up(rollouts.rows, 8)  # looks at held-out prompts fill them where updates do not
    cache = {"KV cache": shape.kv_cache(rows, round_up(longest, 64))}
    step = {
        "activations": shape.forward(rows, 1),
        # Logits (on a GPU in float32), the same over the temperature, and their softmax.
        "logits": rows * shape.vocabulary * ((4 if shape.fused_attention else shape.width) + 4 + 4),
    }
    prefill = {"activations": shape.forward(min(rows * update.prompt, tokens), update.prompt)}
    # Hidden states below the roles, kept for all epochs.
    lower = update.episodes * longest * shape.hidden * shape.width
    rank = adapters["sft"].rank + role_rank
    kept = shape.backward(tokens, longest, role_layers, rank, checkpointing)
    backward = {"activations": lower + kept, "logits": shape.logits(tokens)}
    if rollouts.kept:  # a graph holds what its step needs
        moments = (cache, step, prefill), (cache, step, backward)
    else:
        moments = (cache, step), (cache, prefill), (backward,)
    plans = [
        {owner: sum(part.get(owner, 0) for part in (standing, *moment)) for owner in OWNERS}
        for moment in moments
    ]
    return max(plans, key=lambda plan: sum(plan.values()))


def standing_in_ppo(
    shape: Shape, adapters: dict[str, Lora], role_rank: int, role_layers: int
) -> Bytes:
    """What PPO holds all the time: the base, the adapters, their stacks, and the optimizer."""
    scorer = shape.lora(adapters["reward"])
    trainable = shape.lora(adapters["policy"]) + scorer  # the value model's is like the scorer's
    weights = scorer + sum(map(shape.lora, adapters.values()))
    roles = 5 if "gold" in adapters else 4  # SFT, policy, value, reward
    stacks = shape.stacks(adapters["sft"].rank, role_rank, role_layers, roles)
    return trained(shape, weights, stacks, trainable, 0)


def at_most(tokens: int, rows: int, longest: int) -> int:
    """Tokens of a micro-batch: at least one text, and at most all rows of a step."""
    return min(max(tokens, longest), max(1, rows) * longest)


def trained(
    shape: Shape, adapters: int, stacks: float, trainable: int, activations: float
) -> Bytes:
    """Weights in float32, with a gradient and Adam's moments if they train, and the stacks."""
    return {
        "base": shape.base(),
        "adapters": 4 * adapters + stacks,
        "optimizer": 12 * trainable,
        "KV cache": 0,
        "activations": activations,
        "logits": 0,
    }
