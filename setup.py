# SPDX-License-Identifier: Apache-2.0
from setuptools import find_packages, setup

setup(
    name="megatron_seqpar",
    version="0.1.0",
    packages=find_packages(include=["megatron_seqpar", "megatron_seqpar.*"]),
    entry_points={"console_scripts": ["megatron-seqpar = megatron_seqpar.cli:main"]},
)
