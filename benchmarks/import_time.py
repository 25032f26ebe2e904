"""How long `import rat_ext` takes beyond `import torch`, each in a fresh interpreter.

    python benchmarks/import_time.py

Run it outside a source tree without a built core, or with rat_ext installed.
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import time, torch
start = time.perf_counter()
import rat_ext
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    command = [sys.executable, "-c", CODE]
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    ]
    milliseconds = sorted(1e3 * t for t in times)
    print(
        f"import rat_ext after import torch: median {statistics.median(milliseconds):.0f} ms "
        f"({milliseconds[0]:.0f} to {milliseconds[-1]:.0f} ms in {runs} runs; target: < 100 ms)"
    )


if __name__ == "__main__":
    main()
