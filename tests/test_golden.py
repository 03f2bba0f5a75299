"""The tool that compares a refactored library with its record: equal, changed, broken, absent."""

import importlib.util
import json
from unittest import SkipTest

import numpy as np
import pytest
from conftest import ROOT

CHEAP = "rows/*"


@pytest.fixture
def golden():
    "The tool, with entries that a test may change."
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tools/golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(golden, tmp_path):
    "A record of a cheap part."
    assert golden.main(["record", str(tmp_path / "record.json"), "--only", CHEAP]) == 0
    return tmp_path / "record.json"


def change(file, key, value):
    "Change one value of a record."
    values = json.loads(file.read_text())
    assert key in values
    file.write_text(json.dumps(values | {key: value}))


def verdicts(capsys):
    "The verdict on each entry in the printed table."
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {
        words[0]: words[-1] for words in lines if words[-1] in ("ok", "DIFFERS", "new", "skipped")
    }


def test_equal(golden, file, capsys):
    assert golden.main(["compare", str(file), "--only", CHEAP]) == 0
    assert verdicts(capsys) == dict.fromkeys(("rows/billion", "rows/four", "rows/single"), "ok")
    header = json.loads(file.read_text())["header"]
    assert {"python", "torch", "transformers", "processor", "date", "commit"} <= header.keys()


@pytest.mark.parametrize("key", ["rows/four: 17 1", "rows/four: 17 1 sha256"])
def test_a_changed_value_differs(golden, file, capsys, key):
    old = json.loads(file.read_text())[key]
    change(file, key, "0" * 64 if isinstance(old, str) else [old[0] + 1, *old[1:]])
    assert golden.main(["compare", str(file), "--only", CHEAP]) == 1
    assert {name for name, verdict in verdicts(capsys).items() if verdict == "DIFFERS"} == {
        "rows/four"
    }


def test_what_has_no_partner(golden, file, capsys):
    "An entry that broke or went differs; one that came later or cannot be computed here does not."

    def skip():
        raise SkipTest("no such weights")

    golden.ENTRIES["rows/billion"] = golden.Entry(lambda: 1 / 0, 0.0)
    golden.ENTRIES["rows/four"] = golden.Entry(skip, 0.0)
    golden.ENTRIES["rows/later"] = golden.Entry(dict, 0.0)
    del golden.ENTRIES["rows/single"]
    assert golden.main(["compare", str(file), "--only", CHEAP]) == 1
    verdict = {"rows/billion": "DIFFERS", "rows/four": "skipped", "rows/single": "DIFFERS"}
    assert verdicts(capsys) == verdict | {"rows/later": "new"}


def test_a_tolerance_holds_for_floats_and_not_for_texts(golden, tmp_path, capsys):
    values, file = {"floats": np.array([1.0, 2.0]), "text": "a"}, str(tmp_path / "record.json")
    golden.ENTRIES["loose"] = golden.Entry(lambda: values, 1e-6)
    golden.main(["record", file, "--only", "loose"])
    for change, code in (({"floats": np.array([1.0, 2.000001])}, 0), ({"text": "b"}, 1)):
        values |= change
        assert golden.main(["compare", file, "--only", "loose"]) == code


def test_difference(golden):
    assert golden.difference([1.0, 4.0], [1.0, 3.0]) == 0.25
    assert golden.difference([float("nan")], [float("nan")]) == 0
    for other in ([float("nan")], [1.0, 1.0], "hash", None):
        assert golden.difference([1.0], other) == float("inf")
