"""What else may happen: damage to a store, two starts, a moved run, clocks, signals, threads."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np

from contrastive_st import data, store, trainer
from faults.damage import Killing, checkpoints
from faults.scenarios import Prepare, Train, TrainLast, make_encoder, make_mixture, sentences


def in_process(work):
    "Run it in a process of its own: how that ended, as waitpid says."
    if not (child := os.fork()):
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            code = getattr(error, "code", 1)
        os._exit(code)
    return child


def status(child):
    "The exit code of a process, or minus the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def right(scenario, folder):
    "What an undisturbed run leaves."
    place = folder / "reference"
    place.mkdir()
    scenario.run(place, False)
    return scenario.outcome(place)


def differing(there, reference):
    return [
        f"{key} differs: {str(there[key])[-150:]}"
        for key in reference
        if there[key] != reference[key]
    ]


# ---- stores ----


def store_flips(folder, flips=300):
    "Single bits of a prepared store, each turned around and back: verifying must name the file."
    scenario, chance, failed = Prepare(), random.Random(0), []
    scenario.prepare(folder)
    scenario.run(folder, False)
    place = data.store_folder(folder / "stores", "set0")
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.stat().st_size)
    for _ in range(flips):
        path = chance.choice(files)
        raw = path.read_bytes()
        changed, at = bytearray(raw), chance.randrange(len(raw))
        changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            store.verify(place)
            failed.append(f"byte {at} of {path.name}: not noticed")
        except ValueError as error:
            if (
                str(place) not in str(error)
                or path.name not in str(error)
                and path.name != "manifest.json"
            ):
                failed.append(f"byte {at} of {path.name}: {error}")
        except Exception as error:
            failed.append(f"byte {at} of {path.name}: {type(error).__name__}: {error}")
        path.write_bytes(raw)
    store.verify(place)
    return {"tried": flips, "failed": failed}


# ---- runs ----


class Waiting(Killing):
    "A mixture that waits at a step, or sends its process a signal there."

    def batch(self, step, *args):
        if step == self.step and isinstance(self.signal, int):
            os.kill(os.getpid(), self.signal)
        elif step == self.step:
            time.sleep(self.signal)
        return self.mixture.batch(step, *args)


def interrupted_at(scenario, step, how):
    "The scenario, which waits (float: seconds) or gets a signal (int) at a step."

    def make():
        waiting = Waiting(make_mixture(), step)
        waiting.signal = how
        return waiting

    scenario.mixture = make
    return scenario


def two_starts(folder):
    "Two processes train into one folder at the same time: one is refused, the other is right."
    reference, failed = right(TrainLast(), folder), []
    place = folder / "work"
    place.mkdir()
    begun = [
        in_process(lambda: interrupted_at(TrainLast(), 1, 3.0).run(place, resume))
        for resume in (False, True)
    ]
    codes = sorted(map(status, begun))
    if codes != [0, 1]:
        failed.append(f"the two ended with {codes}")
    return {"tried": 1, "failed": failed + differing(TrainLast().outcome(place), reference)}


def stopped(folder):
    "SIGTERM and Ctrl-C: the run saves itself, ends with their code, and goes on from that step."
    failed, tried = [], 0
    for scenario in (TrainLast, Train):
        (folder / scenario.name).mkdir()
        reference = right(scenario(), folder / scenario.name)
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            for step in (0, 3, 5):
                place = folder / f"{scenario.name}-{code}-{step}"
                place.mkdir()
                ended = status(
                    in_process(
                        lambda: interrupted_at(scenario(), step, int(number)).run(place, False)
                    )
                )
                saved = [int(p.name.partition("-")[2]) for p in checkpoints(place)]
                if ended != code or not saved or saved[-1] != step + 1:
                    failed.append(f"step {step}: ended with {ended}, not {code}, saved {saved}")
                scenario().run(place, True)
                there = scenario().outcome(place)
                failed += [
                    f"step {step}: {x}"
                    for x in differing(there, reference | {"checkpoints": there["checkpoints"]})
                ]
                tried += 1
    return {"tried": tried, "failed": failed}


def killed(folder, scenario, steps=(5,)):
    "A run that was killed at a step."
    folder.mkdir()
    for step in steps:

        def work():
            scenario.mixture = lambda: Killing(make_mixture(), step)
            scenario.run(folder, step != steps[0])

        assert status(in_process(work)) == -signal.SIGKILL
    return folder


def moved(folder):
    "A run is moved to another place, and another run lies where it was."
    reference = right(Train(), folder)
    first = killed(folder / "first", Train())
    (folder / "elsewhere").mkdir()
    first.rename(folder / "elsewhere" / "moved")
    other = Train()
    first.mkdir()
    other.settings = lambda: trainer.TrainConfig(
        steps=6, warmup=1, lr=1e-3, log_every=1, workers=0, seed=9, matmul="default", **Train.config
    )
    other.run(first, False)
    here = Path.cwd()
    os.chdir(folder / "elsewhere")
    Train().run(Path("moved"), True)
    os.chdir(here)
    return {
        "tried": 1,
        "failed": differing(Train().outcome(folder / "elsewhere" / "moved"), reference),
    }


def clock_back(folder):
    "The clock was set back: later checkpoints look older."
    failed = []
    for scenario in (Train, TrainLast):
        (folder / scenario.name).mkdir()
        reference = right(scenario(), folder / scenario.name)
        place = killed(folder / f"{scenario.name}-killed", scenario())
        for n, path in enumerate(checkpoints(place)):
            for entry in (path, *path.rglob("*")):
                os.utime(entry, (2e9 - 1e6 * n,) * 2)
        scenario().run(place, True)
        failed += differing(scenario().outcome(place), reference)
    return {"tried": 2, "failed": failed}


def finished(folder):
    "Resuming a finished run returns its metrics and changes nothing."
    scenario, out = Train(), folder / "run"
    scenario.run(folder, False)

    def look():
        return {
            str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()
        }

    before, options = look(), dict(resume=True, progress=False)
    metrics = trainer.train(
        make_encoder(dropout=0.1), make_mixture(), scenario.settings(), out, **options
    )
    failed = [
        f"{Path(name).name} was touched"
        for name, value in look().items()
        if before.get(name) != value
    ]
    if metrics != json.loads((out / "metrics.json").read_text()):
        failed.append(f"returned {metrics}")
    return {"tried": 1, "failed": failed}


def products(folder, processes=4):
    "Which library multiplies depends on the processor alone, also while the machine is busy."

    def work(place):
        settings = dict(steps=6, warmup=1, lr=3e-3, log_every=1, workers=0, seed=3)
        run = TrainLast()
        run.settings = lambda: trainer.TrainConfig(**settings, **TrainLast.config)
        run.run(place, False)

    places = [folder / f"run-{n}" for n in range(processes)]
    for place in places:
        place.mkdir()
    begun = [in_process(lambda: work(place)) for place in places]  # all at once
    failed = [f"a run ended with {code}" for code in map(status, begun) if code]
    runs = [TrainLast().outcome(place)["weights"] for place in places]
    if len(set(runs)) > 1:
        failed.append(f"the same recipe gave {len(set(runs))} different models")
    return {"tried": processes, "failed": failed}


def best_damaged(folder):
    "A bit of the best checkpoint, not of the newest, is flipped: it must not become the model."
    scenario, failed = Train(), []
    scenario.settings = lambda: trainer.TrainConfig(
        steps=8, warmup=1, lr=3e-3, log_every=1, workers=0, seed=3, matmul="default", **Train.config
    )
    scenario.run(folder, False)
    reference = scenario.outcome(folder)
    best = reference["records"]["metrics.json"]["best_step"]
    place = killed(folder / "killed", scenario, steps=(7,))
    path = place / "run" / "checkpoints" / f"checkpoint-{best}" / "model.safetensors"
    if best >= 6 or not path.exists():
        return {
            "tried": 0,
            "failed": [f"the best step is {best}; choose another metric for this check"],
        }
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 16
    path.write_bytes(raw)
    try:
        scenario.run(place, True)
        if scenario.outcome(place)["weights"] != reference["weights"]:
            failed.append("the damaged weights became the model, without a word")
    except ValueError as error:
        failed += [] if path.name in str(error) else [f"refused without naming the file: {error}"]
    return {"tried": 1, "failed": failed}


# ---- threads ----


def threads(folder, calls=40):
    "Eight threads encode different texts with one encoder; each gets what it gets alone."
    encoder = make_encoder()
    lists = [sentences(6 + n, n) + ["word " * 90] for n in range(8)]
    alone = [encoder.encode(texts, progress=False) for texts in lists]
    failed = []

    def work(n):
        for _ in range(calls):
            off = np.abs(encoder.encode(lists[n], progress=False) - alone[n]).max()
            if not off < 1e-5:
                failed.append(f"thread {n} is off by {off}")

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"tried": 8 * calls, "failed": failed}
