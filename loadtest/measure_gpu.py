"""Measures a model's steps and the copies of its KV on one GPU, and fits what we estimate.

    python -m loadtest.measure_gpu --out FOLDER         # on a machine with an NVIDIA GPU
    python -m loadtest.measure_gpu --raw FILE           # the tables of a measurement, anywhere

Llama-3.1-8B with random weights in bfloat16. Only the model is measured, not an engine around it:
`engine_adapter.calibrate` measures that. Takes some minutes and 70 GB of a GPU's memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from engine_adapter.cost_files import save
from loadtest.gpu_raw import read, write
from loadtest.gpu_report import cost_model, report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.measure_gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for measurement and cost model")
    parser.add_argument("--raw", type=Path, metavar="FILE", help="report this, measure nothing")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.raw is None:
        from loadtest.gpu_measure import NoGpu, measure

        try:
            raw = measure(options.seed, datetime.now(UTC).date().isoformat())
        except NoGpu as e:
            print(f"not measured: {e}", file=sys.stderr)
            return 1
    else:
        raw = read(options.raw)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.raw is None:
            write(raw, options.out / "raw.json")
        print(f"written to {save(cost_model(raw), options.out)}")
    print(report(raw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
