"""Recovery curves: `auto`, then distillation from the dense model, and plain fine-tuning beside it at equal time.

python benchmarks/quality/recovery.py --calibration TEXT --text OTHER_TEXT --out docs/quality-recovery.json
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from methods import PATTERNS
from protocol import LENGTH, Protocol, arguments, read_results, setup, write_results

import sparseprune as sp
from sparseprune.measure.fidelity import fidelity
from sparseprune.pruning import PruneReport
from sparseprune.recovery import Distillation, TokenStream, Training, recover

RECIPES: dict[str, dict[str, float]] = {
    "distillation": {},
    "distillation and text": {"cross_entropy": 0.5, "logits": 0.5},
}


def quick_perplexity(protocol: Protocol, model: Any) -> float:
    """On the first 4 windows, in bfloat16: for the curve, at a tenth of the cost."""
    copied = copy.deepcopy(model).to(torch.bfloat16)
    return sp.perplexity(copied, None, protocol.evaluation_ids, window=LENGTH, max_windows=4).value


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="of recovery")
    parser.add_argument("--prune-minutes", type=float, default=10, help="at most, of pruning")
    parser.add_argument(
        "--plain-minutes", type=float, default=0, help="of distillation, plain fine-tuning, and both"
    )
    parser.add_argument("--recipe", default="distillation", choices=RECIPES, help="for --minutes")
    parser.add_argument("--patterns", nargs="*", default=["2:4", "50 %"])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    protocol = setup(options)
    dense = protocol.model
    data = TokenStream(protocol.calibration_ids, length=512)
    for pattern in options.patterns:
        model = copy.deepcopy(dense)
        kind, sparsity = PATTERNS[pattern]
        begin = time.perf_counter()
        pruned = sp.prune(
            model,
            kind,
            "auto",
            sparsity=sparsity,
            calibration=protocol.calibration(64),
            minutes=options.prune_minutes,
            progress=True,
        )
        assert isinstance(pruned, PruneReport)
        found: dict[str, Any] = {
            "prune_seconds": time.perf_counter() - begin,
            "epochs": [block.epochs for block in pruned.blocks],
            "pruned": protocol.perplexity(model),
        }
        print(
            f"{pattern}: auto {found['pruned']:.2f} after {found['prune_seconds'] / 60:.1f} min", flush=True
        )
        short = options.plain_minutes
        arms: dict[str, tuple[Any, float, Distillation]] = {}
        if short:
            arms["distillation, short"] = (dense, short, Distillation())
            arms["fine-tuning, short"] = (None, short, Distillation(cross_entropy=1, logits=0))
            arms["both, short"] = (dense, short, Distillation(cross_entropy=0.5, logits=0.5))
        name = options.recipe
        arms[name] = (dense, options.minutes, Distillation(**RECIPES[name]))
        for name, (teacher, minutes, losses) in arms.items():
            student = copy.deepcopy(model)
            report = recover(
                student,
                data,
                teacher=teacher,
                minutes=minutes,
                distillation=losses,
                training=Training(options.learning_rate),
                evaluate=lambda it: quick_perplexity(protocol, it),
                evaluate_every=50,
                progress=True,
            )
            distance = fidelity(
                copy.deepcopy(student).bfloat16(),
                dense,
                None,
                text=protocol.evaluation_ids,
                window=LENGTH,
                max_windows=8,
            )
            found[name] = {
                "perplexity": protocol.perplexity(student),
                "kl": distance.kl,
                "agreement": distance.agreement,
                "seconds": report.seconds,
                "steps": report.steps,
                "zeros": report.zeros_after / report.weights,
                "curve": [(it.seconds, it.step, it.value) for it in report.evaluations],
            }
            print(f"{pattern}: {name} {found[name]['perplexity']:.2f}, {report.steps} steps", flush=True)
            results = read_results(options.out)
            results[pattern] = found
            results["batch"] = "2 x 512 tokens a step"
            results["threads"] = torch.get_num_threads()
            write_results(options.out, results)


if __name__ == "__main__":
    main()
