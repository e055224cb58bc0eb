# SPDX-License-Identifier: Apache-2.0
"""Installation. The cards of configs/ ship inside the package."""

import pathlib

from setuptools import find_packages, setup

_HERE = pathlib.Path(__file__).parent
_REQUIRED = [
  'absl-py',
  'chex',
  'datasets',
  'flax>=0.12',
  'huggingface_hub',
  'jax>=0.8',
  'matplotlib',
  'ml-collections>=1.0',
  'msgpack',
  'numpy>=2.0',
  'optax>=0.2.5',
  'orbax-checkpoint>=0.11',
  'safetensors>=0.5',
  'tensorstore',
  'tqdm',
  'transformers>=5.0',
]
# TensorFlow comes with SeqIO: 2.4 GB, imported only where it is used.
_SEQIO = ['seqio>=0.0.20']
_TEST = ['pytest>=8', 'ruff>=0.8', 'build', 'wheel', 'setuptools>=64', 'nbformat', 'nbclient', 'ipykernel']

setup(
  name='moepeft',
  version='0.1.0',
  description='Mixture-of-experts parameter-efficient fine-tuning in JAX/Flax',
  long_description=(_HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # configs/ stays at the top, where people look for it, and is importable
  # data of the package where it is installed.
  packages=[
    *find_packages(include=['moepeft', 'moepeft.*']),
    'moepeft.configs',
    'moepeft.configs.paper',
  ],
  package_dir={
    'moepeft.configs': 'configs',
    'moepeft.configs.paper': 'configs/paper',
  },
  package_data={
    'moepeft': ['assets/*/*'],
  },
  install_requires=_REQUIRED,
  extras_require={
    'seqio': _SEQIO,
    'test': _TEST,
    'all': _SEQIO + _TEST,
  },
)
