"""Dropout that belongs to the row: one function of seed, step and place, whoever computes it."""

import hashlib
import json
import sys

import pytest
import torch
import transformers as tf
from conftest import (
    forked,
    make_backbone,
    make_tokenizer,
    refuses,
    run_itself,
    sentences,
    start_method,
)
from torch.nn.parallel import DistributedDataParallel

from contrastive_st.config import TrainConfig
from contrastive_st.cpu import RowDropout, RowNoise, drop_mask, row_mask
from contrastive_st.gradcache import cached_step, split_batch
from contrastive_st.model import SentenceEncoder, add_adapters, check_row_dropout
from contrastive_st.run import row_noise, seed_step, train_step
from contrastive_st.tokens import TokenBatch, Tokens

P = 0.3
PAIRS = list(zip(sentences(48, 0), sentences(48, 1)))
SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
)
# By name, since transformers imports each when it is asked for. Some call modules for dropout, some
# a function, some the fused attention.
FAMILIES = {
    "bert": ("BertModel", "BertConfig", {}),
    "mpnet": ("MPNetModel", "MPNetConfig", {}),
    "albert": (
        "AlbertModel",
        "AlbertConfig",
        dict(embedding_size=16, hidden_dropout_prob=P, attention_probs_dropout_prob=P),
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        dict(attention_dropout=P, mlp_dropout=P, embedding_dropout=P, local_attention=8),
    ),
    "qwen3": (
        "Qwen3Model",
        "Qwen3Config",
        dict(attention_dropout=P, num_key_value_heads=2, head_dim=8),
    ),
    "gemma2": (
        "Gemma2Model",
        "Gemma2Config",
        dict(attention_dropout=P, num_key_value_heads=2, head_dim=8, sliding_window=64),
    ),
}


def make_encoder(family="bert", dtype=torch.float32, head=()):
    "A random encoder of two layers in training mode, with dropout."
    model, config, options = FAMILIES[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = getattr(tf, config)(vocab_size=len(tokenizer), **SHAPE, **options)
    backbone = getattr(tf, model)(config)
    encoder = SentenceEncoder(backbone.to(dtype), tokenizer, max_length=48, head=head).train()
    return set_dropout(encoder) if family == "bert" else encoder


def set_dropout(encoder, p=P):
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = p
    return encoder


def trained(out, steps=3, stop_after=None, **options):
    "Train the tiny encoder, perhaps until an interruption; return the loss of each step."
    # Imported here, since the program below needs no Trainer.
    from transformers import TrainerCallback

    from contrastive_st.trainer import train

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_after:
                raise InterruptedError

    resume = options.pop("resume", False)
    config = TrainConfig(steps, lr=1e-3, warmup=0, log_every=1, **options)
    run = dict(resume=resume, callbacks=[Interrupt()], progress=False, batch_size=8)
    train(make_encoder(), PAIRS, config, out, **run)
    history = json.loads((out / "history.json").read_text())
    return [line["loss"] for line in history if "loss" in line]


def record_ranks(out, ranks):
    "Let a run look as if it had begun on so many processes."
    versions = json.loads((out / "versions.json").read_text())
    assert versions["ranks"] == 1
    (out / "versions.json").write_text(json.dumps(versions | {"ranks": ranks}))


def make_batch(N=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (N,), generator=draw)
    return torch.randint(5, 100, (int(lengths.sum()),), generator=draw), lengths


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradient(encoder, vectors):
    "All gradients of a loss that pulls on every vector, as one vector."
    pull = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5))
    encoder.zero_grad()
    (vectors * pull.to(vectors.dtype)).sum().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


# ---- the hash ----


def naive_stays(seed, step, text, places, site, dimension, p):
    "What one number of one dropout does, with Python's integers."

    def mix(x):
        x %= 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest()
    key = mix(mix(text) + int.from_bytes(digest, "little"))
    number = 0
    for place in places:
        number = number * 2**16 + place + 1
    key = mix(key + number * 0x9E3779B1)
    byte = mix(key + site * 0x27D4EB2F + dimension // 4 * 0x165667B1) >> 8 * (dimension % 4) & 255
    return byte ^ 128 >= round(256 * p)


@pytest.mark.parametrize("D", [1, 7, 12])
def test_masks_equal_a_version_with_python_integers(D):
    texts = torch.tensor([0, 3, 2**31 - 1])
    for seed, step, site in ((0, 0, 1), (2**32 - 1, 10**6, 50)):
        noise = RowNoise(seed, step, texts)
        for counts in ((), (3,), (2, 3)):
            mask = row_mask(noise.places(*counts), D, 0.4, site)
            assert mask.dtype == torch.int8 and mask.shape == (3, *counts, D)
            for place in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
                stays = naive_stays(
                    seed, step, int(texts[place[0]]), place[1:-1], site, place[-1], 0.4
                )
                assert bool(mask[tuple(place)]) == stays
    assert texts.tolist() == [0, 3, 2**31 - 1]


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_rate_is_that_of_the_byte(p):
    mask = row_mask(RowNoise(1, 2, torch.arange(64)).places(32), 384, p, 3)
    assert set(mask.unique().tolist()) <= {0, -1}
    assert (mask == 0).double().mean().item() == pytest.approx(
        min(round(256 * p), 256) / 256, abs=2e-3
    )


def test_masks_of_texts_tokens_sites_steps_and_seeds_are_independent():
    def of(seed=0, step=0, text=0, token=0, site=1):
        return row_mask(
            RowNoise(seed, step, torch.tensor([text])).places(8)[0, token], 2**16, 0.5, site
        )

    changes = [
        dict(seed=1),
        dict(step=1),
        dict(text=1),
        dict(token=1),
        dict(site=2),
        dict(text=2**20),
    ]
    masks = torch.stack([of(), *(of(**change) for change in changes)]).float()
    off = torch.corrcoef(masks)[~torch.eye(len(masks), dtype=torch.bool)]
    assert off.abs().max() < 5 / 2**8  # 5 standard errors
    for shift in (1, 2, 3, 4, 5, 8):  # nor do the numbers of one place know each other
        pair = torch.stack([masks[0, shift:], masks[0, :-shift]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / 2**8


def test_bytes_are_uniform():
    keys = RowNoise(0, 0, torch.arange(256)).places(16)
    for p in (8 / 256, 64 / 256, 200 / 256):
        dropped = (row_mask(keys, 256, p, 1) == 0).double()
        n = dropped.numel()
        for axis in (0, 1, 2):  # no text, token or dimension is dropped more often
            rates = dropped.mean([a for a in range(3) if a != axis])
            chi = ((rates - p) ** 2).sum() / (p * (1 - p) * len(rates) / n)
            assert abs(chi - len(rates)) < 5 * (2 * len(rates)) ** 0.5


def test_keys_of_packed_tokens_are_those_of_the_rectangle():
    noise, lengths = RowNoise(0, 5, torch.tensor([4, 9, 2])), torch.tensor([3, 1, 6])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    rectangle = noise.places(6)
    expected = torch.cat([row[:n] for row, n in zip(rectangle, lengths.tolist())])
    assert torch.equal(noise.tokens(lengths, positions), expected)
    # longer rectangles, more heads: what was there stays
    assert torch.equal(noise.places(3, 9)[:, :2, :4], noise.places(2, 4))


# ---- models ----


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_depend_on_the_rows_alone(family):
    encoder, (ids, lengths) = make_encoder(family, torch.float64), make_batch()
    noise = RowNoise(0, 7, torch.arange(len(lengths)) + 100)
    check_row_dropout(encoder)
    layouts = dict.fromkeys([encoder.layout, "padded"])
    assert len(layouts) == 1 + (family != "gemma2")
    truth = of_weights = None
    for layout in layouts:
        for budget in (1, 100, 10**6):
            encoder.layout, encoder.token_budget = layout, budget
            torch.manual_seed(budget)
            vectors = encoder(ids, lengths, noise=noise)
            truth = vectors if truth is None else truth
            assert apart(vectors, truth) < (1e-6 if family == "gemma2" else 1e-12)
            found = gradient(encoder, vectors)
            of_weights = found if of_weights is None else of_weights
            assert apart(found, of_weights) < (1e-5 if family == "gemma2" else 1e-10)
    # other numbers drop other things, and some of the texts have the vectors of all
    assert apart(encoder(ids, lengths, noise=RowNoise(0, 8, torch.arange(24) + 100)), truth) > 0.05
    first, n = int(lengths[:5].sum()), slice(5, 9)
    some = ids[first : first + int(lengths[n].sum())]
    assert apart(encoder(some, lengths[n], noise=noise.of(n)), truth[n]) < 1e-6
    # outside of training there is no dropout
    encoder.eval()
    assert torch.equal(encoder(ids, lengths, noise=noise), encoder(ids, lengths))


def test_the_mean_over_steps_is_the_model_without_dropout():
    "Nothing is biased: of a linear model the mean over many steps is the value without dropout."
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        total = torch.zeros_like(x)
        for step in range(400):
            with RowDropout(RowNoise(0, step, torch.arange(3))):
                total += torch.nn.functional.dropout(x, 0.5)
    assert (total / 400 / x - 1).abs().max() < 5 / 400**0.5


def test_dropout_of_the_head_and_of_adapters():
    encoder = make_encoder(head=[torch.nn.Dropout(0.5)])
    check_row_dropout(encoder)
    pytest.importorskip("peft", reason="the extra lora is not installed")
    adapted = add_adapters(make_encoder(), r=2, lora_dropout=0.5)
    check_row_dropout(adapted)


def test_bf16():
    encoder, (ids, lengths) = make_encoder(), make_batch()
    noise = RowNoise(0, 7, torch.arange(len(lengths)))
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(ids, lengths, noise=noise)
        encoder.layout = "padded"
        other = encoder(ids, lengths, noise=noise)
    encoder.token_budget = 50
    exact = encoder(ids, lengths, noise=noise)
    assert apart(low, exact) < 0.02 and apart(other, exact) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_gpu_drops_what_a_cpu_drops(layout, bf16):
    encoder, (ids, lengths) = make_encoder(), make_batch()
    noise, encoder.layout = RowNoise(0, 7, torch.arange(len(lengths))), layout
    with torch.no_grad():
        truth = encoder(ids, lengths, noise=noise)
    encoder.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        vectors = encoder(ids.cuda(), lengths, noise=noise)
    assert apart(vectors.detach().cpu().float(), truth) < (0.02 if bf16 else 1e-3)
    assert gradient(encoder.cpu(), vectors.cpu()).isfinite().all()


def test_without_it_the_masks_are_the_draws_of_torch():
    torch.manual_seed(0)
    draws = torch.empty(2, dtype=torch.int64).random_(-(2**63), None).view(torch.int8)
    torch.manual_seed(0)
    assert torch.equal(drop_mask((3, 5), 0.5), (draws[:15].view(3, 5) >= 0).char().neg())


# ---- what cannot do it ----


def test_a_family_whose_dropout_is_shared_by_all_texts_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    config = tf.DebertaV2Config(
        vocab_size=len(tokenizer), **SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"]
    )
    torch.manual_seed(0)
    encoder = SentenceEncoder(tf.DebertaV2Model(config), tokenizer, max_length=64)
    from contrastive_st.trainer import train

    pairs = [(f"where is pier {n}", f"behind shed {n}") for n in range(4)]
    refuses(
        lambda: train(encoder, pairs, out=tmp_path / "run", row_dropout=True, progress=False),
        *("row_dropout is set", "deberta-v2", "leave row_dropout out"),
    )
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_is_refused():
    encoder = make_encoder()
    encoder.backbone.gradient_checkpointing_enable()
    refuses(lambda: check_row_dropout(encoder), "gradient checkpointing", "chunk_tokens")


def test_a_layer_that_draws_by_itself_is_refused():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    encoder = make_encoder()
    encoder.backbone.encoder.layer[0].output.dense = Noisy()
    encoder.backbone.encoder.layer[0].intermediate.dense = torch.nn.Linear(32, 32)
    refuses(lambda: check_row_dropout(encoder), "bert", "leave row_dropout out")


def test_the_trial_leaves_no_trace():
    encoder = make_encoder()
    encoder.backbone.encoder.layer[0].eval()
    modes = [module.training for module in encoder.modules()]
    before = torch.get_rng_state()
    check_row_dropout(encoder)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in encoder.modules()] == modes


def test_what_is_not_by_rows_is_one_sentence():
    with RowDropout(RowNoise(0, 0, torch.arange(3))):
        refuses(lambda: torch.nn.functional.dropout(torch.ones(4, 8)), "(4, '...')", "row by row")
        refuses(lambda: torch.nn.functional.dropout(torch.ones(8)), "row by row")


# ---- batches, chunks, ranks ----


def test_the_numbers_of_texts_are_those_of_the_global_batch(monkeypatch):
    "The ranks' texts are the texts of one rank, column by column."

    def keys(rank, ranks, C=3, B=12):
        share = TokenBatch(None, None, torch.zeros(B // ranks, C), None)
        monkeypatch.setattr("contrastive_st.run.rank_count", lambda: ranks)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        return row_noise(TrainConfig(row_dropout=True), share, 3).keys.view(C, -1)

    whole = keys(0, 1)
    assert len(whole.unique()) == 36
    for ranks in (2, 3, 4):
        assert torch.equal(torch.cat([keys(rank, ranks) for rank in range(ranks)], 1), whole)
    assert row_noise(TrainConfig(), None, 3) is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_chunks_of_the_gradient_cache_change_nothing(layout):
    encoder, (ids, lengths) = make_encoder(dtype=torch.float64), make_batch()
    noise, encoder.layout = RowNoise(0, 7, torch.arange(len(lengths))), layout
    results = []
    for chunks, tokens in ((1, 10**6), (2, -(-len(ids) // 2) + 20), (3, -(-len(ids) // 3) + 20)):
        assert len(split_batch(ids, lengths, tokens)) == chunks
        torch.manual_seed(chunks)
        encoder.zero_grad()
        value = cached_step(
            encoder, ids, lengths, lambda x: x.cos().prod(1).sum(), tokens, noise=noise
        )
        results.append((value, torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    for value, gradients in results[1:]:
        assert value.item() == pytest.approx(results[0][0].item(), rel=1e-12)
        assert apart(gradients, results[0][1]) < 1e-10


def test_a_run_is_the_same_in_chunks_and_after_a_resume(tmp_path, capsys):
    truth = trained(tmp_path / "plain", row_dropout=True)
    chunked = trained(tmp_path / "chunks", row_dropout=True, chunk_tokens=40)
    assert chunked == pytest.approx(truth, rel=1e-5)
    out, options = tmp_path / "resumed", dict(row_dropout=True, save_every=1)
    with pytest.raises(InterruptedError):
        trained(out, stop_after=2, **options)
    record_ranks(out, 2)
    assert trained(out, resume=True, **options) == pytest.approx(truth, rel=1e-6)
    assert "processes" not in capsys.readouterr().err
    refuses(lambda: trained(out, resume=True, save_every=1), "row_dropout was True, now False")


def test_another_number_of_processes_is_told(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trained(out, stop_after=2, save_every=1)
    record_ranks(out, 2)
    trained(out, resume=True, save_every=1)
    told = capsys.readouterr().err
    assert "began with 2 processes and goes on with 1" in told and "row_dropout = true" in told


# ---- several processes ----

STEPS = 4
RUNS = ((1, 2, 0), (2, 3, 60), (3, 4, 40), (4, 1, 25))  # processes, then others; tokens of a chunk


def steps_on(rank, ranks, steps, encoder, by_rows, chunk_tokens):
    "Some steps of SGD on this rank's share of 12 pairs; return the losses."
    config = TrainConfig(row_dropout=by_rows, seed=3, clip=1e9)
    model = DistributedDataParallel(encoder) if ranks > 1 else encoder
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    tokens, b, losses = Tokens(encoder.tokenizer, 64), 12 // ranks, []
    for step in steps:
        batch = tokens(PAIRS[12 * step : 12 * step + 12][rank * b : rank * b + b])
        seed_step(3, step, rank)
        noise = row_noise(config, batch, step)
        no_sync = {"no_sync": model.no_sync} if ranks > 1 else {}
        options = dict(chunk_tokens=chunk_tokens, noise=noise, **no_sync)
        losses.append(train_step(model, batch, config, optimizer, **options)["loss"].item())
    return losses


def phase(rank, ranks, folder, name, steps, by_rows, chunk_tokens, start=None):
    "Train on some ranks, from a file or from the beginning, into a file."
    rendezvous = f"file://{folder}/meet-{name}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=ranks)
    encoder, losses = (
        set_dropout(SentenceEncoder(make_backbone(200), make_tokenizer(), max_length=64)).train(),
        [],
    )
    if start:
        state = torch.load(f"{folder}/{start}.pt", weights_only=True)
        encoder.load_state_dict(state["weights"])
        losses = state["losses"]
    losses = losses + steps_on(rank, ranks, steps, encoder, by_rows, chunk_tokens)
    if rank == 0:
        torch.save({"losses": losses, "weights": encoder.state_dict()}, f"{folder}/{name}.pt")
    torch.distributed.destroy_process_group()


def on_rank(rank, folder, barrier):
    "One of four processes, of which some train at a time."
    torch.set_num_threads(1)
    if rank == 0:
        phase(0, 1, folder, "truth", range(STEPS), True, 0)
        phase(0, 1, folder, "chance", range(STEPS), False, 0)
    for first, second, chunk_tokens in RUNS:
        if rank < first:
            phase(rank, first, folder, f"{first}", range(2), True, chunk_tokens)
        barrier.wait()
        if rank < second:
            name, steps = f"{first}-{second}", range(2, STEPS)
            phase(rank, second, folder, name, steps, True, chunk_tokens, start=f"{first}")


def test_one_to_four_processes_are_one_run(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    run_itself(__file__, tmp_path)
    runs = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    truth = runs["truth"]
    for first, second, _ in RUNS:
        found = runs[f"{first}-{second}"]
        assert found["losses"] == pytest.approx(truth["losses"], rel=1e-5)
        for name, value in truth["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-5)
    # and this is not for want of dropout
    assert abs(truth["losses"][0] - runs["chance"]["losses"][0]) > 1e-3


if __name__ == "__main__":
    everyone = torch.multiprocessing.get_context(start_method()).Barrier(4, timeout=60)
    forked(on_rank, (sys.argv[1], everyone), 4)
