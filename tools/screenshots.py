"""Take the pictures of the demo's pages that stand in the docs, at 1100 px and, as on a phone, at
390 px, and write down beside them which words the page had.

    python tools/screenshots.py                      # all-MiniLM-L6-v2 and runs/quickstart
    python tools/screenshots.py MODEL... --out /tmp/dark --dark

Needs the extra 'demo', playwright, and a Chromium on this machine (Debian: apt install chromium).
`make train` makes runs/quickstart. A test compares the words with the page as it is built, so a
picture of a page that has changed since is found.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/images/demo"
MODELS = ["sentence-transformers/all-MiniLM-L6-v2", "runs/quickstart"]
SERVE = [sys.executable, "-m", "contrastive_st", "demo", "--port", "0"]
# file name -> tab, button to press, what must be there, where the picture begins: so many px above
# the page's button
PAGES = {
    "similarity": ("Similarity", "Languages", "#similarity-result table", "similarity", 999),
    "answers": ("Answers", "Cards' example", "#answers-result table", "answers", 999),
    "search": ("Search", "The harbour's handbook in 3-D", "#cluster-plot1 canvas", "cluster", 230),
    "bias": ("Bias", "Measure", "#bias-plot0 .main-svg", "bias", 999),
    "training": ("Training", "Show the runs", "#runs-plot0 .main-svg", "runs", 999),
}
PHONES = ("similarity", "search", "bias", "training")
HIGHEST = 1500  # px


def words(config: dict) -> dict[str, list[str]]:
    "What can be read on each tab of a page, by Gradio's description of it, models' names left out."
    tabs, texts = {}, []
    for component in config["components"]:
        props = component["props"]
        if component["type"] == "tabitem":
            texts = tabs[props["label"]] = []
        elif component["type"] in ("button", "markdown"):
            texts.append(props["value"])
        elif props.get("label") and component["type"] != "html":
            texts.append(props["label"])
    return tabs


def shot(page, tab, button, there, name, above) -> Image.Image:
    "Press a button and take the picture of what it shows."
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
    "Write a picture of few colours."
    few = image.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path.name}  {path.stat().st_size / 1024:.0f} KiB", flush=True)


def wall(strips: list[Image.Image], ground: str) -> Image.Image:
    "Put the pictures of phones side by side."
    picture = Image.new("RGB", (400 * len(strips) - 10, HIGHEST), ground)
    for i, strip in enumerate(strips):
        picture.paste(strip, (400 * i, 0))
    return picture


def take(address: str, folder: Path, dark: bool) -> None:
    "Take all pictures of a page that is being served."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--headless", "--no-sandbox", "--disable-gpu"],
        )
        scheme = "dark" if dark else "light"
        for width in (1100, 390):
            size = {"width": width, "height": 844}
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(address)
            pictures = {name: shot(page, *steps) for name, steps in PAGES.items()}
            if width == 390:
                phones = [pictures[name] for name in PHONES]
                pictures = {"phone": wall(phones, "black" if dark else "white")}
            for name, picture in pictures.items():
                save(picture, folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen([*SERVE, *args.models], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(f"{address}config") as answer:
            record = words(json.load(answer))
        take(address, args.out, args.dark)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (args.out / "words.json").write_text(text + "\n", encoding="utf-8")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
