"""Packaging, read from settings.ini so that every fact about the package is written once."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
meta = cfg["DEFAULT"]
extras = {k[: -len("_requirements")]: v.split() for k, v in meta.items() if k.endswith("_requirements")}
packages = ["ascend_nb", *(f"ascend_nb.{p.parent.name}" for p in sorted(ROOT.glob("ascend_nb/*/__init__.py")))]
readme = ROOT / "README.md"

setup(
    name=meta["lib_name"], version=meta["version"], description=meta["description"], author=meta["author"],
    classifiers=["Development Status :: 3 - Alpha", "Operating System :: OS Independent", *(f"Programming Language :: Python :: 3.{v}" for v in range(10, 14))],
    license=meta["license"], keywords=meta["keywords"].split(), python_requires=f">={meta['min_python']}",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else meta["description"],
    long_description_content_type="text/markdown",
    # data_samples/ stays at the top of the repository and travels inside the wheel as ascend_nb/data_samples
    packages=[*packages, "ascend_nb.data_samples"], package_dir={"ascend_nb.data_samples": "data_samples"},
    package_data={"ascend_nb": ["py.typed", "*.yaml", "*.json"], "ascend_nb.data_samples": ["*", "*/*", "*/*/*", "*/*/*/*"]},
    include_package_data=False, zip_safe=False,
    install_requires=meta["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": meta["console_scripts"].split()},
)
