# SPDX-License-Identifier: Apache-2.0
"""Reads rows of Hugging Face `datasets`: a name on the hub, or local files.

Rows have `inputs` and `targets` (and the other fields of
`moepeft.data.example`), or any columns that templates render. Tables stay on
disk. This module parses JSON itself, so that errors name a line and bad lines
can be skipped.
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

# File ending -> the name of the reader in `datasets`.
_READERS = {'parquet': 'parquet', 'arrow': 'arrow'}
# Endings of files that this module parses, because `datasets` infers numbers,
# dates and nulls from texts.
_PARSED_HERE = ('json', 'jsonl', 'csv')


def read(
  path: str,
  split: str = 'train',
  templates: str = '',
  on_bad_row: str = 'error',
  seed: int = 0,
  ignore: str = '',
) -> ExampleRows:
  """Returns the examples of a dataset's split; each is built on access.

  Args:
    path: a .json, .jsonl, .csv, .parquet or .arrow file, a directory of them,
      or a directory of `save_to_disk`; else a name on the hub, with its
      configuration after a slash: 'imdb', 'glue/mrpc', 'nyu-mll/glue/mrpc'.
    split: 'train' or 'train[:10%]'. A single file, or a directory of
      `save_to_disk` with one unnamed split, is the split 'train'.
    templates: a templates.yaml or a directory of them, see
      `moepeft.data.readers.promptsource.find_templates`; '' if rows have inputs
      and targets.
    on_bad_row: 'error', or 'skip' to leave bad rows out; see
      `ExampleRows.skipped`.
    seed: the seed of the templates' random choices.
    ignore: config.data.ignore_fields.

  Raises:
    ValueError: the data cannot be found or read, the split does not exist, or a
      row is bad; the message names the path and the row.
  """
  bad = BadRows(on_bad_row, ignore)
  table, row_location = open_table(path, split, bad)
  name = _dataset_name(path)
  if templates:
    group = promptsource.find_templates(templates, name)
    return promptsource.render_templates(group, table, bad, row_location, seed)
  _check_columns(path, table)
  example_fn = functools.partial(
    _make_example, promptsource.p3_name(name), bad.unused
  )
  return example_lib.lazy_examples(
    path, table, (example_fn,), row_location, bad
  )


def _dataset_name(path: str) -> str:
  """The dataset's name: its name on the hub, or a file's without ending."""
  if not os.path.exists(files.local_path(path)):
    return path
  return os.path.basename(os.path.abspath(path)).split('.')[0]


def _make_example(
  name: str, unused: UnusedFields, row: Mapping, index: int
) -> Example:
  # Tables have null for absent fields.
  values = {k: v for k, v in row.items() if v is not None}
  return example_lib.parse_example({'idx': index} | values, name, unused=unused)


def _check_columns(path: str, table: Sequence[Mapping]) -> None:
  columns = getattr(table, 'column_names', None)
  if columns is None:
    columns = sorted({column for row in table for column in row})
  if len(table) and (
    'inputs' not in columns or not {'targets', 'choices'} & set(columns)
  ):
    raise ValueError(
      f"{path} has the columns {join_names(columns)}; expected 'inputs' and "
      "'targets', or set config.data.templates to render them"
    )


def open_table(
  path: str, split: str, bad: BadRows
) -> tuple[Sequence[Mapping], Callable[[int], str]]:
  """(raw rows, function from a row's index to its file and line).

  Args: as for `read`.

  Raises:
    ValueError: as for `read`.
  """
  local = files.local_path(path)
  files.check_file(local)
  if os.path.isfile(local) and fingerprint.file_ending(local) in _PARSED_HERE:
    if splits.split_name(split) != 'train':
      raise ValueError(
        f"{path} is one file, whose rows are the split 'train'; got {split!r}"
      )
    return _parse_files([local], path, split, bad)
  if os.path.isdir(local) and not splits.lists_its_files(local):
    split_files = splits.split_files(path, local, split, bad)
    endings = sorted(set(map(fingerprint.file_ending, split_files)))
    if set(endings) <= set(_PARSED_HERE):
      return _parse_files(split_files, path, split, bad)
    if len(endings) > 1:
      raise splits.split_error(
        path, split, f'its files have several formats: {", ".join(endings)}'
      )
    table = _load(path, local, split, split_files)
  else:
    table = _load(path, local, split)
  return table, lambda index: f'{path}, {split}, row {index}'


def fills_missing_fields(table: Sequence[Mapping]) -> bool:
  """Whether a table has null for the fields that a row lacks."""
  return hasattr(table, 'features')


def without_nulls(value: Any) -> Any:
  """Removes fields that are null, at any depth."""
  if isinstance(value, Mapping):
    return {k: without_nulls(v) for k, v in value.items() if v is not None}
  return [*map(without_nulls, value)] if isinstance(value, list) else value


def _parse_files(
  split_files: Sequence[str], path: str, split: str, bad: BadRows
) -> tuple[Sequence[Mapping], Callable[[int], str]]:
  """`open_table` of JSON and CSV files, whose rows are concatenated."""
  locations, table = [], []
  for file in split_files:
    file_locations, rows = (
      csv_table.read(file, bad)
      if fingerprint.file_ending(file) == 'csv'
      else read_json_rows(file, bad)
    )
    locations += file_locations
    # The rows of a single CSV file stay a table, which needs less memory.
    table = rows if len(split_files) == 1 else [*table, *rows]
  split_slice = splits.split_slice(path, split, len(locations))
  return table[split_slice], locations[split_slice].__getitem__


def read_json_rows(file: str, bad: BadRows) -> tuple[list[str], list[dict]]:
  """(file and line of each row, rows) of JSON lines or of one array."""
  if fingerprint.file_ending(file) == 'json' and _first_bytes(file).startswith(
    b'['
  ):
    return _parse_array(file, bad)
  if fingerprint.file_ending(file) == 'json':
    _check_not_one_object(file)
  located = list(jsonl_rows.read_lines(file, bad))
  return [location for location, _ in located], [row for _, row in located]


def _check_not_one_object(file: str) -> None:
  """
  Raises:
    ValueError: a .json file is one object on several lines.
  """
  try:
    with fingerprint.open_data_file(file) as stream:
      first_line = stream.readline()
      # A row on one line has more than '{' on it.
      if first_line.decode('utf-8-sig').strip() != '{':
        return
      value_by_key = untrusted.parse_json(first_line + stream.read())
  except (ValueError, OSError):
    # Reading the rows raises the error, with the line.
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


def _first_bytes(file: str) -> bytes:
  """The first bytes of a file, without white space and byte order mark."""
  with fingerprint.open_data_file(file) as stream:
    return stream.read(64).lstrip(b'\xef\xbb\xbf \t\r\n')


def _parse_array(file: str, bad: BadRows) -> tuple[list[str], list[dict]]:
  try:
    with fingerprint.open_data_file(file) as stream:
      text = stream.read()
    items = untrusted.parse_json(text, check_text=False, unique_keys=True)
  except untrusted.Malformed as e:
    raise ValueError(
      f'{file} cannot be read as one array of JSON ({e}); mend the file, or '
      'write one object a line'
    ) from None
  locations, table = [], []
  has_surrogates = jsonl_rows.SURROGATE_ESCAPE.search(text)
  for i, item in enumerate(items):
    location = f'{file}, row {i}'
    try:
      if not isinstance(item, dict):
        raise BadRow('expected an object {...}; mend or remove it')
      if has_surrogates:
        example_lib.check_surrogates(item)
      locations.append(location)
      table.append(item)
    except BadRow as e:
      bad(location, e)
  return locations, table


def _load(
  path: str, local: str, split: str, split_files: Sequence[str] = ()
) -> Sequence[Mapping]:
  """Loads a split as a `datasets.Dataset`; any error becomes a ValueError.

  Args:
    split_files: the split's files, if they are known.
  """
  # Imported here, as the import takes a second and most runs do not need it.
  import datasets

  try:
    if not os.path.exists(local):
      return _load_remote(path, split)
    if split_files:
      reader = _READERS[fingerprint.file_ending(split_files[0])]
      by_name = {splits.split_name(split): list(split_files)}
      return datasets.load_dataset(reader, data_files=by_name, split=split)
    if os.path.isdir(local):
      files.check_files(local)
      if splits.is_saved_dataset(local):
        return _saved_split(datasets.load_from_disk(local), path, split)
      return datasets.load_dataset(local, split=split)
    if fingerprint.file_ending(local) not in _READERS:
      endings = ', .'.join((*_PARSED_HERE, *_READERS))
      raise ValueError(f'expected one of .{endings}')
    reader = _READERS[fingerprint.file_ending(local)]
    return datasets.load_dataset(reader, data_files=local, split=split)
  except ConnectionError as e:
    raise ValueError(
      f'{path!r} is no local path, and the Hugging Face hub cannot be reached '
      f'({_reason(e)}); name local files, or connect to the network'
    ) from None
  except Exception as e:
    raise splits.split_error(path, split, _reason(e)) from None


def _load_remote(path: str, split: str) -> Sequence[Mapping]:
  """Loads a name on the hub: a repository, or a repository and a config."""
  import datasets

  parts = path.split('/')
  if fingerprint.file_ending(path) in (*_PARSED_HERE, *_READERS):
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


def _saved_split(dataset, path: str, split: str) -> Sequence[Mapping]:
  """Selects a split of a dataset that save_to_disk wrote."""
  if isinstance(dataset, dict):
    if split not in dataset:
      raise ValueError(f'it has the splits {", ".join(dataset)}')
    return dataset[split]
  only_split = str(dataset.split or 'train')
  if split != only_split:
    raise ValueError(f'it has the split {only_split}')
  return dataset


def _reason(e: BaseException) -> str:
  """The message of an error of `datasets` and of its cause, in one line."""
  message = str(e) or type(e).__name__
  if e.__cause__ is not None:
    message += f': {e.__cause__}'
  return ' '.join(message.split())[:500].rstrip('.')
