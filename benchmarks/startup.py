"""How long `graphopt --help` takes, against importing the libraries that graphopt stands on.

    python benchmarks/startup.py

The two commands run in turn, 20 times each; the medians and their ratio are printed. The ratio
should stay at or below 0.3.
"""

import statistics
import subprocess
import sys
import time

RUNS = 20
COMMANDS = {
    "graphopt --help": [sys.executable, "-c", "from graphopt.cli import main; main()", "--help"],
    "the libraries": [sys.executable, "-c", "import onnxruntime, scipy.linalg, networkx"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    for command in COMMANDS.values():
        seconds(command)  # files into the page cache, bytecode onto the disk
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    for name, median in medians.items():
        print(f"{name:16} {1000 * median:6.0f} ms")
    ours, theirs = medians.values()
    print(f"{'ratio':16} {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
