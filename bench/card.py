"""What the card and its libraries do, in the few places where our choices rest on it; ``scripts/gpu.sh card`` prints it and writes ``card.csv``.

Copy bandwidth and matrix rates (the limits beside every other figure), the matrix library's rate at few rows of a head, the backend that torch's SDPA picks
for each attention shape, and the rate of our row kernel as vocabularies grow. A CPU measures the last and the products, small.
"""

import pytest
import timing
import torch
from ops.bench_attention import CASES, make
from torch.nn.attention import SDPBackend

import mmfast

DEVICE = timing.DEVICE
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
COLUMNS = ["question", "case", "median_ms", "tflops", "gbps", "of_limit", "answer"]
ROWS: list[dict] = []


def note(question: str, case: str, median: float | None = None, flops: float = 0, bytes_: float = 0, answer: str = "") -> None:
    row = dict(question=question, case=case, answer=answer)
    if median is not None:
        row |= dict(median_ms=f"{median:.4f}", tflops=f"{flops / median / 1e9:.4g}", gbps=f"{bytes_ / median / 1e6:.4g}")
        card = timing.limits()
        if card:
            share = flops / median / 1e9 / card["bfloat16_tflops"] if flops else bytes_ / median / 1e6 / card["copy_gbps"]
            row["of_limit"] = f"{share:.3f}"
    ROWS.append(row)
    print(f"  {question}: {case}  " + "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("question", "case") and v))
    timing.write_rows("card", ROWS, columns=COLUMNS)


def median(call) -> float:
    return timing.interleaved({"it": call}, repeats=30 if DEVICE == "cuda" else 3, warmup=5, device=DEVICE)["it"][0]


def test_limits():
    if DEVICE == "cpu":
        pytest.skip("limits are measured on a GPU")
    for name, value in timing.limits().items():
        note("limit", name, answer=f"{value:g}")


def test_products_of_few_rows():
    """Is a product with a head of few rows as quick as the large ones? Below a thousand rows chunks of pairs would pay if not."""
    width, vocabulary = timing.sizes((512, 4000), (4096, 32064), (32, 300))
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=DTYPE)
    for rows in timing.sizes((64, 512), (64, 128, 256, 384, 512, 640, 768, 1024, 2048, 4096), (4, 8)):
        x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
        note("product with the head", f"{rows} rows, {width} x {vocabulary}", median(lambda x=x: x @ weight.t()), 2 * rows * weight.numel())


def test_row_kernel():
    """Row statistics of logits that exist already: a CTA a row. What would several CTAs a row gain at large vocabularies and few rows?"""
    for vocabulary in timing.sizes((32_064,), (32_064, 65_536, 151_936), (300,)):
        for rows in timing.sizes((64,), (64, 512, 4096), (4,)):
            logits = torch.randn(rows, vocabulary, device=DEVICE, dtype=DTYPE)
            labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
            with torch.no_grad():
                took = median(lambda z=logits, y=labels: mmfast.label_logp(z, y))
            note("row kernel", f"{rows} rows of {vocabulary}", took, 0, logits.numel() * logits.element_size())


def test_backend_of_sdpa():
    if DEVICE == "cpu":
        pytest.skip("SDPA picks among backends on a GPU")
    for case in CASES:
        made, _, _ = make(case, torch.bfloat16, 0.0)
        q, k, v = (t.transpose(1, 2) for t in made["sdpa math"].leaves)
        mask = made["sdpa math"].call.keywords.get("mask")
        gqa = k.shape[1] != q.shape[1]
        try:
            choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, enable_gqa=gqa)
        except Exception as refusal:
            print(f"  {case} left out: {type(refusal).__name__} {str(refusal)[:120]!r}")
            continue
        names = {int(b.value if hasattr(b, "value") else b): name for name, b in SDPBackend.__members__.items()}
        note("backend of SDPA", str(case), answer=names.get(int(choice), str(choice)))
