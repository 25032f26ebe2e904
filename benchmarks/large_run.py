"""Peak memory of a run that writes its radii as it goes, by the number of samples.

    python benchmarks/large_run.py

Generated samples and a small multi-layer perceptron; each number of samples in a process of its
own, which also resumes the finished run, to show what finding nothing to do costs.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time

SAMPLES = (20_000, 200_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--folder", help="(of one run, for internal use)")
    options = parser.parse_args()
    if options.folder:
        return run(options.samples[0], options.folder)
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--folder", f"{folder}/out"]
            subprocess.run([*command, "--samples", str(samples)], check=True)


def run(samples: int, folder: str) -> None:
    import torch
    from torch import nn

    import rat_ext

    class Generated(torch.utils.data.Dataset):
        """Sample i depends on i alone, and takes no memory before it is asked for."""

        def __len__(self) -> int:
            return samples

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return (torch.arange(64.0) * 0.37 + index * 0.11).sin().add(1).div(2), index

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loader = torch.utils.data.DataLoader(Generated(), batch_size=500)
    before = peak()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        shards = rat_ext.robust_radii(model, loader, out=folder, resume=True)
        seconds.append(time.perf_counter() - start)
    assert sum(len(shard["radius"]) for shard in shards) == samples
    print(
        f"{samples:>9,} samples: peak memory {peak():.0f} MiB ({before:.0f} before the run), "
        f"{seconds[0]:.1f} s; resuming the finished run {seconds[1]:.2f} s; {len(shards)} files"
    )


def peak() -> float:
    """MiB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
