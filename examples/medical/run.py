"""Hospitals that differ, in four parts: thyroid clinics, breast cancer genes, and two stand-ins for image and panel.

    python examples/medical/run.py [--part thyroid|genes|modalities|paired] [--small] [--seed 0]

What to expect, data licences, and what did not work: README.md beside this file.
"""

import argparse
import importlib
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import polyfed as pf

PARTS = {
    "thyroid": "Thyroid clinics: real patients, boosted trees teach a network, a shared base under own heads",
    "genes": "Breast cancer cohorts: real patients, real genes, unlike panels",
    "modalities": "STAND-IN for image and panel: real pairs of views, of digits and not of patients",
    "paired": "STAND-IN, SYNTHETIC: real pictures of digits beside invented genes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given twice")
    parser.add_argument("--small", action="store_true", help="a few rounds: that it runs, not how well")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.part or PARTS:
        print(f"== {name}. {PARTS[name]}\n", flush=True)
        begin = time.monotonic()
        try:
            print(importlib.import_module(name).show(options.seed, small=options.small))
        except pf.errors.DataError as error:
            if name != "genes":  # the one part whose files are not polyfed's to bring
                raise
            print(f"left out: {error}")
        print(f"\n({time.monotonic() - begin:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
