"""What the compiler gives each CUDA kernel: registers, static shared memory, spills. No GPU is needed.

    python scripts/kernel_resources.py            # rewrite docs/kernel_resources.csv
    python scripts/kernel_resources.py --check    # compare with it; a change of compiler may move registers, so only kernels that appear,
                                                  # vanish or grow by more than 8 registers fail
    .. csrc/vq csrc/attention/attention_f32.cu    # these files or folders alone; kernels of others keep their rows

Compiles every csrc/**/*.cu with nvcc for sm_80 and sm_90, as many at a time as there are processors. A spill fails in either mode. Exit codes: 0 fine, 1 spills or a stale table,
2 no nvcc.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "kernel_resources.csv"
ARCHS = ("80", "90")
COLUMNS = ("kernel", "arch", "registers", "static_shared_bytes", "spill_bytes")
SLACK = 8  # registers


def compile_report(source: Path, arch: str) -> str:
    """ptxas's -v output with demangled names."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-c", "-Xptxas", "-v", f"-arch=sm_{arch}", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.relative_to(ROOT)} does not compile for sm_{arch}:\n{done.stderr}")
    return subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout


def parse(report: str, op: str, arch: str) -> list[dict[str, str]]:
    """One row a kernel, named op/kernel<arguments> without namespaces and parameters."""
    rows = []
    for block in re.split(r"Compiling entry function '", report)[1:]:
        name = block.split("' for ")[0]
        name = re.sub(r"\(anonymous namespace\)::|\bmmfast::|^void ", "", name)
        name = re.sub(r"\(DType\)(\d)", lambda m: ("f32", "f16", "bf16", "f64")[int(m[1])], name)
        name = re.sub(r"\(.*", "", name)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        registers = re.search(r"Used (\d+) registers", block).group(1)
        shared = re.search(r"(\d+) bytes smem", block)
        values = (f"{op}/{name.replace(' ', '')}", f"sm_{arch}", registers, shared.group(1) if shared else "0", str(spills))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def key(row: dict[str, str]) -> tuple[str, str]:
    return row["kernel"], row["arch"]


def stale(old: list[dict[str, str]], new: list[dict[str, str]], whole: bool = True) -> list[str]:
    """What differs by more than a change of compiler explains; new need not hold all kernels unless it is the ``whole``."""
    before, after = ({key(r): r for r in rows} for rows in (old, new))
    problems = [f"{k} {a}: in the table but not in the sources" for k, a in before.keys() - after.keys() if whole]
    problems += [f"{k} {a}: not in the table" for k, a in after.keys() - before.keys()]
    for k, a in before.keys() & after.keys():
        was, now = int(before[k, a]["registers"]), int(after[k, a]["registers"])
        if now > was + SLACK:
            problems.append(f"{k} {a}: {now} registers, {was} in the table")
    return sorted(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in table instead of rewriting it")
    parser.add_argument("paths", nargs="*", help="files or folders below csrc; default all")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        print("kernel_resources: no nvcc on PATH", file=sys.stderr)
        return 2
    wanted = [Path(p).resolve() for p in args.paths] or [ROOT / "csrc"]
    sources = [s for s in sorted((ROOT / "csrc").rglob("*.cu")) if any(s.is_relative_to(w) for w in wanted)]
    if not sources:
        parser.error(f"no .cu file under {' '.join(args.paths)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = list(product(sources, ARCHS))
        reports = pool.map(lambda job: parse(compile_report(*job), job[0].parent.name, job[1]), jobs)
        rows = [row for report in reports for row in report]
    problems = [f"{r['kernel']} {r['arch']}: {r['spill_bytes']} bytes of spills" for r in rows if int(r["spill_bytes"])]
    with open(TABLE, newline="") as f:
        old = list(csv.DictReader(f))
    if args.check:
        problems += stale(old, rows, whole=not args.paths)
    else:
        merged = ({key(r): r for r in old} if args.paths else {}) | {key(r): r for r in rows}
        with open(TABLE, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged[k] for k in sorted(merged))
    print("\n".join(problems) if problems else f"{len(rows)} kernel instances, no spills")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
