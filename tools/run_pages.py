"""Test all pages by nbdev_test in two processes, the longest first.

    python tools/run_pages.py

By name, which is nbdev_test's order, the two tutorials of minutes come last, and one of the two
processes ends long before the other. How long a page takes is in tools/pages.json.
"""

import json
import os

from nbdev import test
from notebooks import PAGES
from pages import ROOT


def longest_first(files: list) -> list:
    "Files by their recorded seconds; a page without a record comes first, it may be a long one."
    seconds = {name: page.get("seconds") for name, page in json.loads(PAGES.read_text()).items()}
    return sorted(files, key=lambda path: (-(seconds.get(path.stem) or 1e9), path))


def main() -> None:
    os.chdir(ROOT)
    orders = []

    def order(files, **options):
        orders.append(files)
        return sorted(files, **options) if options else longest_first(files)

    test.sorted = order  # its first use is before the pages run
    test.nbdev_test(n_workers=2)
    if not orders:
        raise RuntimeError(
            "nbdev_test did not sort its pages by nbdev.test.sorted, so they ran in the order of"
            " their names; look how this nbdev orders them"
        )


if __name__ == "__main__":
    main()
