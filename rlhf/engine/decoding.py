"""Decoding: texts written one token at a time, in steps of fixed shapes for a CUDA graph.

Everything that a step reads and writes exists before the first one: keys and values, tokens,
lengths, draws and output. A step samples inside, so the CPU need not look at a token before the
next step begins. On a card it looks a fixed number of steps late, and drops what a row wrote after
its end.

Shapes: B rows, some of them without a text; W places in a row, of which S are attended to; at most
R tokens written; V vocabulary, H hidden size, K key heads, D features a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.engine.decoder import Decoder, lay_out
from rlhf.engine.graphs import Graphs
from rlhf.engine.layers import LeanLayer
from rlhf.engine.linear_maps import rms_norm
from rlhf.engine.logprobs import matmul
from rlhf.engine.micro_batches import cut_by_tokens

LAG = 4  # steps by which the CPU looks late, on a card
BLOCK = 256  # tokens of the vocabulary in a block, for sampling


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def row_bucket(rows: int, on_card: bool) -> int:
    """The number of rows that `rows` texts run in."""
    if on_card:
        return round_up(rows, 8)
    return rows if rows <= 2 else round_up(rows, 4)


class Decoding:
    """Texts that are being written, and later other texts in the same tensors.

    Args:
        role: whose adapters to use.
        layers: the decoder's own, or their merged copies.
        texts: how many, at most.
        longest: tokens of the longest prompt.
        new: tokens that each text gets, at most.
        temperature: logits are divided by it; 0 is greedy.
        lag: steps after which the CPU looks at a token.
    """

    def __init__(
        self,
        decoder: Decoder,
        role: str,
        layers: list[LeanLayer],
        texts: int,
        longest: int,
        new: int,
        temperature: float,
        graphs: Graphs,
        lag: int,
    ):
        self.decoder = decoder
        self.role = role
        self.layers = layers
        self.temperature = temperature
        self.graphs = graphs
        self.lag = lag
        self.count = texts
        self.longest = longest
        self.new = new
        self.lm_head = decoder.model.get_output_embeddings().weight
        config = decoder.model.config
        weight = decoder.inner.embed_tokens.weight
        self.device = weight.device
        self.on_card = weight.is_cuda
        rows = row_bucket(texts, self.on_card)
        self.width = round_up(longest + new, self.width_step)
        decoder.check_window(longest + new)

        width = self.width if self.on_card else round_up(longest + 1, self.width_step)
        shape = (rows, config.num_key_value_heads, width, layers[0].attention.head_dim)
        self.keys = [weight.new_zeros(shape) for _ in layers]
        self.values = [weight.new_zeros(shape) for _ in layers]
        self.reading = slice(0, 0)  # the rows whose prompts are being read
        self.positions = torch.arange(self.width, device=self.device)
        cos, sin = decoder.rope(weight.new_empty(1), self.positions)
        self.cos = cos[:, None].contiguous()  # [W, 1, D]
        half = sin.shape[-1] // 2
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)[:, None].contiguous()

        numbers = {"dtype": torch.long, "device": self.device}
        # One per row. A row without a text attends only to the token that it writes itself.
        self.rows = torch.arange(rows, device=self.device)
        self.lengths = torch.zeros(rows, **numbers)
        self.tokens = torch.zeros(rows, **numbers)
        self.draws = torch.zeros(rows, new, dtype=torch.float64, device=self.device)
        self.places = torch.zeros(rows, **numbers)  # where in `logprobs` a row's go
        # One line per text, in order, and one for the rows without a text.
        self.logprobs = torch.zeros(rows + 1, new, device=self.device)
        self.step_number = torch.zeros(1, **numbers)

        self.ring = torch.zeros(lag + 1, rows, dtype=torch.long, pin_memory=self.on_card)
        self.arrived = [torch.cuda.Event() for _ in range(lag + 1)] if self.on_card else []

    @property
    def width_step(self) -> int:
        """The number of places attended to is a multiple of this.

        On a card, more places cost less than another graph.
        """
        return 64 if self.on_card else 32

    @property
    def looked_at(self) -> int:
        return (
            self.width if self.on_card else min(round_up(self.longest, self.width_step), self.width)
        )

    # -- prompts

    def serves(
        self, role: str, layers: list[LeanLayer], lengths: list[int], new: int, temperature: float
    ) -> bool:
        """Whether texts of these lengths fit into what is there."""
        like = (
            self.role == role
            and self.layers is layers
            and (self.new, self.temperature) == (new, temperature)
        )
        return like and len(lengths) <= len(self.tokens) and max(lengths) + new <= self.width

    def read(self, prompts: list[list[int]], draws: Tensor, tokens: int) -> None:
        """Read the prompts and sample each response's first token. Earlier texts are lost.

        Args:
            prompts: the shortest first.
            draws: [texts, R] in [0, 1), float64, one for each token to sample.
            tokens: to read at a time; a longer text is read alone.
        """
        self.count = len(prompts)
        # Tokens of the longest text that have been read: all except the one sampled last.
        self.longest = len(prompts[-1])
        self.sent = self.received = 0
        idle = len(self.tokens) - self.count
        for of_layer in (*self.keys, *self.values, self.logprobs, self.step_number):
            of_layer.zero_()
        self.lengths.copy_(torch.tensor([*map(len, prompts), *[0] * idle]))
        self.places.copy_(torch.tensor([*range(self.count), *[len(self.logprobs) - 1] * idle]))
        self.draws.copy_(F.pad(draws, (0, 0, 0, idle)))
        hidden = self.lm_head.new_zeros(len(self.tokens), self.lm_head.shape[1])
        for part in cut_by_tokens([len(prompt) for prompt in prompts], tokens):
            self.reading = slice(part[0], part[-1] + 1)
            texts = lay_out(prompts[self.reading], self.device)
            embedded = self.decoder.embed(texts.ids)
            states = self.decoder.run(embedded, texts, self.role, self.layers, cache=self)
            hidden[self.reading] = self.final_norm(states[texts.last])
        self.sample(hidden)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys[layer][self.reading, :, : keys.shape[2]] = keys
        self.values[layer][self.reading, :, : values.shape[2]] = values

    # -- a step

    def step(self) -> None:
        """Sample one more token for each row."""
        self.longest += 1
        if not self.on_card:
            self.widen()
        self.graphs.run((self, len(self.tokens), self.looked_at), self.read_and_sample)

    def read_and_sample(self) -> None:
        """Read the tokens sampled last and sample the next. Nothing here waits for the device."""
        width = self.looked_at
        x = self.decoder.embed(self.tokens)
        rope = self.cos.index_select(0, self.lengths), self.sin.index_select(0, self.lengths)
        hidden = self.positions[:width] > self.lengths[:, None]  # [B, S]
        mask = x.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
        at = self.rows, self.lengths
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            x = layer.next(x, rope, mask, self.role, keys, values, at)
        self.lengths.add_(1)
        self.sample(self.final_norm(x))

    def final_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.decoder.inner.norm)

    def sample(self, hidden: Tensor) -> None:
        """Sample each row's next token from the final hidden states [B, H] of its last one."""
        draws = self.draws.index_select(1, self.step_number).squeeze(1)
        tokens, logprobs = sample_tokens(matmul(hidden, self.lm_head.T), self.temperature, draws)
        self.tokens.copy_(tokens)
        if logprobs is not None:
            self.logprobs.index_put_((self.places, self.step_number), logprobs)
        self.step_number.add_(1)

    # -- the CPU's side

    def send(self) -> None:
        """Start copying the tokens that were sampled last to the CPU."""
        slot = self.sent % (self.lag + 1)
        self.ring[slot].copy_(self.tokens, non_blocking=True)
        if self.on_card:
            self.arrived[slot].record()
        self.sent += 1

    def receive(self) -> list[int]:
        """The tokens [B] of the earliest `send` that has not been received yet."""
        slot = self.received % (self.lag + 1)
        if self.on_card:
            self.arrived[slot].synchronize()
        self.received += 1
        return self.ring[slot].tolist()

    def widen(self) -> None:
        """Grow to as many places as are needed. For a CPU, where rows often end early."""
        more = self.looked_at - self.keys[0].shape[2]
        if more > 0:
            for of_layers in (self.keys, self.values):
                for i, whole in enumerate(of_layers):
                    of_layers[i] = F.pad(whole, (0, 0, 0, more))

    def shrink(self, keep: list[int]) -> bool:
        """Go on with these rows alone, if they fit a smaller shape. For a CPU, without lag."""
        rows = row_bucket(len(keep), self.on_card)
        if rows == len(self.tokens):
            return False
        idle = rows - len(keep)
        index = torch.tensor(keep + keep[:1] * idle, device=self.device)
        for of_layers in (self.keys, self.values):
            for i, whole in enumerate(of_layers):
                of_layers[i] = whole.index_select(0, index)
        self.tokens, self.lengths, self.places, self.draws = (
            x.index_select(0, index) for x in (self.tokens, self.lengths, self.places, self.draws)
        )
        self.lengths[len(keep) :] = 0
        self.places[len(keep) :] = len(self.logprobs) - 1
        self.rows = self.rows[:rows]
        self.ring = self.ring[:, :rows]
        return True


def sample_tokens(
    logits: Tensor, temperature: float, draws: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One token per row: the largest logit at temperature 0, else by inverting the softmax's CDF.

    The CDF is summed in float64, first over blocks of the vocabulary, then within the block that
    the draw falls in. PPO takes these for draws from the distribution that `logprobs_of` measures:
    top-k or top-p here alone would bias it.

    Args:
        logits: [B, V].
        draws: [B] in [0, 1), float64.
    Returns:
        tokens [B], and their log-probabilities [B] in nats at that temperature; None at 0.
    """
    if temperature == 0:
        return logits.argmax(-1), None
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    rows, vocabulary = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)  # [B, blocks]
    cdf = sums.cumsum(-1)
    block, before = invert(cdf, draws[:, None] * cdf[:, -1:])
    # [B, BLOCK]
    within = (
        blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    )
    place, _ = invert(within, before)
    tokens = (block * BLOCK + place).squeeze(1).clamp_(max=vocabulary - 1)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def invert(cdf: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Where each draw [B, 1] falls in rising sums [B, n] of any total, and how far into that part.

    Rounding could push a draw up to the total, so it is kept below; then it never falls in a part
    that adds nothing. NaN sums give the last part, and whoever reads them reports it.
    """
    draws = torch.minimum(draws, cdf[:, -1:] * (1 - 2**-52))
    place = torch.searchsorted(cdf, draws, right=True).clamp_(max=cdf.shape[1] - 1)
    below = F.pad(cdf, (1, 0)).gather(1, place)
    return place, draws - below
