"""Take the pictures of the demo's pages that stand in the docs, each at 1100 px and, as on a phone,
at 390 px.

    python tools/screenshots.py sentence-transformers/all-MiniLM-L6-v2 runs/quickstart

Needs the extra 'demo', playwright, and a Chromium on this machine.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SERVE = [sys.executable, "-c", "from contrastive_st.cli import main; main()", "demo", "--port", "0"]
# file name -> tab, button to press, what must be there, where the picture begins: so many px above
# the page's button
PAGES = {
    "similarity": ("Similarity", "Languages", "#similarity-result table", "similarity", 999),
    "answers": ("Answers", "Cards' example", "#answers-result table", "answers", 999),
    "search": ("Search", "The harbour's handbook in 3-D", "#cluster-plot1 canvas", "cluster", 230),
    "bias": ("Bias", "Measure", "#bias-plot0 .main-svg", "bias", 999),
    "training": ("Training", "Show the runs", "#runs-plot0 .main-svg", "runs", 999),
}
HIGHEST = 1500  # px


def shot(page, tab, button, there, name, above) -> Image.Image:
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("button", name=button, exact=True).click()
    page.locator(there).first.wait_for(timeout=120_000)
    page.wait_for_timeout(2_500)  # maps and bars are still moving
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    top = max(0, page.locator(f"#{name}-go").bounding_box()["y"] - above)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    return image.crop((0, int(top), image.width, min(image.height, int(top) + HIGHEST)))


def save(image: Image.Image, path: Path) -> None:
    image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/demo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen([*SERVE, *args.models], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox", "--disable-gpu"],
            )
            for width in (1100, 390):
                page, strips = browser.new_page(viewport={"width": width, "height": 844}), []
                page.goto(address)
                for name, steps in PAGES.items():
                    image = shot(page, *steps)
                    if width > 600:
                        save(image, args.out / f"{name}.png")
                    else:
                        strips.append(image)
            wall = Image.new("RGB", (4 * 400 - 10, HIGHEST), "white")
            for i, strip in enumerate(strips[j] for j in (0, 2, 3, 4)):
                wall.paste(strip, (400 * i, 0))
            save(wall, args.out / "phone.png")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
