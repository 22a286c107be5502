"""Pruning in many steps: greedy and gradual on the language model, lottery tickets on a classifier trained from scratch.

python benchmarks/quality/schedules.py --calibration TEXT --text OTHER_TEXT --out docs/quality-schedules.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from protocol import LENGTH, Protocol, arguments, read_results, setup, write_results
from torch import Tensor, nn
from torch.nn import functional as F

import sparseprune as sp
from sparseprune.pruning.schedules import Gradual, Greedy, LotteryTicket
from sparseprune.recovery import TokenStream, Training, recover

SPARSITY = 0.4


def language_model(protocol: Protocol, recovery_steps: int) -> dict[str, float]:
    """Magnitude to 40 %: at once, greedily by blocks, and gradually with distillation between the steps."""
    judge = protocol.calibration(1, seed=1).batches[0]

    def loss(model: Any) -> float:
        with torch.inference_mode():
            logits = model(judge).logits[0, :-1]
        return float(F.cross_entropy(logits.float(), judge[0, 1:]))

    def distill(steps: int) -> Callable[[nn.Module], Any]:
        data = TokenStream(protocol.calibration_ids, length=512)
        training = Training(2e-4)
        return lambda model: recover(model, data, teacher=protocol.model, steps=steps, training=training)

    def pruned(**arguments: Any) -> float:
        model = copy.deepcopy(protocol.model)
        sp.prune(model, "unstructured", "magnitude", sparsity=SPARSITY, progress=True, **arguments)
        return protocol.perplexity(model)

    once = copy.deepcopy(protocol.model)
    sp.prune(once, "unstructured", "magnitude", sparsity=SPARSITY)
    found = {"at once": protocol.perplexity(once)}
    distill(recovery_steps)(once)
    found[f"at once, then {recovery_steps} steps of distillation"] = protocol.perplexity(once)
    found["greedy by blocks, 10 % of one at a time"] = pruned(schedule=Greedy(step=0.1), evaluate=loss)
    each = recovery_steps // 4
    found[f"gradual, 4 steps with {each} of distillation each"] = pruned(
        schedule=Gradual(4), recover=distill(each)
    )
    return found


class Classifier(nn.Module):
    """Embedding, LSTM, two linears: which of the two texts is this from?"""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.hidden = nn.Linear(64, 64)
        self.classifier = nn.Linear(64, 2)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(ids))
        return self.classifier(F.relu(self.hidden(states.mean(dim=1))))


def lottery(first: Tensor, second: Tensor, vocabulary: int, steps: int) -> dict[str, Any]:
    """Accuracy, on windows that no training saw, of the dense classifier, its tickets, and the last ticket's mask on a
    new initialization.
    """
    windows = [ids[: len(ids) // 32 * 32].reshape(-1, 32) for ids in (first, second)]
    count = min(map(len, windows))
    inputs = torch.cat([it[:count] for it in windows])
    labels = torch.arange(2).repeat_interleave(count)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]

    def fit(model: nn.Module, start: int, stop: int) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            chosen = train[torch.randint(len(train), (64,), generator=generator)]
            loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def error(model: nn.Module) -> float:
        with torch.inference_mode():
            return float((model(inputs[test]).argmax(dim=1) != labels[test]).double().mean())

    def new(seed: int) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(vocabulary)

    ticket = new(0)
    report = LotteryTicket(steps, rounds=4, rewind=steps // 20).run(
        ticket, fit, 0.9, evaluate=error, progress=True
    )
    masks = {name: it.detach() != 0 for name, it in ticket.named_parameters() if (it == 0).any()}
    other = new(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    with sp.pruning.hold_zeros(other):
        fit(other, 0, steps)
    return {
        "dense": 1 - (report.loss_before or 0.0),
        "tickets": [(step.sparsity, 1 - (step.loss or 0.0)) for step in report.steps],
        "the last mask on new weights": 1 - error(other),
        "test windows": len(test),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--recovery-steps", type=int, default=40)
    parser.add_argument("--training-steps", type=int, default=400)
    options = parser.parse_args()
    protocol = setup(options)
    results = read_results(options.out)
    vocabulary = protocol.model.get_input_embeddings().num_embeddings
    results["lottery"] = lottery(
        protocol.calibration_ids[: len(protocol.evaluation_ids)],
        protocol.evaluation_ids,
        vocabulary,
        options.training_steps,
    )
    write_results(options.out, results)
    print(results["lottery"], flush=True)
    results["language model"] = language_model(protocol, options.recovery_steps)
    results["window"] = LENGTH
    write_results(options.out, results)
    print(results["language model"], flush=True)


if __name__ == "__main__":
    main()
