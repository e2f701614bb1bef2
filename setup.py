"""Packaging of remote_exec: one module, whose version is its own."""
import pathlib
import re

from setuptools import setup

here = pathlib.Path(__file__).parent
source = (here / "remote_exec.py").read_text(encoding="utf-8")

setup(
    name="remote_exec",
    version=re.search(r'^__version__ = "(.+)"', source, re.MULTILINE).group(1),
    description="An IPython magic that runs code on one or many Jupyter kernels, near or far",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["remote_exec"],
    python_requires=">=3.8",
    install_requires=["ipython>=7.31", "jupyter_client>=8.0"],
    extras_require={"test": [
        "pytest", "pytest-xdist", "hypothesis", "pexpect", "numpy", "pandas", "ipykernel",
        "bash_kernel", "cloudpickle", "nbclient", "nbformat", "sshpyk", "ipyparallel", "matplotlib",
        "ipywidgets", "tqdm", "rich", "psutil",
        "xeus-python; python_version >= '3.10'",
        "remote_ikernel; python_version >= '3.10'",
        "gateway_provisioners; python_version >= '3.10'"]},
    keywords="ipython jupyter magic kernel remote ssh parallel",
    classifiers=[
        "Framework :: IPython",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering",
        "Topic :: System :: Distributed Computing",
    ],
)
