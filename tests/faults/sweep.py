"""Interrupt everything that writes wherever it changes the disk, and look at what comes of it.

python tests/faults/sweep.py --scenario train --points all --jobs 2
python tests/faults/sweep.py --scenario all --points 10 --full 3
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import killer  # noqa: E402

HERE = Path(__file__).resolve().parent
ATOMS = (
    *("new-file", "new-folder", "new-folder-over", "new-folder-renames"),
    *("part", "part-over", "part-renames"),
)
NAMES = (
    *ATOMS,
    *("train", "train-last", "prepare", "prepare-over", "encode", "encode-over", "encode-parquet"),
    *("save", "save-over", "card"),
)
CHECKS = (
    *("store_flips", "two_starts", "stopped", "moved", "clock_back"),
    *("finished", "products", "best_damaged", "threads"),
)


class Servers:
    "Some processes that answer requests, each one at a time."

    def __init__(self, jobs, folder):
        library = killer.build(Path(folder))
        fast = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}  # waits for no disk
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        ours = {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent.parent)}
        environment = os.environ | fast | threads | ours
        command = [sys.executable, str(HERE / "server.py")]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.errors = open(Path(folder) / "errors.txt", "w+")
        self.processes = [
            subprocess.Popen(command, stderr=self.errors, **pipes) for _ in range(jobs)
        ]

    def ask(self, process, request):
        "The answer to one request."
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the server ended: {self.errors.read()[-2000:]}")
        return json.loads(line)

    def ask_all(self, requests):
        "Yield (request, answer) as they come."
        todo, done = queue.SimpleQueue(), queue.SimpleQueue()
        for request in requests:
            todo.put(request)

        def work(process):
            with contextlib.suppress(queue.Empty):
                while True:
                    request = todo.get_nowait()
                    try:
                        done.put((request, self.ask(process, request)))
                    except Exception as error:
                        done.put((request, {"error": str(error), "where": ""}))

        for process in self.processes:
            threading.Thread(target=work, args=(process,), daemon=True).start()
        for _ in requests:
            yield done.get()

    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait(timeout=60)
        self.errors.close()


# ---- which points ----


def points(operations) -> list[list[int]]:
    "Every place to kill a run: before each operation with an effect, in the middle of each write."
    found = []
    for n, (kind, size, _) in enumerate(operations, 1):
        if kind == "fsync" or kind.startswith("-"):
            continue  # the same as before the next one
        found.append([n, killer.BEFORE])
        if kind == "write" and size > 1:
            found.append([n, killer.MIDDLE])
    return found


def spread(items, most) -> list:
    "At most so many of the items, evenly spread, always the same."
    if most is None or len(items) <= most:
        return list(items)
    return [items[(2 * k + 1) * len(items) // (2 * most)] for k in range(most)]


def twice(chosen, operations, most) -> list[list[list[int]]]:
    "Some points with a second one, at which the resumed run is killed, too."
    places = points(operations)
    return [
        [point, places[(37 * k + 11) % len(places)]] for k, point in enumerate(spread(chosen, most))
    ]


def rooms(operations, sizes) -> list[int]:
    "Sizes of a disk that is too small, from nothing to nearly enough."
    total = sum(size for kind, size, _ in operations if kind == "write")
    return [k * (total - 1) // max(sizes - 1, 1) for k in range(sizes)]


# ---- what comes of it ----


def differences(there, reference) -> str:
    "How two outcomes differ, in a line."
    differ = [key for key in reference if there.get(key) != reference[key]]

    def show(value):
        return json.dumps(value, ensure_ascii=False)[-160:]

    return "; ".join(
        f"{key} is ...{show(there.get(key))}, not ...{show(reference[key])}" for key in differ
    )


def problem(answer, reference) -> str:
    "What is wrong after an interruption; empty if nothing is."
    if "error" in answer:
        return answer["error"]
    if "killed" in answer:
        return f"the run after it died of signal {answer['killed']}"
    value = answer["value"]
    return value["between"] or differences(value["outcome"], reference)


def disk_problem(answer, reference) -> str:
    "The same for a full disk, which must be told in a sentence."
    refused = answer["refused"]
    if "killed" in refused:
        return f"a full disk ends in signal {refused['killed']}"
    if error := refused.get("error"):
        if (
            not error.startswith("ValueError: ")
            or "the disk is full" not in error
            or "/" not in error
        ):
            return f"a full disk is told as {error[:200]!r}"
    return problem(answer, reference)


def damage_result(answer, request, reference) -> tuple[str, str]:
    "What came of damage: 'refused', 'recovered' or 'silent', 'crash' with the words for it."
    name, error = request["file"], answer.get("error", "")
    if error.startswith(("ValueError: ", "Damaged: ")):
        ours = name == "manifest.json" or name in error or "manifest.json" in error
        return (
            ("refused", "")
            if "checkpoints/checkpoint-" in error and ours
            else ("crash", f"refused without naming the file: {error}")
        )
    if error or "killed" in answer:
        return "crash", error or f"signal {answer['killed']}"
    if answer["value"]["outcome"]["weights"] != reference["weights"]:
        return "silent", "the weights are others"
    return "recovered", ""


def damage_sweep(servers, name, most=None) -> dict:
    "Damage every file of a checkpoint in every way; return counts and failures."
    begun = time.monotonic()
    first = servers.processes[0]
    plan = servers.ask(first, {"scenario": name, "do": "plan"})
    cases = servers.ask(first, {"scenario": name, "do": "cases"})
    if "value" not in plan or "value" not in cases:
        raise RuntimeError(f"{name}: the undisturbed run fails: {plan.get('error') or cases}")
    chosen = spread(cases["value"], most)
    requests = [
        {"scenario": name, "do": "damage", "file": file, "kind": kind} for file, kind in chosen
    ]
    counts, failures = Counter(), []
    for request, answer in servers.ask_all(requests):
        result, words = damage_result(answer, request, plan["value"]["outcome"])
        counts[result] += 1
        if words:
            place = f"{request['kind']}: {request['file'] or 'the checkpoint'}"
            failures.append((place, words, answer.get("where", "")))
    return {
        "name": f"damage to {name}",
        **counts,
        "failures": failures,
        "seconds": time.monotonic() - begun,
    }


def check_all(servers, names):
    "Run functions of checks.py; yield counts and failures as they come."
    requests = [{"scenario": "nothing", "do": "check", "check": name} for name in names]
    for request, answer in servers.ask_all(requests):
        yield counted(request["check"], answer, answer.get("seconds", 0))


def counted(name, answer, seconds) -> dict:
    "One answer of a check as a result."
    value = answer.get("value") or {"tried": 1, "failed": [answer.get("error") or str(answer)]}
    failures = [("", words, answer.get("where", "")) for words in value["failed"]]
    return {"name": name, "tried": value["tried"], "failures": failures, "seconds": seconds}


def fuzz_all(servers, inputs, at_once=50) -> dict:
    "Try so many mutated inputs."
    begun = time.monotonic()
    blocks = [[first, min(first + at_once, inputs)] for first in range(0, inputs, at_once)]
    requests = [{"scenario": "nothing", "do": "fuzz", "seeds": block} for block in blocks]
    parts = [counted("mutated inputs", answer, 0) for _, answer in servers.ask_all(requests)]
    failures = [failure for part in parts for failure in part["failures"]]
    tried = sum(part["tried"] for part in parts)
    return {
        "name": "mutated inputs",
        "tried": tried,
        "failures": failures,
        "seconds": time.monotonic() - begun,
    }


def line(r) -> str:
    "Counts of anything but a sweep."
    counts = ", ".join(
        f"{r[key]} {key}"
        for key in ("tried", "refused", "recovered", "silent", "crash")
        if key in r
    )
    return f"{r['name']:24} {counts}; {len(r['failures'])} failed, {r['seconds']:.1f} s"


# ---- one scenario ----


def requests_of(name, operations, most, second, disks):
    "Everything to ask of one scenario."
    chosen = spread(points(operations), most)
    kills = [[point] for point in chosen] + twice(chosen, operations, second)
    return [{"scenario": name, "do": "kill", "at": at} for at in kills] + [
        {"scenario": name, "do": "full", "room": room} for room in rooms(operations, disks)
    ]


def place_of(request, operations) -> str:
    "Where a run was interrupted, for a person."
    if request["do"] == "full":
        return f"with room for {request['room']:,} bytes"
    words = []
    for n, mode in request["at"]:
        kind, size, path = operations[n - 1]
        short = "/".join(Path(path).parts[-3:])
        words.append(
            f"{'before' if mode == killer.BEFORE else 'in the middle of'} {n}: {kind} {short}"
        )
    return ", then ".join(words)


def sweep(servers, name, most=None, second=0, disks=0) -> dict:
    "Interrupt one scenario; return counts and the failures, each with its place and reason."
    begun = time.monotonic()
    plan = servers.ask(servers.processes[0], {"scenario": name, "do": "plan"})
    if "value" not in plan:
        raise RuntimeError(f"{name}: the undisturbed run fails: {plan}")
    operations, reference = plan["value"]["operations"], plan["value"]["outcome"]
    counts, failures, busy = Counter(), [], 0.0
    for request, answer in servers.ask_all(requests_of(name, operations, most, second, disks)):
        wrong = (disk_problem if request["do"] == "full" else problem)(answer, reference)
        counts[request["do"]] += 1
        counts["killed"] += answer.get("kills", 0)
        busy += answer.get("busy", 0)
        counts["right"] += not wrong
        if wrong:
            where = answer.get("where") or answer.get("refused", {}).get("where", "")
            failures.append((place_of(request, operations), wrong, where))
    return {
        "name": name,
        "kills": counts["kill"],
        "killed": counts["killed"],
        "disks": counts["full"],
        "right": counts["right"],
        "failures": failures,
        "seconds": time.monotonic() - begun,
        "busy": busy,
    }


COLUMNS = ("points", "killed", "full disks", "right", "failed", "seconds", "of a core")
HEAD = f"{'scenario':20}" + "".join(f"{name:>11}" for name in COLUMNS)


def row(r) -> str:
    "The counts of a scenario, a line of the table under `HEAD`."
    counts = (r["kills"], r["killed"], r["disks"], r["right"], len(r["failures"]))
    times = (f"{r['seconds']:.1f}", f"{r['busy']:.1f}")
    return f"{r['name']:20}" + "".join(f"{value:>11}" for value in counts + times)


def reasons(r, most=12) -> str:
    "The failures of a scenario, those of the same reason together."
    alike = {}
    for place, wrong, where in r["failures"]:
        alike.setdefault(wrong.split("/")[0][:60] + wrong[-40:], []).append((place, wrong, where))
    groups = sorted(alike.values(), key=len, reverse=True)[:most]
    return "\n".join(
        f"  {len(group)} times, first {place}\n    {wrong[:600]}\n    {where[-300:]}"
        for group in groups
        for place, wrong, where in group[:1]
    )


@contextlib.contextmanager
def servers_for(jobs):
    "Servers, ended in the end."
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        servers = Servers(jobs, folder)
        try:
            yield servers
        finally:
            servers.close()


def arguments():
    "What was asked for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scenario", default="all", help=f"some of {', '.join(NAMES)}, or all, or none"
    )
    parser.add_argument("--points", default="all", help="how many points of each scenario, or all")
    parser.add_argument("--twice", type=int, default=0, help="how many of them with a second kill")
    parser.add_argument("--full", type=int, default=0, help="how many sizes of a full disk")
    parser.add_argument(
        "--damage", type=int, default=0, help="how many cases of damage to a checkpoint; -1 = all"
    )
    parser.add_argument(
        "--checks", default="none", help="some functions of checks.py, or all, or none"
    )
    parser.add_argument("--fuzz", type=int, default=0, help="how many mutated inputs")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args()


def chosen(word, names):
    "Names out of an argument."
    return names if word == "all" else [] if word == "none" else word.split(",")


def everything(servers, asked):
    "Yield a line and the failures of each result as it comes."
    most = None if asked.points == "all" else int(asked.points)
    names = chosen(asked.scenario, NAMES)
    if names:
        yield HEAD, ""
    for name in names:
        result = sweep(servers, name, most, asked.twice, asked.full)
        yield row(result), reasons(result)
    results = []
    if asked.damage:
        results.append(
            lambda: [
                damage_sweep(servers, "train-last", None if asked.damage < 0 else asked.damage)
            ]
        )
    results.append(lambda: check_all(servers, chosen(asked.checks, CHECKS)))
    if asked.fuzz:
        results.append(lambda: [fuzz_all(servers, asked.fuzz)])
    for make in results:
        for result in make():
            yield line(result), reasons(result)


def main():
    asked = arguments()
    if reason := killer.missing():
        sys.exit(reason)
    failed = False
    with servers_for(asked.jobs) as servers:
        for counts, failures in everything(servers, asked):
            print(counts, failures, sep="\n" if failures else "", flush=True)
            failed = failed or bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
