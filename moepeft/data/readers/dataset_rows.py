# SPDX-License-Identifier: Apache-2.0
"""Rows of Hugging Face `datasets`: a name on the hub, or local files.

Rows have `inputs` and `targets` (and what else `moepeft.data.example` knows),
or any columns, which templates then put into words. Tables stay on disk; JSON
is read here, so that a broken line has a number and can be left out.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.core import files, untrusted
from moepeft.data import example as example_lib
from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows, ExampleRows
from moepeft.data.readers import csv_table, jsonl_rows, promptsource, splits
from moepeft.data.row_fields import UnusedFields, join_names
from moepeft.tasks import Example

# What `datasets` calls the readers of files, by the files' endings.
_READERS = {'parquet': 'parquet', 'arrow': 'arrow'}
# Read here: `datasets` would infer numbers, dates and nulls from texts.
_JSON = ('json', 'jsonl')
_READ_HERE = (*_JSON, 'csv')


def read(
  path: str,
  split: str = 'train',
  templates: str = '',
  on_bad_row: str = 'error',
  seed: int = 0,
  ignore: str = '',
) -> ExampleRows:
  """All examples of a dataset's split; made when they are asked for.

  Args:
    path: a .json, .jsonl, .csv, .parquet or .arrow file, a directory of them,
      or one of `save_to_disk`; else a name on the hub, with its configuration
      after a slash: 'imdb', 'glue/mrpc', 'nyu-mll/glue/mrpc'.
    split: of the dataset, 'train' or 'train[:10%]'. A file, and a directory
      that holds one saved split of no name, has all in 'train'.
    templates: a templates.yaml or a directory of them, see
      `moepeft.data.readers.promptsource.group`; '' where rows have inputs and
      targets.
    on_bad_row: 'error', or 'skip': left out, with the reason in
      `Rows.skipped`.
    seed: of what templates draw.
    ignore: fields that may be left unused, of config.data.ignore_fields.

  Raises:
    ValueError: what cannot be found or read, a split that is not there, bad
      rows; the message names the path and the row.
  """
  bad = BadRows(on_bad_row, ignore)
  table, where = open_table(path, split, bad)
  name = _name(path)
  if templates:
    group = promptsource.find_templates(templates, name)
    return promptsource.render_templates(group, table, bad, where, seed)
  _check_columns(path, table)
  make = functools.partial(_plain, promptsource.p3_name(name), bad.unused)
  return example_lib.lazy_examples(path, table, (make,), where, bad)


def _name(path: str) -> str:
  """The dataset's name: of the hub as it is, of a file without its ending."""
  if not os.path.exists(files.local_path(path)):
    return path
  return os.path.basename(os.path.abspath(path)).split('.')[0]


def _plain(
  name: str, unused: UnusedFields, row: Mapping, place: int
) -> Example:
  # A table has no absent fields: they are None there.
  values = {k: v for k, v in row.items() if v is not None}
  return example_lib.parse_example({'idx': place} | values, name, unused=unused)


def _check_columns(path: str, table: Sequence[Mapping]) -> None:
  columns = getattr(table, 'column_names', None)
  if columns is None:
    columns = sorted({column for row in table for column in row})
  if len(table) and (
    'inputs' not in columns or not {'targets', 'choices'} & set(columns)
  ):
    raise ValueError(
      f"{path} has the columns {join_names(columns)}; expected 'inputs' and "
      "'targets', or set config.data.templates to put these into words"
    )


def open_table(
  path: str, split: str, bad: BadRows
) -> tuple[Sequence[Mapping], Callable[[int], str]]:
  """Rows by place as they stand, and a place in words.

  Args: as of `read`.

  Raises:
    ValueError: as `read`.
  """
  local = files.local_path(path)
  files.check_file(local)
  if os.path.isfile(local) and fingerprint.file_ending(local) in _READ_HERE:
    if splits.split_name(split) != 'train':
      raise ValueError(
        f"{path} is one file, whose rows are the split 'train'; got {split!r}"
      )
    return _table([local], path, split, bad)
  if os.path.isdir(local) and not splits.lists_its_files(local):
    of_split = splits.split_files(path, local, split, bad)
    here = {fingerprint.file_ending(file) in _READ_HERE for file in of_split}
    if here == {True}:
      return _table(of_split, path, split, bad)
    kinds = sorted(set(map(fingerprint.file_ending, of_split)))
    if len(kinds) > 1:
      raise splits.split_error(
        path, split, f'its files are of several kinds: {", ".join(kinds)}'
      )
    table = _load(path, local, split, of_split)
  else:
    table = _load(path, local, split)
  return table, lambda place: f'{path}, {split}, row {place}'


def fills_missing_fields(table: Sequence[Mapping]) -> bool:
  """Whether each object in a table has the fields of all others, as null."""
  return hasattr(table, 'features')


def without_nulls(value: Any) -> Any:
  """A value of such a table with the fields that it was written with."""
  if isinstance(value, Mapping):
    return {k: without_nulls(v) for k, v in value.items() if v is not None}
  return [*map(without_nulls, value)] if isinstance(value, list) else value


def _table(
  of_split: Sequence[str], path: str, split: str, bad: BadRows
) -> tuple[Sequence[Mapping], Callable[[int], str]]:
  """The rows of files of JSON and CSV, one file after the other."""
  places, table = [], []
  for file in of_split:
    where, part = (
      csv_table.read(file, bad)
      if fingerprint.file_ending(file) == 'csv'
      else read_json_rows(file, bad)
    )
    places += where
    # One file of CSV stays as it is, which takes less memory.
    table = part if len(of_split) == 1 else [*table, *part]
  chosen = splits.split_slice(path, split, len(places))
  return table[chosen], places[chosen].__getitem__


def read_json_rows(file: str, bad: BadRows) -> tuple[list[str], list[dict]]:
  """(where, rows) of lines of objects, or of one array of them."""
  if fingerprint.file_ending(file) == 'json' and _begins(file).startswith(b'['):
    return _array(file, bad)
  if fingerprint.file_ending(file) == 'json':
    _check_lines(file)
  located = list(jsonl_rows.read_lines(file, bad))
  return [where for where, _ in located], [row for _, row in located]


def _check_lines(file: str) -> None:
  """Looks whether a .json holds one object on several lines.

  Raises:
    ValueError: it does.
  """
  try:
    with fingerprint.open_data_file(file) as stream:
      first = stream.readline()
      # All but '{' of a row on one line is on that line.
      if first.decode('utf-8-sig').strip() != '{':
        return
      value_by_key = untrusted.parse_json(first + stream.read())
  except (ValueError, OSError):
    # Whoever reads it says what is wrong.
    return
  lists = [
    key for key, value in value_by_key.items() if isinstance(value, list)
  ]
  raise ValueError(
    f'{file} is one object on several lines, expected an array of rows or an '
    'object a line; '
    + (
      f'write the list in {lists[0]!r} as the whole file'
      if len(lists) == 1
      else 'put it into [...]'
    )
  )


def _begins(file: str) -> bytes:
  """The start of a file, without blanks and byte order mark."""
  with fingerprint.open_data_file(file) as stream:
    return stream.read(64).lstrip(b'\xef\xbb\xbf \t\r\n')


def _array(file: str, bad: BadRows) -> tuple[list[str], list[dict]]:
  try:
    with fingerprint.open_data_file(file) as stream:
      text = stream.read()
    items = untrusted.parse_json(text, check_text=False, unique_keys=True)
  except untrusted.Malformed as e:
    raise ValueError(
      f'{file} cannot be read as one array of JSON ({e}); mend the file, or '
      'write one object a line'
    ) from None
  places, table, torn = [], [], jsonl_rows.SURROGATE_ESCAPE.search(text)
  for i, item in enumerate(items):
    where = f'{file}, row {i}'
    try:
      if not isinstance(item, dict):
        raise BadRow('expected an object {...}; mend or remove it')
      if torn:
        example_lib.check_surrogates(item)
      places.append(where)
      table.append(item)
    except BadRow as e:
      bad(where, e)
  return places, table


def _load(
  path: str, local: str, split: str, of_split: Sequence[str] = ()
) -> Sequence[Mapping]:
  """A split as a `datasets.Dataset`, whatever goes wrong in one sentence.

  Args:
    of_split: the split's files, where they are known.
  """
  # Imported here: it costs a second, and most runs need none of it.
  import datasets

  try:
    if not os.path.exists(local):
      return _remote(path, split)
    if of_split:
      reader = _READERS[fingerprint.file_ending(of_split[0])]
      by_name = {splits.split_name(split): list(of_split)}
      return datasets.load_dataset(reader, data_files=by_name, split=split)
    if os.path.isdir(local):
      files.check_files(local)
      if splits.is_saved_dataset(local):
        return _saved(datasets.load_from_disk(local), path, split)
      return datasets.load_dataset(local, split=split)
    if fingerprint.file_ending(local) not in _READERS:
      endings = ', .'.join((*_READ_HERE, *_READERS))
      raise ValueError(f'expected one of .{endings}')
    reader = _READERS[fingerprint.file_ending(local)]
    return datasets.load_dataset(reader, data_files=local, split=split)
  except ConnectionError as e:
    raise ValueError(
      f'{path!r} is no local path, and the Hugging Face hub cannot be reached '
      f'({_reason(e)}); name local files, or connect to the network'
    ) from None
  except Exception as e:
    raise ValueError(
      f'the split {split!r} of {path!r} cannot be read ({_reason(e)}); check '
      'config.data.path and config.data.split'
    ) from None


def _remote(path: str, split: str) -> Sequence[Mapping]:
  """A name on the hub: all of it a repository, or its last part a config."""
  import datasets

  parts = path.split('/')
  if fingerprint.file_ending(path) in (*_READ_HERE, *_READERS):
    raise ValueError('no such file')
  if path.startswith(('.', '~', '/')) or len(parts) > 3:
    raise ValueError('no such path, and no name on the hub')
  if len(parts) < 3:
    try:
      return datasets.load_dataset(path, split=split)
    except datasets.exceptions.DatasetNotFoundError:
      if len(parts) < 2:
        raise
  name, config = path.rsplit('/', 1)
  return datasets.load_dataset(name, config, split=split)


def _saved(dataset, path: str, split: str) -> Sequence[Mapping]:
  """One split of what save_to_disk wrote."""
  if isinstance(dataset, dict):
    if split not in dataset:
      raise ValueError(f'it holds the splits {", ".join(dataset)}')
    return dataset[split]
  saved_split = str(dataset.split or 'train')
  if split != saved_split:
    raise ValueError(f'it holds the split {saved_split}')
  return dataset


def _reason(e: BaseException) -> str:
  """The message of an error of `datasets` and of its cause, in one line."""
  message = str(e) or type(e).__name__
  if e.__cause__ is not None:
    message += f': {e.__cause__}'
  return ' '.join(message.split())[:500].rstrip('.')
