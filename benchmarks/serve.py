"""What a service costs under load: 50 clients that send a text each, wait, and send the next.

    python benchmarks/serve.py           # a minute or two
    python benchmarks/serve.py --quick   # half a minute

Four ways get the same questions: a plain Python loop that encodes text by text, the same in lists
of 64, a service that gives each request a forward of its own, and one that computes together what
waits. Server and clients are two processes of this machine, so they share its cores, and the loop
has them to itself. Ways take turns.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measure
from matplotlib.figure import Figure

from contrastive_st.data import quickstart_folder, read_retrieval

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CLIENTS = (1, 8, 50)
SERVER = """
import sys
from contrastive_st.serve import Limits, launch
launch({model!r}, port=0, limits=Limits(batch={batch}), say=lambda text: print(text, flush=True))
"""


def questions() -> list[str]:
    "The questions of the quickstart corpus."
    return list(read_retrieval(quickstart_folder() / "retrieval").queries.values())


def quantiles(seconds: list[float]) -> dict[str, float]:
    "Median and 95th percentile, in ms."
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    return {"p50_ms": 1000 * statistics.median(seconds), "p95_ms": 1000 * p95}


def cpu(process: int) -> float:
    "CPU seconds of a process, all threads: a busy machine does not change them."
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loop(encoder, texts: list[str], seconds: float, size: int) -> dict[str, float]:
    "Encode lists of `size` texts, one after another."
    times, start, used = [], time.perf_counter(), cpu(os.getpid())
    while time.perf_counter() - start < seconds:
        first = size * len(times) % (len(texts) - size)
        begin = time.perf_counter()
        encoder.encode(texts[first : first + size], progress=False)
        times.append(time.perf_counter() - begin)
    each = 1000 * (cpu(os.getpid()) - used) / (size * len(times))
    rate = size * len(times) / sum(times)
    return {"texts_per_s": rate, "cpu_ms_per_text": each} | quantiles(times)


async def client(address: str, texts: list[str], stop: float, times: list[float], n: int) -> None:
    "Send one text after another over one connection, by hand: a client library costs more CPU."
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while (begin := time.perf_counter()) < stop:
        body = json.dumps({"texts": texts[(n + len(times)) % len(texts)]}).encode()
        head = f"POST /embed HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if " 200 " not in head.partition("\r\n")[0]:
            raise RuntimeError(f"the server answered {head.partition(chr(13))[0]}")
        await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
        times.append(time.perf_counter() - begin)
    writer.close()


async def load(
    server: int, address: str, clients: int, texts: list[str], seconds: float
) -> dict[str, float]:
    "Let some clients ask for some seconds."
    times, start, used = [[] for _ in range(clients)], time.perf_counter(), cpu(server)
    tasks = [client(address, texts, start + seconds, mine, 7 * n) for n, mine in enumerate(times)]
    await asyncio.gather(*tasks)
    answers = sum(times, [])
    rate = len(answers) / (time.perf_counter() - start)
    each = 1000 * (cpu(server) - used) / len(answers)
    return {"texts_per_s": rate, "cpu_ms_per_text": each} | quantiles(answers)


def start(batch: int) -> tuple[subprocess.Popen, str]:
    "A server with batches of so many texts, and its address."
    program = SERVER.format(model=MODEL, batch=batch)
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    return server, line.partition(" at ")[2].partition("/ ")[0]


def figure(results: dict) -> Figure:
    "Texts a second by clients, beside the loop."
    fig = Figure(figsize=(6, 3), layout="constrained")
    axis = fig.subplots()
    for way, label in (("alone", "a forward each"), ("together", "what waits, together")):
        rates = [results[way][str(n)]["texts_per_s"] for n in CLIENTS]
        axis.plot(CLIENTS, rates, "o-", label=f"service, {label}")
    axis.axhline(results["loop_1"]["texts_per_s"], color="grey", ls="--", label="Python loop")
    axis.set(xlabel="clients", ylabel="texts a second", ylim=0, xscale="log")
    axis.set_xticks(CLIENTS, CLIENTS)
    axis.set_title("Does a service pay when many ask?")
    axis.legend(fontsize=8)
    return fig


def measured(seconds: float, rounds: int) -> dict:
    "Every way, the median of some rounds."
    from contrastive_st.model import SentenceEncoder

    texts, encoder = questions(), SentenceEncoder.from_pretrained(MODEL)
    servers = {"alone": start(1), "together": start(64)}
    rows = {}
    try:
        for _ in range(rounds):
            for size in (1, 64):
                rows.setdefault(("loop", size), []).append(loop(encoder, texts, seconds, size))
            for clients in CLIENTS:
                for way, (server, address) in servers.items():
                    row = asyncio.run(load(server.pid, address, clients, texts, seconds))
                    rows.setdefault((way, clients), []).append(row)
    finally:
        for server, _ in servers.values():
            server.terminate()
            server.wait(60)
    medians = {
        key: {name: statistics.median(row[name] for row in table) for name in table[0]}
        for key, table in rows.items()
    }
    results = {f"loop_{size}": medians["loop", size] for size in (1, 64)}
    for way in servers:
        results[way] = {str(clients): medians[way, clients] for clients in CLIENTS}
    return results


def ratios(results: dict) -> dict[str, float]:
    "The comparisons that the table of README.md shows."
    together, alone = results["together"]["50"], results["alone"]["50"]
    return {
        "texts_per_s_of_50_clients": together["texts_per_s"],
        "together_over_alone": together["texts_per_s"] / alone["texts_per_s"],
        "together_over_loop": together["texts_per_s"] / results["loop_1"]["texts_per_s"],
        "p50_ms": together["p50_ms"],
        "p95_ms": together["p95_ms"],
        "cpu_of_loop_over_together": results["loop_1"]["cpu_ms_per_text"]
        / together["cpu_ms_per_text"],
        "p50_alone_over_together": alone["p50_ms"] / together["p50_ms"],
    }


def main(argv: list[str] | None = None) -> None:
    args = measure.arguments(__doc__.splitlines()[0], argv)
    measure.one_thread()
    results = measured(*((1.5, 1) if args.quick else (4, 2)))
    results |= {"model": MODEL, "quick": args.quick, "ratios": ratios(results)}
    results = measure.record("torch", "fastapi", "uvicorn") | results
    measure.save(results, {"clients": figure(results)}, "serve", args.out)


if __name__ == "__main__":
    main()
