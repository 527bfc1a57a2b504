"""What the compiler gives each CUDA kernel: registers, static shared memory, spills. No GPU is needed.

    python scripts/kernel_resources.py            # rewrite docs/kernel_resources.csv
    python scripts/kernel_resources.py --check    # compare with it; a change of compiler may move registers, so only kernels that appear,
                                                  # vanish or grow by more than 8 registers fail

Compiles every csrc/**/*.cu with nvcc for sm_80 and sm_90. A spill fails in either mode. Exit codes: 0 fine, 1 spills or a stale table,
2 no nvcc.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
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


def stale(old: list[dict[str, str]], new: list[dict[str, str]]) -> list[str]:
    """What differs by more than a change of compiler explains."""
    before, after = ({(r["kernel"], r["arch"]): r for r in rows} for rows in (old, new))
    problems = [f"{k} {a}: in the table but not in the sources" for k, a in before.keys() - after.keys()]
    problems += [f"{k} {a}: not in the table" for k, a in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        was, now = int(before[key]["registers"]), int(after[key]["registers"])
        if now > was + SLACK:
            problems.append(f"{key[0]} {key[1]}: {now} registers, {was} in the table")
    return sorted(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in table instead of rewriting it")
    check = parser.parse_args().check
    if not shutil.which("nvcc"):
        print("kernel_resources: no nvcc on PATH", file=sys.stderr)
        return 2
    rows = []
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        for arch in ARCHS:
            rows += parse(compile_report(source, arch), source.parent.name, arch)
    rows.sort(key=lambda r: (r["kernel"], r["arch"]))
    problems = [f"{r['kernel']} {r['arch']}: {r['spill_bytes']} bytes of spills" for r in rows if int(r["spill_bytes"])]
    if check:
        with open(TABLE, newline="") as f:
            problems += stale(list(csv.DictReader(f)), rows)
    else:
        with open(TABLE, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(problems) if problems else f"{len(rows)} kernel instances, no spills")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
