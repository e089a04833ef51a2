"""A checkpoint larger than memory, compressed tensor by tensor: seconds, peak memory, the same result after kills.

    python benchmarks/sharded_checkpoint.py --gigabytes 6 --limit-gigabytes 1.5 --kills 5 --processes 2

Makes a Llama of random float32 weights in files of about 500 MB, and runs ``decomp compress --weights-only`` on
it, in several processes that are killed again and again and started anew, and in one process at once. No process
may write to more memory than the limit (RLIMIT_DATA; one that needs more fails). The peak is the largest resident
set of any process, as the kernel counts it. The two results are compared byte by byte, and the first is loaded.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

WORK = ".decomp-unfinished"
ROOT = Path(__file__).parents[1]


def make_checkpoint(folder: Path, gigabytes: float, hidden: int) -> transformers.LlamaConfig:
    """Write a checkpoint of about this size, a layer of the model at a time."""
    inner, vocabulary = 11 * hidden // 4, 32_000
    shape = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary}
    per_layer = 4 * (4 * hidden**2 + 3 * hidden * inner)
    layers = max(1, round((gigabytes * 1e9 - 8 * hidden * vocabulary) / per_layer))
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=16, tie_word_embeddings=False, dtype="float32", **shape
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: each.shape for name, each in transformers.LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    files = 0
    for index, (name, size) in enumerate(sizes.items()):
        value = torch.randn(size, generator=generator) if len(size) > 1 else torch.ones(size)
        shard[name] = value * size[-1] ** -0.5 if len(size) > 1 else value
        if sum(each.nbytes for each in shard.values()) > 5e8 or index == len(sizes) - 1:
            files += 1
            file = f"model-{files:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return config


def started(
    folder: Path, output: str, ranks: str, limit_bytes: int, rank: int, size: int
) -> subprocess.Popen[bytes]:
    """Start one process of the command, as torchrun would."""
    command = [sys.executable, "-m", "decomp", "compress", "dense", "--weights-only", "--ranks", ranks, "--quiet"]
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, "--output", output],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process: its status and the peak of its resident set in bytes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def run_with_kills(
    folder: Path, output: str, ranks: str, limit_bytes: int, size: int, kills: int, layers: int
) -> tuple[float, int]:
    """Run the command in processes that are all killed after every (kills + 1)-th part of the layers."""
    work = folder / output / WORK
    begin, peak = time.perf_counter(), 0
    for kill in range(1, kills + 1):
        processes = [started(folder, output, ranks, limit_bytes, rank, size) for rank in range(size)]
        while len(list(work.glob("*.safetensors"))) < kill * layers / (kills + 1):
            if any(process.poll() is not None for process in processes):
                raise SystemExit("a process ended by itself")
            time.sleep(0.02)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        peak = max(peak, *(ended(process)[1] for process in processes))
        print(f"  killed with {len(list(work.glob('*.safetensors')))} of {layers} layers done", flush=True)
    processes = [started(folder, output, ranks, limit_bytes, rank, size) for rank in range(size)]
    results = [ended(process) for process in processes]
    if any(status for status, _ in results):
        raise SystemExit(f"statuses {[status for status, _ in results]}")
    return time.perf_counter() - begin, max(peak, *(memory for _, memory in results))


def digest(folder: Path) -> str:
    """Of the names and bytes of all files."""
    total = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode())
        with open(path, "rb") as file:
            while chunk := file.read(2**24):
                total.update(chunk)
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--hidden", type=int, default=1024, help="sizes of the layers follow from it")
    parser.add_argument("--limit-gigabytes", type=float, default=1.5)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--processes-at-once", type=int, default=1, help="of the run that nobody kills")
    parser.add_argument("--ranks", default="params(0.5)")
    parser.add_argument("--folder", type=Path, help="for the files, which are removed afterwards")
    options = parser.parse_args()
    limit = int(options.limit_gigabytes * 1e9)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (folder / "dense").mkdir()
        config = make_checkpoint(folder / "dense", options.gigabytes, options.hidden)
        total = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
        layers = 7 * config.num_hidden_layers + 1
        print(
            f"checkpoint of {total / 1e9:.2f} GB, {layers} layers, limit {limit / 1e9:.2f} GB a process",
            flush=True,
        )
        rows = []
        runs = (("killed", options.processes, options.kills), ("at_once", options.processes_at_once, 0))
        for output, size, kills in runs:
            label = f"{size} process{'es' * (size > 1)}, {kills or 'no'} kills"
            seconds, peak = run_with_kills(folder, output, options.ranks, limit, size, kills, layers)
            rows.append((label, f"{seconds:.0f}", f"{peak / 1e9:.2f}", digest(folder / output)))
            print(f"  {label}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB", flush=True)
        size = sum(path.stat().st_size for path in (folder / "killed").glob("*.safetensors"))
        print(f"\noutput of {size / 1e9:.2f} GB\n")
        print(f"{'run':28} {'seconds':>8} {'peak GB':>8}  digest")
        for label, seconds_text, peak_text, of_files in rows:
            print(f"{label:28} {seconds_text:>8} {peak_text:>8}  {of_files}")
        print("\nthe results are the same" if rows[0][3] == rows[1][3] else "\nTHE RESULTS DIFFER")
        import decomp.huggingface

        small = decomp.huggingface.from_pretrained(folder / "killed")
        with torch.no_grad():
            finite = bool(torch.isfinite(small(torch.zeros(1, 4, dtype=torch.long)).logits).all())
        print(
            f"loaded {sum(p.numel() for p in small.parameters()) / 1e6:.0f} M parameters, output finite: {finite}"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
