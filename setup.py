"""Everything about the package is read from settings.ini."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters="=")
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): cfg[key].split()
    for key in cfg
    if key.endswith("_requirements")
}
stages = {
    "2": "3 - Alpha",
    "3": "4 - Beta",
    "4": "5 - Production/Stable",
}  # nbdev's number of it -> the classifier's


def absolute(text: str) -> str:
    "The README for a page outside of the repository: its relative links become addresses."

    def link(match):
        if match[3] is None:  # inline code
            return match[0]
        place = "raw" if match[1] else "blob"  # a picture, or a page
        return f"{match[1]}{match[2]}({cfg['git_url']}/{place}/{cfg['branch']}/{match[3]})"

    return re.sub(r"`[^`\n]*`|(!?)(\[[^\]\[]*\])\((?![a-z]+:|#)([^)\s]+)\)", link, text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=absolute((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {stages[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        *(
            f"Programming Language :: Python :: {version}"
            for version in ("3", "3.11", "3.12", "3.13")
        ),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
    ],
    packages=[
        *find_namespace_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
        cfg["lib_path"] + ".published",
    ],  # quickstart/ holds data only
    package_dir={
        cfg["lib_path"] + ".published": "recipes"
    },  # so that an installed package has them too
    package_data={
        cfg["lib_path"]: ["*.j2"],  # templates of the model card
        cfg["lib_path"] + ".published": ["*.toml", "*.json"],
    },
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
