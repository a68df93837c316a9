"""PPO's formulas beside those of TRL 1.12.0's PPOTrainer, on the same tensors.

trl_1_12.json holds the tensors and what TRL's own lines made of them. Where `make bench` has
installed that TRL, its lines are run again, taken out of its source by the comments and statements
they stand between; nothing of it is imported. `PYTHONPATH=. python tests/test_oracle.py` records
anew.

Rows of a case: sampled tokens to the full length, with and without EOS; in `ragged` also shorter
ones that end by EOS. Where the two differ, TRL is at fault or another estimator is meant; each
difference has a test of its own below.
"""

import ast
import dataclasses
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_train
from ppo_train import policy_loss, token_rewards, value_loss
from rlhf.engine.decoder import Padded

RECORD = Path(__file__).parent / "trl_1_12.json"
TRL = Path(__file__).parent.parent / "benchmarks" / "work" / "trl-1.12.0" / "trl"
SOURCE = TRL / "experimental" / "ppo" / "ppo_trainer.py"
EOS = 2
PAD = 0
PENALTY = 1.0
CASES = {  # lengths of the rows that end by EOS; settings
    "full": (
        [6, 6],
        {"gamma": 0.97, "lam": 0.9, "kl_coef": 0.1, "kl_estimator": "k1", "whiten_rewards": False},
    ),
    "whitened": (
        [6, 6],
        {"gamma": 0.97, "lam": 0.9, "kl_coef": 0.1, "kl_estimator": "k1", "whiten_rewards": True},
    ),
    "k3": (
        [6, 6],
        {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.1, "kl_estimator": "k3", "whiten_rewards": False},
    ),
    "ragged": (
        [6, 4, 1, 3],
        {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.1, "kl_estimator": "k1", "whiten_rewards": False},
    ),
}
CASES["past_eos"] = CASES["ragged"]  # another value one past EOS
OUTPUTS = ("non_score_reward", "rewards", "advantages", "returns", "pg_loss", "vf_loss")
OUTPUTS += ("pg_clipfrac", "vf_clipfrac", "approxkl", "scores")
CLIPRANGE = 0.2


# ---------------------------------------------------------------- TRL's side


def make_inputs(name: str) -> dict[str, Tensor]:
    """Random tensors of a case, float64: B rows of R = 6 tokens, two of them without EOS."""
    lengths, _ = CASES[name]
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows = len(lengths) + 2
    responses = torch.randint(3, 9, (rows, 6), generator=generator)
    scores = 2 * normal(rows)
    logprobs = -normal(rows, 6).abs()
    ref_logprobs = logprobs + 0.3 * normal(rows, 6)
    new_logprobs = logprobs + 0.2 * normal(rows, 6)
    values = normal(rows, 6)
    new_values = values + 0.3 * normal(rows, 6)
    for row, length in enumerate(lengths):
        responses[row, length - 1] = EOS
        responses[row, length:] = PAD
        # TRL's own extra place, one past EOS: where its value is the score, it changes nothing
        if length < 6:
            values[row, length] = new_values[row, length] = scores[row] + (
                1.0 if name == "past_eos" else 0.0
            )
    return {
        "responses": responses,
        "scores": scores,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "new_logprobs": new_logprobs,
        "values": values,
        "new_values": new_values,
    }


def published(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What TRL 1.12's own lines make of the inputs."""
    text = SOURCE.read_text()
    functions = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and node.name in ("masked_mean", "masked_var", "masked_whiten")
    ]
    args = SimpleNamespace(
        **CASES[name][1],
        missing_eos_penalty=PENALTY,
        cliprange=CLIPRANGE,
        cliprange_value=CLIPRANGE,
        vf_coef=0.1,
    )
    ends = (inputs["responses"] == PAD).int()
    scope = {
        "torch": torch,
        "INVALID_LOGPROB": 1.0,
        "args": args,
        "self": SimpleNamespace(args=args, processing_class=SimpleNamespace(eos_token_id=EOS)),
        "empty_cache": lambda: None,
        "postprocessed_responses": inputs["responses"],
        "sequence_lengths": torch.where(ends.any(1), ends.argmax(1), 6) - 1,
        **{key: tensor.clone() for key, tensor in inputs.items()},
    }
    exec(compile(ast.Module(functions, []), str(SOURCE), "exec"), scope)
    run_lines(
        text,
        "# Response Processing 3. Filter completion",
        "# Do multiple epochs of PPO training",
        scope,
    )
    scope |= {
        "micro_batch_inds": slice(None),
        "context_length": 1,
        "vpred_temp": torch.nn.functional.pad(inputs["new_values"], (0, 1))[..., None],
        "mb_advantage": scope["advantages"],
        "mb_logprobs": scope["logprobs"],
        "mb_return": scope["returns"],
        "mb_values": scope["values"],
    }
    run_lines(text, "new_logprobs = torch.masked_fill(", "accelerator.backward(loss)", scope)
    run_lines(text, "pg_clipfrac = masked_mean(", "prob_dist =", scope)
    run_lines(text, "approxkl = 0.5", "approxkl_stats[", scope)
    return {key: scope[key] for key in OUTPUTS}


def run_lines(text: str, first: str, stop: str, scope: dict) -> None:
    """Run TRL's own lines, from the one that starts with `first` to the one before `stop`."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(lines)) if lines[i].strip().startswith(stop))
    exec(compile(textwrap.dedent("\n".join(lines[begin:end])), str(SOURCE), "exec"), scope)


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, dict[str, Tensor]]]:
    def tensors(values: dict) -> dict[str, Tensor]:
        return {
            name: torch.tensor(value, dtype=torch.long if name == "responses" else torch.float64)
            for name, value in values.items()
        }

    return {
        name: {part: tensors(case[part]) for part in case}
        for name, case in json.loads(RECORD.read_text()).items()
    }


def recorded() -> dict:
    """All cases: inputs and TRL's outputs, as lists."""
    cases = {}
    for name in CASES:
        inputs = make_inputs(name)
        parts = {"inputs": inputs, "outputs": published(name, inputs)}
        cases[name] = {
            part: {key: value.tolist() for key, value in parts[part].items()} for part in parts
        }
    return cases


# ---------------------------------------------------------------- ours


def ours(name: str, inputs: dict[str, Tensor]) -> SimpleNamespace:
    """The same rows with our advantages and returns, all [b, R]; only real tokens hold anything."""
    settings = {
        key: value
        for key, value in CASES[name][1].items()
        if key not in ("kl_coef", "kl_estimator")
    }
    mask = inputs["responses"] != PAD
    padded = Padded(mask.sum(1).tolist(), mask.device)
    rows = SimpleNamespace(
        response_mask=mask,
        scores=inputs["scores"],
        ended=(inputs["responses"] == EOS).any(1),
        by_response=padded.spread,
        end_to_end=padded.gather,
        **{
            key: inputs[key] * mask
            for key in ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values")
        },
    )
    config = dataclasses.replace(
        ppo_train.Config(), score_clip=math.inf, missing_eos_penalty=PENALTY, **settings
    )
    measured = SimpleNamespace(
        scores=rows.scores,
        **{
            name: rows.end_to_end(getattr(rows, name))
            for name in ("logprobs", "ref_logprobs", "values")
        },
    )
    found = ppo_train.advantages_and_returns(
        rows, measured, CASES[name][1]["kl_coef"], baseline=0.0, config=config
    )
    rows.advantages, rows.returns = map(padded.spread, found)
    return rows


def policy(micro: SimpleNamespace, advantages: Tensor) -> tuple[float, dict[str, float]]:
    """The policy loss and the statistics, as means over real tokens."""
    flat = map(micro.end_to_end, (micro.new_logprobs, micro.logprobs, advantages))
    losses, parts = policy_loss(*flat, CLIPRANGE)
    return losses.mean(), {key: part.mean() for key, part in parts.items()}


def value(micro: SimpleNamespace) -> tuple[float, float]:
    flat = map(micro.end_to_end, (micro.new_values, micro.values, micro.returns))
    losses, parts = value_loss(*flat, CLIPRANGE)
    return losses.mean(), parts["val/clipfrac_avg"].mean()


def unbiased(micro: SimpleNamespace, advantages: Tensor) -> Tensor:
    """Whitened with the variance over n - 1 tokens, as TRL does; ours is over n (N+ paper)."""
    tokens = micro.response_mask.sum()
    return advantages * ((tokens - 1) / tokens).sqrt()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, check_dtype=False)


# ---------------------------------------------------------------- tests


@pytest.mark.skipif(
    not SOURCE.exists(), reason="TRL 1.12.0 is not in benchmarks/work: make bench puts it there"
)
@pytest.mark.parametrize("name", CASES)
def test_the_record_is_what_trl_computes(name, record):
    for key, tensor in make_inputs(name).items():
        close(tensor, record[name]["inputs"][key])
    for key, tensor in published(name, record[name]["inputs"]).items():
        close(tensor, record[name]["outputs"][key])


@pytest.mark.parametrize("name", ["full", "whitened"])
def test_full_length_rows_agree_in_everything(name, record):
    inputs = record[name]["inputs"]
    trl = record[name]["outputs"]
    micro = ours(name, inputs)
    scores = inputs["scores"] - PENALTY * (~micro.ended).double()
    close(scores, trl["scores"])
    kl = micro.logprobs - micro.ref_logprobs
    close(-0.1 * kl, trl["non_score_reward"])
    if name == "full":
        close(token_rewards(scores, kl, micro.response_mask, 0.1), trl["rewards"])
        close(micro.returns, trl["returns"])
        close(unbiased(micro, micro.advantages), trl["advantages"])
        close(value(micro)[0], trl["vf_loss"])
        close(value(micro)[1], trl["vf_clipfrac"])
        loss, parts = policy(micro, unbiased(micro, micro.advantages))
        close(loss, trl["pg_loss"])
        close(parts["policy/clipfrac_avg"], trl["pg_clipfrac"])
    else:  # rewards over the standard deviation, the mean kept
        rewards = token_rewards(scores, kl, micro.response_mask, 0.1)
        white = ppo_train.whiten(rewards, shift_mean=False)  # all of it is real
        theirs = rewards.mean() + unbiased(micro, white - rewards.mean())
        close(theirs, trl["rewards"])
        settings = CASES[name][1]
        advantages, returns = ppo_train.gae(
            theirs, micro.values, micro.response_mask, settings["gamma"], settings["lam"]
        )
        close(returns, trl["returns"])
        advantages = ppo_train.whiten(advantages)
        close(unbiased(micro, advantages), trl["advantages"])


def test_k3_agrees(record):
    """Ours is an update's approximate KL, with the same terms exp(d) - 1 - d, for any d."""
    inputs = record["k3"]["inputs"]
    trl = record["k3"]["outputs"]
    mask = inputs["responses"] != PAD
    _, parts = policy_loss(
        inputs["ref_logprobs"], inputs["logprobs"], torch.ones(mask.shape), CLIPRANGE
    )
    close(-0.1 * parts["policy/approxkl_avg"] * mask, trl["non_score_reward"])


def test_ragged_rows_agree_where_the_value_past_eos_is_the_score(record):
    inputs = record["ragged"]["inputs"]
    trl = record["ragged"]["outputs"]
    micro = ours("ragged", inputs)
    mask = micro.response_mask
    assert mask.sum(1).tolist() == [6, 4, 1, 3, 6, 6]
    close(micro.returns, trl["returns"] * mask)
    close(unbiased(micro, micro.advantages), trl["advantages"])
    loss, parts = policy(micro, unbiased(micro, micro.advantages))
    close(loss, trl["pg_loss"])
    close(parts["policy/clipfrac_avg"], trl["pg_clipfrac"])


def test_trl_pays_the_score_and_trains_the_value_one_place_past_eos(record):
    """A defect of TRL's: a state after the end of the text, valued at a padding token."""
    inputs = record["ragged"]["inputs"]
    trl = record["ragged"]["outputs"]
    micro = ours("ragged", inputs)
    row = 1
    eos = 3  # the row of four tokens
    close(trl["rewards"][row, eos + 1], inputs["scores"][row])
    rewards = token_rewards(
        inputs["scores"], micro.logprobs - micro.ref_logprobs, micro.response_mask, 0.1
    )
    close(rewards[row, eos], inputs["scores"][row] + trl["rewards"][row, eos])
    # TRL's value loss is a mean over three more places, each with loss 0 here.
    tokens = micro.response_mask.sum()
    close(value(micro)[0] * tokens, trl["vf_loss"] * (tokens + 3))
    close(value(micro)[1] * tokens, trl["vf_clipfrac"] * (tokens + 3))
    # With another value there, the advantages of real tokens move in TRL; ours do not look at it.
    moved = ours("past_eos", record["past_eos"]["inputs"])
    close(moved.returns, micro.returns)
    assert (record["past_eos"]["outputs"]["returns"] - trl["returns"])[row, eos].abs() > 0.04


def test_trl_averages_approxkl_over_padding(record):
    """TRL's is half the mean square (k2) over all places with padding; ours k3 over tokens."""
    inputs = record["ragged"]["inputs"]
    trl = record["ragged"]["outputs"]
    micro = ours("ragged", inputs)
    difference = (micro.new_logprobs - micro.logprobs)[micro.response_mask]
    close(0.5 * difference.square().sum() / micro.response_mask.numel(), trl["approxkl"])
    _, parts = policy(micro, micro.advantages)
    close(parts["policy/approxkl_avg"], (difference.exp() - 1 - difference).mean())


if __name__ == "__main__":
    RECORD.write_text(json.dumps(recorded()) + "\n")
