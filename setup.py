"""Maps the checkout's folders to the one installed import name; all other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"lampq_rt": "lampq_rt", "lampq_rt.kernels": "kernels", "lampq_rt.calibrate": "calibrate"}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
    ],
)
