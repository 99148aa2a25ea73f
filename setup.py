"Reads settings.ini; the package itself is exported from nbs/ by nbdev"

import configparser
import pathlib
import shlex

from setuptools import setup

config = configparser.ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
dask = shlex.split(cfg["dask_requirements"])

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    packages=["symtele"],
    package_data={"symtele": ["py.typed"]},
    python_requires=f">={cfg['min_python']}",
    zip_safe=False,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "dask": dask,
        "dev": dask + shlex.split(cfg["dev_requirements"]),
    },
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
