"""Metadata of the distribution `prism-kernels`: both packages, static, nothing probed at install time."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = ["scikit-learn>=1.5", "aeon>=1.0"]
TRAIN = [
    "lightning>=2.4",
    "torchmetrics>=1.4",
    "jsonargparse[signatures]>=4.30",
    "safetensors>=0.4",
    "rich>=13",
]
PLOT = ["matplotlib>=3.8"]
HF = ["transformers>=5.0", "safetensors>=0.4"]
DEV = [
    "pytest>=8",
    "pytest-benchmark>=5.1",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.10",
]

setup(
    name="prism-kernels",
    version="0.1.0",
    description="Triton kernels, references and layers for gated-delta and state-space sequence models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["prism_kernels*", "prism_models*"]),
    package_data={
        "prism_kernels": ["py.typed", "*/README.md", "*/launch_table.toml"],
        "prism_models": ["py.typed"],
    },
    install_requires=[
        "torch>=2.7",
        "triton>=3.4; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy>=1.26",
    ],
    extras_require={
        "train": TRAIN,
        "data": DATA,
        "plot": PLOT,
        "hf": HF,
        "dev": DEV,
        "all": sorted({*TRAIN, *DATA, *PLOT, *HF, *DEV}),
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
