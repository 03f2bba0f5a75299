"""The speed benchmark at tiny size: both sides do the same work in turns, the sums are right."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed  # noqa: E402
import speed_side  # noqa: E402

from contrastive_st.model import SentenceEncoder  # noqa: E402

RATIO_KEYS = [
    "train_fp32",
    "train_bf16",
    "train_long_bf16",
    "encode_fp32",
    "encode_bf16",
    "encode_openvino",
    "gemm_share",
]


class Told:
    "Turns of a test: so many, then stop."

    def __init__(self, turns):
        self.left, self.said = turns, []

    def __call__(self, **said):
        self.said.append(said)
        self.left -= 1
        return self.left > 0


@pytest.fixture
def texts(tmp_path, monkeypatch, tiny_tokenizer, tiny_backbone):
    "The quickstart corpus, and a model without dropout that is small enough for a test."
    SentenceEncoder(tiny_backbone, tiny_tokenizer, max_length=64).save_pretrained(
        tmp_path / "model"
    )
    monkeypatch.setattr(speed, "MODEL", tmp_path / "model")
    (tmp_path / "work").mkdir()
    return speed.prepare(None, tmp_path / "work", tiny_tokenizer)


def job(way, case, texts, steps, **more):
    "A job with its blocks written."
    (texts.folder / "blocks.json").write_text(json.dumps(speed.blocks_of(case, texts, steps)))
    return speed.job_of(way, case, texts, steps, 1, **more)


def test_both_sides_train_on_the_same_batches(texts):
    case, losses = speed.Case("train", "short", 8, (), 0), {}
    for way in ("ours fp32", "peer fp32", "ours bf16", "peer bf16", "peer cached bf16"):
        turn = Told(2)
        losses[way] = speed_side.begin(job(way, case, texts, 4), turn)["losses"][0]
        assert len(turn.said) == 2, f"{way} did not stop when told to"
        assert ("bfloat16" in turn.said[0]["products"]) == way.endswith("bf16")
        assert "products" not in turn.said[1]
    assert losses["ours fp32"] == pytest.approx(losses["peer fp32"], abs=1e-4)
    assert max(losses.values()) - min(losses.values()) < 0.05


def test_both_sides_encode_the_same_texts(texts):
    case = speed.Case("encode", "short", 6, (), 0)
    names = ["ours fp32", "peer fp32", "ours bf16", "peer bf16"]
    for way in names:
        turn = Told(3)
        speed_side.begin(job(way, case, texts, 5), turn)
        assert len(turn.said) == 3
        assert ("bfloat16" in turn.said[0]["products"]) == way.endswith("bf16")
    far = speed.deviation(texts, names)
    assert far["ours fp32"] < 1e-5 and far["ours bf16"] < 1e-2
    assert far["peer fp32"] == pytest.approx(0, abs=1e-6)


def test_unequal_losses_stop_the_run(texts, monkeypatch):
    sides = type("Sides", (), {"settings": speed.arguments([]), "get": lambda self, way: None})()
    for found, stops in (
        ({"ours fp32": 1.0, "peer fp32": 1.0005}, False),
        ({"ours fp32": 1.0, "peer fp32": 1.01}, True),
    ):
        monkeypatch.setattr(
            speed,
            "take_turns",
            lambda *_: ({}, {way: {"losses": [loss]} for way, loss in found.items()}),
        )
        if stops:
            with pytest.raises(SystemExit, match="same work"):
                speed.check_losses(sides, texts)
        else:
            assert speed.check_losses(sides, texts) == found
    config = json.loads((texts.folder / "model without dropout" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0


def test_processes_take_turns(texts):
    case, settings = speed.Case("train", "short", 8, (), 3), speed.arguments([])
    sides = speed.Sides(settings, texts.folder)
    said, done = speed.take_turns(
        {"gemm bf16": sides.get("gemm bf16")}, {"gemm bf16": job("gemm bf16", case, texts, 5)}, 3
    )
    assert len(said["gemm bf16"]) == 3 and min(turn["cpu"] for turn in said["gemm bf16"]) > 0
    assert said["gemm bf16"][0]["wall"] > 0
    assert speed.ceiling(said["gemm bf16"], "cpu") > 0 and done["gemm bf16"]["threads"] == 1
    sides.get("gemm bf16").tell("no JSON")
    with pytest.raises(SystemExit, match="JSONDecodeError"):
        sides.get("gemm bf16").hear()
    sides.close()


def test_multiplications_are_counted(tiny_backbone):
    from torch.utils.flop_counter import FlopCounterMode

    tiny_backbone.pooler = None
    tiny_backbone.set_attn_implementation("eager")
    config, lengths = tiny_backbone.config, np.array([7, 7, 7])
    with FlopCounterMode(display=False) as counter:
        tiny_backbone(torch.ones(3, 7, dtype=torch.int64)).last_hidden_state.sum().backward()
    forward_backward = speed.model_gflop(lengths, config.to_dict(), True) * 1e9
    layers = [flops for _, flops in speed_side.layer_products(7, 32, 64, torch.float32, True)]
    assert forward_backward == pytest.approx(counter.get_total_flops())
    # all but attention
    assert sum(layers) * 2 * 3 == pytest.approx(forward_backward - 3 * 2 * 4 * 3 * 49 * 32)


def test_without_real_texts_the_quickstart_corpus_stands_in(texts):
    rows = [json.loads(line) for line in (texts.folder / "short.jsonl").read_text().splitlines()]
    assert not texts.real and len(rows) > 400
    assert len({text for row in rows for text in row}) == 2 * len(rows)
    assert min(map(len, texts.encode.values())) > 50
    assert len((texts.folder / "long.jsonl").read_text().splitlines()) > 100


def test_copies_are_left_out():
    assert speed.distinct([("a", "b"), ("a", "c"), ("d", "b"), ("e", "e"), ("f", "g")]) == [
        ["a", "b"],
        ["f", "g"],
    ]


def measured(way_seconds, **case):
    "A case as `measure` returns it, from made-up seconds."
    said = {
        way: [{"cpu": s, "wall": 2 * s, "peak_mb": 500.0} for s in seconds]
        for way, seconds in way_seconds.items()
    }
    said["gemm bf16"] = [
        {"rates": {"512": {"cpu": rate}, "1024": {"cpu": 2 * rate}}} for rate in (400, 500, 600)
    ]
    done = {way: {"products": {"bfloat16": 9}, "threads": 1} for way in said}
    return speed.summary(
        speed.Case(
            **{"job": "train", "texts": "short", "batch": 64, "ways": (), "rounds": 3} | case
        ),
        said,
        done,
        [100.0] * 3,
        "cpu",
        True,
    )


def test_ratios_and_shares(capsys):
    case = measured(
        {"ours bf16": [0.2, 0.4, 0.25], "peer bf16": [0.6, 0.8, 1.0], "peer fp32": [2.0, 2.0, 2.0]}
    )
    # 3, 2 and 4, round by round
    assert case["ratios"]["peer bf16 / ours bf16"]["median"] == pytest.approx(3)
    assert case["ways"]["ours bf16"]["per_second"]["median"] == 256
    assert case["ways"]["ours bf16"]["per_second_wall"]["median"] == 128
    assert case["gemm_gflops"]["bf16"] == 1000
    assert case["share"]["ours bf16"]["median"] == pytest.approx(0.4)
    assert "peer fp32" not in case["share"]
    results = {"cases": {"train_64": case}}
    results["ratios"] = speed.ratios(results["cases"])
    speed.finish(
        speed.arguments(["--quick", "--openvino", ""]),
        results | {"ratios": results["ratios"]},
        None,
    )
    lines = capsys.readouterr().out.splitlines()
    assert list(json.loads(lines[-1])) == RATIO_KEYS and json.loads(lines[-1])["train_bf16"] == 3
    assert json.loads(lines[-1])["encode_openvino"] is None
    assert any(
        "ours bf16" in line and "40% of the ceiling" in line
        for line in speed.told("train_64", case)
    )


def test_missing_openvino_is_said(capsys):
    settings = speed.arguments(["--quick"])
    settings.openvino = None
    speed.finish(settings, {"cases": {}, "ratios": speed.ratios({})}, None)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("encode_openvino is null")
    assert json.loads(out[-1]).keys() == set(RATIO_KEYS)


def test_results_are_written(tmp_path, capsys):
    train = measured({"ours bf16": [0.2] * 3, "peer bf16": [0.6] * 3})
    encode = measured({"ours bf16": [0.2] * 3, "peer fp32": [0.6] * 3}, job="encode")
    results = {"cases": {"train_64": train, "encode_short": encode}}
    speed.finish(
        speed.arguments([]), results | {"ratios": speed.ratios(results["cases"])}, tmp_path
    )
    expected = {"speed.json", "speed_train.png", "speed_encode.png"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == RATIO_KEYS


def test_whole_runs(texts, monkeypatch):
    monkeypatch.setattr(speed, "random_model", lambda folder, seed: speed.MODEL)
    monkeypatch.setattr(speed, "Side", InThisProcess)
    monkeypatch.setattr(
        speed,
        "sts",
        lambda folder, part: (
            ["a dog", "a cat", "rain"],
            ["the dog", "music", "snow"],
            [5.0, 1.0, 3.0],
        ),
    )
    found = speed.whole(speed.arguments(["--threads", "2"]), texts, None, 2, 1)
    assert found["means"].keys() == {"ours bf16", "peer bf16"} and found["ratio"]["median"] > 0
    assert all(-100 <= run[0]["test"] <= 100 for run in found["runs"].values())


class InThisProcess:
    "A side without a process."

    def __init__(self, *_):
        pass

    def tell(self, word):
        self.done = speed_side.begin(json.loads(word), lambda **_: True)

    def hear(self):
        return {"done": self.done}

    def close(self):
        pass
