"""A quarter of the FFN neurons, and 5 of 30 layers, cut out and recovered, beside random ones.

python benchmarks/quality/structured.py --calibration TEXT --text OTHER_TEXT --out docs/quality-structured.json
"""

from __future__ import annotations

import copy
from typing import Any

from protocol import arguments, read_results, setup, write_results

import sparseprune as sp
from sparseprune.measure.evaluate import decode_speed, prompt_speed
from sparseprune.recovery import TokenStream, Training, recover

CASES = {
    "a quarter of the neurons": ("neurons", 0.25),
    "5 of 30 layers": ("layers", 5 / 30),
    "a third of the head groups": ("heads", 1 / 3),
}


def measures(model: Any) -> dict[str, float]:
    return {
        "parameters": sum(it.numel() for it in model.parameters()),
        "decode": decode_speed(model).tokens_per_second,
        "prompt": prompt_speed(model).tokens_per_second,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3, help="of recovery for each")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:2])
    options = parser.parse_args()
    protocol = setup(options)
    dense = protocol.model
    results = read_results(options.out)
    if "dense" not in results:
        results["dense"] = {"perplexity": protocol.perplexity(dense), **measures(dense)}
    results["minutes of recovery"] = options.minutes
    for case in options.cases:
        for criterion in ("auto", "random"):
            key = f"{case}, {criterion}"
            if key in results:
                continue
            structure, fraction = CASES[case]
            model = copy.deepcopy(dense)
            data = protocol.calibration(32) if criterion != "random" else None
            report = sp.cut(model, structure, fraction, criterion=criterion, calibration=data, progress=True)
            found = {
                "criterion": report.to_dict().get("criterion", criterion),
                "pruned": protocol.perplexity(model),
            }
            recover(
                model,
                TokenStream(protocol.calibration_ids, length=512),
                teacher=dense,
                minutes=options.minutes,
                training=Training(options.learning_rate),
                progress=True,
            )
            results[key] = found | {"perplexity": protocol.perplexity(model)} | measures(model)
            write_results(options.out, results)
            print(f"{key}: {found['pruned']:.2f}, recovered {results[key]['perplexity']:.2f}", flush=True)
    write_results(options.out, results)


if __name__ == "__main__":
    main()
