"""A process that has imported the library, and forks a child for each attempt.

Started by `sweep.py` with LD_PRELOAD. A line of JSON on standard input is one request, a line on
standard output is its answer. Beside the name of a scenario it holds one of

    {"do": "plan"}                             what the undisturbed run does and leaves
    {"do": "kill", "at": [[n, mode], ...]}     killed at each in turn, then run to the end
    {"do": "full", "room": bytes}              a full disk, then run to the end
    {"do": "cases"}                            all (file, kind) of damage to the newest checkpoint
    {"do": "damage", "file": .., "kind": ..}   one of them, then run to the end
    {"do": "check", "check": name}             a function of checks.py
    {"do": "fuzz", "seeds": [first, last]}     mutated inputs
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from faults import atoms  # noqa: E402
from faults.killer import Killer  # noqa: E402

LONGEST = 90  # seconds of an attempt; more is a hang


def in_child(work, log, longest=LONGEST):
    "Run `work` in a forked child: its value, or how it ended."
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            answer = {"value": work()}
        except BaseException as error:
            where = traceback.format_exc().splitlines()[-12:]
            answer = {"error": f"{type(error).__name__}: {error}", "where": "\n".join(where)}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    return _wait(child, reading, longest)


def _wait(child, reading, longest):
    "The answer of a child, which is ended if it takes too long."
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    begun = time.monotonic()
    signal.alarm(longest)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    if time.monotonic() - begun > longest - 1:
        return {"error": f"hung for {longest} s", "where": ""}
    if os.WIFSIGNALED(status):
        return {"killed": os.WTERMSIG(status)}
    return json.loads(text)


def find(name):
    "A scenario by its name; those of models are imported when they are wanted."
    if name == "nothing":
        import faults.checks
        import faults.fuzz  # noqa: F401

        return Nothing
    if name in atoms.SCENARIOS:
        return atoms.SCENARIOS[name]
    import torch

    from faults.scenarios import SCENARIOS

    torch.set_num_threads(1)
    return SCENARIOS[name]


class Nothing(atoms.Scenario):
    "An empty folder, for what brings its own scenarios."

    name = "nothing"


class Server:
    "One scenario, with its folders."

    def __init__(self, name, folder):
        self.scenario, self.folder, self.killer = find(name)(), Path(folder) / name, Killer()
        self.template, self.log = self.folder / "template", self.folder / "log.txt"
        self.template.mkdir(parents=True)
        made = in_child(lambda: self.scenario.prepare(self.template), self.log)
        if made.get("value", 0) is not None:
            raise RuntimeError(f"{name}: the template cannot be made: {made}")

    def fresh(self):
        "A folder with what is there before."
        return atoms.copy_of(self.template, self.folder / "work")

    def attempt(self, place, resume, arm=lambda: None):
        "One run in a child, watched."

        def work():
            self.killer.watch(place, self.scenario.ignored)
            arm()
            self.scenario.run(place, resume)

        return in_child(work, self.log)

    def last(self, place):
        "Look at what was left, run to the end, and return what is there then."

        def work():
            left = self.scenario.between(place)
            self.scenario.run(place, True)
            return {"between": left, "outcome": self.scenario.outcome(place)}

        return in_child(work, self.log)

    def plan(self):
        "The undisturbed run."
        place = self.fresh()

        def work():
            self.killer.watch(place, self.scenario.ignored)
            self.scenario.run(place, False)
            seen = self.killer.operations()
            self.killer.watch(Path("/nowhere"))
            outcome = self.scenario.outcome(place)
            return {"operations": seen, "outcome": outcome, "modules": list(sys.modules)}

        answer = in_child(work, self.log)
        preload(answer.get("value", {}).pop("modules", ()))
        return answer

    def kill(self, at):
        "Kill the run at the first of these points, its resumed run at the second, and so on."
        place, kills = self.fresh(), 0
        for number, (n, mode) in enumerate(at):
            ended = self.attempt(place, number > 0, lambda: self.killer.arm(n, mode))
            kills += "killed" in ended
            if "error" in ended:
                return ended | {"kills": kills}
        return self.last(place) | {"kills": kills}

    def full(self, room):
        "Run on a disk with so much room, then on one with enough."
        place = self.fresh()
        refused = self.attempt(place, False, lambda: self.killer.limit(room))
        return self.last(place) | {"refused": refused}

    def interrupted(self):
        "A run that was killed in its last step but one; it is made once."
        place = self.folder / "interrupted"
        if not place.exists():
            from faults.damage import interrupt

            place.mkdir()
            ended = in_child(lambda: interrupt(self.scenario.name, place), self.log)
            if "killed" not in ended:
                raise RuntimeError(f"the run to be damaged was not killed: {ended}")
        return place

    def cases(self):
        "Every (file, kind) of damage."
        from faults.damage import cases

        return {"value": cases(self.interrupted())}

    def damage(self, file, kind):
        "Damage the newest checkpoint, then run to the end."
        from faults.damage import damage, resume

        place = atoms.copy_of(self.interrupted(), self.folder / "work")
        damage(place, file, kind)
        answer = in_child(lambda: resume(self.scenario, place), self.log)
        return answer | {"log": self.log.read_text(errors="replace")[-4000:]}

    def check(self, check):
        "One function of checks.py, in a child."
        from faults import checks

        place = self.fresh()
        return in_child(lambda: getattr(checks, check)(place), self.log, longest=400)

    def fuzz(self, seeds):
        "Some mutated inputs, in a child."
        from faults.fuzz import fuzz

        place = self.fresh()
        answer = in_child(lambda: fuzz(place, range(*seeds)), self.log, longest=300)
        if "value" not in answer:
            lines = [
                x
                for x in self.log.read_text(errors="replace").splitlines()
                if x.startswith("seed ")
            ]
            answer["error"] = f"{lines[-1:]}: {answer}"
        return answer


def preload(names):
    "Import what the runs import late, so that each child finds it there."
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays; a child need not look at it


def serve():
    "Answer requests until there are none."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    servers = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for line in sys.stdin:
            request, begun, used = json.loads(line), time.monotonic(), os.times()
            name, do = request.pop("scenario"), request.pop("do")
            if name not in servers:
                servers[name] = Server(name, os.path.realpath(folder))
            answer = getattr(servers[name], do)(**request)
            now = os.times()
            busy = (
                now.children_user + now.children_system - used.children_user - used.children_system
            )
            answers.write(
                json.dumps(answer | {"seconds": time.monotonic() - begun, "busy": busy}) + "\n"
            )
            answers.flush()


if __name__ == "__main__":
    serve()
