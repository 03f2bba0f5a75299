"""Fixtures that several test files share: everything is built in memory, nothing is downloaded."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# the same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
# A shell starts background jobs with Ctrl-C ignored, and programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))  # its programs import each other
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,;:?!'-")
WORDS = """
    the a of to in is are was on how do i my what where when who why does it you can
    not and for with from man woman child dog cat is playing eating running guitar
    piano rice road street water music horse ball password reset account change
    computer open close start stop night day train station rain snow price money
""".split()
# The files that take longest, the longest first: begun last, one keeps a single worker busy.
LONGEST = """
    readme trainer demo faults run cli evaluation prepare encoding howto card modeldir guard
    mining nodes mixture packed store tokens model speed_benchmark export serve compare doors
    index recipes search lora loss notebooks data
""".split()


def pytest_collection_modifyitems(items):
    "Put the tests of the longest files first; within a file their order stays."
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def refuses(call, *parts):
    "call() raises ValueError and its message holds every part."
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value)


def make_tokenizer():
    "A WordPiece tokenizer over sixty words and all letters: any lower-case text has tokens."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = list(
        dict.fromkeys(
            SPECIAL
            + LETTERS
            + ["##" + c for c in LETTERS if c.isalnum()]
            + WORDS
            + ["##s", "##ing", "##ed"]
        )
    )
    core = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return wrapped_tokenizer(core)


def wrapped_tokenizer(core):
    "The tokenizer of transformers around an engine with BERT's special tokens."
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def edited_tokenizer(edit):
    "The tokenizer of `make_tokenizer` after `edit` changed the JSON of its engine."
    from tokenizers import Tokenizer

    spec = json.loads(make_tokenizer().backend_tokenizer.to_str())
    edit(spec)
    return wrapped_tokenizer(Tokenizer.from_str(json.dumps(spec)))


def forget_unknown(spec):
    "Take [UNK] away, so that a character without a token is an error of the engine."
    del spec["model"]["vocab"]["[UNK]"]
    spec["added_tokens"] = []


def make_backbone(vocab_size: int):
    "A random BERT with 2 layers, 32 wide, no dropout, the same weights each time."
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(0)
        return BertModel(config).eval()


def run_itself(file, folder):
    "Run a test file as a program of its own, which forks its ranks by `forked`."
    # Here a fork might wait for ever, for a lock that a thread of another test holds.
    subprocess.run([sys.executable, file, folder], check=True, timeout=240)


def start_method():
    "How ranks begin; what a GPU was used for does not survive a fork."
    import torch

    return "spawn" if torch.cuda.is_available() else "fork"


def forked(function, args, processes):
    "Run function(rank, *args) on each rank; torch is imported once, for all of them."
    import torch

    torch.multiprocessing.start_processes(function, args, processes, start_method=start_method())


def sentences(n, seed):
    "n different sentences of 3 to 9 words."
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        found[" ".join(rng.choice(WORDS, rng.integers(3, 10)))] = None
    return list(found)


@pytest.fixture(autouse=True, scope="module")
def quick():
    "Tiny models are faster on one thread, and garbage collection need not look at the imports."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_backbone(tiny_tokenizer):
    return make_backbone(len(tiny_tokenizer))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    "The folder with real data; a test that asks for it is skipped where it is absent."
    folder = Path(os.environ.get("CONTRASTIVE_ST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip("no real data here: set CONTRASTIVE_ST_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="module")
def quick_disk():
    "Nobody waits for the disk: only a crash of the machine could lose data, and no test has one."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium for a file's tests, which are skipped where there is none."
    if not CHROMIUM:
        pytest.skip("no browser is installed: apt-get install chromium")
    sync = pytest.importorskip(
        "playwright.sync_api", reason="no browser driver is installed: pip install playwright"
    )
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()
