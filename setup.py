"""Packaging of dolly_lora. What it needs to know is in settings.ini, which nbdev reads too."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
minimum = int(cfg["min_python"].split(".")[1])


class WithNotebooks(build_py):
    """A built package carries a copy of the notebooks, which `dolly-lora run` executes.

    With them go the committed runs' numbers, which the chapters show beside their own.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        package = Path(self.build_lib) / "dolly_lora"
        for name in "nbs", "report":
            shutil.rmtree(package / name, ignore_errors=True)
        shutil.copytree(root / "nbs", package / "nbs", ignore=shutil.ignore_patterns(".*"))
        (package / "report").mkdir()
        for name in "results.json", "demo.json":
            if (root / "report" / name).exists():
                shutil.copy(root / "report" / name, package / "report" / name)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": WithNotebooks},
    packages=find_packages(include=["dolly_lora", "dolly_lora.*"]),
    package_data={"dolly_lora": ["sample/*", "style/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "site": cfg["site_requirements"].split(),
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Natural Language :: English",
        *(f"Programming Language :: Python :: 3.{v}" for v in range(minimum, 15)),
    ],
    zip_safe=False,
)
