"""Three cities and 26 car parks learn to forecast the next hour; see README.md beside this file.

python examples/traffic/run.py [--small] [--seed N]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time

import numpy as np
from forecasts import QUICK, Settings, alone, congested, error, naive, signal, together
from networks import NETWORKS, ParkMLP
from places import CITIES, everybody, newcomers


def main() -> None:
    parser = argparse.ArgumentParser(description="traffic of four cities, forecast together")
    parser.add_argument("--small", action="store_true", help="few rounds and short records: that it runs, not how well")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    settings = QUICK if asked.small else Settings()
    begin = time.monotonic()
    places = everybody(quick=asked.small)
    few = newcomers(places, asked.seed)
    solo = alone(places, few, asked.seed, settings)
    federated = together(places, few, asked.seed, settings)

    old = [name for name in places if name not in few]
    print("Mean absolute error an hour ahead, in standard deviations, on test rows\n")
    print(f"{'':<18}{'network':<11}{'rows':>5}{'last':>8}{'week':>8}{'ridge':>8}{'alone':>8}{'federated':>11}")
    lines = []
    for name in old:
        place = places[name]
        scores = [*naive(place).values(), error(solo[name][:, 0], place), error(federated[name][:, 0], place)]
        lines.append(scores)
        network = NETWORKS.get(name, ParkMLP).__name__
        print(f"{name:<18}{network:<11}{len(place.parts.train):>5}" + "".join(f"{x:8.3f}" for x in scores[:-1]), end="")
        print(f"{scores[-1]:11.3f}" + " *" * (scores[-1] < scores[-2]))
    cities = len(CITIES)
    for what, part in (("mean of cities", lines[:cities]), ("mean of car parks", lines[cities:])):
        mean = np.mean(part, axis=0)
        print(f"{what:<34}" + "".join(f"{x:8.3f}" for x in mean[:-1]) + f"{mean[-1]:11.3f}")
    better = sum(line[-1] < line[-2] for line in lines)
    print(f"\n* federated is better than alone: {better} of {len(lines)}")

    print(f"\nNewcomers, from round {settings.joins_at} with a quarter of their training rows\n")
    print(f"{'':<18}{'rows':>5}{'ridge, all':>12}{'alone, quarter':>16}{'alone, all':>12}{'newcomer':>10}")
    rows = []
    for name, place in few.items():
        whole = places[name]
        scores = [
            naive(whole)["ridge"],
            error(solo[f"{name}.quarter"][:, 0], place, whole),
            error(solo[name][:, 0], whole),
            error(federated[name][:, 0], place, whole),
        ]
        rows.append(scores)
        print(
            f"{name:<18}{len(place.parts.train):>5}{scores[0]:12.3f}{scores[1]:16.3f}{scores[2]:12.3f}{scores[3]:10.3f}"
        )
    mean = np.mean(rows, axis=0)
    print(f"{'mean':<23}{mean[0]:12.3f}{mean[1]:16.3f}{mean[2]:12.3f}{mean[3]:10.3f}")

    ways = {"alone": solo, "federated": federated}
    told = {way: np.nanmean([congested(said[name], places[name]) for name in old]) for way, said in ways.items()}
    print("\nCongested in an hour (AUC, mean of participants): " + ", ".join(f"{w} {x:.3f}" for w, x in told.items()))
    waits = signal(places, ways, asked.seed)
    print("\nA crossing whose green is divided each hour by flows that are believed, mean delay of a vehicle:")
    print("   ".join(f"{way} {seconds:.2f} s" for way, seconds in waits.items()))
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
