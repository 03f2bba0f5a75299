"""The service: batching alone, every address over HTTP, OpenAI's client, bad requests, the end."""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, make_backbone, make_tokenizer

from contrastive_st import serve
from contrastive_st.index import build_index
from contrastive_st.model import SentenceEncoder
from contrastive_st.modeldir import Dense, StaticBackbone, without_special_tokens
from contrastive_st.server import Refusal, in_background

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed: contrastive_st[serve]")

JSON = {"Content-Type": "application/json"}
TEXTS = ["a dog is playing", "the child is eating rice", "how do i reset my password?"]
LIMITS = serve.Limits(texts=40, characters=2_000, waiting=400)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = make_tokenizer()
    prompts = {"query": "what is: ", "passage": "the street: "}
    return SentenceEncoder(
        make_backbone(len(tokenizer)), tokenizer, max_length=32, prompts=prompts
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, encoder):
    "A model, and an index of three texts made with it."
    out = tmp_path_factory.mktemp("serve")
    encoder.save_pretrained(out / "small" / "model")
    build_index(out / "index", out / "small" / "model", TEXTS, ["a", "b", "c"], progress=False)
    return out


@pytest.fixture(scope="module")
def address(folders):
    "A service with an index, in a thread of this process."
    service = serve.open_service(folders / "index", LIMITS)
    service.name = "small"
    with in_background(serve.application(service)) as address:
        yield address


def ask(address, path, body=None, headers=JSON, method=None):
    "Status, headers and body of one request, sent as it is if it is bytes."
    line = http.client.HTTPConnection(address.partition("//")[2], timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with contextlib.closing(line):
        line.request(method or ("GET" if data is None else "POST"), path, data, headers)
        answer = line.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def post(address, path, **body):
    status, _, text = ask(address, path, body)
    assert status == 200, text
    return json.loads(text)


def refused(address, path, body, headers=JSON, method=None):
    "Status and sentence."
    status, _, text = ask(address, path, body, headers, method)
    sentence = json.loads(text)["error"]["message"]
    assert "\n" not in sentence and len(sentence) < 400
    return status, sentence


# --- batching ---


def run_batcher(work, compute, limits=serve.Limits()):
    "Run a coroutine function beside a batcher; return its result and the sizes of the batches."

    async def main():
        sizes = []
        batcher = serve.Batcher(compute, limits, on_batch=lambda n, seconds: sizes.append(n))
        worker = asyncio.create_task(batcher.run())
        await asyncio.sleep(0)
        result = await asyncio.wait_for(work(batcher), 20)
        batcher.close()
        await asyncio.wait_for(worker, 20)
        assert batcher.waiting == 0 and not batcher.jobs
        return result, sizes

    return asyncio.run(main())


def upper(texts):
    return [text.upper() for text in texts]


def test_requests_at_once_share_a_batch_and_get_their_own_results():
    async def work(batcher):
        return await asyncio.gather(*(batcher([f"a{i}", f"b{i}"]) for i in range(20)))

    results, sizes = run_batcher(work, upper)
    assert results == [[f"A{i}", f"B{i}"] for i in range(20)] and sizes == [40]


def test_a_batch_ends_at_texts_and_at_tokens():
    async def work(batcher):
        return await batcher(["x" * 40] * 10)

    assert run_batcher(work, upper, serve.Limits(batch=4))[1] == [4, 4, 2]
    assert run_batcher(work, upper, serve.Limits(tokens=25))[1] == [2] * 5  # of 11 tokens each
    assert run_batcher(work, upper, serve.Limits(tokens=5))[1] == [1] * 10  # one is always taken


def test_a_short_request_overtakes_a_long_one():
    order = []

    async def one(batcher, name, n):
        await batcher([name] * n)
        order.append(name)

    async def work(batcher):
        await asyncio.gather(one(batcher, "long", 300), one(batcher, "short", 1))

    run_batcher(work, upper, serve.Limits(batch=10))
    assert order == ["short", "long"]


def test_what_fails_is_told_to_its_requests_and_the_next_batch_works():
    def compute(texts):
        if "bad" in texts:
            raise RuntimeError("broken")
        return texts

    async def work(batcher):
        results = await asyncio.gather(
            batcher(["bad"] * 9), batcher(["good"]), return_exceptions=True
        )
        return results, await batcher(["good"])

    (results, after), _ = run_batcher(work, compute, serve.Limits(batch=4))
    assert type(results[0]) is RuntimeError and results[1] == after == ["good"]


def test_a_text_that_cannot_be_encoded_fails_its_own_request_only():
    tokenizer = without_special_tokens(make_tokenizer())
    table = StaticBackbone(torch.ones(len(tokenizer), 16))
    encoder = SentenceEncoder(table, tokenizer, head=[Dense(16, 8)]).eval()
    service = serve.Service(encoder, "static", limits=serve.Limits(batch=5))

    async def main():
        async with service.running():
            asked = [["a dog"], ["a dog", "a cat", " "], ["a cat"] * 3, ["a dog"] * 20 + ["\u200b"]]
            requests = [service.embed(texts) for texts in asked]
            return await asyncio.gather(*requests, return_exceptions=True)

    results = asyncio.run(main())
    for i, texts in ((0, ["a dog"]), (2, ["a cat"] * 3)):
        np.testing.assert_allclose(results[i].vectors, encoder.encode(texts), atol=1e-6)
    for i, row in ((1, 2), (3, 20)):
        status, sentence, *_ = results[i].args
        assert status == 422 and sentence.startswith(f"text {row} has no token")
    assert service.batcher.waiting == 0


def test_a_full_queue_and_a_closed_one():
    begin = threading.Event()

    def compute(texts):
        begin.wait(10)
        return texts

    async def work(batcher):
        first = asyncio.create_task(batcher(["a"] * 8))
        await asyncio.sleep(0.05)  # four are computed and four wait
        with pytest.raises(Refusal, match="4 texts are waiting") as error:
            await batcher(["b"] * 2)
        assert error.value.args[0] == 429 and error.value.args[2] >= 1
        begin.set()
        assert await first == ["a"] * 8
        assert await batcher(["c"] * 20) == ["c"] * 20  # nothing waited
        batcher.close()
        with pytest.raises(Refusal, match="about to stop"):
            await batcher(["d"])

    run_batcher(work, compute, serve.Limits(batch=4, waiting=5))


def test_whoever_left_is_not_computed():
    seen = []

    async def work(batcher):
        tasks = [asyncio.create_task(batcher([name])) for name in "ab"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        assert await tasks[1] == ["b"]

    run_batcher(work, lambda texts: seen.extend(texts) or texts)
    assert seen == ["b"]


def test_a_text_that_fails_after_its_client_left_stops_nobody_else():
    begin = threading.Event()

    def compute(texts):
        begin.wait(10)
        if "a" in texts:
            raise ValueError("no token")
        return texts

    async def work(batcher):
        gone = asyncio.create_task(batcher(["a"]))
        await asyncio.sleep(0.05)  # it is being computed
        gone.cancel()
        begin.set()
        assert await batcher(["b"]) == ["b"]

    run_batcher(work, compute)


# --- answers ---


def test_embed_is_encode(address, encoder):
    answer = post(address, "/embed", texts=TEXTS)
    expected = encoder.encode(TEXTS, progress=False)
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-6)
    assert (answer["model"], answer["dimensions"], answer["truncated"]) == ("small", 32, 0)
    query = post(address, "/embed", texts="a dog", input_type="query")["embeddings"]
    np.testing.assert_allclose(query, [encoder.encode_query("a dog")], atol=1e-6)
    document = post(address, "/embed", texts="a dog", input_type="document")["embeddings"]
    np.testing.assert_allclose(document, [encoder.encode_document("a dog")], atol=1e-6)
    named = post(address, "/embed", texts="a dog", prompt_name="passage")["embeddings"]
    np.testing.assert_allclose(named, [encoder.encode("a dog", prompt="passage")], atol=1e-6)
    short = post(address, "/embed", texts=TEXTS, dimensions=8)["embeddings"]
    expected = encoder.encode(TEXTS, truncate_dim=8, progress=False)
    np.testing.assert_allclose(short, expected, atol=1e-6)


def test_what_is_truncated_is_counted(address):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = post(address, "/embed", texts=["dog " * 100, "dog"])
    assert answer["truncated"] == 1 and answer["tokens"] == 32 + 3


def test_the_default_prompt_and_the_width_that_a_model_was_saved_with(encoder):
    other = SentenceEncoder(encoder.backbone, encoder.tokenizer, max_length=32)
    other.prompts = {"sts": "the same: "}
    other.settings = {"default_prompt_name": "sts", "truncate_dim": 16}
    with in_background(serve.application(serve.Service(other, "m"))) as address:
        answer = post(address, "/embed", texts=TEXTS)
        assert refused(address, "/embed", {"texts": "a", "dimensions": 17})[0] == 422
    expected = other.encode(TEXTS, progress=False)
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-6)
    assert answer["dimensions"] == 16


def test_prompts_that_a_model_leaves_out_of_its_pooling():
    tokenizer, prompts = make_tokenizer(), {"query": "where is: ", "document": "a street: "}
    encoder = SentenceEncoder(
        make_backbone(len(tokenizer)), tokenizer, prompts=prompts, include_prompt=False,
        max_length=32,
    ).eval()  # fmt: skip
    encoder.settings["truncate_dim"] = 16
    service = serve.Service(encoder, "apart")

    async def main():
        async with service.running():
            names = ["query", "document", None]
            asked = [service.embed(TEXTS, service.prompt(name)) for name in names]
            return await asyncio.gather(*asked)

    for encoded, prompt in zip(asyncio.run(main()), ("query", "document", "")):
        np.testing.assert_allclose(encoded.vectors, encoder.encode(TEXTS, prompt=prompt), atol=1e-6)


def test_similarity(address, encoder):
    answer = post(address, "/similarity", first=TEXTS[:2], second=TEXTS, first_type="query")
    expected = encoder.encode_query(TEXTS[:2]) @ encoder.encode(TEXTS).T
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)


def test_search_uses_the_prompt_of_queries(address, folders):
    from contrastive_st.index import Index

    results = post(address, "/search", queries=["a cat", "my password"], top_k=2)["results"]
    expected = Index.open(folders / "index").search(["a cat", "my password"], 2)
    for hits, wanted in zip(results, expected, strict=True):
        assert [(h["id"], h["text"]) for h in hits] == [(w.id, w.text) for w in wanted]
        np.testing.assert_allclose([h["score"] for h in hits], [w.score for w in wanted], atol=1e-5)
    assert len(post(address, "/search", queries="a dog", top_k=100)["results"][0]) == 3


def test_openai_by_hand(address, encoder):
    answer = post(address, "/v1/embeddings", input="a dog", model="small")
    assert answer["object"] == "list" and answer["model"] == "small"
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    (entry,) = answer["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    np.testing.assert_allclose(entry["embedding"], encoder.encode("a dog"), atol=1e-6)
    coded = post(address, "/v1/embeddings", input="a dog", model="small", encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, encoder.encode("a dog"), atol=1e-6)


def test_openai_client(address, encoder):
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "contrastive_st"
    for options in ({}, {"encoding_format": "float"}, {"dimensions": 8}):
        answer = client.embeddings.create(model="small", input=TEXTS, **options)
        width = options.get("dimensions")
        expected = encoder.encode(TEXTS, truncate_dim=width, progress=False)
        vectors = [entry.embedding for entry in answer.data]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 9
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.embeddings.create(model="gpt", input="a dog")
    with pytest.raises(openai.UnprocessableEntityError, match="token numbers"):
        client.embeddings.create(model="small", input=[1, 2, 3])


def test_health_metrics_and_description(address):
    post(address, "/embed", texts=TEXTS)
    health = json.loads(ask(address, "/health")[2])
    assert health == {"status": "ok", "model": "small", "waiting": 0}
    ask(address, "/no/such/thing")
    status, headers, text = ask(address, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    name = "contrastive_st_{}"
    assert float(values[name.format('requests_total{path="/embed",status="200"}')]) >= 1
    assert float(values[name.format('requests_total{path="other",status="404"}')]) >= 1
    assert float(values[name.format("texts_total")]) >= 3
    assert float(values[name.format("batch_texts_count")]) >= 1
    assert "/no/such" not in text
    paths = json.loads(ask(address, "/openapi.json")[2])["paths"]
    wanted = {"/embed", "/similarity", "/search", "/v1/embeddings", "/v1/models"}
    assert wanted <= set(paths) and "http" not in ask(address, "/docs")[2]
    assert ask(address, "/docs")[1]["location"] == "/openapi.json"


def test_many_clients_at_once_get_their_own_answers(address, encoder):
    texts = [f"dog {i}" for i in range(40)]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda text: post(address, "/embed", texts=text), texts))
    vectors = [answer["embeddings"][0] for answer in answers]
    np.testing.assert_allclose(vectors, encoder.encode(texts, progress=False), atol=1e-5)


# --- bad requests ---

OPENAI = "/v1/embeddings"
BAD = [
    ("/embed", {"texts": ["a"] * 10_000}, 413, "10,000 texts, more than the 40"),
    ("/embed", {"texts": ["ok", "x" * 1_000_000]}, 413, "text 1 has 1,000,000 characters"),
    ("/embed", {"texts": "x" * 9_000_000}, 413, "more than the 8,000,000 this server takes"),
    ("/embed", {"texts": []}, 422, "texts is empty"),
    ("/embed", {"texts": ""}, 422, "texts.0 is empty"),
    ("/embed", {"texts": ["a", 5]}, 422, "texts.1 should be a valid string, not 5"),
    ("/embed", {"texts": None}, 422, "texts should be a valid list, not None"),
    ("/embed", {"texts": {"a": "b"}}, 422, "texts should be a valid list"),
    ("/embed", {"text": "a"}, 422, "unknown key 'text'; did you mean 'texts'? /openapi"),
    ("/embed", {"texts": "a", "quux": 1}, 422, "unknown key 'quux'; /openapi.json describes"),
    ("/search", {"query": "a"}, 422, "unknown key 'query'; did you mean 'queries'?"),
    (OPENAI, {"inputs": "a", "model": "small"}, 422, "did you mean 'input'?"),
    ("/embed", {}, 422, "texts is missing"),
    ("/embed", ["a"], 422, "the request should be a valid dictionary"),
    ("/embed", b"", 422, "the request is missing"),
    ("/embed", b"{", 422, "is not JSON"),
    ("/embed", b"\xff\xfe", 4, "is not JSON"),
    ("/embed", b"[" * 1_000_000, 4, "is not JSON"),
    ("/embed", b'{"texts": ' * 100_000, 4, "is not JSON"),
    ("/embed", b'{"texts": [' + b"9" * 100_000 + b"]}", 4, "is not JSON"),
    ("/embed", b'{"texts": "a", "dimensions": NaN}', 422, "dimensions"),
    ("/embed", b'{"texts": "\\ud800"}', 422, "texts.0"),
    ("/embed", {"texts": "a", "dimensions": 0}, 422, "dimensions should be greater"),
    ("/embed", {"texts": "a", "dimensions": "8"}, 422, "dimensions should be a valid integer"),
    ("/embed", {"texts": "a", "dimensions": True}, 422, "dimensions should be a valid integer"),
    ("/embed", {"texts": "a", "dimensions": 33}, 422, "the vectors of this model have 32"),
    ("/embed", {"texts": "a", "dimensions": 10**30}, 422, "dimensions"),
    ("/embed", {"texts": "a", "input_type": "poem"}, 422, "'query' or 'document'"),
    ("/embed", {"texts": "a", "prompt_name": "x"}, 422, "no prompt named 'x'; its prompts are"),
    ("/embed", {"texts": "a", "prompt_name": "query", "input_type": "query"}, 422, "not both"),
    ("/similarity", {"first": ["a"] * 30, "second": ["b"] * 30}, 413, "60 texts"),
    ("/similarity", {"first": "a"}, 422, "second is missing"),
    ("/search", {"queries": "a", "top_k": 0}, 422, "top_k should be greater"),
    ("/search", {"queries": "a", "top_k": 10**6}, 422, "top_k should be less"),
    ("/search", {"queries": ["a", "  "]}, 422, "a query is blank"),
    (OPENAI, {"input": "a", "model": "gpt"}, 404, "there is no model 'gpt'; this server has"),
    (OPENAI, {"input": "a"}, 422, "model is missing"),
    (OPENAI, {"input": [1, 2], "model": "small"}, 422, "input holds token numbers"),
    (OPENAI, {"input": [[1, 2]], "model": "small"}, 422, "input holds token numbers"),
    (OPENAI, {"input": "a", "model": "small", "encoding_format": "x"}, 422, "encoding_format"),
    ("/nothing", {}, 404, "there is nothing at /nothing"),
    ("/health", {}, 405, "/health does not take POST"),
]


@pytest.mark.parametrize("path, body, status, sentence", BAD)
def test_a_bad_request_is_one_sentence_and_the_server_goes_on(
    address, path, body, status, sentence
):
    code, message = refused(address, path, body)
    assert sentence in message and (code == status or code // 100 == status), (code, message)
    assert ask(address, "/health")[0] == 200


def test_what_is_sent_in_another_way(address):
    good = json.dumps({"texts": "a"}).encode()
    assert refused(address, "/embed", good, {})[0] == 415
    assert refused(address, "/embed", good, {"Content-Type": "text/plain"})[0] == 415
    chunked = JSON | {"Transfer-Encoding": "chunked"}
    status, sentence = refused(address, "/embed", b"5\r\nhello\r\n0\r\n\r\n", chunked)
    assert status == 411 and "Content-Length" in sentence
    assert refused(address, "/embed", None)[0] == 405
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        status, sentence = refused(address, "/embed", good, JSON | headers)
        assert status == 403 and "another web page" in sentence
    assert ask(address, "/health", headers={"Host": "evil.example"})[0] == 400
    assert ask(address, "/health", headers={"Host": "localhost"})[0] == 200


def test_no_index_to_search_and_a_model_that_fails(encoder, monkeypatch):
    service = serve.Service(encoder, "small")
    with in_background(serve.application(service)) as address:
        status, sentence = refused(address, "/search", {"queries": "a"})
        assert status == 404 and "has no index" in sentence

        def broken(texts, **options):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(encoder, "encode", broken)
        status, sentence = refused(address, "/embed", {"texts": "a"})
        assert status == 500 and "out of memory" in sentence
        monkeypatch.undo()
        assert post(address, "/embed", texts="a")["dimensions"] == 32


def test_a_full_server_says_when_to_come_back(encoder, monkeypatch):
    service, begin = serve.Service(encoder, "small", limits=LIMITS._replace(waiting=3)), []
    encode = encoder.encode

    def slow(texts, **options):
        begin.append(time.sleep(0.5))
        return encode(texts, **options)

    monkeypatch.setattr(encoder, "encode", slow)
    with in_background(serve.application(service)) as address:
        with ThreadPoolExecutor(12) as threads:
            answers = list(
                threads.map(lambda _: ask(address, "/embed", {"texts": ["a", "b"]}), range(12))
            )
        full = [headers for status, headers, _ in answers if status == 429]
        assert full and all(int(headers["retry-after"]) >= 1 for headers in full)
        assert {status for status, _, _ in answers} == {200, 429}
        assert ask(address, "/embed", {"texts": "a"})[0] == 200


# --- open and close ---


def test_names(tmp_path):
    assert serve.model_name("runs/a/model") == serve.model_name("runs/a/index") == "a"
    assert serve.model_name("sentence-transformers/all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert serve.model_name("model") == "model"


def test_what_cannot_be_served(folders, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"the service cannot be served at 127.0.0.1:{port}"):
            serve.launch(folders / "small" / "model", port=port)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        serve.launch(tmp_path / "empty", port=0)


def test_without_the_extra_one_sentence(monkeypatch, folders):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ValueError, match=r"pip install .*\[serve\]"):
        serve.launch(folders / "small" / "model", port=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end(folders, number):
    command = [sys.executable, "-c", "from contrastive_st.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, str(folders / "index"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        first = process.stdout.readline()
        assert "with an index of 3 passages" in first
        address = re.search(r"http://[^/ ]+", first)[0]
        body = {"texts": [f"the dog number {i} is eating rice on the road" for i in range(2_000)]}
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(ask, address, "/embed", body)
            time.sleep(0.3)
            process.send_signal(number)
            status, _, text = running.result(60)
        errors = process.communicate(timeout=60)[1]
        assert status == 200 and len(json.loads(text)["embeddings"]) == 2_000
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors and "stopped" in errors, errors
    finally:
        process.kill()
