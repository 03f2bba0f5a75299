"""Where the time of training and of encoding goes, padded and packed, in fp32 and bf16; and what
the products of a layer reach alone.

python benchmarks/step_profile.py  # three minutes; writes results/step_profile.json and docs/LOG.md

One thread, all-MiniLM-L6-v2. Training: batches of 64 NLI pairs (the quickstart corpus where
CONTRASTIVE_ST_DATA has none), dropout as in the model's config, fused AdamW.
Encoding: 500 short texts of the same, and 100 passages.
"""

import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import HERE, arguments, one_thread, record, write
from speed import MODEL, data_folder, prepare, read_pairs
from speed_side import GEMM_TOKENS, layer_products
from transformers import AutoTokenizer

from contrastive_st.model import SentenceEncoder
from contrastive_st.run import TrainConfig, batch_loss
from contrastive_st.tokens import Tokens

KINDS = {  # name of an operation -> what it is for
    r"aten::(mm|addmm)$|linear_pointwise": "products of weights",
    r"flash_attention": "fused attention",
    r"aten::(bmm|baddbmm)$": "products of attention",
    r"bernoulli_|random_|bitwise_and|native_dropout": "dropout",
    r"index_select|aten::index$|embedding": "gathers",
    r"copy_": "casts and copies",
    r"fill_|zero_": "zeros, such as the vocabulary's gradient",
    r"gelu": "GELU",
    r"softmax": "softmax",
    r"layer_norm": "layer norm",
    r"adamw|foreach|linalg": "AdamW and clipping",
    r"aten::(add|add_|sum|mul|mul_|div|div_|where|neg_|ge_|all|lt)$": "other arithmetic",
}


def make_step(encoder, optimizer, bf16):
    "One step on a token batch."
    config = TrainConfig(symmetric=False)

    def step(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            vectors = encoder(batch.token_ids, batch.lengths)
        batch_loss(vectors.float(), batch.identities, config)[0].backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def shares(profile) -> dict[str, float]:
    "Share of the CPU time for each kind of operation."
    found = dict.fromkeys([*KINDS.values(), "the rest, Python among it"], 0.0)
    for event in profile.key_averages():
        kind = next(
            (kind for pattern, kind in KINDS.items() if re.search(pattern, event.key)),
            "the rest, Python among it",
        )
        found[kind] += event.self_cpu_time_total
    return {kind: spent / sum(found.values()) for kind, spent in found.items()}


def profiled(work, items: list) -> dict:
    "CPU seconds of `work` on an item, and where they go; the first item warms up."
    seconds = []
    for item in items:
        start = time.process_time()
        work(item)
        seconds.append(time.process_time() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for item in items[1:]:
            work(item)
    return {"seconds": statistics.median(seconds[1:]), "shares": shares(profile)}


def step_of(layout: str, bf16: bool):
    "A training step of a new encoder."
    encoder = SentenceEncoder.from_pretrained(str(MODEL)).train()
    encoder.layout = layout
    return make_step(encoder, torch.optim.AdamW(encoder.parameters(), lr=2e-5, fused=True), bf16)


def encoding(folder, tokenizer, rounds: int) -> dict:
    "The profile of encoding short texts and passages."
    with tempfile.TemporaryDirectory() as work:
        texts = prepare(folder, Path(work), tokenizer).encode
    parts = {
        kind: [texts[kind][n * i : n * (i + 1)] for i in range(rounds)]
        for kind, n in (("short", 500), ("passages", 100))
    }
    encoder = SentenceEncoder.from_pretrained(str(MODEL))
    return {
        f"{kind} {'bf16' if bf16 else 'fp32'}": profiled(
            lambda part: encoder.encode(part, bf16=bf16, progress=False), parts[kind]
        )
        for bf16 in (False, True)
        for kind in parts
    }


def rates(dtype: torch.dtype, precision: str, rounds: int = 5) -> dict[int, list[float]]:
    "Measure GFLOP/s of a layer's products by token count: forward, input and weight gradients."
    torch.set_float32_matmul_precision(precision)
    found = {}
    for tokens in GEMM_TOKENS:
        products, times = layer_products(tokens, 384, 1536, dtype, True), []
        for _ in range(rounds):
            spent = [0.0] * 3
            for i, (product, _) in enumerate(products):
                start = time.process_time()
                product()
                spent[i % 3] += time.process_time() - start
            times.append(spent)
        found[tokens] = [
            sum(flops for _, flops in products) / 3e9 / statistics.median(column)
            for column in zip(*times)
        ]
    torch.set_float32_matmul_precision("highest")
    return found


def share_table(title: str, found: dict) -> list[str]:
    "CPU seconds and shares in Markdown, without the kinds that are nowhere."
    ways = list(found.values())
    lines = [
        f"| {title} | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
        "| CPU seconds | " + " | ".join(f"{way['seconds']:.2f}" for way in ways) + " |",
    ]
    return lines + [
        f"| {kind} | " + " | ".join(f"{way['shares'][kind]:.0%}" for way in ways) + " |"
        for kind in ways[0]["shares"]
        if max(way["shares"][kind] for way in ways) >= 0.005
    ]


def tables(results: dict) -> str:
    "The tables in Markdown."
    ways = list(results["gemm_gflops"])
    lines = [
        *share_table("share of a step of 64 pairs", results["steps"]),
        "",
        *share_table("share of encoding 500 short texts, 100 passages", results["encoding"]),
    ]
    lines += [
        "",
        (
            "GFLOP/s of the products of one layer (forward / gradient of the input / gradient of"
            " the weights):"
        ),
        "",
        "| tokens | " + " | ".join(ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    for tokens in GEMM_TOKENS:
        rates = [results["gemm_gflops"][way][tokens] for way in ways]
        cells = [" / ".join(f"{rate:,.0f}" for rate in three) for three in rates]
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            (
                f"`{results['command']}`, {results['date']}, {results['hardware']}, torch"
                f" {results['versions']['torch']}, one thread."
            ),
        ]
    )


def main() -> None:
    one_thread()
    settings, tokenizer = arguments(__doc__.splitlines()[0]), AutoTokenizer.from_pretrained(MODEL)
    folder, rounds = data_folder(), 3 if settings.quick else 5
    pairs, tokens = read_pairs(folder, tokenizer)[0], Tokens(tokenizer, 256)
    batches = [tokens(pairs[64 * i : 64 * (i + 1)]) for i in range(rounds)]
    results = {
        "steps": {
            f"{layout} {'bf16' if bf16 else 'fp32'}": profiled(step_of(layout, bf16), batches)
            for bf16 in (False, True)
            for layout in ("padded", "packed")
        }
    }
    results["encoding"] = encoding(folder, tokenizer, rounds)
    results["gemm_gflops"] = {
        "fp32": rates(torch.float32, "highest"),
        'fp32, "medium"': rates(torch.float32, "medium"),
        "bf16": rates(torch.bfloat16, "highest"),
    }
    results |= record("torch", "transformers")
    write(results, "step_profile", settings.out)
    print(tables(results))
    log = HERE.parent / "docs" / "LOG.md"
    if settings.out == HERE / "results":
        log.write_text(
            re.sub(
                r"(<!-- profile -->\n).*?(\n<!-- end of profile -->)",
                lambda m: m[1] + tables(results) + m[2],
                log.read_text(),
                flags=re.S,
            )
        )


if __name__ == "__main__":
    main()
