"""What `contrastive-st new` costs: time and memory to turn a large CSV into data and a recipe.

python benchmarks/new.py            # 200,000 and 2,000,000 rows: some minutes, and 1 GB of disk
python benchmarks/new.py --quick    # 20,000 and 200,000 rows: less than a minute

Each file has two columns, a question and an answer, and one answer in ten belongs to two questions,
so that some rows hang together. A tenth of the rows is held out. Each size runs in a process of its
own, and memory is what the process needs beyond what it had before.
"""

import tempfile
from pathlib import Path

import numpy as np
from measure import arguments, fresh, peak_while, record, save

from contrastive_st.new import new_recipe

SIZES = {"whole": (200_000, 2_000_000), "quick": (20_000, 200_000)}
WORDS = "the bus stops where old trams turn near a quiet harbour at night".split()


def write_pairs(path: Path, N: int) -> None:
    "Questions and answers of about fifty letters, written in blocks."
    rng, words = np.random.default_rng(0), np.array(WORDS)
    with open(path, "w") as file:
        file.write("question,answer\n")
        for start in range(0, N, 10_000):
            chosen = rng.integers(len(words), size=(min(10_000, N - start), 2, 8))
            for n, (question, _) in enumerate(words[chosen], start):
                number = n - (n % 10 == 9)  # the tenth of ten rows has the answer of the ninth
                answer = words[chosen[number - start, 1]]
                file.write(f"{' '.join(question)} {n}?,{' '.join(answer)} {number}\n")


def make(folder: str, N: int) -> dict:
    "Write the file, and measure the command on it."
    path = Path(folder, f"{N}.csv")
    write_pairs(path, N)
    made, seconds, peak = peak_while(lambda: new_recipe(path.with_suffix(".toml"), path))
    return {
        "rows": made.rows,
        "file_mb": path.stat().st_size / 1e6,
        "seconds": seconds,
        "peak_mb": peak,
    }


def main(argv=None) -> None:
    "Measure and write."
    args = arguments(__doc__.splitlines()[0], argv)
    sizes = SIZES["quick" if args.quick else "whole"]
    results = record() | {"quick": args.quick, "sizes": {}}
    for N in sizes:
        with tempfile.TemporaryDirectory() as folder:
            results["sizes"][str(N)] = fresh(make, folder, N)
    few, many = (results["sizes"][str(N)] for N in sizes)
    results["ratios"] = {
        "seconds": many["seconds"],
        "peak_mb": many["peak_mb"],
        "bytes_more_a_row": 1e6 * (many["peak_mb"] - few["peak_mb"]) / (sizes[1] - sizes[0]),
    }
    save(results, {}, "new_quick" if args.quick else "new", args.out)


if __name__ == "__main__":
    main()
